"""Overcomplete: its top-k autoencoder and training function as its README shows them.

The package's `__init__` loads vision models, which need torchvision; its autoencoders do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, System, import_without_init


def mean_squared_error(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


class Overcomplete:
    """TopKSAE with a linear encoder and batch normalisation, Adam."""

    def __init__(self, problem: Problem) -> None:
        self.library: Any = import_without_init("overcomplete", "sae")
        torch.manual_seed(0)
        self.sae: Any = self.library.TopKSAE(problem.d_model, nb_concepts=problem.n_latents, top_k=problem.k, device="cpu")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=5e-4)

    def step(self, x: Tensor) -> None:
        self.library.train_sae(self.sae, [x], mean_squared_error, self.optimizer, nb_epochs=1, monitoring=0, device="cpu")

    def reconstruct(self, x: Tensor) -> Tensor:
        self.sae.eval()
        return self.sae(x)[2]


def make(problem: Problem, x: Tensor) -> System:
    return Overcomplete(problem)
