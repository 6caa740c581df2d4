"""Why the gate decided as it did: tokens, features, and the prompts that a feature fires on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.activations import stream
from itd.features import all_indices
from itd.gate import Decision, dense_acts
from itd.hooks import HookPoint
from itd.prompts import PromptSet
from itd.sae import SAE

if TYPE_CHECKING:
    from itd.eraser import Eraser


class FeatureHit(NamedTuple):
    """A target feature that was active: which latent, of which concept, at which token, how much."""

    feature: int
    concept: str
    token: str
    act: float


@dataclass(frozen=True)
class Check:
    """What the gate says of one prompt, and why."""

    prompt: str
    fired: bool
    score: float
    threshold: float
    concepts: tuple[str, ...]
    """Concepts that reached their threshold."""
    tokens: tuple[tuple[str, float], ...]
    """Every content token with its score for the deciding concept."""
    features: tuple[FeatureHit, ...]
    """Active target features, strongest first, at most eight."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the score of a prompt without content tokens is null."""
        score = self.score if math.isfinite(self.score) else None
        return {
            "prompt": self.prompt, "fired": self.fired, "score": score, "threshold": self.threshold,
            "concepts": list(self.concepts),
            "tokens": [{"token": token, "score": score} for token, score in self.tokens],
            "features": [hit._asdict() for hit in self.features],
        }  # fmt: skip


def check(eraser: Eraser, pipe: Any, prompts: Sequence[str]) -> list[Check]:
    """Gate prompts without generating; see `Eraser.check`."""
    eraser.require_encoder(pipelines.fingerprint(pipe, eraser.hook_point))
    tokenizer = pipelines.tokenizer_of(pipe, eraser.hook_point.encoder)
    results = []
    for batch in stream(pipe, eraser.hook_point, PromptSet.from_texts(prompts), desc="check prompts"):
        for row, prompt in enumerate(batch.prompts):
            mask = batch.content[row]
            tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[row][mask].tolist())
            results.append(explain(eraser, prompt.text, [clean(token) for token in tokens], batch.x[row][mask]))
    return results


def clean(token: str) -> str:
    """Return a token as a reader would write it."""
    return token.replace("</w>", "").replace("▁", "").replace("Ġ", "")


def explain(eraser: Eraser, prompt: str, tokens: list[str], x: Float[Tensor, "tokens d_model"]) -> Check:
    """Decide on one prompt and collect what decided."""
    decision = eraser.decide(x)
    concept = strongest_concept(decision, eraser.gate.thresholds)
    scores = decision.token_scores[:, concept].tolist() if len(tokens) else []
    return Check(
        prompt, decision.fired, decision.score, decision.threshold,
        tuple(eraser.names[c] for c in decision.concepts), tuple(zip(tokens, scores, strict=True)),
        tuple(feature_hits(eraser, tokens, x)),
    )  # fmt: skip


def strongest_concept(decision: Decision, thresholds: tuple[float, ...]) -> int:
    """Return the concept whose best token comes closest to, or furthest over, its threshold."""
    if len(decision.token_scores) == 0:
        return 0
    return int((decision.token_scores.amax(0).cpu() - torch.tensor(thresholds)).argmax())


def feature_hits(eraser: Eraser, tokens: list[str], x: Float[Tensor, "tokens d_model"], n: int = 8) -> list[FeatureHit]:
    """Return the n most active target features of a prompt, each at its strongest token."""
    if len(tokens) == 0:
        return []
    features = all_indices(eraser.concepts)
    if len(features) == 0:
        return []
    best, where = dense_acts(eraser.sae.encode(x), features).max(0)
    top = best.topk(min(n, len(best)))
    owner = {int(f): concept.name for concept in reversed(eraser.concepts) for f in concept.indices.tolist()}
    hits = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return [FeatureHit(int(features[j]), owner[int(features[j])], tokens[int(where[j])], act) for act, j in hits if act > 0]


class Firing(NamedTuple):
    """A prompt and token on which a latent is active."""

    act: float
    token: str
    prompt: str


def top_prompts(pipe: Any, site: HookPoint, sae: SAE, feature: int, prompts: PromptSet, n: int = 10) -> list[Firing]:
    """Return the prompts on which a latent is most active, to read off what it stands for.

    Raises:
        ValueError: the autoencoder has no such latent.
    """
    if not 0 <= feature < sae.config.n_latents:
        raise ValueError(f"feature {feature} is not in an autoencoder of {sae.config.n_latents} latents")
    tokenizer, firings = pipelines.tokenizer_of(pipe, site.encoder), []
    for batch in stream(pipe, site, prompts, desc="read feature"):
        for row, prompt in enumerate(batch.prompts):
            mask = batch.content[row]
            codes = sae.encode(batch.x[row][mask])
            acts = (codes.acts * (codes.indices == feature)).sum(1)
            if len(acts) and float(acts.max()) > 0:
                token = tokenizer.convert_ids_to_tokens(int(batch.input_ids[row][mask][acts.argmax()]))
                firings.append(Firing(float(acts.max()), clean(token), prompt.text))
    return sorted(firings, reverse=True)[:n]
