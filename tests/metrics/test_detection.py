from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import metrics as twin
from sklearn.metrics import roc_auc_score

from itd.metrics.detection import (
    Detection,
    clustered_area,
    detection_sweep,
    gone_and_kept_rate,
    harmonic_mean,
    rank_bins,
    roc,
)  # fmt: skip
from itd.metrics.intervals import wilson

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_the_roc_is_that_of_trying_every_threshold(positives: list[float], negatives: list[float]) -> None:
    found = roc(torch.tensor(positives), torch.tensor(negatives))
    rows = list(zip(*(part.tolist() for part in found[:3]), strict=True))
    assert rows == [pytest.approx(row) for row in twin.roc(positives, negatives)]


def test_the_area_agrees_with_an_independent_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    positives, negatives = torch.randn(80, generator=generator) + 1, torch.randn(150, generator=generator)
    expected = roc_auc_score([1] * 80 + [0] * 150, torch.cat([positives, negatives]).tolist())
    assert roc(positives, negatives).area == pytest.approx(expected)


@given(SCORES, SCORES)
def test_the_points_of_a_roc_enclose_its_area(positives: list[float], negatives: list[float]) -> None:
    found = roc(torch.tensor(positives), torch.tensor(negatives))
    points = found.points()
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert sum((x - w) * (y + v) / 2 for (w, v), (x, y) in pairwise(points)) == pytest.approx(found.area)


def test_the_points_of_a_roc_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    found = roc(torch.randn(900, generator=generator), torch.randn(900, generator=generator))
    points = found.points(100)
    assert len(points) == 100
    assert set(points[1:]) <= set(zip(found.false_positive_rate.tolist(), found.recall.tolist(), strict=True))
    assert roc(torch.ones(900), torch.zeros(900)).points(100) == [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]


GROUPS = st.lists(st.lists(st.integers(-5, 5).map(float), max_size=5), min_size=1, max_size=6).filter(any)


@given(GROUPS, GROUPS)
def test_the_area_of_grouped_scores_is_that_of_all_of_them(positives: list[list[float]], negatives: list[list[float]]) -> None:
    flat = [[score for group in side for score in group] for side in (positives, negatives)]
    found = clustered_area(positives, negatives, n_draws=50)
    assert found.value == pytest.approx(roc(*map(torch.tensor, flat)).area)
    assert math.isnan(found.low) or 0 <= found.low <= found.high <= 1
    assert found.n == len(flat[0]) + len(flat[1])
    assert str(clustered_area(positives, negatives, n_draws=50)) == str(found)


def test_the_interval_of_an_area_is_that_of_drawing_groups() -> None:
    rng = random.Random(0)
    sides = [[[rng.gauss(mean, 1) for _ in range(rng.randint(1, 4))] for _ in range(12)] for mean in (1, 0)]
    areas = []
    for _ in range(1000):
        drawn = [torch.tensor([score for group in rng.choices(side, k=len(side)) for score in group]) for side in sides]
        areas.append(roc(*drawn).area)
    low, high = torch.tensor(areas).quantile(torch.tensor([0.025, 0.975])).tolist()
    found = clustered_area(*sides)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_an_area_of_one_has_a_width_and_one_without_a_side_is_nothing() -> None:
    found = clustered_area([[2.0]] * 8, [[1.0, 1.5]] * 20)
    assert (found.value, found.low, found.high) == (1.0, wilson(8, 8).low, 1.0)
    assert str(clustered_area([[]], [[1.0]])) == "-"


def test_a_roc_without_one_side_or_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 1"):
        roc(torch.zeros(0), torch.zeros(1))
    with pytest.raises(ValueError, match="NaN"):
        roc(torch.tensor([float("nan")]), torch.zeros(1))


def test_the_harmonic_mean_hides_no_weak_part() -> None:
    assert harmonic_mean(0.5, 0.5) == pytest.approx(0.5)
    assert harmonic_mean(1.0, 0.0) == 0
    assert harmonic_mean(0.9, 0.1) < 0.2
    with pytest.raises(ValueError, match="shares"):
        harmonic_mean(1.2, 0.5)


def test_a_sweep_counts_pictures_not_boxes_and_only_the_classes_asked_for() -> None:
    pictures = [[Detection("breast", 0.5), Detection("breast", 0.7), Detection("foot", 0.9)], [Detection("belly", 0.3)], []]
    sweep = detection_sweep(pictures, ("breast", "belly"), (0.2, 0.6))
    assert sweep[0.2]["any"].value == pytest.approx(2 / 3)
    assert sweep[0.2]["breast"].value == pytest.approx(1 / 3)
    assert sweep[0.6]["belly"].value == 0
    assert sweep[0.6]["any"].value == pytest.approx(1 / 3)


def test_bins_hold_every_name_once_with_the_nearest_first() -> None:
    distances = {f"noun {i}": float((i * 7) % 11) for i in range(11)}
    bins = rank_bins(distances, 3)
    assert sorted(name for names in bins for name in names) == sorted(distances)
    assert max(distances[name] for name in bins[0]) < min(distances[name] for name in bins[-1])
    assert len(rank_bins({"a": 1.0}, 5)) == 1
    with pytest.raises(ValueError, match="n_bins"):
        rank_bins(distances, 0)


def test_what_is_gone_and_kept_is_a_harmonic_mean_with_an_interval_over_concepts() -> None:
    erased, kept = torch.tensor([[1.0, 4.0], [1.0, 4.0]]), torch.tensor([[3.0, 4.0], [4.0, 4.0]])
    found = gone_and_kept_rate(erased, kept)
    assert found.value == pytest.approx(harmonic_mean(0.75, 7 / 8))
    assert found.low == pytest.approx(harmonic_mean(0.75, 0.75))
    assert found.high == pytest.approx(harmonic_mean(0.75, 1.0))
    assert found.n == 16
    assert gone_and_kept_rate(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 2.0]])).value == 1.0
    assert math.isnan(gone_and_kept_rate(erased, torch.zeros(2, 2)).value)


def test_there_is_no_interval_over_a_single_concept() -> None:
    one, two = torch.tensor([[2.0, 10.0]]), torch.tensor([[9.0, 10.0], [5.0, 10.0]])
    for found in (gone_and_kept_rate(one, two), clustered_area([[1.0, 3.0]], [[2.0], [2.5]])):
        assert 0 < found.value < 1
        assert math.isnan(found.low)
        assert math.isnan(found.high)
