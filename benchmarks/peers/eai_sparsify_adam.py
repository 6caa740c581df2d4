"""EleutherAI's sparsify with Adam."""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.eai_sparsify import Sparsify
from benchmarks.peers.problem import Problem, System


def make(problem: Problem, x: Tensor) -> System:
    return Sparsify(problem, x, "adam")
