from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from itd.plots import Axis, Line, line_plot, nice_step


def test_an_axis_lays_its_ends_on_its_pixels() -> None:
    for log in (False, True):
        axis = Axis(1, 100, 50, 450, log)
        assert (axis.place(1), axis.place(100)) == (50, 450)
    assert Axis(1, 100, 50, 450, True).place(10) == pytest.approx(250)
    assert Axis(0, 1, 0, 10).place(7) == 10


def test_ticks_lie_inside_and_are_round() -> None:
    ticks = Axis(0.03, 0.97, 0, 1).ticks()
    assert ticks == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Axis(1, 200, 0, 1, True).ticks() == [1, 10, 100]
    assert [nice_step(span) for span in (1, 7, 100, 0.05)] == pytest.approx([0.2, 2, 20, 0.01])


def test_a_plot_is_xml_with_its_names_escaped_and_a_point_for_each_value() -> None:
    lines = [Line("a < b", [(0, 0), (1, 0.5), (2, math.nan)]), Line("c", [(0, 1), (2, 1)], [(0.9, 1), (0.8, 1)])]
    text = line_plot(lines, "T & t", "x", "y")
    root = ElementTree.fromstring(text)
    assert len(root.findall("polyline")) == 2
    assert len(root.findall("polygon")) == 1
    assert len(root.findall("circle")) == 4
    assert "a &lt; b" in text
    assert "nan" not in text


def test_points_that_a_logarithm_does_not_have_are_left_out() -> None:
    text = line_plot([Line("a", [(0, 1), (1, 1), (10, 1)])], "t", "x", "y", x_log=True)
    assert len(re.findall("<circle", text)) == 2


def test_an_empty_plot_and_a_short_band_are_refused() -> None:
    with pytest.raises(ValueError, match="no points"):
        line_plot([Line("a", [])], "t", "x", "y")
    with pytest.raises(ValueError, match="needs 2 pairs, got 1"):
        Line("a", [(0, 0), (1, 1)], [(0, 1)])
