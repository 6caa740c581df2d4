"""Edits of one prompt, token by token and feature by feature."""

from __future__ import annotations

import torch
from torch import Tensor

from itd import SAE
from reference.features import dense_codes


def paper_edit(sae: SAE, features: set[int], x: Tensor, strength: float) -> Tensor:
    """Multiply the acts of the features; the edited reconstruction replaces the activation."""
    codes = dense_codes(sae, x)
    for j in features:
        codes[:, j] *= strength
    return codes @ sae.W_dec + sae.b_dec


def error_kept_edit(sae: SAE, features: set[int], x: Tensor, strength: float) -> Tensor:
    """Multiply what the features write; all else, the autoencoder's error too, stays."""
    codes, edited = dense_codes(sae, x), x.clone()
    for token in range(len(x)):
        for j in features:
            edited[token] += (strength - 1) * codes[token, j] * sae.W_dec[j]
    return edited


def replace_edit(
    sae: SAE, features: set[int], x: Tensor, strength: float, names_it: list[int], end: int, anchors: Tensor
) -> Tensor:
    """Put the first anchor at the tokens that name the concept and the second from the prompt's end on."""
    edited = error_kept_edit(sae, features, x, strength)
    for position in range(len(x)):
        if position in names_it:
            edited[position] = anchors[0]
        if position >= end:
            edited[position] = anchors[1]
    return edited


def naive_edit(sae: SAE, mode: str, features: set[int], x: Tensor, strength: float) -> Tensor:
    if mode == "scale":
        return paper_edit(sae, features, x, strength)
    return error_kept_edit(sae, features, x, 0.0 if mode == "remove" else strength)


def keep_begin(edited: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x[:1], edited[1:]])
