"""The embedded world as a laboratory: prompt sets without and with leaks, erasers, pictures, and what the judge sees."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from itd import emoji
from itd.emoji.data import Noun
from itd.eraser import Eraser
from itd.erasing import EraseConfig, erase
from itd.evaluation.ledger import Ledger
from itd.evaluation.provenance import eraser_record, pipeline_record, weights_sha256
from itd.gate import Decision
from itd.inputs import erase_settings
from itd.metrics.alignment import clip_score, perceptual_distance
from itd.prompts import PromptSet, Split, check_leaks, fill
from itd.sae import SAE

if TYPE_CHECKING:
    from itd.emoji.judge import Judge
    from itd.explain import Check

CHUNK = 25
"""Pictures to a pipeline call. The same cut in every arm, as kernels may round differently for another batch size."""
Leak = Literal["leak_free", "leaky"]
LEAKS: tuple[Leak, ...] = ("leak_free", "leaky")
NEVER = -1e9
"""Stands for the score of a prompt without words, minus infinity, which JSON does not have."""
SELECTION_SEED = 9_999
"""Of the pictures that tell which sentences the pipeline follows; none that is measured has it."""
UNSURE_QUANTILE = 0.05
"""A picture shows no object where the judge is less sure than in this share of the unerased pictures that it names right."""


DETECTOR = {
    "detector": "the judge of the embedded world, trained on renders",
    "classes": "its nouns and designs",
    "threshold": "what it names most likely in the picture, a noun also in a half of it (`shown`)",
}
"""What decides what a picture shows, for the records of protocols."""


class Case(NamedTuple):
    """One picture to draw: prompt, seed, and what should be seen."""

    prompt: str
    seed: int
    noun: str
    design: str | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures of some cases. `digests`: hash of the fp32 bits; `fired`: what the attached gate said, False without one."""

    cases: tuple[Case, ...]
    pixels: UInt8[Tensor, "n 3 h w"]
    digests: tuple[bytes, ...]
    fired: tuple[bool, ...]

    @property
    def images(self) -> Float[Tensor, "n 3 h w"]:
        """The pictures as saved, in [-1, 1]."""
        return self.pixels.float() / 127.5 - 1

    def same_as(self, other: Drawn) -> list[bool]:
        """Tell, per picture, whether both have the same bits."""
        if self.cases != other.cases:
            raise ValueError("only pictures of the same prompts and seeds are compared")
        return [a == b for a, b in zip(self.digests, other.digests, strict=True)]

    def part(self, rows: Sequence[int]) -> Drawn:
        """Return some of the pictures."""
        cases, digests = tuple(self.cases[i] for i in rows), tuple(self.digests[i] for i in rows)
        return Drawn(cases, self.pixels[list(rows)], digests, tuple(self.fired[i] for i in rows))

    def rows(self, nouns: Iterable[str]) -> list[int]:
        wanted = set(nouns)
        return [i for i, case in enumerate(self.cases) if case.noun in wanted]


class Sight(NamedTuple):
    """What the judge sees in pictures. `nouns`, `designs`, `confidence` of the noun: of the whole picture. `shown`: the nouns
    that are named there or in a half of a scene, with how sure it is (`Judge.shown`)."""

    nouns: list[str]
    designs: list[str]
    confidence: Float[Tensor, " n"]
    features: Float[Tensor, "n d"]
    shown: list[dict[str, float]]

    def right(self, cases: Sequence[Case]) -> list[bool]:
        """Tell, per picture, whether it shows the noun that was asked for."""
        return [case.noun in nouns for nouns, case in zip(self.shown, cases, strict=True)]

    def shows_any(self, names: Iterable[str], least: float) -> list[bool]:
        """Tell, per picture, whether it shows one of the nouns and the judge is sure enough of it."""
        wanted = set(names)
        return [any(noun in wanted and sure >= least for noun, sure in nouns.items()) for nouns in self.shown]


@dataclass(frozen=True)
class Made:
    """An eraser and what it took: seconds to select and calibrate, bytes on disk."""

    eraser: Eraser
    seconds: float
    n_bytes: int


class Sets(NamedTuple):
    """What an eraser is made from."""

    target: PromptSet
    retain: PromptSet
    neutral: PromptSet


class World:
    """Pipeline, judge and autoencoder of the embedded world, with a folder that keeps erasers and pictures.

    eraser: the one that is measured, where it was made elsewhere; the folder then belongs to it.
    """

    def __init__(
        self,
        out: Path,
        protocol: str,
        settings: dict[str, Any],
        pipe: Any = None,
        sae: SAE | None = None,
        eraser: Eraser | None = None,
    ) -> None:
        self.out = out
        self.pipe: Any = emoji.load_pipeline() if pipe is None else pipe
        self.sae = emoji.load_sae() if sae is None else sae
        self.judge: Judge = emoji.load_judge()
        self.nouns: dict[str, Noun] = {noun.name: noun for noun in emoji.nouns()}
        self.record: dict[str, Any] = {
            **pipeline_record(self.pipe), "sae_sha256": self.sae.sha256, "hook_point": str(emoji.HOOK_POINT),
            "judge_sha256": weights_sha256(self.judge), "steps": emoji.STEPS, "guidance_scale": emoji.GUIDANCE_SCALE,
        }  # fmt: skip
        if eraser is not None:
            self.record["eraser"] = eraser_record(eraser)
        self.ledger = Ledger(out / "cells", {"protocol": protocol, "settings": settings, **self.record})

    @cached_property
    def clip(self) -> tuple[Any, Any]:
        return emoji.load_clip()

    def of_role(self, *roles: str) -> list[str]:
        return [name for name, noun in self.nouns.items() if noun.role in roles]

    @cached_property
    def recognised(self) -> dict[str, float]:
        """How often the judge names each noun in unerased pictures, as the world's own card measured it."""
        import json

        return json.loads((emoji.model_folder() / "benchmark.json").read_text())["accuracy"]

    def best_drawn(self, names: Iterable[str], n: int) -> list[str]:
        """Return the n nouns that are recognised best in unerased pictures; ties, which nearly all are, by name.

        Raises:
            ValueError: there are fewer.
        """
        ranked = sorted(set(names), key=lambda name: (-self.recognised.get(name, 0.0), name))
        if len(ranked) < n:
            raise ValueError(f"the embedded world has {len(ranked)} such nouns, {n} are asked for")
        return ranked[:n]

    def known(self, eraser: Eraser) -> list[str]:
        """Return what a given eraser erases, each name once.

        Raises:
            ValueError: the world has no noun of one of the names.
        """
        names = list(dict.fromkeys(eraser.names))
        unknown = [name for name in names if name not in self.nouns]
        if unknown:
            raise ValueError(f"the eraser erases {unknown[0]!r}, which is no noun of the embedded world")
        return names

    # Erasers

    def eraser(self, key: str, sets: Sets, config: EraseConfig) -> Made:
        """Make an eraser, or load the one that an earlier run made. What settings leave open is the embedded world's own."""
        folder = self.out / "erasers" / key.replace("/", "-").replace(" ", "-")

        def make() -> dict[str, Any]:
            began = time.monotonic()
            erase(self.pipe, self.sae, emoji.HOOK_POINT, *sets, erase_settings(None, config)).save(folder)
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
            return {"seconds": time.monotonic() - began, "n_bytes": n_bytes}

        found = self.ledger.cell(f"eraser {key}", make)
        return Made(Eraser.load(folder, self.sae), found["seconds"], found["n_bytes"])

    def fired(self, key: str, eraser: Eraser, prompts: Sequence[str]) -> list[bool]:
        """Return the gate's decision on every prompt. Scores are not asked for, so that the gate may decide early."""

        def decide() -> list[bool]:
            found = {check.prompt: check.fired for check in eraser.check(self.pipe, list(dict.fromkeys(prompts)))}
            return [found[prompt] for prompt in prompts]

        return self.ledger.cell(f"fired {key} {digest_of(prompts)}", decide)

    def margins(self, key: str, eraser: Eraser, prompts: Sequence[str]) -> list[float]:
        """Return score minus threshold of every prompt; at 0 and above the gate fires."""

        return gate_margins(self.ledger, key, eraser, self.pipe, prompts)

    # Pictures

    def sentences(self, names: Sequence[str], templates: Sequence[str], drawn_only: bool) -> dict[str, list[str]]:
        """Return the sentences to measure every noun in: all, or those in which the unerased pipeline draws it.

        One picture each tells, of another seed than what is measured. So MACE takes celebrities that its detector knows in
        unerased pictures: what was not drawn before says nothing about an eraser.

        Raises:
            ValueError: no noun is drawn in any sentence.
        """
        if not drawn_only:
            return {name: list(templates) for name in names}
        found = dict[str, list[str]]()
        for name in tqdm(names, desc="draw sentences", unit="noun", leave=False):
            cases = [Case(fill(template, name), SELECTION_SEED, name) for template in templates]
            right = self.see(self.draw("unerased", cases)).right(cases)
            found[name] = [template for template, flag in zip(templates, right, strict=True) if flag]
        if not any(found.values()):
            raise ValueError("the pipeline draws none of the nouns in any test sentence; drawn_only=False measures all")
        return found

    def draw(self, arm: str, cases: Sequence[Case], eraser: Eraser | None = None) -> Drawn:
        """Draw cases, chunk by chunk, each kept on disk; with an eraser, attached to the pipeline."""
        listed = list(cases)
        chunks = [tuple(listed[start : start + CHUNK]) for start in range(0, len(listed), CHUNK)]
        parts = []
        for chunk in tqdm(chunks, desc=f"draw {arm}", unit="chunk", leave=False, disable=len(chunks) < 2):
            name = hashlib.sha256(repr(chunk).encode()).hexdigest()[:16]
            parts.append(self.ledger.tensors(f"pictures {arm} {name}", lambda chunk=chunk: self.draw_chunk(chunk, eraser)))
        digests = torch.cat([part["digests"] for part in parts])
        fired = torch.cat([part["fired"] for part in parts])
        pixels = torch.cat([part["pixels"] for part in parts])
        return Drawn(tuple(listed), pixels, tuple(map(bytes, digests.tolist())), tuple(map(bool, fired.tolist())))

    def draw_chunk(self, cases: Sequence[Case], eraser: Eraser | None) -> dict[str, Tensor]:
        """Draw a few cases in one call of the pipeline."""
        from itd.emoji.generate import generate, to_uint8

        prompts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
        options: dict[str, Any] = {"steps": emoji.STEPS, "guidance_scale": emoji.GUIDANCE_SCALE, "batch_size": len(cases)}
        if eraser is None:
            images, decisions = generate(self.pipe, prompts, seeds, **options), []
        else:
            with eraser.attach(self.pipe) as attachment:
                images = generate(self.pipe, prompts, seeds, **options)
                decisions: list[Decision] = list(attachment.decisions)  # pyright: ignore[reportAttributeAccessIssue]
            if len(decisions) != len(cases):
                raise RuntimeError(f"the gate decided on {len(decisions)} prompts of {len(cases)}: a part was not gated")
        fired = torch.tensor([decision.fired for decision in decisions] or [False] * len(cases))
        digests = torch.stack([picture_digest(image) for image in images])
        pixels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()
        return {"pixels": pixels, "digests": digests, "fired": fired.to(torch.uint8)}

    @torch.no_grad()
    def see(self, drawn: Drawn) -> Sight:
        """Let the judge look at pictures."""
        batches = drawn.images.split(256)
        verdicts = [self.judge(batch) for batch in batches]
        shown = [seen for b, verdict in zip(batches, verdicts, strict=True) for seen in self.judge.shown_in(b, verdict.noun)]
        nouns = torch.cat([verdict.noun for verdict in verdicts])
        designs = torch.cat([verdict.design for verdict in verdicts])
        confidence = nouns.softmax(1).amax(1)
        named = [self.judge.nouns[i] for i in nouns.argmax(1).tolist()]
        styled = [self.judge.designs[i] for i in designs.argmax(1).tolist()]
        features = torch.cat([verdict.features for verdict in verdicts])
        return Sight(named, styled, confidence, features, shown)

    @torch.no_grad()
    def clip_features(self, drawn: Drawn) -> Float[Tensor, "n d"]:
        """Return the image embeddings of the world's CLIP."""
        model, _ = self.clip
        pooled = torch.cat([model.vision_model(batch).pooler_output for batch in drawn.images.split(128)])
        return model.visual_projection(pooled)

    @torch.no_grad()
    def clip_scores(self, drawn: Drawn) -> Float[Tensor, " n"]:
        """Return the CLIP score of every picture with its prompt."""
        model, processor = self.clip
        prompts = [case.prompt for case in drawn.cases]
        texts = []
        for start in range(0, len(prompts), 128):
            tokens = processor.tokenizer(prompts[start : start + 128], padding=True, truncation=True, return_tensors="pt")
            texts.append(model.text_projection(model.text_model(**tokens).pooler_output))
        return clip_score(self.clip_features(drawn), torch.cat(texts))

    @torch.no_grad()
    def perceptual(self, a: Drawn, b: Drawn) -> Float[Tensor, " n"]:
        """Return the distance of two pictures of one prompt in the judge's feature maps."""
        parts = zip(a.images.split(128), b.images.split(128), strict=True)
        return torch.cat([perceptual_distance(self.maps(x), self.maps(y)) for x, y in parts])

    def maps(self, images: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        """Return the judge's feature maps after each of its blocks."""
        found, x = [], images
        for layer in self.judge.body:
            x = layer(x)
            found.append(x)
        return found

    @torch.no_grad()
    def distances(self, names: Sequence[str], erased: Sequence[str]) -> dict[str, float]:
        """Return, per name, 1 - cosine to the nearest erased name, in centred pooled text embeddings."""
        every = [*names, *erased]
        tokens = self.pipe.tokenizer(every, padding=True, return_tensors="pt")
        pooled = self.pipe.text_encoder(tokens.input_ids).pooler_output
        unit = F.normalize(pooled - pooled.mean(0), dim=1)
        nearest = (unit[: len(names)] @ unit[len(names) :].T).amax(1)
        return dict(zip(names, (1 - nearest).tolist(), strict=True))


def gate_margins(ledger: Ledger, key: str, eraser: Eraser, pipe: Any, prompts: Sequence[str]) -> list[float]:
    """Return score minus threshold of every prompt, kept in a ledger; at 0 and above the gate fires."""

    def measure() -> list[float]:
        found = {check.prompt: check for check in eraser.check(pipe, list(dict.fromkeys(prompts)))}
        rows = {text: margin_of(check) for text, check in found.items()}
        return [rows[prompt] for prompt in prompts]

    return ledger.cell(f"gate {key} {digest_of(prompts)}", measure)


def digest_of(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


def margin_of(check: Check) -> float:
    """Return how far a prompt is over its threshold; its sign is the decision, also where rounding would lose it."""
    margin = max(check.score, NEVER) - check.threshold
    if (margin >= 0) == check.fired:
        return margin
    return 0.0 if check.fired else -1e-12


def picture_digest(image: Float[Tensor, "3 h w"]) -> UInt8[Tensor, " 16"]:
    """Return what identifies a picture's bits."""
    found = hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def unsure_below(sight: Sight, cases: Sequence[Case]) -> float:
    """Return the confidence under which the judge is said to see no object, from unerased pictures that it names right."""
    right = [c for c, said, case in zip(sight.confidence.tolist(), sight.nouns, cases, strict=True) if said == case.noun]
    return float(torch.tensor(right).quantile(UNSURE_QUANTILE)) if right else 0.0


# Prompt sets


def leak_free_sets(names: Sequence[str], held_out: Iterable[str], synonyms: Sequence[str] = ()) -> Sets:
    """Return the sets to erase `names` from which everything about the held-out concepts is taken out.

    Raises:
        ValueError: see `itd.emoji.prompts.erase_sets`.
    """
    from itd.emoji.prompts import erase_sets

    target, retain, neutral = erase_sets(names, synonyms)
    hidden = set(held_out)
    kept = [part.filter(lambda prompt: prompt.concept not in hidden) for part in (retain, neutral)]
    return Sets(target, *kept)


def leaky_sets(names: Sequence[str], positives: PromptSet, negatives: PromptSet) -> Sets:
    """Return the sets of the published protocol: the prompts that are evaluated are selected and calibrated on.

    Half of the evaluated templates go to the features, half to the threshold; so both see the kept concepts too.
    """
    from itd.emoji.prompts import erase_sets

    target, retain, neutral = erase_sets(names)
    return Sets(target + deal(positives), retain + deal(negatives), neutral)


def deal(prompts: PromptSet) -> PromptSet:
    """Give the templates of prompts to fit and calibrate, in turn."""
    order = {key: index for index, key in enumerate(dict.fromkeys(p.template or p.text for p in prompts))}
    splits: tuple[Split, Split] = ("fit", "calibrate")
    return PromptSet(tuple(replace(p, split=splits[order[p.template or p.text] % 2]) for p in prompts))


def require_no_leak(sets: Sets, positives: PromptSet, negatives: PromptSet) -> None:
    """Raise ValueError if what is evaluated was seen: a text or template of the target, also a concept of what is kept."""
    check_leaks(sets.target, positives, concepts=False)
    check_leaks(sets.target, negatives, concepts=False)
    check_leaks(sets.retain + sets.neutral, positives, concepts=False)
    check_leaks(sets.retain + sets.neutral, negatives)


def sample(rng: random.Random, items: Sequence[str], n: int) -> list[str]:
    """Draw n items without repetition, or all where there are fewer."""
    return rng.sample(list(items), min(n, len(items)))
