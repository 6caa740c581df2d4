"""How well an autoencoder keeps activations: unexplained variance, cosine, live latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from itd.sae import SAE


class Reconstruction(NamedTuple):
    """What an autoencoder keeps of some activations."""

    fvu: float
    """Fraction of variance unexplained; 0 is exact, 1 is the mean."""
    cosine: float
    """Mean cosine of the centred activation and its reconstruction."""
    l0: float
    """Mean number of active latents; at most k."""
    live_share: float
    """Share of the latents that were active at least once."""


@torch.no_grad()
def reconstruction_of(sae: SAE, x: Float[Tensor, "n d_model"], batch_size: int = 1024) -> Reconstruction:
    """Measure an autoencoder on activations that are not its training set, or say so.

    Raises:
        ValueError: fewer than two activations, or another d_model.
    """
    if len(x) < 2:
        raise ValueError(f"a reconstruction is measured on at least 2 activations, got {len(x)}")
    live = torch.zeros(sae.config.n_latents, dtype=torch.bool)
    errors = cosines = active = 0.0
    centre = x.mean(0)
    for batch in x.split(batch_size):
        codes = sae.encode(batch)
        x_hat = sae.decode(codes)
        errors += float((x_hat - batch).double().square().sum())
        cosines += float(F.cosine_similarity(x_hat - centre, batch - centre).double().sum())
        active += int((codes.acts > 0).sum())
        live[codes.indices[codes.acts > 0]] = True
    variance = float((x - centre).double().square().sum())
    return Reconstruction(errors / variance, cosines / len(x), active / len(x), float(live.double().mean()))
