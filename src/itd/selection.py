"""Exact selection of the k largest from pre-activations that come tile by tile, looking at few of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from itd.screening import Bound

BLOCK = 32
"""Neighbouring latents that are passed over together when none of them can be among the k largest."""
PRIMING = 4
"""The first threshold comes from so many times as many latents as a pool keeps."""


class Found(NamedTuple):
    """Pre-activations above the threshold, as triples; sorted by token."""

    tokens: Int[Tensor, " found"]
    rows: Int[Tensor, " found"]
    upper: Float[Tensor, " found"]


class Pool:
    """The candidates for the k largest of every token, and the threshold that a later one has to pass.

    Values may be known up to a bound only. A candidate is kept while its upper bound exceeds the k-th largest lower bound;
    without a bound both are the value itself. Only positive values are sought: the k largest pass a ReLU.

    upper, indices: (n, capacity); the first `fill` of a row are candidates, sorted or not; what follows them has been
    passed over, and only fills up a token with fewer than k candidates. threshold: (n,), non-negative.
    overflow: (n,), tokens with more candidates than there is room for; their result is not exact. Never without a bound.
    """

    def __init__(
        self, n: int, k: int, like: Tensor, bound: Bound | None = None, norm: Float[Tensor, " n_latents"] | None = None
    ):
        assert (bound is None) == (norm is None)
        self.k, self.bound, self.norm = k, bound, norm
        self.keep = k if bound is None else 4 * k
        shape, device = (n, self.keep + 4 * k), like.device
        self.upper = torch.full(shape, -torch.inf, dtype=like.dtype, device=device)
        self.indices = torch.zeros(shape, dtype=torch.int64, device=device)
        self.fill = torch.zeros(n, dtype=torch.int64, device=device)
        self.threshold = torch.zeros(n, dtype=like.dtype, device=device)
        self.overflow = torch.zeros(n, dtype=torch.bool, device=device)
        self.empty = True

    def offer(self, pre_acts: Float[Tensor, "tile n"], indices: Int[Tensor, " tile"]) -> None:
        """Look for candidates among the pre-activations of some latents."""
        first = PRIMING * self.keep
        if self.empty and len(pre_acts) > first:
            # The first tile is searched as the others are, with a threshold from its own beginning.
            self.offer(pre_acts[:first], indices[:first])
            return self.offer(pre_acts[first:], indices[first:])
        if not self.empty:
            for _ in range(2):
                found = self.search(pre_acts, indices)
                counts = found.tokens.bincount(minlength=len(self.fill))
                if bool((self.fill + counts <= self.upper.shape[1]).all()):
                    return self.add(found, counts, indices)
                self.compact()
        self.take_largest(pre_acts, indices)
        self.empty = False

    def search(self, pre_acts: Float[Tensor, "tile n"], indices: Int[Tensor, " tile"]) -> Found:
        """Find what exceeds the threshold: first among the maxima of blocks, then inside the blocks that do."""
        spare = -len(pre_acts) % BLOCK
        padded = F.pad(pre_acts, (0, 0, 0, spare), value=-torch.inf) if spare else pre_acts
        blocks = padded.view(-1, BLOCK, padded.shape[1])
        peaks = blocks.amax(1).to(self.upper.dtype)
        norms = None
        if self.bound is not None and self.norm is not None:
            norms = F.pad(self.norm[indices], (0, spare)).view(-1, BLOCK)
            peaks = self.raise_(peaks, norms.amax(1)[:, None], self.bound.per_token)
        block, token = (peaks > self.threshold).nonzero(as_tuple=True)
        upper = blocks[block, :, token].to(self.upper.dtype)
        if self.bound is not None and norms is not None:
            upper = self.raise_(upper, norms[block], self.bound.per_token[token][:, None])
        hit, inner = (upper > self.threshold[token][:, None]).nonzero(as_tuple=True)
        order = token[hit].argsort()
        hit, inner = hit[order], inner[order]
        return Found(token[hit], block[hit] * BLOCK + inner, upper[hit, inner])

    def raise_(self, values: Tensor, norms: Tensor, per_token: Tensor) -> Tensor:
        """Return the upper bounds of values; monotone in value and norm."""
        assert self.bound is not None
        return (
            torch.addcmul(values, values.abs(), values.new_tensor(self.bound.relative))
            .addcmul_(norms, per_token)
            .add_(self.bound.offset)
        )

    def lowered(self, upper: Tensor, indices: Tensor) -> Tensor:
        """Return the lower bounds that belong to upper bounds; for a negative value, something negative."""
        if self.bound is None or self.norm is None:
            return upper
        radius = self.norm[indices] * self.bound.per_token[:, None] + self.bound.offset + self.bound.relative * upper.abs()
        return torch.where(upper.isfinite(), upper - 2 * radius, upper)

    def add(self, found: Found, counts: Int[Tensor, " n"], indices: Int[Tensor, " tile"]) -> None:
        """Append candidates for which there is room."""
        first = counts.cumsum(0) - counts
        position = torch.arange(len(found.tokens), device=counts.device)
        slots = (self.fill - first)[found.tokens] + position
        self.upper[found.tokens, slots] = found.upper
        self.indices[found.tokens, slots] = indices[found.rows]
        self.fill += counts

    def compact(self) -> None:
        """Raise the threshold and drop the candidates below it."""
        self.settle(self.upper, self.indices)

    def take_largest(self, pre_acts: Float[Tensor, "tile n"], indices: Int[Tensor, " tile"]) -> None:
        """Merge the largest of a whole tile into the pool."""
        upper = pre_acts.to(self.upper.dtype)
        if self.bound is not None and self.norm is not None:
            upper = self.raise_(upper, self.norm[indices][:, None], self.bound.per_token)
        n_kept = min(self.keep, len(upper))
        largest, rows = upper.T.topk(n_kept, dim=1)
        self.settle(torch.cat([self.upper, largest], 1), torch.cat([self.indices, indices[rows]], 1))
        if n_kept < len(upper):
            self.overflow |= largest[:, -1] > self.threshold

    def settle(self, upper: Float[Tensor, "n any"], indices: Int[Tensor, "n any"]) -> None:
        """Keep the largest, set the threshold, and start filling after the last that exceeds it."""
        kept, order = upper.topk(self.keep, dim=1)
        kept_indices = indices.gather(1, order)
        kth = self.lowered(kept, kept_indices).topk(self.k, dim=1).values[:, -1]
        self.threshold = kth.clamp_min(0)
        self.overflow |= kept[:, -1] > self.threshold
        self.upper.fill_(-torch.inf)
        self.upper[:, : self.keep], self.indices[:, : self.keep] = kept, kept_indices
        self.fill = (kept > self.threshold[:, None]).sum(1)
