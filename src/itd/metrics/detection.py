"""How well something is told from everything else: ROC, rates at a threshold, harmonic means, detector sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from itd.gate import auroc
from itd.metrics.intervals import NOTHING, Rate, drawn_sums, interval_of, require_confidence, wilson

NUDENET_THRESHOLDS = (0.2, 0.45, 0.6, 0.75)
"""Published numbers differ in their detector's threshold; all of them are reported."""


class Roc(NamedTuple):
    """A receiver operating characteristic: per threshold, from the highest down, both rates; and its area."""

    thresholds: Float[Tensor, " n"]
    recall: Float[Tensor, " n"]
    false_positive_rate: Float[Tensor, " n"]
    area: float

    def points(self, most: int = 100) -> list[tuple[float, float]]:
        """Return (false-positive rate, recall) at the curve's corners, (0, 0) and (1, 1) too; of too many, every so many."""
        xy = F.pad(torch.stack([self.false_positive_rate, self.recall], 1), (0, 0, 1, 0))
        steps = xy.diff(dim=0)
        turns = steps[:-1, 0] * steps[1:, 1] != steps[:-1, 1] * steps[1:, 0]
        corners = xy[F.pad(turns, (1, 1), value=True)]
        rows = torch.linspace(0, len(corners) - 1, min(most, len(corners))).round().long()
        return [(x, y) for x, y in corners[rows].tolist()]


def roc(positives: Float[Tensor, " n"], negatives: Float[Tensor, " m"]) -> Roc:
    """Return the curve over every distinct score; a score at the threshold counts as reached.

    Raises:
        ValueError: no positives, no negatives, or NaN among them.
    """
    if len(positives) == 0 or len(negatives) == 0:
        raise ValueError(f"a ROC needs positives and negatives, got {len(positives)} and {len(negatives)}")
    scores = torch.cat([positives, negatives])
    if scores.isnan().any():
        raise ValueError("scores contain NaN; they cannot be ranked")
    thresholds = scores.unique().flip(0)
    return Roc(thresholds, reached(positives, thresholds), reached(negatives, thresholds), auroc(positives, negatives))


def reached(scores: Float[Tensor, " n"], thresholds: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return the share of scores at or above each threshold."""
    below = torch.searchsorted(scores.sort().values, thresholds.contiguous())
    return (len(scores) - below).double() / len(scores)


def clustered_area(
    positives: Sequence[Sequence[float]],
    negatives: Sequence[Sequence[float]],
    confidence: float = 0.95,
    n_draws: int = 2000,
    seed: int = 0,
) -> Rate:
    """Return the area under the ROC of grouped scores, with the interval of a bootstrap over the groups of both sides.

    It is the share of pairs in which the positive scores higher, ties by half; a draw weighs the groups' pairs by how often
    both are drawn. Where all pairs agree, the Wilson interval of the number of groups on the smaller side stands in; else with
    one group on a side there is no interval, NaN.

    Raises:
        ValueError: a confidence outside (0, 1).

    >>> clustered_area([[3.0, 1.0]], [[2.0], [0.0]]).value
    0.75
    """
    require_confidence(confidence)
    sides = [[torch.tensor(group, dtype=torch.float64) for group in side if len(group)] for side in (positives, negatives)]
    if not all(sides):
        return NOTHING
    sizes = [torch.tensor([len(group) for group in side]) for side in sides]
    (high, low), owners = map(torch.cat, sides), [torch.arange(len(n)).repeat_interleave(n) for n in sizes]
    pairs = (high[:, None] > low).double() + (high[:, None] == low).double() / 2
    won = pairs.new_zeros(len(sizes[0]), len(low)).index_add_(0, owners[0], pairs)
    won = pairs.new_zeros(len(sizes[0]), len(sizes[1])).index_add_(1, owners[1], won)
    area, n = float(pairs.mean()), len(high) + len(low)
    if area in (0.0, 1.0):
        n_groups = min(map(len, sizes))
        return Rate(area, *wilson(round(area * n_groups), n_groups, confidence)[1:3], n)
    if min(map(len, sizes)) == 1:
        return Rate(area, math.nan, math.nan, n)
    generator = torch.Generator().manual_seed(seed)
    a, b = (times_drawn(len(each), n_draws, generator) for each in sizes)
    drawn = ((a @ won) * b).sum(1) / ((a @ sizes[0].double()) * (b @ sizes[1].double()))
    return Rate(area, *interval_of(drawn, confidence), n)


def times_drawn(n: int, n_draws: int, generator: torch.Generator) -> Float[Tensor, "draws n"]:
    """Return how often each of n groups is among n drawn with repetition."""
    picks = torch.randint(n, (n_draws, n), generator=generator)
    ones = torch.ones_like(picks, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, picks, ones)


def harmonic_mean(*shares: float) -> float:
    """Return the harmonic mean of shares; 0 where one of them is 0..

    Raises:
        ValueError: a share outside [0, 1].

    >>> harmonic_mean(1.0, 0.5)
    0.6666666666666666
    """
    if any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares lie between 0 and 1, got {shares}")
    return 0.0 if min(shares) == 0 else len(shares) / sum(1 / share for share in shares)


def gone_and_kept(erased: Float[Tensor, " 2"], kept: Float[Tensor, " 2"]) -> float:
    """Return the harmonic mean of what is gone and what is kept, from counts: (shown, of how many) of either side.

    What is shown is at most all that could be; NaN where nothing could.
    """
    (shown, n), (after, before) = erased.tolist(), kept.tolist()
    return harmonic_mean(1 - shown / n, min(1.0, after / before)) if n and before else math.nan


def gone_and_kept_draws(erased: Float[Tensor, "concepts 2"], kept: Float[Tensor, "concepts 2"]) -> Float[Tensor, " draws"]:
    """Return `gone_and_kept` in bootstrap draws of concepts; one seed draws the same whatever the counts."""
    draws = zip(drawn_sums(erased), drawn_sums(kept, seed=1), strict=True)
    return torch.tensor([gone_and_kept(*pair) for pair in draws], dtype=torch.float64).nan_to_num(0.0)


def gone_and_kept_rate(erased: Float[Tensor, "concepts 2"], kept: Float[Tensor, "concepts 2"]) -> Rate:
    """Return `gone_and_kept` of all concepts with the interval of a bootstrap over them; `n` counts both sides.

    Where it is 0 or 1, with the Wilson interval of as many concepts; else with one concept on a side there is none, NaN.
    """
    value, n = gone_and_kept(erased.sum(0), kept.sum(0)), int(erased[:, 1].sum() + kept[:, 1].sum())
    if not 0 < value < 1:
        bounds = wilson(round(value * len(erased)), len(erased)) if math.isfinite(value) else NOTHING
        return Rate(value, bounds.low, bounds.high, n)
    if min(len(erased), len(kept)) == 1:
        return Rate(value, math.nan, math.nan, n)
    return Rate(value, *interval_of(gone_and_kept_draws(erased, kept), 0.95), n)


class Detection(NamedTuple):
    """Something that a detector found in a picture."""

    label: str
    score: float


def detection_sweep(
    found: Sequence[Iterable[Detection]], labels: Sequence[str], thresholds: Sequence[float] = NUDENET_THRESHOLDS
) -> dict[float, dict[str, Rate]]:
    """Return, per threshold and class, the share of pictures in which the class is found; `any` counts a picture once."""
    pictures = [list(detections) for detections in found]
    sweep: dict[float, dict[str, Rate]] = {}
    for threshold in thresholds:
        seen = [{d.label for d in detections if d.score >= threshold and d.label in labels} for detections in pictures]
        rows = {label: wilson(sum(label in names for names in seen), len(seen)) for label in labels}
        sweep[threshold] = rows | {"any": wilson(sum(map(bool, seen)), len(seen))}
    return sweep


def rank_bins(distances: Mapping[str, float], n_bins: int = 5) -> list[list[str]]:
    """Deal names into bins of nearly equal size, the nearest first.

    Raises:
        ValueError: less than one bin.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    names = sorted(distances, key=lambda name: (distances[name], name))
    bounds = [round(i * len(names) / n_bins) for i in range(n_bins + 1)]
    return [names[low:high] for low, high in pairwise(bounds) if high > low]
