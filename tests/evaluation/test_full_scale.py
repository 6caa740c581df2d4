"""The full-scale protocol on a tiny pipeline in memory, with detectors behind commands."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import build_clip
from tiny import add_safety_checker, randomise
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from itd import Eraser, evaluate
from itd.evaluation import detectors, find_protocol, full_scale
from itd.evaluation.detectors import Clip, CommandDetector, NudeNet, clean_fid
from itd.evaluation.full_scale import FullScale, pictures_in
from itd.evaluation.world import weights_sha256
from itd.metrics.detection import Detection

DETECTOR = """
import csv, pathlib, sys
folder, table = map(pathlib.Path, sys.argv[1:])
with table.open("w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["file", "label", "score"])
    for path in sorted(folder.glob("*.png"))[:2]:
        rows.writerows([[path.name, "house", 0.7], [path.name, "boat", 0.3]])
"""


def write(path: Path, columns: list[str], *rows: list[Any]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def protocol(tmp_path: Path) -> FullScale:
    target = write(
        tmp_path / "t.csv", ["prompt", "class", "evaluation_seed"], ["a house", "house", 5], ["my house at night", "house", 6]
    )
    kept = write(tmp_path / "k.csv", ["prompt", "class"], ["a boat", "boat"], ["a cat", "cat"])
    general = write(
        tmp_path / "g.csv", ["prompt", "evaluation_guidance"], ["a photo of a tree", 3], ["one dog in the park", ""]
    )
    return FullScale(target, kept, general, steps=2, options={"height": 16, "width": 16})


@pytest.fixture
def command(tmp_path: Path) -> str:
    script = tmp_path / "detector.py"
    script.write_text(DETECTOR)
    return f"{sys.executable} {script}"


@pytest.fixture(scope="module")
def clip_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    build_clip(tokenizer)[0].save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}), tokenizer
    ).save_pretrained(folder)
    return folder


def test_prompts_keep_their_own_seeds_and_guidance(protocol: FullScale) -> None:
    assert [(row.seed, row.guidance) for row in protocol.rows("target")] == [(5, 7.5), (6, 7.5)]
    assert [(row.seed, row.guidance) for row in protocol.rows("general")] == [(0, 3.0), (1, 7.5)]
    assert [row.seed for row in replace(protocol, n_seeds=3, seed=10).rows("kept")] == [10, 11, 12, 13, 14, 15]
    assert len(replace(protocol, limit=1).rows("kept")) == 1


def test_passed_pictures_have_the_same_pixels_and_everything_is_in_the_record(
    pipe: Any, eraser: Eraser, protocol: FullScale, command: str, tmp_path: Path
) -> None:
    chosen = replace(protocol, detector="command", command=command)
    report = evaluate(pipe, chosen, eraser, tmp_path / "out")
    metrics = report.metrics
    assert (metrics["target.gate_fires"], metrics["kept.gate_fires"]) == (1, 0)
    assert (metrics["target.bit_identical"], metrics["kept.bit_identical"], metrics["general.bit_identical"]) == (0, 1, 1)
    assert metrics["kept.erased.detected@0.6"] == 1
    assert metrics["kept.erased.detected@0.75"] == 0
    assert (metrics["target.erased.accuracy"], metrics["kept.erased.accuracy"]) == (1, 0)
    record = json.loads((tmp_path / "out" / "report.json").read_text())["record"]
    assert record["detector"]["command"] == command
    assert record["scheduler"]["name"] == "DDIMScheduler"
    assert record["settings"]["guidance_scale"] == 7.5
    assert set(record["drawing"]["prompts_sha256"]) == {"target", "kept", "general"}
    assert record["weights_sha256"]["unet"]


def test_a_detector_command_is_recorded_by_its_name_and_the_hashes_of_its_weights(
    pipe: Any, eraser: Eraser, protocol: FullScale, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "a.pkl", tmp_path / "b.npy"
    for path in weights:
        path.write_bytes(path.name.encode())
    chosen = replace(protocol, detector="command", command=command, detector_name="giphy", detector_weights=weights)
    record = evaluate(pipe, chosen, eraser, tmp_path / "out").record["detector"]
    assert record["detector"] == "giphy"
    assert record["weights_sha256"] == {str(path): sha256(path.name.encode()).hexdigest() for path in weights}
    looked = []
    monkeypatch.setattr(CommandDetector, "detect", lambda self, files: looked.append(files) or [[] for _ in files])
    evaluate(pipe, chosen, eraser, tmp_path / "out")
    assert looked == []
    weights[0].write_bytes(b"trained again")
    evaluate(pipe, chosen, eraser, tmp_path / "out")
    assert len(looked) == 6


def test_a_judge_that_is_missing_is_named_before_anything_is_drawn(
    pipe: Any, eraser: Eraser, protocol: FullScale, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"itd\[nudenet\]"):
        evaluate(pipe, replace(protocol, detector="nudenet"), eraser, tmp_path / "out")
    chosen = replace(protocol, detector="command", command=command, detector_weights=(tmp_path / "none.pkl",))
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        evaluate(pipe, chosen, eraser, tmp_path / "out")
    with pytest.raises(ValueError, match="no CLIP"):
        evaluate(pipe, replace(protocol, clip=str(tmp_path)), eraser, tmp_path / "out")
    assert not (tmp_path / "out" / "pictures").exists()


def test_every_detected_part_of_a_picture_counts(
    pipe: Any, eraser: Eraser, protocol: FullScale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [Detection("FEET_EXPOSED", 0.9), Detection("FEET_EXPOSED", 0.5), Detection("BELLY_EXPOSED", 0.21)]
    monkeypatch.setattr(NudeNet, "describe", lambda self: {"lowest_score": self.lowest})
    monkeypatch.setattr(NudeNet, "detect", lambda self, files: [parts, []])
    chosen = replace(protocol, target=None, general=None, detector="nudenet", thresholds=(0.2, 0.6))
    report = evaluate(pipe, chosen, eraser, tmp_path / "out")
    assert report.record["detector"]["lowest_score"] == 0.2
    assert (report.metrics["kept.erased.parts@0.2"], report.metrics["kept.erased.parts@0.6"]) == (3, 1)
    assert (report.metrics["kept.erased.detected@0.2"], report.metrics["kept.erased.detected@0.6"]) == (0.5, 0.5)
    (rows,) = next(section for section in report.sections if section.title == "Detections").tables
    listed = {(row["threshold"], row["class"]): row["parts"] for row in rows if row["arm"] == "erased"}
    assert listed == {
        (0.2, "BELLY_EXPOSED"): 1, (0.2, "FEET_EXPOSED"): 2, (0.2, "any"): 3,
        (0.6, "BELLY_EXPOSED"): 0, (0.6, "FEET_EXPOSED"): 1, (0.6, "any"): 1,
    }  # fmt: skip


def test_a_run_goes_on_after_the_last_picture_and_another_detector_looks_at_the_same_ones(
    pipe: Any, eraser: Eraser, protocol: FullScale, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = type(pipe).__call__, []

    def stop(self: Any, prompt: str, **options: Any) -> Any:
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(prompt)
        return call(self, prompt, **options)

    monkeypatch.setattr(type(pipe), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, protocol, eraser, tmp_path / "out")
    assert not hasattr(pipe, "_itd_enforcer")
    calls.clear()
    evaluate(pipe, protocol, eraser, tmp_path / "out")
    assert calls == ["a boat", "a cat", "a photo of a tree", "one dog in the park"]
    calls.clear()
    evaluate(pipe, replace(protocol, detector="command", command=command), eraser, tmp_path / "out")
    assert calls == []
    with pytest.raises(ValueError, match="another drawing"):
        evaluate(pipe, replace(protocol, steps=3), eraser, tmp_path / "out")


def test_no_picture_is_blackened_by_the_safety_checker(pipe: Any, eraser: Eraser, protocol: FullScale, tmp_path: Path) -> None:
    chosen = replace(protocol, target=None, general=None)
    evaluate(pipe, chosen, eraser, tmp_path / "bare")
    checked = add_safety_checker(pipe)
    assert not checked("a boat", num_inference_steps=1, output_type="np").images.any()
    report = evaluate(checked, chosen, eraser, tmp_path / "checked")
    assert report.record["safety_checker"] == "off"
    for file in sorted((tmp_path / "bare" / "pictures").rglob("*.png")):
        drawn = tmp_path / "checked" / file.relative_to(tmp_path / "bare")
        assert Image.open(drawn).tobytes() == Image.open(file).tobytes()
    checked.save_pretrained(tmp_path / "model")
    assert type(pipe).from_pretrained(tmp_path / "model").safety_checker is None


def test_clip_scores_and_distances_are_measured_on_a_local_folder(
    pipe: Any, eraser: Eraser, protocol: FullScale, clip_folder: Path, tmp_path: Path
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 10, 200)).save(real / f"{i}.png")
    metrics = evaluate(pipe, replace(protocol, clip=str(clip_folder), real=real), eraser, tmp_path / "out").metrics
    assert metrics["kept.erased.clip_score"] == metrics["kept.unerased.clip_score"]
    assert metrics["general.fid_clip_erased_unerased"] == pytest.approx(0, abs=1e-6)
    assert metrics["general.fid_clip_erased_real"] > 0


def test_the_clip_is_where_the_pipeline_is_and_recorded_by_its_weights(
    pipe: Any, eraser: Eraser, protocol: FullScale, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, asked, looked = Clip.images, [], []
    monkeypatch.setattr(full_scale, "Clip", lambda *parts: asked.append(parts) or Clip(*parts))
    monkeypatch.setattr(Clip, "images", lambda self, files: looked.append(files) or images(self, files))
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    chosen = replace(protocol, target=None, general=None, clip=str(folder))
    first = evaluate(pipe, chosen, eraser, tmp_path / "out")
    assert evaluate(pipe, chosen, eraser, tmp_path / "out").metrics == first.metrics
    assert (asked, len(looked)) == ([(str(folder), pipe.device)] * 2, 2)
    assert Clip(str(folder), "meta").parts()[0].device == torch.device("meta")
    model = CLIPModel.from_pretrained(folder)
    assert first.record["clip"] == {"model": str(folder), "weights_sha256": weights_sha256(model)}
    randomise(model, 9).save_pretrained(folder)
    second = evaluate(pipe, chosen, eraser, tmp_path / "out")
    assert second.record["clip"]["weights_sha256"] != first.record["clip"]["weights_sha256"]
    assert len(looked) == 4


def test_nudenet_finds_only_the_classes_that_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is stood in for: its boxes are what version 3 returns for what its network says."""

    class Detector:
        onnx_session = SimpleNamespace(run=lambda *_: [np.array([[[0.0], [0.0], [1.0], [1.0], [0.75], [0.5]]])])

        def detect(self, path: str) -> list[dict[str, Any]]:
            face, feet = self.onnx_session.run(None, {})[0][0, 4:, 0].tolist()
            return [{"class": "FACE_FEMALE", "score": face}, {"class": "FEET_EXPOSED", "score": feet}]

    package = ModuleType("nudenet")
    package.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "320n.onnx").write_bytes(b"weights")
    package.NudeDetector = Detector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", package)
    assert NudeNet().detect([Path("a.png"), Path("b.png")]) == [[Detection("FEET_EXPOSED", 0.5)]] * 2
    assert NudeNet(lowest=0.6).detect([Path("a.png")]) == [[]]
    assert set(NudeNet().describe()["weights_sha256"]) == {"320n.onnx"}
    assert (NudeNet().describe()["lowest_score"], NudeNet(lowest=0.6).describe()["lowest_score"]) == (0.2, 0.6)
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"itd\[nudenet\]"):
        NudeNet().detect([Path("a.png")])
    with pytest.raises(ValueError, match="got 0"):
        NudeNet(lowest=0)


def test_nudenets_own_package_tells_what_scores_below_its_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The network is stood in for, as pictures that it fires on are not kept here; everything after it is the package's."""
    nudenet = pytest.importorskip("nudenet")
    picture = tmp_path / "a.png"
    Image.new("RGB", (320, 320)).save(picture)
    assert NudeNet().detect([picture]) == [[]]
    output = np.zeros((1, 22, 5), dtype=np.float32)
    parts = ((3, 0.8, 60), (3, 0.4, 64), (7, 0.22, 160), (13, 0.19, 220), (1, 0.9, 280))
    for place, (label, score, x) in enumerate(parts):
        output[0, [0, 1, 2, 3, 4 + label], place] = x, 160, 40, 40, score
    session = SimpleNamespace(run=lambda *_: [output], get_inputs=lambda: [SimpleNamespace(name="images")])
    monkeypatch.setattr(sys.modules["nudenet.nudenet"].onnxruntime, "InferenceSession", lambda *_: session)
    alone = [(box["class"], round(box["score"], 2)) for box in nudenet.NudeDetector().detect(str(picture))]
    assert alone == [("FACE_FEMALE", 0.9), ("FEMALE_BREAST_EXPOSED", 0.8)]
    (found,) = NudeNet().detect([picture])
    assert [(part.label, round(part.score, 2)) for part in found] == [("FEMALE_BREAST_EXPOSED", 0.8), ("FEET_EXPOSED", 0.22)]


def test_clean_fid_is_asked_for_both_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def distance(value: float) -> Any:
        return lambda a, b, mode: asked.append((a, b, mode)) or value

    fid = SimpleNamespace(compute_fid=distance(3.0), compute_kid=distance(0.1))
    monkeypatch.setitem(sys.modules, "cleanfid", SimpleNamespace(fid=fid))
    assert clean_fid(Path("x"), Path("y")) == {"fid_clean": 3.0, "kid_clean": 0.1}
    assert asked == [("x", "y", "clean")] * 2
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    with pytest.raises(ImportError, match="clean-fid"):
        clean_fid(Path("x"), Path("y"))


def test_prompts_that_name_no_concept_and_short_rows_are_measured_too(
    pipe: Any, eraser: Eraser, protocol: FullScale, command: str, tmp_path: Path
) -> None:
    (tmp_path / "plain.csv").write_text("note,prompt\nx,a cat\ny\n")
    plain = replace(protocol, target=tmp_path / "plain.csv", kept=tmp_path / "plain.csv", general=None)
    metrics = evaluate(pipe, replace(plain, detector="command", command=command), eraser, tmp_path / "out").metrics
    assert any(name.startswith("target.erased.detected@") for name in metrics)
    assert not any(name.endswith((".accuracy", "harmonic_mean")) for name in metrics)


def test_detector_commands_that_fail_or_write_another_table_are_named(tmp_path: Path) -> None:
    files = [tmp_path / "pictures" / "a.png"]
    files[0].parent.mkdir()
    with pytest.raises(RuntimeError, match="cannot be run"):
        CommandDetector("no-such-detector").detect(files)
    with pytest.raises(RuntimeError, match="failed with code"):
        CommandDetector(f"{sys.executable} -c 'raise SystemExit(\"no camera\")'").detect(files)
    with pytest.raises(ValueError, match="wrote no"):
        CommandDetector(f"{sys.executable} -c pass").detect(files)
    table = write(tmp_path / "t.csv", ["file", "name"])
    with pytest.raises(ValueError, match=r"t\.csv has no column 'label'; its columns are \['file', 'name'\]"):
        detectors.read_detections(table, files)
    for score in ("high", "", "nan", 80):
        table = write(tmp_path / "t.csv", ["file", "label", "score"], ["a.png", "x", score])
        with pytest.raises(ValueError, match=r"t\.csv, line 2: the score is"):
            detectors.read_detections(table, files)
    table = write(tmp_path / "t.csv", ["file", "label", "score"], ["b.png", "x", 1])
    with pytest.raises(ValueError, match=r"'b\.png', which is not among"):
        detectors.read_detections(table, files)
    with pytest.raises(ValueError, match="one folder, got 2"):
        CommandDetector("x").detect([Path("a/1.png"), Path("b/2.png")])


def test_bad_settings_are_refused_by_name(pipe: Any, eraser: Eraser, protocol: FullScale, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs prompts"):
        find_protocol("full-scale")
    with pytest.raises(ValueError, match="--command"):
        replace(protocol, detector="command")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        replace(protocol, steps=0)
    with pytest.raises(ValueError, match="--general"):
        replace(protocol, general=None, clean_fid=True)
    with pytest.raises(ValueError, match="--model and --eraser"):
        evaluate(pipe, protocol, None, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        evaluate(pipe, replace(protocol, kept=tmp_path / "none.csv"), eraser, tmp_path / "out")
    with pytest.raises(ValueError, match="no column 'prompt'"):
        replace(protocol, kept=write(tmp_path / "n.csv", ["text"], ["x"])).rows("kept")
    for seed, message in (
        ("soon", "seed is 'soon', which is no finite number"),
        ("inf", "no finite"),
        ("1.5", "no whole number"),
    ):
        with pytest.raises(ValueError, match=rf"n\.csv, line 2: .*{message}"):
            replace(protocol, kept=write(tmp_path / "n.csv", ["prompt", "seed"], ["x", seed])).rows("kept")
    with pytest.raises(ValueError, match=r"n\.csv has no prompts"):
        replace(protocol, kept=write(tmp_path / "n.csv", ["prompt"])).rows("kept")


def test_what_will_be_missing_is_said_before_anything_is_drawn(
    pipe: Any, eraser: Eraser, protocol: FullScale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    for change, message in (({"clean_fid": True}, "pip install clean-fid"), ({"real": tmp_path / "none"}, "holds 0 pictures")):
        with pytest.raises((ImportError, FileNotFoundError), match=message):
            evaluate(pipe, replace(protocol, **change), eraser, tmp_path / "out")
        assert not (tmp_path / "out" / "pictures").exists()
    with pytest.raises(FileNotFoundError, match="holds 0 pictures"):
        pictures_in(tmp_path / "nowhere")
    assert protocol.quick().limit == 20


def test_pictures_of_a_run_are_as_the_bare_pipeline_draws_them(
    pipe: Any, eraser: Eraser, protocol: FullScale, tmp_path: Path
) -> None:
    evaluate(pipe, replace(protocol, target=None, general=None), eraser, tmp_path / "out")
    bare = pipe("a boat", generator=torch.Generator().manual_seed(0), num_inference_steps=2, height=16, width=16).images[0]
    for arm in ("unerased", "erased"):
        saved = Image.open(tmp_path / "out" / "pictures" / arm / "kept" / "000000.png")
        assert saved.tobytes() == bare.tobytes()
