"""Encoding through the eraser, and the denoising loss, against the pipeline and the scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from itd import Edit, Eraser, pipelines
from itd.attacks import Goal, System
from itd.attacks.diffusion import (
    borrowed_row,
    encode,
    encode_texts,
    frame,
    noised,
    predict,
    prompt_ids,
    reference_latents,
    require_single_encoder,
    token_embedding,
)  # fmt: skip
from itd.attacks.objectives import Denoise, Loss, Match, draw_noise, rank

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}


class Bright:
    """Counts a picture as a success where its mean is above a bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.name = f"brighter than {bound}"

    def __call__(self, images: torch.Tensor) -> list[bool]:
        return (images.mean((1, 2, 3)) > self.bound).tolist()


def tokens_of(pipe: Any, text: str) -> torch.Tensor:
    return pipelines.tokenize(pipe, "text_encoder", [text]).input_ids


def test_frame_is_what_the_tokenizer_makes(pipe: Any) -> None:
    text = "a photo of a house"
    ids = prompt_ids(pipe, text)
    assert len(ids) == 5
    assert torch.equal(frame(pipe, ids[None]), tokens_of(pipe, text))
    with pytest.raises(ValueError, match="40 tokens do not fit into the 22"):
        frame(pipe, ids.repeat(1, 8))


def test_encoding_is_that_of_the_pipeline_without_and_with_the_eraser(pipe: Any, eraser: Eraser) -> None:
    for text, fires in (("a photo of a house", True), ("a photo of a cat", False)):
        plain = pipe.encode_prompt(text, "cpu", 1, False)[0]
        with eraser.attach(pipe):
            erased = pipe.encode_prompt(text, "cpu", 1, False)[0]
        found = encode(pipe, tokens_of(pipe, text), None, eraser)
        assert torch.equal(encode_texts(pipe, [text]).states, plain)
        assert torch.allclose(found.states, erased, atol=1e-4)
        assert torch.equal(plain, erased) != fires
        assert found.margins is not None
        assert (float(found.margins[0]) >= 0) == fires


def test_embeddings_stand_in_for_tokens_and_have_a_gradient(pipe: Any, eraser: Eraser) -> None:
    input_ids = tokens_of(pipe, "a photo of a house")
    rows = token_embedding(pipe).weight.detach()[input_ids].requires_grad_()
    for protecting in (None, eraser):
        found = encode(pipe, input_ids, rows, protecting)
        assert torch.allclose(found.states, encode(pipe, input_ids, None, protecting).states, atol=1e-5)
        (gradient,) = torch.autograd.grad(found.states.square().sum(), rows)
        assert gradient[0, 1:6].abs().sum() > 0
    (slope,) = torch.autograd.grad(encode(pipe, input_ids, rows, eraser).margins.sum(), rows)  # type: ignore[union-attr]
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("mode", ["subtract", "replace", "refuse"])
def test_who_does_not_know_the_gate_still_has_a_gradient_where_it_fires(pipe: Any, eraser: Eraser, mode: Any) -> None:
    protecting = replace(eraser, edit=Edit(mode), anchors=torch.ones(2, 32))
    input_ids = tokens_of(pipe, "a photo of a house")
    rows = token_embedding(pipe).weight.detach()[input_ids].requires_grad_()
    stopped, through = (encode(pipe, input_ids, rows, protecting, through=way) for way in (False, True))
    torch.testing.assert_close(through.states, stopped.states, rtol=1e-3, atol=1e-4)
    sizes = [float(torch.autograd.grad(found.states.square().sum(), rows)[0].abs().sum()) for found in (stopped, through)]
    assert sizes[1] > 0
    assert (sizes[0] > 0) == (mode != "refuse")


def test_encoding_leaves_no_hook_behind(pipe: Any, eraser: Eraser) -> None:
    input_ids = tokens_of(pipe, "a house")
    before = encode(pipe, input_ids).states
    encode(pipe, input_ids, torch.zeros(1, input_ids.shape[1], 32), eraser)
    assert torch.equal(encode(pipe, input_ids).states, before)
    with pytest.raises(RuntimeError):
        encode(pipe, input_ids, torch.zeros(1, 3, 3), eraser)
    assert torch.equal(encode(pipe, input_ids).states, before)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_its_target_are_those_of_the_scheduler(pipe: Any, kind: str) -> None:
    pipe.scheduler.register_to_config(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 400, 999])
    x_t, wanted = noised(pipe, x0, noise, t)
    assert torch.allclose(x_t, pipe.scheduler.add_noise(x0, noise, t), atol=1e-5)
    targets = {"epsilon": noise, "v_prediction": pipe.scheduler.get_velocity(x0, noise, t), "sample": x0}
    assert torch.allclose(wanted, targets[kind], atol=1e-5)


def test_an_unknown_prediction_is_refused(pipe: Any) -> None:
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow'"):
        noised(pipe, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([3]))


def test_pipelines_with_two_encoders_are_refused(pipe: Any, xl_pipe: Any) -> None:
    require_single_encoder(pipe)
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has others"):
        require_single_encoder(xl_pipe)


def test_a_borrowed_row_comes_back_bit_for_bit(pipe: Any) -> None:
    before = token_embedding(pipe).weight.detach().clone()
    states = encode_texts(pipe, ["a house"]).states
    token = int(prompt_ids(pipe, "house")[0])
    with borrowed_row(pipe, token, torch.ones(32)):
        assert torch.equal(token_embedding(pipe).weight[token], torch.ones(32))
        assert not torch.allclose(encode_texts(pipe, ["a house"]).states, states)
    assert torch.equal(token_embedding(pipe).weight, before)

    def fail() -> None:
        with borrowed_row(pipe, token, torch.ones(32)):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(token_embedding(pipe).weight, before)


def test_references_are_pictures_that_meet_the_criterion(pipe: Any) -> None:
    system, goal = System(pipe, options=OPTIONS), Goal("house")
    drawn = system.draw([goal.prompt] * 4, range(10_000, 10_004))
    middle = float(drawn.images.mean((1, 2, 3)).median())
    chosen, everything = (reference_latents(system, goal, Bright(bound), 4) for bound in (middle, 9.0))
    assert 0 < len(chosen) < len(everything) == 4
    shown = [i for i, image in enumerate(drawn.images) if image.mean() > middle]
    assert torch.allclose(chosen, everything[shown], atol=1e-5)


def test_losses_by_hand(pipe: Any) -> None:
    states, other = encode_texts(pipe, ["a house", "a cat"]).states.split(1)
    noise = draw_noise(
        pipe, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 3, torch.Generator().manual_seed(1)
    )
    said = predict(pipe, noise.x_t, noise.t, states)
    assert float(Denoise(pipe)(states, noise)) == pytest.approx(float((said - noise.wanted).square().mean()))
    assert float(Match(pipe, states)(states, noise)) == 0
    difference = (predict(pipe, noise.x_t, noise.t, other) - said).square().mean()
    assert float(Match(pipe, states)(other, noise)) == pytest.approx(float(difference), rel=1e-4)
    assert float(difference) > 0


def test_being_flagged_costs_a_gate_aware_attacker_only(pipe: Any, eraser: Eraser) -> None:
    system = System(pipe, eraser, OPTIONS)
    noise = draw_noise(pipe, torch.zeros(1, 4, 8, 8), 1, torch.Generator().manual_seed(0))
    flagged, passed = (tokens_of(pipe, f"a photo of a {noun}") for noun in ("house", "cat"))
    blind, aware = Loss(system, Denoise(pipe)), Loss(system, Denoise(pipe), gate_weight=2.0, slack=0.0)
    margin = float(encode(pipe, flagged, None, eraser).margins[0])  # type: ignore[index]
    assert margin > 0
    cost = float(aware(flagged, None, noise)) - float(blind(flagged, None, noise))
    assert cost == pytest.approx(2 * margin, rel=1e-3)
    assert float(aware(passed, None, noise)) == pytest.approx(float(blind(passed, None, noise)))


def test_ranking_is_by_the_same_noise(pipe: Any) -> None:
    loss = Loss(System(pipe, options=OPTIONS), Match(pipe, encode_texts(pipe, ["a house"]).states))
    noise = draw_noise(pipe, torch.zeros(1, 4, 8, 8), 2, torch.Generator().manual_seed(0))
    candidates = [tokens_of(pipe, text) for text in ("a cat", "a house", "the boat at night")]
    order = rank(loss, candidates, noise, 2)
    assert order[0] == 1
    assert len(order) == 2
