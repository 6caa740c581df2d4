"""A second gate, on the pooled embedding of the whole prompt: it finds prompts that mean a concept without its features.

The first gate reads states early in the text encoder, token by token, and edits what it finds there. Words that have nothing to
do with a concept, put together until the encoder's output is the concept's, leave no feature to find. They do arrive at the
concept's place in the pooled embedding, which is computed anyway. There a linear discriminant per concept decides, and as there
is nothing to edit, the prompt is replaced: its states become those of an anchor.

Source: Liu et al. 2024, Latent Guard: a safety framework for text-to-image generation (a check in the space of the text
encoder's output, there learned).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor, nn

from itd import pipelines
from itd.discriminants import Discriminants


@dataclass(frozen=True, eq=False)
class PooledGate(Discriminants):
    """Decides on the text encoder's pooled embedding of the prompt."""

    kind: ClassVar[str] = "pooled"
    reads: ClassVar[str] = "pooled embeddings"


def encode_instead(
    pipe: Any, encoder: str, prompt: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_tokens: int
) -> Any:
    """Return what the text encoder says of another prompt when it is called with the same arguments otherwise."""
    module: nn.Module = pipelines.encoder_of(pipe, encoder)
    tokenizer = pipelines.tokenizer_of(pipe, encoder)
    row = tokenizer([prompt], padding="max_length", max_length=n_tokens, truncation=True, return_tensors="pt")
    device = pipelines.device_of(module)
    given: dict[str, Any] = dict(kwargs)
    if given.get("attention_mask") is not None:
        given["attention_mask"] = row.attention_mask.to(device)
    ids = row.input_ids.to(device)
    if args:
        return module.forward(ids, *args[1:], **given)
    return module.forward(**{**given, "input_ids": ids})


def put_instead(result: Any, other: Any, rows: Int[Tensor, " n"]) -> Any:
    """Return an encoder's result in which some rows of every tensor are those of another result, of one row."""
    if isinstance(result, Tensor):
        changed = result.clone()
        changed[rows.to(result.device)] = other[0].to(result.dtype)
        return changed
    if isinstance(result, Mapping):
        return type(result)(**{key: put_instead(value, other[key], rows) for key, value in result.items()})
    if isinstance(result, tuple | list):
        return type(result)(put_instead(a, b, rows) for a, b in zip(result, other, strict=True))
    return result
