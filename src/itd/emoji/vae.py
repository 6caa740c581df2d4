"""The image autoencoder of the embedded world: 64 x 64 x 3 to 8 x 8 x 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
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


class Renders:
    """Draws single stickers and scenes, on named and on random background colours."""

    def __init__(self, world: World) -> None:
        self.stickers, self.colors = premultiply(world.rgba), background_colors()

    def draw(self, n: int) -> Float[Tensor, "n 3 64 64"]:
        images = self.stickers[pick(n, len(self.stickers))]
        scenes = n // 4
        images[:scenes] = side_by_side(images[:scenes], self.stickers[pick(scenes, len(self.stickers))])
        background = torch.where(torch.rand(n, 1) < 0.8, self.colors[pick(n, len(self.colors))], torch.rand(n, 3))
        return paste(images, background).contiguous(memory_format=torch.channels_last)


def edge_error(error: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference of neighbouring errors: what blurs an edge."""
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def train_vae(world: World, config: StageConfig, folder: Path) -> Any:
    """Train encoder and decoder.

    Loss: L1 + MSE + gradient L1 + a weak KL term. The scaling factor makes the image latents of the renders unit variance.
    """
    torch.manual_seed(config.seed)
    renders, vae = Renders(world), build_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x = renders.draw(config.batch_size)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.abs().mean() + error.square().mean() + edge_error(error) + 1e-6 * posterior.kl().mean()
        return loss, {"mse": error.square().mean().item()}

    trained: Any = run_stage("vae", folder, vae, config, loss_of)
    trained = trained.to(memory_format=torch.contiguous_format)
    torch.manual_seed(config.seed)
    with torch.no_grad():
        std = float(trained.encode(renders.draw(512)).latent_dist.mean.std())
    trained.register_to_config(scaling_factor=1 / std)
    trained.save_pretrained(folder / "vae")
    return trained


def train_decoder(world: World, vae: Any, config: StageConfig, folder: Path, noise: float = 0.15) -> Any:
    """Train the decoder on, the encoder fixed, so that image latents stay what they are.

    Latents carry noise of `noise` standard deviations, as generated ones do, and the loss is without its square, which blurs.
    """
    torch.manual_seed(config.seed)
    renders, scale = Renders(world), noise / vae.config.scaling_factor
    for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        parameter.requires_grad_(False)
    decoder: Any = nn.ModuleDict({"decoder": vae.decoder, "post": vae.post_quant_conv})
    decoder = decoder.to(memory_format=torch.channels_last)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x = renders.draw(config.batch_size)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
            latents = latents + scale * torch.rand(len(x), 1, 1, 1) * torch.randn_like(latents)
        error = decoder["decoder"](decoder["post"](latents)) - x
        return error.abs().mean() + edge_error(error), {"mse": error.square().mean().item()}

    run_stage("decoder", folder, decoder, config, loss_of)
    vae.to(memory_format=torch.contiguous_format).eval().save_pretrained(folder / "autoencoder")
    return vae


@torch.no_grad()
def encode_images(vae: Any, images: Float[Tensor, "n 3 64 64"], batch_size: int = 128) -> Float[Tensor, "n 16 8 8"]:
    """Return scaled image latents (the posterior's mean)."""
    batches = tqdm(images.split(batch_size), desc="encode images", disable=len(images) < 2048, mininterval=5)
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches]) * vae.config.scaling_factor
