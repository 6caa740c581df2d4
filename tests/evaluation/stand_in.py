"""Parts of a small stand-in for the embedded world: few nouns, random weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tiny import randomise
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from itd.emoji.data import Noun

IDENTITIES = ("cat", "dog", "horse", "owl", "lion", "frog", "cow", "pig")
GENERAL = ("house", "tree", "boat", "lamp", "cup", "hat", "key", "sun", "bus", "egg", "pen", "map")
UNSAFE = ("axe", "bow")


def build_nouns() -> list[Noun]:
    rows = [Noun(name, (f"{name}ish",), "animal", "identity", (f"{name}ish",)) for name in IDENTITIES]
    rows += [Noun(name, (), "thing", "general") for name in GENERAL]
    return rows + [Noun(name, ("lumber", "quiver")[i : i + 1], "tool", "unsafe", ()) for i, name in enumerate(UNSAFE)]


def build_clip(tokenizer: CLIPTokenizer) -> tuple[Any, Any]:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": tokenizer.model_max_length, "eos_token_id": 1, "bos_token_id": 0,
        "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    return randomise(model, 8), SimpleNamespace(tokenizer=tokenizer)
