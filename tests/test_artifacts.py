from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from itd import artifacts
from itd.artifacts import (
    STAMP,
    artifact_sha256,
    map_tensors,
    read_config,
    read_tensors,
    read_text,
    save_artifact,
    write_folder,
)

TENSORS = {"part": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}}


def save(folder: Path, value: int = 1) -> None:
    save_artifact(folder, "thing", {"value": value}, TENSORS)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = read_config(folder, "thing", ("value",))
    return config, read_tensors(folder, config, "part", ("a", "b"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of `config.json`; None deletes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_an_artifact_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "new" / "thing")
    config, tensors = read(tmp_path / "new" / "thing")
    assert config["value"] == 1
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS["part"].items())


def test_an_artifact_is_a_config_and_safetensors_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["config.json", "part.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_the_config_states_the_hash_of_every_file(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    config, _ = read(tmp_path / "thing")
    bits = (tmp_path / "thing" / "part.safetensors").read_bytes()
    assert config["sha256"] == {"part.safetensors": hashlib.sha256(bits).hexdigest()}


def test_the_hash_of_an_artifact_depends_on_its_tensors_only(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", value=2)
    save_artifact(tmp_path / "c", "thing", {"value": 1}, {"part": {"a": torch.ones(2), "b": torch.ones(1)}})
    hashes = [artifact_sha256(read_config(tmp_path / name, "thing", ("value",))) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


# Writing


def test_an_artifact_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    save(tmp_path / "thing", value=1)
    (tmp_path / "thing" / "leftover.txt").touch()
    save(tmp_path / "thing", value=2)
    assert read(tmp_path / "thing")[0]["value"] == 2
    assert not (tmp_path / "thing" / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_an_artifact_is_not_replaced(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "thesis"
    if kind == "folder":
        place.mkdir()
    file = place / "chapter.txt" if kind == "folder" else place
    file.write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis (is a file; name a|holds something that is no thing; name another) folder"):
        save(place)
    assert file.read_text() == "years of work"


def test_an_artifact_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    with pytest.raises(ValueError, match="thing holds something that is no other; name another folder"):
        save_artifact(tmp_path / "thing", "other", {"value": 1}, TENSORS)
    assert read(tmp_path / "thing")[0]["kind"] == "thing"


@pytest.mark.parametrize("at", ["tensors", "config", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_keeps_the_old_artifact_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, existing: bool
) -> None:
    if existing:
        save(tmp_path / "thing", value=1)
    real_write, real_replace = Path.write_text, Path.replace

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    def write_or_fail(path: Path, text: str, **kwargs: Any) -> int:
        real_write(path, text[:10], **kwargs)
        raise OSError(28, "No space left on device")

    def replace_or_fail(path: Path, target: Path) -> Path:
        if (
            target.name == "thing"
            and (path / "config.json").exists()
            and json.loads((path / "config.json").read_text())["value"] == 2
        ):
            raise OSError(28, "No space left on device")
        return real_replace(path, target)

    with monkeypatch.context() as patch:
        if at == "tensors":
            patch.setattr(artifacts, "save_file", full)
        elif at == "config":
            patch.setattr(Path, "write_text", write_or_fail)
        else:
            patch.setattr(Path, "replace", replace_or_fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "thing", value=2)
    assert [path.name for path in tmp_path.iterdir()] == (["thing"] if existing else [])
    if existing:
        assert read(tmp_path / "thing")[0]["value"] == 1
    save(tmp_path / "thing", value=2)
    assert read(tmp_path / "thing")[0]["value"] == 2


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "thing", "thing", write)
    assert list(tmp_path.iterdir()) == []


# Reading


def test_a_folder_without_an_artifact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no thing at .*: config\.json is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "describes a 'other', not a 'thing'"),
        ({"kind": None}, "describes a None, not a 'thing'"),
        ({"schema_version": 99}, "has schema_version 99, this itd reads 1"),
        ({"typo": 1}, r"unknown keys \['typo'\], missing keys \[\]; save it again"),
        ({"value": None}, r"missing keys \['value'\]"),
        ({"sha256": None}, r"missing keys \['sha256'\]"),
        ({"sha256": "text"}, r"expected an object with the keys \['part\.safetensors'\], found 'text'"),
        ({"sha256": {}}, r"missing keys \['part\.safetensors'\]"),
        ({"sha256": {"part.safetensors": "0"}}, "is truncated or altered"),
    ],
)
def test_an_altered_config_is_an_error_that_names_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / "thing")
    edit_config(tmp_path / "thing", **changes)
    with pytest.raises(ValueError, match=rf"/thing/.*{message}"):
        read(tmp_path / "thing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"kind": "thi', "not valid JSON"),
        (b'{\n"kind": "\xff"}', "not UTF-8 in line 2"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
    ],
)
def test_a_config_that_is_no_object_is_an_error_that_names_the_file(tmp_path: Path, text: bytes, message: str) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"thing/config\.json is {message}.*save the thing again"):
        read(tmp_path / "thing")


def test_text_is_read_without_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("un bébé\r\n".encode("utf-8-sig"))
    assert read_text(path) == "un bébé\r\n"
    path.write_bytes(b"a cat\na dog\n" + "un bébé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 in line 3 \(.*\); save it as UTF-8"):
        read_text(path)


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "thing")
    path = tmp_path / "thing" / "part.safetensors"
    bits = path.read_bytes()
    path.write_bytes({"truncated": bits[:-3], "altered": bits[:-1] + bytes([bits[-1] ^ 1]), "emptied": b""}[damage])
    with pytest.raises(ValueError, match=r"part\.safetensors is truncated or altered.*copy or save it again"):
        read(tmp_path / "thing")


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / "part.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part\.safetensors is missing; copy the whole folder"):
        read(tmp_path / "thing")


def test_a_file_that_is_not_safetensors_is_an_error_even_if_its_hash_is_right(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / "part.safetensors").write_bytes(b"not tensors")
    edit_config(tmp_path / "thing", sha256={"part.safetensors": hashlib.sha256(b"not tensors").hexdigest()})
    with pytest.raises(ValueError, match=r"part\.safetensors is not a safetensors file"):
        read(tmp_path / "thing")


@pytest.mark.parametrize(("keys", "message"), [(("a",), r"unknown keys \['b'\]"), (("a", "b", "c"), r"missing keys \['c'\]")])
def test_the_tensors_must_be_those_that_are_expected(tmp_path: Path, keys: tuple[str, ...], message: str) -> None:
    save(tmp_path / "thing")
    config = read_config(tmp_path / "thing", "thing", ("value",))
    with pytest.raises(ValueError, match=rf"part\.safetensors: .*{message}"):
        read_tensors(tmp_path / "thing", config, "part", keys)


def test_an_optional_tensor_may_be_there_or_not(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    config = read_config(tmp_path / "thing", "thing", ("value",))
    assert set(read_tensors(tmp_path / "thing", config, "part", ("a",), ("b", "c"))) == {"a", "b"}


# Mapping, and hashing large files once


def map_part(folder: Path, **options: Any) -> artifacts.MappedTensors:
    return map_tensors(folder, read_config(folder, "thing", ("value",)), "part", ("a", "b"), **options)


def test_mapped_tensors_are_those_that_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(5), "c": torch.randn(4).half(), "empty": torch.zeros(0, 3)}
    save_artifact(tmp_path / "thing", "thing", {"value": 1}, {"part": tensors})
    config = read_config(tmp_path / "thing", "thing", ("value",))
    mapped, read = (function(tmp_path / "thing", config, "part", tensors) for function in (map_tensors, read_tensors))
    for name, value in tensors.items():
        assert torch.equal(mapped.tensors[name], value)
        assert torch.equal(read[name], value)
        assert mapped.tensors[name].dtype == value.dtype
    mapped.release()
    assert torch.equal(mapped.tensors["a"], tensors["a"]), "what was given back is read again"


def test_writing_to_a_mapped_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    before = (tmp_path / "thing" / "part.safetensors").read_bytes()
    map_part(tmp_path / "thing").tensors["a"].zero_()
    assert (tmp_path / "thing" / "part.safetensors").read_bytes() == before


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Treat every file as large and as written long ago; list the files that are hashed."""
    names: list[str] = []
    real = artifacts.sha256_of
    monkeypatch.setattr(artifacts, "ALWAYS_HASHED_BYTES", -1)
    monkeypatch.setattr(artifacts, "SETTLED_NS", -(10**18))
    monkeypatch.setattr(artifacts, "sha256_of", lambda path: names.append(path.name) or real(path))
    return names


def test_a_large_file_that_nobody_touched_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    save(tmp_path / "thing")
    assert hashed == ["part.safetensors"]
    for _ in range(2):
        map_part(tmp_path / "thing")
        read(tmp_path / "thing")
    assert hashed == ["part.safetensors"]
    map_part(tmp_path / "thing", verify=True)
    assert len(hashed) == 2


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_large_file_that_was_changed_is_found(tmp_path: Path, hashed: list[str], size: str) -> None:
    save(tmp_path / "thing")
    path = tmp_path / "thing" / "part.safetensors"
    bits = path.read_bytes()
    path.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]) + (b"" if size == "same" else b"0"))
    with pytest.raises(ValueError, match=r"part\.safetensors is truncated or altered"):
        map_part(tmp_path / "thing")
    assert not path.with_name(STAMP).exists() or not artifacts.is_stamped(path, artifacts.sha256_of(path))


def test_a_stamp_does_not_hold_for_a_copy_or_another_hash(tmp_path: Path, hashed: list[str]) -> None:
    save(tmp_path / "thing")
    shutil.copytree(tmp_path / "thing", tmp_path / "copy")
    map_part(tmp_path / "copy")
    assert len(hashed) == 2
    edit_config(tmp_path / "thing", sha256={"part.safetensors": "0" * 64})
    with pytest.raises(ValueError, match="is truncated or altered"):
        map_part(tmp_path / "thing")


@pytest.mark.parametrize("text", ["", "[]", '{"part.safetensors": 3}', '{"part.safetensors": {"sha256": "0"}}'])
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, hashed: list[str], text: str) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / STAMP).write_text(text)
    map_part(tmp_path / "thing")
    assert len(hashed) == 2


def test_files_that_are_small_or_just_written_get_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "small")
    monkeypatch.setattr(artifacts, "ALWAYS_HASHED_BYTES", -1)
    monkeypatch.setattr(artifacts, "SETTLED_NS", 10**18)
    save(tmp_path / "fresh")
    assert not any(tmp_path.rglob(STAMP))


def test_a_folder_that_cannot_be_written_to_is_hashed_each_time(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / STAMP).unlink()

    def refuse(path: Path, text: str, **options: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    for _ in range(2):
        map_part(tmp_path / "thing")
    assert len(hashed) == 3


def test_a_mapped_file_that_is_not_safetensors_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "thing")
    (tmp_path / "thing" / "part.safetensors").write_bytes(b"not tensors")
    edit_config(tmp_path / "thing", sha256={"part.safetensors": hashlib.sha256(b"not tensors").hexdigest()})
    with pytest.raises(ValueError, match=r"part\.safetensors is not a safetensors file"):
        map_part(tmp_path / "thing")
