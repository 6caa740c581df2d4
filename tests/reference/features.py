"""Statistics and selection from dense codes, with sets and loops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from itd import SAE
from reference.kernels import dense_encode


def dense_codes(sae: SAE, x: Tensor) -> Tensor:
    return dense_encode(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.config.k)


def dense_maxima(sae: SAE, prompts: list[Tensor]) -> Tensor:
    """Return (prompts, n_latents): the largest act of every latent over a prompt's tokens."""
    return torch.stack([torch.cat([dense_codes(sae, x), torch.zeros(1, sae.config.n_latents)]).amax(0) for x in prompts])


def select_by_sets(sae: SAE, target: list[Tensor], retain: list[Tensor], k_sel: int) -> set[int]:
    """Return the paper's selection: the k_sel largest of any target prompt, without those of any retain prompt."""

    def union(prompts: list[Tensor]) -> set[int]:
        chosen: set[int] = set()
        for maxima in dense_maxima(sae, prompts):
            largest = sorted(range(len(maxima)), key=lambda j: -float(maxima[j]))[:k_sel]
            chosen |= {j for j in largest if maxima[j] > 0}
        return chosen

    return union(target) - union(retain)


def evidence_weights(sae: SAE, target: list[Tensor], retain: list[Tensor], n_features: int, eps: float) -> dict[int, float]:
    """Return the matched filter of a concept, latent by latent and prompt by prompt."""
    z_target, z_retain = (dense_maxima(sae, prompts).double() for prompts in (target, retain))
    variances, gaps = [], []
    for j in range(sae.config.n_latents):
        mean_target = sum(float(z[j]) for z in z_target) / len(z_target)
        mean_retain = sum(float(z[j]) for z in z_retain) / len(z_retain)
        variances.append(sum((float(z[j]) - mean_retain) ** 2 for z in z_retain) / len(z_retain))
        gaps.append(max(0.0, mean_target - mean_retain))
    raw = [gap / (variance + eps * max(variances)) for gap, variance in zip(gaps, variances, strict=True)]
    chosen = [j for j in sorted(range(len(raw)), key=lambda j: -raw[j])[:n_features] if raw[j] > 0]
    norm = sum(raw[j] ** 2 for j in chosen) ** 0.5
    return {j: raw[j] / norm for j in chosen}


def fisher_weights(sae: SAE, target: list[Tensor], retain: list[Tensor], n_features: int, shrinkage: float) -> dict[int, float]:
    """Return the shrunk discriminant of a concept, in double precision from dense maxima."""
    z_target, z_retain = (dense_maxima(sae, prompts).double().numpy() for prompts in (target, retain))
    gap, variance = z_target.mean(0) - z_retain.mean(0), z_retain.var(0)
    ratio = gap / np.sqrt(variance + 0.01 * variance.max())
    chosen = sorted(j for j in np.argsort(-ratio)[:n_features].tolist() if gap[j] > 0)
    covariance = np.atleast_2d(np.cov(z_retain[:, chosen].T))
    own = np.diag(covariance)
    weights = np.linalg.inv(covariance + shrinkage * (np.diag(own) + 0.1 * own.max() * np.eye(len(chosen)))) @ gap[chosen]
    return dict(zip(chosen, (weights / np.linalg.norm(weights)).tolist(), strict=True))
