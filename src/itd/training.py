"""Train a top-k sparse autoencoder on an activation store: sparse gradients, row-wise Adam, AuxK, exact resume.

A step costs what its encode costs. Gradients and moments are computed for the rows that were active only, a chunk of rows
at a time, and no tensor of the size of a weight matrix is made.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from torch.optim.adam import adam
from tqdm import tqdm

from itd.activations import ActivationStore, write_tensors
from itd.artifacts import safetensors_errors
from itd.kernels import Group, RowGradients, SparseCodes, encode_groups, gradient_chunks, sort_by_latent, sparse_decode
from itd.memory import free_memory, training_memory
from itd.moments import DITHER, MomentType, read_moments, write_moments, zero_moments
from itd.sae import SAE, SAEConfig
from itd.screening import SCREENED_LATENTS, Screen, screening_pays
from itd.settings import require_at_least

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
PARAMETERS: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")
BETA1, BETA2, EPSILON = 0.9, 0.999, 6.25e-10
"""Of Adam, as in OpenAI's trainer."""
START_ROWS = 1024
"""Starting rows that are drawn at a time; each such block has a seed of its own."""


@dataclass(frozen=True)
class TrainConfig:
    """How an autoencoder is trained. The defaults are ours; `PAPER_TRAINING` is the publication's."""

    n_tokens: int = 700_000
    """Activations seen in all, with repetition."""
    batch_tokens: int = 1024
    """Activations per step."""
    lr: float = 6e-3
    """Peak learning rate of Adam, for runs of some hundred steps; longer ones want a smaller one."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises to its peak."""
    decay: Literal["linear", "none"] = "linear"
    """Whether the learning rate falls to zero over the run."""
    weighting: Literal["unique", "sqrt", "count"] = "sqrt"
    """How often an activation is drawn that occurred w times in the prompts: equally, with sqrt(w), or with w."""
    whiten: bool = False
    """Measure the error in units of each direction's own variance, so that directions with little of it count as much as the
    few that make up most of it. Worth trying with a small k, which has to leave much out. `fvu` is measured without it."""
    relative_rates: bool = True
    """Scale every parameter's learning rate by its own starting size, so that an encoder that starts small stays on course."""
    init: Literal["data", "random"] = "random"
    """Decoder rows start at random directions, or at activations, and the encoder so that the first reconstruction fits.
    Activations explain more at first, but the k largest of them are much alike, which some hundred steps do not undo."""
    k_aux: int = 256
    """Dead latents that reconstruct the residual; 0 switches AuxK off."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_tokens: int = 50_000
    """A latent is dead when it has not been active for this many tokens."""
    moments: MomentType = "float32"
    """How Adam's moments are stored: in bfloat16 they take half the memory, in int8 a quarter (see `itd.moments`)."""
    screen: Literal["auto", "always", "never"] = "auto"
    """Whether the encoder runs in bfloat16 first, with an error bound, and in fp32 for what may be among the k largest. The
    result is the same; `auto` screens large autoencoders where the processor multiplies bfloat16 matrices faster."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of the starting weights and of the order of the activations."""

    def __post_init__(self) -> None:
        require_at_least(self, n_tokens=1, batch_tokens=1, checkpoint_every=1, dead_tokens=1)
        require_at_least(self, warmup_steps=0, k_aux=0, aux_weight=0)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")

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
    moments="int8",
)
"""The publication's choices; dead latents are counted in tokens, AuxK acts, and moments take a quarter of the memory."""


def geometric_median(x: Float[Tensor, "n d_model"], n_steps: int = 50) -> Float[Tensor, " d_model"]:
    """Return the point with the smallest sum of distances to the rows, by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(n_steps):
        weights = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-6)
        median = (weights * x).sum(0) / weights.sum()
    return median


def covariance(x: Float[Tensor, "n d_model"], n_rows: int = 1024) -> Float[Tensor, "d_model d_model"]:
    """Return the covariance of the rows, accumulated over some at a time."""
    mean = x.mean(0)
    total = x.new_zeros(x.shape[1], x.shape[1])
    for part in x.split(n_rows):
        centred = part - mean
        total.addmm_(centred.T, centred)
    return total / max(1, len(x) - 1)


def precision_of(covariance: Float[Tensor, "d_model d_model"], shrinkage: float = 1e-3) -> Float[Tensor, "d_model d_model"]:
    """Return the inverse of a covariance, shrunk towards a multiple of the identity, with trace(P cov) = d_model."""
    size = covariance.diagonal().mean()
    inverse = torch.linalg.inv(covariance + shrinkage * size * torch.eye(len(covariance), dtype=covariance.dtype))
    return inverse * (len(covariance) / (inverse * covariance).sum())


def precision(x: Float[Tensor, "n d_model"], shrinkage: float = 1e-3) -> Float[Tensor, "d_model d_model"]:
    """Return the shrunk inverse covariance of the rows."""
    return precision_of(covariance(x), shrinkage)


def starting_sample(store: ActivationStore, train: TrainConfig) -> Float[Tensor, "n d_model"]:
    generator = torch.Generator().manual_seed(train.seed)
    return store.x[torch.randperm(len(store), generator=generator)[:4096]]


def starting_rows(
    store: ActivationStore, config: SAEConfig, train: TrainConfig, first: int = 0, last: int | None = None
) -> dict[str, Tensor]:
    """Return weights whose encoder is not scaled yet, of the latents from `first` to `last`; they do not depend on the range.

    With `init="data"`, decoder rows are centred activations with a little noise. With `whiten`, an encoder row is the
    matched filter of its decoder row, P d / (d P d).
    """
    last = config.n_latents if last is None else last
    sample = starting_sample(store, train)
    b_dec = geometric_median(sample)
    metric = precision(sample) if train.whiten else None
    W_enc, W_dec = torch.empty(last - first, config.d_model), torch.empty(last - first, config.d_model)
    for start in range(first - first % START_ROWS, last, START_ROWS):
        low, high = max(first, start), min(last, start + START_ROWS)
        block = starting_block(store, config, train, start, b_dec)[low - start : high - start]
        W_dec[low - first : high - first] = block
        if metric is not None:
            filtered = block @ metric
            block = filtered / (filtered * block).sum(1, keepdim=True)
        W_enc[low - first : high - first] = block
    return {"W_enc": W_enc, "b_enc": torch.zeros(last - first), "W_dec": W_dec, "b_dec": b_dec}


def starting_block(
    store: ActivationStore, config: SAEConfig, train: TrainConfig, start: int, b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "rows d_model"]:
    """Draw the decoder rows of one block."""
    n_rows = min(START_ROWS, config.n_latents - start)
    generator = torch.Generator().manual_seed((train.seed + 1) * 1_000_003 + start)
    noise = F.normalize(torch.randn(n_rows, config.d_model, generator=generator), dim=1)
    if train.init == "random":
        return noise
    rows = torch.randint(len(store), (n_rows,), generator=generator)
    return F.normalize(F.normalize(store.x[rows] - b_dec, dim=1) + 0.05 * noise, dim=1)


def fitting_scale(first: Float[Tensor, "n d_model"], centred: Float[Tensor, "n d_model"]) -> float:
    """Return the factor that fits a first reconstruction to what it reconstructs, by least squares."""
    scale = (first * centred).sum() / first.square().sum().clamp_min(1e-12)
    return float(scale.clamp(1e-3, 1.0))


def initial_weights(store: ActivationStore, config: SAEConfig, train: TrainConfig) -> dict[str, Tensor]:
    """Return the weights that training starts from: `starting_rows`, with an encoder that fits the first reconstruction."""
    return Trainer(store, config, train).weights


class Trainer:
    """Everything that a step changes, so that a checkpoint is all of it.

    `encode`, `decode`, `total` and `span` are what a trainer that shares the work among processes replaces (`itd.scale`).
    """

    def __init__(
        self, store: ActivationStore, config: SAEConfig, train: TrainConfig, device: str | torch.device = "cpu"
    ) -> None:
        self.store, self.config, self.train, self.device = store, config, train, torch.device(device)
        self.screen: Screen | None = None
        first, last = self.span
        weights = starting_rows(store, config, train, first, last)
        self.weights = {name: weights.pop(name).to(self.device) for name in PARAMETERS}
        sample = starting_sample(store, train)[:1024].to(self.device)
        codes = self.encode(sample, [Group(config.k)])[0]
        self.weights["W_enc"] *= fitting_scale(self.decode(codes), sample - self.weights["b_dec"])
        self.first = {name: zero_moments(value, train.moments) for name, value in self.weights.items()}
        self.second = {name: zero_moments(value, train.moments) for name, value in self.weights.items()}
        self.last_step = torch.zeros(last - first, dtype=torch.int64, device=self.device)
        """Step at which the moments of a row were last brought up to date."""
        self.idle = torch.zeros(last - first, dtype=torch.int64, device=self.device)
        """Tokens since a latent was last active."""
        spread = covariance(store.x)
        self.variance = float(spread.diagonal().mean()) * (len(store) - 1) / len(store)
        self.metric = (precision_of(spread) * self.variance).to(self.device) if train.whiten else None
        self.rates: dict[str, float] = dict.fromkeys(PARAMETERS, 1.0) | (self.parameter_rates() if train.relative_rates else {})
        power = {"unique": 0.0, "sqrt": 0.5, "count": 1.0}[train.weighting]
        self.cumulative = store.weight.double().pow(power).cumsum(0)
        self.renew_screen()

    # The work that processes may share

    @property
    def span(self) -> tuple[int, int]:
        """The first latent that is held here, and the one after the last."""
        return 0, self.config.n_latents

    def encode(self, x: Float[Tensor, "n d_model"], groups: list[Group]) -> list[SparseCodes]:
        """Return the codes of all tokens; indices count from the first latent held here, others have acts of 0."""
        w = self.weights
        return encode_groups(x, w["W_enc"], w["b_enc"], w["b_dec"], groups, self.screen)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n d_model"]:
        """Return what the latents write, without the bias."""
        return sparse_decode(codes, self.weights["W_dec"])

    def total(self, value: float) -> float:
        """Return the sum of a value over the parts of the latents."""
        return value

    # One step

    def renew_screen(self) -> None:
        """Make the half-precision copy of the encoder, if the encoder is to be screened."""
        large = self.config.n_latents >= SCREENED_LATENTS
        wanted = self.train.screen == "always" or (self.train.screen == "auto" and large and screening_pays(self.device))
        w = self.weights
        self.screen = Screen.of(w["W_enc"], w["b_enc"]) if wanted and w["W_enc"].dtype == torch.float32 else None

    def parameter_rates(self) -> dict[str, float]:
        """Return each parameter's learning rate in units of `lr`: rows of W_dec have norm 1 and count as the unit."""
        norms = sum(float(rows.norm(dim=1).double().sum()) for rows in self.weights["W_enc"].split(START_ROWS))
        norm = self.total(norms) / self.config.n_latents
        spread = (self.variance * self.config.d_model) ** 0.5
        return {"W_enc": norm, "b_enc": norm * spread, "W_dec": 1.0, "b_dec": spread / self.config.d_model**0.5}

    def weigh(self, error: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Return half the gradient of the squared error by the error, in the metric of the loss."""
        return error if self.metric is None else error @ self.metric

    def draw(self, step: int) -> Float[Tensor, "n d_model"]:
        """Draw the batch of a step; it depends on seed and step only."""
        generator = torch.Generator().manual_seed(self.train.seed * 1_000_003 + step)
        points = torch.rand(self.train.batch_tokens, generator=generator, dtype=torch.float64) * self.cumulative[-1]
        return self.store.x[torch.searchsorted(self.cumulative, points).clamp_max(len(self.store) - 1)].to(self.device)

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.train.warmup_steps))
        decay = 1 - step / self.train.n_steps if self.train.decay == "linear" else 1.0
        return self.train.lr * warm * decay

    def step(self, step: int) -> float:
        """Take one optimiser step and return the batch's fraction of variance unexplained.

        Latents are dead that were idle for `dead_tokens` before the step; the pass that encodes finds them too.
        """
        x, groups = self.draw(step), [Group(self.config.k)]
        dead = self.idle >= self.train.dead_tokens
        n_dead = int(self.total(float(dead.sum()))) if self.train.k_aux else 0
        if n_dead:
            groups.append(Group(min(self.train.k_aux, n_dead), dead))
        codes = self.encode(x, groups)
        centred = x - self.weights["b_dec"]
        residual = self.decode(codes[0]) - centred
        grad = self.weigh(residual) * (2 / (x.numel() * self.variance))
        sources, grads = [centred], [grad]
        if n_dead:
            sources.append(centred)
            grads.append(self.aux_gradient(residual, codes[1]))
        pairs = sort_by_latent(*codes)
        for gradients in gradient_chunks(pairs, torch.cat(sources), torch.cat(grads), self.weights["W_dec"]):
            self.update(gradients, step)
        self.update_bias(grad.sum(0), step)
        self.idle += len(x)
        self.idle[codes[0].indices[codes[0].acts > 0]] = 0
        return float(residual.square().mean() / self.variance)

    def aux_gradient(self, residual: Float[Tensor, "n d_model"], codes: SparseCodes) -> Float[Tensor, "n d_model"]:
        """Return the gradient with which dead latents reconstruct what the living missed.

        Source: Gao et al. 2024, appendix A.2.
        """
        size = float((residual * self.weigh(residual)).mean())
        scale = 2 * self.train.aux_weight / (residual.numel() * max(size, 1e-30))
        return self.weigh(self.decode(codes) + residual) * scale

    def update(self, gradients: RowGradients, step: int) -> None:
        """Apply Adam to the touched rows; their moments first decay as often as they were skipped.

        The moments are those of dense Adam. A skipped row stays where it is, while dense Adam would let it coast on its
        first moment.
        """
        rows = gradients.rows
        age = (step - self.last_step[rows]).clamp_min(1)
        self.last_step[rows] = step
        radial = torch.linalg.vecdot(gradients.W_dec, gradients.decoder)
        tangent = gradients.W_dec.addcmul_(radial[:, None], gradients.decoder, value=-1)
        new = {
            "W_enc": self.adam("W_enc", rows, gradients.W_enc, age[:, None], step),
            "b_enc": self.adam("b_enc", rows, gradients.b_enc, age, step),
            "W_dec": self.adam("W_dec", rows, tangent, age[:, None], step, gradients.decoder),
        }
        new["W_dec"] /= torch.linalg.vector_norm(new["W_dec"], dim=1, keepdim=True)
        for name, value in new.items():
            self.weights[name].index_copy_(0, rows, value)
        if self.screen is not None:
            self.screen.refresh(rows, new["W_enc"], new["b_enc"])

    def update_bias(self, grad: Float[Tensor, " d_model"], step: int) -> None:
        """Apply Adam to `b_dec`. Its gradient counts its use in the decoder only, as in OpenAI's trainer."""
        everything = torch.arange(len(grad), device=grad.device)
        self.weights["b_dec"] = self.adam("b_dec", everything, grad, torch.ones_like(everything), step)

    def adam(
        self, name: str, rows: Int[Tensor, " rows"], grad: Tensor, age: Tensor, step: int, value: Tensor | None = None
    ) -> Tensor:
        """Update the moments of some rows and return the rows' new values; `value`, if they are at hand, the old ones.

        Source: Kingma and Ba 2015, algorithm 1.
        """
        first = read_moments("first", self.first[name], rows).mul_((BETA1 ** (age - 1)).to(grad.dtype))
        second = read_moments("second", self.second[name], rows).mul_((BETA2 ** (age - 1)).to(grad.dtype))
        value = self.weights[name].index_select(0, rows) if value is None else value
        adam(
            [value], [grad], [first], [second], [], [torch.tensor(float(step))], fused=True, amsgrad=False, beta1=BETA1,
            beta2=BETA2, lr=self.learning_rate(step) * self.rates[name], weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
        dither = ((rows + self.span[0]) * 40_503 + step * 30_011) % DITHER
        write_moments("first", self.first[name], rows, first, dither)
        write_moments("second", self.second[name], rows, second, dither)
        return value

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
            ValueError: the checkpoint is damaged, or of another run.
        """
        with safetensors_errors(path, "delete it and train again"), safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["run"] != self.identity():
                raise ValueError(f"{path} is a checkpoint of other activations or settings; name another folder or delete it")
            for key in file.keys():  # noqa: SIM118
                group, _, name = key.partition("/")
                if name:
                    getattr(self, group)[name] = file.get_tensor(key).to(self.device)
                else:
                    setattr(self, key, file.get_tensor(key).to(self.device))
        self.renew_screen()
        return int(metadata["step"]), float(metadata["seconds"])

    def identity(self) -> str:
        settings = {k: v for k, v in asdict(self.train).items() if k != "checkpoint_every"}
        return json.dumps({"sae": asdict(self.config), "train": settings, "store": self.store.sha256}, sort_keys=True)

    def fvu(self, x: Float[Tensor, "n d_model"]) -> float:
        """Return the fraction of variance unexplained: MSE(x_hat, x) / variance of x."""
        error = 0.0
        for batch in x.to(self.device).split(self.train.batch_tokens):
            codes = self.encode(batch, [Group(self.config.k)])[0]
            error += float((self.decode(codes) + self.weights["b_dec"] - batch).square().sum())
        return error / float((x - x.mean(0)).square().sum())

    def result(self, seconds: float) -> SAE:
        """Return the autoencoder of the latents held here, with what was measured of all."""
        sample = torch.Generator().manual_seed(self.train.seed)
        held = self.store.x[torch.randperm(len(self.store), generator=sample)[:8192]]
        dead = self.total(float((self.idle >= self.train.dead_tokens).sum())) / self.config.n_latents
        metrics = {
            "fvu": self.fvu(held),
            "dead_share": dead,
            "tokens": float(self.train.n_tokens),
            "seconds": round(seconds, 1),
        }
        weights: dict[str, Any] = {name: value.cpu() for name, value in self.weights.items()}
        config = replace(self.config, n_latents=len(weights["W_enc"]))
        return SAE(config, **weights, hook_point=self.store.hook_point, metrics=metrics)


@torch.no_grad()
def train(
    store: ActivationStore,
    config: SAEConfig,
    train_config: TrainConfig | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> SAE:
    """Train an autoencoder; with `out`, keep checkpoints there and go on from the last one.

    A run that was killed at any step and started again ends with the same weights, bit for bit, as one that was not.

    Raises:
        ValueError: d_model is not the store's, or the training does not fit in memory (checked before allocating).
    """
    settings = train_config or TrainConfig()
    require_fit(store, config, settings, torch.device(device))
    return run(Trainer(store, config, settings, device), None if out is None else Path(out) / CHECKPOINT)


def require_fit(
    store: ActivationStore,
    config: SAEConfig,
    train: TrainConfig,
    device: torch.device,
    n_processes: int = 1,
    n_parts: int = 1,
) -> None:
    """Raise ValueError if the sizes do not match, or do not fit in memory; `n_parts`: into how many the latents are split."""
    if config.d_model != store.d_model:
        raise ValueError(f"d_model is {config.d_model}, the recorded activations have {store.d_model}")
    estimate = training_memory(config.d_model, config.k, train.batch_tokens, train.k_aux, train.moments, train.screen, device)
    available = free_memory(device) // (1 if device.type == "cuda" else n_processes)
    estimate.require(config.n_latents, available, n_parts)


def run(trainer: Trainer, checkpoint: Path | None, quiet: bool = False) -> SAE:
    """Take the steps that are left, keeping a checkpoint."""
    settings = trainer.train
    start, spent = trainer.load(checkpoint) if checkpoint is not None and checkpoint.exists() else (0, 0.0)
    began = time.monotonic() - spent
    progress = tqdm(range(start, settings.n_steps), desc="train SAE", initial=start, total=settings.n_steps, disable=quiet)
    for step in progress:
        fvu = trainer.step(step)
        if step % 10 == 0:
            progress.set_postfix(fvu=f"{fvu:.4f}")
        last = step + 1 == settings.n_steps
        if checkpoint is not None and ((step + 1) % settings.checkpoint_every == 0 or last):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            trainer.save(checkpoint, step + 1, time.monotonic() - began)
    return trainer.result(time.monotonic() - began)
