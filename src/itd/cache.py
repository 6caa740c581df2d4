"""Keep what was used last, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import RLock
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """A mapping that forgets what was not used for longest when its values exceed `max_bytes`.

    `n_bytes`: what is held now, as it was stated by `put`. A value larger than the whole cache is not kept. Threads may share
    one.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"a cache holds 0 bytes or more, got {max_bytes}")
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=RLock())

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable) -> V | None:
        """Return the value and keep it for longer; None if it is not there."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, n_bytes: int) -> None:
        """Keep a value that takes `n_bytes`, and forget others to make room."""
        with self._lock:
            self.discard(key)
            self._values[key] = (value, n_bytes)
            self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self._values.popitem(last=False)[1][1]

    def discard(self, key: Hashable) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self.n_bytes -= self._values.pop(key, (None, 0))[1]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self.n_bytes = 0
