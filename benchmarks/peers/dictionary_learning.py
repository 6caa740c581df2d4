"""dictionary_learning: its top-k trainer as it comes. The package's `__init__` needs nnsight, its trainers do not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.problem import Problem, System, import_without_init


class DictionaryLearning:
    """TopKTrainer with its own learning rate, AuxK and clipping."""

    def __init__(self, problem: Problem) -> None:
        top_k: Any = import_without_init("dictionary_learning", "trainers.top_k")
        self.trainer = top_k.TopKTrainer(
            steps=problem.n_steps + problem.warmup_steps,
            activation_dim=problem.d_model,
            dict_size=problem.n_latents,
            k=problem.k,
            layer=0,
            lm_name="none",
            warmup_steps=problem.warmup_steps,
            seed=0,
            device="cpu",
        )
        self.n_steps = 0

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


def make(problem: Problem, x: Tensor) -> System:
    return DictionaryLearning(problem)
