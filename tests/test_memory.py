from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import make_store

from itd import SAEConfig, TrainConfig, cli, memory
from itd.memory import MemoryEstimate, inference_memory, training_memory
from itd.training import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("screen", ["always", "never"])
def test_the_estimate_per_latent_is_what_a_trainer_holds(moments: Any, screen: Any) -> None:
    config = SAEConfig(d_model=12, n_latents=64, k=4)
    trainer = Trainer(make_store(), config, TrainConfig(moments=moments, screen=screen))
    held = [*trainer.weights.values(), *trainer.first.values(), *trainer.second.values(), trainer.last_step, trainer.idle]
    if trainer.screen is not None:
        held += [trainer.screen.W, trainer.screen.norm, trainer.screen.error]
    mask_of_the_dead = config.n_latents
    n_bytes = sum(tensor.nbytes for tensor in held if len(tensor) == config.n_latents) + mask_of_the_dead
    estimate = training_memory(12, 4, 32, 8, moments, screen)
    assert config.n_latents * sum(estimate.per_latent.values()) == n_bytes


def test_half_precision_saves_a_third_of_the_paper_size() -> None:
    full, half = (training_memory(768, 64, 700, 256, moments, "never").total(2**19) for moments in ("float32", "bfloat16"))
    assert 9.6e9 < full < 10.3e9
    assert half == pytest.approx(full - 2 * 2 * 2**19 * 768 * 2)


def test_inference_takes_the_weights_and_little_else() -> None:
    config = SAEConfig(768, 2**19, 64)
    assert config.n_bytes < inference_memory(768, 64, 77).total(2**19) < 1.02 * config.n_bytes


@pytest.mark.parametrize("available", [10**7, 123_456_789])
@pytest.mark.parametrize("n_parts", [1, 8])
def test_the_largest_size_that_is_named_fits_and_the_next_does_not(available: int, n_parts: int) -> None:
    estimate = training_memory(64, 8, 32, 16, "float32", "never")
    with pytest.raises(ValueError, match="the largest n_latents that fits is ") as error:
        estimate.require(2**40, available, n_parts)
    largest = int(str(error.value).rsplit(" ", 1)[1])
    if largest:
        estimate.require(largest, available, n_parts)
    with pytest.raises(ValueError, match=f"n_latents = {largest + 1} needs .* GB .*fits is {largest}$"):
        estimate.require(largest + 1, available, n_parts)


def test_too_little_memory_for_anything_names_zero() -> None:
    assert MemoryEstimate({"weights": 10}, {"batch": 100}).largest(99) == 0


def test_screening_is_counted_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def screened(pays: bool, screen: Any) -> int:
        monkeypatch.setattr(memory, "screening_pays", lambda device: pays)
        return training_memory(64, 8, 32, 16, "float32", screen, CPU).per_latent["screen"]

    assert screened(True, "auto") == screened(False, "always") > 0
    assert screened(False, "auto") == screened(True, "never") == 0


# Command line


def test_info_shows_the_memory_that_training_and_inference_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--memory", "--n-latents", "1024", "--d-model", "16", "--k", "4"]) == 0
    text = capsys.readouterr().out
    for word in ("training", "inference", "weights", "moments", "available", "largest n_latents"):
        assert word in text


def test_info_refuses_what_does_not_fit_and_names_what_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    assert cli.main(["info", "--memory"]) == 2
    captured = capsys.readouterr()
    found = re.search(r"n_latents = 524288 needs .* GB.*the largest n_latents that fits is (\d+)", captured.err)
    assert found is not None
    assert cli.main(["info", "--memory", "--n-latents", found[1]]) == 0
    assert "training" in captured.out
