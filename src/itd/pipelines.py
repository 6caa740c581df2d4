"""The only module that knows diffusers: encoders and tokenizers of a pipeline, token masks, the image model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from itd.hooks import HookPoint, run_up_to

ENFORCER = "_itd_enforcer"
"""Attribute of a pipeline that has erasers attached; it holds what enforces them."""
PROBE = "a photo of a thing"
"""The prompt whose activation identifies a text encoder."""
BATCH = 256
"""Prompts whose pooled embeddings are computed at a time."""


class Tokens(NamedTuple):
    """Token ids as the pipeline makes them, and which of them the prompt wrote."""

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch tokens"] | None
    """Passed to the encoder only where the pipeline passes it."""


def encoder_of(pipe: Any, name: str) -> nn.Module:
    """Return a text encoder of the pipeline by component name.

    Raises:
        ValueError: there is none of that name.
    """
    encoder = getattr(pipe, name, None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"the pipeline has no encoder {name!r}")
    return encoder


def tokenizer_of(pipe: Any, encoder: str) -> Any:
    """Return the tokenizer that belongs to an encoder: `text_encoder_2` has `tokenizer_2`.

    Raises:
        ValueError: there is none.
    """
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer = getattr(pipe, name, None)
    if tokenizer is None:
        raise ValueError(f"the pipeline has no {name!r} for the encoder {encoder!r}")
    return tokenizer


def image_model(pipe: Any) -> nn.Module:
    """Return the network that the text conditions: `unet` or `transformer`.

    Raises:
        ValueError: the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")


def uses_attention_mask(encoder: nn.Module) -> bool:
    return bool(getattr(encoder.config, "use_attention_mask", False))


def is_causal(encoder: nn.Module) -> bool:
    """Tell whether a token's state depends on the tokens before it only, as in CLIP."""
    return str(getattr(encoder.config, "model_type", "")).startswith("clip")


def tokenize(pipe: Any, encoder: str, prompts: Sequence[str]) -> Tokens:
    """Tokenize exactly as the pipeline does: padded and cut to the tokenizer's `model_max_length`.

    A text encoder without an image model (`itd.encoders`) says itself how it pads.
    """
    tokenizer = tokenizer_of(pipe, encoder)
    converted = [convert_prompt(pipe, prompt, tokenizer) for prompt in prompts]
    padding = getattr(pipe, "padding", "max_length")
    batch = tokenizer(converted, padding=padding, max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    mask = batch.attention_mask if uses_attention_mask(encoder_of(pipe, encoder)) else None
    return Tokens(batch.input_ids, mask)


def text_encoders(pipe: Any) -> list[str]:
    """Return the names of the pipeline's text encoders."""
    parts: dict[str, Any] = getattr(pipe, "components", {})
    return sorted(name for name, part in parts.items() if name.startswith("text_encoder") and isinstance(part, nn.Module))


def needs_no_padding(encoder: nn.Module) -> bool:
    """Tell whether a prompt's states are the same without the padding behind it: nothing looks ahead, nothing is masked."""
    return is_causal(encoder) and not uses_attention_mask(encoder)


def token_rows(pipe: Any, encoder: str, prompts: Sequence[str], whole: bool = False) -> list[list[int]]:
    """Tokenize as the pipeline does, without padding. `whole`: without begin and end tokens, and not cut to the maximum."""
    tokenizer = tokenizer_of(pipe, encoder)
    converted = [convert_prompt(pipe, prompt, tokenizer) for prompt in prompts]
    if not converted:
        return []
    if whole:
        return tokenizer(converted, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(converted, max_length=tokenizer.model_max_length, truncation=True).input_ids


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Tell whether `part` stands in `ids` without a gap."""
    return any(list(ids[i : i + len(part)]) == list(part) for i in range(len(ids) - len(part) + 1))


def written(ids: Iterable[int], tokenizer: Any) -> list[int]:
    """Return token ids without those that begin, end or pad a prompt, wherever they stand: what it says, however it is cut."""
    marks = {begin_token(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "pad_token_id", None)}
    return [id for id in ids if id not in marks]


def pad_rows(rows: Sequence[Sequence[int]], tokenizer: Any) -> Tokens:
    """Return token ids as one tensor, padded to the longest row; for encoders that need no padding."""
    longest = max(map(len, rows))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Tokens(torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows]), None)


def tokenize_short(pipe: Any, encoder: str, prompts: Sequence[str]) -> Tokens:
    """Tokenize as the pipeline does, without the padding where that changes nothing."""
    if not needs_no_padding(encoder_of(pipe, encoder)):
        return tokenize(pipe, encoder, prompts)
    return pad_rows(token_rows(pipe, encoder, prompts), tokenizer_of(pipe, encoder))


def convert_prompt(pipe: Any, prompt: str, tokenizer: Any) -> str:
    """Expand textual-inversion tokens where the pipeline would."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return convert(prompt, tokenizer) if convert else prompt


def content_end(input_ids: Int[Tensor, "batch tokens"], tokenizer: Any) -> Int[Tensor, " batch"]:
    """Return the position after the last token of each row that is neither an end token nor padding."""
    pad = getattr(tokenizer, "pad_token_id", None)
    closing = input_ids == tokenizer.eos_token_id
    if pad is not None:
        closing |= input_ids == pad
    positions = torch.arange(1, input_ids.shape[-1] + 1, device=input_ids.device)
    return torch.where(closing, 0, positions).amax(-1)


def content_mask(input_ids: Int[Tensor, "batch tokens"], tokenizer: Any) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens that the prompt wrote: after the begin token, before the end token and padding that close the row.

    An end token further in front was written by the prompt, or stands for a character that the tokenizer does not know: the
    image model sees what follows it, so the gate does too.
    """
    positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
    mask = positions < content_end(input_ids, tokenizer)[:, None]
    return mask & (input_ids != begin_token(tokenizer))


def edit_mask(input_ids: Int[Tensor, "batch tokens"], tokenizer: Any) -> Bool[Tensor, "batch tokens"]:
    """Mark the positions that an eraser may change: all but the begin token, padding included.

    Padding carries the prompt too: in CLIP, states after the end token attend to every token before them.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    if begin_token(tokenizer) is not None:
        mask[:, 0] = input_ids[:, 0] != begin_token(tokenizer)
    return mask


def begin_token(tokenizer: Any) -> int | None:
    """Return the id of the begin token, if the tokenizer writes one that differs from its end token."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return None if begin == tokenizer.eos_token_id else begin


def undisturbed(pipe: Any) -> AbstractContextManager[None]:
    """Return a context in which no attached eraser looks at what this thread does with the pipeline."""
    enforcer = getattr(pipe, ENFORCER, None)
    return nullcontext() if enforcer is None else enforcer.substitution()


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: under offloading not where its parameters are between calls."""
    for part in module.modules() if hasattr(module, "_hf_hook") else ():
        found = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    own = getattr(module, "device", None)  # networks of transformers and diffusers tell it
    return next(module.parameters()).device if own is None else torch.device(own)


def run_encoder(pipe: Any, encoder: str, tokens: Tokens) -> Any:
    """Return what the whole text encoder says of tokens, wherever it is; attached erasers do not look at it."""
    module = encoder_of(pipe, encoder)
    device = device_of(module)
    mask = None if tokens.attention_mask is None else tokens.attention_mask.to(device)
    with undisturbed(pipe):
        return module(tokens.input_ids.to(device), attention_mask=mask)


@torch.no_grad()
def activations(pipe: Any, site: HookPoint, tokens: Tokens) -> Float[Tensor, "batch tokens d_model"]:
    """Run the encoder up to the hook point and return its output there."""
    return run_up_to(site.resolve(pipe), lambda: run_encoder(pipe, site.encoder, tokens))


def pooled_output(output: Any) -> Float[Tensor, "batch d"] | None:
    """Return the pooled embedding in a text encoder's output, projected where the encoder projects it; None if it has none."""
    found = getattr(output, "text_embeds", None)
    return getattr(output, "pooler_output", None) if found is None else found


@torch.no_grad()
def pooled_embeddings(pipe: Any, encoder: str, prompts: Sequence[str]) -> Float[Tensor, "prompts d"]:
    """Return the text encoder's pooled embedding of every prompt, fp32. Prompts of like length are encoded together.

    Raises:
        ValueError: the encoder has no pooled output.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Tensor] = []
    starts = range(0, len(prompts), BATCH)
    for start in tqdm(starts, desc="pooled embeddings", unit="batch", leave=False, disable=len(starts) < 12):
        tokens = tokenize_short(pipe, encoder, [prompts[i] for i in order[start : start + BATCH]])
        embedding = pooled_output(run_encoder(pipe, encoder, tokens))
        if embedding is None:
            raise ValueError(f"{encoder} ({type(encoder_of(pipe, encoder)).__name__}) has no pooled output")
        found.append(embedding.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def fingerprint(pipe: Any, site: HookPoint) -> Float[Tensor, " d_model"]:
    """Return what identifies the text encoder: the activation of a fixed prompt's last content token, fp32.

    It is compared with tolerance, so a pipeline cast to half precision is still the same encoder.
    """
    tokens = tokenize_short(pipe, site.encoder, [PROBE])
    last = int(content_end(tokens.input_ids, tokenizer_of(pipe, site.encoder))[0]) - 1
    return activations(pipe, site, tokens)[0, last].float().cpu()


@torch.no_grad()
def last_state(pipe: Any, encoder: str) -> Float[Tensor, " d"]:
    """Return what the whole text encoder says of a fixed prompt: its last content token's state, or its embedding; fp32."""
    tokens = tokenize_short(pipe, encoder, [PROBE])
    said = run_encoder(pipe, encoder, tokens)[0][0].float().cpu()
    return said[int(content_end(tokens.input_ids, tokenizer_of(pipe, encoder))[0]) - 1] if said.ndim > 1 else said
