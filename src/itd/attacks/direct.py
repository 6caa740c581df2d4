"""No attack: the honest prompt, with one seed after another. The baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, Target, try_prompts


@dataclass(frozen=True)
class Direct:
    """Ask for the concept by its name."""

    name: ClassVar[str] = "direct"
    access: ClassVar[Access] = "black"

    def __call__(self, system: Target, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        return Attempt(goal, try_prompts(system, goal, criterion, [goal.prompt], budget.images))
