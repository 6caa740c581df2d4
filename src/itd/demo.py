"""The demonstration: erase concepts of the embedded world, draw before and after with the same seeds, measure, report."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itd import emoji, report
from itd.activations import record
from itd.describe import table
from itd.emoji.captions import with_article
from itd.emoji.data import DESIGNS, Noun
from itd.emoji.generate import generate, to_uint8
from itd.emoji.images import split_scene
from itd.emoji.judge import Judge
from itd.emoji.prompts import STYLE_TEMPLATES, erase_sets, world_prompts
from itd.eraser import Eraser
from itd.erasing import calibration_of, erase
from itd.explain import Check
from itd.prompts import fill
from itd.sae import SAE, SAEConfig
from itd.synonyms import find_synonyms, synonym_words
from itd.templates import TEMPLATES
from itd.training import train

logger = logging.getLogger(__name__)

KINDS = ("target", "implicit", "scene", "neighbour", "unrelated")
"""Kinds of prompts; of the first three the gate should fire, the last two should pass."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration does."""

    out: Path = Path("runs/demo")
    """Folder of `report.html`, `metrics.json` and the erasers."""
    identity: str = "cat"
    """The noun that is erased first."""
    design: str = "twemoji"
    """The design that is erased second."""
    retrain: bool = False
    """Train the autoencoder first instead of using the shipped one."""
    full: bool = False
    """Erase 50 of the benchmark's 100 identities, 5 seeds each, instead of the short tour. By their names alone."""
    synonyms: bool = True
    """In the tour, also erase the words that the text encoder takes for the nouns' names."""
    seed: int = 0
    """Seed of the prompts and pictures."""


class Case(NamedTuple):
    """One prompt of the demonstration, and what the judge should see in its picture without erasing."""

    kind: str
    prompt: str
    noun: str
    design: str | None = None


@dataclass(frozen=True)
class Subject:
    """What one eraser erases: nouns, or a design."""

    title: str
    nouns: tuple[str, ...] = ()
    design: str | None = None
    cases: tuple[Case, ...] = ()

    def shows(self, noun: str, design: str) -> bool:
        """Tell whether a picture that the judge names so still shows the subject."""
        return design == self.design if self.design else noun in self.nouns


@dataclass(frozen=True)
class DemoResult:
    """Numbers, the table as text, and where the page is."""

    metrics: dict[str, float]
    table: str
    page: Path


@dataclass
class Outcome:
    """Pictures and verdicts of the cases of one subject."""

    subject: Subject
    eraser: Eraser
    before: Float[Tensor, "n 3 64 64"]
    after: Float[Tensor, "n 3 64 64"]
    checks: list[Check]
    said: list[tuple[tuple[str, str], tuple[str, str]]] = field(default_factory=list)
    """Per case: (noun, design) before and after. In a scene, of the left half."""

    @property
    def same(self) -> list[bool]:
        return [bool(torch.equal(a, b)) for a, b in zip(self.before, self.after, strict=True)]

    def rows(self, *kinds: str) -> list[int]:
        return [i for i, case in enumerate(self.subject.cases) if case.kind in kinds]


def run_demo(config: DemoConfig) -> DemoResult:
    """Run the short tour, or with `full` the benchmark of 50 erased identities, and write report and numbers.

    Raises:
        ValueError: `identity` or `design` is not of the embedded world.
    """
    began = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    pipe, judge = emoji.load_pipeline(), emoji.load_judge()
    sae = retrain(pipe, config.out) if config.retrain else emoji.load_sae()
    subjects = full_subjects(config) if config.full else tour_subjects(pipe, config)
    outcomes = [run_subject(pipe, judge, sae, subject, config) for subject in subjects]
    if not config.full:
        outcomes.append(run_together(pipe, judge, outcomes, config))
    metrics = measure(pipe, outcomes)
    metrics["seconds"] = round(time.monotonic() - began, 1)
    page = config.out / "report.html"
    page.write_text(render(outcomes, metrics, config), encoding="utf-8")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return DemoResult(metrics, text_table(outcomes, metrics), page)


def retrain(pipe: Any, out: Path) -> SAE:
    """Record the world's prompts and train an autoencoder like the shipped one."""
    store = record(pipe, emoji.HOOK_POINT, world_prompts(), out / "activations")
    settings = SAEConfig(store.d_model, n_latents=16_384, k=64)
    return train(store, settings, out=out / "training").save(out / "sae")


# What is erased, and the prompts that show it


def tour_subjects(pipe: Any, config: DemoConfig) -> list[Subject]:
    """Return an identity, a design and the unsafe objects, each with its prompts."""
    listed = {noun.name: noun for noun in emoji.nouns()}
    if config.identity not in listed:
        raise ValueError(f"identity must be a noun of the embedded world, got {config.identity!r}")
    if config.design not in DESIGNS:
        raise ValueError(f"design must be one of {DESIGNS}, got {config.design!r}")
    unsafe = tuple(noun.name for noun in listed.values() if noun.role == "unsafe")
    rng = random.Random(config.seed)
    return [
        Subject(config.identity, (config.identity,), cases=noun_cases(pipe, (config.identity,), listed, rng)),
        Subject(f"the design {config.design}", design=config.design, cases=design_cases(config.design, listed, rng)),
        Subject("unsafe objects", unsafe, cases=noun_cases(pipe, unsafe, listed, rng)),
    ]


def noun_cases(pipe: Any, names: tuple[str, ...], listed: dict[str, Noun], rng: random.Random) -> tuple[Case, ...]:
    """Return prompts for erased nouns: held-out templates, tags, scenes, nearest neighbours, unrelated nouns."""
    others = [name for name, noun in listed.items() if name not in names and noun.role != "unsafe"]
    general = [name for name in others if listed[name].role == "general"]
    test = TEMPLATES["test"]
    targets = [rng.choice(names) for _ in range(8)]
    cases = [Case("target", fill(test[i], name), name) for i, name in enumerate(targets)]
    tags = [(tag, name) for name in names for tag in listed[name].implicit]
    cases += [Case("implicit", f"a photo of {with_article(tag)}", name) for tag, name in rng.sample(tags, min(4, len(tags)))]
    for name in targets[:4]:
        cases.append(Case("scene", f"{with_article(name)} and {with_article(rng.choice(general))}", name))
    cases += [Case("neighbour", fill(test[i], name), name) for i, name in enumerate(neighbours(pipe, names, others, 6))]
    cases += [Case("unrelated", fill(rng.choice(test), name), name) for name in rng.sample(general, 6)]
    return tuple(cases)


def design_cases(design: str, listed: dict[str, Noun], rng: random.Random) -> tuple[Case, ...]:
    """Return prompts for an erased design: its name in held-out frames, the other designs, prompts that name none."""
    names = [noun.name for noun in listed.values() if noun.role != "unsafe"]

    def ask(kind: str, asked: str, frame: str) -> Case:
        noun = rng.choice(names)
        return Case(kind, frame.format(noun=with_article(noun), style=asked), noun, asked)

    test = STYLE_TEMPLATES["test"]
    cases = [ask("target", design, test[i % len(test)]) for i in range(8)]
    cases += [ask("neighbour", asked, test[i % 2]) for i, asked in enumerate(d for d in DESIGNS if d != design)]
    cases += [Case("unrelated", fill(rng.choice(TEMPLATES["test"]), noun), noun) for noun in rng.sample(names, 6)]
    return tuple(cases)


def neighbours(pipe: Any, names: Sequence[str], others: Sequence[str], n: int) -> list[str]:
    """Return the nouns whose pooled text embeddings are closest to those of `names`."""
    tokens = pipe.tokenizer([*names, *others], padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled = pipe.text_encoder(tokens.input_ids).pooler_output
    pooled = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    closest: list[int] = (pooled[len(names) :] @ pooled[: len(names)].T).amax(1).topk(n).indices.tolist()
    return [others[i] for i in closest]


def benchmark_identities() -> list[str]:
    """Return the 100 identities that are recognised best on unerased generations."""
    return json.loads((emoji.model_folder() / "benchmark.json").read_text())["identities"]


def full_subjects(config: DemoConfig) -> list[Subject]:
    """Return the benchmark: 50 of the 100 identities erased, the others kept, 5 seeds in 5 held-out templates."""
    names = benchmark_identities()
    random.Random(config.seed).shuffle(names)
    erased, kept = tuple(names[:50]), names[50:]
    general = [noun.name for noun in emoji.nouns() if noun.role == "general"]
    rng = random.Random(config.seed + 1)
    cases = [Case("target", fill(t, name), name) for name in erased for t in rng.sample(TEMPLATES["test"], 5)]
    cases += [Case("neighbour", fill(t, name), name) for name in kept for t in rng.sample(TEMPLATES["test"], 5)]
    cases += [Case("unrelated", fill(rng.choice(TEMPLATES["test"]), name), name) for name in rng.sample(general, 100)]
    return [Subject("50 identities", erased, cases=tuple(cases))]


# Running and measuring


def run_subject(pipe: Any, judge: Judge, sae: SAE, subject: Subject, config: DemoConfig) -> Outcome:
    """Make the eraser of a subject, save it, and draw its cases before and after."""
    names = subject.nouns or (str(subject.design),)
    words = other_words(pipe, subject.nouns) if subject.nouns and config.synonyms and not config.full else []
    eraser = erase(pipe, sae, emoji.HOOK_POINT, *erase_sets(names, words))
    eraser.save(config.out / "erasers" / subject.title.replace(" ", "-"))
    return draw(pipe, judge, subject, eraser, config)


def other_words(pipe: Any, names: Sequence[str]) -> list[str]:
    """Return the words that the text encoder takes for the names and for no other noun."""
    return synonym_words(find_synonyms(pipe, names, [noun.name for noun in emoji.nouns()]))


def run_together(pipe: Any, judge: Judge, outcomes: list[Outcome], config: DemoConfig) -> Outcome:
    """Join all erasers and draw a few cases of each subject with it."""
    eraser = outcomes[0].eraser
    for outcome in outcomes[1:]:
        eraser = eraser | outcome.eraser
    nouns = tuple(name for outcome in outcomes for name in outcome.subject.nouns)
    cases = [
        case for outcome in outcomes for kind in KINDS for case in [c for c in outcome.subject.cases if c.kind == kind][:2]
    ]
    design = next((outcome.subject.design for outcome in outcomes if outcome.subject.design), None)
    return draw(pipe, judge, Together("all together", nouns, design, tuple(cases)), eraser, config)


@dataclass(frozen=True)
class Together(Subject):
    """Several subjects at once: nouns and a design."""

    def shows(self, noun: str, design: str) -> bool:
        return noun in self.nouns


def draw(pipe: Any, judge: Judge, subject: Subject, eraser: Eraser, config: DemoConfig) -> Outcome:
    """Generate the cases of a subject without and with the eraser, same seeds, and judge them."""
    prompts = [case.prompt for case in subject.cases]
    seeds = range(config.seed + 1000, config.seed + 1000 + len(prompts))
    before = generate(pipe, prompts, seeds, desc=f"{subject.title}: before")
    with eraser.attach(pipe):
        after = generate(pipe, prompts, seeds, desc=f"{subject.title}: after")
    outcome = Outcome(subject, eraser, before, after, eraser.check(pipe, prompts))
    views = [see(judge, images, subject.cases) for images in (before, after)]
    outcome.said = list(zip(*views, strict=True))
    return outcome


def see(judge: Judge, images: Float[Tensor, "n 3 64 64"], cases: Sequence[Case]) -> list[tuple[str, str]]:
    """Return what the judge sees: the noun that was asked for if it is shown; of a scene, in the left half, where it stands."""
    views = torch.stack(
        [split_scene(image[None])[0][0] if case.kind == "scene" else image for image, case in zip(images, cases, strict=True)]
    )
    named = zip(*judge.name(views), judge.shown(views), cases, strict=True)
    return [(case.noun if case.noun in nouns and case.kind != "scene" else said, design) for said, design, nouns, case in named]


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


def gate_rates(pipe: Any, outcome: Outcome) -> dict[str, float]:
    """Return recall and false-positive rates of the gate alone: on the subject, on its kind, on everything else."""
    subject, eraser = outcome.subject, outcome.eraser
    hits, kept, general = design_probes(subject.design) if subject.design else noun_probes(subject.nouns)
    rates = [share([check.fired for check in eraser.check(pipe, prompts)]) for prompts in (hits, kept, general)]
    return dict(zip(("gate_recall", "gate_fpr_kept", "gate_fpr_general"), rates, strict=True))


def noun_probes(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return prompts in held-out templates: of erased nouns, of other identities, of general nouns."""
    listed = [noun for noun in emoji.nouns() if noun.name not in names]
    templates = TEMPLATES["test"]
    hits = [fill(template, name) for name in names for template in templates]
    kept, general = (
        [fill(templates[(i + j) % len(templates)], noun.name) for i, noun in enumerate(nouns) for j in range(3)]
        for nouns in ([n for n in listed if n.role == "identity"], [n for n in listed if n.role == "general"])
    )
    return hits, kept, general


def design_probes(design: str) -> tuple[list[str], list[str], list[str]]:
    """Return prompts in held-out frames: of the erased design, of the other designs, of none."""
    names, frames = [noun.name for noun in emoji.nouns()][::7], STYLE_TEMPLATES["test"]
    hits = [frame.format(noun=name, style=design) for name in names for frame in frames]
    others = [other for other in DESIGNS if other != design]
    kept = [frame.format(noun=name, style=others[i % 5]) for i, name in enumerate(names) for frame in frames]
    return hits, kept, [fill(template, name) for name in names for template in TEMPLATES["test"][:3]]


def accuracy(outcome: Outcome) -> dict[str, float]:
    """Return how often the judge sees what was asked for: of erased subjects after, of kept ones before and after.

    `any_erased`: how often it sees any of the erased subjects in pictures of an erased one.
    """
    subject, cases = outcome.subject, outcome.subject.cases
    targets = outcome.rows("target")
    anything = share([subject.shows(*outcome.said[i][1]) for i in targets])
    asked = anything if subject.design else share([outcome.said[i][1][0] == cases[i].noun for i in targets])

    def kept(view: int) -> float:
        rows = outcome.rows("neighbour", "unrelated") if len(cases) < 100 else outcome.rows("neighbour")
        return share([outcome.said[i][view][0] == cases[i].noun for i in rows])

    before, after = kept(0), kept(1)
    relative = min(after / before, 1.0) if before else 0.0
    removed = 1 - asked
    mean = 2 * removed * relative / (removed + relative) if removed + relative else 0.0
    return {
        "acc_erased": asked, "any_erased": anything, "acc_kept": after, "acc_kept_unerased": before, "harmonic_mean": mean
    }  # fmt: skip


def measure(pipe: Any, outcomes: list[Outcome]) -> dict[str, float]:
    """Return the numbers of the run, averaged over single subjects."""
    single = [outcome for outcome in outcomes if not isinstance(outcome.subject, Together)]
    rows = [gate_rates(pipe, outcome) | accuracy(outcome) for outcome in single]
    metrics = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    passing = [outcome.same[i] for outcome in outcomes for i in outcome.rows("neighbour", "unrelated")]
    return metrics | {"bit_identical_share": share(passing), "n_images": sum(2 * len(o.before) for o in outcomes)}


# Reporting


def summary_rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"erased": outcome.subject.title}
        for kind in KINDS:
            fired = [outcome.checks[i].fired for i in outcome.rows(kind)]
            row[f"{kind} fired"] = f"{sum(fired)}/{len(fired)}"
        seen = [[outcome.subject.shows(*outcome.said[i][view]) for i in outcome.rows("target")] for view in (0, 1)]
        row["target seen before"], row["after"] = (f"{sum(flags)}/{len(flags)}" for flags in seen)
        rows.append(row)
    return rows


def text_table(outcomes: list[Outcome], metrics: dict[str, float]) -> str:
    """Return the result as aligned text."""
    rows = summary_rows(outcomes)
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    numbers = [(key, f"{value:.4g}") for key, value in metrics.items()]
    return "\n".join([*table(cells, indent="", left=len(columns)), "", *table(numbers, indent="", left=2)])


def render(outcomes: list[Outcome], metrics: dict[str, float], config: DemoConfig) -> str:
    """Return the report page."""
    measures = [{"measure": name, "value": value} for name, value in metrics.items()]
    parts = [report.section("Numbers", report.table(summary_rows(outcomes)), report.table(measures))]
    parts += [render_outcome(outcome) for outcome in outcomes]
    lead = "Each pair: one prompt and seed, without and with the eraser. Below: the gate's decision, what the judge sees."
    return report.page("Concept erasing on the embedded world", lead, parts)


def render_outcome(outcome: Outcome, most: int = 24) -> str:
    """Return the section of one eraser: calibration, then pictures by kind of prompt."""
    before, after, same = to_uint8(outcome.before), to_uint8(outcome.after), outcome.same
    parts = []
    for number in calibration_of(outcome.eraser):
        parts.append(report.paragraph(
            f"Calibrated to {number.rule} on held-out prompts: threshold {number.threshold:.3f}, recall {number.recall:.1%}, "
            f"false positives {number.false_positive_rate:.2%}, AUROC {number.auroc:.4f}."
        ))  # fmt: skip
    for kind in KINDS:
        rows = outcome.rows(kind)[:most]
        figures = [report.before_after(before[i], after[i], outcome.checks[i], outcome.said[i], same[i]) for i in rows]
        if figures:
            parts.append(report.section(kind, report.grid(figures), level=3))
    return report.section(outcome.subject.title, *parts)
