"""The protocols on a stand-in for the embedded world: what they hold apart, what they compute once, what they write."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from itd import emoji, evaluate
from itd.emoji import generate as drawing
from itd.eraser import ANCHOR
from itd.erasing import EraseConfig
from itd.evaluation import PROTOCOLS, find_protocol, with_settings
from itd.evaluation.gate import GateAlone
from itd.evaluation.general import General
from itd.evaluation.identities import Identities
from itd.evaluation.many import Many
from itd.evaluation.minilm import MiniLM
from itd.evaluation.results import Report
from itd.evaluation.styles import Styles, style_sets
from itd.evaluation.unsafe import Unsafe, silent_tags
from itd.evaluation.world import CHUNK, Case, Drawn, Sight, World, leak_free_sets, leaky_sets, margin_of, require_no_leak
from itd.metrics.intervals import NOTHING, Rate
from itd.prompts import PromptSet
from itd.templates import TEMPLATES

pytestmark = pytest.mark.usefixtures("tiny_world")

SMALL: dict[str, Any] = {
    "identities": Identities((2,), 2, 2, 1, drawn_only=False), "styles": Styles(False, 2, ("twemoji",)),
    "unsafe": Unsafe(("axe", "bow"), 1, 1, 4),
    "general": General(12, 2), "many": Many((1, 2), 2, 2, 1, 1, 4, 6, drawn_only=False), "gate": GateAlone(2, 2, (1, 2), 12),
}  # fmt: skip


def test_nothing_about_a_held_out_concept_is_in_the_sets() -> None:
    sets = leak_free_sets(["cat"], ["dog", "house"])
    assert {"dog", "house"}.isdisjoint((sets.retain + sets.neutral).concepts)
    assert {"horse", "tree"} <= set((sets.retain + sets.neutral).concepts)
    tests = [PromptSet.from_names([name], TEMPLATES["test"], "test") for name in ("cat", "dog")]
    require_no_leak(sets, *tests)
    with pytest.raises(ValueError, match="leak by concept"):
        require_no_leak(leak_free_sets(["cat"], []), *tests)
    with pytest.raises(ValueError, match="leak by text"):
        require_no_leak(leaky_sets(["cat"], *tests), *tests)


def test_the_nouns_that_styles_are_tested_with_are_in_none_of_their_prompts() -> None:
    sets = style_sets(("twemoji",), ("boat",))
    assert not any(" boat " in f" {p.text.replace(',', ' ')} " for part in sets for p in part)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_protocol_runs_reports_and_goes_on_without_drawing_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = evaluate(None, SMALL[name], out=tmp_path)
    assert {"report.json", "report.md", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["protocol"] == name
    assert all(value is None or isinstance(value, float | int) for value in content["metrics"].values())
    if name == "many":
        assert content["intervals"]["n2.gate_fpr_captions"]["n"] == 6
        damage = report.markdown().split("| concepts erased | fifth |")[1].splitlines()[2:6]
        assert [row[:9] for row in damage] == ["| 1 | 1 |", "| 1 | 2 |", "| 2 | 1 |", "| 2 | 2 |"]
        assert {"n1.clip_score_kept", "n2.fid_judge_kept_unerased", "n2.damage1_erased"} <= set(content["metrics"])
    if name == "identities":
        fifths = content["record"]["arms"]["erase2.leak_free"]["damage"]
        assert [row["erased"] for row in fifths] == [
            content["metrics"][f"erase2.leak_free.damage{row['fifth']}_erased"] for row in fifths
        ]
    assert content["record"]["weights_sha256"]["unet"]
    for key, interval in content["intervals"].items():
        value = content["metrics"][key]
        assert value is None or interval["low"] - 1e-9 <= value <= interval["high"] + 1e-9

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawing, "generate", refuse)
    monkeypatch.setattr("itd.evaluation.world.erase", refuse)
    again = evaluate(None, SMALL[name], out=tmp_path)
    assert {k: v for k, v in again.metrics.items() if v == v} == {k: v for k, v in report.metrics.items() if v == v}


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, "test", {})
    cases = [Case(f"a {noun}", seed, noun) for noun in ("cat", "dog") for seed in range(CHUNK)]
    generate, calls = drawing.generate, []

    def stop(*args: Any, **options: Any) -> torch.Tensor:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args[1])
        return generate(*args, **options)

    monkeypatch.setattr(drawing, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        world.draw("unerased", cases)
    monkeypatch.setattr(drawing, "generate", lambda *args, **options: calls.append(args[1]) or generate(*args, **options))
    drawn = World(tmp_path, "test", {}).draw("unerased", cases)
    assert [prompts[0] for prompts in calls] == ["a cat", "a dog"]
    assert len(drawn.pixels) == 2 * CHUNK


def test_passed_pictures_are_bit_identical_and_gated_ones_are_not(tmp_path: Path) -> None:
    import dataclasses

    world = World(tmp_path, "test", {})
    made = world.eraser("cat", leak_free_sets(["cat"], ["dog"]), SMALL["identities"].erase)
    cases = [Case(prompt, 1, "cat") for prompt in ("a photo of a cat", "a cat", "my cat at night")]
    before = world.draw("unerased", cases)
    for threshold, fired in ((-1e9, True), (1e9, False)):
        gate = dataclasses.replace(made.eraser.gate, thresholds=(threshold,))
        after = world.draw(f"at {threshold}", cases, dataclasses.replace(made.eraser, gate=gate))
        assert set(after.fired) == {fired}
        assert set(before.same_as(after)) == {not fired}
    with pytest.raises(ValueError, match="same prompts and seeds"):
        before.same_as(world.draw("unerased", cases[:2]))


def test_other_settings_or_weights_in_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    World(tmp_path, "test", {"seed": 0})
    with pytest.raises(ValueError, match="another settings"):
        World(tmp_path, "test", {"seed": 1})
    from itd import emoji

    pipe = emoji.load_pipeline()
    next(pipe.unet.parameters()).data += 1
    monkeypatch.setattr(emoji, "load_pipeline", lambda: pipe)
    with pytest.raises(ValueError, match="another weights_sha256"):
        World(tmp_path, "test", {"seed": 0})


def test_a_margin_says_what_the_gate_said_whatever_rounding_says() -> None:
    def check(fired: bool, score: float, threshold: float) -> Any:
        return SimpleNamespace(fired=fired, score=score, threshold=threshold)

    assert margin_of(check(True, 2.0, 1.5)) == 0.5
    assert margin_of(check(False, 1.0, 1.0)) < 0
    assert margin_of(check(True, 1.0, 1.0 + 1e-9)) == 0
    assert margin_of(check(False, float("-inf"), 1.0)) < -1e8


def test_the_leaky_numbers_stand_beside_the_leak_free_ones(tmp_path: Path) -> None:
    metrics = evaluate(None, Identities((2,), 1, 1, 1, drawn_only=False), out=tmp_path).metrics
    keys = {leak: {k.split(".")[-1] for k in metrics if k.startswith(f"erase2.{leak}.")} for leak in ("leak_free", "leaky")}
    assert keys["leak_free"] == keys["leaky"]
    assert {"acc_erased", "acc_kept", "harmonic_mean", "no_object_erased", "bit_identical_kept"} <= keys["leaky"]


def test_implicit_prompts_say_neither_the_name_nor_what_the_eraser_was_told(tmp_path: Path) -> None:
    from itd.emoji.data import Noun

    noun = Noun("kitchen knife", ("cooking", "knife", "hocho", "weaponry"), "tool", "unsafe")
    assert silent_tags(noun, ("weapon",)) == ["cooking", "hocho"]


def test_a_noun_is_measured_in_the_sentences_that_the_unerased_pipeline_draws_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, templates = World(tmp_path, "test", {}), ["a {}", "my {}", "the {} outside"]
    drawn = {"a cat", "the cat outside", "my dog"}
    monkeypatch.setattr(Sight, "right", lambda _, cases: [case.prompt in drawn for case in cases])
    assert world.sentences(["cat", "dog"], templates, True) == {"cat": ["a {}", "the {} outside"], "dog": ["my {}"]}
    assert world.sentences(["cat"], templates, False) == {"cat": templates}
    drawn.clear()
    with pytest.raises(ValueError, match="drawn_only=False"):
        world.sentences(["cat"], templates, True)


def test_a_noun_in_a_half_of_a_scene_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, "test", {})
    monkeypatch.setattr(type(world.judge), "shown_in", lambda _, images, whole: [{"cat": 0.9, "dog": 0.4} for _ in images])
    cases = [Case("a cat and a dog", 1, noun) for noun in ("cat", "dog", "tree")]
    sight = world.see(world.draw("unerased", cases))
    assert sight.right(cases) == [True, True, False]
    assert sight.shows_any(["dog", "tree"], 0.3) == [True] * 3
    assert sight.shows_any(["dog", "tree"], 0.5) == [False] * 3


def test_the_kept_concepts_are_the_same_at_every_count(tmp_path: Path) -> None:
    protocol = Many((1, 3), 2, 2, 1, 1, 4)
    erased, kept = protocol.concepts(World(tmp_path, "many", {}))
    assert len(erased) == 3
    assert set(erased).isdisjoint(kept)
    with pytest.raises(ValueError, match="are asked for"):
        Many((500,)).concepts(World(tmp_path, "many", {}))


def test_a_given_eraser_is_measured_on_what_it_erases(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "test", {})
    made = world.eraser("cat", leak_free_sets(["cat"], []), SMALL["general"].erase)
    general = evaluate(None, General(6, 2), made.eraser, tmp_path / "g")
    assert not (tmp_path / "g" / "erasers").exists()
    assert general.record["erased"] == ["cat"]
    assert "cat" not in general.record["held_out"]
    assert general.record["eraser"]["sha256"] == made.eraser.sha256
    report = evaluate(None, SMALL["identities"], made.eraser, tmp_path / "i")
    assert list(report.record["arms"]) == ["erase1.given"]
    arm = report.record["arms"]["erase1.given"]
    assert arm["erased"] == ["cat"]
    assert len(arm["kept"]) == 2
    assert "cat" not in arm["kept"]
    assert report.intervals["erase1.given.acc_erased"].n == 4
    gate = evaluate(None, SMALL["gate"], made.eraser, tmp_path / "gate").record
    assert (gate["erased"], len(gate["kept"])) == (["cat"], 2)
    assert "given.implicit_detected" in evaluate(None, SMALL["unsafe"], made.eraser, tmp_path / "u").metrics
    with pytest.raises(ValueError, match="leave the eraser out"):
        evaluate(None, SMALL["many"], made.eraser, tmp_path / "m")
    with pytest.raises(ValueError, match="none is a design"):
        evaluate(None, SMALL["styles"], made.eraser, tmp_path / "s")


def test_pictures_of_another_given_eraser_are_not_taken_for_its_own(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "test", {})
    cat, dog = (world.eraser(name, leak_free_sets([name], []), SMALL["general"].erase).eraser for name in ("cat", "dog"))
    evaluate(None, General(6, 2), cat, tmp_path / "g")
    with pytest.raises(ValueError, match="another eraser"):
        evaluate(None, General(6, 2), dog, tmp_path / "g")
    named = replace(cat, concepts=tuple(replace(concept, name="unicorn") for concept in cat.concepts))
    with pytest.raises(ValueError, match="'unicorn', which is no noun"):
        evaluate(None, General(6, 2), named, tmp_path / "h")


def test_implicit_prompts_that_say_what_the_eraser_was_told_are_counted_apart(tmp_path: Path) -> None:
    protocol = Unsafe(("axe", "bow"), 1, 1, 4, by_synonyms=False, by_pooled=False, by_draft=False)
    report = evaluate(None, protocol, out=tmp_path)
    metrics, n = report.metrics, {name: rate.n for name, rate in report.intervals.items()}
    assert n["words.implicit_said_detected"] == 0
    assert n["words.implicit_unsaid_detected"] == n["words.implicit_detected"]
    assert report.record["told"]["words"] == ["axe", "bow"]
    by = "name_synonyms"
    assert n[f"{by}.implicit_said_detected"] + n[f"{by}.implicit_unsaid_detected"] == n[f"{by}.implicit_detected"]
    assert metrics["words.implicit_unsaid_gate_fires"] == metrics["words.implicit_gate_fires"]


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("full-scale",)])
def test_a_quick_protocol_is_smaller_and_keeps_its_seed(name: str) -> None:
    protocol = find_protocol(name, seed=7)
    quick = protocol.quick()
    assert quick != protocol
    assert quick.seed == 7
    assert quick.quick() == quick


def test_an_unknown_protocol_or_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'colours'"):
        find_protocol("colours")
    with pytest.raises(ValueError, match="'size'"):
        find_protocol("identities", size=3)
    with pytest.raises(ValueError, match="'crayon'"):
        Styles(designs=("crayon",))
    with pytest.raises(ValueError, match="n_erased = 5"):
        GateAlone(5, counts=(6,))
    with pytest.raises(ValueError, match="counts"):
        Many(())
    with pytest.raises(ValueError, match="words"):
        Unsafe(())


def test_settings_are_said_as_text() -> None:
    said = ["counts=1,5", "n_kept=3", "erase.n_features=64", "erase.draft_gate=True"]
    found = with_settings(Many(n_drawn=7), said)
    assert found == Many((1, 5), 3, 7, erase=replace(EraseConfig(), n_features=64, draft_gate=True))
    assert with_settings(Unsafe(), ["words=gun,rude gesture", "by_draft=False"]) == Unsafe(
        ("gun", "rude gesture"), by_draft=False
    )
    assert with_settings(MiniLM(), ["sizes=4096,32,8192,64", "train.lr=0.5"]).sizes == ((4096, 32), (8192, 64))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("n_kept", "NAME=VALUE, as seed=1; got 'n_kept'"), ("=3", "got '=3'"), ("size=3", "its settings are counts, n_kept"),
        ("n_kept=few", "n_kept=few.*'few'"), ("counts=0", "counts must be at least 1"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(setting: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(Many(), [setting])
    assert capsys.readouterr() == ("", "")


def test_synonyms_among_common_words_are_erased_with_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", SimpleNamespace(iter_wordlist=lambda language: iter(("the", "of", "night"))))
    ways = "by_words", "by_synonyms", "by_pooled", "by_draft", "by_name", "by_name_picture", "by_name_synonyms"
    off = dict.fromkeys(ways, False)
    protocol = Unsafe(("axe", "bow"), 1, 1, 2, **off, common_words=2)
    assert protocol.ways == ("name_common", "name_draft", "name_refuse")
    assert replace(protocol, common_words=0).ways == ("name_refuse",)
    with pytest.raises(ValueError, match="by_words"):
        replace(protocol, common_words=0, by_name_refuse=False)
    report = evaluate(None, protocol, out=tmp_path)
    told = {folder.name: json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "erasers").iterdir()}
    assert {name for name, config in told.items() if config.get("draft")} == {"unsafe-name_draft", "unsafe-name_refuse"}
    assert {name: (config["edit"]["mode"], config["edit"]["anchor"]) for name, config in told.items()} == {
        "unsafe-name_common": ("subtract", ANCHOR), "unsafe-name_draft": ("subtract", ANCHOR),
        "unsafe-name_refuse": ("refuse", emoji.ANCHOR),
    }  # fmt: skip
    assert {f"{way}.implicit_drop" for way in protocol.ways} <= set(report.metrics)
    assert report.metrics["name_refuse.explicit_detected"] == 0


@pytest.fixture
def gate_alone(tmp_path: Path) -> Report:
    return evaluate(None, SMALL["gate"], out=tmp_path)


def test_an_interval_over_concepts_is_in_the_record(gate_alone: Report) -> None:
    assert isinstance(gate_alone.intervals["plain.recall"], Rate)
    assert {"plain.auroc", "shared.fpr_promised"} <= set(gate_alone.intervals)
    assert "calibration.fpr" not in gate_alone.metrics, "every concept has a threshold of its own"
    assert {"length+8.recall", "position.last.recall", "spelling.swap.fpr_kept", "nouns.3.auroc", "leaky.recall"} <= set(
        gate_alone.metrics
    )


def test_every_condition_of_the_gate_is_in_a_table_with_what_is_promised_and_has_a_curve(gate_alone: Report) -> None:
    rows = {row["condition"]: row for section in gate_alone.sections for table in section.tables for row in table}
    measured = {name.removesuffix(".auroc") for name in gate_alone.metrics if name.endswith(".auroc")} - {"calibration"}
    assert {"bare", "count1", "count2", "leaky", "length+4", "position.first", "language.de"} <= measured == set(rows)
    assert rows["shared"]["fpr_promised"].high < 1
    assert rows["plain"]["fpr_promised"] == rows["count1"]["fpr_promised"] == NOTHING
    assert {"general", "general.length+16"} <= {name for name, row in rows.items() if "fpr_general" in row}
    assert all(section.plots for section in gate_alone.sections)
    curves = gate_alone.record["roc"]
    assert {name for name in rows if math.isfinite(rows[name]["auroc"].value)} == set(curves)
    assert all(len(points) <= 100 and points[-1] == (1, 1) for points in curves.values())


def test_drawn_pictures_come_back_in_the_range_of_the_pipeline() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    drawn = Drawn((Case("a", 0, "cat"), Case("b", 0, "dog")), pixels, (b"", b""), (False, False))
    assert (float(drawn.images.min()), float(drawn.images.max())) == (-1, 1)
    assert drawn.rows(["dog"]) == [1]
