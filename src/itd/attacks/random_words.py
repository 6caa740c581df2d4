"""Words at random: what luck reaches with the budget, which a search over words has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, Target, try_prompts
from itd.vocabulary import names_of, vocabulary_of


@dataclass(frozen=True)
class RandomWords:
    """Draw words at random, other ones for every picture; those of the concept's name are left out."""

    name: ClassVar[str] = "random"
    access: ClassVar[Access] = "black"

    n_tokens: int = 8
    """Words of a prompt."""

    def __call__(self, system: Target, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        words = vocabulary_of(system.pipe).without(names_of(goal.concept))
        generator = torch.Generator().manual_seed(goal.seed)
        rows = torch.randint(len(words), (budget.images, self.n_tokens), generator=generator)
        return Attempt(goal, try_prompts(system, goal, criterion, [words.text(row) for row in rows], budget.images))
