"""Whole systems that need no training: no erasure, negative prompt, safe latent diffusion, text-embedding projection, itd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.rivals.gates import pooled, shipped_eraser
from benchmarks.rivals.task import Call, Maker, Rival, Task, draw_in_batches
from itd import pipelines
from itd.attacks.base import System
from itd.attacks.diffusion import ENCODER, encode_texts


@dataclass(frozen=True, eq=False)
class Drawing:
    """A rival without a gate: it draws every prompt in its own way."""

    name: str
    call: Call

    def fired(self, prompts: Sequence[str]) -> None:
        return None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        return draw_in_batches(self.call, prompts, seeds)


@dataclass(frozen=True, eq=False)
class Bare:
    """A pipeline, perhaps with other weights, that draws as it is."""

    name: str
    pipe: Any
    task: Task

    def fired(self, prompts: Sequence[str]) -> None:
        return None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        return System(self.pipe, None, self.task.options).draw(prompts, seeds).images


@dataclass(frozen=True, eq=False)
class Attached:
    """An eraser on the pipeline, enforced as a user has it."""

    name: str
    system: System

    def fired(self, prompts: Sequence[str]) -> list[bool]:
        assert self.system.eraser is not None
        return [check.fired for check in self.system.eraser.check(self.system.pipe, prompts)]

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        return self.system.draw(prompts, seeds).images


@dataclass(frozen=True)
class Itd:
    """`itd.erase` with a preset; what it leaves open is the embedded world's own."""

    preset: Literal["default", "strict", "paper"] = "default"

    @property
    def name(self) -> str:
        return {"default": "itd", "strict": "itd, strict", "paper": "publication"}[self.preset]

    def __call__(self, task: Task) -> Rival:
        return Attached(self.name, System(task.pipe, shipped_eraser(task, self.preset), task.options))


@dataclass(frozen=True)
class Tuned:
    """A system with settings that were chosen for the embedded world, on other identities and sentences."""

    maker: Maker

    @property
    def name(self) -> str:
        return f"{self.maker.name}, tuned"

    def __call__(self, task: Task) -> Rival:
        rival: Any = self.maker(task)
        return replace(rival, name=self.name)


@dataclass(frozen=True)
class NoErasure:
    """The pipeline as it is."""

    name: ClassVar[str] = "none"

    def __call__(self, task: Task) -> Rival:
        return Drawing(self.name, lambda prompts, generators: torch.stack(task.draw_bare(prompts, seeds_of(generators))))


def seeds_of(generators: Sequence[torch.Generator]) -> list[int]:
    return [generator.initial_seed() for generator in generators]


def in_one_prompt(pipe: Any, names: Sequence[str]) -> str:
    """Return the names as one prompt, separated by commas, or by spaces where the text encoder would cut off the last names.

    Raises:
        ValueError: the names alone are more tokens than it reads.
    """
    room = pipelines.tokenizer_of(pipe, ENCODER).model_max_length - 2
    texts = [separator.join(names) for separator in (", ", " ")]
    n_tokens = [len(row) for row in pipelines.token_rows(pipe, ENCODER, texts, whole=True)]
    for text, n in zip(texts, n_tokens, strict=True):
        if n <= room:
            return text
    raise ValueError(f"the {len(names)} names are {n_tokens[-1]} tokens, the text encoder reads {room}; erase fewer")


@dataclass(frozen=True)
class NegativePrompt:
    """The concepts' names as the negative prompt of every prompt."""

    name: ClassVar[str] = "negative prompt"

    def __call__(self, task: Task) -> Rival:
        negative = in_one_prompt(task.pipe, task.names)

        def call(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
            options = {**task.options, "negative_prompt": [negative] * len(prompts)}
            return task.pipe(prompts, generator=generators, output_type="pt", **options).images

        return Drawing(self.name, call)


@dataclass(frozen=True)
class SafeLatentDiffusion:
    """diffusers' `StableDiffusionPipelineSafe` with the concepts' names as its safety concept; the paper's "strong".

    Source: Schramowski et al. 2023, Safe latent diffusion, section 3.
    """

    name: ClassVar[str] = "safe latent diffusion"

    guidance: float = 2000.0
    warmup: int = 7
    threshold: float = 0.025
    momentum: float = 0.5
    beta: float = 0.7

    def __call__(self, task: Task) -> Rival:
        from diffusers import StableDiffusionPipelineSafe

        parts = {name: part for name, part in task.pipe.components.items() if name != "image_encoder"}
        pipe: Any = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.safety_concept = in_one_prompt(pipe, task.names)
        settings = {
            "sld_guidance_scale": self.guidance, "sld_warmup_steps": self.warmup, "sld_threshold": self.threshold,
            "sld_momentum_scale": self.momentum, "sld_mom_beta": self.beta,
        }  # fmt: skip

        def call(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
            with warnings.catch_warnings():
                # The deprecated pipeline calls a deprecated method of its own.
                warnings.filterwarnings("ignore", "The decode_latents method is deprecated", FutureWarning)
                images = pipe(prompts, generator=generators, output_type="np", **task.options, **settings).images
            return torch.from_numpy(images).permute(0, 3, 1, 2)

        return Drawing(self.name, call)


@dataclass(frozen=True)
class Projection:
    """Project the concepts' pooled embeddings out of every text state: `x (I - V V^+)`, V the centred embeddings of the names.

    Source: Chuang et al. 2023, Debiasing vision-language models via biased prompts, equation 1, on text states.
    """

    name: ClassVar[str] = "projection"

    def __call__(self, task: Task) -> Rival:
        centre = pooled(task.pipe, task.kept).mean(0)
        remove = span_projection(pooled(task.pipe, task.names) - centre)

        def call(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
            states = project_out(encode_texts(task.pipe, prompts).states, remove)
            return task.pipe(prompt_embeds=states, generator=generators, output_type="pt", **task.options).images

        return Drawing(self.name, call)


def project_out(states: Float[Tensor, "batch tokens d"], remove: Float[Tensor, "d d"]) -> Float[Tensor, "batch tokens d"]:
    """Return the states without what a projection finds in them; the begin token's, which every prompt has, stays."""
    return torch.cat([states[:, :1], states[:, 1:] - states[:, 1:] @ remove.to(states)], 1)


def span_projection(rows: Float[Tensor, "k d"]) -> Float[Tensor, "d d"]:
    """Return the matrix that projects onto the span of the rows."""
    basis = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int(basis.S.gt(basis.S.max() * 1e-6).sum()) if len(rows) else 0
    kept = basis.Vh[:rank]
    return (kept.T @ kept).to(rows.dtype)
