"""The image model of the embedded world: a conditional U-Net on 8 x 8 x 16 image latents, trained with v-prediction."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from itd.emoji.captions import CaptionSource
from itd.emoji.clip import MAX_TOKENS
from itd.emoji.data import BACKGROUNDS, DESIGNS, World
from itd.emoji.images import background_colors, paste, premultiply, side_by_side
from itd.emoji.stages import StageConfig, run_stage
from itd.emoji.vae import encode_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolConfig:
    """What the U-Net is trained on: captioned images, their image latents and text states computed once."""

    n_singles: int = 64_000
    n_scenes: int = 28_000
    seed: int = 0


def build_unet() -> UNet2DConditionModel:
    """Build the untrained U-Net (11.3 M parameters)."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=256, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """Build the noise schedule: Stable Diffusion's, rescaled to end in pure noise, v-prediction.

    Source: Lin et al. 2024, Common diffusion noise schedules and sample steps are flawed.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


class Pool:
    """Captioned training images: image latents (n, 16, 8, 8) and text states (m, tokens, 256), both fp16.

    Single nouns share one image latent per (image, background); `image` maps a caption to its image latent.
    """

    def __init__(self, image_latents: np.ndarray, image: np.ndarray, states: np.ndarray, empty: Tensor) -> None:
        self.image_latents, self.image, self.states, self.empty = image_latents, image, states, empty

    def draw(self, n: int, drop: float = 0.1) -> tuple[Tensor, Tensor]:
        """Draw image latents and text states; a share `drop` of the prompts is empty (for guidance)."""
        index = torch.randint(len(self.image), (n,)).numpy()
        states = torch.from_numpy(self.states[index]).float()
        states[torch.rand(n) < drop] = self.empty
        return torch.from_numpy(self.image_latents[self.image[index]]).float(), states


@torch.no_grad()
def text_states(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str], out: np.ndarray) -> None:
    """Fill `out` (n, tokens, 256) with the encoder's states, padded as the pipeline pads."""
    for start in tqdm(range(0, len(texts), 256), desc="text states", mininterval=5):
        batch = texts[start : start + 256]
        tokens = tokenizer(batch, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        out[start : start + len(batch)] = encoder(tokens["input_ids"])[0].half().numpy()


def build_pool(
    world: World,
    words: list[str],
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    config: PoolConfig,
    folder: Path,
) -> Pool:
    """Caption and encode the training images, or read them back when `folder` has them."""
    files = {name: folder / f"pool_{name}.npy" for name in ("latents", "image", "states")}
    empty = np.zeros((1, MAX_TOKENS, 256), np.float16)
    text_states(encoder, tokenizer, [""], empty)
    if not all(file.exists() for file in files.values()):
        pictures, owner, texts = caption_images(world, words, vae, config)
        filled = np.lib.format.open_memmap(folder / "pool_states.tmp.npy", "w+", np.float16, (len(texts), MAX_TOKENS, 256))
        text_states(encoder, tokenizer, texts, filled)
        filled.flush()
        np.save(files["latents"], pictures)
        np.save(files["image"], owner)
        (folder / "pool_states.tmp.npy").rename(files["states"])
    image_latents, image = np.load(files["latents"]), np.load(files["image"])
    states = np.load(files["states"], mmap_mode="r")
    return Pool(image_latents, image, states, torch.from_numpy(empty[0]).float())


@torch.no_grad()
def caption_images(
    world: World, words: list[str], vae: AutoencoderKL, config: PoolConfig
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return image latents, the image of every caption, and the captions: singles first, then scenes.

    Identities and unsafe objects, on which erasing is measured, occur twice as often as other nouns.
    """
    rng, source = random.Random(config.seed), CaptionSource(world.nouns, words)
    stickers, colors, names = premultiply(world.rgba), background_colors(), list(BACKGROUNDS)
    n = len(stickers)
    latents = [encode_images(vae, paste(stickers, color.expand(n, 3))).half().numpy() for color in colors]
    image, texts = [], []
    of_identities = [i for i in range(n) if world.nouns[world.noun[i]].role != "general"]
    order = [*range(n), *of_identities]
    for row in range(config.n_singles):
        index, shade = order[row % len(order)], rng.randrange(len(colors)) if rng.random() < 0.6 else 0
        design = DESIGNS[world.design[index]] if rng.random() < 0.75 else None
        image.append(shade * n + index)
        texts.append(source.single(int(world.noun[index]), design, shown(names, shade, rng), rng))
    by_design = [np.flatnonzero(world.design == design) for design in range(len(DESIGNS))]
    scenes, shades = [], []
    for row in range(config.n_scenes):
        shade = rng.randrange(len(colors)) if rng.random() < 0.5 else 0
        members = by_design[rng.randrange(len(DESIGNS))]
        left, right = int(rng.choice(members)), int(rng.choice(members))
        design = DESIGNS[world.design[left]] if rng.random() < 0.75 else None
        scenes.append((left, right))
        shades.append(shade)
        image.append(len(colors) * n + row)
        nouns = int(world.noun[left]), int(world.noun[right])
        texts.append(source.pair(*nouns, design, shown(names, shade, rng), rng))
    for start in tqdm(range(0, len(scenes), 2048), desc="encode scenes", mininterval=5):
        left, right = torch.tensor(scenes[start : start + 2048]).T
        background = colors[torch.tensor(shades[start : start + 2048])]
        pictures = paste(side_by_side(stickers[left], stickers[right]), background)
        latents.append(encode_images(vae, pictures, 256).half().numpy())
    return np.concatenate(latents), np.array(image), texts


def shown(names: list[str], shade: int, rng: random.Random) -> str | None:
    """Name the background in the caption always, but white only at times."""
    return names[shade] if shade or rng.random() < 0.2 else None


def train_unet(pool: Pool, config: StageConfig, folder: Path) -> Any:
    """Train with v-prediction; steps with little noise, which settle only detail, are drawn less often.

    Loss: ||v_hat - v||^2 at timesteps drawn in proportion to min(1, 5 / (snr + 1)): on the image, a weight of min(snr + 1, 5).
    Source: Hang et al. 2023, Efficient diffusion training via min-SNR weighting, with full weight kept at pure noise; drawing
    the timesteps instead of weighing the errors has the same mean and less noise.
    """
    torch.manual_seed(config.seed)
    unet: Any = build_unet()
    scheduler: Any = build_scheduler()
    alphas: Tensor = scheduler.alphas_cumprod
    weights = (5 * (1 - alphas)).clamp(max=1)  # 1 / (snr + 1) = 1 - alpha

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        image_latents, states = pool.draw(config.batch_size)
        noise, timesteps = torch.randn_like(image_latents), torch.multinomial(weights, len(image_latents), replacement=True)
        noisy = scheduler.add_noise(image_latents, noise, timesteps)
        velocity = scheduler.get_velocity(image_latents, noise, timesteps)
        return (unet(noisy, timesteps, states).sample - velocity).square().mean(), {}

    trained: Any = run_stage("unet", folder, unet, config, loss_of)
    trained.save_pretrained(folder / "unet")
    return trained
