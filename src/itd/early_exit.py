"""Decide most tokens from few rows of the encoder, by upper bounds of their scores that hold for the full computation.

Whether a target feature is active depends on all latents: it has to be among the k largest. Two facts need only some. An act
is at most the pre-activation. And the k-th largest pre-activation within any set S of latents is at most the k-th largest of
all, so a feature below it is not active. A token whose score is below every threshold even if all features that may be active
were active is decided. The few tokens that some latents leave open are compared with all, many at a time. A prompt with a token
that is open even then has its score computed in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itd.features import ConceptFeatures
from itd.sae import SAE

CHUNK_BYTES = 32 * 2**20
"""Upper bound of the pre-activations that are held at a time."""


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

    def rounding(self, length: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return how far two computations of a pre-activation in floating point can lie apart; length: of the token.

        Each differs from the exact one by at most gamma (|x| |w| + |b|), gamma = n u / (1 - n u) for n = d_model + 1 terms in
        any order of summation. Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1.
        """
        gamma = (self.W_enc.shape[1] + 8) * torch.finfo(self.b_enc.dtype).eps
        return 2 * gamma * (length * self.longest + self.bias)


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """Bounds the scores of concepts from above.

    With u_tj an upper bound of the pre-activation and A_t the features of token t that may be active,
    `score_tc <= sum_{j in A_t} max(0, weight_cj) max(0, u_tj) + offset_c`. For `evidence` the weights are those of the matched
    filter; for `contribution` the lengths of the decoder rows, by the triangle inequality.

    features: the concepts' features one after the other; often: distinct latents that are active in most prompts.
    """

    features: Rows
    weights: Float[Tensor, " n"]
    starts: Int[Tensor, " concepts"]
    """Where a concept's rows begin."""
    offsets: Float[Tensor, " concepts"]
    often: Rows
    b_dec: Float[Tensor, " d_model"]
    k: int
    n_terms: int
    """Numbers that the full computation of a score sums, at most."""

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
        rows, device = (Rows.of(sae, indices), Rows.of(sae, often.long())), sae.W_enc.device
        n_terms = int(sizes.max()) + sae.config.k + sae.config.d_model
        starts = (sizes.cumsum(0) - sizes).to(device)
        sae.release()
        return cls(rows[0], weights.to(device), starts, offsets.to(device), rows[1], sae.b_dec, sae.config.k, n_terms)

    @property
    def n_bytes(self) -> int:
        """Memory of the copied rows."""
        return sum(rows.W_enc.nbytes + rows.b_enc.nbytes for rows in (self.features, self.often))

    def below(
        self, x: Float[Tensor, "tokens d_model"], thresholds: Sequence[float], sae: SAE | None = None
    ) -> Bool[Tensor, " tokens"]:
        """Mark the tokens whose score is certainly below every concept's threshold. False says nothing.

        Each token's mark is right whatever stands beside it, so a batch may be taken at once. With the autoencoder, the few
        tokens that the rows leave open are compared with all latents, in one pass over its encoder.
        """
        if x.ndim != 2 or x.shape[1] != len(self.b_dec) or not is_full_precision(x.device):
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        limits = torch.tensor(thresholds, dtype=self.offsets.dtype, device=x.device)
        size = max(1, CHUNK_BYTES // (self.offsets.element_size() * max(1, len(self.features), len(self.often))))
        parts = [self.below_in_chunk(part, limits) for part in x.to(self.b_dec.dtype).split(size)]
        below = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=x.device)
        still_open = (~below & x.isfinite().all(1)).nonzero().flatten()
        if sae is not None and len(still_open):
            below[still_open] = self.below_all_latents(x[still_open].to(self.b_dec.dtype), limits, sae)
            sae.release()
        return below

    def below_all_latents(
        self, x: Float[Tensor, "n d_model"], limits: Float[Tensor, " concepts"], sae: SAE
    ) -> Bool[Tensor, " n"]:
        """Compare the features with the k-th largest pre-activation of all latents."""
        codes, found = sae.encode(x), list[Tensor]()
        for rows, acts, indices in zip(*(part.split(64) for part in (x, *codes)), strict=True):
            centred = rows - self.b_dec
            length, upper = length_bound(centred), self.upper(centred)
            active = sae.W_enc[indices.flatten()], sae.b_enc[indices.flatten()]
            slack = Rows.holding(*active).rounding(length)
            found.append((self.bound(torch.where(upper < acts.amin(1) - slack, 0, upper)) < limits).all(1))
        return torch.cat(found)

    def upper(self, centred: Float[Tensor, "n d_model"]) -> Float[Tensor, "features n"]:
        """Return upper bounds of the features' acts, were they active."""
        pre_acts = torch.addmm(self.features.b_enc[:, None], self.features.W_enc, centred.T)
        return (pre_acts + self.features.rounding(length_bound(centred))).clamp_min(0)

    def below_in_chunk(self, x: Float[Tensor, "tokens d_model"], limits: Float[Tensor, " concepts"]) -> Bool[Tensor, " tokens"]:
        """First take every feature for active; only for tokens that this leaves open compare with the latents in `often`."""
        finite = x.isfinite().all(1)
        centred = torch.where(finite[:, None], x, 0) - self.b_dec
        upper = self.upper(centred)
        below = (self.bound(upper) < limits).all(1)
        unsure = (~below & finite).nonzero().flatten()
        if len(unsure) and len(self.often) >= self.k:
            upper, at_least = upper[:, unsure], self.kth_largest(centred[unsure])
            # A comparison with NaN is false: what cannot be compared counts as active.
            below[unsure] = (self.bound(torch.where(upper < at_least, 0, upper)) < limits).all(1)
        return below & finite

    def kth_largest(self, centred: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Return a lower bound of the k-th largest pre-activation of each token."""
        pre_acts = torch.addmm(self.often.b_enc, centred, self.often.W_enc.T)
        return pre_acts.topk(self.k, dim=1, sorted=False).values.amin(1) - self.often.rounding(length_bound(centred))

    def bound(self, upper: Float[Tensor, "features n"]) -> Float[Tensor, "n concepts"]:
        """Return an upper bound of every concept's score, given upper bounds of the acts, rounding of both sums included."""
        gamma = 4 * (self.n_terms + 8) * torch.finfo(upper.dtype).eps
        total = self.sum_by_concept(upper, self.weights.clamp_min(0))
        size = total if bool((self.weights >= 0).all()) else self.sum_by_concept(upper, self.weights.abs())
        return total + self.offsets + gamma * (size + self.offsets.abs())

    def sum_by_concept(self, values: Float[Tensor, "features n"], weights: Float[Tensor, " features"]) -> Tensor:
        """Return `sum_{j in c} weights_j values_jt` as (n, concepts)."""
        if values.numel() == 0:
            return torch.zeros(values.shape[1], len(self.starts), dtype=values.dtype, device=values.device)
        rows = torch.arange(len(weights), device=values.device)
        return F.embedding_bag(rows, values, self.starts, mode="sum", per_sample_weights=weights).T


def length_bound(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    """Return the length of each row, rounded up."""
    return rows.norm(dim=1) * (1 + (rows.shape[1] + 8) * torch.finfo(rows.dtype).eps)


def is_full_precision(device: torch.device) -> bool:
    """Tell whether matrix products are computed in the precision of their factors: the bounds hold only then."""
    if torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest":
        return False
    return device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32
