"""The embedded world: a small Stable Diffusion pipeline that draws emoji, with its judge and its autoencoder, offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itd.emoji.data import DESIGNS, Noun, load_nouns
from itd.hooks import HookPoint
from itd.sae import SAE

if TYPE_CHECKING:
    from itd.emoji.judge import Judge

__all__ = [
    "DESIGNS",
    "HOOK_POINT",
    "Noun",
    "load_clip",
    "load_judge",
    "load_nouns",
    "load_pipeline",
    "load_sae",
    "model_folder",
    "nouns",
]

HOOK_POINT = HookPoint("text_encoder", "encoder.layers.1")
GUIDANCE_SCALE = 3.0
STEPS = 25
PICTURES: dict[str, Any] = {
    "picture_steps": STEPS,
    "picture_guidance": GUIDANCE_SCALE,
    "picture_looks": tuple(f"{design} style" for design in DESIGNS),
}
"""Settings of `itd.EraseConfig` with which a picture gate is made from pictures as they are drawn here."""
ANCHOR = "a picture of a tree"
"""What is drawn here in the place of a refused prompt."""


def model_folder() -> Path:
    """Return the folder of the shipped weights: in the installed package, or in a source checkout.

    Raises:
        FileNotFoundError: neither has them.
    """
    package = Path(__file__).parent / "models"
    checkout = Path(__file__).parents[3] / "models" / "emoji"
    for folder in (package, checkout):
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(f"the embedded world's weights are not at {checkout}: run `make emoji-world`, or reinstall itd")


def sae_folder() -> Path:
    return model_folder() / "sae"


def load_pipeline(folder: str | Path | None = None) -> Any:
    """Load the pipeline, a diffusers `StableDiffusionPipeline`, in fp32 on the CPU, without network."""
    import torch
    from diffusers import StableDiffusionPipeline

    source = model_folder() if folder is None else Path(folder)
    pipe = StableDiffusionPipeline.from_pretrained(source, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_sae() -> SAE:
    """Load the autoencoder trained at `HOOK_POINT`."""
    return replace(SAE.load(sae_folder()), source="itd.emoji")


def load_judge() -> Judge:
    """Load the judge, which names noun and design of a picture."""
    from itd.emoji.judge import Judge

    return Judge.load(model_folder() / "judge")


def load_clip() -> tuple[Any, Any]:
    """Load the same CLIP as `CLIPModel`, with its processor, for CLIP scores."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    folder = model_folder() / "clip"
    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
    return model.to(torch.float32).eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True)


def nouns() -> list[Noun]:
    """Return the nouns that the pipeline was trained on, with tags and roles."""
    return load_nouns(model_folder() / "nouns.json")
