"""Artifacts on disk: a folder of `config.json` and `*.safetensors`, hashed, written whole or not at all. Never pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG = "config.json"
STAMP = ".verified.json"
"""Beside large files: which of them were hashed, and how the file system described them then."""
SCHEMA_VERSION = 1
ALWAYS_HASHED_BYTES = 64 * 2**20
"""Files up to this size are hashed whenever they are read; it takes a tenth of a second."""
SETTLED_NS = 2 * 10**9
"""A file whose last change is younger than this when it is hashed gets no stamp: clocks of file systems are coarse."""
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def itd_version() -> str:
    return version_of("itd", "unknown")


def version_of(package: str, otherwise: str = "not installed") -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def versions() -> dict[str, str]:
    """Return the versions of itd, Python and the libraries that decide what comes out."""
    return {"itd": itd_version(), "python": platform.python_version(), **{name: version_of(name) for name in LIBRARIES}}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """Return one hash of named tensors' bits, in whatever order they are given, and of a text before them."""
    found = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + bytes_of(value))
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's bits."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Reading text and JSON


def read_text(path: str | Path, mend: str = "save it as UTF-8") -> str:
    """Return the text of a UTF-8 file, without a byte order mark and with the line ends that it has.

    Raises:
        ValueError: it is not UTF-8; the message names file, line and mend.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 in line {line} ({error.reason}); {mend}") from error


def read_json(path: Path, mend: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is not UTF-8 or not JSON; the message names file, place and mend.
    """
    try:
        return json.loads(read_text(path, mend))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {mend}") from error


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """Return what a JSON file holds, which must be an object.

    Raises:
        ValueError: see `read_json`; or it is a list, a number or a text.
    """
    content = read_json(path, mend)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; {mend}")
    return content


# Artifacts


def require_free(folder: Path, kind: str) -> None:
    """Raise ValueError unless the folder is new, empty, or an artifact of this kind, which may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / CONFIG
    if not path.is_file() or read_object(path, "name another folder").get("kind") != kind:
        raise ValueError(f"{folder} holds something that is no {kind}; name another folder")


def write_folder(folder: str | Path, kind: str, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder beside `folder`, then rename it; nothing half-written stays.

    An artifact of the same kind or an empty folder at `folder` is replaced once the new one is whole.

    Raises:
        ValueError: `folder` holds anything else.
    """
    target = Path(folder)
    require_free(target, kind)
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


def save_artifact(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    version: int = SCHEMA_VERSION,
) -> None:
    """Write tensors as `{name}.safetensors` and a `config.json` with their hashes.

    Raises:
        ValueError: see `write_folder`.
    """

    def write(temporary: Path) -> None:
        hashes = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            hashes[path.name] = sha256_of(path)
            stamp_verified(path, hashes[path.name])
        header = {"kind": kind, "schema_version": version, "itd_version": itd_version(), "sha256": hashes}
        text = json.dumps(header | dict(config), indent=2, ensure_ascii=False) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")

    write_folder(folder, kind, write)


def read_config(
    folder: str | Path,
    kind: str,
    keys: Iterable[str],
    versions: Iterable[int] = (SCHEMA_VERSION,),
    optional: Iterable[str] = (),
) -> dict[str, Any]:
    """Read and check `config.json`: kind, one of the schema `versions`, no unknown or missing keys.

    `optional`: keys that earlier versions did not have.

    Raises:
        FileNotFoundError: there is no artifact.
        ValueError: it is not of this kind or not readable; the message names file and mend.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} at {folder}: {CONFIG} is missing")
    config = read_object(path, f"save the {kind} again")
    if config.get("kind") != kind:
        raise ValueError(f"{path} describes a {config.get('kind')!r}, not a {kind!r}")
    if config.get("schema_version") not in tuple(versions):
        found, readable = config.get("schema_version"), ", ".join(map(str, versions))
        raise ValueError(f"{path} has schema_version {found!r}, this itd reads {readable}; save it with this version")
    require_keys(path, config, {"kind", "schema_version", "itd_version", "sha256", *keys}, optional)
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
    """Read `{name}.safetensors` after checking its hash.

    Raises:
        ValueError: the file is missing, truncated or altered, or does not hold the tensors `keys`.
    """
    path = verified_path(folder, config, name)
    with safetensors_errors(path):
        tensors = load_file(path)
    require_keys(path, tensors, keys, optional)
    return tensors


class MappedTensors(NamedTuple):
    """Tensors whose bytes stay in their file until they are used, and the mapping that holds them."""

    tensors: dict[str, Tensor]
    mapping: mmap.mmap

    def release(self) -> None:
        """Give the memory of what was read back to the system; the file is read again where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def map_tensors(
    folder: str | Path, config: Mapping[str, Any], name: str, keys: Iterable[str], verify: bool | None = None
) -> MappedTensors:
    """Map `{name}.safetensors` into memory: nothing but the header is read, and what is used later is read then.

    `verify`: see `require_unaltered`. Writing to the tensors does not change the file.

    Raises:
        ValueError: the file is missing, truncated or altered, or does not hold the tensors `keys`.
    """
    path = verified_path(folder, config, name, verify)
    with safetensors_errors(path), safe_open(path, framework="pt"):
        pass  # the library checks the header: sizes, offsets, overlaps
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8:start])
    header.pop("__metadata__", None)
    require_keys(path, header, keys)
    tensors: dict[str, Tensor] = {}
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} is of type {entry['dtype']}, not one of {sorted(DTYPES)}; save it again")
        tensors[key] = view_bytes(mapping, start + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])
    return MappedTensors(tensors, mapping)


def view_bytes(mapping: mmap.mmap, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Return the tensor that lies at `offset`."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).reshape(shape)


@contextmanager
def safetensors_errors(path: Path, mend: str = "save it again") -> Generator[None, None, None]:
    """Turn what a damaged safetensors file raises into a ValueError that names it and the mend."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); {mend}") from error


def verified_path(folder: str | Path, config: Mapping[str, Any], name: str, verify: bool | None = None) -> Path:
    """Return the path of a file of an artifact after checking that it is the one that was saved."""
    path = Path(folder) / f"{name}.safetensors"
    require_keys(Path(folder) / CONFIG, config["sha256"], {path.name})
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole folder, or save it again")
    require_unaltered(path, config["sha256"][path.name], verify)
    return path


# Hashes


def require_unaltered(path: Path, sha256: str, verify: bool | None = None) -> None:
    """Raise ValueError unless the file has this hash.

    A large file that was hashed before, and that the file system says is still the same one, unchanged since, is not
    hashed again: a stamp beside it keeps what was seen. This finds damage by whatever writes to files. It does not find
    a disk that changes bits by itself: `verify=True` always hashes. `verify=False` never does.
    """
    if verify is False or (verify is None and is_stamped(path, sha256)):
        return
    if sha256_of(path) != sha256:
        raise ValueError(f"{path} is truncated or altered: its sha256 is not the one in {CONFIG}; copy or save it again")
    stamp_verified(path, sha256)


def identity_of(path: Path) -> dict[str, int]:
    """Return how the file system describes a file; a copy, a write or a replacement gives another description."""
    found = path.stat()
    return {
        "size": found.st_size, "inode": found.st_ino, "device": found.st_dev,
        "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns,
    }  # fmt: skip


def read_stamps(folder: Path) -> dict[str, Any]:
    try:
        stamps = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def is_stamped(path: Path, sha256: str) -> bool:
    """Tell whether the file was seen to have this hash and was not touched since."""
    return read_stamps(path.parent).get(path.name) == {"sha256": sha256, **identity_of(path)}


def stamp_verified(path: Path, sha256: str) -> None:
    """Note that the file, as it is now, has this hash. Small files, and those just written, are not noted."""
    identity = identity_of(path)
    settled = time.time_ns() - max(identity["mtime_ns"], identity["ctime_ns"]) > SETTLED_NS
    if identity["size"] <= ALWAYS_HASHED_BYTES or not settled:
        return
    stamps = read_stamps(path.parent) | {path.name: {"sha256": sha256, **identity}}
    temporary = path.with_name(f"{STAMP}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(json.dumps(stamps, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path.parent / STAMP)
    except OSError:
        temporary.unlink(missing_ok=True)
        logger.info("%s cannot be stamped as verified; it is hashed each time", path)


def artifact_sha256(config: Mapping[str, Any]) -> str:
    """Return one hash for an artifact: that of its files' hashes."""
    return hashlib.sha256(json.dumps(config["sha256"], sort_keys=True).encode()).hexdigest()
