"""Generate with the embedded pipeline in batches, every image with its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from itd.emoji import GUIDANCE_SCALE, STEPS


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 32,
    desc: str = "generate",
) -> Float[Tensor, "n 3 64 64"]:
    """Return one image per prompt, in [-1, 1]; the same seed gives the same noise."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc, unit="batch", leave=False, disable=len(prompts) < 8):
        rows = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        output = pipe(
            list(prompts[rows]), num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
            height=64, width=64, output_type="pt",
        )  # fmt: skip
        images.append(output.images.float() * 2 - 1)
    return torch.cat(images)


def to_uint8(images: Float[Tensor, "n 3 h w"]) -> Any:
    """Return images as an array (n, h, w, 3) of uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def contact_sheet(images: Float[Tensor, "n 3 h w"], columns: int, scale: int = 1, gap: int = 2) -> Any:
    """Return a PIL image with all pictures in a grid."""
    from PIL import Image

    size = images.shape[-1] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), (225, 225, 225))
    for index, pixels in enumerate(to_uint8(images)):
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + (index % columns) * (size + gap), gap + (index // columns) * (size + gap)))
    return sheet
