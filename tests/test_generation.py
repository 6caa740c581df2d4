"""What `itd generate` writes into its folder, and what it leaves there. Drawing itself is tested by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from itd.generation import Picture, write_pictures


def pictures(*prompts: str) -> Iterator[Picture]:
    for prompt in prompts:
        yield Picture(Image.new("RGB", (2, 2)), prompt, 0, None)


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
