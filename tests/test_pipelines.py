from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import MAX_TOKENS, build_text_encoder

from itd import HookPoint
from itd.hooks import before_forward
from itd.pipelines import (
    activations,
    begin_token,
    content_end,
    content_mask,
    device_of,
    edit_mask,
    encoder_of,
    fingerprint,
    image_model,
    is_causal,
    tokenize,
    tokenizer_of,
)  # fmt: skip

LONG = "a small red cat by the window of a house in the park at night and a big dog on a table with two people"
PROMPTS = ["a photo of a cat", "", "my house at night", LONG]


def encoder_calls(pipe: Any, encoder: str, prompts: list[str]) -> list[tuple[Any, Any]]:
    """Return (input_ids, attention_mask) of every call that the pipeline itself makes to an encoder."""
    calls: list[tuple[Any, Any]] = []

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")))

    with before_forward(getattr(pipe, encoder), look):
        pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return calls


# Tokens


def test_prompts_are_tokenized_as_the_pipeline_does(pipe: Any) -> None:
    tokens = tokenize(pipe, "text_encoder", PROMPTS)
    ids, mask = encoder_calls(pipe, "text_encoder", PROMPTS)[0]
    assert torch.equal(tokens.input_ids, ids)
    assert tokens.attention_mask is None
    assert mask is None
    assert tokens.input_ids.shape == (4, MAX_TOKENS)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_both_encoders_of_an_xl_pipeline_get_the_tokens_that_it_makes(xl_pipe: Any, encoder: str) -> None:
    ids, _ = encoder_calls(xl_pipe, encoder, PROMPTS)[0]
    assert torch.equal(tokenize(xl_pipe, encoder, PROMPTS).input_ids, ids)


def test_the_attention_mask_is_passed_where_the_pipeline_passes_it(pipe: Any) -> None:
    pipe.text_encoder.config.use_attention_mask = True
    _, mask = encoder_calls(pipe, "text_encoder", PROMPTS)[0]
    found = tokenize(pipe, "text_encoder", PROMPTS).attention_mask
    assert found is not None
    assert torch.equal(found, mask)


def test_textual_inversion_tokens_are_expanded_where_the_pipeline_would(pipe: Any) -> None:
    pipe.maybe_convert_prompt = lambda prompt, tokenizer: prompt.replace("<pet>", "cat")
    tokens = tokenize(pipe, "text_encoder", ["a <pet>", "a cat"]).input_ids
    assert torch.equal(tokens[0], tokens[1])


def test_the_order_and_company_of_prompts_do_not_change_their_tokens(pipe: Any) -> None:
    together = tokenize(pipe, "text_encoder", PROMPTS).input_ids
    alone = torch.cat([tokenize(pipe, "text_encoder", [prompt]).input_ids for prompt in PROMPTS])
    assert torch.equal(together, alone)


def test_content_is_what_the_prompt_wrote(pipe: Any) -> None:
    ids = tokenize(pipe, "text_encoder", PROMPTS).input_ids
    mask = content_mask(ids, pipe.tokenizer)
    words = [pipe.tokenizer.convert_ids_to_tokens(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
    assert words[0] == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>"]
    assert words[1] == []
    assert words[2] == ["my</w>", "house</w>", "at</w>", "night</w>"]
    assert len(words[3]) == MAX_TOKENS - 2


def test_all_positions_but_the_begin_token_may_be_edited(pipe: Any) -> None:
    ids = tokenize(pipe, "text_encoder", PROMPTS).input_ids
    mask = edit_mask(ids, pipe.tokenizer)
    assert not mask[:, 0].any()
    assert mask[:, 1:].all()


def test_a_tokenizer_without_a_begin_token_writes_content_from_the_first_position() -> None:
    tokenizer = SimpleNamespace(eos_token_id=1, bos_token_id=None, pad_token_id=0)
    ids = torch.tensor([[7, 8, 1, 0, 0], [5, 6, 7, 8, 9]])
    assert content_mask(ids, tokenizer).tolist() == [[True, True, False, False, False], [True] * 5]
    assert edit_mask(ids, tokenizer).all()
    assert content_end(ids, tokenizer).tolist() == [2, 5]


def test_content_goes_on_after_an_end_token_that_the_prompt_wrote(pipe: Any) -> None:
    """The image model attends to every position: what stands behind a typed end token is drawn, and must be gated."""
    ids = tokenize(pipe, "text_encoder", ["a photo <|endoftext|> of a cat", "a cat<|endoftext|>"]).input_ids
    kept = [row[mask].tolist() for row, mask in zip(ids, content_mask(ids, pipe.tokenizer), strict=True)]
    assert pipe.tokenizer.convert_ids_to_tokens(kept[0]) == [
        "a</w>",
        "photo</w>",
        "<|endoftext|>",
        "of</w>",
        "a</w>",
        "cat</w>",
    ]
    assert pipe.tokenizer.convert_ids_to_tokens(kept[1]) == ["a</w>", "cat</w>"]


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_content_ends_where_end_tokens_and_padding_begin(pad: int | None) -> None:
    tokenizer = SimpleNamespace(eos_token_id=1, bos_token_id=2, pad_token_id=pad)
    padding = 1 if pad is None else pad
    ids = torch.tensor([[2, 7, 1, padding, padding], [2, 1, 7, 1, padding], [2, 7, 8, 9, 1], [2, 1, padding, padding, padding]])
    assert content_end(ids, tokenizer).tolist() == [2, 3, 4, 1]
    assert content_mask(ids, tokenizer).sum(1).tolist() == [1, 2, 3, 0]


def test_a_begin_token_that_equals_the_end_token_is_none() -> None:
    assert begin_token(SimpleNamespace(eos_token_id=1, bos_token_id=1)) is None
    assert begin_token(SimpleNamespace(eos_token_id=1, bos_token_id=0)) == 0


# Activations


def test_activations_are_the_hidden_states_after_the_layer(pipe: Any) -> None:
    tokens = tokenize(pipe, "text_encoder", PROMPTS)
    states = pipe.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        x = activations(pipe, HookPoint("text_encoder", f"encoder.layers.{layer}"), tokens)
        assert torch.equal(x, states[layer + 1])


def test_a_clip_text_encoder_is_causal(pipe: Any, site: HookPoint) -> None:
    ids = tokenize(pipe, "text_encoder", ["a photo of a cat", "a photo of a dog"])
    x = activations(pipe, site, ids)
    assert is_causal(pipe.text_encoder)
    torch.testing.assert_close(x[0, :5], x[1, :5])
    assert not torch.allclose(x[0, 5], x[1, 5])


def test_other_encoders_are_not_taken_for_causal() -> None:
    assert not is_causal(SimpleNamespace(config=SimpleNamespace(model_type="t5")))  # type: ignore[arg-type]


def test_the_fingerprint_tells_text_encoders_apart(pipe: Any, site: HookPoint, tokenizer: Any) -> None:
    mine, again = fingerprint(pipe, site), fingerprint(pipe, site)
    pipe.text_encoder = build_text_encoder(tokenizer, seed=8)
    other = fingerprint(pipe, site)
    assert torch.equal(mine, again)
    assert (other - mine).norm() > 0.3 * mine.norm()


def test_the_fingerprint_of_a_half_precision_copy_is_close(pipe: Any, site: HookPoint) -> None:
    mine = fingerprint(pipe, site)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder).to(torch.bfloat16)
    half = fingerprint(pipe, site)
    assert half.dtype == torch.float32
    assert 0 < (half - mine).norm() < 0.03 * mine.norm()


# Parts


def test_parts_are_found_by_name(xl_pipe: Any) -> None:
    assert encoder_of(xl_pipe, "text_encoder_2") is xl_pipe.text_encoder_2
    assert tokenizer_of(xl_pipe, "text_encoder_2") is xl_pipe.tokenizer_2
    assert image_model(xl_pipe) is xl_pipe.unet
    assert image_model(SimpleNamespace(transformer=xl_pipe.unet)) is xl_pipe.unet


def test_parts_that_are_missing_are_named(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no encoder 'text_encoder_2'"):
        encoder_of(pipe, "text_encoder_2")
    with pytest.raises(ValueError, match="no 'tokenizer_2' for the encoder 'text_encoder_2'"):
        tokenizer_of(pipe, "text_encoder_2")
    with pytest.raises(ValueError, match="SimpleNamespace has neither a unet nor a transformer"):
        image_model(SimpleNamespace())


def test_under_offloading_a_module_is_where_it_computes() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2)).to("meta")
    assert device_of(module).type == "meta"
    for part, device in ((module, None), (module[0], "cpu")):  # as accelerate marks a module and its leaves
        part._hf_hook = SimpleNamespace(execution_device=device)
    assert device_of(module) == torch.device("cpu")
