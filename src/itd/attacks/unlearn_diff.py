"""UnlearnDiffAtk: words before the honest prompt that bring the concept back, by the image model's own classification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, System, try_prompts
from itd.attacks.diffusion import frame, prompt_ids, reference_latents, require_single_encoder, token_embedding
from itd.attacks.objectives import Denoise, Loss, Noise, draw_noise, rank, require_weight
from itd.vocabulary import Vocabulary, names_of, vocabulary_of


@dataclass(frozen=True)
class UnlearnDiff:
    """Optimise `n_tokens` words in front of the honest prompt by projected gradient descent.

    Every word is a point u of the simplex over the vocabulary, its embedding `u @ table`; u <- projection(u - lr * g / |g|).
    The loss is the denoising error on pictures of the concept. Words are read off as the largest u, and drawn from u.

    Source: Zhang et al. 2024, To generate or not? Safety-driven unlearned diffusion models are still easy to generate unsafe
    images ... for now, section 4; the relaxation is that of Hou et al. 2023, TextGrad, but
    without the one-hot words that the released code samples in every step.
    """

    name: ClassVar[str] = "unlearndiff"
    access: ClassVar[Access] = "white"

    n_tokens: int = 4
    lr: float = 0.3
    batch_size: int = 4
    """Noised pictures per step."""
    n_ranked: int = 12
    """Prompts read off at the end that are compared on the same noise."""
    n_final: int = 4
    """Best prompts that are drawn."""
    gate_weight: float = 0.0
    """Weight of the gate's score in the loss; above 0 the attack is gate-aware."""

    def __post_init__(self) -> None:
        require_weight(self.gate_weight)

    def __call__(self, system: System, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        """Raises NotApplicable for a pipeline with several text encoders."""
        pipe = system.pipe
        require_single_encoder(pipe)
        generator = torch.Generator().manual_seed(goal.seed)
        words = vocabulary_of(pipe).without(names_of(goal.concept))
        references = reference_latents(system, goal, criterion)
        loss = Loss(system, Denoise(pipe), self.gate_weight)
        honest = prompt_ids(pipe, goal.prompt)
        u, losses = self.search(
            loss, words, honest, lambda: draw_noise(pipe, references, self.batch_size, generator), budget.steps, generator
        )
        candidates = read_off(u, self.n_ranked, generator)
        framed = [frame(pipe, torch.cat([words.ids[rows], honest])[None]) for rows in candidates]
        best = rank(loss, framed, draw_noise(pipe, references, 2 * self.batch_size, generator), self.n_final)
        prompts = [f"{words.text(candidates[i])} {goal.prompt}" for i in best]
        return Attempt(goal, try_prompts(system, goal, criterion, prompts, budget.images), budget.steps, losses)

    def search(
        self,
        loss: Loss,
        words: Vocabulary,
        honest: Int[Tensor, " n"],
        draw: Callable[[], Noise],
        n_steps: int,
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "n_tokens v"], tuple[float, ...]]:
        """Return the relaxed words and the loss of each step."""
        pipe = loss.system.pipe
        weight = token_embedding(pipe).weight.detach()
        table = weight[words.ids]
        start = torch.rand(self.n_tokens, len(words), generator=generator)
        u = (start / start.sum(1, keepdim=True)).to(weight)
        # The relaxed words stand where the frame has any word; their ids only mark content.
        input_ids = frame(pipe, torch.cat([words.ids[:1].repeat(self.n_tokens), honest])[None])
        losses: list[float] = []
        for _ in range(n_steps):
            u.requires_grad_()
            embeddings = torch.cat([weight[input_ids[:, :1]], (u @ table)[None], weight[input_ids[:, 1 + self.n_tokens :]]], 1)
            value = loss(input_ids, embeddings, draw())
            (gradient,) = torch.autograd.grad(value, u)
            length = gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
            u = project_to_simplex(u.detach() - self.lr * gradient / length)
            losses.append(float(value.detach()))
        return u, tuple(losses)


def project_to_simplex(rows: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Return the closest points with non-negative entries that sum to 1. Source: Duchi et al. 2008, figure 1."""
    ordered = rows.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - 1
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    support = (ordered * counts > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, support - 1) / support).clamp_min(0)


def read_off(u: Float[Tensor, "n_tokens v"], n: int, generator: torch.Generator) -> list[Int[Tensor, " n_tokens"]]:
    """Return up to n different choices of words: the likeliest, and others drawn from u."""
    drawn = torch.multinomial(u.cpu(), max(1, n - 1), replacement=True, generator=generator).T
    choices = dict.fromkeys(tuple(row) for row in torch.cat([u.argmax(1).cpu()[None], drawn])[:n].tolist())
    return [torch.tensor(choice) for choice in choices]
