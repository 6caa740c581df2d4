"""Own trajectories and their targets, in a world of two nouns and two designs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from itd.emoji.data import BACKGROUNDS, UNSAID, Noun, World
from itd.emoji.images import background_colors, paste, premultiply, side_by_side
from itd.emoji.on_policy import ROLLOUT_STEPS, SAMPLER_STEPS, STEPS_PER_ROLLOUT, Targets, roll_out, train_on_policy
from itd.emoji.stages import StageConfig
from itd.emoji.unet import LatentEye, Pool, build_scheduler
from itd.emoji.vae import encode_images

NOUNS = [Noun("cat", (), "animal", "identity"), Noun("dog", (), "animal", "identity")]
NAMED_SINGLE, OPEN_SINGLE, OPEN_SCENE = 0, 1, 2
SHADE = 1


@pytest.fixture(scope="module")
def world() -> World:
    rgba = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 4), np.uint8)
    return World(NOUNS, rgba, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=16, layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pool(world, vae) -> Pool:
    stickers = premultiply(world.rgba)
    singles = [encode_images(vae, paste(stickers, color.expand(4, 3))) for color in background_colors()]
    scene = paste(side_by_side(stickers[:1], stickers[2:3]), background_colors()[[SHADE]])
    latents = torch.cat([*singles, encode_images(vae, scene)]).half().numpy()
    image = np.array([SHADE * 4, SHADE * 4, len(BACKGROUNDS) * 4])
    labels = np.array([(0, 0, 0, SHADE), (0, 0, UNSAID, SHADE), (0, 1, UNSAID, SHADE)], np.int16)
    states = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float16)
    return Pool(latents, image, states, labels, torch.zeros(5, 8))


@pytest.fixture
def targets(world, pool, vae) -> Targets:
    return Targets(world, pool, vae)


def test_a_named_design_is_the_target_whatever_was_drawn(targets, pool):
    other = torch.from_numpy(pool.image_latents[SHADE * 4 + 1]).float()
    found = targets.nearest(np.array([NAMED_SINGLE]), other[None])
    assert torch.equal(found[0], torch.from_numpy(pool.image_latents[SHADE * 4]).float())


@pytest.mark.parametrize("design", [0, 1])
def test_an_open_design_is_the_one_nearest_to_what_was_drawn(targets, pool, design):
    drawn = torch.from_numpy(pool.image_latents[SHADE * 4 + design]).float()
    found = targets.nearest(np.array([OPEN_SINGLE]), drawn[None] + 0.01 * torch.randn(1, 16, 8, 8))
    assert torch.equal(found[0], drawn)


@pytest.mark.parametrize("design", [0, 1])
def test_a_scene_takes_both_nouns_in_the_nearest_design(targets, world, vae, design):
    stickers = premultiply(world.rgba)
    scenes = paste(side_by_side(stickers[:2], stickers[2:]), background_colors()[[SHADE, SHADE]])
    drawn = encode_images(vae, scenes)[[design]]
    found = targets.nearest(np.array([OPEN_SCENE]), drawn)
    assert torch.allclose(found, drawn, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_captions_that_leave_nothing_open_are_drawn_as_often_as_asked(pool, share):
    torch.manual_seed(0)
    rows = pool.choose(3000, named_share=share)
    assert set(pool.named) == {NAMED_SINGLE}
    assert np.mean(rows == NAMED_SINGLE) == pytest.approx(share + (1 - share) / 3, abs=0.03)


class Knowing:
    """Predicts the velocity to one image exactly, and notes what it was asked."""

    def __init__(self, image_latents: torch.Tensor) -> None:
        self.image_latents, self.alphas, self.timesteps = image_latents, build_scheduler().alphas_cumprod, list[int]()

    def __call__(self, x, t, states):
        alpha = self.alphas[t]
        self.timesteps.append(int(t))
        return SimpleNamespace(sample=(alpha.sqrt() * x - self.image_latents) / (1 - alpha).sqrt())


def test_the_trajectories_of_a_perfect_model_lead_to_its_image(targets, pool):
    image = torch.from_numpy(pool.image_latents[SHADE * 4]).float()
    unet = Knowing(image)
    torch.manual_seed(0)
    points = roll_out(unet, pool, targets, 6)
    assert len(points.noisy) == 6 * (ROLLOUT_STEPS - 1) == 3 * STEPS_PER_ROLLOUT
    assert len(unet.timesteps) == ROLLOUT_STEPS < SAMPLER_STEPS
    assert set(points.timesteps.tolist()) == set(unet.timesteps[1:])
    alpha = unet.alphas[points.timesteps][:, None, None, None]
    noise = (points.noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    singles = points.labels[:, 0] == points.labels[:, 1]
    assert torch.equal(points.image_latents[singles], image.expand(int(singles.sum()), -1, -1, -1))


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, world, pool, vae):
    class Stopping(LatentEye):
        left = -1

        def naming_loss(self, image_latents, labels):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().naming_loss(image_latents, labels)

    torch.manual_seed(0)
    eye = Stopping(2).requires_grad_(False).eval()
    config = StageConfig(steps=40, batch_size=4, ema_decay=0.9, save_every=STEPS_PER_ROLLOUT)
    whole = train_on_policy(world, pool, eye, vae, small_unet(), config, tmp_path / "whole")
    eye.left = 35
    with pytest.raises(KeyboardInterrupt):
        train_on_policy(world, pool, eye, vae, small_unet(), config, tmp_path / "part")
    resumed = train_on_policy(world, pool, eye, vae, small_unet(), config, tmp_path / "part")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    untrained = small_unet().state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in whole.state_dict().items())


def test_checkpoints_between_rollouts_are_refused(tmp_path, world, pool, vae):
    config = StageConfig(steps=4, batch_size=4, save_every=STEPS_PER_ROLLOUT + 1)
    with pytest.raises(ValueError, match=f"save_every={STEPS_PER_ROLLOUT + 1} must be a multiple of {STEPS_PER_ROLLOUT}"):
        train_on_policy(world, pool, nn.Identity(), vae, small_unet(), config, tmp_path)
