"""What numbers depend on: which weights, which scheduler, which eraser."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from itd.artifacts import tensors_sha256
from itd.eraser import Eraser


def weights_sha256(module: nn.Module) -> str:
    """Return one hash for all parameters and buffers of a network."""
    return tensors_sha256(module.state_dict())


def pipeline_record(pipe: Any) -> dict[str, Any]:
    """Return what pictures depend on: the weights' hash of every network, and the scheduler."""
    parts: dict[str, Any] = getattr(pipe, "components", {})
    networks = {name: weights_sha256(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    scheduler = parts.get("scheduler")
    named = None if scheduler is None else {"name": type(scheduler).__name__, **public(dict(scheduler.config))}
    return {"pipeline": type(pipe).__name__, "weights_sha256": networks, "scheduler": named}


def eraser_record(eraser: Eraser) -> dict[str, Any]:
    """Return which eraser it is, what it erases and how, and what it was made from."""
    return {
        "sha256": eraser.sha256, "sae_sha256": eraser.sae.sha256, "concepts": list(eraser.names),
        "hook_point": str(eraser.hook_point), "gate": eraser.gate.to_dict(), "edit": asdict(eraser.edit),
        "more_gates": list(eraser.more_gates), "made_from": list(eraser.records),
    }  # fmt: skip


def public(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and isinstance(value, int | float | str)}
