"""Training with dense tensors: the loss for autograd, Adam on every parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.kernels import dense_decode, dense_encode, dense_reconstruction

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def squared(error: Tensor, metric: Tensor | None) -> Tensor:
    """Return the mean squared error, in the given metric."""
    return (
        error.square().mean() if metric is None else torch.einsum("ni,ij,nj->n", error, metric, error).mean() / error.shape[1]
    )


def dense_loss(x: Tensor, weights: dict[str, Tensor], k: int, variance: float, metric: Tensor | None = None) -> Tensor:
    """Return the normalised MSE: the error of the reconstruction in units of the variance of all activations."""
    return squared(dense_reconstruction(x, weights, k) - x, metric) / variance


def dense_aux_loss(
    x: Tensor, weights: dict[str, Tensor], k: int, dead: Tensor, k_aux: int, metric: Tensor | None = None
) -> Tensor:
    """Return the normalised MSE with which the dead latents reconstruct the residual."""
    missing = (x - dense_reconstruction(x, weights, k)).detach()
    W_enc, b_enc, W_dec = (weights[name][dead] for name in ("W_enc", "b_enc", "W_dec"))
    codes = dense_encode(x, W_enc, b_enc, weights["b_dec"].detach(), min(k_aux, int(dead.sum())))
    return squared(dense_decode(codes, W_dec) - missing, metric) / squared(missing, metric)


class DenseAdam:
    """Kingma and Ba, algorithm 1, on all rows. Decoder rows move along the sphere and stay of unit norm."""

    def __init__(self, weights: dict[str, Tensor], rates: dict[str, float]) -> None:
        self.rates = rates
        self.weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.n_steps = 0

    def step(self, loss: Tensor, lr: float) -> None:
        beta1, beta2, epsilon = 0.9, 0.999, 6.25e-10
        gradients = dict(zip(PARAMETERS, torch.autograd.grad(loss, [self.weights[n] for n in PARAMETERS]), strict=True))
        rows = self.weights["W_dec"].detach()
        gradients["W_dec"] = gradients["W_dec"] - (gradients["W_dec"] * rows).sum(1, keepdim=True) * rows
        self.n_steps += 1
        for name in PARAMETERS:
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradients[name]
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradients[name] ** 2
            first = self.first[name] / (1 - beta1**self.n_steps)
            second = self.second[name] / (1 - beta2**self.n_steps)
            self.weights[name].data -= lr * self.rates[name] * first / (second.sqrt() + epsilon)
        self.weights["W_dec"].data /= self.weights["W_dec"].data.norm(dim=1, keepdim=True)
