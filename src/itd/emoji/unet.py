"""The image model of the embedded world: a conditional U-Net on 8 x 8 x 16 image latents, trained with v-prediction."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from itd.emoji.captions import CaptionSource
from itd.emoji.clip import MAX_TOKENS
from itd.emoji.data import BACKGROUNDS, DESIGNS, UNSAID, World
from itd.emoji.images import background_colors, paste, premultiply, side_by_side
from itd.emoji.judge import conv
from itd.emoji.stages import StageConfig, run_stage
from itd.emoji.vae import encode_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolConfig:
    """What the U-Net is trained on: captioned images, their image latents and text states computed once."""

    n_singles: int = 42_000
    n_scenes: int = 58_000
    noise_share: float = 0.3
    """How often a caption has words around it that mean nothing here: the image must not hang on the frames of the captions."""
    sentence_share: float = 0.45
    """How often a single noun stands in a sentence of such words."""
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


class Examples(NamedTuple):
    """A batch of captioned images."""

    image_latents: Float[Tensor, "n 16 8 8"]
    states: Float[Tensor, "n tokens 256"]
    labels: Int[Tensor, "n 4"]
    """What the caption says: the noun on the left, on the right (the same one in a single), design, background; or UNSAID."""


class Pool:
    """Captioned training images: image latents (n, 16, 8, 8) and text states (m, tokens, 256), both fp16, labels (m, 4).

    Single nouns share one image latent per (image, background); `image` maps a caption to its image latent.
    """

    def __init__(
        self, image_latents: np.ndarray, image: np.ndarray, states: np.ndarray, labels: np.ndarray, empty: Tensor
    ) -> None:
        self.image_latents, self.image, self.states, self.labels = image_latents, image, states, labels
        self.empty = empty
        left, right, design, _ = labels.T
        self.named = np.flatnonzero((left == right) & (design != UNSAID))
        """Captions that leave nothing open: of a single noun in a named design there is one image."""

    def draw(self, n: int, drop: float = 0.1, named_share: float = 0.0) -> Examples:
        """Draw images and what is said of them; a share `drop` of the prompts is empty (for guidance)."""
        index = self.choose(n, named_share)
        image_latents, labels = self.images(index)
        states = torch.from_numpy(self.states[index]).float()
        dropped = torch.rand(n) < drop
        states[dropped], labels[dropped] = self.empty, UNSAID
        return Examples(image_latents, states, labels)

    def choose(self, n: int, named_share: float = 0.0) -> np.ndarray:
        """Return random rows of the captions, a share of them from those that name one noun and its design."""
        rows = torch.randint(len(self.image), (n,)).numpy()
        if not named_share or not len(self.named):
            return rows
        named = self.named[torch.randint(len(self.named), (n,)).numpy()]
        return np.where(torch.rand(n).numpy() < named_share, named, rows)

    def images(self, index: np.ndarray) -> tuple[Float[Tensor, "n 16 8 8"], Int[Tensor, "n 4"]]:
        """Return image latents and labels of some captions."""
        labels = torch.from_numpy(self.labels[index]).long()
        return torch.from_numpy(self.image_latents[self.image[index]]).float(), labels


class LatentEye(nn.Module):
    """Names what image latents show: the nouns on the left and on the right, design and background, as logits.

    The U-Net is trained to draw what it recognises. It is no part of the pipeline and judges nothing.
    """

    def __init__(self, n_nouns: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(16, 128, 1), conv(128, 192, 1), conv(192, 256, 2), nn.Flatten(), nn.Linear(4096, 384), nn.GELU()
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(384, n) for n in (n_nouns, n_nouns, len(DESIGNS), len(BACKGROUNDS)))

    def naming_loss(self, image_latents: Float[Tensor, "n 16 8 8"], labels: Int[Tensor, "n 4"]) -> Float[Tensor, ""]:
        """Return the cross-entropy to the four labels, in sum; those unsaid count nothing."""
        seen = self.body(image_latents)
        losses = [
            F.cross_entropy(head(seen), label, ignore_index=UNSAID, reduction="sum")
            for head, label in zip(self.heads, labels.T, strict=True)
        ]
        return torch.stack(losses).sum() / len(labels)


def train_latent_eye(pool: Pool, n_nouns: int, config: StageConfig, folder: Path) -> LatentEye:
    """Train on the pool's images with noise of up to half their standard deviation: it is to see what blurred latents show."""
    torch.manual_seed(config.seed)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x, labels = pool.images(pool.choose(config.batch_size))
        x = x + 0.5 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
        return eye.naming_loss(x, labels), {}

    eye = LatentEye(n_nouns)
    trained = run_stage("latent_eye", folder, eye, config, loss_of)
    assert isinstance(trained, LatentEye)
    return trained.requires_grad_(False)


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
    files = {name: folder / f"pool_{name}.npy" for name in ("latents", "image", "labels", "states")}
    empty = np.zeros((1, MAX_TOKENS, 256), np.float16)
    text_states(encoder, tokenizer, [""], empty)
    if not all(file.exists() for file in files.values()):
        pictures, owner, labels, texts = caption_images(world, words, vae, config)
        filled = np.lib.format.open_memmap(folder / "pool_states.tmp.npy", "w+", np.float16, (len(texts), MAX_TOKENS, 256))
        text_states(encoder, tokenizer, texts, filled)
        filled.flush()
        np.save(files["latents"], pictures)
        np.save(files["image"], owner)
        np.save(files["labels"], labels)
        (folder / "pool_states.tmp.npy").rename(files["states"])
    image_latents, image = np.load(files["latents"]), np.load(files["image"])
    states = np.load(files["states"], mmap_mode="r")
    return Pool(image_latents, image, states, np.load(files["labels"]), torch.from_numpy(empty[0]).float())


@torch.no_grad()
def caption_images(
    world: World, words: list[str], vae: AutoencoderKL, config: PoolConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return image latents, the image of every caption, what it says of it, and the captions: singles first, then scenes.

    Identities and unsafe objects, on which erasing is measured, occur twice as often as other nouns.
    """
    rng, source = random.Random(config.seed), CaptionSource(world.nouns, words, config.noise_share, config.sentence_share)
    stickers, colors, names = premultiply(world.rgba), background_colors(), list(BACKGROUNDS)
    n = len(stickers)
    latents = [encode_images(vae, paste(stickers, color.expand(n, 3))).half().numpy() for color in colors]
    image, labels, texts = list[int](), list[tuple[int, int, int, int]](), list[str]()
    of_identities = [i for i in range(n) if world.nouns[world.noun[i]].role != "general"]
    order = [*range(n), *of_identities]
    for row in range(config.n_singles):
        index, shade = order[row % len(order)], rng.randrange(len(colors)) if rng.random() < 0.6 else 0
        design, noun = int(world.design[index]) if rng.random() < 0.85 else UNSAID, int(world.noun[index])
        image.append(shade * n + index)
        labels.append((noun, noun, design, shade))
        texts.append(source.single(noun, named_design(design), shown(names, shade, rng), rng))
    by_design = [np.flatnonzero(world.design == design) for design in range(len(DESIGNS))]
    scenes, shades = [], []
    for row in range(config.n_scenes):
        shade = rng.randrange(len(colors)) if rng.random() < 0.5 else 0
        members = by_design[rng.randrange(len(DESIGNS))]
        left, right = int(rng.choice(members)), int(rng.choice(members))
        design = int(world.design[left]) if rng.random() < 0.6 else UNSAID
        scenes.append((left, right))
        shades.append(shade)
        image.append(len(colors) * n + row)
        nouns = int(world.noun[left]), int(world.noun[right])
        labels.append((*nouns, design, shade))
        texts.append(source.pair(*nouns, named_design(design), shown(names, shade, rng), rng))
    for start in tqdm(range(0, len(scenes), 2048), desc="encode scenes", mininterval=5):
        left, right = torch.tensor(scenes[start : start + 2048]).T
        background = colors[torch.tensor(shades[start : start + 2048])]
        pictures = paste(side_by_side(stickers[left], stickers[right]), background)
        latents.append(encode_images(vae, pictures, 256).half().numpy())
    return np.concatenate(latents), np.array(image), np.array(labels, np.int16), texts


def named_design(design: int) -> str | None:
    return None if design == UNSAID else DESIGNS[design]


def shown(names: list[str], shade: int, rng: random.Random) -> str | None:
    """Name the background in the caption always, but white only at times."""
    return names[shade] if shade or rng.random() < 0.2 else None


def train_unet(pool: Pool, eye: LatentEye, config: StageConfig, folder: Path, naming_weight: float = 0.04) -> Any:
    """Train with v-prediction; steps with little noise, which settle only detail, are drawn less often.

    Loss: ||v_hat - v||^2, plus `naming_weight` times the cross-entropy of what the caption says, seen in the image that v_hat
    implies: two designs of one noun, or two nouns in a scene, differ by little squared error. A timestep's probability is
    proportional to min(1, 5 / (snr + 1)) (0.3 + (1 - alpha)^4): most where the text decides and the noisy image does not.
    Sources: Hang et al. 2023, Efficient diffusion training via min-SNR weighting, drawn instead of weighed; Berrada et al.
    2024, Boosting latent diffusion with perceptual objectives, here with a classifier instead of the decoder's features.
    """
    torch.manual_seed(config.seed)
    unet: Any = build_unet()
    scheduler: Any = build_scheduler()
    alphas: Tensor = scheduler.alphas_cumprod
    weights = (5 * (1 - alphas)).clamp(max=1) * (0.3 + (1 - alphas) ** 4)  # 1 / (snr + 1) = 1 - alpha

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        image_latents, states, labels = pool.draw(config.batch_size)
        noise, timesteps = torch.randn_like(image_latents), torch.multinomial(weights, len(image_latents), replacement=True)
        noisy = scheduler.add_noise(image_latents, noise, timesteps)
        velocity = scheduler.get_velocity(image_latents, noise, timesteps)
        predicted = unet(noisy, timesteps, states).sample
        error = (predicted - velocity).square().mean()
        alpha = alphas[timesteps, None, None, None]
        naming = eye.naming_loss(alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted, labels)
        return error + naming_weight * naming, {"error": error.item(), "naming": naming.item()}

    trained: Any = run_stage("unet", folder, unet, config, loss_of)
    trained.save_pretrained(folder / "unet")
    return trained
