"""What white-box attacks minimise: how far the image model is from drawing the concept, and how loudly the gate rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from itd.attacks.base import System
from itd.attacks.diffusion import Encoded, draw_timesteps, encode, guess, noised, predict
from itd.pictures import picture_features


class Noise(NamedTuple):
    """Noised references: which, at which timestep, with which noise."""

    x_t: Float[Tensor, "n c h w"]
    wanted: Float[Tensor, "n c h w"]
    """What the image model is trained to say there."""
    t: Int[Tensor, " n"]


def draw_noise(pipe: Any, references: Float[Tensor, "m c h w"], n: int, generator: torch.Generator) -> Noise:
    """Noise n references, drawn with replacement, each at a random timestep."""
    x0 = references[torch.randint(len(references), (n,), generator=generator)]
    t = draw_timesteps(pipe, n, generator)
    x_t, wanted = noised(pipe, x0, torch.randn(x0.shape, generator=generator).to(x0), t)
    return Noise(x_t, wanted, t)


class Objective(Protocol):
    """A loss of text states on noised pictures of the concept; lower draws the concept better."""

    def __call__(self, states: Float[Tensor, "1 tokens d"], noise: Noise) -> Float[Tensor, ""]: ...


@dataclass(frozen=True, eq=False)
class Denoise:
    """`|| eps - eps_theta(x_t | states) ||^2` on pictures of the concept: the image model as a diffusion classifier.

    Source: Zhang et al. 2024, To generate or not?, section 4 (UnlearnDiffAtk); Gal et al. 2023, section 3 (inversion).
    """

    pipe: Any

    def __call__(self, states: Float[Tensor, "1 tokens d"], noise: Noise) -> Float[Tensor, ""]:
        return F.mse_loss(predict(self.pipe, noise.x_t, noise.t, states), noise.wanted)


@dataclass(frozen=True, eq=False)
class Match:
    """`|| eps_theta(x_t | honest) - eps_theta(x_t | states) ||^2`: say what the unerased model says to the honest prompt.

    Source: Chin et al. 2024, Prompting4Debugging, section 3.
    """

    pipe: Any
    honest: Float[Tensor, "1 tokens d"]
    """Text states of the honest prompt without the eraser."""

    def __call__(self, states: Float[Tensor, "1 tokens d"], noise: Noise) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = predict(self.pipe, noise.x_t, noise.t, self.honest)
        return F.mse_loss(predict(self.pipe, noise.x_t, noise.t, states), wanted)


@dataclass(frozen=True, eq=False)
class Loss:
    """`objective + gate_weight * relu(margin + slack)`, through the eraser of the system.

    With gate_weight 0 the attacker does not know the gate and has the gradient of the prompt itself where an anchor takes its
    place; otherwise the score is in the loss, and being flagged costs.
    """

    system: System
    objective: Objective
    gate_weight: float = 0.0
    slack: float = 0.1
    """How far below the threshold the score is to stay, in units of the score."""

    def __call__(
        self, input_ids: Int[Tensor, "1 tokens"], embeddings: Float[Tensor, "1 tokens d"] | None, noise: Noise
    ) -> Float[Tensor, ""]:
        encoded = encode(self.system.pipe, input_ids, embeddings, self.system.eraser, through=self.gate_weight == 0)
        return self.objective(encoded.states, noise) + self.penalty(encoded) + self.picture_penalty(encoded.states, noise)

    def penalty(self, encoded: Encoded) -> Tensor:
        if encoded.margins is None or self.gate_weight == 0:
            return torch.zeros(())
        return self.gate_weight * (encoded.margins + self.slack).clamp_min(0).sum()

    def picture_penalty(self, states: Float[Tensor, "1 tokens d"], noise: Noise) -> Tensor:
        """Return what the picture gate costs, on the pictures that the image model guesses from the noised ones."""
        gate = None if self.system.eraser is None else self.system.eraser.picture
        if gate is None or self.gate_weight == 0:
            return torch.zeros(())
        pipe = self.system.pipe
        guessed = guess(pipe, noise.x_t, predict(pipe, noise.x_t, noise.t, states), noise.t)
        margins = gate.scores(picture_features(pipe, guessed)).amax(1) - gate.part_way
        return self.gate_weight * (margins + self.slack).clamp_min(0).mean()


@torch.no_grad()
def rank(loss: Loss, candidates: Sequence[Int[Tensor, "1 tokens"]], noise: Noise, n: int) -> list[int]:
    """Return the n candidates with the smallest loss, all on the same noise, best first."""
    losses = torch.stack([loss(input_ids, None, noise).cpu() for input_ids in candidates])
    return losses.argsort()[:n].tolist()


def require_weight(gate_weight: float) -> None:
    if gate_weight < 0:
        raise ValueError(f"gate_weight must not be negative, got {gate_weight}")
