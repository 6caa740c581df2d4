"""Plots as SVG text, which a page carries in itself: lines with bands, on linear or logarithmic axes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46
COLOURS = ("#2c5fb3", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#0e7490", "#6b7280", "#d35400")


@dataclass(frozen=True)
class Line:
    """One line of a plot: points from left to right and, where they are given, a band of (low, high) around them."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        if self.band and len(self.band) != len(self.points):
            raise ValueError(f"the band of {self.name!r} needs {len(self.points)} pairs, got {len(self.band)}")


@dataclass(frozen=True)
class Axis:
    """A range of values laid on pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; values outside the range stop at its ends."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (min(at, high) - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            return [value for value in powers if self.low * 0.999 <= value <= self.high * 1.001] or [self.low, self.high]
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [first * step + i * step for i in range(int((self.high - first * step) / step + 1e-9) + 1)]


def nice_step(span: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that cuts the span into about five."""
    raw = span / 5
    power = 10 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def range_of(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Return the range that an axis has to show; a single value gets room on both sides."""
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not usable:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(usable), max(usable)
    if low < high:
        return low, high
    return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)


def line_plot(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    *,
    x_log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Return a plot as an SVG element with lines, bands, axes and a legend; points that are not finite are left out.

    Raises:
        ValueError: no line with a point.
    """
    shown = [drawable(line, x_log) for line in lines]
    if not any(line.points for line in shown):
        raise ValueError(f"the plot {title!r} has no points")
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points] + [y for line in shown for pair in line.band for y in pair]
    x_axis = Axis(*(x_range or range_of(xs, x_log)), LEFT, WIDTH - RIGHT, x_log)
    y_axis = Axis(*(y_range or range_of(ys, False)), HEIGHT - BOTTOM, TOP)
    parts = [frame(x_axis, y_axis, title, x_label, y_label)]
    for line, colour in zip(shown, COLOURS * (1 + len(shown) // len(COLOURS)), strict=False):
        parts.append(draw_line(line, colour, x_axis, y_axis))
    if len(shown) > 1:
        parts.append(legend(shown))
    label = html.escape(title)
    return f'<svg class="plot" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def drawable(line: Line, x_log: bool) -> Line:
    keep = [i for i, (x, y) in enumerate(line.points) if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_log)]
    return Line(line.name, [line.points[i] for i in keep], [line.band[i] for i in keep] if line.band else ())


def frame(x_axis: Axis, y_axis: Axis, title: str, x_label: str, y_label: str) -> str:
    """Return axes with ticks and labels."""
    parts = [f'<text x="{LEFT}" y="18" class="title">{html.escape(title)}</text>']
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="tick"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="tick"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>')
    return "".join(parts)


def draw_line(line: Line, colour: str, x_axis: Axis, y_axis: Axis) -> str:
    """Return a band, a line through the points and, where they are few, the points."""
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    parts = []
    if line.band:
        lows = [(x, y_axis.place(low)) for (x, _), (low, _) in zip(places, line.band, strict=True)]
        highs = [(x, y_axis.place(high)) for (x, _), (_, high) in zip(places, line.band, strict=True)]
        parts.append(f'<polygon points="{path(lows + highs[::-1])}" fill="{colour}" opacity="0.15"/>')
    parts.append(f'<polyline points="{path(places)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    if len(places) <= 20:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places]
    return "".join(parts)


def path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def legend(lines: Sequence[Line]) -> str:
    """Return the names of the lines in their colours, in the lower right corner."""
    parts = []
    for index, line in enumerate(lines):
        y = HEIGHT - BOTTOM - 8 - 14 * (len(lines) - 1 - index)
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<text x="{WIDTH - RIGHT - 6}" y="{y}" text-anchor="end" fill="{colour}">{html.escape(line.name)}</text>')
    return "".join(parts)
