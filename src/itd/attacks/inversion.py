"""Concept inversion: learn, through the eraser, a new word that means the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, System, try_prompts
from itd.attacks.diffusion import (
    borrowed_row,
    frame,
    prompt_ids,
    reference_latents,
    require_single_encoder,
    token_embedding,
)
from itd.attacks.objectives import Denoise, Loss, draw_noise, require_weight
from itd.vocabulary import Vocabulary, names_of, vocabulary_of

SENTENCES = ("a picture of a {}", "a photo of a {}", "an image of a {}", "the {}")


@dataclass(frozen=True)
class ConceptInversion:
    """Textual inversion, `min over v of || eps - eps_theta(x_t | sentence with v) ||^2` on pictures of the concept.

    The attacker may load an embedding into the pipeline, as users of textual inversion do; the eraser sees the prompt with it.
    The new word takes the place of one that no sentence has, whose own embedding comes back afterwards.

    Source: Pham et al. 2024, Circumventing concept erasure methods for text-to-image generative models, section 4.
    """

    name: ClassVar[str] = "inversion"
    access: ClassVar[Access] = "white"

    lr: float = 0.02
    batch_size: int = 4
    """Noised pictures per step."""
    start: str | None = None
    """Word whose embedding the search starts from; a random one by default."""
    gate_weight: float = 0.0
    """Weight of the gate's score in the loss; above 0 the attack is gate-aware."""

    def __post_init__(self) -> None:
        require_weight(self.gate_weight)

    def __call__(self, system: System, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        """Raises NotApplicable for a pipeline with several text encoders."""
        pipe = system.pipe
        require_single_encoder(pipe)
        words = vocabulary_of(pipe).without(names_of(goal.concept))
        word = placeholder(pipe, words, goal)
        token = int(words.ids[words.words.index(word)])
        embedding, losses = self.learn(system, goal, criterion, words, word, budget.steps)
        with borrowed_row(pipe, token, embedding):
            trials = try_prompts(system, goal, criterion, [goal.ask(word)], budget.images)
        return Attempt(goal, trials, budget.steps, losses)

    def learn(
        self, system: System, goal: Goal, criterion: Criterion, words: Vocabulary, word: str, n_steps: int
    ) -> tuple[Float[Tensor, " d"], tuple[float, ...]]:
        """Return the embedding and the loss of each step."""
        pipe, generator = system.pipe, torch.Generator().manual_seed(goal.seed)
        references = reference_latents(system, goal, criterion)
        loss = Loss(system, Denoise(pipe), self.gate_weight)
        weight = token_embedding(pipe).weight.detach()
        token = int(words.ids[words.words.index(word)])
        drawn = words.words[int(torch.randint(len(words), (), generator=generator))]
        embedding = weight[prompt_ids(pipe, self.start or drawn)[0]].clone().requires_grad_()
        optimizer = torch.optim.AdamW([embedding], lr=self.lr, weight_decay=0.0)
        sentences = [frame(pipe, prompt_ids(pipe, text)[None]) for text in sentences_with(goal, word)]
        losses: list[float] = []
        for _ in range(n_steps):
            input_ids = sentences[int(torch.randint(len(sentences), (), generator=generator))]
            embeddings = torch.where((input_ids == token)[..., None].to(weight.device), embedding, weight[input_ids])
            value = loss(input_ids, embeddings, draw_noise(pipe, references, self.batch_size, generator))
            (embedding.grad,) = torch.autograd.grad(value, embedding)
            optimizer.step()
            losses.append(float(value.detach()))
        return embedding.detach(), tuple(losses)


def sentences_with(goal: Goal, word: str) -> list[str]:
    """Return sentences that ask for the new word; the goal's own first."""
    return list(dict.fromkeys([goal.ask(word), *(Goal(goal.concept, sentence).ask(word) for sentence in SENTENCES)]))


def placeholder(pipe: Any, words: Vocabulary, goal: Goal) -> str:
    """Return a word whose embedding can be borrowed: none of the sentences, nor the probe of the text encoder, has it."""
    used = set(" ".join([*sentences_with(goal, ""), pipelines.PROBE]).lower().split())
    free = [word for word in words.words if word not in used]
    if not free:
        raise ValueError("every word of the vocabulary is in the sentences of the attack; shorten the goal's template")
    return free[-1]
