"""What every system is asked to do. Imports nothing but torch: the other libraries' environments have no `itd`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A top-k autoencoder to train, step by step, on the same activations."""

    activations: str
    """File of activations, (n, d_model) fp32, as numpy writes it. The last `n_held` are for measuring only."""
    d_model: int
    n_latents: int
    k: int
    tokens: int
    """Activations a step."""
    n_steps: int
    threads: int
    n_held: int = 2048

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises: a tenth of them, since a run is far shorter than the libraries expect."""
        return max(1, self.n_steps // 10)


class System(Protocol):
    """A system under test."""

    def step(self, x: Tensor) -> None:
        """Take one training step on activations (tokens, d_model)."""
        ...

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return x_hat of the same shape."""
        ...


def import_without_init(package: str, module: str) -> Any:
    """Import a module of a package whose `__init__` needs libraries that training does not."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{package} is not installed in {sys.prefix}")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    return importlib.import_module(f"{package}.{module}")
