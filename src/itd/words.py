"""The words that a text encoder had when an eraser was made: a gate knows nothing of words that were learnt since."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from itd import pipelines
from itd.artifacts import bytes_of

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""In which embeddings are hashed, so that a pipeline cast to half precision still has the same words."""
HASHED = "_itd_hashes"
"""Attribute under which a table keeps its hashes."""


@dataclass(frozen=True)
class KnownWords:
    """How many words a text encoder has, and what identifies their embeddings.

    Textual inversion (Gal et al. 2023) gives an encoder a word whose embedding was learnt, past a gate if its author wants
    that. Such a word is either new, so its id is `n` or more, or takes another's place, which changes the hash.
    """

    n: int
    sha256: Mapping[str, str]
    """Of the first `n` embeddings, by the precision that they were rounded to; those that the encoder's own allows."""

    @classmethod
    def of(cls, pipe: Any, encoder: str) -> Self | None:
        """Return the words of one of a pipeline's text encoders; None if it has no table of them."""
        table = embeddings_of(pipe, encoder)
        return None if table is None else cls(len(table), hashes(table, len(table)))

    def require(self, pipe: Any, encoder: str, fresh: bool = True) -> None:
        """Raise ValueError if the text encoder lacks words or has other embeddings for them; further words may be there.

        fresh: see `hashes`.
        """
        table = embeddings_of(pipe, encoder)
        found = {} if table is None else hashes(table, self.n, fresh)
        if table is None or len(table) < self.n or not agree(self.sha256, found):
            raise ValueError(
                f"the words of {encoder} are not those that the eraser was made for: an embedding was changed, as textual "
                "inversion does, and the gate knows nothing of it; restore it, make the eraser on this pipeline, or accept "
                "that with allow_new_words=True (--allow-new-words)"
            )

    def require_known(self, ids: Iterable[int], pipe: Any, encoder: str) -> None:
        """Raise ValueError if a token is of a word that was added since."""
        for token in ids:
            if token >= self.n:
                word = pipelines.tokenizer_of(pipe, encoder).convert_ids_to_tokens(token)
                raise ValueError(
                    f"the prompt has {word!r}, a word that {encoder} did not have when the eraser was made, and the gate knows "
                    "nothing of it; leave it out, make the eraser on this pipeline, or accept that with allow_new_words=True "
                    "(--allow-new-words)"
                )

    def agrees(self, other: KnownWords) -> bool:
        """Tell whether both are of the same words, as far as their precisions can be compared."""
        return self.n == other.n and agree(self.sha256, other.sha256)


def agree(known: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Tell whether hashes are equal in a precision that both have, or have none in common.

    One is enough: embeddings that were rounded once differ from their source in the other precision.
    """
    shared = known.keys() & found.keys()
    return not shared or any(known[name] == found[name] for name in shared)


def embeddings_of(pipe: Any, encoder: str) -> Float[Tensor, "words d"] | None:
    """Return the embeddings of a text encoder's words; None if it does not say where they are."""
    module: Any = pipelines.encoder_of(pipe, encoder)
    try:
        return module.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None


def hashes(table: Float[Tensor, "words d"], n: int, fresh: bool = True) -> dict[str, str]:
    """Return the SHA-256 of the first n embeddings in each precision that theirs allows: both of a full one, else its own.

    None of embeddings that are somewhere else while the encoder does not run, as with diffusers' sequential offloading.

    fresh: hash them, which takes a tenth of a second for a large encoder, even if nothing is known to have been written since.
    """
    if table.is_meta:
        return {}
    stamp = n, version_of(table), table.data_ptr()
    known = None if fresh or version_of(table) is None else getattr(table, HASHED, None)
    if known is None or known[0] != stamp:
        rows = table[:n]
        wide = table.dtype in (torch.float32, torch.float64)
        kept = {name: dtype for name, dtype in PRECISIONS.items() if wide or table.dtype == dtype}
        known = stamp, {name: hashlib.sha256(bytes_of(rows.to(dtype))).hexdigest() for name, dtype in kept.items()}
        setattr(table, HASHED, known)
    return known[1]


def version_of(tensor: Tensor) -> int | None:
    """Return a number that changes when a tensor is written to; None where torch keeps none."""
    return None if tensor.is_inference() else tensor._version
