"""Ring-A-Bell: find words whose text states lie where the concept's direction points, without the attacked system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, Target, try_prompts
from itd.attacks.diffusion import encode, encode_texts, frame
from itd.prompts import fill
from itd.vocabulary import Vocabulary, names_of, vocabulary_of

PAIRS = ("a picture of a {}", "a photo of a {}", "a drawing of a {}", "the {} is here", "there is a {} on the table", "one {}")


@dataclass(frozen=True)
class RingABell:
    """Genetic search for `n_tokens` words with `min || f(words) - (f(P) + strength * c) ||^2`.

    f: states of the public text encoder; P: the prompt without the concept; c: the mean over sentence pairs of
    f(with the concept) - f(without). The search never asks the attacked system; its best words are then tried there.

    Source: Tsai et al. 2024, Ring-A-Bell! How reliable are concept removal methods, section 3 and algorithm 1. Words of the
    concept's name are left out of the search here, as is all that is no word of one token; prompts are shorter and fewer than
    in the released code (docs/attacks.md).
    """

    name: ClassVar[str] = "ring-a-bell"
    access: ClassVar[Access] = "black"

    n_tokens: int = 8
    """Words of the prompt that is searched for."""
    strength: float = 3.0
    """Multiple of the concept's direction: eta in the paper."""
    population: int = 48
    mutation: float = 0.25
    """Probability that a child gets a word replaced."""
    crossover: float = 0.5
    """Probability that a child mixes two parents."""
    n_final: int = 4
    """Best prompts that are drawn."""
    without: str = "thing"
    """What stands in the concept's place in the sentences without it."""

    def __call__(self, system: Target, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        words = vocabulary_of(system.pipe).without(names_of(goal.concept))
        rows, losses = self.search(system.pipe, words, self.wanted_states(system.pipe, goal), budget.steps, goal.seed)
        prompts = list(dict.fromkeys(words.text(row) for row in rows))[: self.n_final]
        return Attempt(goal, try_prompts(system, goal, criterion, prompts, budget.images), budget.steps, losses)

    def wanted_states(self, pipe: Any, goal: Goal) -> Float[Tensor, "tokens d"]:
        """Return f(P) + strength * c."""
        direction = concept_direction(pipe, goal.concept, self.without)
        return encode_texts(pipe, [goal.ask(self.without)]).states[0] + self.strength * direction

    def search(
        self, pipe: Any, words: Vocabulary, wanted: Float[Tensor, "tokens d"], n_generations: int, seed: int
    ) -> tuple[Int[Tensor, "population n_tokens"], tuple[float, ...]]:
        """Return the last population, best first, and the best loss of each generation. The best half always survives."""
        generator = torch.Generator().manual_seed(seed)
        population = torch.randint(len(words), (self.population, self.n_tokens), generator=generator)
        scores, losses = distances(pipe, words.ids[population], wanted), []
        for _ in range(n_generations):
            parents = population[scores.argsort()[: self.population // 2]]
            children = self.breed(parents, self.population - len(parents), len(words), generator)
            population = torch.cat([parents, children])
            scores = distances(pipe, words.ids[population], wanted)
            losses.append(float(scores.min()))
        return population[scores.argsort()], tuple(losses)

    def breed(
        self, parents: Int[Tensor, "n n_tokens"], n_children: int, n_words: int, generator: torch.Generator
    ) -> Int[Tensor, "n_children n_tokens"]:
        """Mix pairs of parents at a random cut, then replace single words."""
        pick = torch.randint(len(parents), (2, n_children), generator=generator)
        cut = torch.randint(1, max(2, self.n_tokens), (n_children, 1), generator=generator)
        mixes = torch.rand(n_children, 1, generator=generator) < self.crossover
        second = mixes & (torch.arange(self.n_tokens) >= cut)
        children = torch.where(second, parents[pick[1]], parents[pick[0]])
        mutates = torch.rand(n_children, generator=generator) < self.mutation
        # A child that is a copy of its parent would waste its place.
        mutates |= (children == parents[pick[0]]).all(1)
        at = torch.randint(self.n_tokens, (n_children,), generator=generator)
        fresh = torch.randint(n_words, (n_children,), generator=generator)
        rows = mutates.nonzero().flatten()
        children[rows, at[rows]] = fresh[rows]
        return children


def concept_direction(pipe: Any, concept: str, without: str) -> Float[Tensor, "tokens d"]:
    """Return the mean over sentences of the states with the concept minus those without."""
    states = encode_texts(pipe, [fill(sentence, word) for word in (concept, without) for sentence in PAIRS]).states
    return states[: len(PAIRS)].mean(0) - states[len(PAIRS) :].mean(0)


@torch.no_grad()
def distances(pipe: Any, ids: Int[Tensor, "n n_tokens"], wanted: Float[Tensor, "tokens d"]) -> Float[Tensor, " n"]:
    """Return the mean squared distance of each prompt's states to the wanted ones."""
    return (encode(pipe, frame(pipe, ids)).states - wanted).square().mean((1, 2)).cpu()
