from __future__ import annotations

import pytest
import torch

from itd.inputs import find_device, find_dtype, load_pipeline


def test_a_pipeline_is_loaded_in_the_precision_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = load_pipeline(str(tmp_path), "cpu", name)
        assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
        assert loaded.device.type == "cpu"


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
