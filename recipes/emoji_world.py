"""Build the embedded world that ships in models/emoji.

Run:       python -m recipes.emoji_world            (all stages; resumable)
Needs:     npm for the sources, pip install 'itd[emoji]'
Expected:  see models/emoji/README.md, which the recipe writes: accuracies, hardware and time

The shipped weights took the same steps in several runs: the U-Net's first 4,200 were taken with an earlier text tower and
weighed errors instead of drawing timesteps, its next 4,000 with fewer scenes and the squared error only. Its next 4,000 began
anew from half-precision weights at a rate of 5e-4, the first 1,600 of them with half the naming weight, with a schedule for
4,800 steps that was shortened at step 1,800, and captions with noise_share=0.12. Its last 3,600 began so once more, at the same
rate, with PoolConfig(seed=1) and a latent classifier trained on that. The judge's first 600 gave the design half the weight,
its last 800 began anew from half-precision weights at a rate of 1.5e-3, with stains on its pictures. The text tower's
schedule was shortened at step 500, and the vision tower's was prolonged at step 300.
"""

from __future__ import annotations

import logging

import torch

from itd.emoji.build import WorldConfig, build_world
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
    pool=PoolConfig(),
    sae=SAEConfig(d_model=256, n_latents=10_240, k=32),
    sae_training=TrainConfig(n_tokens=500_000),
)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(max(1, torch.get_num_threads()))
    build_world(WORLD)
