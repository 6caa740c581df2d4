"""The judge: a small network that names noun and design of a picture. It is trained on renders only, never on generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from itd.emoji.data import DESIGNS, World
from itd.emoji.images import background_colors, paste, pick, premultiply, side_by_side, split_scene
from itd.emoji.stages import StageConfig, run_stage


class Verdict(NamedTuple):
    """Logits of the judge."""

    noun: Float[Tensor, "n nouns"]
    design: Float[Tensor, "n designs"]
    features: Float[Tensor, "n 256"]
    """Penultimate features, on which FID and KID are measured."""


def conv(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.GELU())


class Judge(nn.Module):
    """A convolutional classifier with two heads: 64 x 64 x 3 in [-1, 1] to noun and design."""

    def __init__(self, nouns: list[str], designs: list[str]) -> None:
        super().__init__()
        self.nouns, self.designs = nouns, designs
        self.body = nn.Sequential(
            conv(3, 24, 2), conv(24, 48, 1), conv(48, 96, 2), conv(96, 128, 1), conv(128, 160, 2), conv(160, 192, 1),
            nn.Conv2d(192, 256, 3, 2, 1), nn.GELU(),
        )  # fmt: skip
        self.pool = nn.Linear(256 * 16, 256)
        self.noun = nn.Linear(256, len(nouns))
        self.design = nn.Linear(256, len(designs))

    def forward(self, images: Float[Tensor, "n 3 64 64"]) -> Verdict:
        features = F.gelu(self.pool(self.body(images).flatten(1)))
        return Verdict(self.noun(features), self.design(features), features)

    @torch.no_grad()
    def name(self, images: Float[Tensor, "n 3 64 64"], batch_size: int = 256) -> tuple[list[str], list[str]]:
        """Return the most likely noun and design of each image."""
        verdicts = [self(batch) for batch in images.split(batch_size)]
        nouns = torch.cat([verdict.noun for verdict in verdicts]).argmax(1).tolist()
        designs = torch.cat([verdict.design for verdict in verdicts]).argmax(1).tolist()
        return [self.nouns[i] for i in nouns], [self.designs[i] for i in designs]

    @torch.no_grad()
    def shown(self, images: Float[Tensor, "n 3 64 64"], batch_size: int = 256) -> list[dict[str, float]]:
        """Return the nouns that each image shows, and how sure the judge is of them, 0 to 1.

        That is what is named in the whole, and in a half of which the judge is surer: a scene holds two objects side by side,
        which the judge learned to read one by one. Something is always named; how sure tells whether it is there.
        """
        return [nouns for batch in images.split(batch_size) for nouns in self.shown_in(batch, self(batch).noun)]

    @torch.no_grad()
    def shown_in(self, images: Float[Tensor, "n 3 64 64"], whole: Float[Tensor, "n nouns"]) -> list[dict[str, float]]:
        """Return what `shown` does of one batch, given the logits of the whole images."""
        views = torch.stack([whole, *(self(half).noun for half in split_scene(images))])
        sure, said = views.softmax(2).max(2)
        found = []
        for row in zip(said.T.tolist(), sure.T.tolist(), strict=True):
            named = [(self.nouns[i], s) for i, s in zip(*row, strict=True) if s >= row[1][0]]
            found.append({noun: max(s for other, s in named if other == noun) for noun, _ in named})
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"nouns": self.nouns, "designs": self.designs}))
        half = {key: value.half() if value.is_floating_point() else value for key, value in self.state_dict().items()}
        save_file(half, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        return judge.float().eval()


def warp(stickers: Float[Tensor, "n 4 h w"], strength: float = 1.0) -> Float[Tensor, "n 4 h w"]:
    """Move, turn and scale each sticker a little."""
    n = len(stickers)
    angle = (torch.rand(n) - 0.5) * 0.4 * strength
    zoom = 1 + (torch.rand(n) - 0.5) * 0.3 * strength
    shift = (torch.rand(n, 2) - 0.5) * 0.24 * strength
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(stickers.shape), align_corners=False)
    return F.grid_sample(stickers, grid, align_corners=False)


def degrade(images: Float[Tensor, "n 3 h w"], noise: float = 0.08) -> Float[Tensor, "n 3 h w"]:
    """Blur, recolour and add noise, each to a random share of the images."""
    n = len(images)
    size = [40, 32, 26, 20][int(torch.randint(4, ()))]
    small = F.interpolate(images, size=size, mode="area")
    blurred = F.interpolate(small, size=images.shape[-1], mode="bilinear", align_corners=False)
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.4, blurred, images)
    gain, offset = 1 + 0.3 * (torch.rand(n, 3, 1, 1) - 0.5), 0.3 * (torch.rand(n, 3, 1, 1) - 0.5)
    recoloured = images * gain + offset
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.6, recoloured, images)
    return images + torch.rand(n, 1, 1, 1) * noise * torch.randn_like(images)


def smear(images: Float[Tensor, "n 3 h w"], strength: float = 0.3) -> Float[Tensor, "n 3 h w"]:
    """Add noise of a few pixels' size to half of the images: stains, as a decoder of image latents leaves them."""
    n = len(images)
    size = [8, 16, 24, 32][int(torch.randint(4, ()))]
    stains = F.interpolate(torch.randn(n, 3, size, size), size=images.shape[-1], mode="bilinear", align_corners=False)
    amount = torch.rand(n, 1, 1, 1) * strength * (torch.rand(n, 1, 1, 1) < 0.5)
    return images + amount * stains


def train_judge(world: World, config: StageConfig, folder: Path) -> Judge:
    """Train on warped, stained and degraded renders, two fifths of them cut out of scenes."""
    torch.manual_seed(config.seed)
    stickers, colors = premultiply(world.rgba), background_colors()
    nouns, designs = torch.from_numpy(world.noun), torch.from_numpy(world.design)
    judge = Judge([noun.name for noun in world.nouns], list(DESIGNS))

    def draw(n: int) -> tuple[Float[Tensor, "n 3 64 64"], Int[Tensor, " n"]]:
        index = pick(n, len(stickers))
        background = torch.where(torch.rand(n, 1) < 0.6, colors[pick(n, len(colors))], torch.rand(n, 3))
        background[: n // 4] = 1.0
        images = paste(warp(stickers[index]), background)
        m = n // 5
        scene = paste(side_by_side(stickers[index[:m]], stickers[index[m : 2 * m]]), background[:m])
        images[:m], images[m : 2 * m] = split_scene(scene)
        return degrade(smear(images)), index

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        images, index = draw(config.batch_size)
        verdict = judge(images.contiguous(memory_format=torch.channels_last))
        noun_loss = F.cross_entropy(verdict.noun, nouns[index], label_smoothing=0.05)
        loss = noun_loss + F.cross_entropy(verdict.design, designs[index], label_smoothing=0.05)
        return loss, {"accuracy": (verdict.noun.argmax(1) == nouns[index]).float().mean().item()}

    trained = run_stage("judge", folder, judge, config, loss_of)
    assert isinstance(trained, Judge)
    trained.save(folder / "judge")
    return trained


@torch.no_grad()
def judge_accuracy(judge: Judge, images: Float[Tensor, "n 3 64 64"], nouns: Tensor, designs: Tensor) -> dict[str, float]:
    """Return top-1 accuracy of noun and design."""
    verdicts = [judge(batch) for batch in images.split(256)]
    said_nouns = torch.cat([verdict.noun for verdict in verdicts]).argmax(1)
    said_designs = torch.cat([verdict.design for verdict in verdicts]).argmax(1)
    return {
        "noun": (said_nouns == nouns).float().mean().item(), "design": (said_designs == designs).float().mean().item()
    }  # fmt: skip
