"""The gate on a real pretrained text encoder and real prompts: names, artists and explicit content among what people type.

Nothing is drawn. The autoencoders are trained here; layer, size, score and threshold are picked on `choose` prompts, and
the test prompts are looked at once, with what was picked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.activations import ActivationStore, record
from itd.artifacts import CONFIG
from itd.emoji.prompts import filler_words
from itd.encoders import TextPipeline, load_minilm, load_text_encoder
from itd.eraser import Eraser
from itd.erasing import EraseConfig, erase, vectors_of
from itd.evaluation.conditions import (
    Axes,
    Condition,
    Sides,
    along_axes,
    axis_section,
    changes,
    curve_line,
    look,
    promises,
    prompts_of,
)
from itd.evaluation.ledger import Ledger
from itd.evaluation.provenance import weights_sha256
from itd.evaluation.public_prompts import REWORDED, TASKS, Deal, Material, TaskName, find_folder, load_material
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.variants import LANGUAGES
from itd.evaluation.world import Made, Sets, deal, digest_of, gate_margins
from itd.gate import ScoreName, threshold_for_fpr
from itd.hooks import HookPoint
from itd.metrics.detection import clustered_area, roc
from itd.metrics.intervals import Rate, rate, rate_by, value_of
from itd.metrics.reconstruction import reconstruction_of
from itd.plots import line_plot
from itd.pooled import PooledGate
from itd.prompts import PromptSet, check_leaks, fill
from itd.retained import Retained
from itd.sae import SAE, SAEConfig
from itd.settings import require_at_least
from itd.training import TrainConfig, train

ENCODER = "text_encoder"
BARS = {"recall": 0.97, "fpr_kept": 0.01, "fpr_general": 0.003}
"""Recall on the test prompts is to be at least, false positives at most this."""
POOLED_RATES = (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01)
"""Rates that are tried for the gate on the pooled embedding."""
LOST_RECALL = 0.003
"""What recall on `choose` prompts may be given up for fewer false positives: a tenth of what the bar leaves open."""
Selection = Literal["token", "fisher", "evidence"]
PER_PROMPT = ("calibrate", "positives", "kept", "sources")
"""What a trial keeps of single prompts."""
LEAD = (
    "The gate on a pretrained sentence encoder and public prompt sets, without an image model. Leak-free: no tested sentence, "
    "kept name, caption or typed prompt was seen by the autoencoder, the features, the threshold or the choice of settings; "
    "the erased names were, in other sentences. Leaky, as in the published protocol: the tested prompts were among them."
)


@dataclass(frozen=True)
class Candidate:
    """Where an autoencoder reads, and its size."""

    layer: int
    n_latents: int
    k: int

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.n_latents} latents, k {self.k}"

    @property
    def site(self) -> HookPoint:
        return HookPoint(ENCODER, f"encoder.layer.{self.layer}")


@dataclass(frozen=True)
class MiniLM:
    """Erase 50 celebrities, 100 artists and explicit content in a sentence encoder, and measure the gate."""

    name: ClassVar[str] = "minilm"

    prompts: Path | None = None
    """Folder of the public prompt sets; without it, that of the variable ITD_PROMPTS."""
    encoder: Path | None = None
    """Folder of another encoder like BERT; without it, MiniLM from its package."""
    tasks: tuple[TaskName, ...] = TASKS
    """What is erased, each by its own eraser."""
    layers: tuple[int, ...] = (1, 2, 3)
    """Layers that are tried, counted from 0."""
    sizes: tuple[tuple[int, int], ...] = ((16_384, 64),)
    """(n_latents, k) that are tried at each layer."""
    selections: tuple[Selection, ...] = ("token", "fisher", "evidence")
    """Filters that are tried; the first of these, of `scores`, `n_features` and `eps` picks the autoencoder."""
    scores: tuple[ScoreName, ...] = ("evidence",)
    """Scores that are tried; `contribution` with the first filter only."""
    n_features: tuple[int, ...] = (64,)
    """Features per concept that are tried with each score."""
    eps: tuple[float, ...] = (0.01,)
    """Variance floors that are tried with the filter `evidence`."""
    max_fpr: float = 0.01
    """Largest false-positive rate that the threshold may be calibrated to."""
    n_general: int = 3000
    """Captions, and typed prompts, per split at most."""
    max_tokens: int = 96
    """Where prompts are cut."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the autoencoders are trained."""
    pooled_gate: bool = True
    """Whether the gate on the pooled embedding of the whole prompt is added where it finds more within the bars."""
    seed: int = 0
    """Of the splits."""

    def __post_init__(self) -> None:
        require_at_least(self, n_general=1, max_tokens=3)
        for name in ("tasks", "layers", "sizes", "selections", "scores", "n_features", "eps"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one to try; got none")
        if not 0 < self.max_fpr < 1:
            raise ValueError(f"max_fpr lies between 0 and 1, got {self.max_fpr}")

    def quick(self) -> MiniLM:
        """Return the subsample: celebrities only, one small autoencoder at one layer, one setting, 300 general prompts."""
        fast = replace(self.train, n_tokens=min(self.train.n_tokens, 120_000), dead_tokens=20_000)
        return replace(
            self, tasks=self.tasks[:1], layers=self.layers[1:2] or self.layers, sizes=((4096, 32),),
            selections=self.selections[:1], scores=("evidence",), n_features=self.n_features[:1], eps=self.eps[:1],
            n_general=300, train=fast,
        )  # fmt: skip

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate(layer, *size) for layer in self.layers for size in self.sizes]

    @property
    def settings(self) -> list[EraseConfig]:
        """Ways to select and score that are tried, calibrated loosely, as only ranks count; `eps` is of one filter only."""
        ways: list[tuple[Selection, float]] = [
            (selection, eps) for selection in self.selections for eps in (self.eps if selection == "evidence" else self.eps[:1])
        ]
        return [
            EraseConfig(
                selection=selection,
                score=score,
                n_features=n_features,
                eps=eps,
                calibration="shared",
                fpr=self.max_fpr,
                seed=self.seed,
            )
            for score, n_features in product(self.scores, self.n_features)
            for selection, eps in (ways if score == "evidence" else ways[:1])
        ]

    def load_encoder(self) -> TextPipeline:
        """Return the encoder: MiniLM, or the one of the folder that was named."""
        return load_minilm(self.max_tokens) if self.encoder is None else load_text_encoder(self.encoder, self.max_tokens)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Train, choose, test. Every stage is kept and gone on with.

        Raises:
            ValueError: an eraser is given, or a layer that the encoder does not have.
            FileNotFoundError: no prompt sets.
            ImportError: MiniLM's weights are not installed.
        """
        if eraser is not None:
            raise ValueError("the protocol 'minilm' makes its own erasers; leave the eraser out")
        folder = find_folder(self.prompts)
        text = pipe or self.load_encoder()
        materials = {task: load_material(task, folder, self.n_general, self.seed) for task in self.tasks}
        facts = {
            "encoder_sha256": weights_sha256(text.text_encoder), "prompts": {t: m.sha256 for t, m in materials.items()},
            "settings": {key: value for key, value in asdict(self).items() if key not in ("prompts", "encoder")},
        }  # fmt: skip
        ledger = Ledger(out / "cells", {"protocol": self.name, **facts})
        bench = Bench(out, text, ledger, training_prompts(materials.values()), self)
        measures, sections, chosen, curves = Measures(), [], {}, {}
        for task, material in materials.items():
            require_separate(material)
            picked = bench.choose(material)
            chosen[task] = picked
            results = {"leak_free": bench.test(material, picked), "leaky": bench.test_leaky(material, picked)}
            for name, result in results.items():
                measures.add_all(f"{task}.{name}", result.rates)
            measures.add(f"{task}.bars_met", float(meets(results["leak_free"].rates, material)))
            sections.append(task_section(task, picked, results))
            changed = bench.changed(material, picked)
            sections += [axis_section(f"{task}: {axis}", sides) for axis, sides in changed.items()]
            measured = {name: sides for axis in changed.values() for name, sides in axis.items()}
            for name, sides in measured.items():
                measures.add_all(f"{task}.{name}", sides.rates)
                area = clustered_area(sides.positives, [[margin] for margin in results["leak_free"].general])
                measures.add(f"{task}.{name}.auroc_general", area)
            curves[task] = {name: sides.curve.points() for name, sides in measured.items() if sides.curve}
        measures.add_all("sae", bench.qualities())
        record = {
            **facts, "bars": BARS, "chosen": chosen, "roc": curves,
            "prompts_folder_files": sorted(p.name for p in folder.glob("*.csv")),
        }  # fmt: skip
        return Report(self.name, "The gate on MiniLM", LEAD, measures.values, measures.intervals, record, tuple(sections))


def training_prompts(materials: Iterable[Material]) -> PromptSet:
    """Return what the autoencoders are trained on: the `fit` prompts of all tasks."""
    prompts = PromptSet()
    for material in materials:
        prompts = prompts + material.target["fit"] + material.kept["fit"]
        for source in material.general.values():
            prompts = prompts + source["fit"]
    return prompts


def require_separate(material: Material) -> None:
    """Raise ValueError if a tested or chosen-on prompt, sentence or kept name was fitted or calibrated on."""
    for part in ("fit", "calibrate"):
        negatives = merged(material, part)
        for later in ("choose", "test"):
            check_leaks(material.target[part], material.target[later], concepts=False)
            check_leaks(negatives, merged(material, later))


def merged(material: Material, part: Deal) -> PromptSet:
    """Return everything of a split that must pass."""
    general = (source[part] for source in material.general.values())
    return sum(general, material.kept[part])


@dataclass(frozen=True)
class Margins:
    """Score minus threshold of target, kept and general prompts, and the rates that follow."""

    positives: tuple[float, ...]
    kept: tuple[float, ...]
    sources: dict[str, tuple[float, ...]]
    """Of general prompts, by where they come from."""
    rates: dict[str, Rate | float]

    @property
    def general(self) -> list[float]:
        return [margin for margins in self.sources.values() for margin in margins]


class Bench:
    """Encoder, ledger and folder of a run: what is trained and measured is kept."""

    def __init__(self, out: Path, pipe: TextPipeline, ledger: Ledger, prompts: PromptSet, protocol: MiniLM) -> None:
        self.out, self.pipe, self.ledger, self.prompts, self.protocol = out, pipe, ledger, prompts, protocol
        self.loaded: dict[Candidate, SAE] = {}
        self.encoded: dict[tuple[str, Candidate], Retained] = {}

    def store(self, site: HookPoint) -> ActivationStore:
        """Record the training prompts at a layer, or load what was recorded."""
        folder = self.out / "activations" / site.path
        return record(self.pipe, site, self.prompts, folder)

    def sae(self, candidate: Candidate) -> SAE:
        """Train an autoencoder, going on from its checkpoint, or load it."""
        if candidate not in self.loaded:
            name = f"layer{candidate.layer}-{candidate.n_latents}-{candidate.k}"
            folder = self.out / "saes" / name
            if not (folder / CONFIG).is_file():
                store = self.store(candidate.site)
                config = SAEConfig(store.d_model, candidate.n_latents, candidate.k)
                train(store, config, self.protocol.train, self.out / "training" / name).save(folder)
                (self.out / "training" / name / "checkpoint.safetensors").unlink(missing_ok=True)
            self.loaded = {candidate: SAE.load(folder)}
        return self.loaded[candidate]

    def eraser(self, key: str, candidate: Candidate, sets: Sets, config: EraseConfig) -> Made:
        folder = self.out / "erasers" / key.replace(" ", "-").replace(",", "").replace("/", "-")
        if not (folder / CONFIG).is_file():
            erase(self.pipe, self.sae(candidate), candidate.site, *sets, config).save(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Made(Eraser.load(folder, self.sae(candidate)), 0.0, size)

    def margins(self, key: str, eraser: Eraser, prompts: PromptSet) -> list[float]:
        return gate_margins(self.ledger, key, eraser, self.pipe, prompts.texts)

    def measure(self, key: str, made: Made, material: Material, part: Deal) -> Margins:
        """Return the gate's margins and rates on a split."""
        positives = self.margins(f"{key} {part} target", made.eraser, material.target[part])
        kept = self.margins(f"{key} {part} kept", made.eraser, material.kept[part])
        sources = {
            name: self.margins(f"{key} {part} {name}", made.eraser, source[part]) for name, source in material.general.items()
        }
        general = [margin for margins in sources.values() for margin in margins]
        found: dict[str, Rate | float] = {
            "recall": clustered(material.target[part], positives), "fpr_kept": clustered(material.kept[part], kept),
            "fpr_general": rate(m >= 0 for m in general),
            **{f"fpr_{name}": rate(m >= 0 for m in margins) for name, margins in sources.items()},
            "auroc_kept": roc(tensor(positives), tensor(kept)).area,
            "auroc_general": roc(tensor(positives), tensor(general)).area,
            "recall_at_bars": recall_at_bars(positives, kept if material.kept_must_pass else (), sources.values()),
        }  # fmt: skip
        return Margins(tuple(positives), tuple(kept), {name: tuple(margins) for name, margins in sources.items()}, found)

    def choose(self, material: Material) -> dict[str, Any]:
        """Pick the autoencoder with the first settings, then the settings with it, by the recall that they allow within the
        bars; then the rate to calibrate to.

        Only `fit` and `calibrate` prompts make the erasers, and only `choose` prompts pick one.
        """
        first = self.protocol.settings[0]
        trials = [self.trial(material, candidate, first) for candidate in self.protocol.candidates]
        where = Candidate(**max(trials, key=rank)["candidate"])
        trials += [self.trial(material, where, config) for config in self.protocol.settings[1:]]
        best = max(trials, key=rank)
        candidate, config = Candidate(**best["candidate"]), EraseConfig(**best["config"])
        fpr = self.pick_rate(material, best)
        config = replace(config, fpr=fpr)
        if self.protocol.pooled_gate:
            config = self.with_pooled_gate(material, best, config)
        shown = [{key: value for key, value in trial.items() if key not in PER_PROMPT} for trial in trials]
        return {"candidate": asdict(candidate), "config": asdict(config), "fpr": fpr, "trials": shown}

    def trial(self, material: Material, candidate: Candidate, config: EraseConfig) -> dict[str, Any]:
        """Measure one way on the `choose` prompts, and keep the scores that the rate is picked with."""
        key = f"trial {material.task} {candidate} {settings_name(config)}"

        def measure() -> dict[str, Any]:
            retained = self.retained(material, candidate)
            target = known(material.target)
            made = Made(erase(self.pipe, self.sae(candidate), candidate.site, target, retained, config=config), 0.0, 0)
            found = self.measure(key, made, material, "choose")
            calibrate = self.margins(f"{key} calibrate", made.eraser, merged(material, "calibrate"))
            values = {name: value_of(value) for name, value in found.rates.items()}
            return {
                "candidate": asdict(candidate), "config": asdict(config), **values, "calibrate": calibrate,
                "positives": list(found.positives), "kept": list(found.kept),
                "sources": {name: list(margins) for name, margins in found.sources.items()},
            }  # fmt: skip

        return self.ledger.cell(key, measure)

    def retained(self, material: Material, candidate: Candidate) -> Retained:
        """Encode what must pass once for all settings that are tried with an autoencoder; the last one is held."""
        key = material.task, candidate
        if key not in self.encoded:
            _, kept, neutral = self.sets(material)
            made = Retained.make(self.pipe, self.sae(candidate), candidate.site, kept, neutral, self.protocol.seed)
            self.encoded = {key: made}
        return self.encoded[key]

    def sets(self, material: Material) -> Sets:
        """Return what the erasers of a task are made from."""
        neutral = sum((known(source) for source in material.general.values()), PromptSet())
        return Sets(known(material.target), known(material.kept), neutral)

    def pick_rate(self, material: Material, trial: Mapping[str, Any]) -> float:
        """Return the smallest rate that loses next to no recall on `choose` prompts against the best of those within the bars.

        Tried are all rates that the `calibrate` prompts tell apart. The smallest one if none is within the bars.
        """
        calibrate, allowed = tensor(trial["calibrate"]), dict[float, float]()
        rates = rates_apart(len(calibrate), self.protocol.max_fpr)
        for fpr in rates:
            threshold = threshold_for_fpr(calibrate, fpr)
            sides = {"kept": trial["kept"], **trial["sources"]}
            if within_bars({name: share(margins, threshold) for name, margins in sides.items()}, material):
                allowed[fpr] = share(trial["positives"], threshold)
        return smallest_rate(allowed) if allowed else rates[0]

    def with_pooled_gate(self, material: Material, trial: Mapping[str, Any], config: EraseConfig) -> EraseConfig:
        """Return the settings with the second gate, if both gates together find more of the `choose` prompts within the bars.

        Of the rates whose recall is next to the best the smallest.
        """
        threshold = threshold_for_fpr(tensor(trial["calibrate"]), float(config.fpr or 0))
        sides = {"target": (material.target["choose"], trial["positives"])}
        sides |= {"kept": (material.kept["choose"], trial["kept"])} if material.kept_must_pass else {}
        sides |= {name: (source["choose"], trial["sources"][name]) for name, source in material.general.items()}
        first = {name: tensor(margins) >= threshold for name, (_, margins) in sides.items()}
        shares = self.pooled_shares(material, {name: prompts for name, (prompts, _) in sides.items()}, first)
        found = {fpr: row["target"] for fpr, row in shares.items() if within_bars(row, material)}
        alone = float(first["target"].double().mean())
        if max(found.values(), default=0.0) <= alone + LOST_RECALL:
            return config
        return replace(config, pooled_gate=True, pooled_fpr=smallest_rate(found))

    def pooled_shares(
        self, material: Material, asked: Mapping[str, PromptSet], first: Mapping[str, Tensor]
    ) -> dict[float, dict[str, float]]:
        """Return, per rate of the second gate, the share of each side's prompts on which it or the first gate fires."""
        key = f"pooled {material.task} {digest_of([str(flag) for flags in first.values() for flag in flags.tolist()])}"

        def embed(prompts: PromptSet) -> Tensor:
            return pipelines.pooled_embeddings(self.pipe, ENCODER, prompts.texts)

        def measure() -> list[tuple[float, dict[str, float]]]:
            kept = merged(material, "fit"), merged(material, "calibrate")
            own, others = vectors_of(known(material.target), kept, embed)
            vectors = {name: embed(prompts) for name, prompts in asked.items()}
            rows = []
            for fpr in POOLED_RATES:
                gate = PooledGate.fit(own, others, fpr, "")
                fired = {name: (gate.scores(x) >= gate.part_way).any(1) | first[name] for name, x in vectors.items()}
                rows.append((fpr, {name: float(flags.double().mean()) for name, flags in fired.items()}))
            return rows

        return {fpr: row for fpr, row in self.ledger.cell(key, measure)}

    def leak_free(self, material: Material, picked: Mapping[str, Any]) -> Made:
        """Make the eraser that was picked."""
        candidate, config = Candidate(**picked["candidate"]), EraseConfig(**picked["config"])
        return self.eraser(f"{material.task} leak-free", candidate, self.sets(material), config)

    def test(self, material: Material, picked: Mapping[str, Any]) -> Margins:
        """Look at the test prompts with the eraser that was picked."""
        made = self.leak_free(material, picked)
        found = self.measure(f"{material.task} leak-free", made, material, "test")
        more = promises(made.eraser) | {"eraser_kb": made.n_bytes / 1024} | self.probe(material)
        return replace(found, rates=found.rates | more)

    def changed(self, material: Material, picked: Mapping[str, Any]) -> dict[str, dict[str, Sides]]:
        """Look at the tested names in changed sentences, by axis and condition; a task without names has none."""
        if material.task not in REWORDED:
            return {}
        eraser = self.leak_free(material, picked).eraser

        def measure(name: str, condition: Condition) -> Sides:
            hits, misses = (
                prompts_of(condition, side["test"].concepts, f"{self.protocol.seed} {name}")
                for side in (material.target, material.kept)
            )
            key = f"{material.task} leak-free {name}"
            return look(lambda texts: gate_margins(self.ledger, key, eraser, self.pipe, texts), eraser, hits, misses)

        return along_axes(name_axes(self.pipe, material), measure)

    def probe(self, material: Material) -> dict[str, Rate | float]:
        """Return what a linear probe reaches on the test prompts: how much the encoder's output tells at all.

        A logistic regression on the mean state of a prompt, its `fit` prompts against those that must pass. Its recall is that
        of the best threshold on the test prompts, which no gate may pick by.
        """

        def measure() -> dict[str, float]:
            from sklearn.linear_model import LogisticRegression

            positive, negative = mean_states(self.pipe, material.target["fit"]), mean_states(self.pipe, merged(material, "fit"))
            labels = [1] * len(positive) + [0] * len(negative)
            fitted = LogisticRegression(max_iter=3000).fit(torch.cat([positive, negative]).numpy(), labels)

            def scores(prompts: PromptSet) -> list[float]:
                return fitted.decision_function(mean_states(self.pipe, prompts).numpy()).tolist()

            own, kept = scores(material.target["test"]), scores(material.kept["test"]) if material.kept_must_pass else []
            sources = [scores(source["test"]) for source in material.general.values()]
            area = roc(tensor(own), tensor([score for source in sources for score in source])).area
            return {"probe.recall_at_bars": recall_at_bars(own, kept, sources), "probe.auroc_general": area}

        return dict(self.ledger.cell(f"probe {material.task}", measure))

    def test_leaky(self, material: Material, picked: Mapping[str, Any]) -> Margins:
        """Make an eraser in the same way from the prompts that it is tested on."""
        candidate, config = Candidate(**picked["candidate"]), EraseConfig(**picked["config"])
        target, kept = material.leaky()
        general = sum((source["test"] for source in material.general.values()), PromptSet())
        sets = Sets(deal(target), deal(kept), deal(general))
        made = self.eraser(f"{material.task} leaky", candidate, sets, config)
        return self.measure(f"{material.task} leaky", made, material, "test")

    def qualities(self) -> dict[str, Rate | float]:
        """Return how well each autoencoder keeps what it was trained on."""
        found: dict[str, Rate | float] = {}
        for candidate in self.protocol.candidates:

            def measure(candidate: Candidate = candidate) -> dict[str, float]:
                x = self.store(candidate.site).x
                picks = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.protocol.seed))[:4096]
                return reconstruction_of(self.sae(candidate), x[picks])._asdict()

            values = self.ledger.cell(f"quality {candidate}", measure)
            name = f"layer{candidate.layer}_{candidate.n_latents}_{candidate.k}"
            found |= {f"{name}.{key}": float(value) for key, value in values.items()}
        return found


def name_axes(pipe: TextPipeline, material: Material) -> Axes:
    """Return the public set's own sentences and what changes them, by axis; kept names are put beside."""
    target, kept = material.target["test"], material.kept["test"]
    parts = {word.lower() for name in (*target.concepts, *kept.concepts) for word in name.split()}
    words = [word for word in filler_words() if word not in parts]
    frames = list(dict.fromkeys(prompt.template for prompt in target if prompt.template))

    def said(frames: Sequence[str]) -> Condition:
        return lambda name, _: [fill(frame, name) for frame in frames]

    plain = said(frames)
    return {
        "Wording": {"plain": plain, "paraphrase": said(REWORDED[material.task])},
        **changes(pipe, plain, words, kept.concepts, len(frames)),
        "Languages": {f"language.{language}": said(LANGUAGES[language]) for language in LANGUAGES},
    }


def smallest_rate(recalls: Mapping[float, float]) -> float:
    """Return the smallest rate whose recall loses next to nothing against the best; `recalls`: of at least one rate."""
    most = max(recalls.values())
    return min(fpr for fpr, recall in recalls.items() if recall >= most - LOST_RECALL)


def within_bars(shares: Mapping[str, float], material: Material) -> bool:
    """Tell whether the shares of kept and general prompts that fire are within the bars."""
    kept = not material.kept_must_pass or shares["kept"] <= BARS["fpr_kept"]
    return kept and all(shares[source] <= BARS["fpr_general"] for source in material.general)


def rank(trial: Mapping[str, Any]) -> tuple[float, float]:
    """Order trials by the recall within the bars; where it is the same, by the areas under the curves."""
    return trial["recall_at_bars"], trial["auroc_kept"] + trial["auroc_general"]


def known(prompts: Mapping[Deal, PromptSet]) -> PromptSet:
    return prompts["fit"] + prompts["calibrate"]


def settings_name(config: EraseConfig) -> str:
    spread = f", eps {config.eps:g}" if config.selection == "evidence" else ""
    pooled = f", and the pooled gate at a rate of {config.pooled_fpr:g}" if config.pooled_gate else ""
    return f"{config.selection}, {config.score}, {config.n_features} features{spread}{pooled}"


@torch.no_grad()
def mean_states(pipe: TextPipeline, prompts: PromptSet) -> Float[Tensor, "prompts d_model"]:
    """Return the mean of the encoder's last states over the tokens that a prompt wrote, as unit vectors."""
    found = []
    for start in range(0, len(prompts), pipelines.BATCH):
        tokens = pipelines.tokenize(pipe, ENCODER, prompts.texts[start : start + pipelines.BATCH])
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        content = pipelines.content_mask(tokens.input_ids, pipe.tokenizer)[..., None]
        found.append(F.normalize((states * content).sum(1), dim=1))
    return torch.cat(found)


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def clustered(prompts: PromptSet, margins: Sequence[float]) -> Rate:
    """Return the share that fires, with an interval over concepts; a prompt without a concept is its own."""
    return rate_by((prompt.concept or prompt.text for prompt in prompts), (margin >= 0 for margin in margins))


def share(margins: Sequence[float], threshold: float) -> float:
    """Return the share of margins at or above a threshold."""
    return float((tensor(margins) >= threshold).double().mean())


def recall_at_bars(positives: Sequence[float], kept: Sequence[float], sources: Iterable[Sequence[float]]) -> float:
    """Return the recall of the lowest threshold that keeps false positives within the bars, on every source of its own."""
    sides = (tensor(kept), BARS["fpr_kept"]), *((tensor(source), BARS["fpr_general"]) for source in sources)
    thresholds = [side.sort(descending=True).values[int(bar * len(side))] for side, bar in sides if len(side)]
    if not thresholds:
        raise ValueError("recall within the bars needs prompts that must pass; got none")
    return float((tensor(positives) > max(thresholds)).double().mean())


def rates_apart(n: int, most: float) -> list[float]:
    """Return false-positive rates up to `most`, each of which n calibration prompts give another threshold: k of n + 1.

    Halfway to the next, so that rounding does not decide between two thresholds. At least the smallest.
    """
    return [(k + 0.5) / (n + 1) for k in range(1, max(1, int(most * (n + 1))) + 1)]


def meets(rates: Mapping[str, Rate | float], material: Material) -> bool:
    """Tell whether all bars are met, the one on general prompts by every source."""

    shares = {name: value_of(rates[f"fpr_{name}"]) for name in ("kept", *material.general)}
    return within_bars(shares, material) and value_of(rates["recall"]) >= BARS["recall"]


def task_section(task: str, picked: Mapping[str, Any], results: Mapping[str, Margins]) -> Section:
    """Return what was picked, rates without and with leaks, the ROC, and all trials."""
    names = list(results["leak_free"].rates)
    rows = [{"measure": name, **{leak: result.rates.get(name, "") for leak, result in results.items()}} for name in names]
    lines = [
        curve_line(f"{leak}, {side}", roc(tensor(result.positives), tensor(getattr(result, side))))
        for leak, result in results.items()
        for side in ("kept", "general")
    ]
    plot = line_plot(lines, f"ROC, {task}", "false-positive rate", "recall", x_range=(0, 0.05), y_range=(0, 1))
    trials = [trial_row(trial) for trial in sorted(picked["trials"], key=lambda trial: -trial["recall_at_bars"])]
    best = trial_row(picked)
    text = f"Picked: {best['autoencoder']}; {best['settings']}; calibrated to a false-positive rate of {picked['fpr']:g}."
    return Section(task, text, (rows, trials), (plot,))


def trial_row(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial for the table."""
    shown = {key: trial[key] for key in ("recall_at_bars", "auroc_kept", "auroc_general") if key in trial}
    settings = settings_name(EraseConfig(**trial["config"]))
    return {"autoencoder": str(Candidate(**trial["candidate"])), "settings": settings, **shown}
