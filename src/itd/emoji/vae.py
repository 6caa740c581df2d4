"""The image autoencoder of the embedded world: 64 x 64 x 3 to 8 x 8 x 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from itd.emoji.data import World
from itd.emoji.images import background_colors, paste, pick, premultiply, side_by_side
from itd.emoji.stages import StageConfig, run_stage


def build_vae() -> Any:
    """Build the untrained autoencoder (2.6 M parameters)."""
    build: Any = AutoencoderKL  # its annotations allow one block only
    return build(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 128), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8, sample_size=64, mid_block_add_attention=False,
    )  # fmt: skip


def train_vae(world: World, config: StageConfig, folder: Path) -> Any:
    """Train on single stickers and scenes, on named and on random background colours.

    Loss: L1 + MSE + 4 * gradient L1 + a weak KL term. The scaling factor makes the image latents of the renders unit variance.
    """
    torch.manual_seed(config.seed)
    stickers, colors = premultiply(world.rgba), background_colors()
    vae: Any = build_vae()
    vae = vae.to(memory_format=torch.channels_last)

    def draw(n: int) -> Float[Tensor, "n 3 64 64"]:
        images = stickers[pick(n, len(stickers))]
        scenes = n // 4
        images[:scenes] = side_by_side(images[:scenes], stickers[pick(scenes, len(stickers))])
        background = torch.where(torch.rand(n, 1) < 0.8, colors[pick(n, len(colors))], torch.rand(n, 3))
        return paste(images, background).contiguous(memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x = draw(config.batch_size)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges + 1e-6 * posterior.kl().mean()
        return loss, {"mse": error.square().mean().item()}

    trained: Any = run_stage("vae", folder, vae, config, loss_of)
    trained = trained.to(memory_format=torch.contiguous_format)
    torch.manual_seed(config.seed)
    with torch.no_grad():
        std = float(trained.encode(draw(512)).latent_dist.mean.std())
    trained.register_to_config(scaling_factor=1 / std)
    trained.save_pretrained(folder / "vae")
    return trained


@torch.no_grad()
def encode_images(vae: Any, images: Float[Tensor, "n 3 64 64"], batch_size: int = 128) -> Float[Tensor, "n 16 8 8"]:
    """Return scaled image latents (the posterior's mean)."""
    batches = tqdm(images.split(batch_size), desc="encode images", disable=len(images) < 2048, mininterval=5)
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches]) * vae.config.scaling_factor
