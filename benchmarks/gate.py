"""The gate on a stream of captions: with the early exit, in full, and the naive twin; at paper size and on the embedded world.

    python -m benchmarks.gate                                     # everything at paper size
    python -m benchmarks.gate --json --parts stream               # one JSON object a system
    python -m benchmarks.gate --n-latents 16384 --captions 200    # smaller

Every system runs in a process of its own, and the processes take turns batch by batch, so that a noisy machine treats all
alike. `encoder_seconds` is the bare forward pass up to the hook point on the batches that the system makes, `check_seconds`
the whole check, tokenizing and encoding included. `resident_gb` is what the gate adds to a process that has the text tower.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

from benchmarks.environments import ROOT
from benchmarks.gate_problem import FRAMES, Problem, build_tower, captions, load_eraser, name_prompts, names, prepare
from itd import SAE, ConceptFeatures, Eraser, Gate, HookPoint, PromptSet, Retained, add_concepts, emoji, erase, pipelines
from itd.activations import group_by_size
from itd.gate import score_prompts

Part = Literal["stream", "world", "concepts", "adding"]
SYSTEMS = ("itd", "full", "naive")
"""With the early exit; every prompt in full, content tokens only; padded, with dense codes, as published."""
COUNTS = (1, 3, 10, 30, 100, 300, 1000)
OUT = ROOT / "runs" / "bench" / "gate"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    problem: tyro.conf.OmitArgPrefixes[Problem] = field(default_factory=Problem)
    parts: tuple[Part, ...] = ("stream", "world", "concepts", "adding")
    """stream: captions at paper size. world: the embedded world. concepts: time against their number. adding: new concepts."""
    systems: tuple[str, ...] = SYSTEMS
    """Systems of `stream`."""
    batch: int = 100
    """Captions that are checked at a time."""
    naive: int = 100
    """Captions that the naive twin checks; it is slow."""
    images: int = 12
    """Images that are generated in the embedded world."""
    json: bool = False
    """Print one JSON object a line instead of a table."""
    worker: str | None = None
    """Run as the process of this system, for another process."""


# Systems


def checks_of(eraser: Eraser, pipe: Any, texts: Sequence[str]) -> list[list[int]]:
    """Check prompts and return the concepts that fired."""
    return [list(check.decision.concepts) for check in eraser.check(pipe, texts)]


def early_share(eraser: Eraser, pipe: Any, texts: Sequence[str]) -> float:
    """Return the share of prompts that are decided without the full computation."""
    return sum(check.decision.early for check in eraser.check(pipe, texts)) / len(texts)


def naive_checks(eraser: Eraser, pipe: Any, texts: Sequence[str]) -> list[list[int]]:
    """Decide as the published code does: every position, padded, in dense codes; the score is ours."""
    sae, site, fired = eraser.sae, eraser.hook_point, []
    tokenizer = pipelines.tokenizer_of(pipe, site.encoder)
    for text in texts:
        tokens = pipelines.tokenize(pipe, site.encoder, [text])
        x = pipelines.activations(pipe, site, tokens)[0]
        pre_acts = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        acts, indices = pre_acts.topk(sae.config.k, dim=-1)
        codes = torch.zeros_like(pre_acts).scatter_(-1, indices, acts)
        content = pipelines.content_mask(tokens.input_ids, tokenizer)[0]
        hits = []
        for c, (concept, threshold) in enumerate(zip(eraser.concepts, eraser.gate.thresholds, strict=True)):
            scores = codes[:, concept.indices] @ concept.weights * concept.scale + concept.offset
            if content.any() and float(scores[content].max()) >= threshold:
                hits.append(c)
        fired.append(hits)
    return fired


def bare_forward(pipe: Any, site: HookPoint, texts: Sequence[str], padded: bool) -> None:
    """Run the encoder up to the hook point on prompts, batched as the check batches them, or one by one and padded."""
    tokenizer = pipelines.tokenizer_of(pipe, site.encoder)
    if padded:
        for text in texts:
            pipelines.activations(pipe, site, pipelines.tokenize(pipe, site.encoder, [text]))
        return
    rows = sorted(pipelines.token_rows(pipe, site.encoder, texts), key=len)
    for group in group_by_size(range(len(rows)), [len(row) for row in rows], 1024):
        pipelines.activations(pipe, site, pipelines.pad_rows([rows[i] for i in group], tokenizer))


def run_system(system: str, eraser: Eraser, pipe: Any, texts: Sequence[str]) -> list[list[int]]:
    if system == "naive":
        return naive_checks(eraser, pipe, texts)
    return checks_of(eraser, pipe, texts)


def in_full(eraser: Eraser) -> Eraser:
    """Return a copy that computes every score in full."""
    copy = replace(eraser)
    vars(copy)["early_exit"] = None
    return copy


def resident_bytes() -> tuple[int, int]:
    """Return the memory that the process holds now, and the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return values["VmRSS"], values["VmHWM"]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


# Processes


@torch.no_grad()
def work(system: str, problem: Problem) -> None:
    """Check batches that come on stdin, one JSON array a line; answer with times, decisions and memory."""
    pipe = build_tower(problem)
    bare_forward(pipe, problem.site, ["a warm-up"], padded=True)
    before = resident_bytes()[0]
    load_seconds, eraser = timed(lambda: load_eraser(problem))
    eraser = in_full(eraser) if system == "full" else eraser
    say({"load_seconds": load_seconds})
    for line in sys.stdin:
        texts = json.loads(line)
        encoder_seconds, _ = timed(lambda texts=texts: bare_forward(pipe, problem.site, texts, system == "naive"))
        check_seconds, fired = timed(lambda texts=texts: run_system(system, eraser, pipe, texts))
        now, most = resident_bytes()
        early = early_share(eraser, pipe, texts) if system == "itd" else 0.0  # from what check remembers
        say({
            "encoder_seconds": encoder_seconds, "check_seconds": check_seconds, "fired": fired, "early": early,
            "resident": now - before, "peak": most - before,
        })  # fmt: skip


def say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


class Worker:
    """The process of a system."""

    def __init__(self, system: str, problem: Problem) -> None:
        sizes = [word for key, value in asdict(problem).items() for word in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "benchmarks.gate", "--worker", system, *sizes]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: list[dict[str, Any]] = []
        self.started = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def check(self, texts: Sequence[str]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(texts), file=self.process.stdin, flush=True)
        self.answers.append(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def stream(options: Options) -> list[dict[str, Any]]:
    """Check captions at paper size with all systems, in turns."""
    problem = options.problem
    prepare(problem)
    texts = captions()[0][: problem.captions]
    batches = [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]
    workers = {system: Worker(system, problem) for system in options.systems}
    for i, batch in enumerate(batches):
        for system, worker in workers.items():
            if system != "naive" or i * options.batch < options.naive:
                worker.check(batch if system != "naive" else batch[: options.naive - i * options.batch])
    for worker in workers.values():
        worker.close()
    truth = "full" if "full" in workers else options.systems[0]
    expected = [fired for answer in workers[truth].answers for fired in answer["fired"]]
    return [summary(system, worker, expected) for system, worker in workers.items()]


def summary(system: str, worker: Worker, expected: list[list[int]]) -> dict[str, Any]:
    answers = worker.answers
    fired = [each for answer in answers for each in answer["fired"]]
    check, encoder = (sum(answer[key] for answer in answers) for key in ("check_seconds", "encoder_seconds"))
    residents = [answer["resident"] for answer in answers]
    return {
        "system": system, "prompts_per_second": len(fired) / check, "encoder_seconds": encoder, "check_seconds": check,
        "resident_gb": max(residents) / 1e9, "identical_decisions": fired == expected[: len(fired)],
        "prompts": len(fired), "fired": sum(map(bool, fired)), "check_over_encoder": check / encoder,
        "median_resident_gb": median(residents) / 1e9, "peak_gb": max(answer["peak"] for answer in answers) / 1e9,
        "load_seconds": worker.started["load_seconds"],
        "early_share": sum(answer["early"] for answer in answers) / len(answers),
    }  # fmt: skip


# The embedded world


@torch.no_grad()
def world(options: Options) -> list[dict[str, Any]]:
    """Check the world's captions, and measure the gate's share of the time that an image takes."""
    from itd.emoji.prompts import erase_sets, world_prompts

    pipe, sae = emoji.load_pipeline(), emoji.load_sae()
    chosen = [noun.name for noun in emoji.nouns() if noun.role == "identity"][:20] or [emoji.nouns()[0].name]
    eraser = erase(pipe, sae, emoji.HOOK_POINT, *erase_sets(chosen))
    texts = world_prompts().unique().sample(options.problem.captions).texts
    erasers = {"itd": eraser, "full": in_full(eraser), "naive": eraser}
    times = {system: 0.0 for system in erasers}
    encoders, fired = dict(times), {system: list[list[int]]() for system in erasers}
    for start in range(0, len(texts), options.batch):
        batch = texts[start : start + options.batch]
        for system, each in erasers.items():
            encoders[system] += timed(lambda b=batch, s=system: bare_forward(pipe, emoji.HOOK_POINT, b, s == "naive"))[0]
            seconds, found = timed(lambda s=system, e=each, b=batch: run_system(s, e, pipe, b))
            times[system] += seconds
            fired[system] += found
    rows: list[dict[str, Any]] = [
        {
            "system": f"world-{system}", "prompts_per_second": len(texts) / times[system], "encoder_seconds": encoders[system],
            "check_seconds": times[system], "resident_gb": None, "identical_decisions": fired[system] == fired["full"],
            "prompts": len(texts), "fired": sum(map(bool, fired[system])),
            "check_over_encoder": times[system] / encoders[system],
        }
        for system in erasers
    ]  # fmt: skip
    return [*rows, attached(pipe, eraser, texts[: options.images])]


def attached(pipe: Any, eraser: Eraser, texts: Sequence[str]) -> dict[str, Any]:
    """Generate with the eraser attached; measure how much of the time is the gate's, and what attaching changes in all."""

    def draw(text: str) -> float:
        generator = torch.Generator().manual_seed(0)
        return timed(
            lambda: pipe(text, num_inference_steps=emoji.STEPS, guidance_scale=emoji.GUIDANCE_SCALE, generator=generator)
        )[0]

    draw(texts[0])
    bare, gated, gate = [], [], list[float]()
    for text in texts:
        bare.append(draw(text))
        with eraser.attach(pipe) as handle:
            worker = handle.worker

            def measured(*args: Any, worker: Any = worker) -> Any:
                seconds, found = timed(lambda: worker(*args))
                gate.append(seconds)
                return found

            vars(handle)["worker"] = measured
            gated.append(draw(text))
    return {
        "system": "world-attached", "images": len(texts), "image_seconds": sum(bare) / len(bare),
        "attached_seconds": sum(gated) / len(gated), "gate_seconds": sum(gate) / len(gated),
        "gate_share": sum(gate) / sum(gated),
    }  # fmt: skip


# The number of concepts


@torch.no_grad()
def concepts(options: Options) -> list[dict[str, Any]]:
    """Check captions with 1 to 1,000 concepts: 32 of the rarer latents each, thresholds above what retained prompts reach."""
    problem = options.problem
    folder, pipe = prepare(problem), build_tower(problem)
    sae = SAE.load(folder / "sae")
    retained = Retained.load(folder / "retained", sae)
    stats = retained.stats(problem.k)
    seldom = (stats.n_active > 0).nonzero().flatten()
    seldom = seldom[stats.n_active[seldom].argsort()][: max(len(seldom) // 2, 64)]
    generator = torch.Generator().manual_seed(3)
    texts, rows = captions()[0][: min(problem.captions, 500)], []
    for n in COUNTS:
        chosen = tuple(random_concept(str(c), seldom, generator) for c in range(n))
        scores = score_prompts("evidence", sae, chosen, retained.calibrate_codes)
        gate = Gate("evidence", tuple((scores.amax(0) + 0.5).tolist()))
        eraser = Eraser(sae, problem.site, chosen, gate, often=stats.often())
        assert eraser.early_exit is not None
        encoder, _ = timed(lambda: bare_forward(pipe, problem.site, texts, padded=False))
        check, fired = timed(lambda e=eraser: checks_of(e, pipe, texts))
        rows.append({
            "system": f"concepts-{n}", "prompts_per_second": len(texts) / check, "encoder_seconds": encoder,
            "check_seconds": check, "resident_gb": eraser.early_exit.n_bytes / 1e9, "identical_decisions": None,
            "prompts": len(texts), "fired": sum(map(bool, fired)), "check_over_encoder": check / encoder,
        })  # fmt: skip
    return rows


def random_concept(name: str, latents: torch.Tensor, generator: torch.Generator) -> ConceptFeatures:
    indices = latents[torch.randperm(len(latents), generator=generator)[:32]].sort().values
    weights = torch.rand(len(indices), generator=generator)
    return ConceptFeatures(name, indices, weights / weights.norm())


# More concepts


def adding(options: Options) -> list[dict[str, Any]]:
    """Add one concept to the eraser, and make one of twice as many at once, from statistics that are on disk; both saved."""
    problem = options.problem
    folder, pipe = prepare(problem), build_tower(problem)
    eraser = load_eraser(problem)
    retained = Retained.load(folder / "retained", eraser.sae)
    listed = names(4 * problem.n_concepts)
    one = name_prompts([name for name in listed if name not in eraser.names][:1])
    many: PromptSet = name_prompts(listed[: 2 * problem.n_concepts])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:

        def add() -> None:
            add_concepts(eraser, pipe, one, retained).save(Path(place) / "one")

        def make() -> None:
            erase(pipe, eraser.sae, problem.site, many, retained).save(Path(place) / "many")

        for system, n, call in (("add-1", 1, add), ("erase-all", 2 * problem.n_concepts, make)):
            seconds, _ = timed(call)
            per_concept = sum(map(len, FRAMES.values()))
            rows.append({"system": system, "concepts": n, "seconds": seconds, "prompts_per_concept": per_concept})
    return rows


PARTS: dict[Part, Callable[[Options], list[dict[str, Any]]]] = {
    "stream": stream, "world": world, "concepts": concepts, "adding": adding,
}  # fmt: skip


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.worker is not None:
        work(options.worker, options.problem)
        return
    rows: list[dict[str, Any]] = []
    for part in options.parts:
        found = PARTS[part](options)
        rows += found
        for row in found:
            print(
                json.dumps(row) if options.json else "  ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True
            )
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"problem": asdict(options.problem), "threads": torch.get_num_threads(), "rows": rows}
    (OUT / f"results-{options.problem.n_latents}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
