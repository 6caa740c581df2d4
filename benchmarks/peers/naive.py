"""The naive twin: dense codes, gradients by autograd, Adam on every parameter, as in the published code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.problem import Problem, System


class Dense:
    """A top-k autoencoder as it is written first."""

    def __init__(self, problem: Problem, x: Tensor) -> None:
        torch.manual_seed(0)
        self.k = problem.k
        rows = nn.functional.normalize(torch.randn(problem.n_latents, problem.d_model), dim=1)
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(problem.n_latents)), nn.Parameter(x[:4096].mean(0))
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4, eps=6.25e-10)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, 1.0, problem.warmup_steps)

    def reconstruct(self, x: Tensor) -> Tensor:
        pre_acts = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        acts, indices = pre_acts.topk(self.k, dim=1)
        codes = torch.zeros_like(pre_acts).scatter(1, indices, acts.relu())
        return codes @ self.W_dec + self.b_dec

    def step(self, x: Tensor) -> None:
        loss = (self.reconstruct(x) - x).square().mean() / (x - x.mean(0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert self.W_dec.grad is not None
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def make(problem: Problem, x: Tensor) -> System:
    return Dense(problem, x)
