"""ESD-x: fine-tune the cross-attention so that the concept is steered away from, as negative guidance would."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.rivals.systems import Bare
from benchmarks.rivals.task import Rival, Task, copy_with
from itd.attacks.diffusion import encode_texts


@dataclass(frozen=True)
class ErasedDiffusion:
    """Train `e(x_t, c) -> e0(x_t) - eta (e0(x_t, c) - e0(x_t))` on the cross-attention (attn2), e0 the frozen model.

    x_t is half-denoised by the model in training, with the concept as its prompt. Several concepts take turns.

    Source: Gandikota et al. 2023, Erasing concepts from diffusion models, equation 7, variant ESD-x.
    """

    name: ClassVar[str] = "esd-x"

    eta: float = 1.0
    lr: float = 1e-5
    n_steps: int = 1000
    sampling_steps: int = 50
    """Denoising steps of which the first ones make x_t."""
    guidance: float = 3.0
    """Guidance while x_t is made."""
    batch_size: int = 1
    seed: int = 0

    def __call__(self, task: Task) -> Rival:
        unet = copy.deepcopy(task.pipe.unet)
        self.train(unet, task.pipe, task.names)
        return Bare(self.name, copy_with(task.pipe, unet=unet), task)

    def train(self, unet: Any, pipe: Any, names: Sequence[str]) -> list[float]:
        """Fine-tune the network in place; return the loss of each step."""
        generator = torch.Generator().manual_seed(self.seed)
        unet.requires_grad_(False)
        trained = cross_attention(unet)
        optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in trained], lr=self.lr)
        losses = []
        for step in tqdm(range(self.n_steps), desc="esd-x", unit="step", leave=False, disable=self.n_steps < 50):
            concept, empty = encode_texts(pipe, [names[step % len(names)], ""]).states.split(1)
            x_t, t = self.half_denoised(unet, pipe, concept, empty, generator)
            with torch.no_grad():
                plain, asked = (predict_with(pipe.unet, x_t, t, states) for states in (empty, concept))
            loss = F.mse_loss(predict_with(unet, x_t, t, concept), self.wanted(plain, asked))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        unet.requires_grad_(False)
        return losses

    def wanted(self, plain: Float[Tensor, "n c h w"], asked: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return what the erased model is to say: away from the concept, as far as guidance would go towards it."""
        return plain - self.eta * (asked - plain)

    @torch.no_grad()
    def half_denoised(
        self, unet: Any, pipe: Any, concept: Tensor, empty: Tensor, generator: torch.Generator
    ) -> tuple[Float[Tensor, "n c h w"], Any]:
        """Return x_t at a random step of sampling with the concept, and its timestep."""
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(self.sampling_steps)
        size = unet.config.sample_size
        x = torch.randn(self.batch_size, unet.config.in_channels, size, size, generator=generator) * scheduler.init_noise_sigma
        stop = int(torch.randint(self.sampling_steps, (), generator=generator))
        for t in scheduler.timesteps[:stop]:
            scaled = scheduler.scale_model_input(x, t)
            plain, asked = (predict_with(unet, scaled, t, states) for states in (empty, concept))
            x = scheduler.step(plain + self.guidance * (asked - plain), t, x).prev_sample
        t = scheduler.timesteps[stop]
        return scheduler.scale_model_input(x, t), t


def predict_with(unet: Any, x_t: Float[Tensor, "n c h w"], t: Any, states: Float[Tensor, "1 tokens d"]) -> Tensor:
    return unet(x_t, t, encoder_hidden_states=states.expand(len(x_t), -1, -1)).sample


def cross_attention(unet: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the attention to the text."""
    return [parameter for name, parameter in unet.named_parameters() if ".attn2." in name]
