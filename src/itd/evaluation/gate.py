"""The gate alone, without pictures: recall and false positives by length, position, company, paraphrase, spelling, language."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from itd.emoji.prompts import filler_words
from itd.eraser import Eraser
from itd.erasing import EraseConfig, calibration_of
from itd.evaluation.identities import choose, sets_of, templates_free_of, test_prompts
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.variants import (
    LANGUAGES,
    PARAPHRASES,
    SPELLINGS,
    TRANSLATIONS,
    at_position,
    beside,
    misspell,
    with_filler,
)  # fmt: skip
from itd.evaluation.world import Made, World, leaky_sets
from itd.metrics.detection import roc
from itd.metrics.intervals import Rate, clustered_rate, conformal_interval
from itd.plots import Line, line_plot
from itd.prompts import fill
from itd.templates import TEMPLATES

LEAD = (
    "The gate decides on prompts about erased and about kept concepts; nothing is drawn. Every condition changes the held-out "
    "prompts in one way, on both sides alike. The false-positive rate is that of kept concepts under the same change."
)
LENGTHS = (4, 8, 16, 32)
DRAWS = 16
"""Of the words around a prompt, until its concept is not cut off."""
POSITIONS = ("first", "middle", "last")


class Probe(NamedTuple):
    """A prompt and the concept that it is about."""

    prompt: str
    concept: str


Condition = Callable[[str, random.Random], list[str]]
"""Gives the prompts of one concept."""


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
    seed: int = 0
    """Of concepts and changes."""
    erase: EraseConfig = field(default_factory=EraseConfig)
    """How the erasers are made."""

    def __post_init__(self) -> None:
        if self.counts and not 1 <= min(self.counts) <= max(self.counts) <= self.n_erased:
            raise ValueError(f"counts must lie between 1 and n_erased = {self.n_erased}, got {self.counts}")

    def quick(self) -> GateAlone:
        """Return the subsample: 10 and 10 concepts, 3 sentences."""
        return GateAlone(10, 3, (1, 10), self.seed, self.erase)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world, on its own erasers or on the one given."""
        world = World(out, self.name, asdict(self), pipe, eraser=eraser)
        erased, kept = choose(world, self.n_erased, self.seed, eraser)
        made = Made(eraser, 0.0, 0) if eraser else world.eraser(self.name, sets_of(world, erased, kept), self.erase)
        measures, rows, curves = Measures(), [], {}
        for name, condition in self.conditions(world, erased, kept).items():
            found = self.measure(world, made.eraser, name, condition, erased, kept)
            if found is not None:
                measures.add_all(name, found.rates)
                rows.append({"condition": name, **found.rates})
                curves[name] = found
        if eraser is None:
            curves["leaky"] = self.leaky(world, erased, kept, measures)
            measures.add_all("", self.by_count(world, erased, kept))
        measures.add_all("", promises(made.eraser))
        head = Section("Conditions", tables=(rows,), plots=tuple(plots(curves)))
        record = {**world.record, "settings": asdict(self), "erased": erased, "kept": kept}
        return Report(self.name, "The gate alone", LEAD, measures.values, measures.intervals, record, (head,))

    def conditions(self, world: World, erased: Sequence[str], kept: Sequence[str]) -> dict[str, Condition]:
        """Return the conditions by name; each gives no prompts for a concept that it does not apply to."""
        templates, words = templates_free_of(erased), filler_words()
        company = sorted(world.of_role("general"))

        def plain(name: str, rng: random.Random) -> list[str]:
            return [fill(t, name) for t in rng.sample(templates, min(self.n_templates, len(templates)))]

        def changed(change: Callable[[str, str, random.Random], str]) -> Condition:
            return lambda name, rng: [change(text, name, rng) for text in plain(name, rng)]

        def tags(name: str, rng: random.Random) -> list[str]:
            return [fill(t, tag) for tag in world.nouns[name].implicit for t in rng.sample(templates, min(2, len(templates)))]

        found: dict[str, Condition] = {"plain": plain, "bare": lambda name, rng: [name]}
        found |= {
            f"length+{n}": lambda name, rng, n=n: [
                longer for text in plain(name, rng) if (longer := lengthened(world.pipe, text, name, words, n, rng))
            ]
            for n in LENGTHS
        }
        found |= {
            f"position.{where}": lambda name, rng, where=where: [
                at_position(name, where, words, rng) for _ in range(self.n_templates)
            ]
            for where in POSITIONS
        }
        found |= {f"nouns.{n}": changed(lambda t, _, r, n=n: beside(t, company, n - 1, r)) for n in (2, 3, 4)}
        found["paraphrase"] = lambda name, rng: [fill(t, name) for t in PARAPHRASES]
        found["synonym"] = tags
        found |= {f"spelling.{kind}": changed(lambda t, c, r, kind=kind: misspell(t, c, kind, r)) for kind in SPELLINGS}
        for language, frames in LANGUAGES.items():
            found[f"language.{language}"] = lambda name, rng, frames=frames, language=language: [
                frame.format(TRANSLATIONS[name][language]) for frame in frames if name in TRANSLATIONS
            ]
        return found

    def measure(
        self, world: World, eraser: Eraser, name: str, condition: Condition, erased: Sequence[str], kept: Sequence[str]
    ) -> Sides | None:
        """Return the gate's rates under one condition; None where it applies to no erased concept."""
        sides = []
        for names in (erased, kept):
            probes = [Probe(text, c) for c in names for text in condition(c, random.Random(f"{self.seed} {name} {c}"))]
            sides.append((probes, world.margins(f"{self.name} {name}", eraser, [probe.prompt for probe in probes])))
        return None if not sides[0][0] else sides_of(*sides)

    def leaky(self, world: World, erased: Sequence[str], kept: Sequence[str], measures: Measures) -> Sides:
        """Measure the plain condition with an eraser that was made from the prompts it is measured on."""
        sets = leaky_sets(erased, *(test_prompts(TEMPLATES["test"], names) for names in (erased, kept)))
        made = world.eraser(f"{self.name} leaky", sets, self.erase)
        templates = templates_free_of(erased)
        found = self.measure(world, made.eraser, "leaky", lambda name, _: [fill(t, name) for t in templates], erased, kept)
        assert found is not None
        measures.add_all("leaky", found.rates)
        return found

    def by_count(self, world: World, erased: Sequence[str], kept: Sequence[str]) -> dict[str, Rate | float]:
        """Return the plain condition's rates with fewer concepts erased."""
        found: dict[str, Rate | float] = {}
        templates = templates_free_of(erased)
        for count in self.counts:
            names = erased[:count]
            made = world.eraser(f"{self.name} count {count}", sets_of(world, names, kept), self.erase)
            sides = self.measure(
                world, made.eraser, f"count {count}", lambda name, _: [fill(t, name) for t in templates], names, kept
            )
            assert sides is not None
            found |= {f"count{count}.{key}": value for key, value in sides.rates.items()}
        return found


def lengthened(pipe: Any, text: str, name: str, words: Sequence[str], n: int, rng: random.Random) -> str | None:
    """Add n words so that the pipeline reads the name: what is cut off, the image model never sees. None where that fails."""
    for _ in range(DRAWS):
        longer = with_filler(text, words, n, rng)
        read = longer[: longer.find(name) + len(name)]
        if len(pipe.tokenizer(read).input_ids) <= pipe.tokenizer.model_max_length:
            return longer
    return None


@dataclass(frozen=True)
class Sides:
    """Margins of target and kept prompts, and the rates that follow. NaN where there is nothing on a side."""

    positives: tuple[float, ...]
    negatives: tuple[float, ...]
    rates: dict[str, Rate | float]


def sides_of(hits: tuple[Sequence[Probe], Sequence[float]], misses: tuple[Sequence[Probe], Sequence[float]]) -> Sides:
    """Return recall and false positives with intervals over concepts, and the area under the curve."""
    rates: dict[str, Rate | float] = {"recall": by_concept(*hits), "fpr_kept": by_concept(*misses)}
    if hits[1] and misses[1]:
        rates["auroc"] = roc(torch.tensor(hits[1], dtype=torch.float64), torch.tensor(misses[1], dtype=torch.float64)).area
    else:
        rates["auroc"] = float("nan")
    return Sides(tuple(hits[1]), tuple(misses[1]), rates)


def by_concept(probes: Sequence[Probe], margins: Sequence[float]) -> Rate:
    groups: dict[str, list[bool]] = {}
    for probe, margin in zip(probes, margins, strict=True):
        groups.setdefault(probe.concept, []).append(margin >= 0)
    return clustered_rate(list(groups.values()))


def promises(eraser: Eraser) -> dict[str, Rate | float]:
    """Return what the calibration says of the threshold: rates there, and the true one's mean and conformal interval."""
    found: dict[str, Rate | float] = {}
    for index, made in enumerate(calibration_of(eraser)):
        prefix = "calibration" if index == 0 else f"calibration{index}"
        n_reached = round(made.false_positive_rate * made.n_negatives)
        bounds = conformal_interval(made.n_negatives, n_reached) if n_reached < made.n_negatives else (0.0, 1.0)
        expected = min((n_reached + 1) / (made.n_negatives + 1), bounds[1])
        found[f"{prefix}.fpr"] = Rate(expected, *bounds, made.n_negatives)
        found |= {
            f"{prefix}.fpr_seen": made.false_positive_rate,
            f"{prefix}.recall": made.recall,
            f"{prefix}.auroc": made.auroc,
        }
    return found


def plots(found: Mapping[str, Sides]) -> Iterable[str]:
    """Return the ROC without and with leaks, and recall and false positives against length."""
    curves = []
    for name, title in (("plain", "leak-free"), ("leaky", "leaky")):
        if name in found and found[name].positives and found[name].negatives:
            curves.append(roc_line(title, found[name].positives, found[name].negatives))
    if curves:
        yield line_plot(curves, "ROC, plain prompts", "false-positive rate", "recall", x_range=(0, 1), y_range=(0, 1))
    rows = [(float(n), found[key].rates) for n, key in ((0, "plain"), *((n, f"length+{n}") for n in LENGTHS)) if key in found]
    lines = [rate_line(name, [(n, rates[name]) for n, rates in rows]) for name in ("recall", "fpr_kept")]
    yield line_plot(lines, "Longer prompts", "words added", "share of prompts", y_range=(0, 1))


def roc_line(name: str, positives: Sequence[float], negatives: Sequence[float]) -> Line:
    curve = roc(torch.tensor(positives, dtype=torch.float64), torch.tensor(negatives, dtype=torch.float64))
    points = [(0.0, 0.0), *zip(curve.false_positive_rate.tolist(), curve.recall.tolist(), strict=True)]
    return Line(f"{name}, area {curve.area:.4f}", points[:: max(1, len(points) // 400)] + points[-1:])


def rate_line(name: str, rows: Sequence[tuple[float, Rate | float]]) -> Line:
    """Return a line with the band of its rates."""
    rates = [(x, value) for x, value in rows if isinstance(value, Rate)]
    return Line(name, [(x, r.value) for x, r in rates], [(r.low, r.high) for _, r in rates])
