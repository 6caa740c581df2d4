"""The early exit of one token by loops, in double precision and without rounding."""

from __future__ import annotations

from torch import Tensor

from itd import SAE, ConceptFeatures


def naive_bound(sae: SAE, concept: ConceptFeatures, often: list[int], x: Tensor) -> float:
    """Return the score if all features were active that `often` does not rule out."""
    centred = x.double() - sae.b_dec.double()

    def pre_act(j: int) -> float:
        return float(centred @ sae.W_enc[j].double() + sae.b_enc[j].double())

    largest = sorted((pre_act(j) for j in often), reverse=True)
    at_least = largest[sae.config.k - 1] if len(largest) >= sae.config.k else 0.0
    total = 0.0
    for j, weight in zip(concept.indices.tolist(), concept.weights.tolist(), strict=True):
        if pre_act(j) >= max(at_least, 0.0):
            total += max(0.0, concept.scale * weight) * pre_act(j)
    return total + concept.offset
