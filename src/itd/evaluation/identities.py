"""Erase identities and keep others: accuracy on both, and what happens to the nearest neighbours."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itd.eraser import Eraser
from itd.erasing import EraseConfig
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.show import pair_figures, spread
from itd.evaluation.world import (
    DETECTOR,
    LEAKS,
    Case,
    Drawn,
    Made,
    Sets,
    Sight,
    World,
    leak_free_sets,
    leaky_sets,
    require_no_leak,
    sample,
    unsure_below,
)  # fmt: skip
from itd.metrics.detection import gone_and_kept_rate, rank_bins
from itd.metrics.intervals import Rate, rate, rate_by, value_of
from itd.plots import Line, line_plot
from itd.prompts import PromptSet, fill
from itd.settings import require_at_least
from itd.templates import TEMPLATES, templates_without

LEAD = (
    "Identities are erased together; others are kept. Accuracy is how often the judge names the noun that was asked for. "
    "Leak-free: no evaluated template, and nothing about a kept identity, was seen when features and threshold were chosen. "
    "Leaky: the evaluated prompts were among them, as in the published protocol, whose autoencoder saw them too; here it is "
    "the same one. Given: an eraser that was made elsewhere, and nobody knows what it saw. Intervals hold 95 % over concepts."
)
GIVEN = "given"
"""Stands where an arm says whether it leaks, for an eraser that was made elsewhere."""


@dataclass(frozen=True)
class Identities:
    """Erase `sizes[i]` identities, keep as many."""

    name: ClassVar[str] = "identities"

    sizes: tuple[int, ...] = (50, 100)
    """How many are erased, and how many kept, run by run."""
    n_templates: int = 5
    """Held-out templates per concept."""
    n_seeds: int = 5
    """Pictures per concept and template, without leaks."""
    leaky_seeds: int = 1
    """Pictures per concept and template of the leaky protocol; 0 leaves it out."""
    drawn_only: bool = True
    """Measure a concept in the sentences in which the unerased pipeline draws it, by a picture of another seed."""
    seed: int = 0
    """Of the choice of concepts and templates, and of the pictures."""
    erase: EraseConfig = field(default_factory=EraseConfig)
    """How the erasers are made."""

    def __post_init__(self) -> None:
        require_at_least(self, sizes=1, n_templates=1, n_seeds=1, leaky_seeds=0)
        if self.leaky_seeds > self.n_seeds:
            raise ValueError(f"leaky_seeds is at most n_seeds = {self.n_seeds}, got {self.leaky_seeds}")

    def quick(self) -> Identities:
        """Return the subsample: 10 and 10, 2 templates, 1 seed."""
        return replace(self, sizes=(10,), n_templates=2, n_seeds=1, leaky_seeds=1)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world, on its own erasers or on the one given."""
        world = World(out, self.name, asdict(self), pipe, eraser=eraser)
        measures, sections, arms = Measures(), [], {}
        runs = [choose(world, size, self.seed, eraser) for size in (self.sizes if eraser is None else self.sizes[:1])]
        templates = templates_free_of(name for erased, _ in runs for name in erased)
        for erased, kept in runs:
            size = len(erased)
            sentences = world.sentences((*erased, *kept), templates, self.drawn_only)
            drawn = rate(template in sentences[name] for name in sentences for template in templates)
            measures.add_all(f"erase{size}", {"sentences_drawn": drawn})
            cases = {name: self.cases_of(name, self.n_seeds, found) for name, found in sentences.items()}
            for leak in (GIVEN,) if eraser else LEAKS if self.leaky_seeds else LEAKS[:1]:
                n_seeds = self.leaky_seeds if leak == "leaky" else self.n_seeds
                part = {name: [case for case in rows if case.seed % 100 < n_seeds] for name, rows in cases.items()}
                made = Made(eraser, 0.0, 0) if eraser else self.make(world, leak, erased, kept, cases)
                result = measure(world, made, f"{self.name} {leak} {size}", erased, kept, part)
                measures.add_all(f"erase{size}.{leak}", result.measures)
                sections.append(section(world, f"{size} erased, {leak.replace('_', '-')}", result, made.eraser))
                arms[f"erase{size}.{leak}"] = {"erased": erased, "kept": kept, "damage": result.damage_record}
        record = {**world.record, **DETECTOR, "settings": asdict(self), "arms": arms}
        return Report(self.name, "Identities", LEAD, measures.values, measures.intervals, record, tuple(sections))

    def cases_of(self, name: str, n_seeds: int, templates: Sequence[str]) -> list[Case]:
        """Return the pictures of one concept: the same whatever else is erased, so that they are drawn once."""
        chosen = sample(random.Random(f"{self.seed} {name}"), templates, self.n_templates)
        first = 100 * (1 + self.seed)
        return [Case(fill(t, name), first + s, name) for t in chosen for s in range(n_seeds)]

    def make(
        self, world: World, leak: str, erased: Sequence[str], kept: Sequence[str], cases: Mapping[str, Sequence[Case]]
    ) -> Made:
        """Make the eraser of a run, without or with leaks."""
        sides = [test_prompts(TEMPLATES["test"], names) for names in (erased, kept)]
        if leak == "leak_free":
            sets = leak_free_sets(erased, kept)
            require_no_leak(sets, *sides)
        else:
            sets = leaky_sets(erased, *sides)
        return world.eraser(f"{self.name} {leak} {len(erased)}", sets, self.erase)


def templates_free_of(erased: Iterable[str]) -> list[str]:
    """Return the test sentences that mention nothing that is erased: a kept concept beside an erased one is not kept.

    Raises:
        ValueError: none is left.
    """
    templates = list(templates_without(erased, "test"))
    if not templates:
        raise ValueError("every test sentence mentions an erased concept; erase fewer")
    return templates


def test_prompts(templates: Sequence[str], names: Sequence[str]) -> PromptSet:
    return PromptSet.from_names(names, templates, "test")


def choose(world: World, size: int, seed: int, eraser: Eraser | None = None) -> tuple[list[str], list[str]]:
    """Return the erased and the kept: identities that are recognised when nothing is erased; where they end, other nouns.

    eraser: erases what it does; `size` others are kept.

    Raises:
        ValueError: the world has fewer, or does not have what the eraser erases.
    """
    given = world.known(eraser) if eraser else []
    identities, others = ([name for name in world.of_role(role) if name not in given] for role in ("identity", "general"))
    n = size if eraser else 2 * size
    names = world.best_drawn(identities, min(n, len(identities)))
    random.Random(seed).shuffle(names)
    missing = n - len(names)
    if missing > 0:
        names += world.best_drawn(others, missing)
    return (given, names) if eraser else (names[:size], names[size:])


class Outcome(NamedTuple):
    """Numbers, tables and pictures of one run."""

    measures: dict[str, Rate | float]
    damage: list[dict[str, Any]]
    before: Drawn
    after: Drawn
    erased: list[int]
    kept: list[int]

    @property
    def damage_record(self) -> list[dict[str, Any]]:
        """The damage by distance as plain values."""
        rates = ("unerased", "erased", "gate fires")
        return [row | {name: value_of(row[name]) for name in rates} for row in self.damage]


def measure(
    world: World, made: Made, key: str, erased: Sequence[str], kept: Sequence[str], cases: Mapping[str, Sequence[Case]]
) -> Outcome:
    """Draw without and with the eraser, and compare."""
    listed = [case for name in (*erased, *kept) for case in cases[name]]
    before, after = world.draw("unerased", listed), world.draw(key, listed, made.eraser)
    seen = world.see(before), world.see(after)
    gone, stay = before.rows(erased), before.rows(kept)
    measures = accuracies(seen, before, after, gone, stay)
    measures |= {"seconds_to_erase": made.seconds, "eraser_bytes": float(made.n_bytes)}
    damage = distance_damage(world, seen, before, after, erased, kept)
    measures |= {f"damage{row['fifth']}_{side}": row[side] for row in damage for side in ("unerased", "erased")}
    return Outcome(measures, damage, before, after, gone, stay)


def by_concept(flags: Sequence[bool], drawn: Drawn, rows: Sequence[int]) -> Rate:
    """Return the share of true flags, with an interval over concepts."""
    return rate_by((drawn.cases[i].noun for i in rows), (flags[i] for i in rows))


def accuracies(
    seen: tuple[Sight, Sight], before: Drawn, after: Drawn, gone: Sequence[int], stay: Sequence[int]
) -> dict[str, Rate | float]:
    """Return accuracy on erased and kept before and after, their harmonic mean, no-object rates, and what the gate did."""
    named = [sight.right(before.cases) for sight in seen]
    limit = unsure_below(seen[0], before.cases)
    empty = [
        [c < limit and not right for c, right in zip(sight.confidence.tolist(), flags, strict=True)]
        for sight, flags in zip(seen, named, strict=True)
    ]
    same, fired = before.same_as(after), list(after.fired)
    passed = [i for i in range(len(fired)) if not fired[i]]
    rates: dict[str, Rate | float] = {
        "acc_erased": by_concept(named[1], before, gone), "acc_erased_unerased": by_concept(named[0], before, gone),
        "acc_kept": by_concept(named[1], before, stay), "acc_kept_unerased": by_concept(named[0], before, stay),
        "no_object_erased": by_concept(empty[1], before, gone), "no_object_erased_unerased": by_concept(empty[0], before, gone),
        "no_object_kept": by_concept(empty[1], before, stay),
        "gate_recall": by_concept(fired, before, gone), "gate_fpr_kept": by_concept(fired, before, stay),
        "bit_identical_kept": by_concept(same, before, stay), "bit_identical_passed": rate(same[i] for i in passed),
    }  # fmt: skip
    erased, kept, drawn = counts(named[1], before, gone), counts(named[1], before, stay), counts(named[0], before, stay)
    relative = torch.stack([kept[:, 0], drawn[:, 0]], 1)
    return rates | {
        "harmonic_mean": gone_and_kept_rate(erased, kept), "harmonic_mean_relative": gone_and_kept_rate(erased, relative),
        "unsure_below": limit, "n_pictures": float(2 * len(fired)),
    }  # fmt: skip


def counts(flags: Sequence[bool], drawn: Drawn, rows: Sequence[int]) -> Float[Tensor, "concepts 2"]:
    """Return, per concept, how many of its pictures are flagged, and how many there are."""
    names = list(dict.fromkeys(drawn.cases[i].noun for i in rows))
    found = torch.zeros(len(names), 2, dtype=torch.float64)
    for i in rows:
        found[names.index(drawn.cases[i].noun)] += torch.tensor([float(flags[i]), 1.0])
    return found


def distance_damage(
    world: World, seen: tuple[Sight, Sight], before: Drawn, after: Drawn, erased: Sequence[str], kept: Sequence[str]
) -> list[dict[str, Any]]:
    """Return, for the kept concepts in five bins by distance to the nearest erased one: accuracies and false positives."""
    distances, right, rows = world.distances(kept, erased), [sight.right(before.cases) for sight in seen], []
    for number, names in enumerate(rank_bins(distances), 1):
        here = before.rows(names)
        rows.append({
            "fifth": number, "distance": sum(distances[name] for name in names) / len(names), "concepts": len(names),
            "nearest": ", ".join(names[:3]), "unerased": by_concept(right[0], before, here),
            "erased": by_concept(right[1], before, here), "gate fires": by_concept(list(after.fired), before, here),
        })  # fmt: skip
    return rows


def section(world: World, title: str, result: Outcome, eraser: Eraser) -> Section:
    """Return tables, the damage by distance, and pictures of erased, nearest and other kept concepts."""
    points = [[(row["distance"], row[side].value) for row in result.damage] for side in ("unerased", "erased")]
    bands = [[(row[side].low, row[side].high) for row in result.damage] for side in ("unerased", "erased")]
    lines = [Line(name, p, b) for name, p, b in zip(("unerased", "erased"), points, bands, strict=True)]
    plot = line_plot(lines, "Kept concepts", "distance to the nearest erased", "accuracy", y_range=(0, 1))
    rows = spread(result.erased, 12) + spread(result.kept, 12)
    figures = pair_figures(world, result.before, result.after, eraser, rows)
    table = [{"measure": name, "value": value} for name, value in result.measures.items()]
    return Section(title, "", (table, result.damage), (plot,), figures)


def sets_of(world: World, erased: Sequence[str], kept: Sequence[str]) -> Sets:
    """Return leak-free sets, after checking that they are."""
    sets = leak_free_sets(erased, kept)
    require_no_leak(sets, *(test_prompts(TEMPLATES["test"], names) for names in (erased, kept)))
    return sets
