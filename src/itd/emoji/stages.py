"""One resumable training loop for every network of the embedded world."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageConfig:
    """How one network is trained."""

    steps: int
    """Optimiser steps in all."""
    batch_size: int
    lr: float = 1e-3
    """Peak learning rate; linear warm-up, then a cosine to 1 % of it."""
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.0
    """Decay of the weights' exponential moving average, which is what is kept; 0 keeps the weights themselves."""
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 250
    """Steps between checkpoints."""


def learning_rate(config: StageConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, cosine decay to 1 %."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    progress = step / config.steps
    return config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def run_stage(
    name: str,
    folder: Path,
    model: nn.Module,
    config: StageConfig,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    average: nn.Module | None = None,
) -> nn.Module:
    """Train `model` on `loss_of(step)` and return it (its average where `ema_decay` is set), in eval mode.

    `average`: a copy of `model` to keep the average in, for a loss that looks at it.
    Every step seeds torch with its own number, so a run that was stopped at any step and resumed ends with the same weights.
    """
    if average is None:
        average = copy.deepcopy(model) if config.ema_decay else model
    parameters, averaged = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.checkpoint.safetensors"
    start, seconds = load_checkpoint(checkpoint, model, average, optimizer) if checkpoint.exists() else (0, 0.0)
    began = time.monotonic() - seconds
    model.train()
    progress = tqdm(range(start, config.steps), desc=name, initial=start, total=config.steps, mininterval=5)
    for step in progress:
        torch.manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, logs = loss_of(step)
        if not loss.isfinite():
            raise RuntimeError(f"{name}: the loss is {loss.item()} at step {step}; lower lr or resume from {checkpoint}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        if config.ema_decay:
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for mine, its in zip(averaged, parameters, strict=True):
                    mine.lerp_(its, 1 - decay)
                for mine, its in zip(average.buffers(), model.buffers(), strict=True):
                    mine.copy_(its)
        if step % 20 == 0:
            progress.set_postfix({"loss": f"{loss.item():.4f}", **{key: f"{value:.4f}" for key, value in logs.items()}})
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_checkpoint(checkpoint, model, average, optimizer, step + 1, time.monotonic() - began)
    (folder / f"{name}.json").write_text(json.dumps({"steps": config.steps, "seconds": round(time.monotonic() - began)}))
    return average.eval()


def save_checkpoint(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write model, average and optimiser state beside `path`, then rename."""
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    if average is not model:
        tensors |= {f"average/{key}": value for key, value in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    unique = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(unique, temporary, metadata={"step": str(step), "seconds": str(seconds)})
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore what `save_checkpoint` wrote; return the step to go on with and the seconds spent so far."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for key, value in tensors.items():
        group, name = key.split("/", 1)
        groups[group][name] = value
    model.load_state_dict(groups["model"])
    if average is not model:
        average.load_state_dict(groups["average"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in groups["optimizer"].items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    logger.info("resume %s at step %s", path.name, metadata["step"])
    return int(metadata["step"]), float(metadata["seconds"])
