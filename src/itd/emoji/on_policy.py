"""Train the U-Net on what it meets when it samples: its own trajectories, with the image that the caption means as the target.

A U-Net trained on noised images only has never seen its own blurred guesses, takes them for signal, and loses on the way what
its first step knew: exposure bias. Here half of every batch are points of trajectories that the U-Net's average has sampled.

Sources: Ross et al. 2011, A reduction of imitation learning to no-regret online learning (label the states the learner visits);
Ning et al. 2024, Elucidating the exposure bias in diffusion models.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from itd.emoji.data import UNSAID, World
from itd.emoji.images import background_colors, paste, premultiply, side_by_side
from itd.emoji.stages import StageConfig, run_stage
from itd.emoji.unet import LatentEye, Pool, build_scheduler
from itd.emoji.vae import encode_images

SAMPLER_STEPS, ROLLOUT_STEPS = 25, 16
"""Steps of the sampler, and how many of them a trajectory is followed: later ones settle only detail."""
STEPS_PER_ROLLOUT = 2 * (ROLLOUT_STEPS - 1)
"""Optimiser steps that the points of one rollout last: it has a batch's number of trajectories, and fills half a batch."""
NAMED_SHARE = 0.12
"""Captions that are drawn from those of one noun in a named design: what the first step is to know by heart."""


@dataclass(frozen=True)
class LossWeights:
    """What counts beside the squared error."""

    perceptual: float = 0.2
    naming: float = 0.04


class Points(NamedTuple):
    """Noisy image latents, and the image that they should become."""

    noisy: Float[Tensor, "n 16 8 8"]
    timesteps: Int[Tensor, " n"]
    states: Float[Tensor, "n tokens 256"]
    labels: Int[Tensor, "n 4"]
    image_latents: Float[Tensor, "n 16 8 8"]


class Targets:
    """The image that a caption means: the pool's, or, where the design is left open, the one nearest to a guess."""

    def __init__(self, world: World, pool: Pool, vae: Any) -> None:
        self.pool, self.vae = pool, vae
        self.stickers, self.colors = premultiply(world.rgba), background_colors()
        self.drawn = np.full((len(world.nouns), int(world.design.max()) + 1), -1)
        """The image of a noun in a design, or -1."""
        self.drawn[world.noun, world.design] = np.arange(len(world.noun))

    def nearest(self, index: np.ndarray, guess: Float[Tensor, "n 16 8 8"]) -> Float[Tensor, "n 16 8 8"]:
        """Return one target per caption; a guess that is halfway to a design is held to that one."""
        targets, labels = self.pool.images(index)
        for row in np.flatnonzero(labels[:, 2].numpy() == UNSAID):
            left, right, _, shade = labels[row].tolist()
            members = self.drawn[[left, right]]
            members = members[:, (members >= 0).all(0)]
            single = self.pool.image[index[row]] < len(self.colors) * len(self.stickers)
            candidates = self.singles(members[0], shade) if single else self.scenes(members, shade)
            if len(candidates):
                targets[row] = candidates[(candidates - guess[row]).square().mean((1, 2, 3)).argmin()]
        return targets

    def singles(self, members: np.ndarray, shade: int) -> Float[Tensor, "n 16 8 8"]:
        return torch.from_numpy(self.pool.image_latents[shade * len(self.stickers) + members]).float()

    def scenes(self, members: np.ndarray, shade: int) -> Float[Tensor, "n 16 8 8"]:
        left, right = self.stickers[members[0]], self.stickers[members[1]]
        return encode_images(self.vae, paste(side_by_side(left, right), self.colors[[shade] * len(left)]))


@torch.no_grad()
def roll_out(unet: Any, pool: Pool, targets: Targets, n: int, guidance_scales: tuple[float, float] = (1.5, 4.5)) -> Points:
    """Sample `n` trajectories, each with its own guidance, and return their points, pure noise left out, in random order."""
    scheduler: Any = build_scheduler()
    scheduler.set_timesteps(SAMPLER_STEPS)
    index = pool.choose(n, NAMED_SHARE)
    states = torch.from_numpy(pool.states[index]).float()
    both = torch.cat([pool.empty.expand_as(states), states])
    low, high = guidance_scales
    guidance = low + (high - low) * torch.rand(n, 1, 1, 1)
    x = torch.randn(n, *pool.image_latents.shape[1:])
    points, guess = [], x
    for t in scheduler.timesteps[:ROLLOUT_STEPS]:
        points.append((x, t.expand(n)))
        plain, prompted = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        step = scheduler.step(plain + guidance * (prompted - plain), t, x)
        x, guess = step.prev_sample, step.pred_original_sample
    followed = points[1:]
    order = torch.randperm(len(followed) * n)

    def each(rows: Tensor) -> Tensor:
        return torch.cat([rows] * len(followed))[order]

    noisy, timesteps = (torch.cat(rows)[order] for rows in zip(*followed, strict=True))
    labels = pool.images(index)[1]
    return Points(noisy, timesteps, each(states), each(labels), each(targets.nearest(index, guess)))


def perceptual_distance(
    eye: LatentEye, guess: Float[Tensor, "n 16 8 8"], image_latents: Float[Tensor, "n 16 8 8"]
) -> Float[Tensor, " n"]:
    """Return the squared distance of unit features behind each convolution of the eye, in sum.

    Source: Kang et al. 2024, Distilling diffusion models into conditional GANs (LPIPS on latents).
    """
    distance = torch.zeros(len(guess))
    for layer in (eye.body[0], eye.body[1], eye.body[2]):
        guess, image_latents = layer(guess), layer(image_latents)
        apart = F.normalize(guess, dim=1) - F.normalize(image_latents, dim=1)
        distance = distance + apart.square().sum(1).mean((1, 2))
    return distance


def train_on_policy(
    world: World,
    pool: Pool,
    eye: LatentEye,
    vae: Any,
    unet: Any,
    config: StageConfig,
    folder: Path,
    share: LossWeights = LossWeights(),
) -> Any:
    """Train on; half of a batch are noised images, half points of own trajectories.

    Loss: the squared error of v on noised images and of the image on trajectories, plus the distance in the eye's features,
    which counts the more the noisier the point, plus the eye's naming loss.

    Raises:
        ValueError: checkpoints would fall between two rollouts, and a resumed run would end otherwise than a whole one.
    """
    if config.save_every % STEPS_PER_ROLLOUT:
        raise ValueError(f"save_every={config.save_every} must be a multiple of {STEPS_PER_ROLLOUT}, the steps of one rollout")
    torch.manual_seed(config.seed)
    scheduler: Any = build_scheduler()
    alphas: Tensor = scheduler.alphas_cumprod
    weights = (5 * (1 - alphas)).clamp(max=1) * (0.15 + (1 - alphas) ** 6)
    targets, average, half = Targets(world, pool, vae), copy.deepcopy(unet), config.batch_size // 2
    rollout: Points | None = None

    def draw(step: int) -> Points:
        nonlocal rollout
        if rollout is None or step % STEPS_PER_ROLLOUT == 0:
            rollout = roll_out(average, pool, targets, 2 * half)
        at = step % STEPS_PER_ROLLOUT * half
        image_latents, states, labels = pool.draw(half, named_share=NAMED_SHARE)
        timesteps = torch.multinomial(weights, half, replacement=True)
        noisy = scheduler.add_noise(image_latents, torch.randn_like(image_latents), timesteps)
        fresh = Points(noisy, timesteps, states, labels, image_latents)
        return Points(*(torch.cat([a, b[at : at + half]]) for a, b in zip(fresh, rollout, strict=True)))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        noisy, timesteps, states, labels, image_latents = draw(step)
        alpha = alphas[timesteps, None, None, None]
        guess = alpha.sqrt() * noisy - (1 - alpha).sqrt() * unet(noisy, timesteps, states).sample
        error = (guess - image_latents).square().mean((1, 2, 3))
        hazy = 1 - alpha[:, 0, 0, 0]
        of_velocity, own = (error / hazy.clamp_min(1e-3))[:half], error[half:]
        blur = (0.2 + 0.4 * torch.rand(len(guess), 1, 1, 1)) * torch.randn_like(guess)
        perceptual = (hazy * perceptual_distance(eye, guess + blur, image_latents + blur)).mean()
        naming = eye.naming_loss(guess, labels)
        loss = torch.cat([of_velocity, own]).mean() + share.perceptual * perceptual + share.naming * naming
        logs = {"fresh": error[:half].mean(), "own": own.mean(), "perceptual": perceptual, "naming": naming}
        return loss, {name: value.item() for name, value in logs.items()}

    trained: Any = run_stage("unet_on_policy", folder, unet, config, loss_of, average)
    trained.save_pretrained(folder / "unet_on_policy")
    return trained
