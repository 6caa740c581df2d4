"""Scripts that call detectors of other environments, with their packages stood in for."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.detectors import giphy
from itd.evaluation.detectors import CommandDetector, read_detections
from itd.metrics.detection import Detection

SCRIPT = Path(giphy.__file__)
LABELS = ("Brad_Pitt_[m.0c6qh]", "Adele_[m.02z4b_8]")


class FaceDetector:
    """A picture's mean red says how many faces it has."""

    def __init__(self, data_dir: str, margin: float = 0.1, use_cuda: bool = False) -> None:
        assert margin == 0.2

    def perform_single(self, image: Any) -> list[Any]:
        assert image.shape == (8, 8, 3)
        return [(image, np.zeros(5))] * int(image[..., 0].mean())


class Labels:
    def __init__(self, resources_path: str) -> None:
        assert (Path(resources_path) / "face_recognition" / "labels.csv").is_file()


class FaceRecognizer:
    """Like GIPHY's: per person the likeliest names with their probabilities, and how sure it is that the person is known."""

    def __init__(self, labels: Labels, resources_path: str, top_n: int = 5, use_cuda: bool = False) -> None:
        assert (Path(resources_path) / os.environ["APP_RECOGNITION_WEIGHTS_FILE"]).is_file()
        self.top_n = top_n

    def perform(self, faces: list[Any]) -> list[Any]:
        assert all(face.shape == (224, 224, 3) for face in faces)
        names = [[(LABELS[i % 2], np.float32(0.75)), (LABELS[1 - i % 2], np.float32(0.25))] for i in range(len(faces))]
        return [(ranked[: self.top_n], 0.9) for ranked in names]


@pytest.fixture
def resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in giphy.FILES:
        path = tmp_path / "resources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv("APP_RECOGNITION_WEIGHTS_FILE", "somewhere/else.pkl")
    return tmp_path / "resources"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    (tmp_path / "pictures").mkdir()
    files = [tmp_path / "pictures" / f"{n_faces}.png" for n_faces in range(3)]
    for n_faces, file in enumerate(files):
        Image.new("RGB", (8, 8), (n_faces, 0, 0)).save(file)
    (tmp_path / "pictures" / "notes.txt").touch()
    return files


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "model_training.helpers.labels": {"Labels": Labels},
        "model_training.helpers.face_recognizer": {"FaceRecognizer": FaceRecognizer},
        "model_training.preprocessors.face_detection.face_detector": {"FaceDetector": FaceDetector},
        "model_training.utils": {"preprocess_image": lambda image, size: np.resize(image, (size, size, 3))},
        "skimage": {"io": type("io", (), {"imread": staticmethod(lambda path: np.asarray(Image.open(path)))})},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("package")
def test_giphys_table_has_the_likeliest_celebrity_of_every_person(resources: Path, pictures: list[Path]) -> None:
    table = resources.parent / "table.csv"
    giphy.main(["--resources", str(resources), str(pictures[0].parent), str(table)])
    brad, adele = Detection("Brad Pitt", 0.75), Detection("Adele", 0.75)
    assert read_detections(table, pictures) == [[], [brad], [brad, adele]]


def test_giphy_says_what_is_missing(resources: Path, pictures: list[Path]) -> None:
    command = f"{sys.executable} {SCRIPT} --resources {resources}"
    with pytest.raises(RuntimeError, match="celeb-detection-oss is not installed in"):
        CommandDetector(command).detect(pictures)
    (resources / giphy.WEIGHTS).unlink()
    with pytest.raises(RuntimeError, match=r"lacks face_recognition/best_model_states\.pkl"):
        CommandDetector(command).detect(pictures)


def test_giphy_needs_nothing_of_itd_and_runs_on_the_python_of_its_detector() -> None:
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in (*names, *modules)} == {
        "argparse", "csv", "os", "sys", "pathlib", "model_training", "skimage",
    }  # fmt: skip
