"""SAELens: its top-k training class and trainer with their defaults.

Sparse activations, which it advises for a small k in fp32, fail in the backward pass on processors (`view` of a sparse tensor).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, System


class SAELens:
    """TopKTrainingSAE stepped by SAETrainer."""

    def __init__(self, problem: Problem, x: Tensor) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(0)
        config = TopKTrainingSAEConfig(d_in=problem.d_model, d_sae=problem.n_latents, k=problem.k, device="cpu")
        training = SAETrainerConfig(
            total_training_samples=problem.n_steps * problem.tokens,
            train_batch_size_samples=problem.tokens,
            lr_end=3e-5,
            lr_warm_up_steps=problem.warmup_steps,
        )
        self.sae: Any = TopKTrainingSAE(config)
        self.sae.b_dec.data = x[: problem.tokens].mean(0)
        self.trainer: Any = SAETrainer(training, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))


def make(problem: Problem, x: Tensor) -> System:
    return SAELens(problem, x)
