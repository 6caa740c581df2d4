"""How Adam's moments are stored: in fp32, in bfloat16, or in 8 bits with a scale per row.

Rows that are read come in fp32. In 8 bits, and of the second moment in bfloat16, rows that are written are rounded up or down
with odds that keep their mean: the second moment changes by a thousandth in a step, which neither 8 nor 16 bits can hold.

Source: Dettmers et al. 2022, 8-bit optimizers via block-wise quantization; here a block is a row, and the second moment is
stored by its square root, on an even grid.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

MomentName = Literal["first", "second"]
MomentType = Literal["float32", "bfloat16", "int8"]
HIGH_HALF = 1 if sys.byteorder == "little" else 0
"""Which 16 bits of an fp32 number are the bfloat16 number that it begins with."""
SCALE_BYTES = 4
"""A row in 8 bits ends with its scale, an fp32 number."""
MIDDLE = 128
"""What stands for 0 in a first moment of 8 bits."""
DITHER = 65_536
"""Number of values that a row's dither takes."""


def zero_moments(value: Tensor, stored: MomentType) -> Tensor:
    """Return zeros for the moments of a parameter; those of vectors stay in its own dtype."""
    if value.ndim == 1 or stored == "float32":
        return torch.zeros_like(value)
    if stored == "bfloat16":
        return torch.zeros_like(value, dtype=torch.bfloat16)
    return torch.zeros(len(value), value.shape[1] + SCALE_BYTES, dtype=torch.uint8, device=value.device)


def row_bytes(d_model: int, stored: MomentType) -> int:
    """Return the bytes of one row of moments."""
    return {"float32": 4 * d_model, "bfloat16": 2 * d_model, "int8": d_model + SCALE_BYTES}[stored]


def read_moments(name: MomentName, moments: Tensor, rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows ..."]:
    """Return the moments of some rows."""
    stored = moments.index_select(0, rows)
    if stored.dtype != torch.uint8:
        return stored.float() if stored.dtype == torch.bfloat16 else stored
    scale = stored[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    codes = stored[:, :-SCALE_BYTES].float()
    return codes.sub_(MIDDLE).mul_(scale) if name == "first" else codes.mul_(scale).square_()


def write_moments(
    name: MomentName,
    moments: Tensor,
    rows: Int[Tensor, " rows"],
    value: Float[Tensor, "rows ..."],
    dither: Int[Tensor, " rows"],
) -> None:
    """Store the moments of some rows. `dither`, evenly spread over 0 to 65535, decides what is rounded up and what down."""
    if moments.dtype == torch.uint8:
        moments.index_copy_(0, rows, quantize(name, value, dither))
    elif moments.dtype == torch.bfloat16 and name == "second":
        bits = value.float().contiguous().view(torch.int32).add(dither[:, None].to(torch.int32))
        halves = bits.view(torch.int16)[:, HIGH_HALF::2]
        moments.view(torch.int16).index_copy_(0, rows, halves)
    else:
        moments.index_copy_(0, rows, value.to(moments.dtype))


def quantize(
    name: MomentName, value: Float[Tensor, "rows d_model"], dither: Int[Tensor, " rows"]
) -> Int[Tensor, "rows d_model+4"]:
    """Return rows in 8 bits: the first moment on 255 even steps about 0, the root of the second on as many above it.

    A second moment never becomes 0 in a row that is not: a step is divided by its root.
    """
    value = value.float()
    value = value if name == "first" else value.sqrt()
    levels = 127 if name == "first" else 255
    scale = value.abs().amax(1, keepdim=True) / levels
    steps = value / scale.clamp_min(torch.finfo(torch.float32).tiny)
    steps = (steps + (dither[:, None] + 0.5) / DITHER).floor_()
    codes = steps.clamp_(-127, 127) + MIDDLE if name == "first" else steps.clamp_(1, 255)
    return torch.cat([codes.to(torch.uint8), scale.view(torch.uint8)], 1)
