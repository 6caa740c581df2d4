"""What every rival is given: the pipeline, the prompts it may learn from, and how a system of any kind draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from itd.attacks.base import BATCH, System
from itd.hooks import HookPoint
from itd.prompts import PromptSet
from itd.sae import SAE

T = TypeVar("T")
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """Erase the concepts of `target`; leave those of `retain` and `neutral`. The splits are those of `itd.erase`."""

    pipe: Any
    sae: SAE
    site: HookPoint
    target: PromptSet
    retain: PromptSet
    neutral: PromptSet
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Passed to the pipeline: steps, guidance, size."""
    fpr: float = 0.01
    """False-positive rate that every gate is calibrated to, on the same held-out prompts."""

    memory: dict[tuple[str, str, int], Tensor] = field(default_factory=dict[tuple[str, str, int], Tensor], repr=False)
    """Pictures that several rivals share, by how they are drawn, prompt and seed."""
    made: dict[str, tuple[Any, float]] = field(default_factory=dict[str, tuple[Any, float]], repr=False)
    """Gates and erasers that several rivals share, with the seconds that they took."""
    saved: list[float] = field(default_factory=list[float], repr=False)
    """Seconds that were not spent again because of `made`; they are charged to every rival."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.target.concepts

    @property
    def kept(self) -> tuple[str, ...]:
        """Concepts that must stay, of the kind of those that go."""
        return self.retain.concepts

    @property
    def others(self) -> PromptSet:
        return self.retain + self.neutral

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return what is made under a key, the first time by making it."""
        if key in self.made:
            value, seconds = self.made[key]
            self.saved.append(seconds)
            return value
        value, seconds = self.timed(make)
        self.made[key] = value, seconds
        return value

    def timed(self, make: Callable[[], T]) -> tuple[T, float]:
        """Return what is made and the seconds it takes, those included that were saved on the way."""
        began, n_saved = time.monotonic(), len(self.saved)
        value = make()
        return value, time.monotonic() - began + sum(self.saved[n_saved:])

    def remember(self, keys: Sequence[str], prompts: Sequence[str], seeds: Sequence[int], draw: Draw) -> list[Tensor]:
        """Return pictures, drawing only those that were not drawn under the same key, prompt and seed before."""
        asked = list(zip(keys, prompts, seeds, strict=True))
        fresh = [case for case in dict.fromkeys(asked) if case not in self.memory]
        if fresh:
            images = draw([prompt for _, prompt, _ in fresh], [seed for _, _, seed in fresh])
            self.memory.update(zip(fresh, images, strict=True))
        return [self.memory[case] for case in asked]

    def draw_bare(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """Return the pictures of the pipeline as it is."""
        bare = System(self.pipe, None, self.options)
        return self.remember(["bare"] * len(prompts), prompts, seeds, lambda part, chosen: bare.draw(part, chosen).images)


class Rival(Protocol):
    """A system that draws: what it is called, what its gate says of prompts (None without a gate), its pictures in [0, 1]."""

    @property
    def name(self) -> str: ...

    def fired(self, prompts: Sequence[str]) -> list[bool] | None: ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]: ...


class Maker(Protocol):
    """Settings of a rival; the call prepares it for a task. What it trains or edits is its own copy."""

    @property
    def name(self) -> str: ...

    def __call__(self, task: Task) -> Rival: ...


Call = Callable[[list[str], list[torch.Generator]], Tensor]


@torch.no_grad()
def draw_in_batches(call: Call, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
    """Call the pipeline for a few prompts at a time, each picture with its own seed."""
    images = []
    for start in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
        images.append(call(list(prompts[start : start + BATCH]), generators).float().cpu())
    return torch.cat(images)


def copy_with(pipe: Any, **components: Any) -> Any:
    """Return a pipeline of the same kind that shares all components but those given."""
    parts = {**pipe.components, **components}
    fresh = type(pipe)(**parts, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    return fresh
