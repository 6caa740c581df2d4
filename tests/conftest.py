"""Fixtures for all tests: tiny pipelines, an autoencoder, erasers. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import pytest
from tiny import SITE, build_pipeline, build_tokenizer, build_xl_pipeline, make_eraser, make_sae, make_store
from transformers import CLIPTokenizer

from itd import SAE, ActivationStore, Eraser, HookPoint


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


@pytest.fixture
def pipe(tokenizer: CLIPTokenizer) -> Any:
    """A StableDiffusionPipeline, the same every time and nobody else's."""
    return build_pipeline(tokenizer)


@pytest.fixture
def xl_pipe(tokenizer: CLIPTokenizer) -> Any:
    """A StableDiffusionXLPipeline, the same every time and nobody else's."""
    return build_xl_pipeline(tokenizer)


@pytest.fixture
def site() -> HookPoint:
    return SITE


@pytest.fixture(scope="session")
def sae(tokenizer: CLIPTokenizer) -> SAE:
    return make_sae(build_pipeline(tokenizer))


@pytest.fixture(scope="session")
def saved_sae(sae: SAE, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    return sae.save(tmp_path_factory.mktemp("artifacts") / "sae")


@pytest.fixture(scope="session")
def eraser(tokenizer: CLIPTokenizer, sae: SAE) -> Eraser:
    """Erases "house", and fires on nothing else."""
    return make_eraser(build_pipeline(tokenizer), sae, "house")


@pytest.fixture(scope="session")
def boat_eraser(tokenizer: CLIPTokenizer, sae: SAE) -> Eraser:
    """Erases "boat", and fires on nothing else."""
    return make_eraser(build_pipeline(tokenizer), sae, "boat")


@pytest.fixture(scope="session")
def store() -> ActivationStore:
    """Activations that a dictionary can explain: sums of a few directions, with some noise."""
    return make_store()
