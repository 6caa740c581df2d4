"""Why the gate decided as it did: tokens, features, and the prompts that a feature fires on."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from itd import pipelines
from itd.activations import Contents, joined, stream, stream_contents
from itd.cache import ByteCache
from itd.drafts import draft_states
from itd.early_exit import Reached
from itd.features import ConceptFeatures, all_indices
from itd.gate import Decision, Meaning, dense_acts
from itd.hooks import HookPoint, edit_output
from itd.kernels import SparseCodes
from itd.prompts import PromptSet
from itd.sae import SAE

if TYPE_CHECKING:
    from itd.eraser import Eraser

MEMORY_BYTES = 64 * 2**20
"""Upper bound of what `check` remembers of an eraser's prompts."""
DECISION_BYTES = 8
"""Per token and dimension: an activation, and the scores and codes that may be made from it."""
PREFIX_BYTES = 200
SETTLED_TOKENS = 2**14
"""Tokens that are settled at a time: the few that the copied rows leave open share one pass over the encoder."""
WHOLE_BATCH = 64
"""Prompts that go through the whole text encoder at a time."""


class FeatureHit(NamedTuple):
    """A target feature that was active: which latent, of which concept, at which token, how much."""

    feature: int
    concept: str
    token: str
    act: float


@dataclass(frozen=True, eq=False)
class Check:
    """What the gate says of one prompt, and why. Scores, tokens and features are computed when they are asked for."""

    prompt: str
    decision: Decision
    eraser: Eraser = field(repr=False)
    read_tokens: Callable[[], list[str]] = field(repr=False)

    @property
    def fired(self) -> bool:
        return self.decision.fired

    @property
    def concepts(self) -> tuple[str, ...]:
        """Concepts that reached their threshold in any gate."""
        first = tuple(self.eraser.names[c] for c in self.decision.concepts)
        meant = self.meaning.concepts if self.meaning else ()
        return first + tuple(name for name in meant if name not in first)

    @property
    def meaning(self) -> Meaning | None:
        """What the gates on the whole prompt say, where the eraser has one."""
        return self.decision.meaning

    @property
    def score(self) -> float:
        """Of the concept that comes closest to its threshold, or furthest over it."""
        return self.decision.score

    @property
    def threshold(self) -> float:
        return self.decision.threshold

    @cached_property
    def tokens(self) -> tuple[tuple[str, float], ...]:
        """Every content token with its score for the deciding concept."""
        scores = self.decision.token_scores
        if len(scores) == 0:
            return ()
        return tuple(zip(self.read_tokens(), scores[:, self.decision.strongest].tolist(), strict=True))

    @cached_property
    def features(self) -> tuple[FeatureHit, ...]:
        """Active target features, strongest first, at most eight."""
        return tuple(feature_hits(self.eraser.concepts, self.read_tokens(), self.decision.scores.codes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the score of a prompt without content tokens is null."""
        score = self.score if math.isfinite(self.score) else None
        return {
            "prompt": self.prompt, "fired": self.fired, "score": score, "threshold": self.threshold,
            "concepts": list(self.concepts),
            "tokens": [{"token": token, "score": score} for token, score in self.tokens],
            "features": [hit._asdict() for hit in self.features],
            **({"meaning": self.meaning._asdict()} if self.meaning else {}),
        }  # fmt: skip


class PromptMemory:
    """What a text encoder's prompts were decided to be, so that a prompt that comes again is not encoded again.

    Also what is certain of the last token of a beginning of a prompt: in a causal encoder its activation depends on nothing
    behind it. Forgotten as soon as the encoder's probe activation changes by a bit.
    """

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        self.decisions: ByteCache[Decision] = ByteCache(max_bytes)
        self.prefixes: ByteCache[Reached] = ByteCache(max_bytes // 4)
        self.probe: Tensor | None = None

    def require(self, probe: Float[Tensor, " d_model"]) -> None:
        """Forget everything if it is of another encoder."""
        if self.probe is None or not torch.equal(self.probe, probe):
            self.decisions.clear()
            self.prefixes.clear()
        self.probe = probe


def check(
    eraser: Eraser, pipe: Any, prompts: Sequence[str], allow_new_words: bool = False, batch_tokens: int = 1024
) -> list[Check]:
    """Gate prompts without generating; see `Eraser.check`."""
    site, memory = eraser.hook_point, PromptMemory() if allow_new_words else eraser.memory  # new words may change between calls
    probe = pipelines.fingerprint(pipe, site)
    eraser.require_encoder(probe)
    if eraser.pooled is not None or eraser.draft is not None:  # which read what the encoder says behind the hook point
        probe = torch.cat([probe, pipelines.last_state(pipe, site.encoder)])
    if eraser.draft is not None:
        probe = torch.cat([probe, eraser.draft.require_image_model(pipe)])
    memory.require(probe)
    tokenizer = pipelines.tokenizer_of(pipe, site.encoder)
    rows = [tuple(row) for row in pipelines.token_rows(pipe, site.encoder, prompts)]
    if eraser.words is not None and not allow_new_words:
        eraser.words.require(pipe, site.encoder, fresh=False)
        eraser.words.require_known((token for row in rows for token in row), pipe, site.encoder)
    decided = {row: memory.decisions.get(row) for row in rows}
    texts = dict(zip(rows, prompts, strict=True))
    missing = [row for row, decision in decided.items() if decision is None]
    if eraser.pooled is not None or eraser.draft is not None:
        decided |= dict(zip(missing, decide_whole(eraser, pipe, [texts[row] for row in missing]), strict=True))
        missing = []
    batches = stream_contents(pipe, site, missing, [texts[row] for row in missing], batch_tokens, "check prompts")
    for contents in joined(batches, SETTLED_TOKENS):
        for i, decision in zip(contents.prompts, decide_contents(eraser, contents, memory), strict=True):
            decided[missing[i]] = decision

    def read(row: tuple[int, ...]) -> list[str]:
        kept = pipelines.content_mask(torch.tensor([row]), tokenizer)[0]
        return [clean(token) for token in tokenizer.convert_ids_to_tokens(torch.tensor(row)[kept].tolist())]

    checks: list[Check] = []
    for prompt, row in zip(prompts, rows, strict=True):
        decision = decided[row]
        assert decision is not None
        memory.decisions.put(row, decision, DECISION_BYTES * len(row) * eraser.sae.config.d_model)
        checks.append(Check(prompt, decision, eraser, partial(read, row)))
    return checks


@torch.no_grad()
def decide_whole(eraser: Eraser, pipe: Any, prompts: Sequence[str]) -> list[Decision]:
    """Decide on prompts by all gates: the whole text encoder runs, with the eraser's edit, as when it is attached."""
    site = eraser.hook_point
    tokenize = pipelines.tokenize_short if eraser.draft is None else pipelines.tokenize
    encoder, tokenizer = pipelines.encoder_of(pipe, site.encoder), pipelines.tokenizer_of(pipe, site.encoder)
    device = pipelines.device_of(encoder)
    worker = eraser if eraser.sae.W_enc.device == device else eraser.to(device)
    decisions: list[Decision] = []
    starts = range(0, len(prompts), WHOLE_BATCH)
    for start in tqdm(starts, desc="check prompts", unit="batch", leave=False, disable=len(starts) < 16):
        tokens = tokenize(pipe, site.encoder, prompts[start : start + WHOLE_BATCH])
        content, editable = (mask(tokens.input_ids, tokenizer) for mask in (pipelines.content_mask, pipelines.edit_mask))
        first: list[Decision] = []

        def edit(hidden: Tensor, content: Tensor = content, editable: Tensor = editable, out: list[Decision] = first) -> Tensor:
            erased = worker(hidden, content, editable)
            out.extend(erased.decisions)
            return erased.x

        with edit_output(site.resolve(pipe), edit, here=True):
            output = pipelines.run_encoder(pipe, site.encoder, tokens)
        for meanings in meanings_of(eraser, pipe, output):
            first = [d.with_meaning(meaning) for d, meaning in zip(first, meanings, strict=True)]
        decisions += first
    return decisions


def meanings_of(eraser: Eraser, pipe: Any, output: Any) -> Generator[list[Meaning], None, None]:
    """Yield what each gate on the whole prompt says of the text encoder's output.

    Raises:
        ValueError: the output has no pooled embedding and a gate needs it.
    """
    if eraser.pooled is not None:
        embeddings = pipelines.pooled_output(output)
        if embeddings is None:
            name = eraser.hook_point.encoder
            raise ValueError(f"{name} has no pooled output, which the second gate of the eraser needs")
        yield eraser.pooled.decide(embeddings)
    if eraser.draft is not None:
        yield eraser.draft.decide(draft_states(pipe, output[0]))


def decide_contents(eraser: Eraser, contents: Contents, memory: PromptMemory) -> list[Decision]:
    """Decide on prompts; tokens that are settled already are not looked at again."""
    prompts = [x.clone() for x in contents.split()]
    if eraser.early_exit is None:
        decisions = eraser.decide_all(prompts)
    else:
        decisions = eraser.decide_settled(prompts, settle_prefixes(eraser, contents.keys, contents.x, memory))
    if not all(decision.early for decision in decisions):
        eraser.sae.release()
    return decisions


def settle_prefixes(
    eraser: Eraser, keys: Sequence[bytes], x: Float[Tensor, "tokens d_model"], memory: PromptMemory
) -> list[Reached | None]:
    """Return which thresholds every token certainly reaches, None if open; each distinct beginning is settled once."""
    known = memory.prefixes
    found: dict[bytes, Reached | None] = {key: known.get(key) for key in keys}
    fresh = {key: i for i, key in reversed(list(enumerate(keys))) if found[key] is None}
    assert eraser.early_exit is not None
    settled = eraser.early_exit.settle(x[list(fresh.values())], eraser.gate.thresholds)
    for key, reached in zip(fresh, settled, strict=True):
        found[key] = reached
        if reached is not None:
            known.put(key, reached, PREFIX_BYTES)
    return [found[key] for key in keys]


def clean(token: str) -> str:
    """Return a token as a reader would write it."""
    return token.replace("</w>", "").replace("▁", "").replace("Ġ", "")


def feature_hits(concepts: Sequence[ConceptFeatures], tokens: list[str], codes: SparseCodes, n: int = 8) -> list[FeatureHit]:
    """Return the n most active target features of a prompt, each at its strongest token."""
    features = all_indices(concepts)
    if len(tokens) == 0 or len(features) == 0:
        return []
    best, where = dense_acts(codes, features.to(codes.indices.device)).max(0)
    top = best.topk(min(n, len(best)))
    owner = {int(f): concept.name for concept in reversed(concepts) for f in concept.indices.tolist()}
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
