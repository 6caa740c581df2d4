"""How well pictures fit their prompts, and how far two pictures are apart: CLIP score, perceptual distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def clip_score(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return 100 max(0, cos(image, text)) per picture, on embeddings of one CLIP; 0 to 100.

    Source: Hessel et al. 2021, CLIPScore, equation 1, with the weight 100 that erasing papers use instead of 2.5.

    Raises:
        ValueError: other shapes.
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"a CLIP score needs one text per image, got {tuple(image.shape)} and {tuple(text.shape)}")
    return 100 * F.cosine_similarity(image.float(), text.float()).clamp_min(0)


def perceptual_distance(
    a: Sequence[Float[Tensor, "n channels height width"]], b: Sequence[Float[Tensor, "n channels height width"]]
) -> Float[Tensor, " n"]:
    """Return the distance of two pictures in the feature maps of a network: 0 for the same picture.

    sum over layers of the mean over places of |u - v|^2, u and v of unit length over channels.

    Source: Zhang et al. 2018, The unreasonable effectiveness of deep features, equation 1, with w = 1 (no learned weights).

    Raises:
        ValueError: other layers or shapes on one side.
    """
    shapes = [[tuple(layer.shape) for layer in side] for side in (a, b)]
    if not a or shapes[0] != shapes[1]:
        raise ValueError(f"both pictures need the same feature maps, got {shapes[0]} and {shapes[1]}")
    total = a[0].new_zeros(len(a[0]))
    for u, v in zip(a, b, strict=True):
        gap = F.normalize(u, dim=1, eps=1e-10) - F.normalize(v, dim=1, eps=1e-10)
        total = total + gap.square().sum(1).mean((1, 2))
    return total
