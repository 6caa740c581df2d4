"""P4D: a prompt that makes the erased model say what the unerased model says to the honest prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor

from itd import pipelines
from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, NotApplicable, System, try_prompts
from itd.attacks.diffusion import (
    ENCODER,
    encode_texts,
    prompt_ids,
    reference_latents,
    require_single_encoder,
    token_embedding,
)
from itd.attacks.objectives import Loss, Match, Noise, draw_noise, rank, require_weight
from itd.vocabulary import Vocabulary, names_of, nearest, vocabulary_of


@dataclass(frozen=True)
class P4D:
    """Optimise embeddings of words; the gradient is taken at the nearest words and applied to the embeddings.

    Without `every` all words are searched for: P4D-N of the paper. With it the honest prompt stays and words are put into it:
    P4D-K. Those of the concept's name are banned from the search, and x_t is a noised picture of the concept, not a
    half-denoised one.

    Source: Chin et al. 2024, Prompting4Debugging, section 3 and algorithm 1.
    """

    name: ClassVar[str] = "p4d"
    access: ClassVar[Access] = "white"

    n_tokens: int = 8
    """Words of a prompt that is all searched for."""
    every: int | None = None
    """Put a word behind every so many of the honest prompt's: K in the paper, which counts tokens. None: no honest prompt."""
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
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, or None to leave the honest prompt out, got {self.every}")

    def __call__(self, system: System, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        """Raises NotApplicable for a pipeline with several text encoders."""
        pipe = system.pipe
        require_single_encoder(pipe)
        generator = torch.Generator().manual_seed(goal.seed)
        words = vocabulary_of(pipe).without(names_of(goal.concept))
        references = reference_latents(system, goal, criterion)
        loss = Loss(system, Match(pipe, encode_texts(pipe, [goal.prompt]).states), self.gate_weight)
        cloze = Cloze((None,) * self.n_tokens) if self.every is None else Cloze.into(goal.prompt, self.every)
        seen, losses = self.search(
            loss, words, cloze, lambda: draw_noise(pipe, references, self.batch_size, generator), budget, generator
        )
        prompts = [cloze.text(words, rows) for rows in seen]
        framed = [pipelines.tokenize(pipe, ENCODER, [prompt]).input_ids for prompt in prompts]
        best = rank(loss, framed, draw_noise(pipe, references, 2 * self.batch_size, generator), self.n_final)
        trials = try_prompts(system, goal, criterion, [prompts[i] for i in best], budget.images)
        return Attempt(goal, trials, budget.steps, losses)

    def search(
        self,
        loss: Loss,
        words: Vocabulary,
        cloze: Cloze,
        draw: Callable[[], Noise],
        budget: Budget,
        generator: torch.Generator,
    ) -> tuple[list[Int[Tensor, " blanks"]], tuple[float, ...]]:
        """Return the most promising distinct fillings that were visited, and the loss of each step."""
        pipe = loss.system.pipe
        weight = token_embedding(pipe).weight.detach()
        table, blanks = weight[words.ids], cloze.positions(pipe)
        soft = table[torch.randint(len(words), (len(blanks),), generator=generator)].clone().requires_grad_()
        optimizer = torch.optim.AdamW([soft], lr=self.lr, weight_decay=self.weight_decay)
        visited: dict[tuple[int, ...], float] = {}
        losses: list[float] = []
        for _ in range(budget.steps):
            rows = nearest(soft.detach(), table).cpu()
            input_ids = pipelines.tokenize(pipe, ENCODER, [cloze.text(words, rows)]).input_ids
            embeddings = weight[input_ids].requires_grad_()
            value = loss(input_ids, embeddings, draw())
            (gradient,) = torch.autograd.grad(value, embeddings)
            soft.grad = gradient[0, blanks]
            optimizer.step()
            losses.append(float(value.detach()))
            key = tuple(rows.tolist())
            visited[key] = min(losses[-1], visited.get(key, float("inf")))
        ordered = sorted(visited, key=lambda key: visited[key])[: self.n_ranked]
        return [torch.tensor(key) for key in ordered], tuple(losses)


@dataclass(frozen=True)
class Cloze:
    """A prompt with blanks, each of which one word of a vocabulary fills."""

    parts: tuple[str | None, ...]
    """Words, and None for a blank."""

    @classmethod
    def into(cls, prompt: str, every: int) -> Self:
        """Put a blank behind every so many words of a prompt, and at least one, at its end.

        >>> Cloze.into("a picture of a red cat", 4).parts
        ('a', 'picture', 'of', 'a', None, 'red', 'cat')
        """
        words = prompt.split()
        every = min(every, len(words))
        pairs = [(word, None) if i % every == 0 else (word,) for i, word in enumerate(words, 1)]
        return cls(tuple(part for pair in pairs for part in pair))

    def text(self, words: Vocabulary, rows: Int[Tensor, " blanks"]) -> str:
        """Fill the blanks with the words at the given rows of the vocabulary."""
        fillings = iter(rows.tolist())
        return " ".join(words.words[next(fillings)] if part is None else part for part in self.parts)

    def positions(self, pipe: Any) -> list[int]:
        """Return where the text encoder has the tokens of the blanks; begin of text is at 0.

        Raises:
            NotApplicable: more tokens than fit.
        """
        found, n_tokens = list[int](), 1
        for part in self.parts:
            if part is None:
                found.append(n_tokens)
            n_tokens += 1 if part is None else len(prompt_ids(pipe, part))
        room = pipelines.tokenizer_of(pipe, ENCODER).model_max_length
        if n_tokens >= room:
            raise NotApplicable(f"{n_tokens - 1} tokens do not fit into the {room - 2} of the text encoder; use fewer words")
        return found
