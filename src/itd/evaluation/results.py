"""The result of a protocol: flat metrics with intervals, the full record, and pages in JSON, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itd import report
from itd.artifacts import versions
from itd.evaluation.ledger import plain_json, write_json
from itd.metrics.intervals import Rate, value_of

Rows = Sequence[Mapping[str, Any]]


class Measures:
    """Numbers under flat names, with their intervals where they have one."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.intervals: dict[str, Rate] = {}

    def add(self, name: str, value: Rate | float) -> None:
        """Keep a number.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.values:
            raise ValueError(f"the measure {name!r} is there already")
        self.values[name] = value_of(value)
        if isinstance(value, Rate):
            self.intervals[name] = value

    def add_all(self, prefix: str, values: Mapping[str, Rate | float]) -> None:
        for name, value in values.items():
            self.add(f"{prefix}.{name}" if prefix else name, value)


@dataclass(frozen=True)
class Section:
    """A part of the page. `plots` and `figures` are HTML; Markdown leaves them to the HTML page."""

    title: str
    text: str = ""
    tables: tuple[Rows, ...] = ()
    plots: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a protocol found. `metrics`: flat; `intervals`: of those that have one, by the same names; `record`: the rest."""

    protocol: str
    title: str
    lead: str
    metrics: dict[str, float]
    intervals: dict[str, Rate] = field(default_factory=dict[str, Rate])
    record: dict[str, Any] = field(default_factory=dict[str, Any])
    sections: tuple[Section, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what could not be measured is null."""
        intervals = {name: {"low": rate.low, "high": rate.high, "n": rate.n} for name, rate in self.intervals.items()}
        return plain_json({
            "protocol": self.protocol, "metrics": self.metrics, "intervals": intervals, "record": self.record,
            "versions": versions(),
        })  # fmt: skip

    def save(self, out: str | Path) -> Path:
        """Write `report.json`, `report.md` and `report.html` into a folder; return the page."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", self.to_dict())
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        page = folder / "report.html"
        page.write_text(self.html(), encoding="utf-8")
        return page

    def markdown(self) -> str:
        return "\n".join([f"# {self.title}", "", self.lead, "", *self.markdown_lines()]).rstrip() + "\n"

    def markdown_lines(self) -> Iterator[str]:
        for section in self.sections:
            yield from (f"## {section.title}", "")
            if section.text:
                yield from (section.text, "")
            for rows in section.tables:
                yield from (*markdown_table(rows), "")
        yield from ("## All measures", "", *markdown_table(self.measure_rows()), "")

    def html(self) -> str:
        parts = [html_section(section) for section in self.sections]
        return report.page(self.title, self.lead, [*parts, report.section("All measures", report.table(self.measure_rows()))])

    def measure_rows(self) -> list[dict[str, Any]]:
        """Return one row per measure, with its interval."""
        rows = []
        for name, value in self.metrics.items():
            rate = self.intervals.get(name)
            low, high, n = ("", "", "") if rate is None else (number(rate.low), number(rate.high), rate.n)
            rows.append({"measure": name, "value": number(value), "low": low, "high": high, "n": n})
        return rows

    def summary(self) -> str:
        """Return the measures as lines for a terminal."""
        width = max((len(name) for name in self.metrics), default=0)
        return "\n".join(
            f"{name:<{width}}  {self.intervals.get(name) or number(value)}" for name, value in self.metrics.items()
        )


def number(value: float) -> str:
    """Write a number with four digits; a dash where nothing was measured."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def text_of(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def markdown_table(rows: Rows) -> list[str]:
    """Return a table with one row per mapping."""
    if not rows:
        return ["(nothing)"]
    head = [str(key) for key in rows[0]]
    body = [[text_of(row.get(key, "")).replace("|", "\\|").replace("\n", " ") for key in head] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def html_section(section: Section) -> str:
    """Return a section of the page: text, tables, plots side by side, figures in a grid."""
    parts = [report.paragraph(section.text)] if section.text else []
    parts += [report.table([{key: text_of(value) for key, value in row.items()} for row in rows]) for rows in section.tables]
    if section.plots:
        parts.append(f'<div class="plots">{"".join(section.plots)}</div>')
    if section.figures:
        parts.append(report.grid(section.figures))
    return report.section(section.title, *parts)
