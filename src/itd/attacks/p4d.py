"""P4D: a prompt that makes the erased model say what the unerased model says to the honest prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, System, try_prompts
from itd.attacks.diffusion import encode_texts, frame, reference_latents, require_single_encoder, token_embedding
from itd.attacks.objectives import Loss, Match, Noise, draw_noise, rank, require_weight
from itd.vocabulary import Vocabulary, names_of, nearest, vocabulary_of


@dataclass(frozen=True)
class P4D:
    """Optimise `n_tokens` embeddings; the gradient is taken at the nearest words and applied to the embeddings.

    The variant P4D-N of the paper: all words are free. The words of the concept's name are banned, and x_t is a noised picture
    of the concept, not a half-denoised one.

    Source: Chin et al. 2024, Prompting4Debugging, section 3 and algorithm 1.
    """

    name: ClassVar[str] = "p4d"
    access: ClassVar[Access] = "white"

    n_tokens: int = 8
    lr: float = 0.1
    weight_decay: float = 0.1
    batch_size: int = 4
    """Noised pictures per step."""
    n_ranked: int = 12
    """Prompts of the search that are compared on the same noise at its end."""
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
        loss = Loss(system, Match(pipe, encode_texts(pipe, [goal.prompt]).states), self.gate_weight)
        seen, losses = self.search(
            loss, words, lambda: draw_noise(pipe, references, self.batch_size, generator), budget, generator
        )
        framed = [frame(pipe, words.ids[rows][None]) for rows in seen]
        best = rank(loss, framed, draw_noise(pipe, references, 2 * self.batch_size, generator), self.n_final)
        prompts = [words.text(seen[i]) for i in best]
        return Attempt(goal, try_prompts(system, goal, criterion, prompts, budget.images), budget.steps, losses)

    def search(
        self, loss: Loss, words: Vocabulary, draw: Callable[[], Noise], budget: Budget, generator: torch.Generator
    ) -> tuple[list[Int[Tensor, " n_tokens"]], tuple[float, ...]]:
        """Return the most promising distinct prompts that were visited, and the loss of each step."""
        pipe = loss.system.pipe
        table = token_embedding(pipe).weight.detach()[words.ids]
        soft = table[torch.randint(len(words), (self.n_tokens,), generator=generator)].clone().requires_grad_()
        optimizer = torch.optim.AdamW([soft], lr=self.lr, weight_decay=self.weight_decay)
        visited: dict[tuple[int, ...], float] = {}
        losses: list[float] = []
        for _ in range(budget.steps):
            rows = nearest(soft.detach(), table).cpu()
            input_ids = frame(pipe, words.ids[rows][None])
            embeddings = token_embedding(pipe).weight.detach()[input_ids].requires_grad_()
            value = loss(input_ids, embeddings, draw())
            (gradient,) = torch.autograd.grad(value, embeddings)
            soft.grad = gradient[0, 1 : 1 + self.n_tokens]
            optimizer.step()
            losses.append(float(value.detach()))
            key = tuple(rows.tolist())
            visited[key] = min(losses[-1], visited.get(key, float("inf")))
        ordered = sorted(visited, key=lambda key: visited[key])[: self.n_ranked]
        return [torch.tensor(key) for key in ordered], tuple(losses)
