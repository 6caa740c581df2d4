"""One training step of a top-k autoencoder: ours, a naive twin, other libraries, and the bare multiplication.

    python -m benchmarks.training                                          # every cell; hours
    python -m benchmarks.training --n-latents 131072 --tokens 512 --json   # one cell; an object a system

Every system trains on the same activations in a process of its own, and the processes take turns step by step, so that a
noisy machine treats all alike. Systems that do not fit into memory together are measured in groups; the multiplication is
in each group.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from benchmarks.activations import activations
from benchmarks.environments import ROOT, python_of
from benchmarks.peers.problem import Problem
from itd.memory import training_memory
from itd.sae import available_memory

logger = logging.getLogger(__name__)

LOGS = ROOT / "runs" / "bench" / "logs"
N_HELD = 2048
LATENTS_PER_ROW = 8
"""At most so many latents may start from the same activation, where they start from activations: real runs have many more."""
SHARE_OF_MEMORY = 0.92
PROCESS_BYTES = 600 * 10**6
"""Of an interpreter with torch and the libraries."""


@dataclass(frozen=True)
class SystemInfo:
    """How a system is run, and about how much memory it takes."""

    module: str
    environment: str | None = None
    copies: float = 0.0
    """Tensors as large as the weights that are alive at its peak: weights, gradients, moments, temporaries."""
    dense: float = 0.0
    """Tensors of tokens x n_latents that are alive at its peak."""

    def n_bytes(self, problem: Problem) -> int:
        """Estimate the peak of the process."""
        weights = 4 * 2 * problem.n_latents * problem.d_model
        codes = 4 * problem.tokens * problem.n_latents
        return PROCESS_BYTES + int(self.copies * weights + self.dense * codes)


@dataclass(frozen=True)
class OurInfo(SystemInfo):
    """Our own, whose memory is known."""

    moments: Any = "int8"
    screen: Any = "auto"

    def n_bytes(self, problem: Problem) -> int:
        estimate = training_memory(problem.d_model, problem.k, problem.tokens, 256, self.moments, self.screen)
        return PROCESS_BYTES + estimate.total(problem.n_latents)


SYSTEMS: dict[str, SystemInfo] = {
    "gemm": SystemInfo("gemm", copies=0.5),
    "itd": OurInfo("ours"),
    "itd-fp32": OurInfo("ours_fp32", moments="float32", screen="never"),
    "naive": SystemInfo("naive", copies=4, dense=4.5),
    "eai-sparsify": SystemInfo("eai_sparsify", "eai-sparsify", copies=4, dense=3.5),
    "eai-sparsify-adam": SystemInfo("eai_sparsify_adam", "eai-sparsify", copies=4, dense=3.5),
    "sae-lens": SystemInfo("sae_lens", "sae-lens", copies=4.5, dense=6),
    "dictionary-learning": SystemInfo("dictionary_learning", "dictionary-learning", copies=5, dense=6),
    "overcomplete": SystemInfo("overcomplete", "overcomplete", copies=5, dense=8),
}
OURS = ("itd", "itd-fp32")


@dataclass(frozen=True)
class Result:
    """What was measured of one system in one cell; nothing where it does not fit or has failed."""

    system: str
    n_latents: int
    tokens: int
    seconds: float | None = None
    """Of a step: the median, without the first two."""
    tokens_per_second: float | None = None
    peak_rss_gb: float | None = None
    fvu: float | None = None
    """Of activations that were not trained on, after `n_steps` steps."""
    gemm_share: float | None = None
    """Time of the bare multiplication, measured in turn with it, divided by the time of a step."""
    n_steps: int = 0
    d_model: int = 768
    k: int = 64
    activations: str = "synthetic"
    note: str = ""


class Worker:
    """A system in its process."""

    def __init__(self, name: str, info: SystemInfo, problem: Problem) -> None:
        self.name, self.seconds, self.peak_rss_gb, self.fvu = name, list[float](), 0.0, float("nan")
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        command = [str(python_of(info.environment)), "-m", "benchmarks.peers.worker", info.module, json.dumps(asdict(problem))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment(problem),
            )

    def answer(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with status {self.process.wait()}; see {self.log}")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is what the answer says
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def step(self, step: int) -> None:
        found = self.ask(do="step", step=step)
        self.seconds.append(found["seconds"])
        self.peak_rss_gb = found["peak_rss_gb"]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # an order that it did not live to read
            self.process.stdin.close()


def environment(problem: Problem) -> dict[str, str]:
    """Return the variables of a worker: as many threads as asked for, no look-ups in the network."""
    threads = str(problem.threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }


def groups(names: Sequence[str], problem: Problem, available: int) -> tuple[list[list[str]], dict[str, str]]:
    """Pack systems into groups that fit into memory together; return them and why others are left out."""
    room = int(SHARE_OF_MEMORY * available)
    shared = [name for name in names if name == "gemm"]
    base = sum(SYSTEMS[name].n_bytes(problem) for name in shared)
    packed: list[tuple[list[str], int]] = []
    left_out: dict[str, str] = {}
    for name in sorted(set(names) - {"gemm"}, key=names.index):
        size = SYSTEMS[name].n_bytes(problem)
        if base + size > room:
            left_out[name] = f"does not fit: needs about {size / 1e9:.1f} GB"
            continue
        place = next((i for i, (_, used) in enumerate(packed) if used + size <= room), None)
        if place is None:
            packed.append(([*shared, name], base + size))
        else:
            packed[place] = ([*packed[place][0], name], packed[place][1] + size)
    return [group for group, _ in packed] or ([shared] if shared else []), left_out


def run_group(names: Sequence[str], problem: Problem, source: str) -> list[Result]:
    """Measure systems side by side."""
    failed: dict[str, str] = {}
    workers = [Worker(name, SYSTEMS[name], problem) for name in names]
    try:
        for orders in (["ready"], *[["step", step] for step in range(problem.n_steps)], ["fvu"]):
            for worker in [each for each in workers if each.name not in failed]:
                try:
                    if orders[0] == "ready":
                        worker.answer()
                    elif orders[0] == "step":
                        worker.step(int(orders[1]))
                    elif worker.name != "gemm":
                        worker.fvu = worker.ask(do="fvu")["fvu"]
                except RuntimeError as error:
                    failed[worker.name] = str(error)
                    logger.warning("%s %s", worker.name, error)
    finally:
        for worker in workers:
            worker.close()
    gemm = next((median(timed(worker)) for worker in workers if worker.name == "gemm" and worker.seconds), None)
    return [result_of(worker, problem, source, gemm, failed.get(worker.name, "")) for worker in workers]


def timed(worker: Worker) -> list[float]:
    """Return the times that count: the first two steps allocate."""
    return worker.seconds[2:] or worker.seconds


def result_of(worker: Worker, problem: Problem, source: str, gemm: float | None, failure: str) -> Result:
    cell = {"n_latents": problem.n_latents, "tokens": problem.tokens, "d_model": problem.d_model, "k": problem.k}
    if failure or not worker.seconds:
        return Result(worker.name, **cell, n_steps=len(worker.seconds), activations=source, note=failure)
    seconds = median(timed(worker))
    return Result(
        worker.name,
        **cell,
        seconds=seconds,
        tokens_per_second=problem.tokens / seconds,
        peak_rss_gb=worker.peak_rss_gb,
        fvu=None if worker.fvu != worker.fvu else worker.fvu,
        gemm_share=None if gemm is None else gemm / seconds,
        n_steps=len(worker.seconds),
        activations=source,
    )


def default_steps(n_latents: int) -> int:
    """Return how many steps a cell takes when it is not said: the smaller, the more."""
    return max(6, min(60, 2**21 // n_latents))


def run_cell(arguments: TrainingBenchmark, n_latents: int, tokens: int) -> list[Result]:
    """Measure all systems at one size and batch."""
    n_steps = arguments.steps or default_steps(n_latents)
    path, source = activations(arguments.d_model, max(n_steps * tokens, n_latents // LATENTS_PER_ROW) + N_HELD)
    problem = Problem(str(path), arguments.d_model, n_latents, arguments.k, tokens, n_steps, arguments.threads, N_HELD)
    packed, left_out = groups(arguments.systems, problem, available_memory())
    results = [result for group in packed for result in run_group(group, problem, source)]
    seen: dict[str, Result] = {}
    for result in results:
        if result.system not in seen or (result.seconds or 0) < (seen[result.system].seconds or 0):
            seen[result.system] = result
    cell = {"n_latents": n_latents, "tokens": tokens, "d_model": arguments.d_model, "k": arguments.k, "activations": source}
    missing = [Result(name, **cell, note=note) for name, note in left_out.items()]
    return sorted([*seen.values(), *missing], key=lambda result: arguments.systems.index(result.system))


# What is shown


def table(results: Sequence[Result]) -> str:
    """Return a table in Markdown."""
    lines = [
        "| n_latents | tokens | system | s/step | tokens/s | of the GEMM's rate | peak GB | FVU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [str(r.n_latents), str(r.tokens), r.system]
        if r.seconds is None:
            cells += [r.note, "", "", "", ""]
        else:
            cells += [
                f"{r.seconds:.3f}",
                f"{r.tokens_per_second:.0f}",
                shown(r.gemm_share, ".0%"),
                f"{r.peak_rss_gb:.2f}",
                shown(r.fvu, ".4f"),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def comparison(results: Sequence[Result]) -> str:
    """Return, for each cell, how `itd` compares with the naive twin and with the best of the other libraries."""
    lines = [
        "| n_latents | tokens | times the naive twin | times the best peer | memory, of the best peer's | FVU, of the best's |",
        "|---|---|---|---|---|---|",
    ]
    for n_latents, tokens in dict.fromkeys((r.n_latents, r.tokens) for r in results):
        cell = {r.system: r for r in results if (r.n_latents, r.tokens) == (n_latents, tokens) and r.seconds is not None}
        peers = [r for name, r in cell.items() if name not in (*OURS, "gemm", "naive")]
        ours = cell.get("itd")
        if ours is None or ours.seconds is None:
            continue
        naive = cell["naive"].seconds if "naive" in cell else None
        cells = [
            shown(None if naive is None else naive / ours.seconds, ".1f"),
            shown(min((r.seconds for r in peers if r.seconds), default=float("nan")) / ours.seconds, ".1f"),
            shown((ours.peak_rss_gb or 0) / min((r.peak_rss_gb for r in peers if r.peak_rss_gb), default=float("nan")), ".0%"),
            shown((ours.fvu or 0) / min((r.fvu for r in peers if r.fvu), default=float("nan")), ".3f"),
        ]
        lines.append("| " + " | ".join([str(n_latents), str(tokens), *cells]) + " |")
    return "\n".join(lines)


def draw_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw tokens a second and peak memory against n_latents, one picture for each and for each batch."""
    from matplotlib.figure import Figure

    paths = []
    for tokens in sorted({r.tokens for r in results}):
        for name, label in (("tokens_per_second", "tokens a second"), ("peak_rss_gb", "peak memory, GB")):
            figure = Figure(figsize=(6, 4))
            axes = figure.subplots()
            for system in dict.fromkeys(r.system for r in results):
                points = [
                    (r.n_latents, getattr(r, name)) for r in results if (r.system, r.tokens) == (system, tokens) and r.seconds
                ]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=system)
            axes.set(xscale="log", yscale="log", xlabel="n_latents", ylabel=label, title=f"{tokens} tokens a step")
            axes.set_xticks(ticks := sorted({r.n_latents for r in results}), [f"2^{n.bit_length() - 1}" for n in ticks])
            axes.minorticks_off()
            axes.legend(fontsize=7)
            figure.tight_layout()
            paths.append(folder / f"training-{tokens}-{name}.svg")
            figure.savefig(paths[-1])
    return paths


@dataclass(frozen=True)
class TrainingBenchmark:
    """Measure training steps of a top-k autoencoder."""

    n_latents: tuple[int, ...] = (2**15, 2**17, 2**19)
    """Sizes."""
    tokens: tuple[int, ...] = (512, 2048)
    """Activations a step."""
    systems: tuple[str, ...] = field(default_factory=lambda: tuple(SYSTEMS))
    """Which of: gemm, itd, itd-fp32, naive, eai-sparsify, eai-sparsify-adam, sae-lens, dictionary-learning, overcomplete."""
    d_model: int = 768
    """Width of the activations; at 768 they are real ones where prompts and MiniLM are at hand."""
    k: int = 64
    """Active latents."""
    steps: int = 0
    """Steps a cell; 0 takes more for smaller sizes: 60 at 2^15, 16 at 2^17, 6 at 2^19."""
    threads: int = os.cpu_count() or 1
    """Threads of each process."""
    json: bool = False
    """Print one object a system, and nothing else."""
    out: Path | None = None
    """Folder for results.json, the tables and plots."""

    def __post_init__(self) -> None:
        if unknown := set(self.systems) - set(SYSTEMS):
            raise ValueError(f"unknown systems {sorted(unknown)}; there are {', '.join(SYSTEMS)}")


def main() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    arguments = tyro.cli(TrainingBenchmark, prog="python -m benchmarks.training")
    if arguments.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--out draws plots, which need matplotlib: pip install -e '.[benchmarks]'")
    results: list[Result] = []
    for n_latents in arguments.n_latents:
        for tokens in arguments.tokens:
            found = run_cell(arguments, n_latents, tokens)
            results += found
            print("\n".join(json.dumps(asdict(r)) for r in found) if arguments.json else table(found), flush=True)
            if arguments.out is not None:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    if not arguments.json:
        print("\n" + comparison(results))
    if arguments.out is not None:
        (arguments.out / "training.md").write_text(table(results) + "\n\n" + comparison(results) + "\n")
        draw_plots(results, arguments.out)


if __name__ == "__main__":
    main()
