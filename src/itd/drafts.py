"""A gate on what would be drawn: the image model's first guess from pure noise, whatever the words are that lead there.

Words that nobody told the eraser, and embeddings that an attacker has learnt, reach a concept's picture in ways that neither
its features nor the pooled embedding show. The picture itself they cannot avoid, and one denoising step from pure noise already
tells what it will be: the *draft*. That is one step of the image model more, for each prompt: 2 % of 25 guided steps.

Sources: Ho et al. 2020, Denoising diffusion probabilistic models, equation 15, for the guess of x_0; Choi et al. 2022,
Perception prioritized training of diffusion models, section 3, for what the steps at high noise decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from itd import pipelines
from itd.discriminants import Discriminants, Others, Own

ENCODER = "text_encoder"
BATCH = 32
"""Prompts that are drafted at a time."""
MOST_VALUES = 1024
"""A draft is averaged over squares of the latent image until it has at most this many values."""
NOISE_SEED = 0
TOLERANCE = 0.05
"""Relative difference of the empty prompt's draft up to which two image models are the same one."""
CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a U-Net that needs more than text states."""


@dataclass(frozen=True, eq=False)
class ImageModelGate(Discriminants):
    """Decides on the direction in which a vector that the image model gives differs from `origin`; the length is left out."""

    origin: Float[Tensor, " d"] | None = field(default=None, kw_only=True)
    """The vector of nothing, by the image model that the gate was made for; None: zero, and any image model."""

    @staticmethod
    def origin_of(pipe: Any) -> Float[Tensor, " d"]:
        """Return the pipeline's vector of nothing, which identifies its image model."""
        raise NotImplementedError

    @classmethod
    def fit_towards(cls, own: Own, others: Others, origin: Float[Tensor, " d"], fpr: float, anchor: str) -> Self:
        """Fit and calibrate on vectors from the origin; see `fit`."""
        directed = {name: (towards(fit, origin), towards(held_out, origin)) for name, (fit, held_out) in own.items()}
        gate = cls.fit(directed, (towards(others[0], origin), towards(others[1], origin)), fpr, anchor)
        return replace(gate, origin=origin)

    def scores(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n concepts"]:
        """Score vectors by their direction from the origin."""
        return super().scores(towards(vectors, self.origin))

    def require_joinable(self, other: Discriminants) -> None:
        """Raise ValueError unless the other gate replaces prompts by the same anchor, and is for the same image model."""
        super().require_joinable(other)
        theirs = getattr(other, "origin", None)
        if self.origin is not None and theirs is not None and not same_origin(self.origin, theirs):
            raise ValueError(f"{self.kind} gates join only for the same image model; make both erasers on one pipeline")

    def require_image_model(self, pipe: Any) -> Float[Tensor, " d"]:
        """Return the pipeline's own vector of nothing.

        Raises:
            ValueError: the pipeline's image model cannot be asked, or is not that of the gate.
        """
        require_drafts(pipe, self.kind)
        found = self.origin_of(pipe)
        if self.origin is not None and not same_origin(found, self.origin):
            raise ValueError(f"the {self.kind} gate was made for another image model; make the eraser again on this pipeline")
        return found


@dataclass(frozen=True, eq=False)
class DraftGate(ImageModelGate):
    """Decides on the direction in which a prompt's draft differs from that of the empty prompt.

    Guidance draws what the prompt adds to the empty one, also where that is little, so the size of the difference is left out.
    1 is the median of a concept's own prompts, as many of them draw something else too.
    """

    kind: ClassVar[str] = "draft"
    reads: ClassVar[str] = "drafts"
    shrinkage: ClassVar[float] = 0.5
    own_quantile: ClassVar[float] = 0.5
    part_way: ClassVar[float] = 0.25

    @staticmethod
    def origin_of(pipe: Any) -> Float[Tensor, " d"]:
        """Return the draft of the empty prompt."""
        return drafts_of(pipe, [""])[0]


def towards(drafts: Float[Tensor, "prompts d"], origin: Float[Tensor, " d"] | None) -> Float[Tensor, "prompts d"]:
    """Return the unit vectors from the origin to the drafts, zero for a draft that is the origin."""
    if origin is None or drafts.shape[1] != len(origin):
        return F.normalize(drafts, dim=1)
    return F.normalize(drafts - origin.to(drafts), dim=1)


def same_origin(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> bool:
    """Tell whether two vectors of nothing are by the same image model, in whatever precision."""
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())


def require_drafts(pipe: Any, gate: str = "draft") -> None:
    """Raise ValueError unless the pipeline's U-Net draws from the states of one text encoder and nothing else."""
    kind, mend = type(pipe).__name__, f"make the eraser without {gate}_gate"
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module) or pipelines.text_encoders(pipe) != [ENCODER]:
        raise ValueError(f"a {gate} gate needs a U-Net and one text encoder, {kind} has others; {mend}")
    config: Any = unet.config
    needs = [name for name in CONDITIONS if getattr(config, name, None) is not None]
    if needs or config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(f"a {gate} gate needs a U-Net that takes latents and text only, that of {kind} takes more; {mend}")
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        scheduler = type(pipe.scheduler).__name__
        raise ValueError(f"a {gate} gate needs a scheduler with alphas_cumprod, {scheduler} has none; {mend}")


def draft(pipe: Any, states: Float[Tensor, "prompts tokens d_text"]) -> Float[Tensor, "prompts d"]:
    """Return the image model's guess of the picture at the noisiest timestep T, from noise that is always the same.

    `sqrt(a) x_T - sqrt(1 - a) v`, for a model that predicts noise `x_T - sqrt(1 - a) eps`, which is x_0 up to its scale; a: the
    cumulative product of alphas at T. Averaged over squares until it has at most `MOST_VALUES` values. Differentiable.

    Raises:
        ValueError: another kind of prediction.
    """
    unet, config = pipe.unet, pipe.unet.config
    kind, last = pipe.scheduler.config.prediction_type, pipe.scheduler.config.num_train_timesteps - 1
    shape = latent_shape(pipe)
    noise = fixed_noise((1, *shape)).to(states)
    said = unet(
        noise.expand(len(states), -1, -1, -1), torch.tensor(last, device=states.device), encoder_hidden_states=states
    ).sample
    alpha = pipe.scheduler.alphas_cumprod[last].to(states)
    if kind == "v_prediction":
        guess = alpha.sqrt() * noise - (1 - alpha).sqrt() * said
    elif kind == "epsilon":
        guess = noise - (1 - alpha).sqrt() * said
    elif kind == "sample":
        guess = said
    else:
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, the scheduler has {kind!r}")
    side = max(1, int((MOST_VALUES / config.in_channels) ** 0.5))
    return F.adaptive_avg_pool2d(guess.float(), (min(side, shape[1]), min(side, shape[2]))).flatten(1)


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the latent images that the image model was trained on."""
    config: Any = pipe.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def fixed_noise(shape: Sequence[int]) -> Tensor:
    """Return noise that is always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(NOISE_SEED))


@torch.no_grad()
def draft_states(pipe: Any, states: Float[Tensor, "prompts tokens d_text"]) -> Float[Tensor, "prompts d"]:
    """Return the drafts of text states, without gradients, a batch at a time."""
    return torch.cat([draft(pipe, batch) for batch in states.split(BATCH)])


@torch.no_grad()
def drafts_of(pipe: Any, prompts: Sequence[str]) -> Float[Tensor, "prompts d"]:
    """Return the drafts of prompts, fp32, on the CPU."""
    found = []
    starts = range(0, len(prompts), BATCH)
    for start in tqdm(starts, desc="draft prompts", unit="batch", leave=False, disable=len(starts) < 12):
        found.append(draft(pipe, states_of(pipe, prompts[start : start + BATCH])).cpu())
    return torch.cat(found)


def states_of(pipe: Any, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens d_text"]:
    """Return the text states of prompts, as the image model gets them."""
    encoder: Any = pipelines.encoder_of(pipe, ENCODER)
    tokens = pipelines.tokenize(pipe, ENCODER, prompts)
    mask = None if tokens.attention_mask is None else tokens.attention_mask.to(encoder.device)
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
