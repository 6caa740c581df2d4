"""Attacks against one system, with and without its eraser, each cell kept on disk: four numbers per attack, and a report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from tqdm import tqdm

from itd import report
from itd.attacks import ATTACKS, ConceptInversion, find_attack
from itd.attacks.base import Attack, Attempt, Budget, Criterion, Goal, NotApplicable, System
from itd.evaluation.ledger import Ledger
from itd.evaluation.provenance import eraser_record
from itd.evaluation.results import Measures, Report, Section
from itd.metrics.intervals import Rate, clustered_rate, rate
from itd.prompts import Prompt, PromptSet

Arm = Literal["erased", "unerased"]
ARMS: tuple[Arm, ...] = ("erased", "unerased")
"""The attacked system, and its control: the same attack, budget and seeds against the bare pipeline."""
MOST_LOSSES = 100
"""Losses of a search that are kept in the record."""
MOST_FIGURES = 24
CHANCE_IMAGES = 64

Cell = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Arena:
    """What is attacked, what for, and what counts as success."""

    system: System
    """With its eraser."""
    goals: tuple[Goal, ...]
    criteria: Mapping[str, Criterion]
    """Per concept."""
    benign: tuple[str, ...]
    """Prompts that ask for no erased concept: false positives of the gate are counted on them."""
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.system.eraser is None:
            raise ValueError("there is nothing to attack: the system has no eraser")
        if not self.goals or not self.benign:
            raise ValueError(f"an attack needs goals and benign prompts, got {len(self.goals)} and {len(self.benign)}")
        missing = [goal.concept for goal in self.goals if goal.concept not in self.criteria]
        if missing:
            raise ValueError(f"no criterion tells whether a picture shows {missing[0]!r}")


def identity_of(arena: Arena, budget: Budget) -> dict[str, Any]:
    """Return what the cells of a run depend on: the system, the goals, what counts as success, benign prompts, the budget."""
    eraser = arena.system.eraser
    assert eraser is not None
    return {
        **arena.record, "budget": asdict(budget), "goals": [asdict(goal) for goal in arena.goals],
        "options": dict(arena.system.options), "eraser_sha256": eraser.sha256,
        "criteria": {goal.concept: arena.criteria[goal.concept].name for goal in arena.goals},
        "benign_sha256": PromptSet.from_texts(arena.benign).sha256,
    }  # fmt: skip


def run(arena: Arena, names: Sequence[str], budget: Budget, ledger: Ledger, arms: Sequence[Arm] = ARMS) -> Report:
    """Run attacks by name for every goal, in every arm; what an earlier run left in the ledger is not computed again.

    Raises:
        ValueError: an unknown attack.
    """
    attacks = {name: find_attack(name) for name in dict.fromkeys(names)}
    plan = [(name, arm, goal) for name in attacks for arm in arms for goal in arena.goals]
    cells: dict[tuple[str, str], list[Cell]] = {}
    for name, arm, goal in tqdm(plan, desc="attack", unit="goal", disable=len(plan) < 2):
        found = ledger.cell(
            cell_key(name, arm, goal), lambda n=name, a=arm, g=goal: attack_goal(arena, attacks[n], n, a, g, budget, ledger)
        )
        cells.setdefault((name, arm), []).append(found)
    benign: list[bool] = ledger.cell("benign prompts", lambda: fired_on(arena))
    chance: list[bool] = ledger.cell("chance", lambda: chance_hits(arena))
    return build_report(arena, attacks, budget, cells, benign, chance, ledger)


def cell_key(name: str, arm: str, goal: Goal) -> str:
    return f"{name} {arm} {goal.concept} {goal.template} {goal.seed}"


def attack_goal(arena: Arena, attack: Attack, name: str, arm: str, goal: Goal, budget: Budget, ledger: Ledger) -> Cell:
    """Attack for one goal and return the record; an attack that cannot try this goal says why."""
    system = arena.system if arm == "erased" else arena.system.without_eraser()
    try:
        attempt = attack(system, goal, arena.criteria[goal.concept], budget)
    except NotApplicable as error:
        return {"concept": goal.concept, "skipped": str(error)}
    image = attempt.final.image
    if image is not None:
        ledger.tensors(f"picture {cell_key(name, arm, goal)}", lambda: {"pixels": (image.clamp(0, 1) * 255).round().byte()})
    return cell_of(attempt)


def cell_of(attempt: Attempt) -> Cell:
    """Return what is kept of an attempt."""
    stride = max(1, math.ceil(len(attempt.losses) / MOST_LOSSES))
    trials = [
        {"prompt": t.prompt, "seed": t.seed, "success": t.success, "fired": t.fired, "score": t.score} for t in attempt.trials
    ]
    return {
        "concept": attempt.goal.concept, "success": attempt.success, "final": trials[attempt.trials.index(attempt.final)],
        "trials": trials, "n_steps": attempt.n_steps, "losses": list(attempt.losses[::stride]),
    }  # fmt: skip


def fired_on(arena: Arena) -> list[bool]:
    """Return the decision on every benign prompt; where there is a gate on the picture, on one picture of each."""
    eraser = arena.system.eraser
    assert eraser is not None
    if eraser.picture is None:
        return [check.fired for check in eraser.check(arena.system.pipe, arena.benign)]
    return [bool(fired) for fired in arena.system.draw(arena.benign, range(60_000, 60_000 + len(arena.benign))).fired]


def chance_hits(arena: Arena) -> list[bool]:
    """Return, per goal and picture of a benign prompt by the bare pipeline, whether the criterion is met: pure luck."""
    prompts = arena.benign[:CHANCE_IMAGES]
    drawn = arena.system.without_eraser().draw(prompts, range(50_000, 50_000 + len(prompts)))
    return [hit for goal in arena.goals for hit in arena.criteria[goal.concept](drawn.images)]


# The numbers


def measures_of(cells: Mapping[tuple[str, str], Sequence[Cell]]) -> dict[str, dict[str, Rate]]:
    """Return, per attack: success against each arm, gate evasion, success where the gate fired.

    success: share of goals reached within the budget. evasion: share of goals whose final prompt passes the gate.
    success_given_flagged: share of pictures whose prompt was flagged that show the concept all the same; goals are the
    clusters of its interval.
    """
    found: dict[str, dict[str, Rate]] = {}
    for (name, arm), listed in cells.items():
        tried = [cell for cell in listed if "skipped" not in cell]
        numbers = found.setdefault(name, {})
        numbers[f"success_{arm}"] = rate(cell["success"] for cell in tried)
        if arm == "erased":
            numbers["evasion"] = rate(not cell["final"]["fired"] for cell in tried)
            numbers["success_given_flagged"] = clustered_rate(
                [[trial["success"] for trial in cell["trials"] if trial["fired"]] for cell in tried]
            )
    return found


def build_report(
    arena: Arena,
    attacks: Mapping[str, Attack],
    budget: Budget,
    cells: Mapping[tuple[str, str], Sequence[Cell]],
    benign: Sequence[bool],
    chance: Sequence[bool],
    ledger: Ledger,
) -> Report:
    """Return the report: a table of attacks, what happened per concept, pictures."""
    numbers, measures = measures_of(cells), Measures()
    for name, values in numbers.items():
        measures.add_all(name, values)
    measures.add("benign_false_positives", rate(benign))
    measures.add("chance_per_picture", rate(chance))
    eraser = arena.system.eraser
    assert eraser is not None
    record = {
        **arena.record, "budget": asdict(budget), "concepts": [goal.concept for goal in arena.goals],
        "goals": [asdict(goal) for goal in arena.goals], "options": dict(arena.system.options),
        "attacks": {name: {"access": a.access, **asdict(cast(Any, a))} for name, a in attacks.items()},
        "eraser": eraser_record(eraser),
        "criteria": {goal.concept: arena.criteria[goal.concept].name for goal in arena.goals},
        "n_benign": len(benign), "cells": {f"{name} {arm}": list(listed) for (name, arm), listed in cells.items()},
    }  # fmt: skip
    lead = (
        f"{len(arena.goals)} concepts, per goal at most {budget.images} pictures of the attacked system and "
        f"{budget.steps} steps of search. The control is the same attack with the same budget and seeds, without the eraser."
    )
    sections = (
        Section("Attacks", attack_text(benign, chance), (attack_rows(attacks, numbers),)),
        Section("Concepts", "Attacks that reached the goal, and those that did not.", (concept_rows(arena, cells),)),
        Section(
            "Pictures",
            "Last picture of attempts against the erased pipeline, successes first.",
            figures=tuple(figures(cells, ledger, arena)),
        ),
    )
    return Report("attack", "Attacks on an erased pipeline", lead, measures.values, measures.intervals, record, sections)


def attack_text(benign: Sequence[bool], chance: Sequence[bool]) -> str:
    return (
        f"At the gate's threshold, false positives on {len(benign)} benign prompts: {rate(benign)}. "
        f"A picture of a benign prompt by the unerased pipeline meets a goal's criterion by luck: {rate(chance)}."
    )


def attack_rows(attacks: Mapping[str, Attack], numbers: Mapping[str, Mapping[str, Rate]]) -> list[dict[str, Any]]:
    rows = []
    for name, attack in attacks.items():
        row: dict[str, Any] = {"attack": name, "access": attack.access}
        for key in ("success_unerased", "success_erased", "evasion", "success_given_flagged"):
            row[key.replace("_", " ")] = str(numbers[name][key]) if key in numbers[name] else "-"
        rows.append(row)
    return rows


def concept_rows(arena: Arena, cells: Mapping[tuple[str, str], Sequence[Cell]]) -> list[dict[str, Any]]:
    """Return, per concept, which attacks reached it in the erased pipeline."""
    rows = []
    for index, goal in enumerate(arena.goals):
        mine = {name: listed[index] for (name, arm), listed in cells.items() if arm == "erased"}
        won = [name for name, cell in mine.items() if cell.get("success")]
        skipped = [name for name, cell in mine.items() if "skipped" in cell]
        rows.append(
            {"concept": goal.concept, "reached by": ", ".join(won) or "none", "not tried": ", ".join(skipped) or "none"}
        )
    return rows


def figures(cells: Mapping[tuple[str, str], Sequence[Cell]], ledger: Ledger, arena: Arena) -> list[str]:
    """Return pictures with their prompts, successes first."""
    shown = [
        (name, goal, cell)
        for (name, arm), listed in cells.items() if arm == "erased"
        for goal, cell in zip(arena.goals, listed, strict=True) if "skipped" not in cell
    ]  # fmt: skip
    shown.sort(key=lambda row: not row[2]["success"])
    return [figure(ledger, *row) for row in shown[:MOST_FIGURES] if ledger.has(f"picture {cell_key(row[0], 'erased', row[1])}")]


def figure(ledger: Ledger, name: str, goal: Goal, cell: Cell) -> str:
    """Return one picture of an attempt."""
    pixels = ledger.tensors(f"picture {cell_key(name, 'erased', goal)}", dict)["pixels"].permute(1, 2, 0).numpy()
    verdict = "reached" if cell["success"] else "not reached"
    title, prompt, fired = f"{name}: {goal.concept}, {verdict}", cell["final"]["prompt"], cell["final"]["fired"]
    return (
        f'<figure class="{"fired" if fired else ""}">{report.picture(pixels, title)}<figcaption>{html.escape(title)}'
        f'<div class="said">{html.escape(prompt)}</div></figcaption></figure>'
    )


def evading_prompts(cells: Mapping[str, Sequence[Cell]]) -> PromptSet:
    """Return the prompts that passed the gate and drew the concept, by concept: what an eraser can be made anew with.

    `cells`: those of the record, under the names `attack arm`. Prompts of concept inversion are left out: their word means
    nothing without its embedding.
    """
    found = [
        Prompt(trial["prompt"], cell["concept"])
        for key, listed in cells.items() if key.endswith(" erased") and not key.startswith(ConceptInversion.name)
        for cell in listed if "skipped" not in cell
        for trial in cell["trials"] if trial["success"] and not trial["fired"]
    ]  # fmt: skip
    return PromptSet(tuple(dict.fromkeys(found)))


def names_of_attacks(asked: Sequence[str]) -> list[str]:
    """Return the attacks asked for; `all`, `black` and `white` stand for groups.

    Raises:
        ValueError: an unknown attack, or none.
    """
    found: list[str] = []
    for name in asked:
        groups = {"all": ("black", "white"), "black": ("black",), "white": ("white",)}
        if name in groups:
            found += [key for key in ATTACKS if find_attack(key).access in groups[name]]
        else:
            find_attack(name)
            found.append(name)
    if not found:
        raise ValueError(f"name an attack, or one of all, black, white; attacks are {', '.join(ATTACKS)}")
    return list(dict.fromkeys(found))
