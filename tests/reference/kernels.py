"""Dense top-k autoencoder: every latent of every token in memory, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """Return (n, n_latents) codes: the k largest pre-activations of each row, negative ones set to zero."""
    pre_acts = (x - b_dec) @ W_enc.T + b_enc
    smallest_kept = pre_acts.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(pre_acts >= smallest_kept, pre_acts, torch.zeros_like(pre_acts)).relu()


def dense_group_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, members: Tensor) -> Tensor:
    """Return (n, n_latents) codes of the k largest among the members; all else is zero."""
    codes = torch.zeros(len(x), len(W_enc), dtype=x.dtype)
    codes[:, members] = dense_encode(x, W_enc[members], b_enc[members], b_dec, k)
    return codes


def dense_decode(codes: Tensor, W_dec: Tensor) -> Tensor:
    return codes @ W_dec


def densify(acts: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """Write sparse codes (n, k) into a dense (n, n_latents)."""
    dense = torch.zeros(len(acts), n_latents, dtype=acts.dtype)
    for row in range(len(acts)):
        for act, index in zip(acts[row], indices[row], strict=True):
            dense[row, index] += act
    return dense


def dense_reconstruction(x: Tensor, weights: dict[str, Tensor], k: int) -> Tensor:
    """Reconstruct, so that autograd gives the gradient; `b_dec` learns by its use in the decoder only."""
    codes = dense_encode(x, weights["W_enc"], weights["b_enc"], weights["b_dec"].detach(), k)
    return dense_decode(codes, weights["W_dec"]) + weights["b_dec"]
