from __future__ import annotations

import math
import random

import pytest
import torch
from scipy.stats import binomtest

from itd.gate import threshold_for_fpr
from itd.metrics.intervals import clustered_rate, conformal_interval, drawn_sums, mean_rate, rate, rate_by, value_of, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 5), (5, 5), (37, 100), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_agrees_with_an_independent_implementation(hits: int, n: int, confidence: float) -> None:
    found = wilson(hits, n, confidence)
    expected = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == hits / n


def test_a_rate_of_flags_counts_them() -> None:
    assert rate([True, False, False, True]) == wilson(2, 4)
    assert math.isnan(rate([]).value)
    assert str(rate([])) == "-"


def test_wilson_has_a_width_where_nothing_was_seen() -> None:
    assert wilson(0, 1000).low == 0
    assert 0 < wilson(0, 1000).high < wilson(0, 100).high


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"n = 3, got {hits}"):
        wilson(hits, n)


def test_a_confidence_outside_0_and_1_is_refused() -> None:
    for call in (lambda: wilson(1, 2, 1.0), lambda: mean_rate(torch.ones(2), 0.0), lambda: conformal_interval(5, 1, 2.0)):
        with pytest.raises(ValueError, match="confidence"):
            call()


def test_the_interval_of_clusters_is_wider_than_that_of_pictures_where_clusters_agree() -> None:
    groups = [[i % 2 == 0] * 20 for i in range(10)]
    clustered, flat = clustered_rate(groups), rate([flag for group in groups for flag in group])
    assert clustered.value == flat.value == 0.5
    assert clustered.high - clustered.low > 2 * (flat.high - flat.low)


def test_the_interval_of_clusters_is_like_that_of_pictures_where_they_are_independent() -> None:
    rng = random.Random(0)
    groups = [[rng.random() < 0.3 for _ in range(10)] for _ in range(200)]
    clustered, flat = clustered_rate(groups), rate([flag for group in groups for flag in group])
    assert clustered.high - clustered.low == pytest.approx(flat.high - flat.low, rel=0.25)


def test_agreeing_clusters_still_have_a_width() -> None:
    found = clustered_rate([[True] * 25] * 8)
    assert (found.value, found.high, found.n) == (1.0, 1.0, 200)
    assert found.low == wilson(8, 8).low


def test_drawn_sums_are_of_as_many_groups_the_same_for_all_counts() -> None:
    counts = torch.tensor([[1, 10], [2, 20], [3, 30]])
    sums = drawn_sums(counts)
    assert torch.equal(sums[:, 1], 10 * sums[:, 0]), "columns are drawn together"
    assert torch.equal(drawn_sums(counts[:, :1] + 1), sums[:, :1] + 3), "and so are those of another table"
    assert set(sums[:, 0].tolist()) == set(range(3, 10))
    assert not torch.equal(drawn_sums(counts, seed=1), sums)


def test_the_bootstrap_interval_of_a_mean_holds_the_mean() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    found = mean_rate(values)
    assert found.low < float(values.mean()) < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 300**0.5, rel=0.15)


def test_the_conformal_interval_covers_the_true_rate_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    n, fpr, inside = 400, 0.05, 0
    for _ in range(300):
        scores = torch.rand(n, generator=generator, dtype=torch.float64)
        threshold = threshold_for_fpr(scores, fpr)
        low, high = conformal_interval(n, int((scores >= threshold).sum()), 0.9)
        inside += low <= 1 - threshold <= high
    assert 0.84 <= inside / 300 <= 0.96


@pytest.mark.parametrize(("n", "reached"), [(0, 0), (5, 5), (5, -1)])
def test_the_conformal_interval_refuses_impossible_counts(n: int, reached: int) -> None:
    with pytest.raises(ValueError, match="calibration scores"):
        conformal_interval(n, reached)


def test_a_rate_by_key_is_over_groups_and_of_one_group_over_its_flags() -> None:
    flags = [True, True, False, False]
    assert rate_by("aabb", flags) == clustered_rate([[True, True], [False, False]])
    assert rate_by("aaaa", flags) == rate(flags)
    assert rate_by("", []).n == 0


def test_a_measure_is_its_value_with_or_without_an_interval() -> None:
    assert value_of(rate([True, False])) == value_of(0.5) == 0.5


def test_the_interval_of_one_group_is_that_of_its_flags() -> None:
    flags = [True] * 8 + [False] * 2
    assert clustered_rate([flags]) == rate(flags) == rate_by(["a"] * 10, flags)
