"""`itd`'s trainer, with the loss that the others minimise; moments in 8 bits where they are large, else in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, System
from itd import ActivationStore, SAEConfig, TrainConfig
from itd.kernels import Group
from itd.moments import MomentType
from itd.training import Trainer

LARGE = 2**16
"""Latents from which moments in 8 bits are worth the time that rounding takes."""


class Fed(Trainer):
    """A trainer that is handed its batches."""

    def draw(self, step: int) -> Tensor:
        return self.batch

    def take(self, x: Tensor, step: int) -> None:
        self.batch = x
        self.step(step)


class Ours:
    """Screened encode, sparse gradients, Adam on touched rows."""

    def __init__(self, problem: Problem, x: Tensor, settings: TrainConfig) -> None:
        size = SAEConfig(problem.d_model, problem.n_latents, problem.k)
        self.trainer, self.n_steps = Fed(ActivationStore(x, torch.ones(len(x))), size, settings), 0
        # Memory of zeros is not resident until it is written. In a long run all of it is, so that it has to count.
        for moments in (*self.trainer.first.values(), *self.trainer.second.values()):
            moments.zero_()

    @torch.no_grad()
    def step(self, x: Tensor) -> None:
        self.trainer.take(x, self.n_steps)
        self.n_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        codes = self.trainer.encode(x, [Group(self.trainer.config.k)])[0]
        return self.trainer.decode(codes) + self.trainer.weights["b_dec"]


def settings_for(problem: Problem) -> TrainConfig:
    n_tokens = problem.n_steps * problem.tokens
    settings = TrainConfig(n_tokens=n_tokens, batch_tokens=problem.tokens, init="data")
    moments: MomentType = "int8" if problem.n_latents >= LARGE else "bfloat16"
    return replace(settings, lr=1e-2, warmup_steps=problem.warmup_steps, moments=moments)


def make(problem: Problem, x: Tensor) -> System:
    return Ours(problem, x, settings_for(problem))
