"""Decide most tokens from few rows of the encoder, by bounds of their scores that hold for the full computation.

Whether a target feature is active depends on all latents: it has to be among the k largest. Two facts need only some. An act
is at most the pre-activation. And the k-th largest pre-activation within any set S of latents is at most the k-th largest of
all, so a feature below it is not active. A token whose score is below every threshold even if all features that may be active
were active is decided. The few tokens that some latents leave open are compared with all, many at a time and part by part,
until they are decided: only then is it known which features are active, and that a threshold is reached. A prompt with a token
that is open even then, because rounding could decide, has its score computed in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itd.features import ConceptFeatures
from itd.kernels import SparseCodes, keep_largest, topk_encode
from itd.sae import SAE

CHUNK_BYTES = 32 * 2**20
"""Upper bound of the pre-activations that are held at a time."""
FIRST_SHARE = 8
"""One of so many latents that are active often is compared with first."""
PART_LATENTS = 2**16
"""Of all latents, so many are compared with at a time."""
Reached = tuple[int, ...]
"""The concepts whose threshold a token certainly reaches; it is certainly below all others."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an encoder, in memory. longest, bias: upper bounds of the rows' lengths and of the biases' sizes."""

    W_enc: Float[Tensor, "rows d_model"]
    b_enc: Float[Tensor, " rows"]
    longest: float
    bias: float

    @classmethod
    def of(cls, sae: SAE, indices: Int[Tensor, " rows"]) -> Rows:
        """Copy rows of the autoencoder."""
        at = indices.to(sae.W_enc.device)
        return cls.holding(sae.W_enc.index_select(0, at), sae.b_enc.index_select(0, at))

    @classmethod
    def holding(cls, W_enc: Float[Tensor, "rows d_model"], b_enc: Float[Tensor, " rows"]) -> Rows:
        """Measure rows."""
        if len(b_enc) == 0:
            return cls(W_enc, b_enc, 0.0, 0.0)
        return cls(W_enc, b_enc, float(length_bound(W_enc).max()), float(b_enc.abs().max()))

    def __len__(self) -> int:
        return len(self.b_enc)

    def first(self, n: int) -> Rows:
        """Return the first n rows."""
        return replace(self, W_enc=self.W_enc[:n], b_enc=self.b_enc[:n])

    def rounding(self, length: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return how far two computations of a pre-activation in floating point can lie apart; length: of the token.

        Each differs from the exact one by at most gamma (|x| |w| + |b|), gamma = n u / (1 - n u) for n = d_model + 1 terms in
        any order of summation. Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1.
        """
        gamma = (self.W_enc.shape[1] + 8) * torch.finfo(self.b_enc.dtype).eps
        return 2 * gamma * (length * self.longest + self.bias)


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """Bounds the scores of concepts.

    With u_tj an upper bound of the pre-activation and A_t the features of token t that may be active,
    `score_tc <= sum_{j in A_t} max(0, weight_cj) max(0, u_tj) + offset_c`. For `evidence` the weights are those of the matched
    filter; for `contribution` the lengths of the decoder rows, by the triangle inequality.

    features: of the concepts, each once; often: distinct latents that are active in most prompts.
    """

    sae: SAE = field(repr=False)
    features: Rows
    places: Int[Tensor, " n"]
    """The concepts' features one concept after the other, as rows of `features`."""
    weights: Float[Tensor, " n"]
    starts: Int[Tensor, " concepts"]
    """Where a concept begins in `places`."""
    offsets: Float[Tensor, " concepts"]
    often: Rows
    matched: bool
    """The score is linear in the acts, so that it is bounded from below too."""
    n_terms: int
    """Numbers that the full computation of a score sums, at most; zeros are added without error."""

    @classmethod
    def make(cls, sae: SAE, concepts: Sequence[ConceptFeatures], often: Int[Tensor, " m"], matched: bool = True) -> EarlyExit:
        """Copy the rows that are needed; `matched`: weigh by the concepts' filters (`evidence`), else by decoder rows."""
        indices = torch.cat([concept.indices for concept in concepts]).to(torch.int64)
        sizes = torch.tensor([len(concept) for concept in concepts])
        if matched:
            weights = torch.cat([concept.weights.to(sae.W_enc.dtype) * concept.scale for concept in concepts])
            offsets = torch.tensor([concept.offset for concept in concepts], dtype=sae.W_enc.dtype)
        else:
            weights = length_bound(sae.W_dec.index_select(0, indices.to(sae.W_dec.device)))
            offsets = torch.zeros(len(concepts), dtype=sae.W_enc.dtype)
        distinct, places = indices.unique(return_inverse=True)
        rows, device = (Rows.of(sae, distinct), Rows.of(sae, often.long())), sae.W_enc.device
        n_terms = sae.config.k if matched else int(sizes.max()) + sae.config.k + sae.config.d_model
        starts = (sizes.cumsum(0) - sizes).to(device)
        sae.release()
        return cls(
            sae, rows[0], places.to(device), weights.to(device), starts, offsets.to(device), rows[1], matched, n_terms
        )  # fmt: skip

    @property
    def n_bytes(self) -> int:
        """Memory of the copied rows."""
        return sum(rows.W_enc.nbytes + rows.b_enc.nbytes for rows in (self.features, self.often))

    def settle(self, x: Float[Tensor, "tokens d_model"], thresholds: Sequence[float]) -> list[Reached | None]:
        """Return, for each token, the concepts whose threshold it certainly reaches; None where it is not certain for all.

        What is said of a token is right whatever stands beside it, so a batch may be taken at once. The few tokens that the
        rows leave open are compared with all latents, as many as may be held in one pass over the encoder.
        """
        settled: list[Reached | None] = [() if below else None for below in self.below(x, thresholds).tolist()]
        still_open = [i for i, reached in enumerate(settled) if reached is None]
        if still_open and self.may_bound(x):
            parts = x[still_open].to(self.sae.b_dec.dtype).split(chunk_size(self.features))
            found = chain.from_iterable(self.compare_with_all(part, self.limits(thresholds)) for part in parts)
            for i, reached in zip(still_open, found, strict=True):
                settled[i] = reached
            self.sae.release()
        return settled

    def below(self, x: Float[Tensor, "tokens d_model"], thresholds: Sequence[float]) -> Bool[Tensor, " tokens"]:
        """Mark the tokens that the copied rows show to be below every concept's threshold. False says nothing."""
        if not self.may_bound(x):
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        limits = self.limits(thresholds)
        parts = [self.below_in_chunk(part, limits) for part in x.to(self.sae.b_dec.dtype).split(chunk_size(self.features))]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=x.device)

    def may_bound(self, x: Tensor) -> bool:
        """Tell whether the bounds hold for these activations; an error in them is left to the full computation."""
        return x.ndim == 2 and x.shape[1] == self.sae.config.d_model and is_full_precision(x.device)

    def limits(self, thresholds: Sequence[float]) -> Float[Tensor, " concepts"]:
        return torch.tensor(thresholds, dtype=self.offsets.dtype, device=self.offsets.device)

    def below_in_chunk(self, x: Float[Tensor, "tokens d_model"], limits: Float[Tensor, " concepts"]) -> Bool[Tensor, " tokens"]:
        """First take every feature for active; only for tokens that this leaves open compare with the latents in `often`."""
        finite = x.isfinite().all(1)
        centred = torch.where(finite[:, None], x, 0) - self.sae.b_dec
        pre_acts, rounding = self.pre_acts(centred)
        upper = (pre_acts + rounding).clamp_min_(0)
        below = (self.upper_bound(upper) < limits).all(1)  # a comparison with NaN is false: what cannot be compared is open
        for rows in (self.often.first(len(self.often) // FIRST_SHARE), self.often):
            unsure = (~below & finite).nonzero().flatten()
            if len(unsure) and len(rows) >= self.sae.config.k:
                upper_there, at_least = upper[:, unsure], self.kth_largest(centred[unsure], rows)
                below[unsure] = (self.upper_bound(torch.where(upper_there < at_least, 0, upper_there)) < limits).all(1)
        return below & finite

    @torch.no_grad()
    def compare_with_all(self, x: Float[Tensor, "n d_model"], limits: Float[Tensor, " concepts"]) -> list[Reached | None]:
        """Compare the features with the k-th largest pre-activation of more and more latents, until the tokens are settled."""
        settled: list[Reached | None] = [None] * len(x)
        W_enc, b_enc, k = self.sae.W_enc, self.sae.b_enc, self.sae.config.k
        pre_acts, rounding = self.pre_acts(x - self.sae.b_dec)
        left = Unsettled.of(x, (pre_acts - rounding).clamp_min(0), (pre_acts + rounding).clamp_min(0)).at(x.isfinite().all(1))
        for part in torch.arange(len(W_enc)).split(PART_LATENTS):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            left = left.with_codes(topk_encode(left.x, W_enc[rows], b_enc[rows], self.sae.b_dec, k + 1), rows.start, k + 1)
            slack = self.whole.rounding(length_bound(left.x - self.sae.b_dec))
            following, kth = left.codes.acts.topk(2, dim=1, largest=False).values.T
            possible = torch.where(left.upper < kth - slack, 0, left.upper)
            reaches = torch.zeros(len(left.x), len(limits), dtype=torch.bool, device=x.device)
            if self.matched and rows.stop == len(W_enc):
                certain = torch.where(left.lower > following + slack, left.lower, 0)
                reaches = self.lower_bound(certain, possible) >= limits
            done = (reaches | (self.upper_bound(possible) < limits)).all(1)
            for token, row in zip(left.tokens[done].tolist(), reaches[done], strict=True):
                settled[token] = tuple(row.nonzero().flatten().tolist())
            left = left.at(~done)
            if len(left.tokens) == 0:
                break
        return settled

    @cached_property
    def whole(self) -> Rows:
        """The largest length and bias of all rows of the encoder; none of them is copied."""
        parts = zip(self.sae.W_enc.split(PART_LATENTS), self.sae.b_enc.split(PART_LATENTS), strict=True)
        largest = torch.tensor([(rows.longest, rows.bias) for rows in (Rows.holding(*part) for part in parts)]).amax(0)
        return Rows(self.sae.W_enc[:0], self.sae.b_enc[:0], float(largest[0]), float(largest[1]))

    def pre_acts(self, centred: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "features n"], Float[Tensor, " n"]]:
        """Return the features' pre-activations, and for each token how far other computations of them can lie apart."""
        pre_acts = torch.addmm(self.features.b_enc[:, None], self.features.W_enc, centred.T)
        return pre_acts, self.features.rounding(length_bound(centred))

    def kth_largest(self, centred: Float[Tensor, "n d_model"], rows: Rows) -> Float[Tensor, " n"]:
        """Return a lower bound of the k-th largest pre-activation of each token."""
        kth = []
        for part in centred.split(chunk_size(rows)):
            pre_acts = torch.addmm(rows.b_enc, part, rows.W_enc.T)
            kth.append(pre_acts.topk(self.sae.config.k, dim=1, sorted=False).values.amin(1))
        return torch.cat(kth) - rows.rounding(length_bound(centred))

    def upper_bound(self, upper: Float[Tensor, "features n"]) -> Float[Tensor, "n concepts"]:
        """Return an upper bound of every concept's score, given upper bounds of the acts, rounding of both sums included."""
        return self.sum_by_concept(upper, self.weights.clamp_min(0)) + self.offsets + self.rounding(upper)

    def lower_bound(
        self, lower: Float[Tensor, "features n"], upper: Float[Tensor, "features n"]
    ) -> Float[Tensor, "n concepts"]:
        """Return a lower bound of every concept's `evidence`, given bounds of the acts."""
        gain = self.sum_by_concept(lower, self.weights.clamp_min(0)) + self.sum_by_concept(upper, self.weights.clamp_max(0))
        return gain + self.offsets - self.rounding(upper)

    def rounding(self, upper: Float[Tensor, "features n"]) -> Float[Tensor, "n concepts"]:
        """Return how far two computations of a score from the same acts, at most `upper`, can lie apart."""
        gamma = 4 * (self.n_terms + 8) * torch.finfo(upper.dtype).eps
        return gamma * (self.sum_by_concept(upper, self.weights.abs()) + self.offsets.abs())

    def sum_by_concept(self, values: Float[Tensor, "features n"], weights: Float[Tensor, " places"]) -> Tensor:
        """Return `sum_{j in c} weights_j values_jt` as (n, concepts)."""
        if values.numel() == 0:
            return torch.zeros(values.shape[1], len(self.starts), dtype=values.dtype, device=values.device)
        return F.embedding_bag(self.places, values, self.starts, mode="sum", per_sample_weights=weights).T


class Unsettled(NamedTuple):
    """Tokens that are compared with more latents: which, their activations, bounds of the features' acts, codes so far."""

    tokens: Int[Tensor, " n"]
    x: Float[Tensor, "n d_model"]
    lower: Float[Tensor, "features n"]
    upper: Float[Tensor, "features n"]
    codes: SparseCodes

    @classmethod
    def of(cls, x: Float[Tensor, "n d_model"], lower: Tensor, upper: Tensor) -> Unsettled:
        """Take all tokens, compared with no latents yet."""
        tokens = torch.arange(len(x), device=x.device)
        return cls(tokens, x, lower, upper, SparseCodes(x[:, :0], tokens.new_zeros(len(x), 0)))

    def at(self, mask: Bool[Tensor, " n"]) -> Unsettled:
        """Keep some of the tokens."""
        codes = SparseCodes(*(part[mask] for part in self.codes))
        return Unsettled(self.tokens[mask], self.x[mask], self.lower[:, mask], self.upper[:, mask], codes)

    def with_codes(self, found: SparseCodes, start: int, k: int) -> Unsettled:
        """Keep the k largest of the codes so far and of those found among the latents from `start` on."""
        return self._replace(codes=keep_largest(self.codes, SparseCodes(found.acts, found.indices + start), k))


def chunk_size(rows: Rows) -> int:
    """Return of how many tokens the pre-activations of some rows may be held at a time."""
    return max(1, CHUNK_BYTES // (rows.b_enc.element_size() * max(1, len(rows))))


def length_bound(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    """Return the length of each row, rounded up."""
    return rows.norm(dim=1) * (1 + (rows.shape[1] + 8) * torch.finfo(rows.dtype).eps)


def is_full_precision(device: torch.device) -> bool:
    """Tell whether matrix products are computed in the precision of their factors: the bounds hold only then."""
    if torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest":
        return False
    return device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32
