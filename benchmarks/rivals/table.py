"""One table of all rivals: the same prompts and seeds for each, the winner of every column named, and who ties with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.rivals.gates import GateMaker
from benchmarks.rivals.task import Maker, Rival, Task
from itd.evaluation.ledger import Ledger
from itd.evaluation.results import Measures, Report, Section
from itd.metrics.detection import gone_and_kept_draws, gone_and_kept_rate
from itd.metrics.intervals import Rate, drawn_sums, interval_of, rate, value_of

UNCHANGED = 2 / 255
"""A picture is unchanged if no value differs by more than this: what rounding in another batch does not reach."""
CHUNK = 80
"""Pictures of a rival that are kept together; whole batches."""


class Case(NamedTuple):
    """One picture to draw: kind (`erased`, `kept`, `general`), what it should show, prompt and seed."""

    kind: str
    noun: str
    prompt: str
    seed: int


class Shown(Protocol):
    """Tells which nouns each picture shows, values in [0, 1]: one that is named in the whole, more in the halves of a scene."""

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> Sequence[Collection[str]]: ...


@dataclass(frozen=True)
class Column:
    """A column of the table: larger or smaller is better."""

    name: str
    larger: bool
    meaning: str


COLUMNS = (
    Column("shown_erased", False, "pictures of erased concepts in which the judge still sees the concept"),
    Column("shown_kept", True, "pictures of kept concepts in which the judge sees the concept"),
    Column("shown_general", True, "the same for everything else"),
    Column("harmonic_mean", True, "of 1 - shown_erased and shown_kept, the latter relative to the pipeline without erasure"),
    Column("unchanged_kept", True, "pictures of kept concepts that are those of the pipeline without erasure"),
    Column("unchanged_general", True, "the same for everything else"),
    Column("recall", True, "prompts of erased concepts that the gate flags"),
    Column("false_positives_kept", False, "prompts of kept concepts that the gate flags"),
    Column("false_positives_general", False, "prompts of everything else that the gate flags"),
    Column("setup_seconds", False, "time to train, edit or calibrate"),
)
KINDS = ("erased", "kept", "general")


def run(
    task: Task,
    makers: Sequence[Maker],
    gates: Sequence[GateMaker],
    cases: Sequence[Case],
    probes: Sequence[Case],
    shown: Shown,
    ledger: Ledger,
    record: Mapping[str, Any],
) -> Report:
    """Draw the cases with every rival, score the probes with every gate, and return the table; goes on where it was stopped."""
    gate_rows = {gate.name: ledger.cell(f"gate {gate.name}", lambda gate=gate: gate_cell(task, gate, probes)) for gate in gates}
    cells: dict[str, Any] = {}
    for maker in tqdm(list(makers), desc="rivals", unit="system"):
        name = maker.name
        cells[name] = ledger.cell(f"system {name}", lambda maker=maker: system_cell(task, maker, cases, shown, ledger))
    systems, alone = table_of(cells, cases, cells.get("none")), table_of(gate_rows, probes, None)
    return build_report(systems, alone, cases, probes, {**record, "cells": cells, "gates": gate_rows})


def gate_cell(task: Task, maker: GateMaker, probes: Sequence[Case]) -> dict[str, Any]:
    """Fit a gate and return its decision on every probe."""
    gate, seconds = task.timed(lambda: task.once(repr(maker), lambda: maker(task)))
    return {"fired": gate.fired([probe.prompt for probe in probes]), "setup_seconds": seconds, "threshold": gate.threshold}


def system_cell(task: Task, maker: Maker, cases: Sequence[Case], shown: Shown, ledger: Ledger) -> dict[str, Any]:
    """Prepare a rival, draw every case and return what is seen, what the gate says, and what is unchanged.

    Pictures are looked at in chunks, each a cell of its own: a rival that was stopped is prepared again and draws the rest.
    """
    rival, seconds = task.timed(lambda: maker(task))
    parts = []
    for start in range(0, len(cases), CHUNK):
        chunk = cases[start : start + CHUNK]
        key = f"system {maker.name}, pictures {start} on"
        parts.append(ledger.cell(key, lambda chunk=chunk: picture_cell(task, rival, chunk, shown)))
    seen, same = ([*chain(*(part[name] for part in parts))] for name in ("seen", "same"))
    return {"seen": seen, "fired": rival.fired([case.prompt for case in cases]), "same": same, "setup_seconds": seconds}


def picture_cell(task: Task, rival: Rival, cases: Sequence[Case], shown: Shown) -> dict[str, Any]:
    """Draw some cases; return what is seen and what is unchanged."""
    prompts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    images, before = rival.draw(prompts, seeds), torch.stack(task.draw_bare(prompts, seeds))
    same = ((images - before).abs().flatten(1).amax(1) <= UNCHANGED).tolist()
    return {"seen": [sorted(nouns) for nouns in shown(images)], "same": same}


# The numbers


class Winner(NamedTuple):
    """Who is best in a column, and who cannot be told from them."""

    column: str
    best: tuple[str, ...]
    tied: tuple[str, ...]


class Table(NamedTuple):
    """The columns of every rival, and who wins them."""

    rows: dict[str, dict[str, Rate | float]]
    winners: list[Winner]


def table_of(cells: Mapping[str, Mapping[str, Any]], cases: Sequence[Case], none: Mapping[str, Any] | None) -> Table:
    """Return the table of rivals that saw the same cases; `none` is the cell of the pipeline without erasure."""
    rows = {name: measures_of(cell, cases, none) for name, cell in cells.items()}
    return Table(rows, winners_of(rows, {name: draws_of(cell, cases, none) for name, cell in cells.items()}))


def flags_of(cell: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, list[list[bool]]]:
    """Return what each column counts, one list per concept; of the gate only, where nothing was drawn."""
    found: dict[str, list[list[bool]]] = {}
    for kind in KINDS:
        groups: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            if case.kind == kind:
                groups.setdefault(case.noun, []).append(i)
        if "seen" in cell:
            found[f"shown_{kind}"] = [[noun in cell["seen"][i] for i in rows] for noun, rows in groups.items()]
            if kind != "erased":
                found[f"unchanged_{kind}"] = [[cell["same"][i] for i in rows] for rows in groups.values()]
        if cell["fired"] is not None:
            column = "recall" if kind == "erased" else f"false_positives_{kind}"
            found[column] = [[cell["fired"][i] for i in rows] for rows in groups.values()]
    return found


def measures_of(cell: Mapping[str, Any], cases: Sequence[Case], none: Mapping[str, Any] | None) -> dict[str, Rate | float]:
    """Return the columns of a rival."""
    found: dict[str, Rate | float] = {column: rate(chain(*groups)) for column, groups in flags_of(cell, cases).items()}
    if none is not None:
        found["harmonic_mean"] = gone_and_kept_rate(*counts_of(cell, none, cases))
    return found | {"setup_seconds": float(cell["setup_seconds"])}


def draws_of(
    cell: Mapping[str, Any], cases: Sequence[Case], none: Mapping[str, Any] | None
) -> dict[str, Float[Tensor, " draws"]]:
    """Return the columns in bootstrap draws of concepts, which are the same draws for every rival."""
    found = {}
    for column, groups in flags_of(cell, cases).items():
        if groups:
            hits, n = drawn_sums(torch.tensor([[sum(group), len(group)] for group in groups])).unbind(1)
            found[column] = hits.double() / n
    if none is not None:
        found["harmonic_mean"] = gone_and_kept_draws(*counts_of(cell, none, cases))
    return found


def counts_of(
    cell: Mapping[str, Any], none: Mapping[str, Any], cases: Sequence[Case]
) -> tuple[Float[Tensor, "concepts 2"], Float[Tensor, "concepts 2"]]:
    """Return per erased concept in how many pictures it is seen, and of how many; per kept one, of how many without erasure."""
    flags, before = flags_of(cell, cases), flags_of(none, cases)["shown_kept"]
    erased = [[sum(group), len(group)] for group in flags["shown_erased"]]
    kept = [[sum(after), sum(bare)] for after, bare in zip(flags["shown_kept"], before, strict=True)]
    return torch.tensor(erased).double(), torch.tensor(kept).double()


def winners_of(
    rows: Mapping[str, Mapping[str, Rate | float]], draws: Mapping[str, Mapping[str, Float[Tensor, " draws"]]]
) -> list[Winner]:
    """Return the winner of every column that somebody has a number in."""
    found = []
    for column in COLUMNS:
        values = {name: row[column.name] for name, row in rows.items() if column.name in row}
        known = {name: value for name, value in values.items() if math.isfinite(value_of(value))}
        if known:
            drawn = {name: draws[name][column.name] for name in known if column.name in draws[name]}
            found.append(winner_of(column, known, drawn))
    return found


def winner_of(column: Column, values: Mapping[str, Rate | float], draws: Mapping[str, Float[Tensor, " draws"]]) -> Winner:
    """Return who has the best value of a column, and who cannot be told from each of these; without draws nobody."""
    pick = max if column.larger else min
    best = pick(value_of(value) for value in values.values())
    first = tuple(name for name, value in values.items() if value_of(value) == best)
    others = [name for name in draws if name not in first]
    return Winner(column.name, first, tuple(name for name in others if all(tied(draws[name], draws[w]) for w in first)))


def tied(a: Float[Tensor, " draws"], b: Float[Tensor, " draws"]) -> bool:
    """Tell whether the 95 % interval of the paired difference contains 0."""
    low, high = interval_of(a - b, 0.95)
    return low <= 0 <= high


# The report


def build_report(
    systems: Table, gates: Table, cases: Sequence[Case], probes: Sequence[Case], record: Mapping[str, Any]
) -> Report:
    """Return the page: systems, gates alone, winners of both."""
    measures = Measures()
    for prefix, table in (("system", systems), ("gate", gates)):
        for name, values in table.rows.items():
            measures.add_all(f"{prefix}.{name}", values)
    tables = {"Systems": systems, "Gates alone": gates}
    texts = {
        "Systems": f"{len(cases)} pictures each, of the same prompts and seeds. In brackets: 95 % Wilson intervals. Tied: the "
        "95 % interval of the paired difference to the winner contains 0, in a bootstrap over concepts.",
        "Gates alone": f"{len(probes)} held-out prompts each; nothing is drawn.",
    }
    sections = []
    for title, table in tables.items():
        if table.rows:
            sections.append(Section(title, texts[title], (table_rows(table.rows), winner_rows(table.winners))))
    meaning = [
        {"column": column.name, "better": "larger" if column.larger else "smaller", "what it is": column.meaning}
        for column in COLUMNS
    ]
    sections.append(Section("Columns", "", (meaning,)))
    winners = {title: [winner._asdict() for winner in table.winners] for title, table in tables.items()}
    counts = {kind: sum(case.kind == kind for case in cases) for kind in KINDS}
    record = {**record, "winners": winners, "n_pictures": counts, "cases": [case._asdict() for case in cases]}
    lead = "Ways to erase the same concepts from the same model, on held-out prompts with the same seeds."
    return Report("rivals", "Rivals", lead, measures.values, measures.intervals, dict(record), tuple(sections))


def table_rows(rows: Mapping[str, Mapping[str, Rate | float]]) -> list[dict[str, Any]]:
    """Return one row per rival; a dash where a column does not apply."""
    columns = [column.name for column in COLUMNS if any(column.name in row for row in rows.values())]
    return [{"system": name, **{key: cell_text(row.get(key)) for key in columns}} for name, row in rows.items()]


def cell_text(value: Rate | float | None) -> str:
    if value is None:
        return "-"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]" if isinstance(value, Rate) else f"{value:.3f}"


def winner_rows(winners: Sequence[Winner]) -> list[dict[str, Any]]:
    return [{"column": w.column, "winner": ", ".join(w.best), "tied with it": ", ".join(w.tied) or "nobody"} for w in winners]
