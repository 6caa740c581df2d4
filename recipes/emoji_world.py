"""Build the embedded world that ships in models/emoji.

Run:       python -m recipes.emoji_world            (all stages; resumable)
           python -m recipes.emoji_world --renders  (the designs' pictures alone: what `itd evaluate general --renders` wants)
           python -m recipes.emoji_world --quick    (two steps a stage below runs/quick, nothing measured: does it run?)
Needs:     npm for the sources, pip install 'itd[emoji]'
Expected:  see models/emoji/README.md, which the recipe writes: accuracies, hardware and time

The shipped weights took the same steps in several runs: the U-Net's first 4,200 were taken with an earlier text tower and
weighed errors instead of drawing timesteps, its next 4,000 with fewer scenes and the squared error only. Its next 4,000 began
anew from half-precision weights at a rate of 5e-4, the first 1,600 of them with half the naming weight, with a schedule for
4,800 steps that was shortened at step 1,800, and captions with noise_share=0.12. Its last 3,600 began so once more, at the
same rate, with PoolConfig(seed=1) and a latent classifier trained on that. Between `unet` and `unet_on_policy` they took
1,900 steps with the losses of the latter and against a critic of image latents, on noised images only, which made generations
no better and is left out here, and 400 steps on trajectories without the captions that leave the design open; the schedule
was shortened at step 1,440. The steps of `unet_on_policy` were taken in five runs, each with a schedule of its own and from
half-precision weights: 2,160 and 2,400 that drew all captions alike; 1,260 with NAMED_SHARE=0.6 and 1,200 with 0.3, at a peak
rate of 5e-4 and 4e-4, with timesteps weighed by 0.05 + (1 - alpha)^24, which draw designs better and scenes worse; and 1,320
as the code has it, at 4e-4, with PoolConfig(20_000, 27_000, seed=3). Before the last there were no sentences in the captions,
and the pool was PoolConfig(22_000, 30_000, seed=2) from the second on, whose latent classifier they all had. The weights are
a mean: 33 % of those after the second run, 11 % after the third and 11 % after the fourth, which began from a mean of the
second's and the third's, and 45 % after the last, which began from 60 %, 20 % and 20 % of the second's to the fourth's. The
judge's first 600 gave the design half the weight, its last 800 began anew from half-precision weights at a rate of 1.5e-3,
with stains on its pictures. The text tower's schedule was shortened at step 500, and the vision tower's was prolonged at step
300.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import tyro

from itd.emoji.build import WorldConfig, build_world, fetch_world, few_steps
from itd.emoji.stages import StageConfig
from itd.emoji.unet import PoolConfig
from itd.sae import SAEConfig
from itd.training import TrainConfig

WORLD = WorldConfig(
    vae=StageConfig(steps=2800, batch_size=32, lr=2e-3, warmup=50, weight_decay=0.0),
    decoder=StageConfig(steps=1000, batch_size=32, lr=1e-3, warmup=50, weight_decay=0.0),
    eye=StageConfig(steps=500, batch_size=128, lr=2e-3, warmup=50, weight_decay=0.02),
    clip=StageConfig(steps=900, batch_size=128, lr=5e-4, weight_decay=0.1, betas=(0.9, 0.98)),
    vision=StageConfig(steps=700, batch_size=128, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98)),
    judge=StageConfig(steps=2000, batch_size=128, lr=2e-3, weight_decay=0.02, ema_decay=0.99),
    latent_eye=StageConfig(steps=1500, batch_size=256, lr=1e-3, weight_decay=0.05),
    unet=StageConfig(steps=15_800, batch_size=64, lr=7e-4, warmup=200, weight_decay=0.01, ema_decay=0.998),
    unet_on_policy=StageConfig(steps=8340, batch_size=64, lr=3e-4, weight_decay=0.01, ema_decay=0.997, save_every=240),
    pool=PoolConfig(),
    sae=SAEConfig(d_model=256, n_latents=10_240, k=64),
    sae_training=TrainConfig(),
)


def main(quick: bool = False, renders: bool = False) -> None:
    """Build the embedded world, or only render its designs."""
    if renders:
        fetch_world(WORLD)
        logging.info("renders: %s", WORLD.work / "world")
    elif quick:
        build_world(few_steps(WORLD, Path("runs/quick/work"), Path("runs/quick/model")), measured=False)
    else:
        build_world(WORLD)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(max(1, torch.get_num_threads()))
    tyro.cli(main)
