from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itd import screening
from itd.screening import Screen, screening_pays


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors_and_bounds(W: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far screened pre-activations are from exact ones in double precision, and how far they may be."""
    screen = Screen.of(W, b)
    screened = torch.mm(screen.W, screen.columns(x)).double()
    exact = W.double() @ x.double().T + b.double()[:, None]
    bound = screen.bound(x, b)
    allowed = screen.norm[:, None] * bound.per_token + bound.offset + bound.relative * screened.abs()
    return (screened - exact).abs(), allowed.double()


CASES = {
    "random": (draw(300, 48, seed=0), draw(300, seed=1), draw(40, 48, seed=2)),
    "one large direction": (draw(300, 48, seed=0), draw(300, seed=1), draw(40, 48, seed=2) + 500 * torch.eye(48)[3]),
    "large biases": (draw(300, 48, seed=0), 1000 * draw(300, seed=1), draw(40, 48, seed=2)),
    "rows of many sizes": (
        draw(300, 48, seed=0) * torch.logspace(-6, 4, 300)[:, None],
        draw(300, seed=1),
        draw(40, 48, seed=2),
    ),
    "all rounded the same way": (torch.full((8, 48), 1 + 2.0**-8 - 2.0**-20), torch.ones(8), torch.full((4, 48), 1 + 2.0**-8)),
    "nothing": (draw(8, 48, seed=0), torch.zeros(8), torch.zeros(4, 48)),
}


@pytest.mark.parametrize("case", CASES)
def test_no_error_exceeds_its_bound(case: str) -> None:
    errors, bounds = errors_and_bounds(*CASES[case])
    assert (errors <= bounds).all()


def test_the_bound_is_not_far_from_the_error() -> None:
    """Control: a bound that is too wide would let everything pass."""
    errors, bounds = errors_and_bounds(*CASES["random"])
    assert bounds.median() < 30 * errors.median()
    errors, bounds = errors_and_bounds(*CASES["all rounded the same way"])
    assert (errors > bounds / 3).all()


def test_refreshed_rows_are_those_of_a_new_screen() -> None:
    W, b, _ = CASES["random"]
    screen, rows = Screen.of(W, b), torch.tensor([3, 200])
    changed_W, changed_b = W.clone(), b.clone()
    changed_W[rows], changed_b[rows] = 2 * W[rows] + 1, b[rows] - 7
    new = Screen.of(changed_W, changed_b)
    assert not torch.equal(screen.W, new.W)
    screen.refresh(rows, changed_W[rows], changed_b[rows])
    for name in ("W", "norm", "error"):
        torch.testing.assert_close(getattr(screen, name), getattr(new, name))


def test_converting_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W, b, _ = CASES["random"]
    whole = Screen.of(W, b)
    monkeypatch.setattr(screening, "CHUNK_ROWS", 7)
    assert torch.equal(Screen.of(W, b).W, whole.W)


def test_screening_pays_on_processors_that_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=supported: answer, raising=False)
        assert screening_pays(torch.device("cpu")) == supported
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not screening_pays(torch.device("cpu"))
