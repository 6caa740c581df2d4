"""A gate on what would be drawn: the image model's first guess from pure noise, whatever the words are that lead there.

Words that nobody told the eraser, and embeddings that an attacker has learnt, reach a concept's picture in ways that neither
its features nor the pooled embedding show. The picture itself they cannot avoid, and one denoising step from pure noise already
tells what it will be. The *draft* is that guess, and what the image model's middle block had while it was made: the one shows
shapes and colours, the other what they mean. That is one step of the image model more, for each prompt: 2 % of 25 guided steps.

Sources: Ho et al. 2020, Denoising diffusion probabilistic models, equation 15, for the guess of x_0; Choi et al. 2022,
Perception prioritized training of diffusion models, section 3, for what the steps at high noise decide; Kwon et al. 2023,
Diffusion models already have a semantic latent space, for the middle block.
"""

from __future__ import annotations

import math
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
from itd.hooks import run_past
from itd.kernels import same_up_to

ENCODER = "text_encoder"
BATCH = 32
"""Prompts that are drafted at a time."""
MOST_VALUES = 1024
"""The guess is averaged over squares of the latent image until it has at most this many values."""
GRID = 2
"""Side of the grid of squares over which the middle block's features are averaged."""
NOISE_SEED = 0
ROUNDING = 1e-3
"""What differs from the origin by less, relative to its length, is the origin: rounding would decide where it points."""
TOLERANCE = 0.05
"""Relative difference of the empty prompt's draft up to which two image models are the same one."""
CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a U-Net that needs more than text states."""


@dataclass(frozen=True, eq=False)
class ImageModelGate(Discriminants):
    """Decides on the direction in which a vector that the image model gives differs from `origin`; the length is left out."""

    origin: Float[Tensor, " d"] | None = field(default=None, kw_only=True)
    """The vector of nothing, by the image model that the gate was made for; None: zero, and any image model."""
    widths: tuple[int, ...] = field(default=(), kw_only=True)
    """Of the parts of a vector, each of which has a direction of its own; none: it is all one."""

    @staticmethod
    def origin_of(pipe: Any) -> Float[Tensor, " d"]:
        """Return the pipeline's vector of nothing, which identifies its image model."""
        raise NotImplementedError

    @staticmethod
    def widths_of(pipe: Any) -> tuple[int, ...]:
        """Return the widths of a vector's parts; none: it is all one."""
        return ()

    @classmethod
    def fit_towards(cls, pipe: Any, own: Own, others: Others, fpr: float, anchor: str) -> Self:
        """Fit and calibrate on a pipeline's vectors, from its vector of nothing; see `fit`."""
        origin, widths = cls.origin_of(pipe), cls.widths_of(pipe)

        def directed(fit: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
            return towards(fit, origin, widths), towards(held_out, origin, widths)

        gate = cls.fit({name: directed(*parts) for name, parts in own.items()}, directed(*others), fpr, anchor)
        return replace(gate, origin=origin, widths=widths)

    def scores(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n concepts"]:
        """Score vectors by their direction from the origin."""
        return super().scores(towards(vectors, self.origin, self.widths))

    def require_joinable(self, other: Discriminants) -> None:
        """Raise ValueError unless the other gate replaces prompts by the same anchor, and is for the same image model."""
        super().require_joinable(other)
        if getattr(other, "widths", ()) != self.widths:
            raise ValueError(f"{self.kind} gates join only where they read the same; make the older eraser again")
        theirs = getattr(other, "origin", None)
        if self.origin is not None and theirs is not None and not same_up_to(self.origin, theirs, TOLERANCE):
            raise ValueError(f"{self.kind} gates join only for the same image model; make both erasers on one pipeline")

    def require_image_model(self, pipe: Any) -> Float[Tensor, " d"]:
        """Return the pipeline's own vector of nothing.

        Raises:
            ValueError: the pipeline's image model cannot be asked, or is not that of the gate.
        """
        require_drafts(pipe, self.kind)
        found = self.origin_of(pipe)
        if self.origin is not None and not same_up_to(found[: len(self.origin)], self.origin, TOLERANCE):
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
    shrinkage: ClassVar[float] = 0.2
    own_quantile: ClassVar[float] = 0.5
    part_way: ClassVar[float] = 0.25

    @staticmethod
    def origin_of(pipe: Any) -> Float[Tensor, " d"]:
        """Return the draft of the empty prompt."""
        return drafts_of(pipe, [""])[0]

    @staticmethod
    def widths_of(pipe: Any) -> tuple[int, ...]:
        """Return how many values of a draft are of the guess, and how many of the middle block."""
        config: Any = pipe.unet.config
        return config.in_channels * math.prod(guess_size(pipe)), config.block_out_channels[-1] * GRID**2

    def scores(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n concepts"]:
        """Score drafts. A gate without `widths`, of an eraser before version 8, reads the guess alone, which comes first."""
        return super().scores(vectors if self.widths else vectors[:, : self.directions.shape[1]])


def towards(
    vectors: Float[Tensor, "n d"], origin: Float[Tensor, " d"] | None, widths: Sequence[int] = ()
) -> Float[Tensor, "n d"]:
    """Return the unit vectors from the origin to the vectors, part by part; zero for a part that is the origin's."""
    if origin is None or vectors.shape[1] != len(origin):
        return F.normalize(vectors, dim=1)
    parts = list(widths) or [len(origin)]
    found = []
    for vector, start in zip(vectors.split(parts, 1), origin.to(vectors).split(parts), strict=True):
        moved = vector - start
        is_there = moved.norm(dim=1, keepdim=True) > ROUNDING * start.norm()
        found.append(F.normalize(moved, dim=1) * is_there)
    return torch.cat(found, 1)


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
    if getattr(unet, "mid_block", None) is None:
        raise ValueError(f"a {gate} gate needs a U-Net with a middle block, that of {kind} has none; {mend}")
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        scheduler = type(pipe.scheduler).__name__
        raise ValueError(f"a {gate} gate needs a scheduler with alphas_cumprod, {scheduler} has none; {mend}")


def draft(pipe: Any, states: Float[Tensor, "prompts tokens d_text"]) -> Float[Tensor, "prompts d"]:
    """Return what the image model guesses of the picture at the noisiest timestep T, from noise that is always the same.

    The guess `sqrt(a) x_T - sqrt(1 - a) v`, for a model that predicts noise `x_T - sqrt(1 - a) eps`, which is x_0 up to its
    scale; a: the cumulative product of alphas at T. Averaged over squares until it has at most `MOST_VALUES` values. After it
    the output of the middle block on the way there, averaged over squares. Differentiable.

    Raises:
        ValueError: another kind of prediction.
    """
    unet = pipe.unet
    kind, last = pipe.scheduler.config.prediction_type, pipe.scheduler.config.num_train_timesteps - 1
    noise = fixed_noise((1, *latent_shape(pipe))).to(states)
    x, t = noise.expand(len(states), -1, -1, -1), torch.tensor(last, device=states.device)
    with pipelines.undisturbed(pipe):
        output, middle = run_past(unet.mid_block, lambda: unet(x, t, encoder_hidden_states=states), read=lambda result: result)
    said = output.sample
    alpha = pipe.scheduler.alphas_cumprod[last].to(states)
    if kind == "v_prediction":
        guess = alpha.sqrt() * noise - (1 - alpha).sqrt() * said
    elif kind == "epsilon":
        guess = noise - (1 - alpha).sqrt() * said
    elif kind == "sample":
        guess = said
    else:
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, the scheduler has {kind!r}")
    return torch.cat([F.adaptive_avg_pool2d(guess.float(), guess_size(pipe)).flatten(1), over_squares(middle)], 1)


def guess_size(pipe: Any) -> tuple[int, int]:
    """Return height and width that the guess is averaged to."""
    n_channels, height, width = latent_shape(pipe)
    side = max(1, int((MOST_VALUES / n_channels) ** 0.5))
    return min(side, height), min(side, width)


def over_squares(middle: Float[Tensor, "n d h w"]) -> Float[Tensor, "n values"]:
    """Average the middle block's features over squares, fp32, so that pictures of any size have as many values."""
    return F.adaptive_avg_pool2d(middle.float(), GRID).flatten(1)


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
    return pipelines.run_encoder(pipe, ENCODER, pipelines.tokenize(pipe, ENCODER, prompts))[0]
