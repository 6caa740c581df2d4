"""SAFREE: detect trigger tokens by leaving each out, project them away from the concepts, for the first denoising steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.rivals.gates import pooled
from benchmarks.rivals.systems import span_projection
from benchmarks.rivals.task import Rival, Task, draw_in_batches
from itd import pipelines
from itd.attacks.diffusion import ENCODER

PAPER_STEPS = 50
"""Denoising steps that `gamma` counts in."""


@dataclass(frozen=True)
class Safree:
    """Training-free token projection, equations 2 to 6 of the paper; its re-attention in Fourier space is left out.

    With p_i the pooled embedding of the prompt without token i and P_C the projection on the concepts' embeddings:
    d_i = || (I - P_C) p_i ||;  token i is a trigger if d_i > (1 + alpha) mean_{j != i} d_j;
    a trigger's state becomes (I - P_C) P_I x, P_I the projection on the p_i;
    the states are used for the first round(gamma sigmoid(1 - cos(x, (I - P_C) P_I x))) of 50 steps.

    The order (I - P_C) P_I is that of the released code; the paper prints the other one. The released code replaces the
    sigmoid's argument by constants that were fitted to Stable Diffusion; here it is the paper's.

    Source: Yoon et al. 2024, SAFREE, arXiv 2410.12761, section 3.
    """

    name: ClassVar[str] = "safree"

    alpha: float = 0.01
    """How far a trigger's distance lies over the mean of the others; more takes fewer tokens for triggers."""
    gamma: float = 10.0
    """Denoising steps, of 50, that the sigmoid is a share of."""

    def __call__(self, task: Task) -> Rival:
        return Filtered(self.name, task, self, span_projection(pooled(task.pipe, task.names)))

    def n_steps(self, cosine: float, total: int) -> int:
        """Return for how many denoising steps the projected states are used."""
        return round(self.gamma / (1 + math.exp(cosine - 1)) * total / PAPER_STEPS)


@dataclass(frozen=True, eq=False)
class Filtered:
    """The pipeline with projected text states for the first steps of prompts with trigger tokens."""

    name: str
    task: Task
    settings: Safree
    concepts: Float[Tensor, "d d"]

    def fired(self, prompts: Sequence[str]) -> list[bool]:
        """Return whether a token of the prompt is taken for a trigger."""
        return [bool(self.triggers(prompt)[0].any()) for prompt in prompts]

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        pictures = [
            draw_in_batches(self.call, [prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        return torch.cat(pictures)

    def call(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """Draw one prompt; the original states come back after the first steps."""
        original, projected, n_steps = self.states(prompts[0])

        def switch(pipe: Any, step: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step + 1 == n_steps:
                states = tensors["prompt_embeds"].clone()
                states[-len(original) :] = original
                return {"prompt_embeds": states}
            return {}

        start = projected if n_steps else original
        return self.task.pipe(
            prompt_embeds=start, generator=generators, output_type="pt", callback_on_step_end=switch,
            callback_on_step_end_tensor_inputs=["prompt_embeds"], **self.task.options,
        ).images  # fmt: skip

    @torch.no_grad()
    def states(self, prompt: str) -> tuple[Tensor, Tensor, int]:
        """Return the prompt's states, those with its triggers projected, and for how many steps these are used."""
        flags, without, positions = self.triggers(prompt)
        tokens = pipelines.tokenize(self.task.pipe, ENCODER, [prompt]).input_ids
        original = pipelines.encoder_of(self.task.pipe, ENCODER)(tokens)[0]
        if not len(positions):
            return original, original, 0
        whole = filtered(original[0], without, self.concepts)
        projected = original.clone()
        projected[0, positions[flags]] = whole[positions[flags]]
        cosine = float(F.cosine_similarity(original[0].flatten(), whole.flatten(), dim=0))
        return (
            original,
            projected,
            self.settings.n_steps(cosine, int(self.task.options.get("num_inference_steps", PAPER_STEPS))),
        )

    @torch.no_grad()
    def triggers(self, prompt: str) -> tuple[Bool[Tensor, " n"], Float[Tensor, "n d"], Tensor]:
        """Return which content tokens are triggers, the pooled embeddings without each, and the tokens' positions."""
        pipe = self.task.pipe
        tokens = pipelines.tokenize(pipe, ENCODER, [prompt]).input_ids
        positions = pipelines.content_mask(tokens, pipelines.tokenizer_of(pipe, ENCODER))[0].nonzero().flatten()
        if not len(positions):
            return torch.zeros(0, dtype=torch.bool), torch.zeros(0, len(self.concepts)), positions
        mask = torch.ones(len(positions), tokens.shape[1], dtype=torch.int64)
        mask[torch.arange(len(positions)), positions] = 0
        encoder: Any = pipelines.encoder_of(pipe, ENCODER)
        without = encoder(tokens.expand(len(positions), -1), attention_mask=mask).pooler_output
        return trigger_tokens(without, self.concepts, self.settings.alpha), without, positions


def trigger_tokens(without: Float[Tensor, "n d"], concepts: Float[Tensor, "d d"], alpha: float) -> Bool[Tensor, " n"]:
    """Return which tokens hold the concept: without them the prompt lies further from the concepts than without others."""
    distances = (without - without @ concepts).norm(dim=1)
    n = len(distances)
    if n < 2:
        return torch.zeros(n, dtype=torch.bool)
    return distances > (1 + alpha) * (distances.sum() - distances) / (n - 1)


def filtered(
    x: Float[Tensor, "tokens d"], without: Float[Tensor, "n d"], concepts: Float[Tensor, "d d"]
) -> Float[Tensor, "tokens d"]:
    """Return (I - P_C) P_I x: what lies in the span of the prompt's embeddings, without the concepts."""
    inside = x @ span_projection(without)
    return inside - inside @ concepts
