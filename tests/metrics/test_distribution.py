from __future__ import annotations

import pytest
import torch
from reference import metrics as twin

from itd.metrics.distribution import frechet_distance, kernel_distance, kernel_distance_interval


def features(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, d, generator=generator) @ mixing * scale + shift


@pytest.mark.parametrize("n", [60, 300])
def test_the_frechet_distance_is_that_of_an_explicit_root(n: int) -> None:
    a, b = features(n, 8, 0), features(n + 20, 8, 1, 0.5, 1.5)
    assert frechet_distance(a, b) == pytest.approx(twin.frechet(a.double().numpy(), b.double().numpy()), rel=1e-6)


def test_fewer_pictures_than_features_are_measured_too() -> None:
    a, b = features(6, 16, 0), features(9, 16, 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) > 0.1


def test_the_kernel_distance_is_that_of_all_pairs() -> None:
    a, b = features(12, 5, 0, scale=0.3), features(9, 5, 1, 0.2, 0.3)
    assert kernel_distance(a, b) == pytest.approx(twin.kernel(a.double().numpy(), b.double().numpy()), rel=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_a_shifted_set_is_further_than_another_draw(distance) -> None:
    a, again, shifted = features(200, 6, 0), features(200, 6, 1), features(200, 6, 2, shift=2.0)
    assert abs(distance(a, again)) < distance(a, shifted)
    assert distance(a, shifted) == pytest.approx(distance(shifted, a))


def test_the_frechet_distance_of_a_shift_alone_is_its_square() -> None:
    a = features(50, 4, 0)
    assert frechet_distance(a, a + 3.0) == pytest.approx(4 * 9.0, rel=1e-4)


def test_the_interval_over_subsets_holds_zero_for_one_distribution_and_not_for_two() -> None:
    same = kernel_distance_interval(features(300, 4, 0), features(300, 4, 1), 40, 60)
    other = kernel_distance_interval(features(300, 4, 0), features(300, 4, 1, shift=2.0), 40, 60)
    assert same.low < 0 < same.high
    assert other.low > 0


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), "one width"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "at least 2 pictures"),
        (torch.full((3, 2), float("nan")), torch.zeros(3, 2), "NaN"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(a: torch.Tensor, b: torch.Tensor, match: str) -> None:
    for distance in (frechet_distance, kernel_distance, kernel_distance_interval):
        with pytest.raises(ValueError, match=match):
            distance(a, b)


@pytest.mark.parametrize("n", [20, 300])
def test_subsets_of_a_kernel_distance_differ_however_small_the_sets_are(n: int) -> None:
    a, b = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n))
    found = kernel_distance_interval(a, b)
    assert found.low < found.value < found.high
