"""How everything grows with the number of erased concepts: accuracy, gate, time, size."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from itd.emoji.captions import CaptionSource
from itd.emoji.prompts import filler_words
from itd.eraser import Eraser
from itd.erasing import EraseConfig
from itd.evaluation.general import comparisons, distances
from itd.evaluation.identities import Outcome, measure, sets_of, templates_free_of
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.show import pair_figures, spread
from itd.evaluation.world import DETECTOR, Case, Made, World, sample
from itd.metrics.intervals import Rate, rate, rate_by, value_of
from itd.plots import Line, line_plot
from itd.prompts import fill
from itd.settings import require_at_least

LEAD = (
    "The erased concepts of each count contain those of the smaller ones. The kept ones are the same at every count, and "
    "nothing about them was seen. Where many are erased, a sample of them is drawn; the gate is measured on all of them."
)
SHOWN = (
    "acc_erased", "acc_kept", "harmonic_mean", "harmonic_mean_relative",
    "gate_recall_all", "gate_fpr_kept_all", "gate_fpr_captions",
)  # fmt: skip
KEPT = (
    "clip_score_unerased_kept", "clip_score_kept", "perceptual_distance_kept",
    "fid_judge_kept_unerased", "fid_clip_kept_unerased", "kid_judge_kept_unerased", "kid_clip_kept_unerased",
)  # fmt: skip
COSTS = ("seconds_to_erase", "eraser_kb", "check_ms")


@dataclass(frozen=True)
class Many:
    """Erase more and more concepts."""

    name: ClassVar[str] = "many"

    counts: tuple[int, ...] = (1, 5, 10, 50, 100, 200)
    """Erased concepts, run by run."""
    n_kept: int = 50
    """Kept concepts."""
    n_drawn: int = 50
    """Erased concepts that are drawn."""
    n_templates: int = 5
    """Held-out sentences per concept."""
    n_seeds: int = 1
    """Pictures per sentence."""
    n_checked: int = 200
    """Prompts over which the time of the gate is taken."""
    n_captions: int = 1000
    """Free captions of kept concepts, in the manner of users, on which the gate is measured too."""
    drawn_only: bool = True
    """Draw a concept in the sentences in which the unerased pipeline draws it, by a picture of another seed."""
    seed: int = 0
    """Of concepts, sentences and pictures."""
    erase: EraseConfig = field(default_factory=EraseConfig)
    """How the erasers are made."""

    def __post_init__(self) -> None:
        require_at_least(self, counts=1, n_kept=1, n_drawn=1, n_templates=1, n_seeds=1, n_checked=1, n_captions=1)

    def quick(self) -> Many:
        """Return the subsample: 1, 10 and 50 concepts; 10 of them and 10 kept are drawn, in 2 sentences."""
        return replace(self, counts=(1, 10, 50), n_kept=10, n_drawn=10, n_templates=2, n_seeds=1, n_checked=50, n_captions=200)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world.

        Raises:
            ValueError: an eraser is given, or the world has fewer concepts.
        """
        if eraser is not None:
            raise ValueError("the protocol 'many' makes an eraser for every count; leave the eraser out")
        world = World(out, self.name, asdict(self), pipe)
        erased, kept = self.concepts(world)
        templates = templates_free_of(erased)
        measures, sections, rows, kept_rows, damage = Measures(), [], [], [], list[dict[str, Any]]()
        samples = {count: sample(random.Random(self.seed), erased[:count], self.n_drawn) for count in self.counts}
        every = dict.fromkeys(name for names in (*samples.values(), kept) for name in names)
        sentences = world.sentences(tuple(every), templates, self.drawn_only)
        for count in self.counts:
            names, drawn = erased[:count], samples[count]
            made = world.eraser(f"{self.name} {count}", sets_of(world, names, kept), self.erase)
            cases = {name: self.cases_of(name, sentences[name]) for name in (*drawn, *kept)}
            result = measure(world, made, f"{self.name} {count}", drawn, kept, cases)
            found = result.measures | self.gate(world, made, count, names, kept, templates) | kept_pictures(world, result)
            found |= {"eraser_kb": made.n_bytes / 1024}
            measures.add_all(f"n{count}", found)
            rows.append({"erased": count, **{name: found[name] for name in (*SHOWN, *COSTS)}})
            kept_rows.append({"erased": count, **{name: found[name] for name in KEPT}})
            damage += [{"concepts erased": count, **row} for row in result.damage]
            chosen = spread(result.erased, 6) + spread(result.kept, 6)
            pictures = pair_figures(world, result.before, result.after, made.eraser, chosen)
            sections.append(Section(f"{count} erased", figures=pictures))
        head = Section("Against the count", tables=(rows, kept_rows, damage), plots=(*plots(rows),))
        record = {**world.record, **DETECTOR, "settings": asdict(self), "erased": erased, "kept": kept}
        return Report(self.name, "Many concepts", LEAD, measures.values, measures.intervals, record, (head, *sections))

    def concepts(self, world: World) -> tuple[list[str], list[str]]:
        """Return what is erased, in order, and what is kept: identities first, then other nouns, the best drawn of them.

        Raises:
            ValueError: the world has fewer.
        """
        most = max(self.counts)
        identities = world.of_role("identity")
        pool = world.best_drawn(identities, len(identities))
        pool += world.best_drawn(world.of_role("general"), max(0, most + self.n_kept - len(pool)))
        rng = random.Random(self.seed)
        kept = sorted(rng.sample(pool[: most + self.n_kept], self.n_kept))
        erased = [name for name in pool if name not in set(kept)][:most]
        rng.shuffle(erased)
        return erased, kept

    def cases_of(self, name: str, templates: Sequence[str]) -> list[Case]:
        chosen = sample(random.Random(f"{self.seed} {name}"), templates, self.n_templates)
        return [Case(fill(t, name), 7000 + s, name) for t in chosen for s in range(self.n_seeds)]

    def gate(
        self, world: World, made: Made, count: int, erased: Sequence[str], kept: Sequence[str], templates: Sequence[str]
    ) -> dict[str, Rate | float]:
        """Return the gate's rates on every concept in every held-out sentence, and its time per prompt."""
        source = CaptionSource([world.nouns[name] for name in kept], filler_words())

        def captions(seed: str, n: int) -> list[str]:
            rng = random.Random(seed)
            return [source.single(i % len(kept), None, None, rng) for i in range(n)]

        def fired(side: str, names: Sequence[str]) -> Rate:
            prompts = [fill(t, name) for name in names for t in templates]
            flags = world.fired(f"{self.name} {count} {side}", made.eraser, prompts)
            return rate_by([name for name in names for _ in templates], flags)

        hits, misses = fired("erased", erased), fired("kept", kept)
        general = rate(world.fired(f"{self.name} {count} captions", made.eraser, captions(f"{self.seed}", self.n_captions)))

        def clock() -> float:
            # New captions every time: what was checked before may be remembered.
            prompts = [f"{text} {count} {i}" for i, text in enumerate(captions(f"{self.seed} {count}", self.n_checked))]
            began = time.monotonic()
            made.eraser.check(world.pipe, prompts)
            return 1000 * (time.monotonic() - began) / len(prompts)

        return {
            "gate_recall_all": hits,
            "gate_fpr_kept_all": misses,
            "gate_fpr_captions": general,
            "check_ms": world.ledger.cell(f"time {count}", clock),
        }


def kept_pictures(world: World, result: Outcome) -> dict[str, Rate | float]:
    """Return what erasing did to pictures of kept concepts: CLIP score, perceptual distance, FID and KID to the unerased."""
    before, after = result.before.part(result.kept), result.after.part(result.kept)
    found = comparisons(world, before, after)
    named = ("clip_score_unerased", "clip_score", "perceptual_distance")
    return {f"{name}_kept": found[name] for name in named} | distances(world, "kept_unerased", after, before)


def plots(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return quality, and costs in units of their largest, against the count."""

    def lines(names: Sequence[str], relative: bool) -> list[Line]:
        top = {name: max(value_of(row[name]) for row in rows) or 1.0 if relative else 1.0 for name in names}
        named = {name: f"{name} (1 = {top[name]:.3g})" if relative else name for name in names}
        return [Line(named[n], [(float(row["erased"]), value_of(row[n]) / top[n]) for row in rows]) for n in names]

    options: dict[str, Any] = {"x_log": True, "y_range": (0, 1)}
    return [
        line_plot(lines(SHOWN, False), "Quality", "erased concepts", "share", **options),
        line_plot(lines(COSTS, True), "Cost", "erased concepts", "share of the largest", **options),
    ]
