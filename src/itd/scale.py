"""Train one autoencoder with several processes, on one machine or many.

    torchrun --nproc-per-node 8 -m itd.scale --activations runs/acts --out runs/sae --split latents --n-latents 4194304

`split="tokens"`: every process holds all weights and encodes its part of the batch. What is exchanged are the codes, not
gradients: each process then makes the same update. `split="latents"`: every process holds its part of the rows, encodes the
whole batch against them, and the k largest of all are chosen from the k largest of each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from jaxtyping import Float
from torch import Tensor

from itd.activations import ActivationStore, read_tensor, write_tensors
from itd.kernels import Group, SparseCodes
from itd.sae import SAE, SAEConfig
from itd.training import CHECKPOINT, PARAMETERS, TrainConfig, Trainer, require_fit, run

Split = Literal["tokens", "latents"]


def gather_rows(x: Float[Tensor, "part any"], n: int) -> Float[Tensor, "n any"]:
    """Return the rows of all processes, which hold the parts that `tensor_split` makes of n rows."""
    n_processes = dist.get_world_size()
    sizes = [len(part) for part in torch.empty(n, 0).tensor_split(n_processes)]
    padded = torch.cat([x, x.new_zeros(sizes[0] - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(n_processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class TokenParallel(Trainer):
    """Every process encodes its part of the tokens and makes the same update of the same weights."""

    def encode(self, x: Float[Tensor, "n d_model"], groups: list[Group]) -> list[SparseCodes]:
        part = x.tensor_split(dist.get_world_size())[dist.get_rank()]
        codes = super().encode(part, groups)
        return [SparseCodes(gather_rows(each.acts, len(x)), gather_rows(each.indices, len(x))) for each in codes]

    def save(self, path: Path, step: int, seconds: float) -> None:
        """Write the state once, after making sure that it is everywhere the same.

        Raises:
            RuntimeError: the processes have come to different weights.
        """
        sums = torch.stack([self.weights[name].double().sum() for name in PARAMETERS])
        for other in gather_rows(sums[None], dist.get_world_size()):
            if not torch.equal(other, sums):
                raise RuntimeError(
                    "the processes hold different weights: their devices do not compute alike; use --split latents"
                )
        if dist.get_rank() == 0:
            super().save(path, step, seconds)
        dist.barrier()


class LatentParallel(Trainer):
    """Every process holds the latents of its `span`; a batch is encoded by all of them."""

    @property
    def span(self) -> tuple[int, int]:
        rank, n_processes = dist.get_rank(), dist.get_world_size()
        return rank * self.config.n_latents // n_processes, (rank + 1) * self.config.n_latents // n_processes

    def encode(self, x: Float[Tensor, "n d_model"], groups: list[Group]) -> list[SparseCodes]:
        """Return the codes of the latents held here; those that other processes' latents displace have acts of 0."""
        return [keep_global_largest(codes) for codes in super().encode(x, groups)]

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n d_model"]:
        written = super().decode(codes)
        dist.all_reduce(written)
        return written

    def total(self, value: float) -> float:
        everywhere = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(everywhere)
        return float(everywhere)


def keep_global_largest(codes: SparseCodes) -> SparseCodes:
    """Set to 0 the acts that are not among the k largest of all processes, ties decided everywhere alike."""
    k = codes.acts.shape[1]
    parts = [torch.empty_like(codes.acts) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, codes.acts.contiguous())
    everywhere = torch.cat(parts, 1)
    kept = torch.zeros_like(everywhere, dtype=torch.bool).scatter_(1, everywhere.topk(k, dim=1).indices, True)
    own = kept[:, dist.get_rank() * k : (dist.get_rank() + 1) * k]
    return SparseCodes(torch.where(own, codes.acts, 0), codes.indices)


@torch.no_grad()
def train_in_processes(
    store: ActivationStore,
    config: SAEConfig,
    train: TrainConfig,
    out: str | Path,
    split: Split,
    device: str | torch.device = "cpu",
) -> SAE | None:
    """Train as `itd.train` does, with the processes of the default group; return the autoencoder to the first.

    Every process has the same activations, and `out` is a folder that all of them see. The result is that of one process
    up to the order in which fp32 sums are taken. A run that was stopped goes on; split by tokens, with any number of
    processes, split by latents, with as many as before.

    Raises:
        ValueError: too little for a process to do, d_model is not the store's, or a process's part does not fit in memory.
        RuntimeError: the processes disagree.
    """
    rank, n_processes = dist.get_rank(), dist.get_world_size()
    if split == "latents" and config.n_latents // n_processes < config.k:
        raise ValueError(f"{n_processes} processes cannot share {config.n_latents} latents: each needs k = {config.k} at least")
    if split == "tokens" and train.batch_tokens < n_processes:
        raise ValueError(f"{n_processes} processes cannot share {train.batch_tokens} tokens: each needs one at least")
    require_fit(store, config, train, torch.device(device), n_processes, n_parts=n_processes if split == "latents" else 1)
    if split == "tokens":
        sae = run(TokenParallel(store, config, train, device), Path(out) / CHECKPOINT, quiet=rank > 0)
        return sae if rank == 0 else None
    name = Path(CHECKPOINT).with_stem(f"checkpoint-{rank}-of-{n_processes}")
    part = run(LatentParallel(store, config, train, device), Path(out) / name, quiet=rank > 0)
    write_tensors(part_path(out, rank), {name: getattr(part, name).contiguous() for name in PARAMETERS})
    dist.barrier()
    return join_parts(Path(out), config, part) if rank == 0 else None


def part_path(out: str | Path, rank: int) -> Path:
    return Path(out) / f"part-{rank}.safetensors"


def join_parts(out: Path, config: SAEConfig, first: SAE) -> SAE:
    """Return the autoencoder whose parts the processes wrote, and remove them."""
    paths = [part_path(out, rank) for rank in range(dist.get_world_size())]
    rows: dict[str, Any] = {
        name: torch.cat([read_tensor(path, name) for path in paths]) for name in ("W_enc", "b_enc", "W_dec")
    }
    sae = SAE(config, **rows, b_dec=first.b_dec, hook_point=first.hook_point, metrics=first.metrics)
    for path in paths:
        path.unlink()
    return sae


# Command line


@dataclass(frozen=True, kw_only=True)
class ScaleArguments:
    """Train a sparse autoencoder with the processes that torchrun starts."""

    activations: Path
    """Folder that `itd record` wrote; every process reads it."""
    out: Path
    """Folder for checkpoints and, in its folder `sae`, the autoencoder. All processes see it."""
    split: Split = "latents"
    """What the processes share: `latents` divides memory and work, `tokens` the work only."""
    n_latents: int = SAEConfig.n_latents
    """Rows of encoder and decoder, of all processes together."""
    k: int = SAEConfig.k
    """Latents that may be active at a position."""
    settings: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)


def join_group() -> torch.device:
    """Join the group that torchrun has started; return this process's device: a GPU of its own where there are some.

    Raises:
        ValueError: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise ValueError("itd.scale is started by torchrun: torchrun --nproc-per-node N -m itd.scale ...")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and save the autoencoder; return 0."""
    arguments: Any = tyro.cli(ScaleArguments, args=None if argv is None else list(argv), prog="itd.scale")
    device = join_group()
    try:
        store = ActivationStore.load(arguments.activations)
        config = SAEConfig(store.d_model, arguments.n_latents, arguments.k)
        sae = train_in_processes(store, config, arguments.settings, arguments.out, arguments.split, device)
        if sae is not None:
            sae.save(arguments.out / "sae")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
