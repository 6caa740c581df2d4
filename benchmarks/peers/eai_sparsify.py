"""EleutherAI's sparsify with its default optimiser, Triton off: the loop of its `Trainer.fit` for one hook point."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.problem import Problem, System


class Sparsify:
    """SparseCoder with a fused encoder and an embedding bag as decoder."""

    def __init__(self, problem: Problem, x: Tensor, optimizer: str) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(0)
        config = SparseCoderConfig(num_latents=problem.n_latents, k=problem.k)
        self.sae: Any = SparseCoder(problem.d_model, config, dtype=torch.float32)
        self.sae.b_dec.data = x[: problem.tokens].mean(0)
        self.optimizer, self.scheduler = self.make_optimizer(problem, optimizer)
        self.idle = torch.zeros(problem.n_latents, dtype=torch.long)

    def make_optimizer(self, problem: Problem, name: str) -> tuple[Any, Any]:
        """Make the optimiser as the library does, with the learning rates that it chooses by the number of latents."""
        scale = (problem.n_latents / 2**14) ** 0.5
        if name == "adam":
            optimizer: Any = torch.optim.Adam(self.sae.parameters(), lr=2e-4 / scale)
            return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, problem.warmup_steps)
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=5e-3 / scale), momentum=0.95)
        optimizer.train()
        return optimizer, None

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x)
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.idle += len(x)
        self.idle[out.latent_indices.flatten()] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out


def make(problem: Problem, x: Tensor) -> System:
    return Sparsify(problem, x, "signum")
