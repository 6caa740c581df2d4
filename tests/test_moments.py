from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from itd.moments import DITHER, read_moments, row_bytes, write_moments, zero_moments

ROWS = torch.arange(64)


def stored(value: Tensor, name: Any, kind: Any, dither: Tensor | None = None) -> Tensor:
    """Write rows and read them back."""
    moments = zero_moments(value, kind)
    write_moments(name, moments, ROWS, value.clone(), torch.zeros_like(ROWS) if dither is None else dither)
    return read_moments(name, moments, ROWS)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_moments_take_the_bytes_that_the_estimate_counts(kind: Any) -> None:
    assert zero_moments(torch.randn(64, 12), kind).nbytes == 64 * row_bytes(12, kind)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_moments_of_biases_stay_as_they_are(kind: Any) -> None:
    value = torch.randn(64)
    assert torch.equal(stored(value, "first", kind), value)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["first", "second"])
def test_rows_of_zeros_stay_zeros(kind: Any, name: Any) -> None:
    value = torch.zeros(64, 12)
    value[3] = 1.0
    assert torch.equal(stored(value, name, kind, ROWS * 1000), value)


@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_first_moments_come_back_but_for_a_step_of_the_largest(kind: Any, tolerance: float, width: int) -> None:
    value = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    error = (stored(value, "first", kind) - value).abs().amax(1)
    assert (error <= 1.001 * tolerance * value.abs().amax(1)).all()


def test_a_small_second_moment_in_8_bits_is_never_zero() -> None:
    value = torch.full((64, 12), 1e-12)
    value[:, 0] = 1.0
    back = stored(value, "second", "int8")
    assert (back > 0).all()
    assert back[0, 1] <= 1 / 255**2 * 1.001


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounding_second_moments_keeps_their_mean(kind: Any) -> None:
    """A moment that grows by a thousandth of itself a step would not move at all if it were rounded to nearest."""
    value = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    nearest = torch.ones(64, 8, dtype=torch.bfloat16)
    moments = zero_moments(value, kind)
    write_moments("second", moments, ROWS, value.clone(), ROWS * 1021 % DITHER)
    start = float(read_moments("second", moments, ROWS).mean())
    for step in range(200):
        grown = read_moments("second", moments, ROWS) * 1.001
        write_moments("second", moments, ROWS, grown, (ROWS * 40_503 + step * 30_011) % DITHER)
        nearest = (nearest.float() * 1.001).bfloat16()
    assert float(nearest.float().mean()) == 1.0
    assert float(read_moments("second", moments, ROWS).mean()) == pytest.approx(start * 1.001**200, rel=0.01)


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("dither", [0, 1, DITHER // 2, DITHER - 2, DITHER - 1])
def test_no_dither_takes_the_largest_of_a_row_past_the_last_step(name: Any, dither: int) -> None:
    value = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-32, 32)[:, None]
    if name == "first":
        value[:, 1::2] *= -1
    back = stored(value, name, "int8", torch.full_like(ROWS, dither))
    largest = value.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, largest), value.gather(1, largest), rtol=1e-5)
    assert ((back - value).abs().amax(1) <= 2 / 127 * value.abs().amax(1)).all()
