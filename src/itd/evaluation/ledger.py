"""What a protocol has computed so far, on disk, one file per cell, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from itd.activations import write_tensors

IDENTITY = "identity.json"


def plain_json(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists, keys as text, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(key: str) -> str:
    """Return a file name for a key: its words and, as words may fall together, a few characters of its hash."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[:80]
    return f"{words}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


class Ledger:
    """Cells of one run. `identity` says what the run depends on: protocol, settings, hashes of weights.

    Raises:
        ValueError: the folder holds the cells of a run with another identity.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = Path(folder), plain_json(identity)
        path = self.folder / IDENTITY
        if path.is_file():
            self.require_same(json.loads(path.read_text(encoding="utf-8")), path)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.identity)

    def require_same(self, found: Any, path: Path) -> None:
        mine = self.identity
        keys = [key for key in {**found, **mine} if found.get(key) != mine.get(key)] if isinstance(found, dict) else ["all"]
        if keys:
            was, now = (found.get(keys[0]), mine.get(keys[0])) if isinstance(found, dict) else (found, mine)
            raise ValueError(
                f"{path.parent} holds results with another {keys[0]} ({was!r}, now {now!r}): name another folder, or delete it"
            )

    def cell(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of a cell, computed once. What comes back has been through JSON also the first time."""
        path = self.folder / f"{file_name(key)}.json"
        if not path.is_file():
            write_json(path, {"key": key, "value": plain_json(compute())})
        try:
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it is computed again") from error

    def tensors(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a cell, computed once."""
        path = self.folder / f"{file_name(key)}.safetensors"
        if not path.is_file():
            write_tensors(path, {name: value.contiguous() for name, value in compute().items()}, {"key": key})
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it is computed again") from error

    def has(self, key: str) -> bool:
        """Tell whether a cell was computed."""
        return any((self.folder / f"{file_name(key)}.{ending}").is_file() for ending in ("json", "safetensors"))


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary file, then rename."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
