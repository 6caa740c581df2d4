from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import activations as made
from benchmarks import training
from benchmarks.activations import draw
from benchmarks.peers.problem import Problem, import_without_init
from benchmarks.training import SYSTEMS, Result, TrainingBenchmark, comparison, default_steps, groups, run_cell, table

PAPER = Problem("", d_model=768, n_latents=2**19, k=64, tokens=512, n_steps=6, threads=2)


def test_systems_that_fit_together_are_measured_together() -> None:
    packed, left_out = groups(tuple(SYSTEMS), replace(PAPER, n_latents=2**15), 22 * 10**9)
    assert packed == [list(SYSTEMS)]
    assert left_out == {}


def test_systems_that_do_not_fit_together_are_measured_in_groups_with_the_multiplication_in_each() -> None:
    available = 22 * 10**9
    packed, left_out = groups(tuple(SYSTEMS), PAPER, available)
    assert len(packed) > 1
    assert all("gemm" in group for group in packed)
    for group in packed:
        assert sum(SYSTEMS[name].n_bytes(PAPER) for name in group) <= available
    assert {name for group in packed for name in group} | set(left_out) == set(SYSTEMS)
    assert "does not fit: needs about" in left_out["overcomplete"]
    assert any("itd" in group for group in packed)


def test_without_memory_nothing_but_the_multiplication_is_left() -> None:
    packed, left_out = groups(("gemm", "itd", "naive"), PAPER, 3 * 10**9)
    assert packed == [["gemm"]]
    assert set(left_out) == {"itd", "naive"}


def test_smaller_cells_take_more_steps() -> None:
    assert [default_steps(2**n) for n in (15, 17, 19, 22)] == [60, 16, 6, 6]


RESULTS = [
    Result("itd", 1024, 64, seconds=0.5, tokens_per_second=128.0, peak_rss_gb=1.0, fvu=0.1, gemm_share=0.8, n_steps=6),
    Result("naive", 1024, 64, seconds=5.0, tokens_per_second=12.8, peak_rss_gb=4.0, fvu=0.2, n_steps=6),
    Result("sae-lens", 1024, 64, seconds=2.0, tokens_per_second=32.0, peak_rss_gb=2.0, fvu=0.2, n_steps=6),
    Result("eai-sparsify", 1024, 64, seconds=1.5, tokens_per_second=42.7, peak_rss_gb=2.5, fvu=0.125, n_steps=6),
    Result("overcomplete", 1024, 64, note="does not fit: needs about 40.0 GB"),
]


def test_the_comparison_is_with_the_best_of_each_measure() -> None:
    assert comparison(RESULTS).splitlines()[-1] == "| 1024 | 64 | 10.0 | 3.0 | 50% | 0.800 |"


def test_the_table_says_what_did_not_fit() -> None:
    lines = table(RESULTS).splitlines()
    assert len(lines) == 2 + len(RESULTS)
    assert "does not fit: needs about 40.0 GB" in lines[-1]
    assert "80%" in lines[2]


def test_synthetic_activations_are_the_same_every_time_and_of_few_directions() -> None:
    x = draw(16, 300, n_directions=40, n_active=3)
    assert torch.equal(x, draw(16, 300, n_directions=40, n_active=3))
    assert not torch.equal(x, draw(16, 300, n_directions=40, n_active=3, seed=1))


def test_unknown_systems_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown systems \\['theirs'\\]; there are gemm, itd"):
        TrainingBenchmark(systems=("theirs",))


def test_a_package_is_imported_without_its_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "needs_the_moon"
    package.mkdir()
    (package / "__init__.py").write_text("import the_moon")
    (package / "part.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_without_init("needs_the_moon", "part").answer == 42
    with pytest.raises(ImportError, match="not_there is not installed"):
        import_without_init("not_there", "part")
    del sys.modules["needs_the_moon"]


def test_a_cell_measures_every_system_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "FOLDER", tmp_path)
    monkeypatch.setattr(training, "LOGS", tmp_path)
    monkeypatch.setattr(training, "N_HELD", 64)
    arguments = TrainingBenchmark(systems=("gemm", "itd", "naive"), d_model=16, k=4, steps=4, threads=1)
    found = run_cell(arguments, n_latents=256, tokens=32)
    assert [result.system for result in found] == ["gemm", "itd", "naive"]
    for result in found:
        fields = json.loads(json.dumps(asdict(result)))
        names = {"system", "n_latents", "tokens", "seconds", "tokens_per_second", "peak_rss_gb", "fvu"}
        assert names <= set(fields)
        assert fields["n_steps"] == 4
        assert fields["note"] == ""
        assert fields["seconds"] > 0
        assert fields["activations"] == "synthetic"
        assert (fields["fvu"] is None) == (result.system == "gemm")


def test_a_system_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "FOLDER", tmp_path)
    monkeypatch.setattr(training, "LOGS", tmp_path)
    monkeypatch.setattr(training, "N_HELD", 64)
    monkeypatch.setitem(SYSTEMS, "naive", replace(SYSTEMS["naive"], module="no_such_module"))
    arguments = TrainingBenchmark(systems=("gemm", "naive"), d_model=16, k=4, steps=3, threads=1)
    gemm, broken = run_cell(arguments, n_latents=256, tokens=32)
    assert gemm.seconds is not None
    assert broken.seconds is None
    assert "naive.log" in broken.note
    assert "no_such_module" in (tmp_path / "naive.log").read_text()
