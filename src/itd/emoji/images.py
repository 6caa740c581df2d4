"""Compose renders on backgrounds and into two-noun scenes, as tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from itd.emoji.data import BACKGROUNDS


def background_colors() -> Float[Tensor, "backgrounds 3"]:
    """Return the named background colours, in [0, 1]."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def premultiply(rgba: UInt8[np.ndarray, "n h w 4"]) -> Float[Tensor, "n 4 h w"]:
    """Return colours multiplied by alpha, and alpha, in [0, 1]: the form that may be resized and pasted."""
    x = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255
    return torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)


def paste(stickers: Float[Tensor, "n 4 h w"], colors: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 h w"]:
    """Lay stickers on plain colours; the result is in [-1, 1]."""
    return (stickers[:, :3] + colors[:, :, None, None] * (1 - stickers[:, 3:])) * 2 - 1


def side_by_side(left: Float[Tensor, "n 4 64 64"], right: Float[Tensor, "n 4 64 64"]) -> Float[Tensor, "n 4 64 64"]:
    """Set two stickers beside each other at half size, vertically centred."""
    scene = torch.zeros_like(left)
    scene[:, :, 16:48, :32] = F.avg_pool2d(left, 2)
    scene[:, :, 16:48, 32:] = F.avg_pool2d(right, 2)
    return scene


def split_scene(images: Float[Tensor, "n 3 64 64"]) -> tuple[Float[Tensor, "n 3 64 64"], Float[Tensor, "n 3 64 64"]]:
    """Cut a scene into its left and right object, each brought to full size."""
    left, right = images[:, :, 16:48, :32], images[:, :, 16:48, 32:]
    return (
        F.interpolate(left, scale_factor=2.0, mode="bilinear", align_corners=False),
        F.interpolate(right, scale_factor=2.0, mode="bilinear", align_corners=False),
    )


def pick(n: int, high: int) -> Int[Tensor, " n"]:
    """Draw n whole numbers below `high` from torch's generator."""
    return torch.randint(high, (n,))
