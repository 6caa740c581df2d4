"""What a gate says of prompts that are changed in one way: the changes, both sides' margins and rates, tables and curves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from itd.eraser import Eraser
from itd.erasing import calibration_of
from itd.evaluation.results import Section
from itd.evaluation.variants import SPELLINGS, Spelling, at_position, beside, misspell, with_filler
from itd.gate import Calibration
from itd.metrics.detection import Roc, clustered_area, roc
from itd.metrics.intervals import NOTHING, Rate, clustered_rate, conformal_interval
from itd.plots import Line, line_plot

LENGTHS = (4, 8, 16, 32)
DRAWS = 16
"""Of the words around a prompt, until its concept is not cut off."""
POSITIONS = ("first", "middle", "last")
COMPANIES = (2, 3, 4)
"""Concepts in a prompt."""

Condition = Callable[[str, random.Random], list[str]]
"""Gives the prompts of one concept; none where it does not apply to it."""
Axes = dict[str, dict[str, Condition]]
"""Conditions by axis and name; one of them is `plain`."""
MarginsOf = Callable[[list[str]], list[float]]
"""Gives score minus threshold of every prompt; at 0 and above the gate fires."""


def changes(pipe: Any, plain: Condition, words: Sequence[str], company: Sequence[str], n_placed: int) -> Axes:
    """Return the changes that any name can have, by axis and condition.

    plain: gives the sentences that are changed; words: put around them; company: names put beside; n_placed: prompts per
    position.
    """

    def changed(change: Callable[[str, str, random.Random], str | None]) -> Condition:
        return lambda name, rng: [text for each in plain(name, rng) if (text := change(each, name, rng))]

    def placed(where: str) -> Condition:
        return lambda name, rng: [at_position(name, where, words, rng) for _ in range(n_placed)]

    def longer(n: int) -> Condition:
        return changed(lambda text, name, rng: lengthened(pipe, text, name, words, n, rng))

    def accompanied(n: int) -> Condition:
        return changed(lambda text, name, rng: beside(text, [other for other in company if other != name], n - 1, rng))

    def misspelt(kind: Spelling) -> Condition:
        return changed(lambda text, name, rng: misspell(text, name, kind, rng))

    return {
        "Length": {f"length+{n}": longer(n) for n in LENGTHS},
        "Position": {f"position.{where}": placed(where) for where in POSITIONS},
        "Concepts in a prompt": {f"nouns.{n}": accompanied(n) for n in COMPANIES},
        "Spelling": {f"spelling.{kind}": misspelt(kind) for kind in SPELLINGS},
    }


def lengthened(pipe: Any, text: str, name: str, words: Sequence[str], n: int, rng: random.Random) -> str | None:
    """Add n words so that the pipeline reads the name: what is cut off, the image model never sees. None where that fails."""
    for _ in range(DRAWS):
        longer = with_filler(text, words, n, rng)
        read = longer[: longer.find(name) + len(name)]
        if len(pipe.tokenizer(read).input_ids) <= pipe.tokenizer.model_max_length:
            return longer
    return None


def prompts_of(condition: Condition, names: Iterable[str], seed: str) -> dict[str, list[str]]:
    """Return the prompts of every concept; those of one are the same whatever the others are."""
    return {name: condition(name, random.Random(f"{seed} {name}")) for name in names}


@dataclass(frozen=True)
class Sides:
    """Margins of prompts that must fire and of prompts that must pass, concept by concept, and what follows from them."""

    positives: Sequence[Sequence[float]]
    negatives: Sequence[Sequence[float]]
    promised: Rate
    """What the calibration says of the false-positive rate, on prompts like those that it saw."""
    against: str = "kept"
    """What must pass: it names the measured false-positive rate."""

    @cached_property
    def rates(self) -> dict[str, Rate]:
        """Recall, false positives as measured and as promised, and the area under the curve; intervals over concepts."""
        return {
            "recall": share_fired(self.positives), f"fpr_{self.against}": share_fired(self.negatives),
            "fpr_promised": self.promised, "auroc": clustered_area(self.positives, self.negatives),
        }  # fmt: skip

    @cached_property
    def curve(self) -> Roc | None:
        """The ROC; None where there is nothing on a side."""
        flat = [[margin for group in side for margin in group] for side in (self.positives, self.negatives)]
        return roc(*(torch.tensor(margins, dtype=torch.float64) for margins in flat)) if all(flat) else None


def share_fired(groups: Sequence[Sequence[float]]) -> Rate:
    return clustered_rate([[margin >= 0 for margin in group] for group in groups])


def look(
    margins_of: MarginsOf,
    eraser: Eraser,
    positives: Mapping[str, list[str]],
    negatives: Mapping[str, list[str]],
    against: str = "kept",
) -> Sides:
    """Return both sides' margins; prompts are given by concept."""
    return Sides(by_concept(margins_of, positives), by_concept(margins_of, negatives), promised(eraser), against)


def by_concept(margins_of: MarginsOf, prompts: Mapping[str, list[str]]) -> list[list[float]]:
    found = iter(margins_of([text for texts in prompts.values() for text in texts]))
    return [[next(found) for _ in texts] for texts in prompts.values()]


def along_axes(axes: Axes, measure: Callable[[str, Condition], Sides]) -> dict[str, dict[str, Sides]]:
    """Measure all conditions; the plain one, from which they are changed, stands first on every axis."""
    found = {name: measure(name, condition) for conditions in axes.values() for name, condition in conditions.items()}
    return {axis: {name: found[name] for name in dict.fromkeys(("plain", *conditions))} for axis, conditions in axes.items()}


# What the calibration promises


def promised(eraser: Eraser) -> Rate:
    """Return the true false-positive rate that an eraser was calibrated to; nothing where `is_conformal` does not hold."""
    return promise_of(calibration_of(eraser)[0]) if is_conformal(eraser) else NOTHING


def is_conformal(eraser: Eraser) -> bool:
    """Tell whether an eraser decides by one threshold, put at a false-positive rate of one set of prompts, and by nothing else.

    Only then its true rate follows from the size of that set. Where every concept has a threshold of its own, their errors add
    up, and so do those of several gates.
    """
    if len(eraser.records) != 1 or eraser.more_gates:
        return False
    config = eraser.records[0]["config"]
    is_one = config.get("calibration") == "shared" or config["score"] != "evidence"
    return is_one and config["fpr"] is not None


def promise_of(made: Calibration) -> Rate:
    """Return the mean and the conformal interval of a threshold's true false-positive rate, over calibration sets."""
    n_reached = round(made.false_positive_rate * made.n_negatives)
    low, high = conformal_interval(made.n_negatives, n_reached) if n_reached < made.n_negatives else (0.0, 1.0)
    return Rate(min((n_reached + 1) / (made.n_negatives + 1), high), low, high, made.n_negatives)


def promises(eraser: Eraser) -> dict[str, Rate | float]:
    """Return what the calibration says of the first gate's threshold: rates there, and the true false-positive rate."""
    found: dict[str, Rate | float] = {}
    for index, made in enumerate(calibration_of(eraser)):
        prefix = "calibration" if index == 0 else f"calibration{index}"
        found |= {
            f"{prefix}.fpr_seen": made.false_positive_rate, f"{prefix}.recall": made.recall, f"{prefix}.auroc": made.auroc,
        }  # fmt: skip
    return found | ({"calibration.fpr": promised(eraser)} if is_conformal(eraser) else {})


# Page


def axis_section(title: str, found: Mapping[str, Sides], text: str = "") -> Section:
    """Return an axis' rates in a table and its curves in a plot; where it is length, also rates against it."""
    rows = [{"condition": name, **sides.rates} for name, sides in found.items()]
    return Section(title, text, (rows,), tuple(axis_plots(title, found)))


def axis_plots(title: str, found: Mapping[str, Sides]) -> Iterator[str]:
    lines = [curve_line(name, sides.curve) for name, sides in found.items() if sides.curve is not None]
    if lines:
        yield line_plot(lines, f"ROC, {title}", "false-positive rate", "recall", x_range=(0, 1), y_range=(0, 1))
    by_length = [(n, found[name].rates) for n, name in ((0, "plain"), *((n, f"length+{n}") for n in LENGTHS)) if name in found]
    if len(by_length) > 1:
        lines = [rate_line(key, [(n, rates[key]) for n, rates in by_length]) for key in ("recall", "fpr_kept")]
        yield line_plot(lines, "Longer prompts", "words added", "share of prompts", y_range=(0, 1))


def curve_line(name: str, curve: Roc) -> Line:
    return Line(f"{name}, area {curve.area:.4f}", curve.points())


def rate_line(name: str, rows: Sequence[tuple[float, Rate]]) -> Line:
    """Return a line with the band of its rates."""
    return Line(name, [(x, rate.value) for x, rate in rows], [(rate.low, rate.high) for _, rate in rows])
