"""What attacks share: the goal, the budget, the system under attack, the criterion of success, the record of an attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from itd.eraser import Eraser
from itd.prompts import fill
from itd.settings import require_at_least

Access = Literal["black", "white"]
"""black: the attacker sees pictures, and has the public text encoder. white: weights, features and threshold too."""
BATCH = 8
"""Pictures drawn at a time."""


class NotApplicable(ValueError):
    """The attack cannot be tried for this goal or on this pipeline; a report lists it as not tried."""


@dataclass(frozen=True)
class Budget:
    """What an attack may spend on one goal."""

    images: int = 16
    """Pictures of the attacked system that may be drawn and judged."""
    steps: int = 100
    """Gradient steps, or generations of a search, before the pictures are drawn."""

    def __post_init__(self) -> None:
        require_at_least(self, images=1, steps=1)


@dataclass(frozen=True)
class Goal:
    """A picture of `concept` that the attacker wants, although the concept is erased."""

    concept: str
    template: str = "a picture of a {}"
    """Sentence around the concept, with `{}` in its place."""
    seed: int = 0
    """Of the search and of the first picture."""
    synonyms: tuple[str, ...] = ()
    """Other words that mean the concept or go with it, best first."""

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise ValueError("a goal needs a concept; its name is empty")
        if "{}" not in self.template:
            raise ValueError(f"the template {self.template!r} has no {{}} for the concept's name")

    @property
    def prompt(self) -> str:
        """The honest prompt."""
        return fill(self.template, self.concept)

    def ask(self, word: str) -> str:
        """Return the prompt with another word in the concept's place."""
        return fill(self.template, word)


@runtime_checkable
class Criterion(Protocol):
    """Tells for each picture whether it shows what the attacker wanted; `name` goes into the record."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> list[bool]:
        """Judge pictures with values in [0, 1]."""
        ...


class Drawn(NamedTuple):
    """Pictures, and per picture what the gate said; None where there is no gate."""

    images: Float[Tensor, "n 3 h w"]
    fired: tuple[bool | None, ...]
    scores: tuple[float | None, ...]


class Target(Protocol):
    """What a black-box attack needs of the system that it attacks."""

    @property
    def pipe(self) -> Any: ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn: ...


@dataclass(frozen=True, eq=False)
class System:
    """A pipeline under attack, with the eraser that protects it or with none."""

    pipe: Any
    eraser: Eraser | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What is passed to the pipeline: steps, guidance, size."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """Return one picture per prompt, in [0, 1], each from its own seed, with the eraser attached if there is one.

        Words that were learnt since it was made are let through: it is the gates that are attacked.
        """
        attached = None if self.eraser is None else self.eraser.attach(self.pipe, allow_new_words=True)
        images: list[Tensor] = []
        fired: list[bool | None] = []
        scores: list[float | None] = []
        with attached or nullcontext(), torch.no_grad():
            for start in range(0, len(prompts), BATCH):
                part = list(prompts[start : start + BATCH])
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
                output = self.pipe(part, generator=generators, output_type="pt", **self.options)
                images.append(output.images.float().cpu())
                decisions = [None] * len(part) if attached is None else attached.decisions
                fired += [None if decision is None else decision.fired for decision in decisions]
                scores += [None if decision is None else decision.score for decision in decisions]
        return Drawn(torch.cat(images), tuple(fired), tuple(scores))

    def without_eraser(self) -> System:
        """Return the same pipeline unprotected: what every attack is controlled against."""
        return System(self.pipe, None, self.options)


@dataclass(frozen=True)
class Trial:
    """One picture: from which prompt and seed, what the gate said, whether the criterion is met."""

    prompt: str
    seed: int
    success: bool
    fired: bool | None = None
    score: float | None = None
    image: Tensor | None = field(default=None, compare=False, repr=False)
    """The picture, (3, h, w) in [0, 1]."""


@dataclass(frozen=True)
class Attempt:
    """What an attack did for one goal."""

    goal: Goal
    trials: tuple[Trial, ...]
    n_steps: int = 0
    """Steps of the budget that were used."""
    losses: tuple[float, ...] = ()
    """Loss of the search, one per step; empty where there is none."""

    @property
    def success(self) -> bool:
        return any(trial.success for trial in self.trials)

    @property
    def final(self) -> Trial:
        """The first picture that succeeded, else the last one."""
        return next((trial for trial in self.trials if trial.success), self.trials[-1])

    @property
    def n_images(self) -> int:
        return len(self.trials)


class Attack(Protocol):
    """Immutable: the constructor takes hyper-parameters, the call the system, the goal, the criterion and the budget."""

    name: ClassVar[str]
    access: ClassVar[Access]

    def __call__(self, system: Any, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt: ...


def try_prompts(system: Target, goal: Goal, criterion: Criterion, prompts: Sequence[str], n_images: int) -> tuple[Trial, ...]:
    """Draw the prompts, again and again with the next seed, until the criterion is met or `n_images` are drawn.

    Pictures are drawn in batches; all of a batch count.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError(f"the attack on {goal.concept!r} found no prompt to try")
    plan = [(prompts[i % len(prompts)], goal.seed + i // len(prompts)) for i in range(n_images)]
    trials: list[Trial] = []
    for start in range(0, len(plan), BATCH):
        texts, seeds = zip(*plan[start : start + BATCH], strict=True)
        drawn = system.draw(texts, seeds)
        found = criterion(drawn.images)
        rows = zip(texts, seeds, found, drawn.fired, drawn.scores, drawn.images, strict=True)
        trials += [Trial(*row) for row in rows]
        if any(found):
            break
    return tuple(trials)
