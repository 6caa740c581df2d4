from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import N_LAYERS, SITE, build_pipeline, build_text_encoder, build_xl_pipeline, make_eraser, make_sae, prompts_of
from torch import Tensor

from itd import SAE, Edit, EraseConfig, Eraser, HookPoint, PromptSet, erase, record
from itd import attachment as attachment_module
from itd.attachment import Roles, digest
from itd.pictures import PictureGate

HOUSE, CAT, BOAT = "a photo of a house", "a photo of a cat", "a photo of a boat"


def draw(pipe: Any, prompt: Any, **options: Any) -> np.ndarray:
    """Generate with a fixed seed; bits in, bits out."""
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **(settings | options)).images


def encode(pipe: Any, prompt: Any, negative: Any = None, guidance: bool = True) -> tuple[Tensor, ...]:
    return pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guidance, negative_prompt=negative
    )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b))


def hooks_of(pipe: Any) -> int:
    modules = [module for part in pipe.components.values() if isinstance(part, torch.nn.Module) for module in part.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


# What passes and what does not


def test_images_of_a_prompt_that_passes_are_bit_identical_and_those_of_a_gated_one_are_not(pipe: Any, eraser: Eraser) -> None:
    plain = {prompt: draw(pipe, prompt) for prompt in (HOUSE, CAT, "")}
    assert not same(plain[HOUSE], plain[CAT])
    with eraser.attach(pipe):
        for prompt, image in plain.items():
            assert same(draw(pipe, prompt), image) == (prompt != HOUSE)


def test_a_pipeline_that_never_saw_itd_gives_the_same_bits(pipe: Any, eraser: Eraser, tokenizer: Any) -> None:
    with eraser.attach(pipe):
        attached = draw(pipe, CAT)
    assert same(attached, draw(build_pipeline(tokenizer), CAT))


def test_in_a_batch_only_the_rows_that_fire_change(pipe: Any, eraser: Eraser) -> None:
    plain = draw(pipe, [CAT, HOUSE, BOAT])
    with eraser.attach(pipe) as attached:
        gated = draw(pipe, [CAT, HOUSE, BOAT])
    assert [same(gated[row], plain[row]) for row in range(3)] == [True, False, True]
    assert [decision.fired for decision in attached.decisions] == [False, True, False]


def test_a_prompt_is_gated_alike_alone_and_in_a_batch(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        together = encode(pipe, [CAT, HOUSE, BOAT])[0]
        alone = torch.cat([encode(pipe, prompt)[0] for prompt in (CAT, HOUSE, BOAT)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_begin_token_stays_and_every_other_position_of_a_gated_prompt_may_change(
    pipe: Any, sae: SAE, site: HookPoint
) -> None:
    eraser = make_eraser(pipe, sae, "house", edit=Edit("scale", -8.0))
    ids = pipe.tokenizer([HOUSE], padding="max_length", return_tensors="pt").input_ids
    plain = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[2]
    with eraser.attach(pipe):
        edited = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(edited[:, 0], plain[:, 0])
    assert (edited[:, 1:] != plain[:, 1:]).any(-1).all()


@pytest.mark.parametrize("n_images", [1, 2])
def test_several_images_of_a_prompt_are_gated_alike(pipe: Any, eraser: Eraser, n_images: int) -> None:
    plain = draw(pipe, CAT, num_images_per_prompt=n_images), draw(pipe, HOUSE, num_images_per_prompt=n_images)
    with eraser.attach(pipe):
        assert same(draw(pipe, CAT, num_images_per_prompt=n_images), plain[0])
        gated = draw(pipe, HOUSE, num_images_per_prompt=n_images)
    assert all(not same(gated[i], plain[1][i]) for i in range(n_images))


def test_without_guidance_the_gate_works_too(pipe: Any, eraser: Eraser) -> None:
    plain = {prompt: draw(pipe, prompt, guidance_scale=0.0) for prompt in (CAT, HOUSE)}
    with eraser.attach(pipe):
        assert same(draw(pipe, CAT, guidance_scale=0.0), plain[CAT])
        assert not same(draw(pipe, HOUSE, guidance_scale=0.0), plain[HOUSE])


def allow_clip_skip(pipe: Any) -> None:
    """Put the last norm where this diffusers looks for it."""
    if not hasattr(pipe.text_encoder, "text_model"):
        vars(pipe.text_encoder)["text_model"] = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)


def test_states_from_before_the_hook_point_are_an_error_where_an_edit_could_not_reach_them(pipe: Any, eraser: Eraser) -> None:
    allow_clip_skip(pipe)
    plain = draw(pipe, HOUSE, clip_skip=2)
    with eraser.attach(pipe):
        with pytest.raises(ValueError, match=r"clip_skip=2 gives .* from before text_encoder:encoder\.layers\.1"):
            draw(pipe, HOUSE, clip_skip=2)
        draw(pipe, HOUSE)
    with eraser.with_edit("refuse").attach(pipe):
        assert not same(draw(pipe, HOUSE, clip_skip=2), plain)


def test_a_layer_skipped_from_the_end_is_edited_too(pipe: Any, eraser: Eraser) -> None:
    allow_clip_skip(pipe)
    plain = {prompt: draw(pipe, prompt, clip_skip=1) for prompt in (CAT, HOUSE)}
    with eraser.attach(pipe):
        assert same(draw(pipe, CAT, clip_skip=1), plain[CAT])
        assert not same(draw(pipe, HOUSE, clip_skip=1), plain[HOUSE])


def test_decisions_are_counted(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe) as attached:
        encode(pipe, [CAT, HOUSE])
        encode(pipe, HOUSE)
    assert (attached.n_prompts, attached.n_fired) == (3, 2)
    assert len(attached.decisions) == 1


# Negative prompts


@pytest.mark.parametrize("prompt", [CAT, ""])
def test_a_negative_prompt_is_not_gated(pipe: Any, eraser: Eraser, prompt: str) -> None:
    plain = draw(pipe, prompt, negative_prompt=HOUSE)
    assert not same(plain, draw(pipe, prompt)), "the negative prompt has an effect"
    with eraser.attach(pipe) as attached:
        assert same(draw(pipe, prompt, negative_prompt=HOUSE), plain)
        assert attached.n_fired == 0
        assert attached.n_prompts == 1


def test_a_gated_prompt_with_itself_as_negative_is_gated_on_one_side_only(pipe: Any, eraser: Eraser) -> None:
    plain = encode(pipe, HOUSE, HOUSE)
    with eraser.attach(pipe):
        positive, negative = encode(pipe, HOUSE, HOUSE)
    assert torch.equal(negative, plain[1])
    assert not torch.equal(positive, plain[0])


BEGIN, END = "<|startoftext|>", "<|endoftext|>"


@pytest.mark.parametrize(
    ("prompts", "negatives"),
    [
        ([f"{BEGIN} {HOUSE}", CAT], [f"zzz {BEGIN} qqq", HOUSE]),
        ([f"{BEGIN} {HOUSE}"], [f"{HOUSE} {BEGIN} b"]),
        ([f"{END} {HOUSE} {BEGIN}"], [f"{END} {HOUSE}"]),
        ([f"{HOUSE} {END} {END}"], [HOUSE]),
    ],
)
def test_typed_begin_and_end_tokens_do_not_pass_a_prompt_for_a_negative_one(
    pipe: Any, eraser: Eraser, prompts: list[str], negatives: list[str]
) -> None:
    plain = encode(pipe, prompts, negatives)
    with eraser.attach(pipe) as attached:
        gated = encode(pipe, prompts, negatives)
    assert [decision.fired for decision in attached.decisions] == [HOUSE in prompt for prompt in prompts]
    assert not torch.equal(gated[0][0], plain[0][0])
    assert torch.equal(gated[1], plain[1])


def test_a_prompt_of_nothing_but_end_tokens_is_a_prompt_that_says_nothing(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe) as attached:
        encode(pipe, [END, HOUSE], ["", ""])
    assert [decision.fired for decision in attached.decisions] == [False, True]


def test_rows_that_no_prompt_explains_are_an_error_if_others_passed_as_negative_ones(pipe: Any, eraser: Eraser) -> None:
    encode_plain = pipe.encode_prompt

    def unweighted(prompt: str, device: str, num_images_per_prompt: int, guidance: bool, negative_prompt: str = "") -> Any:
        return encode_plain(prompt.strip("()"), device, num_images_per_prompt, guidance, negative_prompt)

    pipe.encode_prompt = unweighted
    with eraser.attach(pipe) as attached:
        pipe.encode_prompt(f"({HOUSE})", "cpu", 1, True)
        assert [decision.fired for decision in attached.decisions] == [True]
        with pytest.raises(RuntimeError, match="cannot tell the prompt from the negative one"):
            pipe.encode_prompt(f"({HOUSE})", "cpu", 1, True, f"{HOUSE} and {CAT}")


def test_outside_encode_prompt_every_call_of_the_encoder_is_gated(pipe: Any, eraser: Eraser) -> None:
    ids = pipe.tokenizer([HOUSE, CAT], padding="max_length", return_tensors="pt").input_ids
    plain = pipe.text_encoder(ids).last_hidden_state
    with eraser.attach(pipe):
        encode(pipe, CAT, HOUSE)
        for _ in range(2):
            for states in (pipe.text_encoder(ids), pipe.text_encoder(input_ids=ids)):
                assert not torch.equal(states.last_hidden_state[0], plain[0])
                assert torch.equal(states.last_hidden_state[1], plain[1])


# Removal


def test_removal_restores_the_pipeline_bit_for_bit(pipe: Any, eraser: Eraser) -> None:
    before, attributes, n_hooks = draw(pipe, HOUSE), set(vars(pipe)), hooks_of(pipe)
    handle = eraser.attach(pipe)
    assert "encode_prompt" in vars(pipe)
    assert hooks_of(pipe) > n_hooks
    assert not same(draw(pipe, HOUSE), before)
    handle.remove()
    assert same(draw(pipe, HOUSE), before)
    assert set(vars(pipe)) == attributes
    assert pipe.encode_prompt.__func__ is type(pipe).encode_prompt
    assert hooks_of(pipe) == n_hooks
    handle.remove()


def test_an_encode_prompt_of_the_pipelines_own_is_restored(pipe: Any, eraser: Eraser) -> None:
    method = pipe.encode_prompt

    def custom(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return method(prompt, *args, **kwargs)

    pipe.encode_prompt = custom
    with eraser.attach(pipe):
        assert pipe.encode_prompt is not custom
    assert pipe.encode_prompt is custom


def test_leaving_the_block_by_an_error_removes_the_eraser(pipe: Any, eraser: Eraser) -> None:
    before = draw(pipe, HOUSE)
    with pytest.raises(ZeroDivisionError), eraser.attach(pipe):
        _ = 1 / 0
    assert same(draw(pipe, HOUSE), before)


def test_a_failed_attachment_leaves_the_pipeline_as_it_was(pipe: Any, eraser: Eraser) -> None:
    attributes, unet, n_hooks = set(vars(pipe)), pipe.unet, hooks_of(pipe)
    pipe.unet = None
    with pytest.raises(ValueError, match="has neither a unet nor a transformer"):
        eraser.attach(pipe)
    pipe.unet = unet
    assert set(vars(pipe)) == attributes
    assert hooks_of(pipe) == n_hooks


def test_an_eraser_can_be_attached_again(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        first = draw(pipe, HOUSE)
    with eraser.attach(pipe):
        assert same(draw(pipe, HOUSE), first)


# Two erasers


def test_both_of_two_attached_erasers_are_enforced(pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> None:
    plain = {prompt: draw(pipe, prompt) for prompt in (HOUSE, BOAT, CAT)}
    with eraser.attach(pipe), boat_eraser.attach(pipe):
        for prompt, image in plain.items():
            assert same(draw(pipe, prompt), image) == (prompt == CAT)
    with eraser.attach(pipe):
        assert same(draw(pipe, BOAT), plain[BOAT]), "control: one alone lets the other's concept pass"
    assert same(draw(pipe, HOUSE), plain[HOUSE])


@pytest.mark.parametrize("first", [True, False])
def test_two_erasers_can_be_removed_in_any_order(pipe: Any, eraser: Eraser, boat_eraser: Eraser, first: bool) -> None:
    plain, attributes = {prompt: draw(pipe, prompt) for prompt in (HOUSE, BOAT)}, set(vars(pipe))
    handles = eraser.attach(pipe), boat_eraser.attach(pipe)
    handles[0 if first else 1].remove()
    assert same(draw(pipe, HOUSE), plain[HOUSE]) == first
    assert same(draw(pipe, BOAT), plain[BOAT]) != first
    handles[1 if first else 0].remove()
    assert all(same(draw(pipe, prompt), image) for prompt, image in plain.items())
    assert set(vars(pipe)) == attributes


def test_two_attached_erasers_gate_like_their_union(pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> None:
    with (eraser | boat_eraser).attach(pipe):
        joined = [encode(pipe, prompt)[0] for prompt in (HOUSE, BOAT, CAT)]
    with eraser.attach(pipe), boat_eraser.attach(pipe):
        stacked = [encode(pipe, prompt)[0] for prompt in (HOUSE, BOAT, CAT)]
    for a, b in zip(joined, stacked, strict=True):
        assert torch.equal(a, b)


def test_embeddings_that_only_the_first_eraser_saw_are_not_accepted_by_the_second(
    pipe: Any, eraser: Eraser, boat_eraser: Eraser
) -> None:
    with eraser.attach(pipe):
        positive, negative = encode(pipe, BOAT)
        draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        with boat_eraser.attach(pipe), pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
            draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


# Failing closed


def test_embeddings_passed_by_hand_are_an_error(pipe: Any, eraser: Eraser) -> None:
    positive, negative = encode(pipe, HOUSE)
    with eraser.attach(pipe):
        with pytest.raises(
            ValueError, match="prompt_embeds did not pass the gate of the attached eraser; pass the prompt as text"
        ):
            draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        draw(pipe, CAT)
    draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_negative_embeddings_passed_by_hand_are_those_that_push_away(pipe: Any, eraser: Eraser) -> None:
    _, negative = encode(pipe, CAT, HOUSE)
    plain = draw(pipe, CAT, negative_prompt_embeds=negative)
    with eraser.attach(pipe):
        assert same(draw(pipe, CAT, negative_prompt_embeds=negative), plain)


def test_embeddings_that_the_attached_pipeline_encoded_are_accepted_back(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        expected = {prompt: draw(pipe, prompt) for prompt in (HOUSE, CAT)}
        embeddings = {prompt: encode(pipe, prompt) for prompt in (HOUSE, CAT)}
        for _ in range(2):
            for prompt, (positive, negative) in embeddings.items():
                image = draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
                assert same(image, expected[prompt])
        copied = [tensor.clone() for tensor in embeddings[CAT]]
        draw(pipe, None, prompt_embeds=copied[0], negative_prompt_embeds=copied[1])
        both = [torch.cat(pair) for pair in zip(*embeddings.values(), strict=True)]
        draw(pipe, None, prompt_embeds=both[0], negative_prompt_embeds=both[1])


def test_accepted_embeddings_that_were_changed_afterwards_are_an_error(pipe: Any, eraser: Eraser) -> None:
    foreign = encode(pipe, HOUSE)[0]
    with eraser.attach(pipe):
        positive, negative = encode(pipe, CAT)
        positive.copy_(foreign)
        with pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
            draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_embeddings_from_before_the_removal_are_not_accepted_after_attaching_again(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        positive, negative = encode(pipe, CAT)
    with eraser.attach(pipe), pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
        draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


@pytest.mark.parametrize("place", ["text_encoder", "layer"])
def test_a_replaced_text_encoder_is_an_error(pipe: Any, eraser: Eraser, place: str) -> None:
    with eraser.attach(pipe):
        draw(pipe, CAT)
        if place == "text_encoder":
            pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
            message = "text_encoder was replaced after the eraser was attached; remove and attach it again"
        else:
            fresh = build_text_encoder(pipe.tokenizer).encoder.layers[1]
            pipe.text_encoder.encoder.layers[1] = fresh
            message = r"the gate at text_encoder:encoder\.layers\.1 did not run while the prompt was encoded"
        with pytest.raises(RuntimeError, match=message):
            draw(pipe, CAT)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_text_encoder_that_was_written_to_is_an_error_before_and_behind_the_hook_point(
    pipe: Any, eraser: Eraser, layer: int
) -> None:
    with eraser.attach(pipe):
        weight = pipe.text_encoder.encoder.layers[layer].mlp.fc1.weight
        kept = weight.clone()
        weight.mul_(-3)
        with pytest.raises(RuntimeError, match="text_encoder was changed after the eraser was attached"):
            draw(pipe, CAT)
        weight.copy_(kept)
        draw(pipe, CAT)
        pipe.text_encoder.to(torch.float64).to(torch.float32)
        draw(pipe, CAT)


def test_pipelines_that_share_an_image_model_are_not_both_gated(pipe: Any, eraser: Eraser) -> None:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    plain = draw(pipe, CAT)
    with eraser.attach(pipe):
        with pytest.raises(ValueError, match="another pipeline shares this image model and has an eraser attached"):
            eraser.attach(other)
        with pytest.raises(RuntimeError, match="let the pipeline that it is attached to encode the prompt"):
            draw(other, CAT)
        assert same(draw(pipe, CAT), plain)
    with eraser.attach(other):
        assert same(draw(other, CAT), plain)


def test_a_replaced_image_model_is_an_error(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        pipe.unet = copy.deepcopy(pipe.unet)
        with pytest.raises(RuntimeError, match="the image model was replaced"):
            draw(pipe, CAT)


def test_threads_that_share_a_pipeline_are_gated_each_for_itself(pipe: Any, eraser: Eraser) -> None:
    prompts = [(HOUSE, CAT), (CAT, HOUSE)] * 8
    with eraser.attach(pipe) as attached, ThreadPoolExecutor(4) as pool:
        gated = list(pool.map(lambda pair: encode(pipe, *pair), prompts))
        assert (attached.n_prompts, attached.n_fired) == (16, 8)
        alone = [encode(pipe, *pair) for pair in prompts[:2]]
    for i, states in enumerate(gated):
        assert torch.equal(states[0], alone[i % 2][0])


def test_checking_in_other_threads_does_not_disturb_the_gate(pipe: Any, eraser: Eraser) -> None:
    wanted = {prompt: eraser.check(pipe, [prompt], allow_new_words=True)[0].fired for prompt in (HOUSE, CAT, BOAT)}

    def check(prompt: str) -> bool:
        return eraser.check(pipe, [prompt], allow_new_words=True)[0].fired  # which remembers nothing

    with eraser.attach(pipe) as attached, ThreadPoolExecutor(4) as pool:
        alone = {prompt: encode(pipe, prompt)[0] for prompt in wanted}
        checked = [(prompt, pool.submit(check, prompt)) for prompt in [*wanted] * 10]
        encoded = [(prompt, pool.submit(encode, pipe, prompt)) for prompt in [*wanted] * 10]
        assert all(found.result() == wanted[prompt] for prompt, found in checked)
        assert all(torch.equal(found.result()[0], alone[prompt]) for prompt, found in encoded)
    assert (attached.n_prompts, attached.n_fired) == (33, 11)


def test_prompts_are_checked_alike_with_and_without_an_attached_eraser(pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> None:
    plain = [check.score for check in boat_eraser.check(pipe, [CAT, HOUSE, BOAT])]
    with eraser.attach(pipe) as attached:
        assert [check.score for check in boat_eraser.check(pipe, [CAT, HOUSE, BOAT])] == plain
        assert (attached.n_prompts, attached.decisions) == (0, [])


def test_a_hook_that_was_taken_off_is_an_error(pipe: Any, eraser: Eraser, site: HookPoint) -> None:
    with eraser.attach(pipe):
        site.resolve(pipe)._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="did not run while the prompt was encoded; nothing was generated"):
            draw(pipe, CAT)


def test_the_encoder_of_another_eraser_does_not_excuse_a_gate_that_did_not_run(xl_pipe: Any) -> None:
    eraser = xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1"))
    with eraser.attach(xl_pipe, ungated=["text_encoder_2"]):
        xl_pipe.text_encoder.encoder.layers[1]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="did not run while the prompt was encoded"):
            encode(xl_pipe, CAT)


@pytest.mark.parametrize("position", [3, 23])
def test_nan_activations_are_an_error(pipe: Any, eraser: Eraser, position: int) -> None:
    with eraser.attach(pipe):
        draw(pipe, CAT)
        pipe.text_encoder.embeddings.position_embedding.weight[position] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinity: the text encoder overflowed"):
            draw(pipe, CAT)


def test_after_an_error_the_gate_is_still_armed(pipe: Any, eraser: Eraser) -> None:
    ids = pipe.tokenizer([HOUSE], padding="max_length", return_tensors="pt").input_ids
    plain, weight = pipe.text_encoder(ids).last_hidden_state, pipe.text_encoder.embeddings.position_embedding.weight
    kept = weight[3].clone()
    with eraser.attach(pipe):
        weight[3] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            draw(pipe, CAT)
        weight[3] = kept
        assert not torch.equal(pipe.text_encoder(ids).last_hidden_state, plain)
        assert not torch.equal(pipe.text_encoder(ids).last_hidden_state, plain)


def test_an_altered_result_of_encode_prompt_does_not_reach_the_image_model(pipe: Any, eraser: Eraser) -> None:
    foreign = encode(pipe, HOUSE)[0]
    with eraser.attach(pipe):
        gated = pipe.encode_prompt
        pipe.encode_prompt = lambda *args, **kwargs: (foreign, gated(*args, **kwargs)[1])
        with pytest.raises(RuntimeError, match="text states reached the image model without passing the gate"):
            draw(pipe, CAT)
        pipe.encode_prompt = lambda *args, **kwargs: gated(*args, **kwargs)
        draw(pipe, CAT)
        pipe.encode_prompt = gated


def test_the_image_model_called_with_foreign_states_is_an_error(pipe: Any, eraser: Eraser) -> None:
    foreign = encode(pipe, HOUSE)[0]
    sample = torch.zeros(1, 4, 8, 8)
    with eraser.attach(pipe):
        own = encode(pipe, HOUSE)[0]
        pipe.unet(sample, 1, own)
        pipe.unet(sample, 1, encoder_hidden_states=own)
        for states in (foreign, own + 1e-4, torch.cat([own, foreign]), own[:, :-1]):
            with pytest.raises(RuntimeError, match="without passing the gate"):
                pipe.unet(sample, 1, states)
            with pytest.raises(RuntimeError, match="without passing the gate"):
                pipe.unet(sample, 1, encoder_hidden_states=states)
    pipe.unet(sample, 1, foreign)


def test_another_pipeline_over_the_same_parts_does_not_get_around_the_gate(pipe: Any, eraser: Eraser) -> None:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain = draw(other, CAT)
    with eraser.attach(pipe), pytest.raises(RuntimeError, match="without passing the gate"):
        draw(other, HOUSE)
    assert same(draw(other, CAT), plain)


def test_token_ids_that_cannot_be_seen_are_an_error(pipe: Any, eraser: Eraser) -> None:
    states = torch.zeros(1, 24, 32)
    with eraser.attach(pipe), pytest.raises(RuntimeError, match="called without input_ids: the gate cannot see the prompt"):
        pipe.text_encoder.encoder(inputs_embeds=states)


def test_another_text_encoder_is_an_error_when_attaching(pipe: Any, eraser: Eraser, tokenizer: Any) -> None:
    pipe.text_encoder = build_text_encoder(tokenizer, seed=8)
    n_hooks = hooks_of(pipe)
    with pytest.raises(ValueError, match="made for another text encoder"):
        eraser.attach(pipe)
    assert hooks_of(pipe) == n_hooks
    assert "encode_prompt" not in vars(pipe)


def test_an_unknown_hook_point_is_an_error_when_attaching(pipe: Any, eraser: Eraser) -> None:
    with pytest.raises(ValueError, match=r"near matches: .*encoder\.layers\.1"):
        replace(eraser, hook_point=HookPoint("text_encoder", "encoder.layer.1")).attach(pipe)


def test_a_pipeline_without_encode_prompt_is_an_error(eraser: Eraser) -> None:
    with pytest.raises(ValueError, match="SimpleNamespace has no encode_prompt"):
        eraser.attach(SimpleNamespace())


# Hook points, precision, pipelines


@pytest.mark.parametrize("path", ["encoder.layers.1", "text_model.encoder.layers.1"])
def test_both_spellings_of_the_hook_point_work(pipe: Any, eraser: Eraser, path: str) -> None:
    with eraser.attach(pipe):
        expected = draw(pipe, HOUSE)
    with replace(eraser, hook_point=HookPoint("text_encoder", path)).attach(pipe):
        assert same(draw(pipe, HOUSE), expected)


def test_a_half_precision_pipeline_is_gated(pipe: Any, eraser: Eraser) -> None:
    pipe.to(torch.bfloat16)
    plain = {prompt: draw(pipe, prompt) for prompt in (HOUSE, CAT)}
    with eraser.attach(pipe):
        assert same(draw(pipe, CAT), plain[CAT])
        assert not same(draw(pipe, HOUSE), plain[HOUSE])


def test_a_tensor_is_known_by_its_bits_type_and_shape() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    assert digest(a) == digest(a.clone()) == digest(a.T.contiguous().T)
    others = [a + 1, a.reshape(3, 2), a.view(torch.int32), a.double(), a.to(torch.bfloat16), a[0], a[0, 0]]
    assert len({digest(each) for each in [a, *others]}) == 8


def test_an_attached_pipeline_keeps_no_embeddings_alive(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        draw(pipe, CAT)
        gc.collect()
        shape = encode(pipe, CAT)[0].shape
        before = sum(type(x) is Tensor and x.shape == shape for x in gc.get_objects())
        for _ in range(5):
            encode(pipe, CAT)
        gc.collect()
        assert sum(type(x) is Tensor and x.shape == shape for x in gc.get_objects()) == before


def xl_eraser(pipe: Any, site: HookPoint) -> Eraser:
    """Make an eraser for an encoder of the SDXL pipeline that fires on "house"."""
    sae = make_sae(pipe, site)
    return make_eraser(pipe, sae, "house", site)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_in_an_xl_pipeline_the_layer_before_the_last_is_edited_where_it_is_read(xl_pipe: Any, encoder: str) -> None:
    """SDXL conditions on `hidden_states[-2]`, which transformers records with a hook of its own."""
    eraser = xl_eraser(xl_pipe, HookPoint(encoder, f"encoder.layers.{N_LAYERS - 2}"))
    half = slice(0, 32) if encoder == "text_encoder" else slice(32, 64)
    other = slice(32, 64) if encoder == "text_encoder" else slice(0, 32)
    plain = {prompt: encode(xl_pipe, prompt) for prompt in (HOUSE, CAT)}
    with eraser.attach(xl_pipe, ungated=[{"text_encoder": "text_encoder_2"}.get(encoder, "text_encoder")]):
        house, cat = encode(xl_pipe, HOUSE), encode(xl_pipe, CAT)
    changed = (house[0][..., half] != plain[HOUSE][0][..., half]).any(-1)[0]
    assert not changed[0]
    assert changed[1:].any()
    assert torch.equal(house[0][..., other], plain[HOUSE][0][..., other])
    for after, before in zip(cat, plain[CAT], strict=True):
        assert torch.equal(after, before)


def test_images_of_an_xl_pipeline_are_gated(xl_pipe: Any, tokenizer: Any) -> None:
    plain = {prompt: draw(xl_pipe, prompt) for prompt in (HOUSE, CAT)}
    negative = draw(xl_pipe, CAT, negative_prompt=HOUSE)
    attributes = set(vars(xl_pipe))
    with xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1")).attach(xl_pipe, ungated=["text_encoder_2"]):
        assert same(draw(xl_pipe, CAT), plain[CAT])
        assert not same(draw(xl_pipe, HOUSE), plain[HOUSE])
        assert same(draw(xl_pipe, CAT, negative_prompt=HOUSE), negative)
    assert set(vars(xl_pipe)) == attributes
    assert same(draw(xl_pipe, HOUSE), plain[HOUSE])
    assert same(draw(xl_pipe, HOUSE), draw(build_xl_pipeline(tokenizer), HOUSE))


def test_an_xl_pipeline_may_give_its_second_encoder_other_prompts(xl_pipe: Any) -> None:
    seconds = {"prompt_2": [CAT, BOAT], "negative_prompt": [BOAT, ""], "negative_prompt_2": ["", CAT]}
    eraser = xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1"))
    with eraser.attach(xl_pipe, ungated=["text_encoder_2"]) as attached:
        draw(xl_pipe, [HOUSE, CAT], **seconds)
        assert [decision.fired for decision in attached.decisions] == [True, False]


def test_embeddings_of_an_xl_pipeline_are_checked(xl_pipe: Any) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    eraser = xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1"))
    foreign = dict(zip(names, encode(xl_pipe, HOUSE), strict=True))
    with eraser.attach(xl_pipe, ungated=["text_encoder_2"]):
        own = dict(zip(names, encode(xl_pipe, HOUSE), strict=True))
        draw(xl_pipe, None, **own)
        with pytest.raises(ValueError, match=r"^prompt_embeds did not pass the gate"):
            draw(xl_pipe, None, **foreign)
        with pytest.raises(ValueError, match="pooled_prompt_embeds did not pass the gate"):
            draw(xl_pipe, None, **(own | {"pooled_prompt_embeds": foreign["pooled_prompt_embeds"] + 1}))


def test_a_prompt_beside_its_pooled_embedding_is_gated(xl_pipe: Any) -> None:
    names = "text_encoder", "text_encoder_2"
    first, second = (xl_eraser(xl_pipe, HookPoint(name, "encoder.layers.1")) for name in names)
    with first.attach(xl_pipe) as attached, second.attach(xl_pipe) as other:
        pooled = encode(xl_pipe, CAT)[2]
        gated = draw(xl_pipe, HOUSE, pooled_prompt_embeds=pooled, negative_prompt=HOUSE)
        assert (attached.n_fired, other.n_fired) == (1, 1)
    assert not same(gated, draw(xl_pipe, HOUSE, pooled_prompt_embeds=pooled, negative_prompt=HOUSE))


def test_where_no_positive_text_is_known_nothing_passes_as_negative(pipe: Any, eraser: Eraser) -> None:
    encode_prompt = pipe.encode_prompt

    def encode_edits(edit: str, negative_prompt: str) -> tuple[Tensor, ...]:
        return encode_prompt(edit, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                             negative_prompt=negative_prompt)  # fmt: skip

    pipe.encode_prompt = encode_edits
    with eraser.attach(pipe) as attached:
        pipe.encode_prompt(HOUSE, negative_prompt=HOUSE)
    assert [decision.fired for decision in attached.decisions] == [True, True]


def test_an_attachment_that_fails_leaves_the_pipeline_as_it_was(
    pipe: Any, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    plain = draw(pipe, HOUSE)
    origin = PictureGate.origin_of(pipe)
    gate = PictureGate(("house",), torch.zeros(1, len(origin)), torch.zeros(1), CAT, origin=origin)
    monkeypatch.setattr(PictureGate, "require_image_model", full)
    with pytest.raises(MemoryError):
        replace(eraser, picture=gate).attach(pipe)
    assert hooks_of(pipe) == 0
    assert same(draw(pipe, HOUSE), plain)


def test_an_eraser_that_is_made_on_an_attached_pipeline_is_the_same(pipe: Any, eraser: Eraser, sae: SAE) -> None:
    config = EraseConfig(n_features=16, pooled_gate=True, draft_gate=True)
    sets = prompts_of("boat"), prompts_of("dog", "horse", "house", "tree", "lamp", "cup")
    made = erase(pipe, sae, SITE, *sets, config=config)
    with eraser.attach(pipe) as attached:
        assert erase(pipe, sae, SITE, *sets, config=config).sha256 == made.sha256
    assert attached.n_prompts == 0


def test_recording_and_checking_on_an_attached_pipeline_see_what_the_encoder_computes(pipe: Any, eraser: Eraser) -> None:
    prompts = PromptSet.from_texts([CAT, BOAT])
    plain = record(pipe, SITE, prompts)
    with eraser.attach(pipe):
        assert torch.equal(record(pipe, SITE, prompts).x, plain.x)
        assert [check.fired for check in eraser.check(pipe, [HOUSE, CAT])] == [True, False]


# Long prompts and sides


def encode_in_parts(pipe: Any, size: int = 8, negative_first: bool = False) -> Any:
    """Return an `encode_prompt` as pipelines for long prompts have it: parts of the text, one call of the encoder for each."""

    def states(text: str) -> Tensor:
        ids = pipe.tokenizer(text, add_special_tokens=False).input_ids
        parts = [ids[i : i + size] for i in range(0, len(ids), size)] or [[]]
        rows = [[0, *part, *[1] * (size + 1 - len(part))] for part in parts]
        return torch.cat([pipe.text_encoder(torch.tensor([row])).last_hidden_state for row in rows], 1)

    def encode_prompt(prompt: Any, negative_prompt: Any = None, prompt_embeds: Any = None) -> tuple[Tensor, Tensor]:
        texts = [negative_prompt or "", prompt] if negative_first else [prompt, negative_prompt or ""]
        found = [states(text) for text in texts]
        return (found[1], found[0]) if negative_first else (found[0], found[1])

    return encode_prompt


LONG = "two people and a cat by a window in the park"


@pytest.mark.parametrize("negative_first", [False, True])
def test_every_part_of_a_long_prompt_is_gated_and_no_part_of_the_negative_one(
    pipe: Any, eraser: Eraser, negative_first: bool
) -> None:
    pipe.encode_prompt = encode_in_parts(pipe, negative_first=negative_first)
    plain = pipe.encode_prompt(f"{LONG} {HOUSE}", LONG), pipe.encode_prompt(LONG, f"{LONG} {HOUSE}")
    assert plain[0][0].shape[1] == 20
    with eraser.attach(pipe) as attached:
        positive, _ = pipe.encode_prompt(f"{LONG} {HOUSE}", LONG)
        assert [decision.fired for decision in attached.decisions].count(True) == 1
        assert torch.equal(positive[:, :10], plain[0][0][:, :10])
        assert not torch.equal(positive[:, 10:], plain[0][0][:, 10:])
        passed = pipe.encode_prompt(LONG, f"{LONG} {HOUSE}")
        assert torch.equal(passed[0], plain[1][0])
        assert torch.equal(passed[1], plain[1][1])
        assert attached.n_fired == 1


@pytest.mark.parametrize("negative_first", [False, True])
def test_where_the_order_is_not_known_a_text_on_both_sides_is_gated_on_both(
    pipe: Any, eraser: Eraser, negative_first: bool
) -> None:
    pipe.encode_prompt = encode_in_parts(pipe, negative_first=negative_first)
    plain = pipe.encode_prompt(HOUSE, HOUSE)
    with eraser.attach(pipe):
        assert not any(torch.equal(a, b) for a, b in zip(pipe.encode_prompt(HOUSE, HOUSE), plain, strict=True))


def test_parts_that_repeat_are_all_gated(pipe: Any, eraser: Eraser) -> None:
    pipe.encode_prompt = encode_in_parts(pipe, size=5)
    with eraser.attach(pipe) as attached:
        pipe.encode_prompt(" ".join([HOUSE] * 3), HOUSE)
        assert [decision.fired for decision in attached.decisions] == [True] * 4


def test_an_encode_prompt_that_shows_the_gate_fewer_prompts_than_it_was_given_is_an_error(pipe: Any, eraser: Eraser) -> None:
    encode_one = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, *args, **kwargs: encode_one(prompt[0], *args, **kwargs)
    with eraser.attach(pipe), pytest.raises(RuntimeError, match="did not run while the prompt was encoded"):
        pipe.encode_prompt(prompt=[CAT, HOUSE], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


@pytest.mark.parametrize(
    ("positive", "negative", "calls", "expected"),
    [
        ([[1, 2]], [[]], [[[1, 2]], [[]]], [[True], [False]]),
        ([[]], [[]], [[[]], [[]]], [[True], [False]]),
        ([[]], [[1, 2]], [[[]], [[1, 2]]], [[True], [False]]),
        ([[1, 2]], [[1, 2]], [[[1, 2]], [[1, 2]]], [[True], [False]]),
        ([[1, 2], [3]], [[], []], [[[1, 2], [3]], [[], []]], [[True, True], [False, False]]),
        ([[1, 2], [3]], [[], []], [[[], [], [1, 2], [3]]], [[False, False, True, True]]),
        ([[1, 2, 3, 4]], [[3, 4]], [[[1, 2]], [[3, 4]], [[3, 4]]], [[True], [True], [False]]),
        ([[1, 2]], [[5, 1, 2]], [[[1, 2]], [[5, 1, 2]]], [[True], [False]]),
        ([[1, 2]], [[5]], [[[9, 9]], [[5]]], [[True], [False]]),
        ([], [[5]], [[[5]], [[6]]], [[False], [True]]),
    ],
)  # fmt: skip
def test_a_row_passes_only_if_it_is_of_the_negative_prompt(
    positive: list[list[int]], negative: list[list[int]], calls: list[list[list[int]]], expected: list[list[bool]]
) -> None:
    roles = Roles(positive, negative, ordered=True)
    assert [roles.gated(rows) for rows in calls] == expected
    assert roles.n_gated == sum(map(sum, expected))


def test_embeddings_issued_as_negative_do_not_come_back_as_positive(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        positive, negative = encode(pipe, CAT, HOUSE)
        draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        with pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
            draw(pipe, None, prompt_embeds=negative, negative_prompt_embeds=positive)
        empty = encode(pipe, "", "")
        draw(pipe, None, prompt_embeds=empty[1], negative_prompt_embeds=empty[0])


def test_where_sides_are_not_known_no_embeddings_come_back(pipe: Any, eraser: Eraser) -> None:
    pipe.encode_prompt = encode_in_parts(pipe)
    with eraser.attach(pipe):
        positive, _ = pipe.encode_prompt(CAT)
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, positive)
        with pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
            pipe.encode_prompt(None, prompt_embeds=positive)


def test_what_is_remembered_of_issued_embeddings_is_bounded(pipe: Any, eraser: Eraser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment_module, "ISSUED_ROWS", 4)
    with eraser.attach(pipe):
        old = encode(pipe, CAT)
        kept = vars(pipe)["_itd_enforcer"].issued
        for prompt in ("a dog", "a horse", "a tree"):
            new = encode(pipe, prompt)
            assert len(kept) <= 4
        draw(pipe, None, prompt_embeds=new[0], negative_prompt_embeds=new[1])
        with pytest.raises(ValueError, match="prompt_embeds did not pass the gate"):
            draw(pipe, None, prompt_embeds=old[0], negative_prompt_embeds=old[1])


def test_states_that_are_written_to_between_steps_are_an_error(pipe: Any, eraser: Eraser) -> None:
    foreign, sample = encode(pipe, HOUSE)[0], torch.zeros(1, 4, 8, 8)
    with eraser.attach(pipe):
        own = encode(pipe, CAT)[0]
        pipe.unet(sample, 1, own)
        pipe.unet(sample, 1, own)
        own.copy_(foreign)
        with pytest.raises(RuntimeError, match="without passing the gate"):
            pipe.unet(sample, 1, own)


# Several text encoders


def test_a_text_encoder_without_a_gate_is_an_error_unless_it_is_accepted(xl_pipe: Any) -> None:
    first = xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1"))
    with first.attach(xl_pipe), pytest.raises(RuntimeError, match="text_encoder_2 reads the prompt too and no attached eraser"):
        draw(xl_pipe, CAT)
    with first.attach(xl_pipe, ungated=["text_encoder_2"]):
        draw(xl_pipe, CAT)
    with pytest.raises(ValueError, match=r"no text encoder 'text_encoder_3'; it has \['text_encoder', 'text_encoder_2'\]"):
        first.attach(xl_pipe, ungated=["text_encoder_3"])


def test_with_an_eraser_on_each_text_encoder_both_halves_are_gated(xl_pipe: Any) -> None:
    erasers = [xl_eraser(xl_pipe, HookPoint(name, "encoder.layers.1")) for name in ("text_encoder", "text_encoder_2")]
    plain = {prompt: encode(xl_pipe, prompt)[0] for prompt in (HOUSE, CAT)}
    with erasers[0].attach(xl_pipe), erasers[1].attach(xl_pipe):
        house, cat = encode(xl_pipe, HOUSE)[0], encode(xl_pipe, CAT)[0]
        own = xl_pipe.encode_prompt(CAT, "a different house", device="cpu", num_images_per_prompt=1)
        second = vars(xl_pipe)["_itd_enforcer"].attachments[1]
        assert [decision.fired for decision in second.decisions] == [True]
    assert torch.equal(cat, plain[CAT])
    for half in (slice(0, 32), slice(32, 64)):
        assert not torch.equal(house[..., half], plain[HOUSE][..., half])
    assert torch.equal(own[0][..., :32], plain[CAT][..., :32])


def test_pooled_states_are_guarded_at_the_image_model_too(xl_pipe: Any) -> None:
    eraser = xl_eraser(xl_pipe, HookPoint("text_encoder", "encoder.layers.1"))
    with eraser.attach(xl_pipe, ungated=["text_encoder_2"]):
        states, _, pooled, _ = encode(xl_pipe, CAT)
        sample, ids = torch.zeros(1, 4, 8, 8), torch.zeros(1, 6)
        xl_pipe.unet(sample, 1, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids})
        with pytest.raises(RuntimeError, match="without passing the gate"):
            xl_pipe.unet(sample, 1, states, added_cond_kwargs={"text_embeds": pooled + 1, "time_ids": ids})
