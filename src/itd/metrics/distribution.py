"""Distances between two sets of pictures, on features that the caller computed: FID and KID."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from itd.metrics.intervals import Rate, interval_of


def require_features(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> None:
    """Raise ValueError unless both are sets of at least two finite vectors of one width."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are two arrays (pictures, width) of one width, got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a distance of distributions needs at least 2 pictures on each side, got {len(a)} and {len(b)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features contain NaN or infinity")


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Return the Frechet distance of two Gaussians fitted to the features; with Inception features, FID.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the trace of the root is the sum of the singular values of
    C_a^(1/2) C_b^(1/2). It is biased upwards in small sets: compare only sets of one size, and beside a floor.

    Source: Heusel et al. 2017, GANs trained by a two time-scale update rule, section 3.

    Raises:
        ValueError: other shapes, fewer than two pictures, or features that are not finite.
    """
    require_features(a, b)
    x, y = a.double(), b.double()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    # C = R^T R with R = centred / sqrt(n - 1), so tr (C_a C_b)^(1/2) is the nuclear norm of R_a R_b^T: no root of a matrix.
    roots = [(side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (x, y)]
    traces = [root.square().sum() for root in roots]
    if min(len(x), len(y)) > x.shape[1]:
        roots = [torch.linalg.qr(root, mode="r").R for root in roots]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((shift + traces[0] + traces[1] - 2 * cross).clamp_min(0))


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Return the squared maximum mean discrepancy under k(x, y) = (x . y / d + 1)^3; with Inception features, KID.

    Unbiased: around 0, and also below it, for two sets of one distribution.

    Source: Binkowski et al. 2018, Demystifying MMD GANs, section 2.

    Raises:
        ValueError: see `frechet_distance`.
    """
    require_features(a, b)
    x, y = a.double(), b.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        gram = kernel(u, u)
        return (gram.sum() - gram.diagonal().sum()) / (len(u) * (len(u) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def kernel_distance_interval(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    n_subsets: int = 50,
    subset_size: int = 500,
    seed: int = 0,
    confidence: float = 0.95,
) -> Rate:
    """Return the kernel distance over random subsets: mean, and the interval that the subsets span.

    A subset has at most half of the smaller set, as subsets that are the whole set would all be the same.

    Raises:
        ValueError: see `frechet_distance`.
    """
    require_features(a, b)
    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, max(2, min(len(a), len(b)) // 2))
    draws = []
    for _ in range(n_subsets):
        picks = [torch.randperm(len(side), generator=generator)[:size] for side in (a, b)]
        draws.append(kernel_distance(a[picks[0]], b[picks[1]]))
    values = torch.tensor(draws, dtype=torch.float64)
    return Rate(float(values.mean()), *interval_of(values, confidence), n_subsets)


def feature_distances(name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Rate | float]:
    """Return FID and KID between two sets of pictures by kind of features; of the larger set as many as the smaller one has."""
    found: dict[str, Rate | float] = {}
    for kind in a:
        n = min(len(a[kind]), len(b[kind]))
        picks = [torch.randperm(len(side), generator=torch.Generator().manual_seed(0))[:n] for side in (a[kind], b[kind])]
        x, y = a[kind][picks[0]], b[kind][picks[1]]
        found[f"fid_{kind}_{name}"] = frechet_distance(x, y)
        found[f"kid_{kind}_{name}"] = kernel_distance_interval(x, y, n_subsets=20)
    return found
