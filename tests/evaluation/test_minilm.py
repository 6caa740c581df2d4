"""The gate on public prompt sets, on a tiny encoder and tiny sets of the same form."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoders import build_bert

from itd import TrainConfig, evaluate, training
from itd.erasing import EraseConfig
from itd.evaluation import minilm
from itd.evaluation.ledger import Ledger
from itd.evaluation.minilm import POOLED_RATES, Bench, MiniLM, merged, rates_apart, recall_at_bars, require_separate
from itd.evaluation.public_prompts import (
    FILES,
    PAINTERS,
    PEOPLE,
    REWORDED,
    TASKS,
    VARIABLE,
    deal_names,
    deal_of,
    find_folder,
    load_material,
    mixed_names,
)
from itd.evaluation.variants import LANGUAGES
from itd.gate import threshold_for_fpr
from itd.prompts import PromptSet

STARS = ("ann ash", "bob beam", "cid cole", "dee dorn")
OTHERS = ("eve elm", "fay fox", "gus gale", "hal hays", "ida ives", "jon jay", "kim kerr", "lou lane", "mia moss", "ned nash")
PAINTER_NAMES, OTHER_PAINTERS = (
    ("ola oak", "pip pine", "quin quay"),
    ("ray rice", "sue snow", "tom toll", "una ude", "vic vale", "wes wyn"),
)
FRAMES = ("A portrait of {}", "An oil painting of {}", "A sketch of {}", "{} in an official photo", "An image capturing {}")
STYLE_FRAMES = ("Image in the style of {}", "Art inspired by {}", "Painting in the style of {}", "A famous artwork by {}")
THINGS = ("dog", "cat", "horse", "train", "pizza", "boat", "clock", "kite", "bus", "cake")


def write(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prompts")
    named = {
        "celebrity_target": (STARS, FRAMES), "celebrity_remain": (OTHERS, FRAMES),
        "style_target": (PAINTER_NAMES, STYLE_FRAMES), "style_remain": (OTHER_PAINTERS, STYLE_FRAMES),
    }  # fmt: skip
    for name, (names, frames) in named.items():
        write(place / f"{name}.csv", ["class", "prompt"], [[n, f.format(n)] for n in names for f in frames])
    captions = [f"a {a} beside a {b} number {i}" for i, (a, b) in enumerate((a, b) for a in THINGS for b in THINGS)]
    write(place / "coco_30k.csv", ["prompt"], [[text] for text in [*captions, "ann ash with a dog", "a naked cat"]])
    write(place / "diffusiondb_5k.csv", ["prompt"], [[f"{text}, digital art, 8k"] for text in captions])
    rows = [[f"{text} in bed", "sexual" if i % 2 else "violence, hate"] for i, text in enumerate(captions)]
    rows.append([f"{captions[0]}, digital art, 8k", "sexual"])
    write(place / "i2p.csv", ["prompt", "categories"], rows)
    return place


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentences = [f for part in (*PEOPLE.values(), *PAINTERS.values()) for f in part] + [
        *FRAMES,
        *STYLE_FRAMES,
        "in bed digital 8k",
    ]
    names = (*STARS, *OTHERS, *PAINTER_NAMES, *OTHER_PAINTERS, *THINGS, "a naked cat beside number")
    words = {w.strip(",.").lower() for text in (*sentences, *names) for w in text.replace("{}", "").split()}
    return build_bert(tmp_path_factory.mktemp("bert"), sorted(words | {str(i) for i in range(100)} | {","}))


@pytest.fixture
def protocol(folder: Path, encoder: Path) -> MiniLM:
    train = TrainConfig(n_tokens=2000, batch_tokens=200, dead_tokens=1000, checkpoint_every=4)
    return MiniLM(
        folder, encoder, ("celebrities",), (0, 1), ((96, 6),), ("token", "evidence"), ("evidence", "contribution"), (8,),
        (0.01,), 0.1, 40, 24, train,
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_what_is_tested_is_in_no_earlier_split(task: Any, folder: Path) -> None:
    material = load_material(task, folder, 40)
    require_separate(material)
    for part in ("fit", "calibrate", "choose", "test"):
        assert len(material.target[part])
        assert len(merged(material, part))
    broken = replace(material, target={**material.target, "fit": material.target["fit"] + material.target["test"]})
    with pytest.raises(ValueError, match="leak by"):
        require_separate(broken)


def test_tested_names_of_one_task_are_not_seen_in_the_other(folder: Path) -> None:
    stars, artists = load_material("celebrities", folder, 5), load_material("artists", folder, 5)
    seen = {name.lower() for material in (stars, artists) for name in material.kept["fit"].concepts}
    assert seen.isdisjoint(stars.kept["test"].concepts)
    assert seen.isdisjoint(artists.kept["test"].concepts)
    assert len(stars.kept["test"].concepts) == 5


def test_general_prompts_name_nothing_that_is_erased(folder: Path) -> None:
    stars, explicit = load_material("celebrities", folder, 1000), load_material("explicit", folder, 1000)
    texts = {
        task: [t for s in m.general.values() for p in s.values() for t in p.texts]
        for task, m in (("s", stars), ("e", explicit))
    }
    assert not any("ann ash" in text for text in texts["s"])
    assert any("naked" in text for text in texts["s"])
    assert not any("naked" in text for text in texts["e"])
    assert not explicit.kept_must_pass
    targets = {text for part in explicit.target.values() for text in part.texts}
    assert targets & set(texts["s"]), "a typed prompt is in two public sets"
    assert not targets & set(texts["e"])


def test_a_text_has_one_split_whatever_else_is_there(folder: Path) -> None:
    few, many = load_material("celebrities", folder, 5), load_material("celebrities", folder, 1000)
    for part in ("fit", "test"):
        assert set(few.general["coco"][part].texts) <= set(many.general["coco"][part].texts)
    assert deal_of("A Dog ") == deal_of("a dog")


def test_mixed_names_are_nobody() -> None:
    mixed = mixed_names(STARS, OTHERS, ("ann nash",), 0)
    assert len(mixed) >= len(STARS)
    assert set(mixed).isdisjoint({*STARS, *OTHERS, "ann nash"})
    parts = {word for name in STARS for word in name.split()}
    assert all(set(name.split()) & parts for name in mixed)


def test_sentences_that_are_only_tested_are_in_no_earlier_split() -> None:
    for frames, reworded in ((PEOPLE, REWORDED["celebrities"]), (PAINTERS, REWORDED["artists"])):
        tested = {*reworded, *(frame for language in LANGUAGES.values() for frame in language)}
        assert tested.isdisjoint(frame for part in frames.values() for frame in part)


def test_half_of_the_kept_names_are_tested() -> None:
    dealt = deal_names([f"n{i}" for i in range(100)], 0)
    assert {part: len(names) for part, names in dealt.items()} == {"test": 50, "calibrate": 10, "choose": 10, "fit": 30}


def test_the_recall_within_the_bars_is_that_of_the_lowest_threshold_that_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "BARS", {"recall": 0.5, "fpr_kept": 0.25, "fpr_general": 0.0})
    assert recall_at_bars([3.0, 2.0, 1.0, 0.0], [2.5, 1.5, 0.5, 0.1], [[0.2, 0.1]]) == 0.5
    assert recall_at_bars([3.0, 2.0, 1.0, 0.0], [], [[1.0, 0.1]]) == 0.5
    assert recall_at_bars([3.0, 2.0, 1.0, 0.0], [], [[1.0, 0.1], [2.0, 0.1]]) == 0.25
    with pytest.raises(ValueError, match="got none"):
        recall_at_bars([1.0], [], [[]])


@pytest.mark.parametrize(("n", "most"), [(3830, 0.01), (100, 0.05), (50, 0.01)])
def test_every_threshold_between_calibration_prompts_is_tried(n: int, most: float) -> None:
    negatives = torch.randperm(n, generator=torch.Generator().manual_seed(n)) / n
    rates = rates_apart(n, most)
    thresholds = [threshold_for_fpr(negatives, fpr) for fpr in rates]
    reached = [int((negatives >= threshold).sum()) for threshold in thresholds]
    assert reached == list(range(len(rates)))
    assert len(rates) == max(1, int(most * (n + 1)))
    assert max(rates) < max(most, 1 / (n + 1)) + 1 / (n + 1)


def test_the_smallest_rate_is_picked_that_keeps_the_recall(protocol: MiniLM, folder: Path) -> None:
    material = load_material("celebrities", folder, 5)
    bench = Bench(folder, Any, Any, PromptSet(), replace(protocol, max_fpr=0.5))  # type: ignore[arg-type]
    # From the third largest calibration prompt on all positives are found, from the fifth on a kept name fires.
    low = {"coco": [0.0], "diffusiondb": [0.0]}
    trial = {"calibrate": [i / 10 for i in range(10)], "positives": [0.75, 2.0], "kept": [0.55], "sources": low}
    assert bench.pick_rate(material, trial) == rates_apart(10, 0.5)[2]
    never = trial | {"sources": low | {"coco": [5.0]}}
    assert bench.pick_rate(material, never) == rates_apart(10, 0.5)[0]


def test_the_pooled_gate_is_added_at_the_smallest_rate_that_finds_the_most_within_the_bars(
    protocol: MiniLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = load_material("celebrities", folder, 5)
    bench, passes = Bench(folder, Any, Any, PromptSet(), protocol), dict.fromkeys(material.general, 0.0)  # type: ignore[arg-type]
    config = EraseConfig(fpr=0.2)
    table = {
        0.001: {"target": 0.5, "kept": 0.0, **passes}, 0.002: {"target": 0.998, "kept": 0.0, **passes},
        0.003: {"target": 0.999, "kept": 0.0, **passes}, 0.01: {"target": 1.0, "kept": 0.02, **passes},
    }  # fmt: skip
    monkeypatch.setattr(Bench, "pooled_shares", lambda self, material, asked, first: table)
    found_by_features = {
        "calibrate": [0.0] * 9 + [1.0], "positives": [2.0, -1.0], "kept": [-1.0],
        "sources": {source: [-1.0] for source in material.general},
    }  # fmt: skip
    assert bench.with_pooled_gate(material, found_by_features, config) == replace(config, pooled_gate=True, pooled_fpr=0.002)
    for row in table.values():
        row["target"] = min(row["target"], 0.5)
    assert bench.with_pooled_gate(material, found_by_features, config) == config, "what the first gate finds alone"
    for row in table.values():
        row["coco"] = 0.5
    assert bench.with_pooled_gate(material, found_by_features, config) == config, "none is within the bars"


def test_a_prompt_counts_once_that_either_gate_finds(protocol: MiniLM, folder: Path, tmp_path: Path) -> None:
    material, pipe = load_material("explicit", folder, 40), protocol.load_encoder()
    bench = Bench(tmp_path, pipe, Ledger(tmp_path / "cells", {}), PromptSet(), protocol)
    asked = {"target": material.target["choose"], "coco": material.general["coco"]["choose"]}
    n = {name: len(prompts) for name, prompts in asked.items()}
    alone = bench.pooled_shares(material, asked, {name: torch.zeros(n[name], dtype=torch.bool) for name in asked})
    every = bench.pooled_shares(material, asked, {name: torch.ones(n[name], dtype=torch.bool) for name in asked})
    assert set(alone) == set(POOLED_RATES)
    assert all(row == {"target": 1.0, "coco": 1.0} for row in every.values())
    assert all(0 <= share < 1 for row in alone.values() for share in row.values())
    assert alone[max(POOLED_RATES)]["target"] >= alone[min(POOLED_RATES)]["target"]


def test_the_protocol_trains_chooses_tests_and_goes_on(
    protocol: MiniLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = training.Trainer.step, []

    def stop(self: Any, at: int) -> Any:
        if len(steps) == 14:
            raise KeyboardInterrupt
        steps.append(at)
        return step(self, at)

    monkeypatch.setattr(training.Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, protocol, out=tmp_path)
    n_before = len(steps)
    steps.clear()
    monkeypatch.setattr(training.Trainer, "step", lambda self, at: steps.append(at) or step(self, at))
    report = evaluate(None, protocol, out=tmp_path)
    # The first autoencoder was whole and the second one at step 4 of 10, where its checkpoint was.
    assert (n_before, steps) == (14, [4, 5, 6, 7, 8, 9])
    content = json.loads((tmp_path / "report.json").read_text())
    trials = content["record"]["chosen"]["celebrities"]["trials"]
    # Both autoencoders with the first settings, then the other settings with the better one.
    assert len(trials) == 4
    best = max(trial["recall_at_bars"] for trial in trials)
    picked = content["record"]["chosen"]["celebrities"]["candidate"]
    assert best in {trial["recall_at_bars"] for trial in trials if trial["candidate"] == picked}
    expected = {"leak_free.recall", "leak_free.probe.recall_at_bars", "leaky.recall", "bars_met"}
    expected |= {"position.last.recall", "length+8.fpr_kept", "language.it.auroc", "spelling.two.auroc_general"}
    assert {f"celebrities.{name}" for name in expected} <= set(report.metrics)
    steps.clear()
    assert evaluate(None, protocol, out=tmp_path).metrics.keys() == report.metrics.keys()
    assert steps == []


def test_missing_prompts_and_empty_grids_are_refused(
    protocol: MiniLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=VARIABLE):
        find_folder(None)
    with pytest.raises(FileNotFoundError, match=f"no {FILES[0]}.csv"):
        find_folder(tmp_path)
    monkeypatch.setenv(VARIABLE, str(folder))
    assert find_folder(None) == folder
    with pytest.raises(ValueError, match="layers"):
        replace(protocol, layers=())
    with pytest.raises(ValueError, match="'sports'"):
        load_material("sports", folder, 5)  # type: ignore[arg-type]


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of public prompt sets")
@pytest.mark.parametrize(("task", "n_target", "n_kept"), [("celebrities", 250, 250), ("artists", 500, 250)])
def test_the_public_sets_have_the_published_sizes(task: Any, n_target: int, n_kept: int) -> None:
    material = load_material(task, find_folder(None), 500)
    require_separate(material)
    assert (len(material.target["test"]), len(material.kept["test"])) == (n_target, n_kept)


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        ("i2p.csv", ["prompt", "hard"], r"i2p\.csv has no column 'categories'; its columns are \['prompt', 'hard'\]"),
        ("i2p.csv", ["text", "categories"], r"i2p\.csv has no column 'prompt'"),
        (
            "celebrity_target.csv",
            ["name", "prompt"],
            r"celebrity_target\.csv needs prompts, each with its name in a column 'class'",
        ),
    ],
)
def test_prompt_files_that_lack_a_column_are_named(
    folder: Path, tmp_path: Path, file: str, columns: list[str], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "prompts")
    write(copy / file, columns, [["a", "b"]])
    with pytest.raises(ValueError, match=message):
        load_material("explicit" if file == "i2p.csv" else "celebrities", copy, 10, 0)
