"""The multiplication of the encoder and nothing else: what a step cannot do without in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, System

TILE = 4096


class Multiplication:
    """x @ W_enc.T in tiles that stay in the cache; the products are thrown away."""

    def __init__(self, problem: Problem) -> None:
        self.W_enc = torch.randn(problem.n_latents, problem.d_model)
        self.out = torch.empty(min(TILE, problem.n_latents), problem.tokens)

    def step(self, x: Tensor) -> None:
        for rows in self.W_enc.split(TILE):
            torch.mm(rows, x.T, out=self.out[: len(rows)])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct nothing: the fraction of variance unexplained means nothing here."""
        return torch.full_like(x, torch.nan)


def make(problem: Problem, x: Tensor) -> System:
    return Multiplication(problem)
