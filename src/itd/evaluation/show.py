"""Grids of pictures before and after, for the pages."""

from __future__ import annotations

from collections.abc import Sequence

from itd import report
from itd.eraser import Eraser
from itd.evaluation.world import Drawn, World


def pair_figures(world: World, before: Drawn, after: Drawn, eraser: Eraser, rows: Sequence[int]) -> tuple[str, ...]:
    """Return figures of some cases: picture before and after, the gate's decision, what the judge sees."""
    if not rows:
        return ()
    seen = [world.see(side) for side in (before, after)]
    checks = eraser.check(world.pipe, [before.cases[i].prompt for i in rows])
    same = before.same_as(after)
    figures = []
    for check, i in zip(checks, rows, strict=True):
        pixels = [side.pixels[i].permute(1, 2, 0).numpy() for side in (before, after)]
        noun = before.cases[i].noun
        said = [(noun if noun in sight.shown[i] else sight.nouns[i], sight.designs[i]) for sight in seen]
        figures.append(report.before_after(pixels[0], pixels[1], check, (said[0], said[1]), same[i]))
    return tuple(figures)


def spread(rows: Sequence[int], n: int) -> list[int]:
    """Return n of the rows at equal distances."""
    if len(rows) <= n:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (n - 1))] for i in range(n)] if n > 1 else [rows[0]]
