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
"""The root of a second moment, 1 to 255 steps, is stored less this; a first moment takes -127 to 127."""
DITHER = 65_536
"""Number of values that a row's dither takes."""
MARGIN = 2.0**-11
"""A dither stays so far from 0 and from 1 that rounding in fp32 never leads into the next step, nor past the last."""


def zero_moments(value: Tensor, stored: MomentType) -> Tensor:
    """Return zeros for the moments of a parameter; those of vectors stay in its own dtype."""
    if value.ndim == 1 or stored == "float32":
        return torch.zeros_like(value)
    if stored == "bfloat16":
        return torch.zeros_like(value, dtype=torch.bfloat16)
    return torch.zeros(len(value), value.shape[1] + SCALE_BYTES, dtype=torch.int8, device=value.device)


def row_bytes(d_model: int, stored: MomentType) -> int:
    """Return the bytes of one row of moments."""
    return {"float32": 4 * d_model, "bfloat16": 2 * d_model, "int8": d_model + SCALE_BYTES}[stored]


def read_moments(name: MomentName, moments: Tensor, rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows ..."]:
    """Return the moments of some rows."""
    stored = moments.index_select(0, rows)
    if stored.dtype != torch.int8:
        return stored.float() if stored.dtype == torch.bfloat16 else stored
    scale = stored[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    codes = stored[:, :-SCALE_BYTES].float()
    return codes.mul_(scale) if name == "first" else codes.add_(MIDDLE).mul_(scale).square_()


def write_moments(
    name: MomentName,
    moments: Tensor,
    rows: Int[Tensor, " rows"],
    value: Float[Tensor, "rows ..."],
    dither: Int[Tensor, " rows"],
) -> None:
    """Store the moments of some rows. `dither`, evenly spread over 0 to 65535, decides what is rounded up and what down.

    `value` is used as working memory: what it holds afterwards is of no use.
    """
    if moments.dtype == torch.int8:
        copy_rows(moments, rows, quantize(name, value, dither))
    elif moments.dtype == torch.bfloat16 and name == "second":
        bits = value.float().contiguous().view(torch.int32).add(dither[:, None].to(torch.int32))
        copy_rows(moments.view(torch.int16), rows, bits.view(torch.int16)[:, HIGH_HALF::2].contiguous())
    else:
        copy_rows(moments, rows, value.to(moments.dtype))


def copy_rows(target: Tensor, rows: Int[Tensor, " rows"], value: Tensor) -> None:
    """Write rows in place, four bytes at a time where their length allows: torch copies bytes and halves one by one."""
    if target.ndim == 2 and target.element_size() < 4 and target.shape[1] * target.element_size() % 4 == 0:
        target, value = target.view(torch.int32), value.view(torch.int32)
    target.index_copy_(0, rows, value)


def quantize(
    name: MomentName, value: Float[Tensor, "rows d_model"], dither: Int[Tensor, " rows"]
) -> Int[Tensor, "rows d_model+4"]:
    """Return rows in 8 bits: the first moment on 255 even steps about 0, the root of the second on as many above it.

    `value` is overwritten, which is what makes this as fast as copying; `dither` stays clear of the ends of a step.
    A second moment never becomes 0 in a row that is not: a step is divided by its root.
    """
    value = value.float()
    shift = MARGIN + (1 - 2 * MARGIN) * ((dither + 0.5) / DITHER)[:, None]
    if name == "first":
        scale = torch.maximum(value.amax(1, keepdim=True), -value.amin(1, keepdim=True)) / 127
        codes = value.mul_(steps_per_unit(scale)).add_(shift).floor_()
    else:
        root = value.sqrt_()
        scale = root.amax(1, keepdim=True) / 255
        codes = root.mul_(steps_per_unit(scale)).add_(shift - MIDDLE).floor_().clamp_min_(1 - MIDDLE)
    rows = torch.empty(len(value), value.shape[1] + SCALE_BYTES, dtype=torch.int8, device=value.device)
    rows[:, :-SCALE_BYTES] = codes
    rows[:, -SCALE_BYTES:] = scale.view(torch.int8)
    return rows


def steps_per_unit(scale: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    return scale.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
