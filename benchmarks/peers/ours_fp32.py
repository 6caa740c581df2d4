"""`itd`'s trainer without half precision anywhere: no screening, moments in fp32."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from benchmarks.peers.ours import Ours, settings_for
from benchmarks.peers.problem import Problem, System


def make(problem: Problem, x: Tensor) -> System:
    return Ours(problem, x, replace(settings_for(problem), screen="never", moments="float32"))
