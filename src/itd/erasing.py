"""Make an eraser from prompts: select the features of the concepts, calibrate the gate on prompts held out from that."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.activations import stream
from itd.eraser import Edit, EditMode, Eraser
from itd.features import ConceptFeatures, FeatureStats, matched_filter, set_difference
from itd.gate import Calibration, Gate, ScoreName, calibrate, score
from itd.hooks import HookPoint
from itd.prompts import Prompt, PromptSet, check_leaks
from itd.sae import SAE

logger = logging.getLogger(__name__)

SELECTIONS = ("evidence", "difference")
WEAK_RECALL = 0.5
"""Below this share of recognised held-out prompts, a concept is reported as one without features of its own."""


@dataclass(frozen=True)
class EraseConfig:
    """How features are selected, the gate is calibrated and gated prompts are edited."""

    selection: Literal["evidence", "difference"] = "evidence"
    """Matched filter per concept, or the paper's set difference over all of them."""
    n_features: int = 32
    """Features per concept, for `evidence`."""
    eps: float = 0.01
    """Variance floor of the matched filter, as a share of the largest variance."""
    k_sel: int = 128
    """Latents per prompt, for `difference`: 128 for celebrities and explicit content, 256 for styles."""
    score: ScoreName = "evidence"
    """What the gate compares with its threshold; `reconstruction` is the paper's."""
    edit: EditMode = "subtract"
    """What is done to a gated prompt; `scale` is the paper's."""
    strength: float = -3.0
    """What the features' acts are multiplied by: 1 leaves, 0 removes."""
    fpr: float | None = 0.01
    """False-positive rate on retain and neutral prompts that the threshold is calibrated to."""
    recall: float | None = None
    """Recall to calibrate to instead; with neither, the paper's 0.99 x minimum over the target prompts."""
    anchor: str = "a picture of something"
    """For the edit `replace`: the prompt whose activations stand in."""
    seed: int = 0
    """Of the split of prompts that carry none."""

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {self.selection!r}")
        if self.n_features < 1 or self.k_sel < 1:
            raise ValueError(f"n_features and k_sel must be at least 1, got {self.n_features} and {self.k_sel}")


PRESETS: dict[str, EraseConfig] = {
    "default": EraseConfig(),
    "paper": EraseConfig(selection="difference", score="reconstruction", edit="scale", strength=-8.0, fpr=None),
}
"""`default` is ours; `paper` follows the publication, with its inconsistencies resolved (docs/differences.md)."""


def erase(
    pipe: Any,
    sae: SAE,
    site: HookPoint,
    target: PromptSet,
    retain: PromptSet,
    neutral: PromptSet | None = None,
    config: EraseConfig | str = "default",
) -> Eraser:
    """Select the features of the target concepts and calibrate their gate, in one call; no training.

    Prompts that carry no split are split by concept and template (the target by template only). Features are selected on
    `fit`, the threshold is chosen on `calibrate`, `test` is not touched.

    Args:
        target: prompts of what is to go, with their concept; prompts without one are taken as one concept.
        retain: prompts of what must stay, close to the target where possible.
        neutral: general prompts that must pass.
        config: an `EraseConfig`, or the name of a preset: "default" or "paper".

    Raises:
        ValueError: an empty set, a target concept among the retained ones, a concept with prompts in one split only, a wrong
            d_model or hook point, NaN activations.
    """
    settings = find_preset(config) if isinstance(config, str) else config
    site.resolve(pipe)
    sets = split_sets(target, retain, neutral or PromptSet(), settings.seed)
    positive, negative = sets
    stats = {name: gather_stats(pipe, sae, site, positive.of("fit").about(name), settings) for name in positive.concepts}
    kept = gather_stats(pipe, sae, site, negative.of("fit"), settings)
    concepts = select(stats, kept, settings)
    if settings.score == "evidence":
        concepts = standardise(pipe, sae, site, concepts, positive.of("fit"), negative.of("fit"), settings)
    held_out = positive.of("calibrate"), negative.of("calibrate")
    scores = [concept_scores(pipe, sae, site, concepts, prompts, settings) for prompts in held_out]
    calibration = calibrate(scores[0].amax(1), scores[1].amax(1), fpr=settings.fpr, recall=settings.recall)
    gate = Gate(settings.score, (calibration.threshold,) * len(concepts), settings.strength)
    weak = weak_concepts(concepts, held_out[0], scores[0], calibration.threshold)
    for name, reason in weak.items():
        logger.warning("%s: %s; its prompts may pass. Give it more prompts or a larger autoencoder", name, reason)
    record = {
        "config": asdict(settings), "calibration": asdict(calibration), "weak": weak, "concepts": list(positive.concepts),
        "prompts_sha256": {"target": target.sha256, "retain": retain.sha256, "neutral": (neutral or PromptSet()).sha256},
    }  # fmt: skip
    return Eraser(
        sae, site, concepts, gate, Edit(settings.edit, settings.strength), pipelines.fingerprint(pipe, site),
        anchor_activations(pipe, site, settings.anchor), (record,),
    )  # fmt: skip


def find_preset(name: str) -> EraseConfig:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def split_sets(target: PromptSet, retain: PromptSet, neutral: PromptSet, seed: int) -> tuple[PromptSet, PromptSet]:
    """Return target and retain + neutral with their splits, after checking that they can be used.

    Raises:
        ValueError: see `erase`.
    """
    if len(target) == 0:
        raise ValueError("the target set is empty: name at least one concept or give a file with prompts")
    if len(retain) + len(neutral) == 0:
        raise ValueError("the retain set is empty: give prompts of what must stay; the gate is calibrated on them")
    named = PromptSet(tuple(p if p.concept else replace(p, concept="target") for p in target))
    lowered = {concept.lower() for concept in named.concepts}
    inside = [c for c in (retain + neutral).concepts if c.lower() in lowered] or sorted(
        set(named.texts) & set((retain + neutral).texts)
    )
    if inside:
        raise ValueError(f"the target is inside the retain set: {inside[0]!r} is in both; remove it from one")
    positive = named.split_by_template(seed)
    negative = retain.split_by_concept_and_template(seed) + neutral.split_by_concept_and_template(seed + 7)
    for name in positive.concepts:
        for split in ("fit", "calibrate"):
            if not len(positive.about(name).of(split)):
                raise ValueError(f"the concept {name!r} has no prompts to {split}: give at least 3 prompts per concept")
    for split in ("fit", "calibrate"):
        if not len(negative.of(split)):
            raise ValueError(f"no retain prompts to {split}: give at least 3 concepts in 3 templates, or more texts")
    check_leaks(positive.of("fit"), positive.of("calibrate"), concepts=False)
    return positive, negative


def gather_stats(pipe: Any, sae: SAE, site: HookPoint, prompts: PromptSet, config: EraseConfig) -> FeatureStats:
    """Return the statistics of the prompts' content tokens."""
    stats = FeatureStats(sae, config.k_sel)
    for batch in stream(pipe, site, prompts, desc="feature statistics"):
        stats.update(batch.x, batch.content)
    return stats


def select(stats: dict[str, FeatureStats], kept: FeatureStats, config: EraseConfig) -> tuple[ConceptFeatures, ...]:
    """Return one set of features per concept, or with `difference` one for all of them, as in the paper."""
    if config.selection == "evidence":
        return tuple(matched_filter(s, kept, name, config.n_features, config.eps) for name, s in stats.items())
    chosen = [set_difference(s, kept, name) for name, s in stats.items()]
    union = chosen[0]
    for more in chosen[1:]:
        union = union | more
    return (union,)


def concept_scores(
    pipe: Any, sae: SAE, site: HookPoint, concepts: Sequence[ConceptFeatures], prompts: PromptSet, config: EraseConfig
) -> Float[Tensor, "prompts concepts"]:
    """Score prompts against every concept, with the function that the gate uses."""
    rows = []
    for batch in stream(pipe, site, prompts, desc="score prompts"):
        for x, mask in zip(batch.x, batch.content, strict=True):
            rows.append(score(config.score, sae, concepts, x[mask], config.strength).concepts)
    return torch.stack(rows)


def standardise(
    pipe: Any,
    sae: SAE,
    site: HookPoint,
    concepts: tuple[ConceptFeatures, ...],
    positive: PromptSet,
    negative: PromptSet,
    config: EraseConfig,
) -> tuple[ConceptFeatures, ...]:
    """Give every concept its own unit: 0 is the 99 % quantile of the retained prompts, 1 the median of its own.

    One threshold then serves all concepts, whatever the size of their acts. Measured on the `fit` split.
    """
    own = concept_scores(pipe, sae, site, concepts, positive, config)
    others = concept_scores(pipe, sae, site, concepts, negative, config)
    names = [prompt.concept for prompt in positive]
    units = []
    for column, concept in enumerate(concepts):
        mine = torch.tensor([name == concept.name for name in names])
        low, high = others[:, column].quantile(0.99), own[mine, column].median()
        gap = float((high - low).clamp_min(1e-6 + 0.05 * float(high.abs())))
        units.append(replace(concept, scale=1 / gap, offset=-float(low) / gap))
    return tuple(units)


def weak_concepts(
    concepts: Sequence[ConceptFeatures], prompts: PromptSet, scores: Float[Tensor, "prompts concepts"], threshold: float
) -> dict[str, str]:
    """Return the concepts that have no features, or that the gate misses on held-out prompts, with the reason."""
    weak = {concept.name: "no feature of its own was found" for concept in concepts if len(concept) == 0}
    fired = (scores >= threshold).any(1)
    for name in prompts.concepts:
        mine = torch.tensor([prompt.concept == name for prompt in prompts])
        recall = float(fired[mine].double().mean())
        if recall < WEAK_RECALL and name not in weak:
            weak[name] = f"only {recall:.0%} of its held-out prompts reach the threshold"
    return weak


def anchor_activations(pipe: Any, site: HookPoint, prompt: str) -> Float[Tensor, "2 d_model"]:
    """Return what stands in under the edit `replace`: the activations of the anchor's last word and of its end."""
    batch = next(stream(pipe, site, PromptSet((Prompt(prompt),))))
    if not batch.content.any():
        raise ValueError(f"the anchor {prompt!r} has no content tokens; give a prompt with words")
    last = int(batch.content[0].nonzero().max())
    return batch.x[0, last : last + 2].clone()


def calibration_of(eraser: Eraser) -> list[Calibration]:
    """Return the calibrations that an eraser carries, one per call of `erase` that went into it."""
    found = []
    for record in eraser.records:
        values = dict(record["calibration"])
        values["curve"] = tuple(tuple(point) for point in values["curve"])
        found.append(Calibration(**values))
    return found
