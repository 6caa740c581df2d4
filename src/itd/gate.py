"""Decide whether a prompt contains a concept: scores, their calibration, the gate. Tensors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itd.early_exit import EarlyExit, Reached
from itd.features import ConceptFeatures, PromptCodes, all_indices, dense_acts, window_scores
from itd.kernels import SparseCodes
from itd.sae import SAE

ScoreName = Literal["evidence", "contribution", "reconstruction"]
SCORES: tuple[ScoreName, ...] = ("evidence", "contribution", "reconstruction")


class Scores(NamedTuple):
    """Scores of one prompt, per content token and concept, and per concept; and the codes that they were made from."""

    tokens: Float[Tensor, "tokens concepts"]
    concepts: Float[Tensor, " concepts"]
    codes: SparseCodes


class FilterBank(NamedTuple):
    """The matched filters of several concepts as one matrix over their distinct features."""

    features: Int[Tensor, " n"]
    weights: Float[Tensor, "n concepts"]
    scale: Float[Tensor, " concepts"]
    offset: Float[Tensor, " concepts"]


class Meaning(NamedTuple):
    """What the gates on the whole prompt say of it, and on its picture (`itd.pooled`, `itd.drafts`, `itd.pictures`)."""

    concepts: tuple[str, ...]
    """Concepts that the whole prompt means."""
    score: float
    """Of the concept that comes closest."""
    threshold: float
    by: str
    """The gate that the score is of: `pooled`, `draft` or `picture`."""

    def joined(self, other: Meaning) -> Meaning:
        """Return what two gates say of one prompt: the concepts of both, the score of the one that comes closer."""
        closer = max(self, other, key=lambda meaning: meaning.score - meaning.threshold)
        return closer._replace(concepts=tuple(dict.fromkeys(self.concepts + other.concepts)))


PART_WAY = 0.45
"""The threshold of concepts in units in which retained prompts reach 0 and their own reach 1."""
SMALLEST_UNIT = 0.05
"""The least unit of a concept, as a share of what lies between the median of retained prompts and the strongest."""
ROUNDING = 1e-5
"""What the same prompt's scores may differ by, relative to the largest score: batches are summed in different orders."""
DENSE_BYTES = 64 * 2**20
"""Upper bound of the acts that are held densely while many prompts are scored."""


@lru_cache(maxsize=16)
def filter_bank(concepts: tuple[ConceptFeatures, ...]) -> FilterBank:
    """Return the filters of the concepts; the last few are kept, as the same ones score prompt after prompt."""
    features = all_indices(concepts)
    weights = torch.stack([concept.spread(features) for concept in concepts], 1)
    scale = torch.tensor([concept.scale for concept in concepts])
    return FilterBank(features, weights, scale, torch.tensor([concept.offset for concept in concepts]))


def keep_features(codes: SparseCodes, concept: ConceptFeatures) -> SparseCodes:
    """Set the acts of all other latents to zero."""
    mine = torch.isin(codes.indices, concept.indices.to(codes.indices.device))
    return SparseCodes(codes.acts * mine, codes.indices)


def evidence(sae: SAE, concepts: Sequence[ConceptFeatures], codes: SparseCodes) -> Float[Tensor, "tokens concepts"]:
    """Return the matched filter's response, `scale_c * sum_j w_cj z_tj + offset_c`: summed inside a token.

    In units of the concept: 0 is what the strongest retained prompts reach, 1 what its own prompts do (see `itd.erasing`).
    """
    bank = filter_bank(tuple(concepts))
    acts = dense_acts(codes, bank.features.to(codes.indices.device))
    return acts @ bank.weights.to(acts.device) * bank.scale.to(acts.device) + bank.offset.to(acts.device)


def contribution(sae: SAE, concepts: Sequence[ConceptFeatures], codes: SparseCodes) -> Float[Tensor, "tokens concepts"]:
    """Return the norm of what each concept's features write, `|| sum_{j in c} z_tj W_dec[j] ||`."""
    return torch.stack([sae.write(keep_features(codes, concept)).norm(dim=-1) for concept in concepts], 1)


def reconstruction(
    sae: SAE,
    concepts: Sequence[ConceptFeatures],
    codes: SparseCodes,
    x: Float[Tensor, "tokens d_model"],
    strength: float,
) -> Float[Tensor, "tokens concepts"]:
    """Return the paper's score, MSE(edited reconstruction, x), per token. Source: ItD, section 4.3."""
    error = sae.decode(codes) - x
    written = (sae.write(keep_features(codes, concept)) for concept in concepts)
    return torch.stack([(error + (strength - 1) * part).square().mean(-1) for part in written], 1)


def score(
    name: ScoreName,
    sae: SAE,
    concepts: Sequence[ConceptFeatures],
    x: Float[Tensor, "tokens d_model"],
    strength: float = -8.0,
) -> Scores:
    """Score the content tokens of one prompt. Calibration and use both call this function.

    Maximum over tokens, of a concept with a window over the means of consecutive ones; for `reconstruction` the mean over all,
    as the paper applies it. A prompt without content tokens scores minus infinity: it never fires.

    Raises:
        ValueError: an unknown score, NaN activations, or a score that is NaN, which no threshold could stop.
    """
    require_score(name)
    if len(x) == 0:
        return score_codes(name, sae, concepts, no_codes(sae, x.device), x, strength)
    return score_codes(name, sae, concepts, sae.encode(x), x, strength)


def score_codes(
    name: ScoreName,
    sae: SAE,
    concepts: Sequence[ConceptFeatures],
    codes: SparseCodes,
    x: Float[Tensor, "tokens d_model"] | None = None,
    strength: float = -8.0,
) -> Scores:
    """Score the content tokens of one prompt from their codes; `reconstruction` also needs the activations.

    Raises:
        ValueError: see `score`; or `reconstruction` without activations.
    """
    require_score(name)
    if len(codes.acts) == 0:
        return Scores(torch.zeros(0, len(concepts)), torch.full((len(concepts),), -math.inf), codes)
    tokens = token_scores(name, sae, concepts, codes, x, strength)
    if name == "reconstruction":
        return Scores(tokens, tokens.mean(0), codes)
    tokens = window_scores(tokens, torch.tensor([len(tokens)]), [concept.window for concept in concepts])
    return Scores(tokens, tokens.amax(0), codes)


def score_prompts(
    name: ScoreName, sae: SAE, concepts: Sequence[ConceptFeatures], prompts: PromptCodes
) -> Float[Tensor, "prompts concepts"]:
    """Score many prompts from their codes: for each what `score_codes` gives for its tokens.

    Raises:
        ValueError: see `score`; `reconstruction` needs activations.
    """
    size = max(1, DENSE_BYTES // (4 * max(1, len(all_indices(concepts)))))
    parts = zip(prompts.codes.acts.split(size), prompts.codes.indices.split(size), strict=True)
    tokens = [token_scores(name, sae, concepts, SparseCodes(*part)) for part in parts]
    scores = torch.cat(tokens) if tokens else torch.zeros(0, len(concepts))
    return prompts.largest(window_scores(scores, prompts.n_tokens, [concept.window for concept in concepts]))


def token_scores(
    name: ScoreName,
    sae: SAE,
    concepts: Sequence[ConceptFeatures],
    codes: SparseCodes,
    x: Float[Tensor, "tokens d_model"] | None = None,
    strength: float = -8.0,
) -> Float[Tensor, "tokens concepts"]:
    """Score single tokens from their codes; `reconstruction` also needs the activations.

    Raises:
        ValueError: see `score_codes`.
    """
    require_score(name)
    if name == "reconstruction":
        if x is None:
            raise ValueError("the score 'reconstruction' needs the activations, not only their codes")
        tokens = reconstruction(sae, concepts, codes, x.to(sae.b_dec.dtype), strength)
    else:
        tokens = (evidence if name == "evidence" else contribution)(sae, concepts, codes)
    if tokens.isnan().any():
        raise ValueError("the score is NaN: the autoencoder's or the features' weights are damaged; load or make them again")
    return tokens


def require_score(name: str) -> None:
    if name not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {name!r}")


def no_codes(sae: SAE, device: torch.device) -> SparseCodes:
    """Return the codes of no tokens."""
    k = sae.config.k
    return SparseCodes(torch.zeros(0, k, device=device), torch.zeros(0, k, dtype=torch.int64, device=device))


# Calibration


def threshold_for_fpr(negatives: Float[Tensor, " n"], fpr: float) -> float:
    """Return the smallest threshold that a new negative reaches with probability at most `fpr`.

    The ceil((n + 1)(1 - fpr))-th smallest negative score, exceeded by more than the rounding that a prompt's company in a
    batch decides: split conformal prediction. With too few negatives for the rate, just above the largest.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate lies between 0 and 1, got {fpr}")
    ordered = negatives.sort().values
    rank = min(math.ceil((len(ordered) + 1) * (1 - fpr)), len(ordered))
    margin = ROUNDING * ordered.abs().nan_to_num(posinf=0.0).max()
    return float(torch.nextafter(ordered[rank - 1] + margin, torch.tensor(math.inf)))


def threshold_for_recall(positives: Float[Tensor, " n"], recall: float) -> float:
    """Return the largest threshold that a new positive reaches with probability at least `recall`.

    The floor((n + 1)(1 - recall))-th smallest positive score; with too few positives, the smallest.

    Raises:
        ValueError: a recall that is not between 0 and 1.
    """
    if not 0 < recall < 1:
        raise ValueError(f"a recall lies between 0 and 1, got {recall}")
    ordered = positives.sort().values
    rank = max(math.floor((len(ordered) + 1) * (1 - recall)), 1)
    return float(ordered[rank - 1])


def unit_apart(
    own: Float[Tensor, " n"], others: Float[Tensor, " m"], fpr: float, own_quantile: float = 0.05, part_way: float = PART_WAY
) -> tuple[float, float]:
    """Return scale and offset of the unit in which `part_way` is a concept's threshold, by held-out scores.

    0 is what a retained prompt reaches with probability at most `fpr`, 1 a quantile of the concept's own prompts: the lowest
    score, save one in twenty. Where the two are not apart, the threshold is what the retained prompts reach. Where they hardly
    are, the unit is larger: else scores would magnify what rounding does.
    """
    low, high = threshold_for_fpr(others, fpr), float(own.quantile(own_quantile))
    threshold = low + part_way * max(high - low, 0)
    unit = max(high - low, SMALLEST_UNIT * (low - float(others.median())))
    scale = 1 / unit if unit > 1e-6 + ROUNDING * abs(low) else 1.0
    return scale, part_way - ROUNDING - scale * threshold  # what is just below the threshold stays below in this unit


def auroc(positives: Float[Tensor, " n"], negatives: Float[Tensor, " m"]) -> float:
    """Return the probability that a positive scores higher than a negative; ties count half."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives)
    up_to = torch.searchsorted(ordered, positives, right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


@dataclass(frozen=True)
class Calibration:
    """What a threshold was chosen on and what it does there."""

    rule: str
    """`fpr=0.005`, `recall=0.95` or `0.99*min`."""
    threshold: float
    recall: float
    """Share of the held-out target prompts at or above the threshold."""
    false_positive_rate: float
    """Share of the held-out retain and neutral prompts at or above it."""
    auroc: float
    n_positives: int
    n_negatives: int
    curve: tuple[tuple[float, float, float], ...] = ()
    """ROC: (threshold, recall, false-positive rate), from the highest threshold down."""


def calibrate(
    positives: Float[Tensor, " n"],
    negatives: Float[Tensor, " m"],
    *,
    fpr: float | None = None,
    recall: float | None = None,
) -> Calibration:
    """Choose a threshold for a stated false-positive rate or recall; for the paper's `0.99 * min(positives)` give neither.

    Raises:
        ValueError: no positives or no negatives, or none with content tokens, or both rates given.
    """
    if len(positives) == 0 or len(negatives) == 0:
        raise ValueError(f"calibration needs target and retain prompts, got {len(positives)} and {len(negatives)}")
    if not (positives.isfinite().any() and negatives.isfinite().any()):
        raise ValueError("calibration needs target and retain prompts with content tokens, got only empty ones on one side")
    if fpr is not None and recall is not None:
        raise ValueError("give a false-positive rate or a recall, not both")
    if fpr is not None:
        rule, threshold = f"fpr={fpr}", threshold_for_fpr(negatives, fpr)
    elif recall is not None:
        rule, threshold = f"recall={recall}", threshold_for_recall(positives, recall)
    else:
        rule, threshold = "0.99*min", 0.99 * float(positives.min())
    return describe_threshold(rule, threshold, positives, negatives)


def describe_threshold(
    rule: str, threshold: float, positives: Float[Tensor, " n"], negatives: Float[Tensor, " m"]
) -> Calibration:
    """Return what a threshold does on held-out scores."""

    def rates(at: float) -> tuple[float, float]:
        return float((positives >= at).double().mean()), float((negatives >= at).double().mean())

    scores = torch.cat([positives, negatives])
    levels = scores[scores.isfinite()].quantile(torch.linspace(1, 0, 33).to(positives.dtype))
    curve = tuple((float(level), *rates(float(level))) for level in levels)
    return Calibration(rule, threshold, *rates(threshold), auroc(positives, negatives), len(positives), len(negatives), curve)


@dataclass(frozen=True, eq=False)
class Decision:
    """What the gate says of one prompt. `score` and `threshold` are those of the concept with the largest margin.

    A prompt is mostly decided by bounds of its scores before they are known. They are computed when they are asked for, and are
    the same as if they had been computed first.
    """

    fired: bool
    concepts: tuple[int, ...]
    """Indices of the concepts that reached their threshold."""
    thresholds: tuple[float, ...]
    """Of all concepts."""
    compute: Callable[[], Scores] = field(repr=False)
    early: bool = False
    """Decided before its scores were computed."""
    meaning: Meaning | None = None
    """What the gates on the whole prompt said, where there are any."""

    def with_meaning(self, meaning: Meaning) -> Decision:
        """Return the decision of this gate and another, on the whole prompt."""
        both = meaning if self.meaning is None else self.meaning.joined(meaning)
        return replace(self, fired=bool(self.concepts or both.concepts), meaning=both)

    @cached_property
    def scores(self) -> Scores:
        """Scores of all concepts at every content token, and the codes of these tokens."""
        return self.compute()

    @cached_property
    def strongest(self) -> int:
        """Index of the concept with the largest margin."""
        return int(margins(self.scores, self.thresholds).argmax())

    @property
    def score(self) -> float:
        return float(self.scores.concepts[self.strongest])

    @property
    def threshold(self) -> float:
        return self.thresholds[self.strongest]

    @property
    def token_scores(self) -> Float[Tensor, "tokens concepts"]:
        return self.scores.tokens


def margins(scores: Scores, thresholds: Sequence[float]) -> Float[Tensor, " concepts"]:
    """Return how far each concept's score is above its threshold."""
    found = scores.concepts
    return found - torch.tensor(thresholds, dtype=found.dtype, device=found.device)


@dataclass(frozen=True)
class Gate:
    """A score and one threshold per concept: a prompt fires when any concept reaches its own."""

    score: ScoreName
    thresholds: tuple[float, ...]
    strength: float = -8.0
    """Strength inside the paper's score; the others do not use it."""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        if not all(threshold > -math.inf for threshold in self.thresholds):
            raise ValueError(f"thresholds must be numbers above -inf, got {self.thresholds}: nothing or everything would fire")

    def decide(
        self,
        sae: SAE,
        concepts: Sequence[ConceptFeatures],
        x: Float[Tensor, "tokens d_model"],
        early_exit: EarlyExit | None = None,
    ) -> Decision:
        """Decide on the content tokens of one prompt. Batch neighbours and padding have no part in it.

        With an `early_exit`, the full computation is left out where the result is certain without it.
        """
        settled = () if early_exit is None else early_exit.settle(x, self.thresholds)
        return self.decide_settled(sae, concepts, x, settled)

    def decide_settled(
        self,
        sae: SAE,
        concepts: Sequence[ConceptFeatures],
        x: Float[Tensor, "tokens d_model"],
        settled: Sequence[Reached | None],
    ) -> Decision:
        """Decide by what is certain of every token, if that decides; else in full.

        Where no token reaches a threshold, no window does. Where one does, its window may not.
        """
        reached = [each for each in settled if each is not None]
        open_windows = any(reached) and any(concept.window > 1 for concept in concepts)
        if len(x) == 0 or len(reached) < len(x) or open_windows:
            return self.decide_in_full(sae, concepts, x)
        fired = tuple(sorted(set[int]().union(*reached)))
        return Decision(bool(fired), fired, self.thresholds, lambda: score(self.score, sae, concepts, x, self.strength), True)

    def decide_in_full(self, sae: SAE, concepts: Sequence[ConceptFeatures], x: Float[Tensor, "tokens d_model"]) -> Decision:
        """Decide by the scores."""
        scores = score(self.score, sae, concepts, x, self.strength)
        fired = tuple((margins(scores, self.thresholds) >= 0).nonzero().flatten().tolist())
        return Decision(bool(fired), fired, self.thresholds, lambda: scores)

    def early_exit(self, sae: SAE, concepts: Sequence[ConceptFeatures], often: Int[Tensor, " m"] | None) -> EarlyExit | None:
        """Return what decides most prompts early; `often`: latents that are active in most prompts.

        The paper's score contains the autoencoder's error and always needs the full computation: None.
        """
        if self.score == "reconstruction":
            return None
        some = torch.zeros(0, dtype=torch.int64) if often is None else often
        return EarlyExit.make(sae, concepts, some, matched=self.score == "evidence")

    def __or__(self, other: Gate) -> Gate:
        """Join the gates of two erasers."""
        if (self.score, self.strength) != (other.score, other.strength):
            raise ValueError(f"gates join only with the same score and strength: {self.score!r} and {other.score!r}")
        return Gate(self.score, self.thresholds + other.thresholds, self.strength)

    def to_dict(self) -> dict[str, Any]:
        return {"score": self.score, "thresholds": list(self.thresholds), "strength": self.strength}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gate:
        rest = {key: value for key, value in values.items() if key != "thresholds"}
        return cls(thresholds=tuple(values["thresholds"]), **rest)
