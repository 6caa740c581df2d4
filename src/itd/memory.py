"""How much memory training and inference take, known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from itd.moments import MomentType, row_bytes
from itd.sae import SAEConfig, available_memory
from itd.screening import screening_pays

Screening = Literal["auto", "always", "never"]
TILE = 3 * 4 * 2**20
"""A tile of pre-activations and what is computed from it at a time."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part: what grows with the number of latents, and what does not."""

    per_latent: dict[str, int]
    fixed: dict[str, int]

    def total(self, n_latents: int) -> int:
        """Return the bytes that `n_latents` take."""
        return n_latents * sum(self.per_latent.values()) + sum(self.fixed.values())

    def largest(self, available: int) -> int:
        """Return the largest n_latents that fits."""
        return max(0, available - sum(self.fixed.values())) // sum(self.per_latent.values())

    def require(self, n_latents: int, available: int, n_parts: int = 1) -> None:
        """Raise ValueError if a part of `n_latents` does not fit, naming the largest number of which it does."""
        part = -(-n_latents // n_parts)
        if self.total(part) > available:
            where = "" if n_parts == 1 else f" for each of {n_parts} parts"
            raise ValueError(
                f"n_latents = {n_latents} needs {self.total(part) / 1e9:.1f} GB{where}, "
                f"{available / 1e9:.1f} GB are available: "
                f"the largest n_latents that fits is {n_parts * self.largest(available)}"
            )


def selection_bytes(n_tokens: int, k: int) -> int:
    """Return the bytes of the candidates for the k largest: up to 8 k values and indices a token, twice while sorted."""
    return n_tokens * 8 * k * (4 + 8) * 2


def training_memory(
    d_model: int,
    k: int,
    batch_tokens: int,
    k_aux: int,
    moments: MomentType,
    screen: Screening = "auto",
    device: torch.device | None = None,
) -> MemoryEstimate:
    """Estimate the peak of a training run, without the activations it learns from.

    Per latent: two rows and a bias in fp32, two moments of each, with screening an encoder row in bfloat16, two counters.
    """
    screened = screen == "always" or (screen == "auto" and screening_pays(device or torch.device("cpu")))
    per_latent = {
        "weights": 4 * (2 * d_model + 1),
        "moments": 2 * (2 * row_bytes(d_model, moments) + 4),
        "screen": 2 * (d_model + 2) + 8 if screened else 0,
        "counters": 2 * 8 + 1,
    }
    pairs = batch_tokens * (k + k_aux)
    fixed = {
        "selection": selection_bytes(batch_tokens, k + k_aux) + TILE,
        "batch": 4 * d_model * batch_tokens * 8 + 8 * 6 * pairs,
        "metric": 3 * 4 * d_model**2,
        "start": 4 * d_model * 4096 * 6,
    }
    return MemoryEstimate(per_latent, fixed)


def inference_memory(d_model: int, k: int, n_tokens: int) -> MemoryEstimate:
    """Estimate what an autoencoder takes that encodes and decodes `n_tokens` at a time."""
    fixed = {"selection": selection_bytes(n_tokens, k) + TILE, "batch": 4 * d_model * n_tokens * 3}
    return MemoryEstimate({"weights": 4 * (2 * d_model + 1)}, fixed)


@dataclass(frozen=True)
class MemoryConfig:
    """What besides an autoencoder's size decides how much memory its training takes."""

    batch_tokens: int = 1024
    """Activations per step."""
    k_aux: int = 256
    """Dead latents that reconstruct the residual."""
    moments: MomentType = "float32"
    """How Adam's moments are stored."""
    screen: Screening = "auto"
    """Whether the encoder runs in bfloat16 first."""

    def estimate(self, size: SAEConfig) -> dict[str, MemoryEstimate]:
        """Return the estimates for training, and for inference with one prompt of 77 tokens."""
        training = training_memory(size.d_model, size.k, self.batch_tokens, self.k_aux, self.moments, self.screen)
        return {"training": training, "inference": inference_memory(size.d_model, size.k, 77)}


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that can be allocated on a device now; without one, in the machine's memory."""
    if device is None:
        return available_memory()
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
