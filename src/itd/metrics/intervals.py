"""Rates with their uncertainty: Wilson intervals of what was counted, conformal intervals of what a threshold promises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Rate(NamedTuple):
    """A share or a mean with its confidence interval; NaN where nothing was counted."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return f"{self.value:.4g}" + ("" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]")


NOTHING = Rate(math.nan, math.nan, math.nan, 0)


def value_of(measure: Rate | float) -> float:
    """Return a measure without its interval."""
    return measure.value if isinstance(measure, Rate) else float(measure)


def require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence}")


def wilson(n_hits: int, n: int, confidence: float = 0.95) -> Rate:
    """Return a share with its Wilson score interval.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1-p)/n) it has a width at 0 and at 1.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Raises:
        ValueError: hits outside 0..n, or a confidence outside (0, 1).

    >>> wilson(0, 100).high < 0.04
    True
    """
    require_confidence(confidence)
    if not 0 <= n_hits <= n:
        raise ValueError(f"hits lie between 0 and n = {n}, got {n_hits}")
    if n == 0:
        return NOTHING
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = n_hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return Rate(p, 0.0 if n_hits == 0 else max(0.0, low), 1.0 if n_hits == n else min(1.0, high), n)


def rate(flags: Iterable[bool], confidence: float = 0.95) -> Rate:
    """Return the share of true flags with its Wilson interval."""
    listed = [bool(flag) for flag in flags]
    return wilson(sum(listed), len(listed), confidence)


def clustered_rate(groups: Sequence[Sequence[bool]], confidence: float = 0.95, n_draws: int = 2000, seed: int = 0) -> Rate:
    """Return the share of true flags, with the interval of a bootstrap over groups.

    Pictures of one concept rise and fall together: drawing concepts, not pictures, keeps the interval honest. Where all
    groups agree fully, the Wilson interval of the number of groups stands in; where there is one group, that of its flags.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    require_confidence(confidence)
    counts = torch.tensor([[sum(map(bool, group)), len(group)] for group in groups if len(group)], dtype=torch.float64)
    if len(counts) == 0:
        return NOTHING
    n, value = int(counts[:, 1].sum()), float(counts[:, 0].sum() / counts[:, 1].sum())
    if len(counts) == 1:
        return wilson(int(counts[0, 0]), n, confidence)
    if value in (0.0, 1.0):
        bounds = wilson(round(value * len(counts)), len(counts), confidence)
        return Rate(value, bounds.low, bounds.high, n)
    drawn = drawn_sums(counts, n_draws, seed)
    low, high = interval_of(drawn[:, 0] / drawn[:, 1], confidence)
    return Rate(value, low, high, n)


def rate_by(keys: Iterable[str], flags: Iterable[bool]) -> Rate:
    """Return the share of true flags, with an interval over the groups of one key."""
    groups: dict[str, list[bool]] = {}
    for key, flag in zip(keys, flags, strict=True):
        groups.setdefault(key, []).append(flag)
    return clustered_rate(list(groups.values()))


def drawn_sums(counts: Float[Tensor, "groups k"], n_draws: int = 2000, seed: int = 0) -> Float[Tensor, "draws k"]:
    """Return the sums of counts over bootstrap draws of as many groups.

    One seed draws the same groups whatever the counts: the difference of two systems' draws is paired.
    """
    picks = torch.randint(len(counts), (n_draws, len(counts)), generator=torch.Generator().manual_seed(seed))
    return counts[picks].sum(1)


def mean_rate(values: Float[Tensor, " n"], confidence: float = 0.95, n_draws: int = 2000, seed: int = 0) -> Rate:
    """Return a mean with its bootstrap interval."""
    require_confidence(confidence)
    if len(values) == 0:
        return NOTHING
    picks = torch.randint(len(values), (n_draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = interval_of(values.double()[picks].mean(1), confidence)
    return Rate(float(values.double().mean()), low, high, len(values))


def interval_of(draws: Float[Tensor, " draws"], confidence: float) -> tuple[float, float]:
    """Return the central interval of bootstrap draws."""
    tail = (1 - confidence) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def conformal_interval(n: int, n_reached: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return where the true rate of a calibrated threshold lies, given the calibration set.

    A threshold just above the r-th smallest of n exchangeable negatives, r = n - n_reached, is exceeded by a new one with
    a probability that is Beta(n + 1 - r, r) distributed over calibration sets.

    Source: Vovk 2012, Conditional validity of inductive conformal predictors, proposition 2.

    Raises:
        ValueError: n below 1, `n_reached` outside 0..n-1, a confidence outside (0, 1).
        ImportError: SciPy is missing; the extra `evaluation` brings it.
    """
    require_confidence(confidence)
    if n < 1 or not 0 <= n_reached < n:
        raise ValueError(f"a threshold has between 0 and n - 1 of n calibration scores at or above it, got {n_reached} of {n}")
    try:
        from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise ImportError("conformal intervals need SciPy: pip install 'itd[evaluation]'") from error
    rank, tail = n - n_reached, (1 - confidence) / 2
    return float(beta.ppf(tail, n + 1 - rank, rank)), float(beta.ppf(1 - tail, n + 1 - rank, rank))
