from __future__ import annotations

import pytest
import torch
from tiny import add_safety_checker, make_eraser, make_sae

from itd import EraseConfig, emoji
from itd.erasing import PRESETS
from itd.inputs import erase_settings, find_device, find_dtype, load_erasers, load_pipeline, switch_off_safety_checker


def test_a_pipeline_is_loaded_in_the_precision_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = load_pipeline(str(tmp_path), "cpu", name)
        assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
        assert loaded.device.type == "cpu"


def test_a_safety_checker_stays_off_and_a_pipeline_without_one_is_said_to_have_none(pipe, xl_pipe):
    checked = add_safety_checker(pipe)
    assert [switch_off_safety_checker(checked) for _ in range(2)] == ["off", "off"]
    assert checked.safety_checker is None
    assert not checked.config.requires_safety_checker
    assert switch_off_safety_checker(xl_pipe) == "none"


def test_erasers_that_are_joined_share_the_autoencoder_of_the_first(pipe, tmp_path):
    for name in ("house", "boat"):
        make_eraser(pipe, make_sae(pipe).save(tmp_path / f"{name}-sae"), name).save(tmp_path / name)
    (tmp_path / "boat-sae").rename(tmp_path / "moved")
    assert load_erasers([tmp_path / "house", tmp_path / "boat"]).names == ("house", "boat")
    with pytest.raises(ValueError, match="is not at"):
        load_erasers([tmp_path / "boat", tmp_path / "house"])
    with pytest.raises(FileNotFoundError, match="no eraser at"):
        load_erasers([tmp_path / "house", tmp_path / "cat"])


def test_automatic_precision_follows_the_device():
    assert find_dtype("auto", torch.device("cuda")) == torch.float16
    assert find_dtype("auto", torch.device("cpu")) == torch.float32
    assert find_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        find_device(name)


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'int8'"):
        find_dtype("int8", torch.device("cpu"))


def test_a_refused_prompt_draws_the_embedded_worlds_own_anchor_unless_another_is_named():
    strict = PRESETS["strict"]
    assert erase_settings(None, strict).anchor == emoji.ANCHOR
    assert erase_settings("a/folder", strict) == strict
    assert erase_settings(None, EraseConfig(edit="refuse", anchor="a cup")).anchor == "a cup"
    assert erase_settings(None, EraseConfig(edit="replace")).anchor == EraseConfig().anchor


def test_the_embedded_world_draws_for_a_picture_gate_as_elsewhere_unless_the_settings_say_otherwise():
    found = erase_settings(None, EraseConfig(picture_steps=3))
    assert (found.picture_steps, found.picture_guidance) == (3, emoji.PICTURES["picture_guidance"])
