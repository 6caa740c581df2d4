"""`itd evaluate`, run in this process on the stand-in world and a tiny pipeline."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import build_pipeline

from itd import Eraser
from itd.cli import main
from itd.evaluation import PROTOCOLS, world

pytestmark = pytest.mark.usefixtures("tiny_world")


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """Take off the handler that `main` puts on, which writes to this test's stderr."""
    logger = logging.getLogger("itd")
    handlers = list(logger.handlers)
    yield
    logger.handlers = handlers


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_protocol_is_one_command_and_its_config_runs_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("itd.evaluation.general.General.quick", lambda self: replace(self, n_prompts=6))
    out = tmp_path / "out"
    assert main(["evaluate", "general", "--out", str(out), "--quick", "--seed", "3", "--set", "n_erased=2"]) == 0
    printed = capsys.readouterr().out
    assert "gate_fires" in printed
    assert printed.splitlines()[-1] == f"page: {out / 'report.html'}"
    first = json.loads((out / "report.json").read_text())
    assert first["record"]["quick"]
    assert "quick run" in (out / "report.md").read_text()
    assert {name: first["record"]["settings"][name] for name in ("seed", "n_prompts", "n_erased")} == {
        "seed": 3, "n_prompts": 6, "n_erased": 2,
    }  # fmt: skip
    (out / "report.json").unlink()

    def refuse(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(world.World, "draw_chunk", refuse)
    assert main(["evaluate", "--config", str(out / "config.json")]) == 0
    assert json.loads((out / "report.json").read_text())["metrics"] == first["metrics"]


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(world.World, "draw", stop)
    assert main(["evaluate", "styles", "--out", str(tmp_path / "out"), "--quick"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"itd: interrupted; to go on: itd evaluate --config {tmp_path / 'out' / 'config.json'}"


def test_full_scale_takes_a_pipeline_an_eraser_and_prompt_files(
    tmp_path: Path, tokenizer: Any, eraser: Eraser, saved_sae: Any
) -> None:
    import dataclasses

    build_pipeline(tokenizer).save_pretrained(tmp_path / "model")
    dataclasses.replace(eraser, sae=saved_sae).save(tmp_path / "house")
    with (tmp_path / "kept.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["a boat"]])
    table = f'{sys.executable} -c \'import sys; open(sys.argv[2], "w").write("file,label,score")\''
    weights = [str(tmp_path / "model" / "model_index.json"), str(tmp_path / "kept.csv")]
    argv = ["evaluate", "full-scale", "--model", str(tmp_path / "model"), "--eraser", str(tmp_path / "house"), "--steps", "2"]
    argv += ["--detector", "command", "--command", table, "--detector-name", "giphy", "--detector-weights", *weights]
    assert main([*argv, "--kept", str(tmp_path / "kept.csv"), "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["metrics"]["kept.bit_identical"] == 1
    assert content["record"]["settings"]["steps"] == 2
    assert content["record"]["detector"]["detector"] == "giphy"
    assert list(content["record"]["detector"]["weights_sha256"]) == weights
    (tmp_path / "out" / "report.json").unlink()
    assert main(["evaluate", "--config", str(tmp_path / "out" / "config.json")]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == content


def test_flags_of_another_protocol_and_missing_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ITD_PROMPTS", raising=False)
    out = ("--out", str(tmp_path / "out"))
    assert "--steps belongs to `itd evaluate full-scale`, not to styles" in failing(
        capsys, "evaluate", "styles", *out, "--steps", "3"
    )
    assert "--prompts belongs to `itd evaluate minilm`" in failing(capsys, "evaluate", "many", *out, "--prompts", "x")
    assert "needs prompts" in failing(capsys, "evaluate", "full-scale", *out)
    assert "ITD_PROMPTS" in failing(capsys, "evaluate", "minilm", *out)
    assert not (tmp_path / "out" / "config.json").exists()


def test_help_names_every_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PROTOCOLS)
