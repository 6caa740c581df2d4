"""Parts of the recipe that need no trained model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from itd.emoji.data import Noun, World, find_implicit, slug
from itd.emoji.images import paste, side_by_side, split_scene
from itd.emoji.judge import Judge, Verdict, degrade, warp
from itd.emoji.stages import StageConfig, run_stage


def regression(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 1)

    def loss_of(step: int):
        x = torch.randn(16, 4)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return model, loss_of


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_stage_that_was_stopped_ends_with_the_same_weights(tmp_path, ema_decay):
    config = StageConfig(steps=12, batch_size=1, ema_decay=ema_decay, save_every=5)
    whole = run_stage("whole", tmp_path, *regression_args(config))
    model, loss_of = regression()

    def stopped(step: int):
        if step == 8:
            raise KeyboardInterrupt
        return loss_of(step)

    with pytest.raises(KeyboardInterrupt):
        run_stage("part", tmp_path, model, config, stopped)
    resumed = run_stage("part", tmp_path, *regression_args(config))
    assert torch.equal(whole.weight, resumed.weight)


def regression_args(config: StageConfig):
    model, loss_of = regression()
    return model, config, loss_of


def test_a_stage_learns(tmp_path):
    model, loss_of = regression()
    before = loss_of(0)[0].item()
    trained = run_stage("fit", tmp_path, model, StageConfig(steps=300, batch_size=1, lr=0.05, warmup=5), loss_of)
    x = torch.randn(64, 4)
    assert (trained(x) - x.sum(1, keepdim=True)).square().mean().item() < 0.05 * before


def test_a_scene_splits_into_its_two_objects():
    left, right = torch.zeros(1, 4, 64, 64), torch.ones(1, 4, 64, 64)
    scene = paste(side_by_side(left, right), torch.zeros(1, 3))
    a, b = split_scene(scene)
    assert a.shape == b.shape == (1, 3, 64, 64)
    assert float(a.max()) == -1.0
    assert float(b.min()) == 1.0


def test_warping_and_degrading_keep_shape_and_stay_finite():
    stickers = torch.rand(6, 4, 64, 64)
    images = degrade(paste(warp(stickers), torch.rand(6, 3)))
    assert images.shape == (6, 3, 64, 64)
    assert images.isfinite().all()


def test_the_judge_survives_its_folder(tmp_path):
    torch.manual_seed(0)
    judge = Judge(["cat", "dog"], ["noto"]).eval()
    judge.save(tmp_path / "judge")
    loaded = Judge.load(tmp_path / "judge")
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(judge(images).noun, loaded(images).noun, atol=2e-2)
    assert loaded.nouns == ["cat", "dog"]


def test_the_judge_counts_a_half_where_it_is_surer_of_it_than_of_the_whole(monkeypatch):
    judge = Judge(["cat", "dog", "owl"], ["noto"])
    said = iter([[[2.0, 0, 0]] * 3, [[3.0, 0, 0], [0, 1, 0], [0, 3, 0]], [[0, 3.0, 0], [0, 0, 1], [0, 0, 3]]])
    monkeypatch.setattr(judge, "forward", lambda views: Verdict(torch.tensor(next(said)), torch.empty(0), torch.empty(0)))
    shown = judge.shown(torch.zeros(3, 3, 64, 64))
    assert [set(nouns) for nouns in shown] == [{"cat", "dog"}, {"cat"}, {"cat", "dog", "owl"}]
    assert shown[0]["cat"] == pytest.approx(math.exp(3) / (math.exp(3) + 2))


def test_tags_that_several_nouns_share_are_not_implicit():
    nouns = [Noun("cat", ("pet", "kitten"), "animal", "identity"), Noun("dog", ("pet", "dogs"), "animal", "identity")]
    cat, dog = find_implicit(nouns)
    assert cat.implicit == ("kitten",)
    assert dog.implicit == ()


def test_a_world_survives_its_folder(tmp_path):
    world = World(
        [Noun("cat", ("pet",), "animal", "identity")], np.zeros((2, 8, 8, 4), np.uint8), np.array([0, 0]), np.array([0, 1])
    )
    world.save(tmp_path)
    loaded = World.load(tmp_path)
    assert loaded.nouns == world.nouns
    assert (loaded.rgba == world.rgba).all()


@pytest.mark.parametrize(("label", "name"), [("Santa Claus", "santa-claus"), ("woman's hat", "womans-hat"), ("T-Rex", "t-rex")])
def test_labels_become_icon_names(label, name):
    assert slug(label) == name
