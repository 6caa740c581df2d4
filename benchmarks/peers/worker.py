"""One system in a process of its own: `python -m benchmarks.peers.worker NAME PROBLEM`.

Orders come as lines of JSON on standard input, answers go as lines of JSON to standard output. What the libraries print goes
to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.problem import Problem, System


def peak_rss_gb() -> float:
    """Return the largest resident size that this process has had, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9


def fraction_unexplained(system: System, x: torch.Tensor, n: int = 256) -> float:
    """Return the squared error of the reconstruction, as a share of the variance of the activations."""
    with torch.no_grad():
        error = sum(float((system.reconstruct(part) - part).square().sum()) for part in x.split(n))
    return error / float((x - x.mean(0)).square().sum())


def obey(order: dict[str, Any], system: System, problem: Problem, x: torch.Tensor) -> dict[str, Any]:
    """Carry out one order and return the answer."""
    if order["do"] == "step":
        n_training = len(x) - problem.n_held
        rows = torch.arange(order["step"] * problem.tokens, (order["step"] + 1) * problem.tokens) % n_training
        batch = x[rows]
        began = time.perf_counter()
        system.step(batch)
        return {"seconds": time.perf_counter() - began, "peak_rss_gb": peak_rss_gb()}
    if order["do"] == "fvu":
        return {"fvu": fraction_unexplained(system, x[-problem.n_held :])}
    raise ValueError(f"unknown order {order['do']!r}")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, problem = sys.argv[1], Problem(**json.loads(sys.argv[2]))
    torch.set_num_threads(problem.threads)
    x = torch.from_numpy(np.load(problem.activations, mmap_mode="c"))
    system: System = importlib.import_module(f"benchmarks.peers.{name}").make(problem, x[: -problem.n_held])
    print(json.dumps({"ready": name}), file=answers)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), system, problem, x)), file=answers)


if __name__ == "__main__":
    main()
