"""The gate alone, without pictures: recall and false positives by length, position, company, paraphrase, spelling, language."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from itd.emoji.prompts import filler_words
from itd.eraser import Eraser
from itd.erasing import EraseConfig
from itd.evaluation.conditions import Axes, Condition, Sides, along_axes, axis_section, changes, look, promises, prompts_of
from itd.evaluation.general import General
from itd.evaluation.identities import choose, sets_of, templates_free_of, test_prompts
from itd.evaluation.results import Measures, Report
from itd.evaluation.variants import LANGUAGES, PARAPHRASES, TRANSLATIONS
from itd.evaluation.world import Made, World, leaky_sets
from itd.prompts import fill
from itd.settings import require_at_least
from itd.templates import TEMPLATES

LEAD = (
    "The gate decides on prompts about erased and about kept concepts; nothing is drawn. Every condition changes the held-out "
    "prompts in one way, on both sides alike. The false-positive rate is that of kept concepts under the same change; beside "
    "it, where one threshold decides, is what the calibration promises of prompts like those it saw: the true rate's mean and "
    "conformal interval."
)
NOTES = {
    "Erased concepts": "All held-out sentences, by erasers of fewer concepts.",
    "Calibration": "One threshold for all concepts, for which a conformal interval holds, beside one for each.",
    "Leaks": "All held-out sentences, by an eraser that was made from them.",
    "General prompts": (
        "Sentences and captions about nouns of which the eraser was told nothing, against erased names in all held-out "
        "sentences; as they are, and with words around both."
    ),
}
"""What is said of axes that have erasers of their own."""


@dataclass(frozen=True)
class GateAlone:
    """Measure the gate of erased identities."""

    name: ClassVar[str] = "gate"

    n_erased: int = 50
    """Identities that are erased, and as many kept."""
    n_templates: int = 10
    """Held-out sentences per concept and condition."""
    counts: tuple[int, ...] = (1, 10, 50)
    """Numbers of erased concepts over which the gate is measured on the plain condition."""
    n_general: int = 1000
    """General prompts."""
    seed: int = 0
    """Of concepts and changes."""
    erase: EraseConfig = field(default_factory=EraseConfig)
    """How the erasers are made."""

    def __post_init__(self) -> None:
        require_at_least(self, n_erased=1, n_templates=1, n_general=1)
        if self.counts and not 1 <= min(self.counts) <= max(self.counts) <= self.n_erased:
            raise ValueError(f"counts must lie between 1 and n_erased = {self.n_erased}, got {self.counts}")

    def quick(self) -> GateAlone:
        """Return the subsample: 10 and 10 concepts, 3 sentences, 100 general prompts."""
        return replace(self, n_erased=10, n_templates=3, counts=(1, 10), n_general=100)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world, on its own erasers or on the one given."""
        world = World(out, self.name, asdict(self), pipe, eraser=eraser)
        erased, kept = choose(world, self.n_erased, self.seed, eraser)
        made = Made(eraser, 0.0, 0) if eraser else world.eraser(self.name, sets_of(world, erased, kept), self.erase)
        found = along_axes(
            self.conditions(world, erased), lambda name, each: self.measure(world, made.eraser, name, each, erased, kept)
        )
        if eraser is None:
            found["Erased concepts"] = self.by_count(world, erased, kept)
            found["Calibration"] = {"plain": found["Wording"]["plain"], "shared": self.shared(world, erased, kept)}
            found["Leaks"] = {"plain": found["Wording"]["plain"], "leaky": self.leaky(world, erased, kept)}
        found["General prompts"] = self.general(world, erased, eraser)
        measured = {name: sides for axis in found.values() for name, sides in axis.items()}
        measures = Measures()
        for name, sides in measured.items():
            measures.add_all(name, sides.rates)
        measures.add_all("", promises(made.eraser))
        record = {
            **world.record, "settings": asdict(self), "erased": erased, "kept": kept,
            "roc": {name: sides.curve.points() for name, sides in measured.items() if sides.curve},
        }  # fmt: skip
        sections = tuple(axis_section(axis, sides, NOTES.get(axis, "")) for axis, sides in found.items())
        return Report(self.name, "The gate alone", LEAD, measures.values, measures.intervals, record, sections)

    def conditions(self, world: World, erased: Sequence[str]) -> Axes:
        """Return the conditions by axis and name."""
        templates, plain = templates_free_of(erased), self.plain(erased)

        def tags(name: str, rng: random.Random) -> list[str]:
            return [fill(t, tag) for tag in world.nouns[name].implicit for t in rng.sample(templates, min(2, len(templates)))]

        def translated(language: str) -> Condition:
            frames = LANGUAGES[language]
            return lambda name, _: [f.format(TRANSLATIONS[name][language]) for f in frames if name in TRANSLATIONS]

        wording: dict[str, Condition] = {
            "plain": plain, "bare": lambda name, _: [name],
            "paraphrase": lambda name, _: [fill(t, name) for t in PARAPHRASES], "synonym": tags,
        }  # fmt: skip
        company = sorted(world.of_role("general"))
        return {
            "Wording": wording, **changes(world.pipe, plain, filler_words(), company, self.n_templates),
            "Languages": {f"language.{language}": translated(language) for language in LANGUAGES},
        }  # fmt: skip

    def plain(self, erased: Sequence[str]) -> Condition:
        """Return the condition of some test sentences as they are."""
        templates = templates_free_of(erased)
        return lambda name, rng: [fill(t, name) for t in rng.sample(templates, min(self.n_templates, len(templates)))]

    def measure(
        self, world: World, eraser: Eraser, name: str, condition: Condition,
        erased: Sequence[str], kept: Sequence[str], against: str = "kept",
    ) -> Sides:  # fmt: skip
        """Let an eraser's gate decide under one condition."""
        hits, misses = (prompts_of(condition, names, f"{self.seed} {name}") for names in (erased, kept))
        return look(lambda texts: world.margins(f"{self.name} {name}", eraser, texts), eraser, hits, misses, against)

    def general(self, world: World, erased: Sequence[str], eraser: Eraser | None) -> dict[str, Sides]:
        """Measure general prompts, as they are and longer, by an eraser that heard of none of their nouns, or the one given."""
        protocol = General(self.n_general, self.n_erased, seed=self.seed, erase=self.erase)
        nouns = protocol.held_out(world, erased)
        cases = protocol.cases(world, nouns, erased)
        made, in_all = eraser or protocol.make(world, erased, nouns).eraser, self.in_all(erased)
        texts = {noun: [case.prompt for case in cases if case.noun == noun] for noun in nouns}

        def said(name: str, rng: random.Random) -> list[str]:
            return texts[name] if name in texts else in_all(name, rng)

        longer = changes(world.pipe, said, filler_words(), (), 0)["Length"]
        conditions = {"general": said, **{f"general.{name}": condition for name, condition in longer.items()}}
        return {name: self.measure(world, made, name, each, erased, nouns, "general") for name, each in conditions.items()}

    def shared(self, world: World, erased: Sequence[str], kept: Sequence[str]) -> Sides:
        """Measure the plain condition with one threshold for all concepts and no other gate."""
        settings = replace(self.erase, calibration="shared", pooled_gate=False, draft_gate=False, picture_gate=False)
        made = world.eraser(f"{self.name} shared", sets_of(world, erased, kept), settings)
        return self.measure(world, made.eraser, "shared", self.plain(erased), erased, kept)

    def leaky(self, world: World, erased: Sequence[str], kept: Sequence[str]) -> Sides:
        """Measure all test sentences with an eraser that was made from the prompts it is measured on."""
        sets = leaky_sets(erased, *(test_prompts(TEMPLATES["test"], names) for names in (erased, kept)))
        made = world.eraser(f"{self.name} leaky", sets, self.erase)
        return self.measure(world, made.eraser, "leaky", self.in_all(erased), erased, kept)

    def by_count(self, world: World, erased: Sequence[str], kept: Sequence[str]) -> dict[str, Sides]:
        """Measure all test sentences with fewer concepts erased."""
        found: dict[str, Sides] = {}
        for count in self.counts:
            names = erased[:count]
            made = world.eraser(f"{self.name} count {count}", sets_of(world, names, kept), self.erase)
            found[f"count{count}"] = self.measure(world, made.eraser, f"count {count}", self.in_all(erased), names, kept)
        return found

    def in_all(self, erased: Sequence[str]) -> Condition:
        """Return the condition of all test sentences."""
        templates = templates_free_of(erased)
        return lambda name, _: [fill(t, name) for t in templates]
