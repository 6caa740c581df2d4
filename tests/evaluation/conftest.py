"""A small stand-in for the embedded world: the same interfaces, random weights, few nouns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in import IDENTITIES, build_clip, build_nouns
from tiny import D_MODEL, SITE, build_pipeline, randomise
from transformers import CLIPTokenizer

from itd import SAE, SAEConfig, TrainConfig, emoji, record
from itd.emoji import prompts as world_prompts
from itd.emoji.data import DESIGNS, Noun
from itd.emoji.judge import Judge
from itd.prompts import PromptSet
from itd.training import initial_weights


@pytest.fixture(scope="session")
def world_sae(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    """An autoencoder of the stand-in's text encoder, saved, as erasers name theirs by its hash."""
    pipe = build_pipeline(tokenizer)
    names = [noun.name for noun in build_nouns()]
    store = record(pipe, SITE, PromptSet.from_names(names, ("a {}", "my {}", "a photo of a {}")))
    config = SAEConfig(D_MODEL, 128, 8)
    sae = SAE(config, **initial_weights(store, config, TrainConfig(init="data", whiten=True)), hook_point=SITE)
    return sae.save(tmp_path_factory.mktemp("world") / "sae")


@pytest.fixture
def tiny_world(
    monkeypatch: pytest.MonkeyPatch, tokenizer: CLIPTokenizer, world_sae: SAE, tmp_path_factory: pytest.TempPathFactory
) -> list[Noun]:
    """Put the stand-in where the embedded world is loaded from; pictures take 2 steps."""
    nouns, folder = build_nouns(), tmp_path_factory.mktemp("models")
    accuracy = {noun.name: 1 - i / 100 for i, noun in enumerate(nouns)}
    (folder / "benchmark.json").write_text(json.dumps({"identities": list(IDENTITIES), "accuracy": accuracy}))
    (folder / "words.txt").write_text("\n".join(["soft", "green", "under", "music", "paper", "cold"]))
    judge = randomise(Judge([noun.name for noun in nouns], list(DESIGNS)), 4)
    parts: dict[str, Any] = {
        "load_pipeline": lambda: build_pipeline(tokenizer), "load_sae": lambda: world_sae, "load_judge": lambda: judge,
        "load_clip": lambda: build_clip(tokenizer), "nouns": lambda: nouns, "model_folder": lambda: folder,
        "HOOK_POINT": SITE, "STEPS": 2,
    }  # fmt: skip
    for name, value in parts.items():
        monkeypatch.setattr(emoji, name, value)
    monkeypatch.setattr(world_prompts, "nouns", lambda: nouns)
    monkeypatch.setattr(world_prompts, "model_folder", lambda: Path(folder))
    return nouns
