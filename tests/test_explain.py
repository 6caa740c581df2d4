from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from reference.features import dense_codes
from tiny import build_text_encoder, prompts_of

from itd import SAE, Eraser, HookPoint, PromptSet
from itd.activations import stream
from itd.explain import clean, top_prompts

PROMPTS = ["a photo of a house", "a photo of a cat", "", "two people and a house"]


def test_a_check_is_what_the_attached_eraser_decides(pipe: Any, eraser: Eraser) -> None:
    checks = eraser.check(pipe, PROMPTS)
    with eraser.attach(pipe) as attached:
        pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        decisions = attached.decisions
    assert [check.fired for check in checks] == [True, False, False, True]
    assert [check.fired for check in checks] == [decision.fired for decision in decisions]
    assert [check.score for check in checks] == pytest.approx([decision.score for decision in decisions], rel=1e-5)
    assert [check.threshold for check in checks] == [decision.threshold for decision in decisions]
    assert [check.prompt for check in checks] == PROMPTS


def test_prompts_are_checked_alike_alone_and_together(pipe: Any, eraser: Eraser) -> None:
    for check in eraser.check(pipe, PROMPTS):
        alone = eraser.check(pipe, check.prompt)[0]
        assert (alone.fired, alone.concepts, alone.prompt) == (check.fired, check.concepts, check.prompt)
        assert alone.score == pytest.approx(check.score, rel=1e-5)
    assert eraser.check(pipe, []) == []


def test_a_check_names_the_token_and_the_features_that_decided(pipe: Any, eraser: Eraser) -> None:
    check = eraser.check(pipe, "a photo of a house")[0]
    assert check.concepts == ("house",)
    assert [token for token, _ in check.tokens] == ["a", "photo", "of", "a", "house"]
    assert max(check.tokens, key=lambda pair: pair[1])[0] == "house"
    assert check.score == pytest.approx(max(score for _, score in check.tokens))
    acts = [hit.act for hit in check.features]
    assert acts == sorted(acts, reverse=True)
    assert 0 < len(acts) <= 8
    assert {hit.feature for hit in check.features} <= set(eraser.concepts[0].indices.tolist())
    assert {hit.concept for hit in check.features} == {"house"}


def test_the_features_of_a_check_are_the_most_active_of_the_concept(
    pipe: Any, sae: SAE, eraser: Eraser, site: HookPoint
) -> None:
    batch = next(stream(pipe, site, PromptSet.from_texts(["a photo of a house"])))
    codes = dense_codes(sae, batch.x[0][batch.content[0]])
    expected = {int(j): float(codes[:, j].max()) for j in eraser.concepts[0].indices if codes[:, j].max() > 0}
    found = {hit.feature: hit.act for hit in eraser.check(pipe, "a photo of a house")[0].features}
    assert len(found) == min(8, len(expected))
    for feature, act in found.items():
        assert act == pytest.approx(expected[feature], rel=1e-4)
    assert min(found.values()) >= sorted(expected.values(), reverse=True)[len(found) - 1] - 1e-4


def test_a_prompt_without_content_has_nothing_to_show(pipe: Any, eraser: Eraser) -> None:
    check = eraser.check(pipe, "")[0]
    assert (check.fired, check.concepts, check.tokens, check.features) == (False, (), (), ())
    assert check.score == -float("inf")


def test_a_check_of_two_concepts_names_the_one_that_fired(pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> None:
    both = eraser | boat_eraser
    fired = {prompt: both.check(pipe, prompt)[0].concepts for prompt in ("a house", "a boat", "a cat", "a house and a boat")}
    assert fired == {"a house": ("house",), "a boat": ("boat",), "a cat": (), "a house and a boat": ("house", "boat")}
    check = both.check(pipe, "a photo of a boat")[0]
    assert max(check.tokens, key=lambda pair: pair[1])[0] == "boat"


def test_a_check_becomes_plain_json(pipe: Any, eraser: Eraser) -> None:
    check = eraser.check(pipe, "a photo of a house")[0]
    values = json.loads(json.dumps(check.to_dict()))
    assert values["prompt"] == "a photo of a house"
    assert values["fired"] is True
    assert [entry["token"] for entry in values["tokens"]] == [token for token, _ in check.tokens]
    assert values["features"][0]["feature"] == check.features[0].feature


def test_a_check_with_another_text_encoder_is_an_error(pipe: Any, eraser: Eraser, tokenizer: Any) -> None:
    pipe.text_encoder = build_text_encoder(tokenizer, seed=8)
    with pytest.raises(ValueError, match="made for another text encoder"):
        eraser.check(pipe, "a house")


def test_checking_leaves_no_hook(pipe: Any, eraser: Eraser) -> None:
    eraser.check(pipe, PROMPTS)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in pipe.text_encoder.modules())


def test_tokens_are_shown_as_a_reader_writes_them() -> None:
    assert [clean(token) for token in ("cat</w>", "▁cat", "Ġcat", "ca")] == ["cat", "cat", "cat", "ca"]


def test_the_top_prompts_of_a_latent_are_those_where_it_is_most_active(
    pipe: Any, sae: SAE, eraser: Eraser, site: HookPoint
) -> None:
    prompts = prompts_of("house", "cat", "boat")
    feature = int(eraser.concepts[0].indices[eraser.concepts[0].weights.argmax()])
    batch = next(stream(pipe, site, prompts))
    best = [float(dense_codes(sae, x[mask])[:, feature].max()) for x, mask in zip(batch.x, batch.content, strict=True)]
    expected = sorted((act for act in best if act > 0), reverse=True)[:5]
    found = top_prompts(pipe, site, sae, feature, prompts, n=5)
    torch.testing.assert_close(torch.tensor([hit.act for hit in found]), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    for hit in found:
        assert hit.act == pytest.approx(best[prompts.texts.index(hit.prompt)], rel=1e-4)
        assert hit.token in hit.prompt


def test_a_latent_that_does_not_exist_is_an_error(pipe: Any, sae: SAE, site: HookPoint) -> None:
    for feature in (-1, 256):
        with pytest.raises(ValueError, match=f"feature {feature} is not in an autoencoder of 256 latents"):
            top_prompts(pipe, site, sae, feature, prompts_of("cat"))
