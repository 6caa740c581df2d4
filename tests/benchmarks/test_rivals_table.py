"""The table of rivals: numbers and winners by hand, resuming, the report, the choice of cases."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rivals import __main__ as command
from benchmarks.rivals import table
from benchmarks.rivals.gates import EDITED, Gate
from benchmarks.rivals.safree import Safree
from benchmarks.rivals.systems import NoErasure
from benchmarks.rivals.table import COLUMNS, Case, measures_of, run, table_of, winner_of, winners_of
from benchmarks.rivals.uce import UnifiedConceptEditing
from itd.evaluation.ledger import Ledger
from itd.metrics.intervals import Rate, rate, wilson
from itd.prompts import fill
from itd.templates import TEMPLATES

CASES = [
    Case("erased", "house", "a house", 1), Case("erased", "boat", "a boat", 2), Case("kept", "cat", "a cat", 3),
    Case("kept", "dog", "a dog", 4), Case("general", "cup", "a cup", 5),
]  # fmt: skip
NONE = {"seen": [["house"], ["boat"], ["cat"], ["dog"], ["cup"]], "fired": None, "same": [True] * 5, "setup_seconds": 0.0}
COLUMN = {column.name: column for column in COLUMNS}


class Canned:
    """A rival that draws one grey per prompt, darker where a word of the prompt is erased; and counts how often it is made."""

    def __init__(self, name: str, *erased: str) -> None:
        self.name, self.erased, self.made = name, erased, 0

    def __call__(self, task: Any) -> Canned:
        self.made += 1
        return self

    def fired(self, prompts: Any) -> list[bool] | None:
        return [any(word in prompt for word in self.erased) for prompt in prompts] if self.erased else None

    def draw(self, prompts: Any, seeds: Any) -> torch.Tensor:
        dark = [any(word in prompt for word in self.erased) for prompt in prompts]
        return torch.tensor([0.1 if d else 0.9 for d in dark])[:, None, None, None].expand(-1, 3, 2, 2)


class FakeTask:
    def once(self, key: str, make: Any) -> Any:
        return make()

    def timed(self, make: Any) -> tuple[Any, float]:
        return make(), 0.5

    def draw_bare(self, prompts: Any, seeds: Any) -> list[torch.Tensor]:
        return list(Canned("none").draw(prompts, seeds))


class FakeGate:
    name = "word"

    def __call__(self, task: Any) -> Gate:
        return Gate("word", lambda texts: torch.tensor([[float("house" in text)] for text in texts]), 0.5)


def seen(images: torch.Tensor) -> list[set[str]]:
    """Names what the case shows where it is bright, beside something else."""
    return [{case.noun, "sky"} if image.mean() > 0.5 else {"nothing"} for case, image in zip(CASES, images, strict=True)]


def test_the_columns_by_hand() -> None:
    cell = {
        "seen": [["house", "sky"], ["ship"], ["sky", "cat"], ["cat"], ["cup"]], "fired": [True, False, False, True, False],
        "same": [False, True, True, False, True], "setup_seconds": 2.5,
    }  # fmt: skip
    found = measures_of(cell, CASES, NONE)
    values = {name: value if isinstance(value, float) else value.value for name, value in found.items()}
    assert values == {
        "shown_erased": 0.5, "shown_kept": 0.5, "shown_general": 1.0, "unchanged_kept": 0.5, "unchanged_general": 1.0,
        "recall": 0.5, "false_positives_kept": 0.5, "false_positives_general": 0.0, "harmonic_mean": 0.5, "setup_seconds": 2.5,
    }  # fmt: skip
    assert set(values) == set(COLUMN)
    without = measures_of({**cell, "fired": None}, CASES, None)
    assert {"recall", "false_positives_kept", "harmonic_mean"}.isdisjoint(without)


def harmonic(cell: dict[str, Any], none: dict[str, Any], cases: list[Case]) -> Rate:
    found = measures_of(cell, cases, none)["harmonic_mean"]
    assert isinstance(found, Rate)
    return found


def test_keeping_is_relative_to_what_is_seen_without_erasure() -> None:
    none = {**NONE, "seen": [["house"], ["boat"], ["cat"], ["wolf"], ["cup"]]}
    erased = {**NONE, "seen": [["x"], ["x"], ["cat"], ["wolf"], ["cup"]]}
    assert harmonic(erased, none, CASES) == Rate(1.0, *wilson(2, 2)[1:3], 3)
    blind = {**NONE, "seen": [["x"]] * 5}
    assert math.isnan(harmonic(erased, blind, CASES).value)


def test_the_interval_of_the_harmonic_mean_is_over_concepts() -> None:
    cases = [Case(kind, f"{kind} {i // 2}", "", i) for kind in ("erased", "kept") for i in range(20)]
    every, nothing = [[case.noun] for case in cases], [[] for _ in cases]
    none = {**NONE, "same": [True] * 40, "seen": every}
    once = {**none, "seen": [["erased 0"], *nothing[1:20], *every[20:]]}
    found = harmonic(once, none, cases)
    assert found.value == pytest.approx(2 * 0.95 / 1.95)
    assert found.high == 1.0, "one concept of ten is left out of some draws"
    assert found.low == pytest.approx(2 * 0.85 / 1.85, abs=0.03)
    perfect = {**none, "seen": [*nothing[:20], *every[20:]]}
    winners = {winner.column: winner[1:] for winner in table_of({"perfect": perfect, "once": once}, cases, none).winners}
    assert winners["harmonic_mean"] == winners["shown_erased"] == (("perfect",), ("once",))


def recall_of(**gates: list[list[bool]]) -> tuple[dict[str, Rate], tuple[tuple[str, ...], ...]]:
    """Return the recall of gates that fire so on every concept's prompts, and who wins it."""
    groups = next(iter(gates.values()))
    cases = [Case("erased", f"noun {i}", "", 0) for i, group in enumerate(groups) for _ in group]
    rows, winners = table_of({name: {"fired": [*chain(*g)], "setup_seconds": 0.0} for name, g in gates.items()}, cases, None)
    return {name: row["recall"] for name, row in rows.items()}, winners[0][1:]  # type: ignore[misc]


def test_who_is_better_on_every_concept_wins_alone_though_intervals_overlap() -> None:
    half, more = [[True, False] * 2] * 10, [[True, True, True, False]] * 10
    recall, winner = recall_of(half=half, more=more)
    assert recall["half"].high > recall["more"].low
    assert winner == (("more",), ())


def test_who_is_better_on_one_concept_only_is_tied_with_though_intervals_do_not_overlap() -> None:
    every, less = [[True] * 20] * 5, [[True] * 20] * 4 + [[False] * 20]
    recall, winner = recall_of(every=every, less=less)
    assert recall["less"].high < recall["every"].low
    assert winner == (("every",), ("less",))


def test_a_tie_is_one_with_each_of_the_best() -> None:
    first, second = [[True] * 4] * 6 + [[False] * 4] * 6, [[False] * 4] * 6 + [[True] * 4] * 6
    close = [[True] * 4] * 5 + [[False] * 4] * 7
    assert recall_of(first=first, close=close)[1] == (("first",), ("close",))
    worse = [[True, True, True, False]] * 6 + [[False] * 4] * 6
    assert recall_of(first=first, second=second, worse=worse)[1] == (("first", "second"), ())


def test_numbers_without_an_interval_win_and_never_tie() -> None:
    times = {"a": 1.0, "b": 1.0, "c": 2.0}
    assert winner_of(COLUMN["setup_seconds"], times, {}) == ("setup_seconds", ("a", "b"), ())


def test_a_column_without_numbers_has_no_winner() -> None:
    rows = {"a": {"harmonic_mean": math.nan, "shown_kept": rate([True])}}
    assert [winner.column for winner in winners_of(rows, {"a": {}})] == ["shown_kept"]
    assert winners_of({"a": {"shown_kept": rate([])}}, {"a": {}}) == []


def test_the_table_is_made_resumed_and_saved(tmp_path: Path) -> None:
    makers = [Canned("none"), Canned("good", "house", "boat"), Canned("blunt", "a ")]
    task: Any = FakeTask()

    def table() -> Any:
        return run(task, makers, [FakeGate()], CASES, CASES, seen, Ledger(tmp_path / "cells", {}), {"pipeline": "tiny"})

    report = table()
    assert report.metrics["system.good.shown_erased"] == 0
    assert report.metrics["system.good.harmonic_mean"] == 1
    assert report.metrics["system.good.unchanged_kept"] == 1
    assert report.metrics["system.blunt.harmonic_mean"] == 0
    assert report.metrics["system.none.shown_erased"] == 1
    assert report.metrics["gate.word.recall"] == 0.5
    winners = {row["column"]: row["best"] for row in report.record["winners"]["Systems"]}
    assert winners["harmonic_mean"] == ("good",)
    assert set(winners["shown_kept"]) == {"none", "good"}
    again = table()
    assert again.metrics == report.metrics
    assert [maker.made for maker in makers] == [1, 1, 1]
    report.save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["record"]["n_pictures"] == {"erased": 2, "kept": 2, "general": 1}
    assert content["record"]["cases"][0]["seed"] == 1
    assert "tied with it" in (tmp_path / "out" / "report.md").read_text()


def test_a_rival_that_was_stopped_draws_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK", 2)
    asked: list[str] = []

    class Stopped(Canned):
        def draw(self, prompts: Any, seeds: Any) -> torch.Tensor:
            if self.made == 1 and "a cup" in prompts:
                raise KeyboardInterrupt
            asked.extend(prompts)
            return super().draw(prompts, seeds)

    def seen(images: torch.Tensor) -> list[set[str]]:
        return [{f"{float(image.mean()):.1f}"} for image in images]

    def cells(rival: Canned, folder: str) -> Any:
        task: Any = FakeTask()
        report = run(task, [rival], [], CASES, [], seen, Ledger(tmp_path / folder, {}), {})
        return report.record["cells"][rival.name]

    rival = Stopped("good", "house", "cat")
    with pytest.raises(KeyboardInterrupt):
        cells(rival, "stopped")
    assert cells(rival, "stopped") == cells(Canned("good", "house", "cat"), "at once")
    assert asked == [case.prompt for case in CASES], "each once"
    assert rival.made == 2


# The command


def test_all_gates_meet_all_edits_and_the_systems_are_there() -> None:
    names = [maker.name for maker in command.makers_of(command.RivalsConfig())]
    assert names[0] == "none"
    assert {"negative prompt", "safe latent diffusion", "safree", "uce", "esd-x", "projection"} <= set(names)
    assert {"uce, tuned", "safree, tuned"} <= set(names)
    assert {f"{gate.name} + {edit}" for gate in EDITED for edit in ("paper", "remove", "subtract", "replace")} <= set(names)
    assert len(names) == len(set(names)) == 1 + 6 + 24 + 2 + 3
    assert [maker.name for maker in command.makers_of(command.RivalsConfig(only=("uce",)))] == ["none", "uce"]
    with pytest.raises(ValueError, match="got 'uco'"):
        command.makers_of(command.RivalsConfig(only=("uco",)))


def test_quick_is_a_stated_subsample() -> None:
    assert command.RivalsConfig(quick=True).stated.n_concepts == 4
    assert command.RivalsConfig(quick=True, n_concepts=2).stated.n_concepts == 2
    assert command.RivalsConfig().stated == command.RivalsConfig()


def test_tuning_leaves_out_what_is_calibrated_and_has_sentences_of_its_own() -> None:
    config = command.RivalsConfig(tune=True, uce=UnifiedConceptEditing(ridge=0.01), only=("uce", "safree"))
    assert command.makers_of(config) == [NoErasure(), Safree(), UnifiedConceptEditing(ridge=0.01)]
    with pytest.raises(ValueError, match="got 'itd'"):
        command.makers_of(command.RivalsConfig(tune=True, only=("itd",)))
    prompts = [case.prompt for case in command.cases_of(["house"], ["cat"], ["cup"], config)]
    assert not any(fill(template, name) in prompts for template in TEMPLATES["test"] for name in ("house", "cat", "cup"))


def test_settings_that_runs_did_not_have_from_the_start_count_where_they_are_set() -> None:
    plain = command.settings_of(command.RivalsConfig(out=Path("elsewhere"), only=("uce",)))
    assert set(plain) == {"n_concepts", "n_templates", "n_general", "n_probes", "fpr", "esd_steps", "esd_lr", "seed"}
    changed = command.settings_of(command.RivalsConfig(safree=Safree(alpha=0.1), tune=True))
    assert changed == {**plain, "safree": {"alpha": 0.1, "gamma": 10.0}, "tune": True}


def test_cases_are_held_out_and_every_picture_has_its_own_seed() -> None:
    config = command.RivalsConfig(n_templates=3, n_general=4)
    cases = command.cases_of(["house"], ["cat", "dog"], ["cup", "lamp", "tree", "bed", "pen"], config)
    assert [sum(case.kind == kind for case in cases) for kind in ("erased", "kept", "general")] == [3, 6, 4]
    assert len({case.seed for case in cases}) == len(cases)
    assert cases == command.cases_of(["house"], ["cat", "dog"], ["cup", "lamp", "tree", "bed", "pen"], config)
    probes = command.probes_of(["house"], ["cat"], ["cup", "lamp"], 5, 0)
    n = len(TEMPLATES["test"])
    assert [sum(case.kind == kind for case in probes) for kind in ("erased", "kept", "general")] == [n, n, 5]
    assert all(case.noun in case.prompt for case in [*cases, *probes])
