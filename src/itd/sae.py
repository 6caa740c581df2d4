"""The top-k sparse autoencoder, for inference: encode, decode, save, load."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itd.artifacts import (
    CONFIG,
    MappedTensors,
    artifact_sha256,
    map_tensors,
    read_config,
    reading,
    require_keys,
    save_artifact,
)
from itd.hooks import HookPoint
from itd.kernels import SparseCodes, sparse_decode, topk_encode
from itd.settings import require_at_least

KIND = "sae"


@dataclass(frozen=True)
class SAEConfig:
    """Size of a top-k sparse autoencoder."""

    d_model: int
    """Width of the residual stream at the hook point."""
    n_latents: int = 2**19
    """Rows of encoder and decoder."""
    k: int = 64
    """Latents that may be active at a position."""

    def __post_init__(self) -> None:
        require_at_least(self, d_model=1, n_latents=1, k=1)
        if self.k > self.n_latents:
            raise ValueError(f"k must be at most n_latents = {self.n_latents}, got {self.k}")

    @property
    def n_bytes(self) -> int:
        """Size of the weights in fp32."""
        return 4 * (2 * self.n_latents * self.d_model + self.n_latents + self.d_model)


def available_memory() -> int:
    """Return the bytes of memory that can be allocated now, as the operating system estimates them."""
    try:
        text = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True, eq=False)
class SAE:
    """A top-k sparse autoencoder.

    acts, indices = topk(relu((x - b_dec) @ W_enc.T + b_enc), k);  x_hat = sum_j acts_j W_dec[indices_j] + b_dec

    W_enc, W_dec: (n_latents, d_model), decoder rows of unit norm; b_enc: (n_latents,); b_dec: (d_model,).

    Source: Gao et al. 2024, Scaling and evaluating sparse autoencoders, section 2.
    """

    config: SAEConfig
    W_enc: Float[Tensor, "n_latents d_model"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents d_model"]
    b_dec: Float[Tensor, " d_model"]
    hook_point: HookPoint | None = None
    """Where the activations came from that it was trained on."""
    source: str | None = None
    """Folder that it was loaded from."""
    sha256: str | None = None
    """Hash of the saved files; None until it is saved or loaded."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """What training measured: `fvu`, `dead_share`, `tokens`, `seconds`."""
    mapped: MappedTensors | None = field(default=None, repr=False)
    """The file that the weights stay in until they are used; None if they are in memory."""

    def __post_init__(self) -> None:
        c = self.config
        shapes = {
            "W_enc": (c.n_latents, c.d_model),
            "b_enc": (c.n_latents,),
            "W_dec": (c.n_latents, c.d_model),
            "b_dec": (c.d_model,),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, the config asks for {shape}")

    @classmethod
    def random(cls, config: SAEConfig, seed: int = 0, hook_point: HookPoint | None = None) -> SAE:
        """Make an autoencoder with random weights and biases, for tests and benchmarks."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        W_dec = torch.nn.functional.normalize(draw(config.n_latents, config.d_model), dim=1)
        W_enc = W_dec + 0.1 * draw(config.n_latents, config.d_model) / config.d_model**0.5
        b_enc, b_dec = 0.1 * draw(config.n_latents), 0.1 * draw(config.d_model)
        return cls(config, W_enc, b_enc, W_dec, b_dec, hook_point)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> SparseCodes:
        """Return the k largest latents of each position.

        Raises:
            ValueError: the last dimension is not d_model, or x is not finite.
        """
        if x.shape[-1] != self.config.d_model:
            raise ValueError(f"activations have d_model {x.shape[-1]}, this autoencoder takes {self.config.d_model}")
        if not x.isfinite().all():
            raise ValueError("activations contain NaN or infinity: the text encoder overflowed; use fp32 or bf16")
        flat = x.reshape(-1, x.shape[-1]).to(self.W_enc.dtype)
        acts, indices = topk_encode(flat, self.W_enc, self.b_enc, self.b_dec, self.config.k)
        shape = (*x.shape[:-1], acts.shape[-1])
        return SparseCodes(acts.reshape(shape), indices.reshape(shape))

    def write(self, codes: SparseCodes) -> Float[Tensor, "*batch d_model"]:
        """Return `sum_j acts_j W_dec[indices_j]`: what latents write, without the bias."""
        k = codes.acts.shape[-1]
        flat = SparseCodes(codes.acts.reshape(-1, k), codes.indices.reshape(-1, k))
        return sparse_decode(flat, self.W_dec).reshape(*codes.acts.shape[:-1], self.config.d_model)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction x_hat."""
        return self.write(codes) + self.b_dec

    def fvu(self, x: Float[Tensor, "n d_model"], batch_size: int = 1024) -> float:
        """Return the fraction of variance unexplained: MSE(x_hat, x) / variance of x."""
        errors = [(self.decode(self.encode(batch)) - batch).square().sum() for batch in x.split(batch_size)]
        return float(torch.stack(errors).sum() / (x - x.mean(0)).square().sum())

    def to(self, device: str | torch.device) -> SAE:
        """Return a copy on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        stays = moved["W_enc"] is self.W_enc
        return replace(self, **moved, mapped=self.mapped if stays else None)

    def release(self) -> None:
        """Give back the memory of weights that were read from a mapped file; they are read again when needed."""
        if self.mapped is not None:
            self.mapped.release()

    def _tensors(self) -> dict[str, Tensor]:
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> SAE:
        """Write the autoencoder to a folder and return it as loaded from there.

        `dtype`: fp16 halves the file; it is computed with in fp32 in any case.

        Raises:
            ValueError: the folder holds something other than an autoencoder.
        """
        hook_point = None if self.hook_point is None else str(self.hook_point)
        config = {"sae": asdict(self.config), "hook_point": hook_point, "metrics": self.metrics}
        tensors = {name: value.to(dtype) for name, value in self._tensors().items()}
        save_artifact(folder, KIND, config, {"sae": tensors})
        return SAE.load(folder)

    @classmethod
    def load(cls, folder: str | Path, verify: bool | None = None) -> SAE:
        """Read what `save` wrote. Weights in fp32 are mapped: they are read from the file when they are first used.

        `verify`: hash a large file even if it was hashed before and not touched since (True), or not at all (False).

        Raises:
            FileNotFoundError: no autoencoder there.
            ValueError: a file is truncated, altered, of another kind, or holds what it should not.
        """
        config = read_config(folder, KIND, ("sae", "hook_point", "metrics"))
        require_keys(Path(folder) / CONFIG, config["sae"], [f.name for f in fields(SAEConfig)])
        mapped = map_tensors(folder, config, "sae", ("W_enc", "b_enc", "W_dec", "b_dec"), verify)
        stays = mapped.tensors["W_enc"].dtype == torch.float32
        with reading(folder):
            return cls(
                SAEConfig(**config["sae"]),
                **{name: value.float() for name, value in mapped.tensors.items()},
                hook_point=None if config["hook_point"] is None else HookPoint.parse(config["hook_point"]),
                source=str(Path(folder).resolve()),
                sha256=artifact_sha256(config),
                metrics=config["metrics"],
                mapped=mapped if stays else None,
            )
