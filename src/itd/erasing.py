"""Make an eraser from prompts: select the features of the concepts, calibrate the gate on prompts held out from that."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.activations import stream
from itd.discriminants import Discriminants, Others, Own
from itd.drafts import DraftGate, drafts_of, require_drafts
from itd.eraser import ANCHOR, EDITS, Edit, EditMode, Eraser
from itd.features import (
    ConceptFeatures,
    FeatureStats,
    PromptCodes,
    fisher_filter,
    matched_filter,
    set_difference,
    token_filter,
)
from itd.gate import (
    PART_WAY,
    SCORES,
    Calibration,
    Gate,
    ScoreName,
    calibrate,
    describe_threshold,
    score,
    score_prompts,
    unit_apart,
)
from itd.hooks import HookPoint
from itd.kernels import same_up_to
from itd.pictures import UNGUIDED, PictureGate, drawn_features
from itd.pooled import PooledGate
from itd.prompts import Prompt, PromptSet, check_leaks
from itd.retained import Mentions, Retained, check_given_splits, encode_prompts, require_site, split_negative
from itd.sae import SAE
from itd.settings import require_at_least
from itd.vocabulary import names_of, vocabulary_of, word_salads
from itd.words import KnownWords

logger = logging.getLogger(__name__)

CHOICES = {
    "selection": ("fisher", "token", "evidence", "difference"), "calibration": ("apart", "shared"),
    "score": SCORES, "edit": EDITS,
}  # fmt: skip
"""What the settings that are words may be."""
MOST_DRAFTS = 2000
"""Retained prompts that are drafted to fit the draft gate, and to calibrate it."""
SALADS_EACH = 3
"""Word salads around each of a concept's prompts that the draft gate is fitted to; both count the same."""
MOST_SALADS = 300
"""Word salads around retained prompts that it is fitted to, and as many around nothing."""
MOST_PICTURES = 900
"""Retained prompts that are drawn to fit the picture gate, and to calibrate it."""
LOOKED = 3
"""One of this many retained prompts to fit the picture gate is drawn in a further look."""
WEAK_RECALL = 0.5
"""Below this share of recognised held-out prompts, a concept is reported as one without features of its own."""


@dataclass(frozen=True)
class EraseConfig:
    """How features are selected, the gate is calibrated and gated prompts are edited."""

    selection: Literal["fisher", "token", "evidence", "difference"] = "fisher"
    """Filter per concept, `fisher`: with the covariance that its features have over prompts, `token`: over windows of as many
    tokens as the name has, which are also what is scored, `evidence`: without it; or the paper's set difference over all."""
    n_features: int = 256
    """Features per concept, for all selections but `difference`."""
    shrinkage: float = 0.02
    """How far the covariance is drawn towards its diagonal, for `fisher` and `token`."""
    eps: float = 0.01
    """Variance floor of the matched filter, as a share of the largest variance, for `evidence`."""
    k_sel: int = 128
    """Latents per prompt, for `difference`: 128 for celebrities and explicit content, 256 for styles."""
    score: ScoreName = "evidence"
    """What the gate compares with its threshold; `reconstruction` is the paper's."""
    edit: EditMode = "subtract"
    """What is done to a gated prompt; `scale` is the paper's."""
    strength: float = -3.0
    """What the features' acts are multiplied by: 1 leaves, 0 removes."""
    n_edited: int | None = 16
    """Features of each concept that are edited, those with the largest weights; all of them decide. None edits all."""
    calibration: Literal["apart", "shared"] = "apart"
    """`apart`: every concept has its own threshold, nearly half-way from what retained prompts reach to its own prompts;
    for the score `evidence` and a false-positive rate. `shared`: one threshold for all concepts, at the rate itself."""
    fpr: float | None = 0.002
    """False-positive rate on retain and neutral prompts that is calibrated to: of each concept with `apart`, of all together
    with `shared`."""
    recall: float | None = None
    """Recall to calibrate to instead; with neither, the paper's 0.99 x minimum over the target prompts."""
    anchor: str = ANCHOR
    """The prompt that stands in: its activations under the edit `replace`, its states under `refuse` and behind the gates on
    the whole prompt."""
    pooled_gate: bool = False
    """A second gate on the pooled embedding of the whole prompt: it stops prompts that mean a concept without its features, and
    gives them the anchor's states. Checking prompts takes the whole text encoder then."""
    pooled_fpr: float = 0.002
    """False-positive rate of each concept in the second gate, on retain and neutral prompts."""
    pooled_part_way: float = PART_WAY
    """Where the second gate fires: 0 is what retained prompts reach, 1 what nearly all of a concept's own do."""
    draft_gate: bool = False
    """A gate on the image model's first guess of the picture: it stops what would draw a concept, whatever led there. Checking
    a prompt takes a step of the image model then."""
    draft_fpr: float = 0.02
    """False-positive rate of each concept in the draft gate, on retain and neutral prompts."""
    picture_gate: bool = False
    """A gate on the finished picture: what shows a concept comes out black, whatever led there. Making it draws a picture for
    each of the concepts' prompts and for some that must stay; using it takes a step of the image model per picture."""
    picture_fpr: float = 0.01
    """False-positive rate of each concept in the picture gate, on pictures of retain and neutral prompts."""
    picture_steps: int | None = None
    """Denoising steps of the pictures that it is made from; None: as many as the pipeline takes by itself."""
    picture_guidance: float | None = None
    """Guidance scale of these; None: the pipeline's own."""
    picture_looks: tuple[str, ...] = ()
    """Further looks of these, such as "watercolor style" or "low-poly 3D render", put behind the prompts: the gate then knows a
    concept in more ways than its own prompts draw it in. Draws each of the concepts' prompts once more."""
    full_rates: int = 20
    """Up to so many concepts, `pooled_fpr`, `draft_fpr` and `picture_fpr` are the rates of each; more share what so many have,
    as these gates' false positives add up."""
    seed: int = 0
    """Of the split of prompts that carry none."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("fpr", "recall", "pooled_fpr", "draft_fpr", "picture_fpr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {rate}")
        if self.fpr is not None and self.recall is not None:
            raise ValueError(
                f"give a false-positive rate or a recall, not both: got {self.fpr} and {self.recall}; for a recall set fpr=None"
            )
        for name in ("shrinkage", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength}")
        if isinstance(self.picture_looks, str) or not all(self.picture_looks):
            raise ValueError(f"picture_looks must be phrases, each of some words, got {self.picture_looks!r}")
        object.__setattr__(self, "picture_looks", tuple(self.picture_looks))
        require_at_least(self, n_features=1, k_sel=1, full_rates=1)
        if not 0 < self.pooled_part_way <= 1:
            raise ValueError(f"pooled_part_way must be more than 0 and at most 1, got {self.pooled_part_way}")
        if self.n_edited is not None and self.n_edited < 1:
            raise ValueError(f"n_edited must be at least 1, or None for all features; got {self.n_edited}")
        if self.picture_steps is not None and self.picture_steps < 1:
            raise ValueError(f"picture_steps must be at least 1, or None for the pipeline's own; got {self.picture_steps}")

    def shared(self, fpr: float, n_concepts: int) -> float:
        """Return the rate of each concept where a gate with this rate has so many of them.

        >>> [EraseConfig(full_rates=20).shared(0.02, n) for n in (1, 20, 50)]
        [0.02, 0.02, 0.008]
        """
        return fpr * min(1, self.full_rates / n_concepts)

    @property
    def is_apart(self) -> bool:
        """Tell whether every concept has its own threshold."""
        return self.calibration == "apart" and self.score == "evidence" and self.recall is None and self.fpr is not None


PRESETS: dict[str, EraseConfig] = {
    "default": EraseConfig(),
    "style": EraseConfig(n_edited=128),
    "strict": EraseConfig(edit="refuse", pooled_gate=True, pooled_part_way=0.6, draft_gate=True),
    "paper": EraseConfig(
        selection="difference",
        score="reconstruction",
        edit="scale",
        strength=-8.0,
        n_edited=None,
        calibration="shared",
        fpr=None,
    ),
}
"""`default` is ours, `style` too, for what is in everything that a prompt names, so that more has to be edited; `strict` draws
something else for whatever any gate on the prompt finds; `paper` follows the publication, with its inconsistencies resolved
(docs/differences.md)."""


def erase(
    pipe: Any,
    sae: SAE,
    site: HookPoint,
    target: PromptSet,
    retain: PromptSet | Retained,
    neutral: PromptSet | None = None,
    config: EraseConfig | str = "default",
) -> Eraser:
    """Select the features of the target concepts and calibrate their gate, in one call; no training.

    Prompts that carry no split are split by concept and template (the target by template only). Features are selected on
    `fit`, the threshold is chosen on `calibrate`, `test` is not touched.

    Args:
        target: prompts of what is to go, with their concept; prompts without one are taken as one concept.
        retain: prompts of what must stay, close to the target where possible; or `Retained`, which has them encoded.
        neutral: general prompts that must pass.
        config: an `EraseConfig`, or the name of a preset: "default", "style", "strict" or "paper".

    Raises:
        ValueError: an empty set or target prompt, a target concept among the retained ones, a concept with prompts in one split
            only, splits that leak, another hook point than the autoencoder's, a wrong d_model, NaN activations, a draft or
            picture gate for a pipeline whose image model cannot be asked.
    """
    settings = find_preset(config) if isinstance(config, str) else config
    require_site(pipe, sae, site)
    require_words(pipe, site.encoder, target)
    if settings.draft_gate:
        require_drafts(pipe)
    if settings.picture_gate:
        require_drafts(pipe, "picture")
    if isinstance(retain, Retained):
        if neutral:
            raise ValueError("`Retained` holds the neutral prompts too; give neutral prompts when it is made")
        positive = split_target(target, settings.seed)
        kept = fitting(retain, pipe, sae, site).without(positive)
    else:
        positive, _ = split_sets(target, retain, neutral or PromptSet(), settings.seed)
        kept = Retained.make(pipe, sae, site, retain, neutral, settings.seed)
    held_out = positive.of("calibrate")
    concepts = fit_concepts(pipe, sae, site, positive.of("fit"), kept, settings)
    if settings.is_apart:
        concepts = set_apart(sae, concepts, held_out, encode_prompts(pipe, sae, site, held_out), kept, settings)
    scores = [
        concept_scores(pipe, sae, site, concepts, prompts, settings, codes)
        for prompts, codes in ((held_out, None), (kept.calibrate, kept.calibrate_codes))
    ]
    calibration = choose_threshold(settings, scores[0].amax(1), scores[1].amax(1))
    gate = Gate(settings.score, (calibration.threshold,) * len(concepts), settings.strength)
    record = make_record(settings, concepts, held_out, scores[0], calibration, target, kept)
    edit = Edit(settings.edit, settings.strength, settings.n_edited, settings.anchor)
    eraser = Eraser(
        sae, site, concepts, gate, edit, pipelines.fingerprint(pipe, site),
        anchor_activations(pipe, site, settings.anchor), (record,), kept.stats(settings.k_sel).often(),
        words=KnownWords.of(pipe, site.encoder),
    )  # fmt: skip
    require_harmless(eraser, pipe)  # before the image model is asked, which takes long
    gates, does = more_gates(pipe, site, positive, kept, settings, len(positive.concepts))
    if gates:
        eraser = replace(eraser, records=(record | does,), **gates)
        require_harmless(eraser, pipe)
    return eraser


def require_words(pipe: Any, encoder: str, target: PromptSet) -> None:
    """Raise ValueError if a prompt of the target says nothing: whatever says nothing, or anything, would be found."""
    tokenizer = pipelines.tokenizer_of(pipe, encoder)
    for prompt, row in zip(target, pipelines.token_rows(pipe, encoder, target.texts, whole=True), strict=True):
        if not pipelines.written(row, tokenizer):
            raise ValueError(f"the target prompt {prompt.text!r} of {prompt.concept!r} has no words; leave it out")


def add_concepts(eraser: Eraser, pipe: Any, target: PromptSet, retained: Retained) -> Eraser:
    """Return an eraser that erases further concepts too, at the false-positive rate or recall that it was calibrated to.

    The settings are those of the eraser, the features of its concepts stay, and one threshold is chosen anew for all. That is
    what erasing all of them at once gives, if what must stay named none of them. What the held-out prompts of earlier concepts
    score is known from when they were added; that a later concept may find them too is not counted in the recall. In gates on
    the whole prompt or the picture earlier concepts keep their thresholds: only later ones share rates (`full_rates`).

    Raises:
        ValueError: see `erase`; a concept that the eraser has; an eraser of the paper's kind, of several that were joined with
            other settings, or of an earlier version; `Retained` of another autoencoder or text encoder.
    """
    settings = common_settings(eraser)
    site, sae = eraser.hook_point, eraser.sae
    require_words(pipe, site.encoder, target)
    positive = split_target(target, settings.seed)
    known = [name for name in positive.concepts if name in eraser.names]
    if known:
        raise ValueError(f"the eraser erases {known[0]!r} already; add concepts that it does not have")
    erased = PromptSet(tuple(Prompt(name, name) for name in eraser.names))
    kept = fitting(retained, pipe, sae, site).without(positive + erased)
    eraser.require_encoder(kept.fingerprint)
    held_out = positive.of("calibrate")
    codes = encode_prompts(pipe, sae, site, held_out)
    fresh = fit_concepts(pipe, sae, site, positive.of("fit"), kept, settings)
    if settings.is_apart:
        fresh = set_apart(sae, fresh, held_out, codes, kept, settings)
    concepts = eraser.concepts + fresh
    own = score_prompts(settings.score, sae, concepts, codes)
    negatives = score_prompts(settings.score, sae, concepts, kept.calibrate_codes).amax(1)
    before = [torch.tensor(record["positives"]) for record in eraser.records]
    chosen = choose_threshold(settings, torch.cat([*before, own.amax(1)]), negatives)
    parts = [describe_threshold(chosen.rule, chosen.threshold, scores, negatives) for scores in [*before, own.amax(1)]]
    records = [record | {"calibration": asdict(part)} for record, part in zip(eraser.records, parts[:-1], strict=True)]
    gates, does = more_gates(pipe, site, positive, kept, settings, len(concepts))
    joined = {kind: eraser.more_gates[kind] | gate for kind, gate in gates.items() if kind in eraser.more_gates}
    records.append(make_record(settings, fresh, held_out, own, parts[-1], target, kept) | does)
    more = replace(
        eraser, concepts=concepts, records=tuple(records), **joined,
        gate=replace(eraser.gate, thresholds=(chosen.threshold,) * len(concepts)),
        often=eraser.often if eraser.often is not None else kept.stats(settings.k_sel).often(),
    )  # fmt: skip
    require_harmless(more, pipe)
    return more


def require_harmless(eraser: Eraser, pipe: Any) -> None:
    """Raise ValueError if the edit is `refuse` and what it draws instead is itself refused."""
    if eraser.edit.mode != "refuse":
        return
    check = eraser.check(pipe, eraser.edit.anchor)[0]
    if check.fired:
        raise ValueError(
            f"the anchor {eraser.edit.anchor!r} is drawn in the place of refused prompts and is refused itself, for "
            f"{', '.join(check.concepts)}; give another anchor"
        )


def more_gates(
    pipe: Any, site: HookPoint, positive: PromptSet, kept: Retained, config: EraseConfig, n_concepts: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the gates on prompts and pictures that the settings ask for, and for the record what they do on held-out ones.

    n_concepts: of the whole eraser, which share the rates.
    """
    gates, does = dict[str, Any](), dict[str, Any]()
    pooled_fpr, draft_fpr, picture_fpr = (
        config.shared(fpr, n_concepts) for fpr in (config.pooled_fpr, config.draft_fpr, config.picture_fpr)
    )

    def some(n: int) -> tuple[PromptSet, PromptSet]:
        return kept.fit.sample(n, config.seed), kept.calibrate.sample(n, config.seed)

    def keep(gate: Discriminants, own: Own, others: Others, fpr: float, part_way: float) -> None:
        rule = f"{gate.kind}, {rate_rule(fpr, len(others[1]))}, {part_way:.0%} of the way"
        gates[gate.kind], does[gate.kind] = gate, rates_of(gate, own, others, rule)

    def draw(prompts: PromptSet, guidance: float | None = config.picture_guidance) -> Tensor:
        return drawn_features(pipe, prompts.texts, config.picture_steps, guidance, config.seed)

    if config.pooled_gate:
        whole = kept.fit, kept.calibrate
        own, others = vectors_of(positive, whole, lambda p: pipelines.pooled_embeddings(pipe, site.encoder, p.texts))
        pooled = PooledGate.fit(own, others, pooled_fpr, config.anchor, config.pooled_part_way)
        keep(pooled, own, others, pooled_fpr, config.pooled_part_way)
    if config.draft_gate:
        own, others = vectors_of(positive, some(MOST_DRAFTS), lambda p: drafts_of(pipe, p.texts))
        own, others = with_salads(pipe, site, positive.of("fit"), kept.fit.sample(MOST_SALADS, config.seed), own, others)
        draft = DraftGate.fit_towards(pipe, own, others, draft_fpr, config.anchor)
        keep(draft, own, others, draft_fpr, draft.part_way)
    if config.picture_gate:
        fit, held_out = some(MOST_PICTURES)
        own, others = vectors_of(positive, (in_looks(fit, config.picture_looks, LOOKED), held_out), draw)

        def draw_more(prompts: PromptSet) -> Tensor:
            unguided = draw(prompts, UNGUIDED)
            return torch.cat([unguided, draw(in_looks(prompts, config.picture_looks))]) if config.picture_looks else unguided

        own = {name: (torch.cat([x, draw_more(positive.of("fit").about(name))]), y) for name, (x, y) in own.items()}
        picture = PictureGate.fit_towards(pipe, own, others, picture_fpr, config.anchor)
        keep(picture, own, others, picture_fpr, picture.part_way)
    return gates, does


def with_salads(
    pipe: Any, site: HookPoint, positive: PromptSet, kept: PromptSet, own: Own, others: Others
) -> tuple[Own, Others]:
    """Return drafts with those of word salads among what the gate is fitted to; what it is calibrated on stays.

    Who wants an erased concept back writes chains of words that say it only together. What such a chain draws differs from what
    a sentence draws, so a gate that knows sentences alone takes the one for noise, or the other.
    """
    words = vocabulary_of(pipe, site.encoder).without(word for name in positive.concepts for word in names_of(name))
    found = dict(own)
    for name, (fit, held_out) in own.items():
        salads = drafts_of(pipe, word_salads(words, mentions(name, positive.about(name)) * SALADS_EACH, seed=name))
        found[name] = torch.cat([fit.repeat(SALADS_EACH, 1), salads]), held_out
    salads = drafts_of(pipe, word_salads(words, [*kept.texts, *[""] * len(kept)], seed=""))
    return found, (torch.cat([others[0], salads]), others[1])


def mentions(name: str, prompts: PromptSet) -> list[str]:
    """Return what of each prompt says the concept: its name where it is there, else the whole prompt.

    >>> mentions("cat", PromptSet.from_texts(["a photo of a cat", "a small tiger"]))
    ['cat', 'a small tiger']
    """
    said = Mentions(PromptSet((Prompt(name, name),)))
    return [name if said(replace(prompt, concept=None)) else prompt.text for prompt in prompts]


def in_looks(prompts: PromptSet, looks: Sequence[str], every: int = 1) -> PromptSet:
    """Put the looks in turn behind one of `every` so many prompts; without looks the prompts are what they were.

    >>> in_looks(PromptSet.from_texts(["a cat", "a dog", "a cow"]), ["in oil", "in pencil"], 2).texts
    ['a cat, in oil', 'a dog', 'a cow, in pencil']
    """
    if not looks:
        return prompts
    return PromptSet(
        tuple(
            prompt if i % every else replace(prompt, text=f"{prompt.text}, {looks[i // every % len(looks)]}", template=None)
            for i, prompt in enumerate(prompts)
        )
    )


def vectors_of(
    positive: PromptSet, kept: tuple[PromptSet, PromptSet], embed: Callable[[PromptSet], Tensor]
) -> tuple[Own, Others]:
    """Return what a gate on the whole prompt is fitted and calibrated on, per concept and of what must stay."""
    fit, held_out = positive.of("fit"), positive.of("calibrate")
    own = {name: (embed(fit.about(name)), embed(held_out.about(name))) for name in positive.concepts}
    return own, (embed(kept[0]), embed(kept[1]))


def rates_of(gate: Discriminants, own: Own, others: Others, rule: str) -> dict[str, Any]:
    """Return for the record what a gate on the whole prompt does on held-out prompts."""
    scores = [gate.scores(part).amax(1) for part in (torch.cat([mine for _, mine in own.values()]), others[1])]
    return asdict(describe_threshold(rule, gate.part_way, *scores))


def choose_threshold(settings: EraseConfig, positives: Float[Tensor, " n"], negatives: Float[Tensor, " m"]) -> Calibration:
    """Return the threshold of the gate, the same number for all concepts, and what it does on held-out prompts."""
    rule = None if settings.fpr is None else rate_rule(settings.fpr, len(negatives))
    if settings.is_apart:
        return describe_threshold(f"{rule}, {PART_WAY:.0%} of the way", PART_WAY, positives, negatives)
    chosen = calibrate(positives, negatives, fpr=settings.fpr, recall=settings.recall)
    return replace(chosen, rule=rule or chosen.rule)


def rate_rule(fpr: float, n_negatives: int) -> str:
    """Return a false-positive rate for the record, and warn of one below 1 / (n + 1), which n held-out prompts guarantee.

    >>> rate_rule(0.1, 48), rate_rule(0.002, 48)
    ('fpr=0.1', 'fpr=0.002 (0.02 guaranteed)')
    """
    least = 1 / (n_negatives + 1)
    if fpr >= least:
        return f"fpr={fpr}"
    logger.warning(
        "%d held-out prompts of what must stay guarantee a false-positive rate of %.2g, not of %g; that takes %d",
        n_negatives, least, fpr, math.ceil(1 / fpr) - 1,
    )  # fmt: skip
    return f"fpr={fpr} ({least:.2g} guaranteed)"


def set_apart(
    sae: SAE,
    concepts: tuple[ConceptFeatures, ...],
    held_out: PromptSet,
    codes: PromptCodes,
    kept: Retained,
    config: EraseConfig,
) -> tuple[ConceptFeatures, ...]:
    """Give every concept the unit in which its threshold is `PART_WAY` from 0 to 1, on held-out prompts (`gate.unit_apart`).

    A concept that some retained prompt resembles thus has a high threshold and leaves the others' alone.
    """
    others = score_prompts("evidence", sae, concepts, kept.calibrate_codes)
    own = score_prompts("evidence", sae, concepts, codes)
    names = [prompt.concept for prompt in held_out]
    moved = []
    for column, concept in enumerate(concepts):
        mine = torch.tensor([name == concept.name for name in names])
        mine = mine if mine.any() else torch.ones_like(mine)  # the paper's selection: one concept of all
        scale, offset = unit_apart(own[mine, column], others[:, column], float(config.fpr or 0))
        moved.append(replace(concept, scale=concept.scale * scale, offset=concept.offset * scale + offset))
    return tuple(moved)


def common_settings(eraser: Eraser) -> EraseConfig:
    """Return the settings that all concepts of an eraser were selected and calibrated with.

    Raises:
        ValueError: there are none, or concepts cannot be added under them.
    """
    mend = "make it again with itd.erase, of all concepts"
    if not all("positives" in record for record in eraser.records) or not eraser.records:
        raise ValueError(f"the eraser does not say what its held-out prompts score, earlier versions did not keep it; {mend}")
    found = [EraseConfig(**record["config"]) for record in eraser.records]
    if any(settings != found[0] for settings in found) or len(set(eraser.gate.thresholds)) > 1:
        raise ValueError(f"the eraser was joined from several with their own settings or thresholds; {mend}")
    if found[0].selection == "difference" or found[0].score == "reconstruction":
        raise ValueError(
            f"concepts are added one by one with the selection 'evidence' and a score of the features only, not with "
            f"{found[0].selection!r} and {found[0].score!r}; {mend}"
        )
    return found[0]


def fitting(retained: Retained, pipe: Any, sae: SAE, site: HookPoint) -> Retained:
    """Return what must stay, or raise ValueError unless this autoencoder encoded it at this place of this text encoder."""
    if retained.sae is not sae and (sae.sha256 is None or retained.sae.sha256 != sae.sha256):
        raise ValueError("what must stay was encoded by another autoencoder; make it again with Retained.make")
    same_place = retained.hook_point.encoder == site.encoder and retained.hook_point.resolve(pipe) is site.resolve(pipe)
    if not same_place:
        raise ValueError(f"what must stay was encoded at {retained.hook_point}, not at {site}; make it again there")
    if not same_up_to(retained.fingerprint, pipelines.fingerprint(pipe, site)):
        raise ValueError(
            "what must stay was encoded by another text encoder; make it again with Retained.make on this pipeline"
        )
    return retained


def make_record(
    settings: EraseConfig,
    concepts: Sequence[ConceptFeatures],
    held_out: PromptSet,
    scores: Float[Tensor, "prompts concepts"],
    calibration: Calibration,
    target: PromptSet,
    kept: Retained,
) -> dict[str, Any]:
    """Return what an eraser keeps of how concepts were added; concepts that the gate misses are warned of."""
    weak = weak_concepts(concepts, held_out, scores, calibration.threshold)
    for name, reason in weak.items():
        logger.warning("%s: %s; its prompts may pass. Give it more prompts or a larger autoencoder", name, reason)
    return {
        "config": asdict(settings), "calibration": asdict(calibration), "weak": weak, "concepts": list(held_out.concepts),
        "prompts_sha256": {"target": target.sha256, **kept.sha256}, "positives": scores.amax(1).tolist(),
    }  # fmt: skip


def find_preset(name: str) -> EraseConfig:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def split_sets(target: PromptSet, retain: PromptSet, neutral: PromptSet, seed: int) -> tuple[PromptSet, PromptSet]:
    """Return target and retain + neutral with their splits, after checking that they can be used.

    Raises:
        ValueError: see `erase`.
    """
    if len(target) and len(retain) + len(neutral) == 0:
        raise ValueError("the retain set is empty: give prompts of what must stay; the gate is calibrated on them")
    named = name_target(target)
    lowered = {concept.lower() for concept in named.concepts}
    inside = [c for c in (retain + neutral).concepts if c.lower() in lowered] or sorted(
        set(named.texts) & set((retain + neutral).texts)
    )
    if inside:
        raise ValueError(f"the target is inside the retain set: {inside[0]!r} is in both; remove it from one")
    positive = split_target(target, seed)
    fit, held_out = split_negative(retain, neutral, seed)
    return positive, fit + held_out


def name_target(target: PromptSet) -> PromptSet:
    """Return the target with a name for prompts that have no concept."""
    if len(target) == 0:
        raise ValueError("the target set is empty: name at least one concept or give a file with prompts")
    return PromptSet(tuple(p if p.concept else replace(p, concept="target") for p in target))


def split_target(target: PromptSet, seed: int) -> PromptSet:
    """Return the target with its splits, each concept in both that are needed.

    Raises:
        ValueError: see `erase`.
    """
    named = name_target(target)
    positive = named.split_by_template(seed)
    for name in positive.concepts:
        for split in ("fit", "calibrate"):
            if not len(positive.about(name).of(split)):
                raise ValueError(f"the concept {name!r} has no prompts to {split}: give at least 3 prompts per concept")
    check_given_splits(named)
    check_leaks(positive.of("fit"), positive.of("calibrate"), concepts=False)
    return positive


def fit_concepts(
    pipe: Any, sae: SAE, site: HookPoint, prompts: PromptSet, kept: Retained, config: EraseConfig
) -> tuple[ConceptFeatures, ...]:
    """Select the features of every concept of the prompts, each in its own unit."""
    fit = {name: encode_prompts(pipe, sae, site, prompts.about(name)) for name in prompts.concepts}
    windows = name_windows(pipe, site, prompts) if config.selection == "token" else {}
    return standardise(sae, select(sae, fit, kept, config, windows), fit, kept, config)


def name_windows(pipe: Any, site: HookPoint, positive: PromptSet) -> dict[str, int]:
    """Return how many tokens each concept's name has; 1 where most of its prompts do not say the name."""
    windows = {}
    for name in positive.concepts:
        rows = pipelines.token_rows(pipe, site.encoder, positive.about(name).texts, whole=True)
        ids = pipelines.token_rows(pipe, site.encoder, [name], whole=True)[0]
        said = sum(pipelines.contains(row, ids) for row in rows)
        windows[name] = len(ids) if ids and 2 * said > len(rows) else 1
    return windows


def select(
    sae: SAE, fit: dict[str, PromptCodes], kept: Retained, config: EraseConfig, windows: Mapping[str, int]
) -> tuple[ConceptFeatures, ...]:
    """Return one set of features per concept, or with `difference` one for all of them, as in the paper.

    windows: of `token`, per concept.
    """
    stats, others = (
        {name: FeatureStats(sae, config.k_sel).update_codes(codes) for name, codes in fit.items()},
        kept.stats(config.k_sel),
    )
    if config.selection == "fisher":
        return tuple(
            fisher_filter(s, others, kept.fit_codes, name, config.n_features, config.shrinkage) for name, s in stats.items()
        )
    if config.selection == "token":
        filters = (matched_filter(s, others, name, config.n_features, config.eps) for name, s in stats.items())
        starts = [replace(found, window=windows[found.name]) for found in filters]
        moments = kept.token_stats()
        return tuple(
            token_filter(start, codes, kept.fit_codes, moments, config.n_features, config.shrinkage)
            for start, codes in zip(starts, fit.values(), strict=True)
        )
    if config.selection == "evidence":
        return tuple(matched_filter(s, others, name, config.n_features, config.eps) for name, s in stats.items())
    chosen = [set_difference(s, others, name) for name, s in stats.items()]
    union = chosen[0]
    for more in chosen[1:]:
        union = union | more
    return (union,)


def concept_scores(
    pipe: Any,
    sae: SAE,
    site: HookPoint,
    concepts: Sequence[ConceptFeatures],
    prompts: PromptSet,
    config: EraseConfig,
    codes: PromptCodes | None = None,
) -> Float[Tensor, "prompts concepts"]:
    """Score prompts against every concept, with the function that the gate uses. `codes`: of the prompts, if they are known."""
    if config.score != "reconstruction":
        known = encode_prompts(pipe, sae, site, prompts) if codes is None else codes
        return score_prompts(config.score, sae, concepts, known)
    rows = []
    for batch in stream(pipe, site, prompts, desc="score prompts"):
        for x, mask in zip(batch.x, batch.content, strict=True):
            rows.append(score(config.score, sae, concepts, x[mask], config.strength).concepts)
    return torch.stack(rows)


def standardise(
    sae: SAE,
    concepts: tuple[ConceptFeatures, ...],
    fit: dict[str, PromptCodes],
    kept: Retained,
    config: EraseConfig,
) -> tuple[ConceptFeatures, ...]:
    """Give every concept its own unit: 0 is the 99 % quantile of the retained prompts, 1 the median of its own.

    One threshold then serves all concepts, whatever the size of their acts. Measured on the `fit` split; for `evidence` only.
    """
    if config.score != "evidence":
        return concepts
    others = score_prompts("evidence", sae, concepts, kept.fit_codes)
    units = []
    for column, concept in enumerate(concepts):
        mine = [codes for name, codes in fit.items() if name == concept.name or config.selection == "difference"]
        own = torch.cat([score_prompts("evidence", sae, [concept], codes)[:, 0] for codes in mine])
        low, high = others[:, column].quantile(0.99), own.median()
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
    """Return what stands in under `replace` and `refuse`: the activations of the anchor's last word and of its end."""
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
