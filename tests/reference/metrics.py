"""Slow, obvious twins of the metrics."""

from __future__ import annotations

import numpy as np
from scipy.linalg import sqrtm


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017 with an explicit matrix root."""
    covariances = [np.cov(side, rowvar=False) for side in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1])
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, pair by pair."""

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / len(u) + 1) ** 3)

    n, m = len(a), len(b)
    first = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    second = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return first + second - 2 * sum(k(u, v) for u in a for v in b) / (n * m)


def roc(positives: list[float], negatives: list[float]) -> list[tuple[float, float, float]]:
    """Every distinct score as a threshold, from the highest down."""
    rows = []
    for threshold in sorted({*positives, *negatives}, reverse=True):
        rates = [sum(score >= threshold for score in side) / len(side) for side in (positives, negatives)]
        rows.append((threshold, *rates))
    return rows
