"""Exact sparse kernels: tiled top-k encode, decode by embedding bag, gradients of touched rows only.

Each has a naive dense twin in `tests/reference/`. None ever holds tokens x n_latents, nor a copy of a weight matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itd.screening import Screen
from itd.selection import BLOCK, Pool

TILE_BYTES = 4 * 2**20
"""Upper bound of a tile's pre-activations, in bytes: a tile that stays in the cache is selected from almost for free."""
CHUNK_PAIRS = 512
"""Pairs of latent and token whose gradients are computed at a time, so that all of it stays in the cache."""
HALF_PRECISION = 0.03
"""Relative difference that a cast to half precision may make in a network's activations."""


class SparseCodes(NamedTuple):
    """The k latents that are active at each position, unordered; acts >= 0, an act of 0 means not active."""

    acts: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]


class Group(NamedTuple):
    """Among which latents the k largest are sought: all, or the members."""

    k: int
    members: Bool[Tensor, " n_latents"] | None = None


class Pairs(NamedTuple):
    """Which tokens each latent is active at: codes sorted by latent.

    The pairs of `rows[i]` are those from `offsets[i]` to `offsets[i + 1]`; rows are sorted and unique, acts positive.
    """

    rows: Int[Tensor, " rows"]
    offsets: Int[Tensor, " rows+1"]
    tokens: Int[Tensor, " pairs"]
    acts: Float[Tensor, " pairs"]


class RowGradients(NamedTuple):
    """Gradients of an autoencoder's parameters on some of the rows that were active, and the decoder's rows as they were."""

    rows: Int[Tensor, " rows"]
    decoder: Float[Tensor, "rows d_model"]
    W_enc: Float[Tensor, "rows d_model"]
    b_enc: Float[Tensor, " rows"]
    W_dec: Float[Tensor, "rows d_model"]


# Encode


def topk_encode(
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    k: int,
    screen: Screen | None = None,
) -> SparseCodes:
    """Encode by `topk(relu((x - b_dec) @ W_enc.T + b_enc), k)`, tile by tile over the latents.

    With `screen`, tiles are computed in half precision, and whatever may be among the k largest by the screen's error
    bound is computed again in full: the result is the same.
    """
    return encode_groups(x, W_enc, b_enc, b_dec, [Group(k)], screen)[0]


def encode_groups(
    x: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    groups: Sequence[Group],
    screen: Screen | None = None,
) -> list[SparseCodes]:
    """Encode once, and return the largest of each group of latents.

    A group with fewer than k members, or fewer than k active ones, is filled up with acts of 0.
    """
    centred = x - b_dec
    bound, norm = (None, None) if screen is None else (screen.bound(centred, b_enc), screen.norm)
    like = centred if screen is None else centred[:0].float()
    pools = [Pool(len(x), group.k, like, bound, norm) for group in groups]
    if len(x) == 0:
        return [SparseCodes(x.new_zeros(0, g.k), torch.zeros(0, g.k, dtype=torch.int64, device=x.device)) for g in groups]
    for indices, pre_acts in tiles(centred, W_enc, b_enc, screen, max(group.k for group in groups)):
        for group, pool in zip(groups, pools, strict=True):
            if group.members is None:
                pool.offer(pre_acts, indices)
            elif len(local := group.members[indices].nonzero().flatten()):
                pool.offer(pre_acts[local], indices[local])
    for pool in pools:
        pool.compact()
    if screen is None:
        return [SparseCodes(pool.upper[:, : pool.k].clamp_min(0), pool.indices[:, : pool.k].clone()) for pool in pools]
    codes = [score_candidates(centred, W_enc, b_enc, pool) for pool in pools]
    unsure = torch.stack([pool.overflow for pool in pools]).any(0).nonzero().flatten()
    if len(unsure):
        for known, exact in zip(codes, encode_groups(x[unsure], W_enc, b_enc, b_dec, groups), strict=True):
            known.acts[unsure], known.indices[unsure] = exact
    return codes


def tiles(
    centred: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    screen: Screen | None,
    k: int,
) -> Iterator[tuple[Int[Tensor, " tile"], Float[Tensor, "tile n"]]]:
    """Yield the latents and pre-activations of each tile; the memory of a tile is used again for the next."""
    n_latents, n = len(W_enc), len(centred)
    matrix, columns = (W_enc, centred.T) if screen is None else (screen.W, screen.columns(centred))
    fitting = TILE_BYTES // (matrix.element_size() * n)
    size = min(n_latents, max(4 * k, fitting - fitting % BLOCK))
    buffer = matrix.new_empty(size, n)
    for indices in torch.arange(n_latents, device=centred.device).split(size):
        rows = slice(int(indices[0]), int(indices[0]) + len(indices))
        out = buffer[: len(indices)]
        if screen is None:
            torch.addmm(b_enc[rows, None], matrix[rows], columns, out=out)
        else:
            torch.mm(matrix[rows], columns, out=out)
        yield indices, out


def score_candidates(
    centred: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    pool: Pool,
) -> SparseCodes:
    """Compute the candidates of a pool exactly and return the k largest of each token."""
    counts = pool.fill.clamp_min(pool.k)
    listed = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    candidates, upper = pool.indices[:, : listed.shape[1]], pool.upper[:, : listed.shape[1]]
    indices = candidates[listed]
    exact = torch.full_like(upper, -torch.inf)
    exact[listed] = dot_pairs(centred, W_enc, counts, indices) + b_enc[indices]
    acts, order = torch.where(upper.isfinite(), exact, -torch.inf).topk(pool.k, dim=1, sorted=False)
    return SparseCodes(acts.clamp_min(0), candidates.gather(1, order))


def dot_pairs(
    x: Float[Tensor, "n d_model"],
    W: Float[Tensor, "n_latents d_model"],
    counts: Int[Tensor, " n"],
    indices: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Return the products of each token with its rows: `counts` rows a token, listed one token after the other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        pattern = torch.sparse_csr_tensor(
            F.pad(counts.cumsum(0), (1, 0)), indices, x.new_zeros(len(indices)), (len(x), len(W)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, x, W.T, beta=0.0).values()


def keep_largest(a: SparseCodes, b: SparseCodes, k: int) -> SparseCodes:
    """Return the k largest of two sets of candidates."""
    acts, indices = torch.cat([a.acts, b.acts], 1), torch.cat([a.indices, b.indices], 1)
    if acts.shape[1] <= k:
        return SparseCodes(acts, indices)
    acts, order = acts.topk(k, dim=1, sorted=False)
    return SparseCodes(acts, indices.gather(1, order))


# Decode


def sparse_decode(codes: SparseCodes, W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "n d_model"]:
    """Return `sum_j acts_j * W_dec[indices_j]` for flat codes of shape (n, k)."""
    return F.embedding_bag(codes.indices, W_dec, mode="sum", per_sample_weights=codes.acts)


# Gradients


def sort_by_latent(*codes: SparseCodes) -> Pairs:
    """Return the active pairs of codes of shape (n, k), sorted by latent; the tokens of each further codes count on."""
    tokens, first = [], 0
    for each in codes:
        n, k = each.acts.shape
        tokens.append(torch.arange(first, first + n, device=each.acts.device).repeat_interleave(k))
        first += n
    acts, latents = (torch.cat([part.flatten() for part in parts]) for parts in zip(*codes, strict=True))
    active = (acts > 0).nonzero().flatten()
    latents, order = latents[active].sort(stable=True)
    rows, counts = latents.unique_consecutive(return_counts=True)
    chosen = active[order]
    return Pairs(rows, F.pad(counts.cumsum(0), (1, 0)), torch.cat(tokens)[chosen], acts[chosen])


def gradient_chunks(
    pairs: Pairs,
    centred: Float[Tensor, "n d_model"],
    grad: Float[Tensor, "n d_model"],
    W_dec: Float[Tensor, "n_latents d_model"],
) -> Iterator[RowGradients]:
    """Back-propagate `grad` (of the loss by the reconstruction) through decode and encode, some rows at a time.

    dL/dW_dec_j = sum_t acts_tj grad_t; dL/dW_enc_j = sum_t (W_dec_j grad_t) centred_t; dL/db_enc_j = sum_t W_dec_j grad_t

    A row may be changed as soon as its gradient was yielded. Sums are taken in the same order every time, on GPUs too.
    """
    steps = torch.arange(0, len(pairs.tokens), CHUNK_PAIRS, device=pairs.offsets.device)
    starts = torch.searchsorted(pairs.offsets[:-1], steps).unique().tolist()
    for first, last in pairwise(sorted({*starts, len(pairs.rows)})):
        rows, offsets = pairs.rows[first:last], pairs.offsets[first : last + 1]
        low, high = int(offsets[0]), int(offsets[-1])
        tokens, acts = pairs.tokens[low:high], pairs.acts[low:high]
        local = torch.arange(len(rows), device=rows.device).repeat_interleave(offsets.diff())
        decoder = W_dec.index_select(0, rows)
        acts_grad = torch.linalg.vecdot(decoder.index_select(0, local), grad.index_select(0, tokens))

        bags, each = offsets[:-1] - low, torch.arange(len(tokens), device=rows.device)
        yield RowGradients(
            rows,
            decoder,
            F.embedding_bag(tokens, centred, bags, mode="sum", per_sample_weights=acts_grad),
            F.embedding_bag(each, acts_grad[:, None], bags, mode="sum")[:, 0],
            F.embedding_bag(tokens, grad, bags, mode="sum", per_sample_weights=acts),
        )


def same_up_to(a: Float[Tensor, " d"], b: Float[Tensor, " d"], tolerance: float = HALF_PRECISION) -> bool:
    """Tell whether two vectors are the same up to a difference relative to the second's length; NaN is like nothing."""
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())
