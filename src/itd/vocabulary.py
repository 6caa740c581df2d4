"""The words of a tokenizer: those that a search over tokens may use, texts from their ids, and prompts of words at random."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itd import pipelines

WORD = re.compile(r"[a-z]{2,}")
CHUNK = 4096
SALAD = range(3, 8)
"""How many words at random a salad has."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words that are one token each and stay that token when they are written into a prompt.

    ids: (n,) token ids; words: their n texts.
    """

    ids: Int[Tensor, " n"]
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def without(self, banned: Iterable[str]) -> Vocabulary:
        """Return the vocabulary without some words.

        Raises:
            ValueError: no word is left.
        """
        out = {word.lower() for word in banned}
        keep = [i for i, word in enumerate(self.words) if word not in out]
        if not keep:
            raise ValueError("no word of the tokenizer's vocabulary is left to search over; ban fewer")
        return Vocabulary(self.ids[keep], tuple(self.words[i] for i in keep))

    def text(self, rows: Int[Tensor, " n_tokens"]) -> str:
        """Return the words at the given rows of the vocabulary, as a prompt."""
        return " ".join(self.words[row] for row in rows.tolist())


def vocabulary_of(pipe: Any, encoder: str = "text_encoder") -> Vocabulary:
    """Return the vocabulary of a pipeline's tokenizer: lower-case words of two letters or more."""
    return read_vocabulary(pipelines.tokenizer_of(pipe, encoder))


@lru_cache(maxsize=4)
def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """Return the tokens that are words and survive being written and tokenized again."""
    texts = {id: tokenizer.decode([id]).strip() for id in range(len(tokenizer))}
    candidates = [(id, text) for id, text in texts.items() if WORD.fullmatch(text)]
    kept: dict[str, int] = {}
    for start in range(0, len(candidates), CHUNK):
        part = candidates[start : start + CHUNK]
        again = tokenizer([text for _, text in part], add_special_tokens=False).input_ids
        kept |= {text: id for (id, text), ids in zip(part, again, strict=True) if ids == [id]}
    if not kept:
        raise ValueError(f"{type(tokenizer).__name__} has no words of one token to search over")
    return Vocabulary(torch.tensor(list(kept.values())), tuple(kept))


def word_salads(words: Vocabulary, texts: Sequence[str], seed: int | str) -> list[str]:
    """Put each text somewhere among some words at random; an empty text leaves the words alone."""
    rng, salads = random.Random(seed), list[str]()
    for text in texts:
        salad = rng.choices(words.words, k=rng.choice(SALAD))
        at = rng.randrange(len(salad) + 1)
        salads.append(" ".join([*salad[:at], *text.split(), *salad[at:]]))
    return salads


def names_of(concept: str) -> set[str]:
    """Return the words that say a concept outright: its name's words of three letters or more, and their plurals.

    A search that might use them would not need to search.
    """
    words = {word for word in re.findall(r"[a-z]+", concept.lower()) if len(word) > 2}
    return words | {word + "s" for word in words} | {word + "es" for word in words}


def nearest(rows: Float[Tensor, "n d"], table: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """Return the row of the table with the largest cosine to each row given."""
    unit = torch.nn.functional.normalize
    return (unit(rows, dim=1) @ unit(table, dim=1).T).argmax(1)
