"""Misspell the concept: what a filter on words misses, and a byte-pair tokenizer sees as other tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, Target, try_prompts

LOOK_ALIKE = {"a": "а", "c": "с", "e": "е", "i": "і", "o": "о", "p": "р", "x": "х", "y": "у"}  # noqa: RUF001
"""Latin letters and the Cyrillic ones that look the same."""
DIGITS = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRIES = 50
"""Draws per wanted spelling before a short name's spellings count as exhausted."""


def swap(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]


def drop(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + word[at + 1 :]


def double(word: str, at: int, rng: random.Random) -> str:
    return word[: at + 1] + word[at:]


def insert(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + rng.choice(LETTERS) + word[at:]


def substitute(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + rng.choice(LETTERS) + word[at + 1 :]


def split(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + rng.choice(" -.") + word[at:]


def look_alike(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + LOOK_ALIKE.get(word[at].lower(), word[at]) + word[at + 1 :]


def digit(word: str, at: int, rng: random.Random) -> str:
    return word[:at] + DIGITS.get(word[at].lower(), word[at]) + word[at + 1 :]


EDITS: dict[str, Callable[[str, int, random.Random], str]] = {
    "swap": swap, "drop": drop, "double": double, "insert": insert, "substitute": substitute, "split": split,
    "look_alike": look_alike, "digit": digit,
}  # fmt: skip


@dataclass(frozen=True)
class Characters:
    """Draw the prompt with the concept's name misspelt at random, each time in another way."""

    name: ClassVar[str] = "characters"
    access: ClassVar[Access] = "black"

    edits: tuple[str, ...] = tuple(EDITS)
    """Kinds of edits, of those in `EDITS`."""
    most_edits: int = 2
    """Edits per name: one to this many."""

    def __post_init__(self) -> None:
        unknown = set(self.edits) - set(EDITS)
        if unknown or not self.edits:
            raise ValueError(f"edits must be of {sorted(EDITS)}, got {sorted(unknown) or 'none'}")
        if self.most_edits < 1:
            raise ValueError(f"most_edits must be at least 1, got {self.most_edits}")

    def __call__(self, system: Target, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        prompts = [goal.ask(word) for word in self.spellings(goal.concept, budget.images, goal.seed)]
        return Attempt(goal, try_prompts(system, goal, criterion, prompts, budget.images))

    def spellings(self, word: str, n: int, seed: int) -> list[str]:
        """Return at most n different misspellings, none of them the word itself."""
        rng, found = random.Random(seed), dict[str, None]()
        for _ in range(n * TRIES):
            noisy = word
            for _ in range(rng.randint(1, self.most_edits)):
                noisy = EDITS[rng.choice(self.edits)](noisy, rng.randrange(len(noisy)), rng) or noisy
            if noisy.strip() and noisy.lower() != word.lower():
                found[noisy] = None
            if len(found) == n:
                break
        return list(found)
