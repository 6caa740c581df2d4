"""A half-precision copy of the encoder that bounds every pre-activation, so that few need to be computed exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNIT = 2.0**-8
"""Half the distance between neighbouring bfloat16 numbers, relative to the number."""
SLACK = 1.001
"""Covers the rounding of the bound itself, which is computed in fp32."""
SCREENED_LATENTS = 2**16
"""Where screening is left to us, smaller autoencoders are encoded in fp32: the copy takes memory and saves little time."""
CHUNK_ROWS = 1024
"""Rows that are converted at a time."""


class Bound(NamedTuple):
    """How far a screened pre-activation v may be from the exact one: norm_j * per_token_b + offset + relative * |v|."""

    per_token: Float[Tensor, " n"]
    offset: float
    relative: float


@dataclass(frozen=True)
class Screen:
    """Encoder rows in bfloat16, their biases as two more columns, and what is needed to bound the error.

    With w = w^ + e and x = x^ + f, |w x - w^ x^| <= |e| |x| + |w^| |f| (Cauchy and Schwarz), and the sum of products is
    accumulated in fp32.

    W: (n_latents, d_model + 2); norm: (n_latents,) length of each row; error: (n_latents,) |e| / |w|.

    Source: N. J. Higham, Accuracy and stability of numerical algorithms, 2nd edition, section 3.1, for the accumulation.
    """

    W: Float[Tensor, "n_latents columns"]
    norm: Float[Tensor, " n_latents"]
    error: Float[Tensor, " n_latents"]

    @classmethod
    def of(cls, W_enc: Float[Tensor, "n_latents d_model"], b_enc: Float[Tensor, " n_latents"]) -> Screen:
        """Convert an encoder, some rows at a time."""
        n_latents, d_model = W_enc.shape
        W = torch.empty(n_latents, d_model + 2, dtype=torch.bfloat16, device=W_enc.device)
        screen = cls(W, torch.empty_like(b_enc), torch.empty_like(b_enc))
        for rows in torch.arange(n_latents, device=W_enc.device).split(CHUNK_ROWS):
            screen.refresh(rows, W_enc[rows], b_enc[rows])
        return screen

    def refresh(self, rows: Int[Tensor, " rows"], W_enc: Float[Tensor, "rows d_model"], b_enc: Float[Tensor, " rows"]) -> None:
        """Take over the new values of some rows."""
        rounded, high = W_enc.bfloat16(), b_enc.bfloat16()
        low = (b_enc - high.float()).bfloat16()
        norm = W_enc.norm(dim=1)
        self.W.index_copy_(0, rows, torch.cat([rounded, high[:, None], low[:, None]], 1))
        self.norm.index_copy_(0, rows, norm)
        self.error.index_copy_(0, rows, (W_enc - rounded.float()).norm(dim=1) / norm.clamp_min(1e-30))

    def columns(self, centred: Float[Tensor, "n d_model"]) -> Float[Tensor, "columns n"]:
        """Return the tokens as what the rows are multiplied with; the ones meet the biases."""
        ones = centred.new_ones(len(centred), 2)
        return torch.cat([centred, ones], 1).bfloat16().T

    def bound(self, centred: Float[Tensor, "n d_model"], b_enc: Float[Tensor, " n_latents"]) -> Bound:
        """Bound the error of every product of a row of `W` with a column of `columns`."""
        error, d_model = float(self.error.max()), centred.shape[1]
        accumulation = (d_model + 2) * 2.0**-23
        norm = centred.norm(dim=1)
        rounding = (centred - centred.bfloat16().float()).norm(dim=1)
        per_token = error * norm + (1 + error) * (rounding + accumulation * (norm + rounding))
        offset = float(b_enc.abs().max()) * (UNIT**2 + 2 * accumulation)
        return Bound(SLACK * per_token, SLACK * offset, SLACK * UNIT / (1 - UNIT))


def screening_pays(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 matrices faster than fp32 ones and adds the products in fp32."""
    if device.type == "cuda":
        exact = not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        return exact and torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())
