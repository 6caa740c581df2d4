"""Erase each design and each pair of designs: style accuracy on erased and kept, nouns inside erased designs, CLIP scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

from itd.emoji.captions import with_article
from itd.emoji.data import DESIGNS
from itd.emoji.prompts import STYLE_TEMPLATES
from itd.eraser import Eraser
from itd.erasing import PRESETS, EraseConfig
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.show import pair_figures, spread
from itd.evaluation.world import DETECTOR, Case, Drawn, Leak, Made, Sets, Sight, World, deal, leak_free_sets, sample
from itd.metrics.intervals import NOTHING, Rate, mean_rate, rate_by, value_of
from itd.plots import Line, line_plot
from itd.prompts import Prompt, PromptSet, check_leaks
from itd.settings import require_at_least

LEAD = (
    "Every design of the embedded world is erased, alone and in pairs. The test sentences and the nouns in them were not seen. "
    "An erased design has gone when the judge sees it no more often than in pictures of the other designs (`chance`)."
)


@dataclass(frozen=True)
class Styles:
    """Erase designs."""

    name: ClassVar[str] = "styles"

    pairs: bool = True
    """Erase each pair too, not only each design."""
    n_nouns: int = 12
    """Nouns per design and test sentence."""
    designs: tuple[str, ...] = DESIGNS
    """Designs that are erased."""
    leaky: bool = True
    """Also erase each design alone with the evaluated prompts in the sets it is made from; the gate only, no pictures."""
    seed: int = 0
    """Of the nouns and the pictures."""
    erase: EraseConfig = field(default_factory=lambda: PRESETS["style"])
    """How the erasers are made."""

    def __post_init__(self) -> None:
        require_at_least(self, n_nouns=1)
        if not self.designs:
            raise ValueError("designs must name what is to be erased; got none")
        unknown = sorted(set(self.designs) - set(DESIGNS))
        if unknown:
            raise ValueError(f"designs must be among {DESIGNS}, got {unknown[0]!r}")

    def quick(self) -> Styles:
        """Return the subsample: two designs, alone, 4 nouns."""
        return Styles(False, 4, self.designs[:2], self.leaky, self.seed, self.erase)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world; a given eraser must erase designs and is measured alone."""
        world = World(out, self.name, asdict(self), pipe, eraser=eraser)
        cases, names = self.cases(world), self.test_nouns(world)
        before = world.draw("unerased", cases)
        seen, clip_before = world.see(before), world.clip_scores(before)
        rows, measures, sections = [], Measures(), []
        for erased in self.subjects(eraser):
            key = "+".join(erased)
            made = Made(eraser, 0.0, 0) if eraser else self.make(world, erased, names, "leak_free")
            after = world.draw(f"{self.name} {key}", cases, made.eraser)
            sights = seen, world.see(after)
            found = style_measures(sights, before, after, erased)
            clip_after = world.clip_scores(after)
            for side, here in sides(before, erased).items():
                found[f"clip_{side}"] = mean_rate(clip_after[here]) if here else NOTHING
                found[f"clip_{side}_unerased"] = mean_rate(clip_before[here]) if here else NOTHING
            if self.leaky and eraser is None and len(erased) == 1:
                found |= self.leaky_gate(world, erased, names, cases)
            measures.add_all(key, found)
            rows.append({"erased": key, **found})
            if len(erased) == 1:
                chosen = [row for part in sides(before, erased).values() for row in spread(part, 6)]
                sections.append(Section(key, "", (), (), pair_figures(world, before, after, made.eraser, chosen)))
        measures.add_all("mean", averages(rows))
        head = Section("Designs", "", (turned(rows),), (pictures_plot(rows),))
        record = {**world.record, **DETECTOR, "settings": asdict(self), "test_nouns": names, "n_pictures": len(cases)}
        return Report(self.name, "Styles", LEAD, measures.values, measures.intervals, record, (head, *sections))

    def subjects(self, eraser: Eraser | None) -> list[tuple[str, ...]]:
        """Return what is erased, run by run.

        Raises:
            ValueError: a given eraser erases no design.
        """
        if eraser is not None:
            erased = tuple(design for design in DESIGNS if design in eraser.names)
            if not erased:
                raise ValueError(f"the eraser erases {', '.join(eraser.names)}; none is a design of {DESIGNS}")
            return [erased]
        pairs = list(combinations(self.designs, 2)) if self.pairs else []
        return [(design,) for design in self.designs] + pairs

    def test_nouns(self, world: World) -> list[str]:
        """Return the nouns of the evaluation, of those that are recognised best; no eraser's prompts name them."""
        safe = world.of_role("identity", "general")
        best = world.best_drawn(safe, min(len(safe), 4 * self.n_nouns))
        return sorted(sample(random.Random(self.seed), best, self.n_nouns))

    def cases(self, world: World) -> list[Case]:
        """Return every design with every test noun in every test sentence, with the same seed in every design."""
        rows = [(frame, noun) for frame in STYLE_TEMPLATES["test"] for noun in self.test_nouns(world)]
        return [
            Case(frame.format(noun=with_article(noun), style=design), 1000 * (1 + self.seed) + i, noun, design)
            for design in DESIGNS
            for i, (frame, noun) in enumerate(rows)
        ]

    def make(self, world: World, erased: Sequence[str], held_out: Sequence[str], leak: Leak) -> Made:
        sets = style_sets(erased, held_out)
        tests = self.test_sets(world, erased)
        if leak == "leak_free":
            for part in tests:
                check_leaks(sets.target + sets.retain + sets.neutral, part, concepts=False)
        else:
            sets = Sets(sets.target + deal(tests[0]), sets.retain + deal(tests[1]), sets.neutral)
        return world.eraser(f"{self.name} {leak} {'+'.join(erased)}", sets, self.erase)

    def test_sets(self, world: World, erased: Sequence[str]) -> tuple[PromptSet, PromptSet]:
        """Return the evaluated prompts of erased and of kept designs."""
        rows = [Prompt(case.prompt, case.design, case.prompt.replace(str(case.design), "{}")) for case in self.cases(world)]
        return PromptSet(tuple(p for p in rows if p.concept in erased)), PromptSet(
            tuple(p for p in rows if p.concept not in erased)
        )

    def leaky_gate(
        self, world: World, erased: Sequence[str], held_out: Sequence[str], cases: Sequence[Case]
    ) -> dict[str, Rate]:
        """Return the gate's rates on the evaluated prompts when they were among those it was made from."""
        made = self.make(world, erased, held_out, "leaky")
        fired = world.fired(f"{self.name} leaky {'+'.join(erased)}", made.eraser, [case.prompt for case in cases])
        found = {}
        for name, wanted in (("recall", True), ("fpr_kept", False)):
            rows = [i for i, case in enumerate(cases) if (case.design in erased) == wanted]
            found[f"leaky_gate_{name}"] = rate_by([str(cases[i].noun) for i in rows], [fired[i] for i in rows])
        return found


def style_sets(erased: Sequence[str], held_out: Sequence[str]) -> Sets:
    """Return the sets to erase designs, without any noun of the evaluation."""
    sets = leak_free_sets(erased, held_out)
    hidden = set(held_out)

    def clean(prompts: PromptSet) -> PromptSet:
        return prompts.filter(lambda p: not any(f" {noun} " in f" {p.text.replace(',', ' ')} " for noun in hidden))

    return Sets(clean(sets.target), clean(sets.retain), sets.neutral)


def sides(drawn: Drawn, erased: Sequence[str]) -> dict[str, list[int]]:
    return {
        "erased": [i for i, case in enumerate(drawn.cases) if case.design in erased],
        "kept": [i for i, case in enumerate(drawn.cases) if case.design not in erased],
    }


def style_measures(seen: tuple[Sight, Sight], before: Drawn, after: Drawn, erased: Sequence[str]) -> dict[str, Rate | float]:
    """Return style accuracy on erased and kept designs, chance, noun accuracy inside erased designs, and the gate's rates."""
    parts, cases = sides(before, erased), before.cases
    same = before.same_as(after)

    def share(rows: Sequence[int], flag: Callable[[int], bool]) -> Rate:
        return rate_by([str(cases[i].noun) for i in rows], map(flag, rows))

    def style(view: int, rows: Sequence[int]) -> Rate:
        return share(rows, lambda i: seen[view].designs[i] == cases[i].design)

    def noun(view: int, rows: Sequence[int]) -> Rate:
        return share(rows, lambda i: cases[i].noun in seen[view].shown[i])

    gone, stay = parts["erased"], parts["kept"]
    # Of one design the chance is how often it is seen in pictures of others; of several, the mean of theirs.
    chances = [share(stay, lambda i, d=design: seen[0].designs[i] == d) for design in erased]
    found: dict[str, Rate | float] = {
        "style_erased": style(1, gone), "style_erased_unerased": style(0, gone),
        "chance": chances[0] if len(chances) == 1 else sum(chance.value for chance in chances) / len(chances),
        "style_kept": style(1, stay), "style_kept_unerased": style(0, stay),
        "noun_in_erased": noun(1, gone), "noun_in_erased_unerased": noun(0, gone),
        "noun_in_kept": noun(1, stay), "noun_in_kept_unerased": noun(0, stay),
        "gate_recall": share(gone, lambda i: after.fired[i]), "gate_fpr_kept": share(stay, lambda i: after.fired[i]),
        "bit_identical_kept": share(stay, lambda i: same[i]),
    }  # fmt: skip
    unerased = style(0, stay).value
    return found | {"style_kept_relative": style(1, stay).value / unerased if unerased else float("nan")}


def averages(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of every measure over the single designs."""
    single = [row for row in rows if "+" not in row["erased"]] or rows
    return {key: sum(value_of(row[key]) for row in single) / len(single) for key in single[0] if key != "erased"}


def turned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the table with designs as columns, which are fewer than measures; pairs as rows would not fit a page."""
    single = [row for row in rows if "+" not in row["erased"]] or rows[:6]
    keys = [key for key in single[0] if key != "erased"]
    return [{"measure": key, **{row["erased"]: value_of(row[key]) for row in single}} for key in keys]


def pictures_plot(rows: Sequence[dict[str, Any]]) -> str:
    names = ("style_erased_unerased", "style_erased", "chance", "style_kept_unerased", "style_kept")
    lines = [Line(name, [(float(i), value_of(row[name])) for i, row in enumerate(rows)]) for name in names]
    return line_plot(lines, "Designs and pairs", "run (designs first)", "share of pictures", y_range=(0, 1))
