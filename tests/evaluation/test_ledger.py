from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from itd.evaluation.ledger import Ledger


def test_a_cell_is_computed_once_and_survives_the_process(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"share": 0.5, "names": ("a", "b"), "nothing": float("nan")}

    first = Ledger(tmp_path, {"seed": 0}).cell("a cell", compute)
    again = Ledger(tmp_path, {"seed": 0}).cell("a cell", compute)
    assert first == again == {"share": 0.5, "names": ["a", "b"], "nothing": None}
    assert len(calls) == 1


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T
    ledger = Ledger(tmp_path, {})
    assert torch.equal(ledger.tensors("x", lambda: {"x": x})["x"], x)
    assert torch.equal(ledger.tensors("x", dict)["x"], x)
    assert ledger.has("x")
    assert not ledger.has("y")


def test_keys_with_the_same_words_are_kept_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    assert [ledger.cell(key, lambda key=key: key) for key in ("a b", "a-b", "a/b")] == ["a b", "a-b", "a/b"]


def test_a_failing_cell_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})

    def fail() -> int:
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        ledger.cell("x", fail)
    assert not ledger.has("x")
    assert ledger.cell("x", lambda: 3) == 3


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path: Path) -> None:
    Ledger(tmp_path, {"seed": 0, "steps": (1, 2)})
    Ledger(tmp_path, {"seed": 0, "steps": [1, 2]})
    with pytest.raises(ValueError, match=r"another seed \(0, now 1\)"):
        Ledger(tmp_path, {"seed": 1, "steps": (1, 2)})


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {})
    ledger.cell("x", lambda: 1)
    path = next(path for path in tmp_path.glob("x-*.json"))
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        ledger.cell("x", lambda: 1)
    path.write_text(json.dumps({"key": "x"}))
    with pytest.raises(ValueError, match="delete it"):
        ledger.cell("x", lambda: 1)
