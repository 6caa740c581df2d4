"""The second gate, on the pooled embedding: that it is enforced as the first one is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import SITE, assert_check_says_what_is_enforced, assert_draws_instead, make_eraser, make_sae, telling_apart
from torch import Tensor

from itd import Eraser, HookPoint
from itd.attacks.diffusion import encode
from itd.pipelines import pooled_embeddings, tokenize
from itd.pooled import PooledGate, put_instead

ANCHOR = "a cup"
MEANT, OTHERS = "a big red lamp", ["a photo of a dog", "my horse at night", "", "one tree in the park"]
"""The eraser under test has features of `house` only: its first gate does not fire on any of these."""


def with_gate(pipe: Any, eraser: Eraser) -> Eraser:
    """Give an eraser a second gate that knows `MEANT` by its pooled embedding from the other prompts."""
    embeddings = pooled_embeddings(pipe, "text_encoder", [MEANT, *OTHERS, ANCHOR])
    return replace(eraser, pooled=PooledGate(("lamp",), *telling_apart(embeddings), ANCHOR))


def states_of(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    return pipe.encode_prompt(prompts, "cpu", 1, bool(options), **options)[0]


@pytest.fixture
def guarded(pipe, eraser) -> Eraser:
    assert not any(check.fired for check in eraser.check(pipe, [MEANT, *OTHERS]))
    return with_gate(pipe, eraser)


def test_a_prompt_that_means_the_concept_gets_the_anchors_states_and_the_others_keep_their_bits(pipe, guarded):
    prompts = [OTHERS[0], MEANT, *OTHERS[1:]]
    plain, anchor = states_of(pipe, prompts), states_of(pipe, [ANCHOR])
    with guarded.attach(pipe) as attached:
        erased, decisions = states_of(pipe, prompts), attached.decisions
        assert (attached.n_prompts, attached.n_fired) == (len(prompts), 1)
    assert [decision.fired for decision in decisions] == [prompt == MEANT for prompt in prompts]
    assert decisions[1].concepts == ()
    assert decisions[1].meaning is not None
    assert decisions[1].meaning.concepts == ("lamp",)
    torch.testing.assert_close(erased[1], anchor[0])
    kept = [i for i, prompt in enumerate(prompts) if prompt != MEANT]
    assert torch.equal(erased[kept], plain[kept])
    assert torch.equal(states_of(pipe, prompts), plain)


def test_negative_prompts_pass_the_second_gate(pipe, guarded):
    plain = pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[MEANT])[1]
    with guarded.attach(pipe):
        assert torch.equal(pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[MEANT])[1], plain)


def test_pictures_behind_the_second_gate_are_the_anchors(pipe, guarded):
    assert_draws_instead(guarded, pipe, MEANT, ANCHOR)


def test_check_says_what_the_attached_gates_do(pipe, guarded):
    prompts = [MEANT, *OTHERS, "a house"]
    checks = assert_check_says_what_is_enforced(guarded, pipe, prompts)
    assert [check.concepts for check in checks[:-1]] == [("lamp",), *[()] * len(OTHERS)]
    assert checks[-1].concepts[0] == "house"
    assert checks[0].to_dict()["meaning"]["concepts"] == ("lamp",)
    assert "meaning" not in replace(guarded, pooled=None).check(pipe, [MEANT])[0].to_dict()


def test_two_erasers_on_one_encoder_do_not_see_the_anchor(pipe, guarded, boat_eraser):
    with guarded.attach(pipe) as first, boat_eraser.attach(pipe) as second:
        states_of(pipe, [MEANT, "a boat"])
    assert (first.n_prompts, second.n_prompts) == (2, 2)
    assert [decision.fired for decision in second.decisions] == [False, True]


def test_an_encoder_without_a_pooled_output_fails_closed(pipe, guarded, monkeypatch):
    monkeypatch.setattr("itd.pipelines.pooled_output", lambda output: None)
    with guarded.attach(pipe), pytest.raises(RuntimeError, match="returned no pooled embedding"):
        states_of(pipe, [MEANT])


def test_the_differentiable_second_gate_is_the_attached_one(pipe, guarded):
    prompts = [MEANT, *OTHERS]
    with guarded.attach(pipe):
        wanted = states_of(pipe, prompts)
    found = encode(pipe, tokenize(pipe, "text_encoder", prompts).input_ids, eraser=guarded)
    torch.testing.assert_close(found.states, wanted)
    assert found.margins is not None
    assert (found.margins >= 0).tolist() == [True] + [False] * len(OTHERS)


def test_a_projecting_encoder_is_gated_by_its_projected_embedding(xl_pipe, tokenizer):
    site = HookPoint("text_encoder_2", str(SITE).split(":")[1])
    embeddings = pooled_embeddings(xl_pipe, "text_encoder_2", [MEANT, ANCHOR])
    assert embeddings.shape == (2, 16)
    direction = (embeddings[0] - embeddings[1]) / (embeddings[0] - embeddings[1]).square().sum()
    guarded = replace(
        make_eraser(xl_pipe, make_sae(xl_pipe, site), "cat", site),
        pooled=PooledGate(("lamp",), direction[None], -(embeddings[1] @ direction)[None], ANCHOR),
    )
    plain = xl_pipe.encode_prompt([ANCHOR, MEANT], device="cpu", do_classifier_free_guidance=False)
    with guarded.attach(xl_pipe, ungated=["text_encoder"]):
        states, _, pooled, _ = xl_pipe.encode_prompt([ANCHOR, MEANT], device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(pooled[1], plain[2][0])
    torch.testing.assert_close(states[1, :, 32:], plain[0][0, :, 32:])
    assert torch.equal(states[0], plain[0][0])


def test_rows_are_replaced_in_every_tensor_of_a_result():
    result = {"states": torch.zeros(3, 2), "all": (torch.zeros(3, 1), None)}
    other = {"states": torch.ones(1, 2), "all": (torch.ones(1, 1), None)}
    found = put_instead(result, other, torch.tensor([1]))
    assert found["states"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert found["all"][0].tolist() == [[0], [1], [0]]
    assert found["all"][1] is None
    assert not result["states"].any()


def test_what_was_checked_is_forgotten_when_a_layer_behind_the_hook_point_changes(pipe, guarded):
    first = guarded.check(pipe, [MEANT])[0].meaning
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.weight.neg_()
    again = guarded.check(pipe, [MEANT])[0].meaning
    assert again == replace(guarded).check(pipe, [MEANT])[0].meaning != first
