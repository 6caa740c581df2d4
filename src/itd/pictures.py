"""A gate on the finished picture: the last look, at what was drawn, whatever prompt, embedding or noise led there.

The other gates look at the prompt, and an attacker who knows them can search for one that passes. What is drawn has to show the
concept, so it is looked for there, before the latent image is decoded. The image model itself reads it: given the picture with
noise and the empty prompt, it has in its middle block what the picture shows. There a discriminant per concept decides, fitted
to pictures that the pipeline draws of the concept's prompts and of others. A picture that fires comes out black, as diffusers'
safety checker does it. No second model is needed.

Sources: Tang et al. 2023, Emergent correspondence from image diffusion (features of a noised picture, section 4); Baranchuk et
al. 2022, Label-efficient semantic segmentation with diffusion models (linear readout of the U-Net's features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from itd import pipelines
from itd.drafts import ImageModelGate, fixed_noise, latent_shape, over_squares, states_of
from itd.hooks import run_up_to

BATCH = 16
"""Pictures that are drawn at a time to fit the gate."""
BLACK = -1.0
"""What the values of a picture become that fires."""
NOISED = (0.3, 0.6)
"""How far along the timesteps a picture is noised when it is read; a little and much, for details and for the whole."""
UNGUIDED = 1.0
"""Guidance scale of further pictures of a concept: without guidance it is drawn in more ways than one."""


@dataclass(frozen=True, eq=False)
class PictureGate(ImageModelGate):
    """Decides on the direction in which a picture's features differ from those of an empty latent image.

    1 is the median of pictures of a concept's own prompts, as many of these are drawn with something else, or without it.
    """

    kind: ClassVar[str] = "picture"
    reads: ClassVar[str] = "features of pictures"
    shrinkage: ClassVar[float] = 0.02
    own_quantile: ClassVar[float] = 0.5
    part_way: ClassVar[float] = 0.35

    @staticmethod
    def origin_of(pipe: Any) -> Float[Tensor, " d"]:
        """Return the features of an empty latent image."""
        empty = torch.zeros(1, *latent_shape(pipe), dtype=pipe.unet.dtype, device=pipelines.device_of(pipe.unet))
        with torch.no_grad():
            return picture_features(pipe, empty)[0].cpu()


def picture_features(pipe: Any, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Return what the image model's middle block has of latent images, fp32, at each of the timesteps `NOISED`.

    It is given `sqrt(a) x_0 + sqrt(1 - a) noise`, a: the cumulative product of alphas, noise: always the same, and the empty
    prompt. Averaged over a grid of squares, so that pictures of any size have as many values. Differentiable.

    latents: scaled as the image model has them.
    """
    noise = fixed_noise((1, *latents.shape[1:])).to(latents)
    with torch.no_grad():
        states = states_of(pipe, [""]).to(latents).expand(len(latents), -1, -1)
    found = []
    for share in NOISED:
        t = torch.tensor(int(share * pipe.scheduler.config.num_train_timesteps), device=latents.device)
        alpha = pipe.scheduler.alphas_cumprod[int(t)].to(latents)
        given = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with pipelines.undisturbed(pipe):
            found.append(over_squares(middle_block(pipe.unet, given, t, states)))
    return torch.cat(found, 1)


def middle_block(
    unet: Any, x: Float[Tensor, "n c h w"], t: Int[Tensor, ""], states: Float[Tensor, "n tokens d"]
) -> Float[Tensor, "n d h w"]:
    """Return the output of a U-Net's middle block; what comes after it is not run."""
    return run_up_to(unet.mid_block, lambda: unet(x, t, encoder_hidden_states=states), read=lambda output: output)


@torch.no_grad()
def drawn_features(
    pipe: Any, prompts: Sequence[str], steps: int | None, guidance: float | None, seed: int
) -> Float[Tensor, "prompts d"]:
    """Draw every prompt once, each from a seed of its own, and return the features of the latent images, on the CPU.

    steps, guidance: None stands for what the pipeline takes by itself.
    """
    named = {"num_inference_steps": steps, "guidance_scale": guidance}
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    found = []
    starts = range(0, len(prompts), BATCH)
    for start in tqdm(starts, desc="draw prompts", unit="batch", leave=False, disable=len(starts) < 4):
        batch = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        with pipelines.undisturbed(pipe):
            latents = pipe(batch, generator=generators, output_type="latent", **options).images
        found.append(picture_features(pipe, latents).cpu())
    return torch.cat(found)
