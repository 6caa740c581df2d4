"""Train a top-k sparse autoencoder on an activation store: sparse gradients, row-wise Adam, AuxK, exact resume."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from itd.activations import ActivationStore, write_tensors
from itd.kernels import SparseGradients, add_gradients, sparse_decode, sparse_gradients, topk_encode
from itd.sae import SAE, TRAINING_COPIES, SAEConfig

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
PARAMETERS: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class TrainConfig:
    """How an autoencoder is trained. The defaults are ours; `PAPER_TRAINING` is the publication's."""

    n_tokens: int = 600_000
    """Activations seen in all, with repetition."""
    batch_tokens: int = 1024
    """Activations per step."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises to its peak."""
    decay: Literal["linear", "none"] = "linear"
    """Whether the learning rate falls to zero over the run."""
    weighting: Literal["unique", "sqrt", "count"] = "sqrt"
    """How often an activation is drawn that occurred w times in the prompts: equally, with sqrt(w), or with w."""
    whiten: bool = True
    """Measure the error in units of each direction's own variance. Directions with little variance, as those that tell
    nouns apart, then count as much as the few that make up most of it. `fvu` is measured without it."""
    relative_rates: bool = True
    """Scale every parameter's learning rate by its own starting size, so that an encoder that starts small stays on course."""
    init: Literal["data", "random"] = "data"
    """Decoder rows start at activations (scaled so that the first reconstruction fits) or at random directions."""
    k_aux: int = 256
    """Dead latents that reconstruct the residual; 0 switches AuxK off."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_tokens: int = 50_000
    """A latent is dead when it has not been active for this many tokens."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of the starting weights and of the order of the activations."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_tokens", "checkpoint_every", "dead_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    @property
    def n_steps(self) -> int:
        return -(-self.n_tokens // self.batch_tokens)


PAPER_TRAINING = TrainConfig(
    n_tokens=40_000_000,
    batch_tokens=700,
    lr=1e-4,
    warmup_steps=1000,
    decay="none",
    weighting="count",
    init="random",
    whiten=False,
    relative_rates=False,
)
"""The publication's choices; dead latents are counted in tokens, and AuxK acts."""


def geometric_median(x: Float[Tensor, "n d_model"], n_steps: int = 50) -> Float[Tensor, " d_model"]:
    """Return the point with the smallest sum of distances to the rows, by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(n_steps):
        weights = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-6)
        median = (weights * x).sum(0) / weights.sum()
    return median


def precision(x: Float[Tensor, "n d_model"], shrinkage: float = 1e-3) -> Float[Tensor, "d_model d_model"]:
    """Return the inverse covariance of the rows, shrunk towards a multiple of the identity, with trace(P cov) = d_model."""
    covariance = torch.cov(x.T)
    identity = torch.eye(x.shape[1])
    inverse = torch.linalg.inv(covariance + shrinkage * covariance.diagonal().mean() * identity)
    return inverse * (x.shape[1] / (inverse * covariance).sum())


def initial_weights(store: ActivationStore, config: SAEConfig, train: TrainConfig) -> dict[str, Tensor]:
    """Return the starting weights.

    With `init="data"`, decoder rows are centred activations with a little noise, and the encoder is scaled by the
    least-squares factor that makes the first reconstruction fit. With `whiten`, an encoder row is the matched filter of
    its decoder row, P d / (d P d).
    """
    generator = torch.Generator().manual_seed(train.seed)
    sample = store.x[torch.randperm(len(store), generator=generator)[:4096]]
    b_dec = geometric_median(sample)
    noise = torch.randn(config.n_latents, config.d_model, generator=generator)
    if train.init == "data":
        rows = torch.randint(len(store), (config.n_latents,), generator=generator)
        directions = F.normalize(store.x[rows] - b_dec, dim=1)
        W_dec = F.normalize(directions + 0.05 * F.normalize(noise, dim=1), dim=1)
    else:
        W_dec = F.normalize(noise, dim=1)
    b_enc, W_enc = torch.zeros(config.n_latents), W_dec
    if train.whiten:
        filtered = W_dec @ precision(sample)
        W_enc = filtered / (filtered * W_dec).sum(1, keepdim=True)
    codes = topk_encode(sample[:1024], W_enc, b_enc, b_dec, config.k)
    first, centred = sparse_decode(codes, W_dec), sample[:1024] - b_dec
    scale = (first * centred).sum() / first.square().sum().clamp_min(1e-12)
    return {"W_enc": W_enc * scale.clamp(1e-3, 1.0), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


class Trainer:
    """Everything that a step changes, so that a checkpoint is all of it."""

    def __init__(self, store: ActivationStore, config: SAEConfig, train: TrainConfig) -> None:
        self.store, self.config, self.train = store, config, train
        self.weights = initial_weights(store, config, train)
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.last_step = torch.zeros(config.n_latents, dtype=torch.int64)
        """Step at which the moments of a row were last brought up to date."""
        self.idle = torch.zeros(config.n_latents, dtype=torch.int64)
        """Tokens since a latent was last active."""
        self.variance = float((store.x - store.x.mean(0)).square().mean())
        self.metric = precision(store.x[:: max(1, len(store) // 65536)]) * self.variance if train.whiten else None
        self.rates: dict[str, float] = dict.fromkeys(PARAMETERS, 1.0) | (self.parameter_rates() if train.relative_rates else {})
        power = {"unique": 0.0, "sqrt": 0.5, "count": 1.0}[train.weighting]
        self.cumulative = store.weight.double().pow(power).cumsum(0)

    def parameter_rates(self) -> dict[str, float]:
        """Return each parameter's learning rate in units of `lr`: rows of W_dec have norm 1 and count as the unit."""
        norm = float(self.weights["W_enc"].norm(dim=1).mean())
        spread = (self.variance * self.config.d_model) ** 0.5
        return {"W_enc": norm, "b_enc": norm * spread, "W_dec": 1.0, "b_dec": spread / self.config.d_model**0.5}

    def weigh(self, error: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Return half the gradient of the squared error by the error, in the metric of the loss."""
        return error if self.metric is None else error @ self.metric

    def draw(self, step: int) -> Float[Tensor, "n d_model"]:
        """Draw the batch of a step; it depends on seed and step only."""
        generator = torch.Generator().manual_seed(self.train.seed * 1_000_003 + step)
        points = torch.rand(self.train.batch_tokens, generator=generator, dtype=torch.float64) * self.cumulative[-1]
        return self.store.x[torch.searchsorted(self.cumulative, points).clamp_max(len(self.store) - 1)]

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.train.warmup_steps))
        decay = 1 - step / self.train.n_steps if self.train.decay == "linear" else 1.0
        return self.train.lr * warm * decay

    def step(self, step: int) -> float:
        """Take one optimiser step and return the batch's fraction of variance unexplained."""
        x = self.draw(step)
        w, k = self.weights, self.config.k
        codes = topk_encode(x, w["W_enc"], w["b_enc"], w["b_dec"], k)
        residual = sparse_decode(codes, w["W_dec"]) + w["b_dec"] - x
        scale = 2 / (x.numel() * self.variance)
        gradients = sparse_gradients(x - w["b_dec"], codes, self.weigh(residual) * scale, w["W_dec"])
        self.idle += len(x)
        self.idle[codes.indices[codes.acts > 0]] = 0
        dead = (self.idle >= self.train.dead_tokens).nonzero().flatten()
        if self.train.k_aux and len(dead):
            gradients = add_gradients(gradients, self.aux_gradients(x, -residual, dead))
        self.update(gradients, step)
        return float(residual.square().mean() / self.variance)

    def aux_gradients(
        self, x: Float[Tensor, "n d_model"], missing: Float[Tensor, "n d_model"], dead: Int[Tensor, " dead"]
    ) -> SparseGradients:
        """Let dead latents reconstruct what the living missed. Source: Gao et al. 2024, appendix A.2."""
        w = self.weights
        W_enc, b_enc, W_dec = w["W_enc"][dead], w["b_enc"][dead], w["W_dec"][dead]
        codes = topk_encode(x, W_enc, b_enc, w["b_dec"], min(self.train.k_aux, len(dead)))
        error = sparse_decode(codes, W_dec) - missing
        size = float((missing * self.weigh(missing)).mean())
        scale = 2 * self.train.aux_weight / (x.numel() * size)
        found = sparse_gradients(x - w["b_dec"], codes, self.weigh(error) * scale, W_dec)
        return found._replace(rows=dead[found.rows], b_dec=torch.zeros_like(found.b_dec))

    def update(self, gradients: SparseGradients, step: int) -> None:
        """Apply Adam to the touched rows; their moments first decay as often as they were skipped."""
        rows, lr = gradients.rows, self.learning_rate(step)
        skipped = (step - self.last_step[rows]).clamp_min(1)
        self.last_step[rows] = step
        W_dec = self.weights["W_dec"][rows]
        radial = (gradients.W_dec * W_dec).sum(1, keepdim=True) * W_dec
        tangent = gradients._replace(W_dec=gradients.W_dec - radial)
        for name in PARAMETERS:
            grad = getattr(tangent, name)
            if name == "b_dec":
                self.adam_(name, slice(None), grad, torch.ones(()), step, lr)
            else:
                age = skipped[:, None] if grad.ndim == 2 else skipped
                self.adam_(name, rows, grad, age, step, lr)
        self.weights["W_dec"][rows] = F.normalize(self.weights["W_dec"][rows], dim=1)

    def adam_(self, name: str, rows: Int[Tensor, " rows"] | slice, grad: Tensor, age: Tensor, step: int, lr: float) -> None:
        beta1, beta2, epsilon = 0.9, 0.999, 6.25e-10
        first = self.first[name][rows] * beta1**age + (1 - beta1) * grad
        second = self.second[name][rows] * beta2**age + (1 - beta2) * grad.square()
        self.first[name][rows], self.second[name][rows] = first, second
        corrected = (second / (1 - beta2 ** (step + 1))).sqrt() + epsilon
        self.weights[name][rows] -= lr * self.rates[name] / (1 - beta1 ** (step + 1)) * first / corrected

    # Checkpoints

    def save(self, path: Path, step: int, seconds: float) -> None:
        """Write the whole state."""
        tensors = {f"weights/{key}": value for key, value in self.weights.items()}
        tensors |= {f"first/{key}": value for key, value in self.first.items()}
        tensors |= {f"second/{key}": value for key, value in self.second.items()}
        tensors |= {"last_step": self.last_step, "idle": self.idle}
        write_tensors(path, tensors, {"run": self.identity(), "step": str(step), "seconds": str(seconds)})

    def load(self, path: Path) -> tuple[int, float]:
        """Restore the state; return the step to go on with and the seconds spent before.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["run"] != self.identity():
                raise ValueError(f"{path} is a checkpoint of other activations or settings; name another folder or delete it")
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition("/")
                if name:
                    getattr(self, group)[name] = file.get_tensor(key)
                else:
                    setattr(self, key, file.get_tensor(key))
        return int(metadata["step"]), float(metadata["seconds"])

    def identity(self) -> str:
        settings = {k: v for k, v in asdict(self.train).items() if k != "checkpoint_every"}
        return json.dumps({"sae": asdict(self.config), "train": settings, "store": self.store.sha256}, sort_keys=True)

    def result(self, fvu: float, seconds: float) -> SAE:
        dead = float((self.idle >= self.train.dead_tokens).float().mean())
        metrics = {"fvu": fvu, "dead_share": dead, "tokens": float(self.train.n_tokens), "seconds": round(seconds, 1)}
        w = self.weights
        return SAE(
            self.config, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], hook_point=self.store.hook_point, metrics=metrics
        )


@torch.no_grad()
def train(
    store: ActivationStore, config: SAEConfig, train_config: TrainConfig | None = None, out: str | Path | None = None
) -> SAE:
    """Train an autoencoder; with `out`, keep checkpoints there and go on from the last one.

    A run that was killed at any step and started again ends with the same weights, bit for bit, as one that was not.

    Raises:
        ValueError: d_model is not the store's, or the training does not fit in memory (checked before allocating).
    """
    settings = train_config or TrainConfig()
    if config.d_model != store.d_model:
        raise ValueError(f"d_model is {config.d_model}, the recorded activations have {store.d_model}")
    config.require_memory(TRAINING_COPIES)
    trainer = Trainer(store, config, settings)
    checkpoint = None if out is None else Path(out) / CHECKPOINT
    start, spent = trainer.load(checkpoint) if checkpoint is not None and checkpoint.exists() else (0, 0.0)
    began = time.monotonic() - spent
    progress = tqdm(range(start, settings.n_steps), desc="train SAE", initial=start, total=settings.n_steps)
    for step in progress:
        fvu = trainer.step(step)
        if step % 10 == 0:
            progress.set_postfix(fvu=f"{fvu:.4f}")
        last = step + 1 == settings.n_steps
        if checkpoint is not None and ((step + 1) % settings.checkpoint_every == 0 or last):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            trainer.save(checkpoint, step + 1, time.monotonic() - began)
    sample = torch.Generator().manual_seed(settings.seed)
    held = store.x[torch.randperm(len(store), generator=sample)[:8192]]
    sae = trainer.result(0.0, time.monotonic() - began)
    return trainer.result(sae.fvu(held), time.monotonic() - began)
