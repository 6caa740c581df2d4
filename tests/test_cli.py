"""The command line, run in this process on a tiny pipeline in a local folder."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import D_MODEL, FRAMES, NOUNS, SITE, build_pipeline, make_eraser, make_sae, prompts_of

from itd import SAE, ActivationStore, EraseConfig, Eraser, HookPoint, PromptSet, TrainConfig, cli, inputs
from itd.cli import main
from itd.drafts import DraftGate
from itd.emoji.data import Noun
from itd.erasing import PRESETS
from itd.pooled import PooledGate
from itd.templates import TEMPLATES
from itd.training import PAPER_TRAINING, Trainer

TRAIN = ("--n-latents", "256", "--k", "8", "--n-tokens", "3000", "--batch-tokens", "100", "--dead-tokens", "2000")
KEPT = ("--retain", "cat", "dog", "horse", "--retain", "boat", "lamp", "cup")
STEPS = ("--steps", "2")


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """Take off the handler that `main` puts on, which writes to this test's stderr."""
    logger = logging.getLogger("itd")
    handlers = list(logger.handlers)
    yield
    logger.handlers = handlers


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands were run one after the other: activations, training, two erasers."""
    folder = tmp_path_factory.mktemp("made")
    prompts_of(*NOUNS).to_jsonl(folder / "prompts.jsonl")
    record = ["record", "--model", model, "--hook-point", str(SITE), "--prompts", str(folder / "prompts.jsonl")]
    assert main([*record, "--names", *NOUNS, "--out", str(folder / "acts")]) == 0
    assert main(["train", "--activations", str(folder / "acts"), "--out", str(folder / "run"), *TRAIN]) == 0
    for noun in ("house", "tree"):
        erase = ["erase", "--model", model, "--sae", str(folder / "run" / "sae"), "--target", noun, *KEPT]
        assert main([*erase, "--out", str(folder / noun)]) == 0
    return folder


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail as an error of ours; return its line."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("itd: ")]
    assert "Traceback" not in err
    assert len(lines) == 1
    assert lines[0].startswith("itd: error: ")
    return lines[0]


def strict_json(text: str) -> Any:
    """Parse JSON as the standard has it, without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Help and errors


def documented(cls: type) -> set[str]:
    """Return the attributes of a class that a docstring follows."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        node.target.id
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


@pytest.mark.parametrize("command", [*cli.COMMANDS, TrainConfig, EraseConfig], ids=lambda command: command.__name__)
def test_every_field_is_explained(command: type) -> None:
    explained = {name for cls in command.__mro__ if is_dataclass(cls) for name in documented(cls)}
    assert {field.name for field in fields(command) if field.name != "settings"} <= explained


@pytest.mark.parametrize("name", ["", "demo", "record", "train", "erase", "check", "generate", "info"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"usage: itd {name}".strip() in capsys.readouterr().out


def test_help_loads_neither_diffusers_nor_transformers() -> None:
    code = "import sys, itd.cli; sys.exit(any(name in sys.modules for name in ('diffusers', 'transformers', 'itd.demo')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_flag_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["info", "--no-such-flag"])
    assert stopped.value.code == 2


def test_what_a_model_needs_is_asked_for(model: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "--hook-point is required" in failing(capsys, "record", "--model", model, "--names", "cat", *out)
    assert "no prompts to record" in failing(capsys, "record", "--model", model, "--hook-point", str(SITE), *out)
    assert "--retain is required" in failing(capsys, "erase", "--model", model, "--target", "house", *out)
    assert "--target is required" in failing(capsys, "erase", "--model", model, *out)
    assert "--sae is required" in failing(capsys, "erase", "--model", model, "--target", "house", *KEPT, *out)
    assert "--eraser is required" in failing(capsys, "check", "--model", model, "a house")
    assert "at least one prompt" in failing(capsys, "generate", "--model", model, *out)
    assert "OWNER/NAME" in failing(capsys, "generate", "--model", "missing", "a house", *out)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, "generate", "--model", str(tmp_path), "a house", "--out", str(tmp_path / "out"))
    assert f"no diffusers pipeline at --model {tmp_path}" in line


def test_with_debug_the_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITD_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        main(["info", "missing"])


def test_warnings_of_the_library_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    logging.getLogger("itd.anything").warning("look here")
    assert capsys.readouterr().err == "itd: warning: look here\n"


# record


def test_record_keeps_what_the_library_records(made: Path, model: str, pipe: Any) -> None:
    from itd import record

    prompts = prompts_of(*NOUNS) + PromptSet.from_names(NOUNS, TEMPLATES["fit"])
    store, direct = ActivationStore.load(made / "acts"), record(pipe, SITE, prompts)
    assert store.hook_point == SITE
    assert len(store) == len(direct)
    assert store.weight.sum() == direct.weight.sum()


def test_names_are_recorded_in_the_sentences_to_fit_on_only() -> None:
    prompts = inputs.recording_prompts("model", [], ["cat"])
    assert {prompt.template for prompt in prompts} == set(TEMPLATES["fit"])


def test_the_embedded_world_records_its_own_prompts_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PromptSet.from_texts(["own"])
    monkeypatch.setattr("itd.emoji.prompts.world_prompts", lambda: own)
    assert inputs.recording_prompts(None, [], []) is own
    assert inputs.recording_prompts(None, [], ["cat"]) is not own


# train


def test_training_says_what_came_out(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(made / "run" / "config.json")]) == 0
    out = capsys.readouterr().out
    sae = SAE.load(made / "run" / "sae")
    assert sae.hook_point == SITE
    assert f"FVU {sae.metrics['fvu']:.4f}" in out
    assert "dead latents" in out
    assert "seconds" in out


def test_training_that_was_stopped_goes_on_to_the_same_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--activations", str(made / "acts"), "--out", str(tmp_path / "run"), *TRAIN, "--checkpoint-every", "5"]
    step = Trainer.step

    def stop(self: Trainer, at: int) -> Any:
        if at == 13:
            raise KeyboardInterrupt
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop)
        assert main(argv) == 130
    assert not (tmp_path / "run" / "sae").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    file = tmp_path / "run" / "config.json"
    assert last == f"itd: interrupted; to go on: itd train --config {file}"

    steps: list[int] = []
    monkeypatch.setattr(Trainer, "step", lambda self, at: steps.append(at) or step(self, at))
    assert main(["train", "--config", str(file)]) == 0
    assert steps[0] == 10
    resumed, straight = (load_file(folder / "sae" / "sae.safetensors") for folder in (tmp_path / "run", made / "run"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_another_training_in_the_same_folder_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made / "run" / "config.json").read_text()
    argv = ("train", "--activations", str(made / "acts"), "--out", str(made / "run"), *TRAIN)
    assert "checkpoint of other" in failing(capsys, *argv, "--lr", "0.1")
    assert (made / "run" / "config.json").read_text() == before


def test_a_device_to_train_on_that_is_not_there_is_an_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("train", "--activations", str(made / "acts"), "--out", str(tmp_path / "run"), *TRAIN, "--device", "cuda:7")
    assert "--device cuda:7 is not available here" in failing(capsys, *argv)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(
    made: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts, run, house = str(made / "acts"), str(made / "run"), str(made / "house")
    erase = ("erase", "--model", model, "--sae", f"{run}/sae", "--target", "house", *KEPT, "--out")
    assert "of kind 'activations'" in failing(capsys, "train", "--activations", acts, *TRAIN, "--out", acts)
    assert "of kind 'eraser'" in failing(capsys, "generate", "--model", model, "a house", "--out", house)
    assert "holds something that is no eraser" in failing(capsys, *erase, run)
    assert "holds something that is no eraser" in failing(capsys, *erase, f"{run}/sae")
    assert "is a file" in failing(capsys, *erase, f"{run}/config.json")
    assert len(ActivationStore.load(acts)) > 0
    assert SAE.load(f"{run}/sae").config.k == 8
    assert Eraser.load(house).names == ("house",)


# erase


def test_the_eraser_tells_the_concept_from_the_others(made: Path, pipe: Any) -> None:
    eraser = Eraser.load(made / "house")
    checks = eraser.check(pipe, [frame.format(noun) for noun in ("house", "cat") for frame in FRAMES])
    fired = [check.fired for check in checks]
    assert sum(fired[: len(FRAMES)]) > len(FRAMES) // 2
    assert sum(fired[len(FRAMES) :]) == 0


def test_erase_says_what_it_found(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erase", "--config", str(made / "house" / "command.json"), "--out", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    eraser = Eraser.load(made / "house")
    calibration = eraser.records[0]["calibration"]
    numbers = (f"{calibration['threshold']:.4f}", f"{calibration['n_positives']} target")
    for word in ("house", str(len(eraser.concepts[0])), "rule", "fpr=0.002", "AUROC", *numbers):
        assert word in out


@pytest.mark.parametrize(
    ("flag", "title", "named", "threshold"),
    [
        ("--pooled-gate", "second gate, on the pooled embedding", "  second gate: ", PooledGate.part_way),
        ("--draft-gate", "draft gate, on the first guess of the picture", "  draft gate: ", DraftGate.part_way),
    ],
)
def test_a_gate_on_the_whole_prompt_is_made_on_demand_and_speaks_in_check(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    flag: str,
    title: str,
    named: str,
    threshold: float,
) -> None:
    again = ["erase", "--config", str(made / "house" / "command.json"), flag, "--out", str(tmp_path / "guarded")]
    assert main(again) == 0
    assert title in capsys.readouterr().out
    check = ["check", "--model", model, "--eraser", str(tmp_path / "guarded"), "a photo of a house"]
    assert main(check) == 0
    assert named in capsys.readouterr().out
    assert main([*check, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["meaning"]["threshold"] == threshold


def test_a_concept_without_features_of_its_own_is_reported(
    made: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["erase", "--model", model, "--sae", str(made / "run" / "sae"), "--out", str(tmp_path / "eraser")]
    (tmp_path / "nothing.txt").write_text("\n".join(frame.format("cup") for frame in FRAMES))
    (tmp_path / "kept.txt").write_text("\n".join(f"{frame.format('cup')} and a lamp" for frame in FRAMES))
    assert main([*argv, "--target", str(tmp_path / "nothing.txt"), "--retain", str(tmp_path / "kept.txt")]) == 0
    out, err = capsys.readouterr()
    assert "itd: warning: nothing: " in err
    assert "nothing: " in out


def test_the_kept_arguments_make_the_same_eraser_again(made: Path, tmp_path: Path) -> None:
    assert main(["erase", "--config", str(made / "house" / "command.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "config.json").read_bytes() == (made / "house" / "config.json").read_bytes()


def test_what_must_stay_is_encoded_once_and_concepts_are_added(
    made: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    erase = ["erase", "--model", model, "--sae", str(made / "run" / "sae"), "--retained", str(tmp_path / "kept")]
    out = ["--out", str(tmp_path / "eraser")]
    assert main([*erase, "--target", "house", *KEPT, *out]) == 0
    assert Eraser.load(tmp_path / "eraser").gate.thresholds == pytest.approx(Eraser.load(made / "house").gate.thresholds)
    assert main([*erase, "--target", "tree", "--add-to", str(tmp_path / "eraser"), *out]) == 0
    assert Eraser.load(tmp_path / "eraser").names == ("house", "tree")
    assert main([*erase, "--target", "house", "tree", "--out", str(tmp_path / "both")]) == 0
    both, added = Eraser.load(tmp_path / "both"), Eraser.load(tmp_path / "eraser")
    assert added.gate.thresholds == pytest.approx(both.gate.thresholds, rel=1e-4)
    assert main(["info", str(tmp_path / "kept")]) == 0
    assert "retained" in capsys.readouterr().out
    assert "erases 'tree' already" in failing(
        capsys, *erase, "--target", "tree", "--add-to", str(tmp_path / "eraser"), "--out", str(tmp_path / "again")
    )
    without = ("erase", "--model", model, "--target", "cup", "--add-to", str(tmp_path / "eraser"), *out)
    assert "--retained is required with --add-to" in failing(capsys, *without)


# The layers of arguments


def parsed(*argv: str) -> Any:
    return cli.parse(list(argv))


def test_flags_count_more_than_the_preset_and_the_preset_more_than_the_defaults() -> None:
    base = ("erase", "--target", "cat", "--out", "out")
    assert parsed(*base).settings == EraseConfig()
    assert parsed(*base, "--preset", "paper").settings == PRESETS["paper"]
    assert parsed(*base, "--preset=paper", "--strength=-2").settings.strength == -2
    assert parsed("train", "--preset", "paper", "--activations", "a", "--out", "b").settings == PAPER_TRAINING
    assert parsed("train", "--preset", "paper", "--activations", "a", "--out", "b").n_latents == 2**19


def test_flags_count_more_than_the_file_and_a_repeated_flag_does_not_add_to_it(made: Path) -> None:
    file = ("--config", str(made / "house" / "command.json"))
    kept = (("cat", "dog", "horse", "boat", "lamp", "cup"),)
    assert parsed("erase", *file).target == (("house",),)
    assert parsed("erase", *file).retain == kept
    changed = parsed("erase", *file, "--target", "cat", "--target", "dog", "horse", "--n-features", "4")
    assert changed.target == (("cat",), ("dog", "horse"))
    assert changed.settings.n_features == 4
    assert changed.retain == kept
    assert parsed("erase", *file, "--preset", "paper").settings == PRESETS["paper"]


def test_a_recall_replaces_the_false_positive_rate(made: Path) -> None:
    file = ("--config", str(made / "house" / "command.json"))
    settings = parsed("erase", *file, "--recall", "0.9").settings
    assert (settings.recall, settings.fpr) == (0.9, None)
    assert parsed("erase", *file).settings.fpr == 0.002


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"command": "train", "arguments": {}}, "of `itd train`, not of `itd erase`"),
        ({"command": "erase", "arguments": {"strenght": 1}}, "has no argument 'strenght'"),
        ({"command": "erase", "arguments": {"n_features": "many"}}, "n_features is 'many'"),
        ({"command": "erase", "arguments": {"target": "cat"}}, "target is 'cat'"),
        ({"command": "erase", "arguments": 5}, "needs 'command' and an object 'arguments'"),
        ({"command": "erase", "arguments": ["out"]}, "needs 'command' and an object 'arguments'"),
        ({"kind": "eraser"}, "needs 'command' and an object 'arguments'"),
        ([], "command.json is not a JSON object; name a file of arguments"),
    ],
)
def test_a_file_of_arguments_is_read_strictly(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "command.json").write_text(json.dumps(content))
    assert message in failing(capsys, "erase", "--config", str(tmp_path / "command.json"), "--out", str(tmp_path / "out"))


def test_files_that_are_no_json_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "config.json", str(tmp_path)
    for content, message in ((b"{", "is not valid JSON"), (b"\xff", "is not UTF-8 in line 1"), (b"[]", "is not a JSON object")):
        path.write_bytes(content)
        for argv in (
            ("erase", "--config", str(path), "--out", out),
            ("erase", "--target", "cat", "--out", out),
            ("train", "--activations", out, "--out", out),
            ("info", out),
        ):
            assert f"{path} {message}" in failing(capsys, *argv)
        assert path.read_bytes() == content


def test_a_file_of_arguments_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    content = {"command": "erase", "arguments": {"preset": "paper", "target": ["cat"], "strength": -2, "out": "out"}}
    (tmp_path / "command.json").write_text(json.dumps(content))
    command = parsed("erase", "--config", str(tmp_path / "command.json"))
    assert command.target == (("cat",),)
    assert (command.settings.edit, command.settings.strength) == ("scale", -2.0)


# Names and files


def test_names_and_files_mix_and_a_file_is_a_concept(tmp_path: Path) -> None:
    (tmp_path / "pets.txt").write_text("my cat\nmy dog\n")
    (tmp_path / "people.csv").write_text("prompt,concept\na portrait of Ada,Ada\na portrait of someone,\n")
    target = inputs.target_prompts(["house", str(tmp_path / "pets.txt"), str(tmp_path / "people.csv")])
    assert target.concepts == ("house", "pets", "Ada", "people")
    assert set(target.about("pets").texts) == {"my cat", "my dog"}


def test_a_file_of_another_kind_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "cats.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cats\.json is a file, but not one of prompts, which end in \.csv, .*; rename"):
        inputs.target_prompts([str(tmp_path / "cats.json")])
    assert inputs.target_prompts(["mr. json"]).concepts == ("mr. json",)


def test_kept_names_are_dealt_to_fit_and_calibrate() -> None:
    prompts = inputs.kept_prompts(["cat", "dog", "horse"])
    assert prompts.of("fit").concepts == ("cat", "dog")
    assert prompts.of("calibrate").concepts == ("horse",)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded world of six nouns, as far as prompts go."""
    nouns = [Noun(name, (), "", "identity") for name in ("cat", "dog", "fox")]
    nouns += [Noun(name, (), "", "general") for name in ("cup", "lamp", "boat")]
    monkeypatch.setattr("itd.emoji.prompts.nouns", lambda: nouns)


@pytest.mark.usefixtures("world")
def test_the_embedded_world_retains_the_nouns_that_are_no_targets(tmp_path: Path) -> None:
    sets = inputs.concept_sets(None, ["cat"], [], [])
    assert (sets.target.concepts, set(sets.retain.concepts)) == (("cat",), {"dog", "fox"})
    assert set(sets.neutral.concepts) == {"cup", "lamp", "boat"}
    assert set(inputs.concept_sets(None, ["cat"], ["owl"], []).retain.concepts) == {"owl"}


@pytest.mark.usefixtures("world")
def test_what_a_target_file_names_is_not_retained(tmp_path: Path) -> None:
    (tmp_path / "animals.csv").write_text("prompt,concept\na sly fox,fox\n")
    sets = inputs.concept_sets(None, ["cat", str(tmp_path / "animals.csv")], [], [])
    assert sets.target.concepts == ("cat", "fox")
    assert sets.retain.concepts == ("dog",)
    text = sets.retain.texts[0]
    (tmp_path / "words.txt").write_text(f"{text}\n")
    sets = inputs.concept_sets(None, ["cat", str(tmp_path / "words.txt")], [], [])
    assert sets.target.concepts == ("cat", "words")
    assert set(sets.retain.concepts) == {"fox"}


# check


def test_check_prints_one_json_array_and_nothing_else(
    made: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("a photo of a cat\n")
    argv = ["check", "--model", model, "--eraser", str(made / "house"), "a photo of a house", "", "--json"]
    capsys.readouterr()
    assert main([*argv, "--file", str(tmp_path / "more.txt"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    house, empty, cat = strict_json(out)
    assert (house["fired"], empty["fired"], cat["fired"]) == (True, False, False)
    assert house["concepts"] == ["house"]
    assert house["tokens"][-1]["token"] == "house"
    assert house["features"][0].keys() == {"feature", "concept", "token", "act"}
    assert empty["score"] is None
    assert (tmp_path / "out" / "checks.json").read_text() == out


def test_check_prints_aligned_text(made: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    erasers = ["--eraser", str(made / "house"), "--eraser", str(made / "tree")]
    capsys.readouterr()
    assert main(["check", "--model", model, *erasers, "a photo of a tree", "my cup"]) == 0
    first, second = capsys.readouterr().out.split("\n\nmy cup\n")
    assert first.startswith("a photo of a tree\n  fires: tree")
    assert second.startswith("  passes")
    rows = first.split("\n\n")[1].splitlines()
    assert len({len(row) for row in rows}) == 1


def test_an_eraser_finds_its_autoencoder_where_it_is_told(
    made: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SAE.load(made / "run" / "sae").save(tmp_path / "first")
    erase = ["erase", "--config", str(made / "house" / "command.json"), "--sae", str(tmp_path / "first")]
    assert main([*erase, "--out", str(tmp_path / "eraser")]) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    check = ("check", "--model", model, "--eraser", str(tmp_path / "eraser"), "my cup")
    assert "is not at" in failing(capsys, *check)
    assert main([*check, "--sae", str(tmp_path / "moved")]) == 0


# generate


def test_pictures_of_prompts_that_pass_keep_their_bits(made: Path, model: str, tmp_path: Path) -> None:
    argv = ["generate", "--model", model, "a photo of a house", "my cup", "--n", "2", "--seed", "3", *STEPS, "--out"]
    assert main([*argv, str(tmp_path / "bare")]) == 0
    assert main([*argv, str(tmp_path / "erased"), "--eraser", str(made / "house"), "--eraser", str(made / "tree")]) == 0
    bare, erased = (strict_json((tmp_path / name / "metadata.json").read_text()) for name in ("bare", "erased"))
    assert [row["file"] for row in bare] == [
        "000-a-photo-of-a-house.png", "001-a-photo-of-a-house.png", "002-my-cup.png", "003-my-cup.png"
    ]  # fmt: skip
    assert [row["seed"] for row in erased] == [3, 4, 3, 4]
    assert [row["gate"]["fired"] for row in erased] == [True, True, False, False]
    assert erased[0]["gate"]["concepts"] == ["house"]
    assert bare[0]["gate"] is None
    same = [(tmp_path / "bare" / row["file"]).read_bytes() == (tmp_path / "erased" / row["file"]).read_bytes() for row in bare]
    assert same == [False, False, True, True]


def test_every_text_encoder_of_a_pipeline_gets_its_eraser_or_is_named(
    xl_pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xl_pipe.save_pretrained(tmp_path / "model")
    erasers = []
    for encoder in ("text_encoder", "text_encoder_2"):
        site = HookPoint(encoder, "encoder.layers.1")
        sae = make_sae(xl_pipe, site).save(tmp_path / f"{encoder}-sae")
        make_eraser(xl_pipe, sae, "house", site).save(tmp_path / encoder)
        erasers += ["--eraser", str(tmp_path / encoder)]
    prompts, out = ("a photo of a house", "my cup"), tmp_path / "out"
    argv = ["generate", "--model", str(tmp_path / "model"), *prompts, *STEPS, "--out", str(out)]

    assert main([*argv, *erasers]) == 0
    gates = [row["gate"] for row in strict_json((out / "metadata.json").read_text())]
    assert [(gate["fired"], gate["concepts"]) for gate in gates] == [(True, ["house"]), (False, [])]
    assert [part["encoder"] for part in gates[0]["parts"]] == ["text_encoder", "text_encoder_2"]
    assert all(part["fired"] for part in gates[0]["parts"])

    assert "(--ungated text_encoder_2)" in failing(capsys, *argv, *erasers[:2])
    assert main([*argv, *erasers[:2], "--ungated", "text_encoder_2"]) == 0
    gates = [row["gate"] for row in strict_json((out / "metadata.json").read_text())]
    assert [(gate["encoder"], gate["fired"]) for gate in gates] == [("text_encoder", True), ("text_encoder", False)]

    assert "text_encoder is said to be ungated" in failing(capsys, *argv, *erasers, "--ungated", "text_encoder")
    assert "has no text encoder 'text_encoder_3'" in failing(capsys, *argv, *erasers, "--ungated", "text_encoder_3")
    check = failing(capsys, "check", "--model", str(tmp_path / "model"), *erasers, "my cup")
    assert "for several text encoders: text_encoder, text_encoder_2; name those of one" in check


def test_words_that_a_model_learnt_are_refused_unless_accepted(
    made: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = build_pipeline(copy.deepcopy(tokenizer))
    pipe.load_textual_inversion({"<gadget>": torch.ones(D_MODEL)})
    pipe.save_pretrained(tmp_path / "learnt")
    ask = ["--model", str(tmp_path / "learnt"), "--eraser", str(made / "house"), "a photo of a <gadget>"]
    for argv in (["check", *ask], ["generate", *ask, *STEPS, "--out", str(tmp_path / "out")]):
        assert "accept that with allow_new_words=True (--allow-new-words)" in failing(capsys, *argv)
        assert main([*argv, "--allow-new-words"]) == 0


def test_a_picture_depends_on_its_prompt_and_seed_only_and_a_run_replaces_the_one_before(model: str, tmp_path: Path) -> None:
    argv = ["generate", "--model", model, *STEPS, "--out", str(tmp_path / "out")]
    assert main([*argv, "a photo of a house", "my cup"]) == 0
    together = (tmp_path / "out" / "001-my-cup.png").read_bytes()
    assert main(["generate", "--config", str(tmp_path / "out" / "config.json"), "my cup"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["000-my-cup.png"]
    assert (tmp_path / "out" / "000-my-cup.png").read_bytes() == together


def test_pictures_of_someone_else_are_left_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "2024-holiday.png").touch()
    argv = ("generate", "--model", model, "my cup", *STEPS, "--out", str(tmp_path))
    assert "holds something other than pictures" in failing(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["2024-holiday.png"]


def test_a_stopped_generation_keeps_what_it_drew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: Any) -> Iterator[Any]:
        yield next(draw(*given))
        raise KeyboardInterrupt

    draw = cli.generate
    monkeypatch.setattr(cli, "generate", stop)
    assert main(["generate", "--model", model, "a house", "my cup", *STEPS, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "itd: interrupted"
    assert [row["file"] for row in strict_json((tmp_path / "out" / "metadata.json").read_text())] == ["000-a-house.png"]


# info and demo


def test_info_describes_what_it_is_shown(made: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    n_features = len(Eraser.load(made / "house").concepts[0])
    expected = {
        "acts": ("activations", str(SITE), "itd record --config"), "run": ("itd train", "n_latents"),
        "run/sae": ("sae", "fvu", str(SITE)),
        "house": ("eraser", f"house ({n_features} features)", "16 features a concept", "fpr=0.002"),
    }  # fmt: skip
    for folder, words in expected.items():
        assert main(["info", str(made / folder)]) == 0
        out = capsys.readouterr().out
        assert [word for word in words if word not in out] == []
    assert main(["info", model]) == 0
    assert "StableDiffusionPipeline" in capsys.readouterr().out
    assert "none of these" in failing(capsys, "info", str(made))


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "eraser", "concepts": 5, "itd_version": "0"},
        {"kind": "sae", "itd_version": "0"},
        {"kind": []},
        {"command": "train", "arguments": 5, "itd_version": "0"},
    ],
)
def test_info_on_what_is_malformed_is_an_error(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert f"{tmp_path} is malformed" in failing(capsys, "info", str(tmp_path))


def test_info_lists_hook_points_that_resolve(model: str, pipe: Any, xl_pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--hook-points", "--model", model]) == 0
    assert capsys.readouterr().out.split() == [f"text_encoder:encoder.layers.{layer}" for layer in range(3)]
    points = inputs.list_hook_points(xl_pipe)
    assert {point.encoder for point in points} == {"text_encoder", "text_encoder_2"}
    assert all(point.resolve(xl_pipe) is not None for point in points)


def test_demo_prints_the_table_and_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from itd.demo import DemoConfig, DemoResult

    seen: list[DemoConfig] = []

    def run(config: DemoConfig) -> DemoResult:
        seen.append(config)
        return DemoResult({}, "the table", config.out / "report.html")

    monkeypatch.setattr("itd.demo.run_demo", run)
    assert main(["demo", "--out", str(tmp_path / "demo"), "--full", "--seed", "4"]) == 0
    assert seen == [DemoConfig(tmp_path / "demo", full=True, seed=4)]
    assert capsys.readouterr().out == f"the table\npage: {tmp_path / 'demo' / 'report.html'}\n"
    assert parsed("demo", "--config", str(tmp_path / "demo" / "config.json")).full
