from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from itd.evaluation.conditions import Sides, along_axes, axis_section, changes, promised, promises, prompts_of
from itd.gate import calibrate
from itd.metrics.intervals import NOTHING, conformal_interval

NAMES = ("ann ash", "bob beam", "cid cole", "dee dorn")


class Words:
    """A tokenizer with one token to a word."""

    model_max_length = 12

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=text.split())


def made_prompts() -> dict[str, dict[str, list[str]]]:
    axes = changes(SimpleNamespace(tokenizer=Words()), lambda name, _: [f"a photo of {name}"], ("soft", "green"), NAMES, 3)
    return {key: prompts_of(each, NAMES, key) for conditions in axes.values() for key, each in conditions.items()}


def test_a_name_is_changed_in_all_ways_and_alike_whatever_the_other_names_are() -> None:
    found = made_prompts()
    assert found == made_prompts()
    assert {len(texts) for texts in found["position.last"].values()} == {3}
    for name in NAMES:
        assert found["nouns.4"][name][0].count(name) == 1, "the others stand beside it, not itself"
        assert all(other in found["nouns.4"][name][0] for other in NAMES)
        assert found["spelling.upper"][name] == [f"a photo of {name.upper()}"]


def test_a_longer_prompt_is_cut_off_behind_its_name_or_left_out() -> None:
    for key in ("length+8", "length+32"):
        for name, texts in made_prompts()[key].items():
            assert all(len(text[: text.find(name) + len(name)].split()) <= Words.model_max_length for text in texts)


def test_a_condition_without_prompts_on_a_side_has_neither_rate_nor_curve() -> None:
    sides = Sides([[], []], [[1.0], [-1.0]], NOTHING)
    assert math.isnan(sides.rates["recall"].value)
    assert math.isnan(sides.rates["auroc"].value)
    assert sides.rates["fpr_kept"].value == 0.5
    assert sides.curve is None
    assert axis_section("Languages", {"language.de": sides}).plots == ()


def test_the_plain_condition_stands_first_on_every_axis_and_is_measured_once() -> None:
    asked: list[str] = []

    def measure(name: str, _: Any) -> Sides:
        asked.append(name)
        return Sides([[1.0]], [[0.0]], NOTHING)

    axes: Any = {"Wording": {"plain": None, "bare": None}, "Length": {"length+4": None}}
    found = {axis: list(sides) for axis, sides in along_axes(axes, measure).items()}
    assert found == {"Wording": ["plain", "bare"], "Length": ["plain", "length+4"]}
    assert asked == ["plain", "bare", "length+4"]


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"calibration": "apart"}, False),
        ({"calibration": "apart", "score": "contribution"}, True),
        ({"fpr": None}, False),
    ],
)
def test_a_conformal_interval_is_promised_of_one_threshold_at_a_stated_rate(changes: dict[str, Any], holds: bool) -> None:
    made = calibrate(torch.arange(5.0) + 100, torch.arange(100.0), fpr=0.05)
    config = {"calibration": "shared", "score": "evidence", "fpr": 0.05} | changes
    record = {"calibration": asdict(made), "config": config}
    one: Any = SimpleNamespace(records=[record], more_gates={})
    low, high = conformal_interval(100, 4)
    assert (promised(one)[1:] == (low, high, 100)) == holds
    assert ("calibration.fpr" in promises(one)) == holds
    assert promises(one)["calibration.fpr_seen"] == made.false_positive_rate
    for other in (
        SimpleNamespace(records=[record, record], more_gates={}),
        SimpleNamespace(records=[record], more_gates={"draft": 1}),
    ):
        assert promised(other) == NOTHING  # type: ignore[arg-type]
