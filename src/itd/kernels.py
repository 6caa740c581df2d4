"""Exact sparse kernels: tiled top-k encode, decode by embedding bag, gradients of touched rows only.

Each has a naive dense twin in `tests/reference/`. None ever holds tokens x n_latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TILE_BYTES = 64 * 2**20
"""Upper bound of a tile's pre-activations, in bytes."""


class SparseCodes(NamedTuple):
    """The k latents that are active at each position, unordered; acts >= 0, an act of 0 means not active."""

    acts: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]


class SparseGradients(NamedTuple):
    """Gradients of an autoencoder's parameters on the rows that were active."""

    rows: Int[Tensor, " rows"]
    W_enc: Float[Tensor, "rows d_model"]
    b_enc: Float[Tensor, " rows"]
    W_dec: Float[Tensor, "rows d_model"]
    b_dec: Float[Tensor, " d_model"]


def topk_encode(
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    k: int,
) -> SparseCodes:
    """Encode by `topk(relu((x - b_dec) @ W_enc.T + b_enc), k)`, tile by tile over the latents.

    The top k of every tile contain the top k of the whole, so the result is exact.
    """
    centred, n_latents = x - b_dec, len(W_enc)
    tile = min(n_latents, max(4 * k, TILE_BYTES // (4 * max(1, len(x)))))
    best: SparseCodes | None = None
    for start in range(0, n_latents, tile):
        rows = slice(start, start + tile)
        pre_acts = torch.addmm(b_enc[rows], centred, W_enc[rows].T)
        acts, indices = pre_acts.topk(min(k, pre_acts.shape[1]), dim=1, sorted=False)
        found = SparseCodes(acts, indices + start)
        best = found if best is None else keep_largest(best, found, k)
    assert best is not None
    return SparseCodes(best.acts.clamp_min(0), best.indices)


def keep_largest(a: SparseCodes, b: SparseCodes, k: int) -> SparseCodes:
    """Return the k largest of two sets of candidates."""
    acts, indices = torch.cat([a.acts, b.acts], 1), torch.cat([a.indices, b.indices], 1)
    if acts.shape[1] <= k:
        return SparseCodes(acts, indices)
    acts, order = acts.topk(k, dim=1, sorted=False)
    return SparseCodes(acts, indices.gather(1, order))


def sparse_decode(codes: SparseCodes, W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "n d_model"]:
    """Return `sum_j acts_j * W_dec[indices_j]` for flat codes of shape (n, k)."""
    return F.embedding_bag(codes.indices, W_dec, mode="sum", per_sample_weights=codes.acts)


def sparse_gradients(
    centred: Float[Tensor, "n d_model"],
    codes: SparseCodes,
    grad: Float[Tensor, "n d_model"],
    W_dec: Float[Tensor, "n_latents d_model"],
) -> SparseGradients:
    """Back-propagate `grad` (of the loss by the reconstruction) through decode and encode.

    Rows are sorted and unique. The gradient of `b_dec` counts its use in the decoder only, as in OpenAI's trainer.
    """
    n, k = codes.indices.shape
    acts_grad = torch.bmm(W_dec[codes.indices], grad[:, :, None])[:, :, 0] * (codes.acts > 0)
    rows, inverse = codes.indices.flatten().unique(return_inverse=True)
    positions = torch.stack([inverse, torch.arange(n, device=inverse.device).repeat_interleave(k)])

    def gather(values: Float[Tensor, "n k"], vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "rows d_model"]:
        weights = torch.sparse_coo_tensor(positions, values.flatten(), (len(rows), n), check_invariants=False)
        return torch.sparse.mm(weights.coalesce(), vectors)

    b_enc = torch.zeros(len(rows), dtype=grad.dtype, device=grad.device).index_add_(0, inverse, acts_grad.flatten())
    return SparseGradients(rows, gather(acts_grad, centred), b_enc, gather(codes.acts, grad), grad.sum(0))


def add_gradients(a: SparseGradients, b: SparseGradients) -> SparseGradients:
    """Return the sum of two gradients; rows sorted and unique."""
    rows, inverse = torch.cat([a.rows, b.rows]).unique(return_inverse=True)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(len(rows), *x.shape[1:]).index_add_(0, inverse, torch.cat([x, y]))

    return SparseGradients(rows, total(a.W_enc, b.W_enc), total(a.b_enc, b.b_enc), total(a.W_dec, b.W_dec), a.b_dec + b.b_dec)
