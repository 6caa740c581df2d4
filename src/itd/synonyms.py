"""Other words for a concept, as the text encoder itself understands them.

The states early in a text encoder, where the gate looks, tell words apart that mean the same; its pooled embedding, which the
image model is told, does not. A word whose embedding lies close to a name's is drawn as the name is, and can be erased with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.prompts import fill
from itd.vocabulary import names_of, vocabulary_of

FRAMES = ("a photo of {}", "an image of a {}", "{}")
"""Sentences in which words are compared; what they have in common is taken off with the mean over the vocabulary."""
LETTERS = re.compile(r"[a-z]{3,}")
CLOSE = 0.65
"""Cosine from which a word counts as a synonym."""


@dataclass(frozen=True)
class Synonym:
    """A word that the text encoder takes for a name."""

    word: str
    similarity: float
    """Cosine of the centred pooled embeddings, at most 1."""


def find_synonyms(
    pipe: Any,
    names: Sequence[str],
    others: Iterable[str] = (),
    *,
    close: float = CLOSE,
    most: int = 8,
    words: Sequence[str] | None = None,
    common: int = 0,
    encoder: str = "text_encoder",
) -> dict[str, tuple[Synonym, ...]]:
    """Return, for each name that has any, the words which the text encoder takes for it, the closest first.

    A word belongs to one name, the closest. Words that are part of a name, or closer to one of `others`, are left out.

    Args:
        names: the concepts.
        others: names of what must stay.
        close: cosine from which a word counts, above 0 and at most 1.
        most: synonyms per name.
        words: candidates; by default the words that the tokenizer has as one token.
        common: how many of the most common English words are candidates too, of however many tokens; see `common_words`.

    Raises:
        ValueError: no names, a cosine out of range, a text encoder without a pooled output.
        ImportError: common words without the extra `synonyms`.
    """
    if not names:
        raise ValueError("names must not be empty: whose synonyms are to be found?")
    if not 0 < close <= 1:
        raise ValueError(f"close must lie above 0 and at most at 1, got {close}")
    targets = list(dict.fromkeys(names))
    rivals = [name for name in dict.fromkeys(others) if name not in targets]
    parts = set[str]().union(*(names_of(name) for name in (*targets, *rivals)))
    known = dict.fromkeys([*(words or vocabulary_of(pipe, encoder).words), *common_words(common)])
    candidates = [word for word in known if word.lower() not in parts]
    if not candidates:
        return {}
    embedded = pooled(pipe, candidates, encoder)
    centre = embedded.mean(0)
    named = pooled(pipe, [*targets, *rivals], encoder)
    similarity = F.normalize(embedded - centre, dim=1) @ F.normalize(named - centre, dim=1).T
    found: dict[str, list[Synonym]] = {}
    values, nearest = similarity.max(1)
    for row in values.argsort(descending=True).tolist():
        if values[row] < close:
            break
        if int(nearest[row]) < len(targets):
            found.setdefault(targets[int(nearest[row])], []).append(Synonym(candidates[row], round(float(values[row]), 4)))
    return {name: tuple(found[name][:most]) for name in targets if name in found}


def common_words(n: int) -> list[str]:
    """Return the n most common English words, the most common first; of three letters or more, and letters only.

    Source: Speer 2022, wordfreq, https://doi.org/10.5281/zenodo.7199437.

    Raises:
        ValueError: a negative number.
        ImportError: the extra `synonyms` is not installed.
    """
    if n < 0:
        raise ValueError(f"the number of common words must not be negative, got {n}")
    if n == 0:
        return []
    try:
        from wordfreq import iter_wordlist  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("common words need the extra synonyms: pip install 'itd[synonyms]'") from error
    return list(islice(filter(LETTERS.fullmatch, iter_wordlist("en")), n))


def synonym_words(found: Mapping[str, Sequence[Synonym]]) -> list[str]:
    """Return the words of all synonyms."""
    return [synonym.word for listed in found.values() for synonym in listed]


def pooled(pipe: Any, words: Sequence[str], encoder: str) -> Float[Tensor, "n d"]:
    """Return the text encoder's pooled embedding of every word, summed over the frames, each of norm 1.

    Raises:
        ValueError: the encoder has no pooled output.
    """
    rows = [pipelines.pooled_embeddings(pipe, encoder, [fill(frame, word) for word in words]) for frame in FRAMES]
    return torch.stack([F.normalize(embeddings, dim=1) for embeddings in rows]).sum(0)
