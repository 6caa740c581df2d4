from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from itd.evaluation.gate import GateAlone
from itd.evaluation.general import General
from itd.evaluation.identities import Identities
from itd.evaluation.many import Many
from itd.evaluation.minilm import MiniLM
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.styles import Styles
from itd.evaluation.unsafe import Unsafe
from itd.metrics.intervals import NOTHING, Rate, wilson
from itd.plots import Line, line_plot


def made() -> Report:
    measures = Measures()
    measures.add_all("erase50", {"recall": wilson(9, 10), "seconds": 1.5, "unknown": NOTHING})
    plot = line_plot(
        [Line("recall", [(1.0, 0.5), (10.0, 0.9)], [(0.4, 0.6), (0.8, 1.0)])], "Recall", "count", "share", x_log=True
    )
    section = Section(
        "Rates", "What | was found.", ([{"concept": "a|b", "share": wilson(1, 4)}],), (plot,), ("<figure></figure>",)
    )
    return Report("many", "Many", "Lead <b>", measures.values, measures.intervals, {"folder": Path("x")}, (section,))


def test_the_files_are_written_and_the_metrics_are_flat(tmp_path: Path) -> None:
    made().save(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["metrics"] == {"erase50.recall": 0.9, "erase50.seconds": 1.5, "erase50.unknown": None}
    assert content["intervals"]["erase50.recall"]["n"] == 10
    assert content["intervals"]["erase50.recall"]["low"] < 0.9 < content["intervals"]["erase50.recall"]["high"]
    assert content["record"] == {"folder": "x"}
    assert content["versions"]["torch"]


def test_the_page_loads_nothing_from_elsewhere_and_escapes(tmp_path: Path) -> None:
    text = made().save(tmp_path).read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "<svg" in text
    assert "Lead &lt;b&gt;" in text


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    lines = [line for line in made().markdown().splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(widths[:3]) == {3}
    assert set(widths[3:]) == {6}
    assert "a\\|b" in lines[2]


def test_a_measure_is_added_once() -> None:
    measures = Measures()
    measures.add("x", 1.0)
    with pytest.raises(ValueError, match="'x' is there already"):
        measures.add("x", 2.0)


def test_the_summary_shows_intervals_and_dashes() -> None:
    lines = made().summary().splitlines()
    assert lines[0].split() == ["erase50.recall", "0.9", "[0.5958,", "0.9821]"]
    assert lines[2].split() == ["erase50.unknown", "-"]


@pytest.mark.parametrize(
    ("protocol", "changes", "message"),
    [
        (Identities, {"n_seeds": 0}, "n_seeds must be at least 1, got 0"),
        (Identities, {"sizes": (50, -3)}, r"sizes must be at least 1, got \(50, -3\)"),
        (Identities, {"sizes": ()}, r"sizes must be at least 1, got \(\)"),
        (Identities, {"n_seeds": 2, "leaky_seeds": 3}, "leaky_seeds is at most n_seeds = 2, got 3"),
        (General, {"n_prompts": 0}, "n_prompts must be at least 1, got 0"),
        (General, {"caption_share": 7}, "caption_share must be at most 1, got 7"),
        (General, {"caption_share": float("nan")}, "caption_share must be at least 0, got nan"),
        (Many, {"n_kept": 0}, "n_kept must be at least 1, got 0"),
        (Styles, {"designs": ()}, "designs must name what is to be erased; got none"),
        (Styles, {"n_nouns": 0}, "n_nouns must be at least 1, got 0"),
        (Unsafe, {"n_templates": -1}, "n_templates must be at least 1, got -1"),
        (GateAlone, {"n_general": -1}, "n_general must be at least 1, got -1"),
        (MiniLM, {"n_general": 0}, "n_general must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(protocol: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(**changes)


def test_a_rate_without_an_interval_is_shown_without() -> None:
    assert str(Rate(0.25, math.nan, math.nan, 8)) == "0.25"
