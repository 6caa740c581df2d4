"""Criteria of success: what in a picture counts as the erased concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Judged:
    """A classifier sees the concept first, and is sure enough. For the judge of the embedded world, or any classifier like it.

    judge: takes images (n, 3, h, w) in [-1, 1]; `shown` returns the nouns that each shows with how sure it is, `name` one
        noun and design of each.
    """

    judge: Any
    concept: str
    least: float = 0.0
    """How sure it has to be of a noun. Something is always named first, also in a shape that is nothing."""

    def __post_init__(self) -> None:
        if self.concept not in (*self.judge.nouns, *self.judge.designs):
            raise ValueError(f"the judge cannot tell {self.concept!r}; choose a noun or design that it was trained on")

    @property
    def name(self) -> str:
        return f"judge sees {self.concept} first, at least {self.least:.2f} sure"

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> list[bool]:
        if self.concept in self.judge.nouns:
            return [nouns.get(self.concept, -1.0) >= self.least for nouns in self.judge.shown(2 * images - 1)]
        return [design == self.concept for design in self.judge.name(2 * images - 1)[1]]


@dataclass(frozen=True, eq=False)
class ClipNames:
    """Zero-shot CLIP: of the concept and the alternatives, the concept is closest to the picture.

    Source: Radford et al. 2021, section 3.1.
    """

    model: Any
    processor: Any
    concept: str
    others: Sequence[str]
    sentence: str = "a picture of a {}"

    def __post_init__(self) -> None:
        if not self.others or self.concept in self.others:
            raise ValueError(f"give other concepts to tell {self.concept!r} from, got {list(self.others)}")

    @property
    def name(self) -> str:
        return f"CLIP names {self.concept} before {', '.join(self.others)}"

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> list[bool]:
        texts = [self.sentence.format(word) for word in (self.concept, *self.others)]
        pixels = [image for image in (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
        batch = self.processor(text=texts, images=pixels, return_tensors="pt", padding=True)
        return (self.model(**batch).logits_per_image.argmax(1) == 0).tolist()
