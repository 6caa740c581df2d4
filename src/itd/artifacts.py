"""Artifacts on disk: a folder of `config.json` and `*.safetensors`, hashed, written whole or not at all. Never pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "config.json"
SCHEMA_VERSION = 1


def itd_version() -> str:
    try:
        return version("itd")
    except PackageNotFoundError:
        return "unknown"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder beside `folder`, then rename it; nothing half-written stays.

    An artifact or an empty folder at `folder` is replaced once the new one is whole; anything else there is an error.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).exists())):
        raise ValueError(f"{target} holds something that is not an artifact; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    old = target.with_name(f"{temporary.name}.old")
    try:
        temporary.mkdir()
        write(temporary)
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save_artifact(folder: str | Path, kind: str, config: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors as `{name}.safetensors` and a `config.json` with their hashes."""

    def write(temporary: Path) -> None:
        hashes = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            hashes[path.name] = sha256_of(path)
        header = {"kind": kind, "schema_version": SCHEMA_VERSION, "itd_version": itd_version(), "sha256": hashes}
        (temporary / CONFIG).write_text(json.dumps(header | dict(config), indent=2, ensure_ascii=False) + "\n")

    write_folder(folder, write)


def read_config(folder: str | Path, kind: str, keys: Iterable[str]) -> dict[str, Any]:
    """Read and check `config.json`: kind, schema version, no unknown or missing keys.

    Raises:
        FileNotFoundError: there is no artifact.
        ValueError: it is not of this kind or not readable; the message names file and mend.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} at {folder}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the {kind} again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object; save the {kind} again")
    if config.get("kind") != kind:
        raise ValueError(f"{path} describes a {config.get('kind')!r}, not a {kind!r}")
    if config.get("schema_version") != SCHEMA_VERSION:
        found = config.get("schema_version")
        raise ValueError(f"{path} has schema_version {found!r}, this itd reads {SCHEMA_VERSION}; save it with this version")
    require_keys(path, config, {"kind", "schema_version", "itd_version", "sha256", *keys})
    return config


def require_keys(path: Path, found: Any, expected: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise ValueError naming the file unless `found` has these keys and no others."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected an object with the keys {sorted(expected)}, found {found!r}; save it again")
    missing, unknown = set(expected) - set(found), set(found) - {*expected, *optional}
    if missing or unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}; save it again")


@contextmanager
def reading(folder: str | Path) -> Generator[None, None, None]:
    """Turn what values of a wrong type, shape or range raise into a ValueError that names the artifact."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is malformed: {error}; save it again") from error


def read_tensors(
    folder: str | Path, config: Mapping[str, Any], name: str, keys: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Read `{name}.safetensors` after checking its hash; tensors are memory-mapped.

    Raises:
        ValueError: the file is missing, truncated or altered, or does not hold the tensors `keys`.
    """
    path = Path(folder) / f"{name}.safetensors"
    require_keys(Path(folder) / CONFIG, config["sha256"], {path.name})
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole folder, or save it again")
    if sha256_of(path) != config["sha256"][path.name]:
        raise ValueError(f"{path} is truncated or altered: its sha256 is not the one in {CONFIG}; copy or save it again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); save it again") from error
    require_keys(path, tensors, keys, optional)
    return tensors


def artifact_sha256(config: Mapping[str, Any]) -> str:
    """Return one hash for an artifact: that of its files' hashes."""
    return hashlib.sha256(json.dumps(config["sha256"], sort_keys=True).encode()).hexdigest()
