"""What `itd generate` writes into its folder, and what it leaves there. Drawing itself is tested by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from PIL import Image

from itd.attachment import Attachment
from itd.gate import Decision, Meaning, Scores
from itd.generation import Picture, gate_of, gate_row, picture_lines, write_pictures
from itd.hooks import HookPoint
from itd.kernels import SparseCodes


def pictures(*prompts: str) -> Iterator[Picture]:
    for prompt in prompts:
        yield Picture(Image.new("RGB", (2, 2)), prompt, 0, None)


def decision(concepts: tuple[int, ...], scores: tuple[float, ...], meaning: Meaning | None = None) -> Decision:
    """Return what the gate on features says, and then a gate on the whole prompt."""
    codes = SparseCodes(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    found = Scores(torch.tensor([scores]), torch.tensor(scores), codes)
    first = Decision(bool(concepts), concepts, (0.5,) * len(scores), lambda: found)
    return first if meaning is None else first.with_meaning(meaning)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_replaces_the_pictures_of_the_one_before_and_no_others(tmp_path: Path) -> None:
    write_pictures(pictures("a cat", "a dog"), tmp_path, 2)
    (tmp_path / "2024-holiday.png").touch()
    write_pictures(pictures("an owl"), tmp_path, 1)
    assert names_in(tmp_path) == ["000-an-owl.png", "2024-holiday.png", "metadata.json"]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "000-holiday.png").touch()
    with pytest.raises(ValueError, match="holds something other than pictures that `itd generate` drew; name another folder"):
        write_pictures(pictures("a cat"), tmp_path, 1)
    assert names_in(tmp_path) == ["000-holiday.png"]


@pytest.mark.parametrize("content", [{"file": "000-a-cat.png"}, ["000-a-cat.png"], [{"file": "../000-a-cat.png"}], [{}]])
def test_metadata_of_something_else_deletes_nothing(tmp_path: Path, content: object) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for folder in (tmp_path, out):
        (folder / "000-a-cat.png").touch()
    (out / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"metadata\.json is not a list of pictures that `itd generate` drew"):
        write_pictures(pictures("a dog"), out, 1)
    assert (names_in(tmp_path), names_in(out)) == (["000-a-cat.png", "out"], ["000-a-cat.png", "metadata.json"])


# What is said of the gates


def test_concepts_are_those_of_any_gate_each_once() -> None:
    names, meaning = ("cat", "dog"), Meaning(("dog", "cat"), 0.75, 0.45, "pooled")
    assert gate_row(decision((), (0.25, 0.0), meaning), names) == {
        "fired": True, "score": 0.25, "threshold": 0.5, "concepts": ["dog", "cat"],
        "meaning": {"concepts": ("dog", "cat"), "score": 0.75, "threshold": 0.45, "by": "pooled"},
    }  # fmt: skip
    both = gate_row(decision((0,), (0.75, 0.0), meaning), names)
    assert both["concepts"] == ["cat", "dog"]
    alone = gate_row(decision((0,), (0.75, 0.0)), names)
    assert alone == {"fired": True, "score": 0.75, "threshold": 0.5, "concepts": ["cat"]}


def test_a_prompt_that_is_encoded_in_parts_fires_if_one_of_them_does() -> None:
    said = [decision(found, (score,)) for found, score in (((), 0.25), ((0,), 0.75))]
    eraser = SimpleNamespace(hook_point=HookPoint("text_encoder", "layers.1"), names=("cat",))
    gate = gate_of([cast("Attachment", SimpleNamespace(eraser=eraser, decisions=said))])
    assert gate is not None
    assert (gate["fired"], gate["concepts"]) == (True, ["cat"])
    assert [(part["encoder"], part["score"]) for part in gate["parts"]] == [("text_encoder", 0.25), ("text_encoder", 0.75)]
    assert gate_of([]) is None


def test_the_line_of_a_picture_names_what_another_gate_found() -> None:
    passing, firing = (decision((), (0.25,), Meaning(found, 0.5, 0.45, "draft")) for found in ((), ("cat",)))
    rows = [{"file": "0.png", "gate": each and gate_row(each, ("cat",))} for each in (None, passing, firing)]
    assert picture_lines(rows) == ["0.png", "0.png  passes", "0.png  fires: cat"]
