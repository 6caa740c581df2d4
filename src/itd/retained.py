"""What must stay, encoded once: the codes of retain and neutral prompts, kept beside the autoencoder for every eraser."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.activations import stream_contents
from itd.artifacts import read_config, read_tensors, reading, save_artifact
from itd.features import FeatureStats, PromptCodes, TokenStats, token_stats
from itd.hooks import HookPoint
from itd.kernels import SparseCodes
from itd.prompts import Prompt, PromptSet, Split, check_leaks
from itd.sae import SAE

logger = logging.getLogger(__name__)

KIND = "retained"
ENCODE_TOKENS = 1024
"""Tokens that are encoded at a time: many, so that the encoder's rows are read seldom."""


@dataclass(frozen=True, eq=False)
class Retained:
    """Prompts that have to stay and their codes, split into those that features are selected on and those held out.

    Made once for an autoencoder; selecting features and calibrating a gate then needs the target's prompts only.
    """

    sae: SAE
    hook_point: HookPoint
    fit: PromptSet
    calibrate: PromptSet
    fit_codes: PromptCodes
    calibrate_codes: PromptCodes
    fingerprint: Float[Tensor, " d_model"]
    """Probe activation of the text encoder."""
    sha256: dict[str, str] = field(default_factory=dict[str, str])
    """Hashes of the prompt sets `retain` and `neutral` that it was made from."""

    def __post_init__(self) -> None:
        for name in ("fit", "calibrate"):
            prompts, codes = getattr(self, name), getattr(self, f"{name}_codes")
            if len(prompts) != len(codes) or int(codes.n_tokens.sum()) != len(codes.codes.acts):
                raise ValueError(f"{len(prompts)} prompts to {name} do not fit the codes of {len(codes)}")
            if codes.codes.indices.numel() and int(codes.codes.indices.max()) >= self.sae.config.n_latents:
                raise ValueError(f"the codes to {name} are not those of an autoencoder of {self.sae.config.n_latents} latents")

    @classmethod
    def make(
        cls, pipe: Any, sae: SAE, site: HookPoint, retain: PromptSet, neutral: PromptSet | None = None, seed: int = 0
    ) -> Retained:
        """Encode what must stay. Prompts that carry no split are split by concept and template.

        Raises:
            ValueError: no prompts, splits that leak, or an autoencoder of another hook point or width.
        """
        require_site(pipe, sae, site)
        others = neutral or PromptSet()
        fit, calibrate = split_negative(retain, others, seed)
        codes = [encode_prompts(pipe, sae, site, prompts) for prompts in (fit, calibrate)]
        hashes = {"retain": retain.sha256, "neutral": others.sha256}
        return cls(sae, site, fit, calibrate, codes[0], codes[1], pipelines.fingerprint(pipe, site), hashes)

    def without(self, prompts: PromptSet) -> Retained:
        """Leave out what is of a concept of the prompts, names it, or has a text of theirs.

        Raises:
            ValueError: nothing is left to fit or to calibrate on.
        """
        parts, about = dict[str, Any](), Mentions(prompts)
        for name in ("fit", "calibrate"):
            kept = [not about(prompt) for prompt in getattr(self, name)]
            if not any(kept):
                raise ValueError(
                    f"of what must stay nothing is left to {name} without {', '.join(prompts.concepts)}; give more"
                )
            parts[name] = PromptSet(tuple(p for p, keep in zip(getattr(self, name), kept, strict=True) if keep))
            parts[f"{name}_codes"] = getattr(self, f"{name}_codes").keep(torch.tensor(kept))
        n_dropped = sum(len(getattr(self, name)) - len(parts[name]) for name in ("fit", "calibrate"))
        if n_dropped == 0:
            return self
        logger.info("%d prompts of what must stay name what is erased and are left out", n_dropped)
        return Retained(self.sae, self.hook_point, **parts, fingerprint=self.fingerprint, sha256=self.sha256)

    def stats(self, k_sel: int) -> FeatureStats:
        """Return the statistics of the prompts that features are selected on."""
        return stats_of(self, k_sel)

    def token_stats(self) -> TokenStats:
        """Return the moments of the latents over the tokens of the prompts that features are selected on."""
        return token_stats_of(self)

    def save(self, folder: str | Path) -> None:
        """Write it to a folder; its autoencoder is named by hash, not copied.

        Raises:
            ValueError: the autoencoder was never saved, or the folder holds something else.
        """
        if self.sae.sha256 is None:
            raise ValueError("save the autoencoder first (sae = sae.save(folder)): what must stay is encoded by it")
        config: dict[str, Any] = {"sae": self.sae.sha256, "hook_point": str(self.hook_point), "prompts_sha256": self.sha256}
        tensors = {"fingerprint": self.fingerprint}
        for name in ("fit", "calibrate"):
            config[name] = [[prompt.text, prompt.concept] for prompt in getattr(self, name)]
            codes: PromptCodes = getattr(self, f"{name}_codes")
            tensors[f"{name}_acts"], tensors[f"{name}_n_tokens"] = codes.codes.acts, codes.n_tokens
            tensors[f"{name}_indices"] = codes.codes.indices.to(torch.int32)
        save_artifact(folder, KIND, config, {"codes": tensors})

    @classmethod
    def load(cls, folder: str | Path, sae: SAE) -> Retained:
        """Read what `save` wrote, for the same autoencoder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: an altered file, or it was made with another autoencoder.
        """
        config = read_config(folder, KIND, ("sae", "hook_point", "prompts_sha256", "fit", "calibrate"))
        keys = ["fingerprint", *(f"{name}_{part}" for name in ("fit", "calibrate") for part in ("acts", "n_tokens", "indices"))]
        tensors = read_tensors(folder, config, "codes", keys)
        if sae.sha256 != config["sae"]:
            raise ValueError(
                f"{folder} was made with another autoencoder (sha256 {config['sae'][:12]}, given {str(sae.sha256)[:12]}); "
                "pass the one it was made with, or make it again"
            )
        with reading(folder):
            parts: dict[str, Any] = {}
            for name in ("fit", "calibrate"):
                parts[name] = PromptSet(tuple(Prompt(text, concept, split=name) for text, concept in config[name]))
                codes = SparseCodes(tensors[f"{name}_acts"], tensors[f"{name}_indices"].long())
                parts[f"{name}_codes"] = PromptCodes(codes, tensors[f"{name}_n_tokens"])
            hook_point = HookPoint.parse(config["hook_point"])
            return cls(sae, hook_point, **parts, fingerprint=tensors["fingerprint"], sha256=config["prompts_sha256"])


@lru_cache(maxsize=4)
def stats_of(retained: Retained, k_sel: int) -> FeatureStats:
    return FeatureStats(retained.sae, k_sel).update_codes(retained.fit_codes)


@lru_cache(maxsize=4)
def token_stats_of(retained: Retained) -> TokenStats:
    return token_stats(retained.fit_codes.codes, retained.sae.config.n_latents)


def require_site(pipe: Any, sae: SAE, site: HookPoint) -> None:
    """Raise ValueError unless the hook point is there and is where the autoencoder was trained."""
    module = site.resolve(pipe)
    if sae.hook_point is not None and (sae.hook_point.encoder != site.encoder or sae.hook_point.resolve(pipe) is not module):
        raise ValueError(f"the autoencoder was trained at {sae.hook_point}, not at {site}; give its own hook point")


def split_negative(retain: PromptSet, neutral: PromptSet, seed: int) -> tuple[PromptSet, PromptSet]:
    """Return what must stay, to fit and to calibrate on.

    Raises:
        ValueError: a split is empty, or splits that were given share a text or a template.
    """
    for prompts in (retain, neutral):
        check_given_splits(prompts)
    both = retain.split_by_concept_and_template(seed) + neutral.split_by_concept_and_template(seed + 7)
    for split in ("fit", "calibrate"):
        if not len(both.of(split)):
            raise ValueError(f"no retain prompts to {split}: give at least 3 concepts in 3 templates, or more texts")
    return both.of("fit"), both.of("calibrate")


def check_given_splits(prompts: PromptSet) -> None:
    """Raise ValueError if splits that came with the prompts share a text or a template."""
    pairs: tuple[tuple[Split, Split], ...] = (("fit", "calibrate"), ("fit", "test"), ("calibrate", "test"))
    for fit, held_out in pairs:
        check_leaks(prompts.of(fit), prompts.of(held_out), concepts=False)


class Mentions:
    """Tells whether a prompt is about a concept of some prompts, names one, or has a text of theirs."""

    def __init__(self, prompts: PromptSet) -> None:
        self.about = frozenset(concept.lower() for concept in prompts.concepts)
        self.texts = frozenset(prompts.texts)
        names = "|".join(map(re.escape, sorted(self.about)))
        self.pattern = re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE) if self.about else None

    def __call__(self, prompt: Prompt) -> bool:
        known = prompt.concept is not None and prompt.concept.lower() in self.about
        return known or prompt.text in self.texts or (self.pattern is not None and bool(self.pattern.search(prompt.text)))


def encode_prompts(pipe: Any, sae: SAE, site: HookPoint, prompts: PromptSet) -> PromptCodes:
    """Return the codes of the prompts' content tokens. Tokens whose activation must be the same are encoded once."""
    texts = prompts.texts
    rows = pipelines.token_rows(pipe, site.encoder, texts)
    keys: list[list[bytes]] = [[] for _ in rows]
    place: dict[bytes, int] = {}
    waiting: list[Tensor] = []
    acts, indices = [torch.zeros(0, sae.config.k)], [torch.zeros(0, sae.config.k, dtype=torch.int64)]

    def encode() -> None:
        codes = sae.encode(torch.cat(waiting))
        acts.append(codes.acts)
        indices.append(codes.indices)
        waiting.clear()

    for contents in stream_contents(pipe, site, rows, texts, desc="encode prompts"):
        new = []
        for position, key in enumerate(contents.keys):
            if key not in place:
                place[key] = len(place)
                new.append(position)
        waiting.append(contents.x[new])
        listed = iter(contents.keys)
        for i, n_tokens in zip(contents.prompts, contents.n_tokens, strict=True):
            keys[i] = [next(listed) for _ in range(n_tokens)]
        if sum(map(len, waiting)) >= ENCODE_TOKENS:
            encode()
    if waiting:
        encode()
    at = torch.tensor([place[key] for each in keys for key in each], dtype=torch.int64)
    codes = SparseCodes(torch.cat(acts)[at], torch.cat(indices)[at])
    sae.release()
    return PromptCodes(codes, torch.tensor([len(each) for each in keys]))
