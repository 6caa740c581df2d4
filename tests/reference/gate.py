"""Scores of one prompt by loops over tokens and latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from itd import SAE, ConceptFeatures
from reference.features import dense_codes


def naive_evidence(sae: SAE, concept: ConceptFeatures, x: Tensor) -> float:
    """Sum inside a token, maximum over tokens."""
    best = -math.inf
    for codes in dense_codes(sae, x):
        total = 0.0
        for j, weight in zip(concept.indices.tolist(), concept.weights.tolist(), strict=True):
            total += weight * float(codes[j])
        best = max(best, concept.scale * total + concept.offset)
    return best


def naive_contribution(sae: SAE, concept: ConceptFeatures, x: Tensor) -> float:
    best = -math.inf
    for codes in dense_codes(sae, x):
        written = torch.zeros(sae.config.d_model)
        for j in concept.indices.tolist():
            written += codes[j] * sae.W_dec[j]
        best = max(best, float(written.norm()))
    return best


def paper_score(sae: SAE, features: set[int], x: Tensor, strength: float) -> float:
    """Return the paper's score: mean squared difference of the edited reconstruction and the activation."""
    codes = dense_codes(sae, x)
    for j in features:
        codes[:, j] *= strength
    return float((codes @ sae.W_dec + sae.b_dec - x).square().mean())


def naive_auroc(positives: Tensor, negatives: Tensor) -> float:
    wins = [(p > n) + 0.5 * (p == n) for p in positives.tolist() for n in negatives.tolist()]
    return sum(wins) / len(wins)
