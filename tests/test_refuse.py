"""The edit `refuse`: whatever gate finds a prompt, the anchor's picture is drawn instead, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import SITE, assert_draws_instead, make_eraser, make_sae, telling_apart
from torch import Tensor

from itd import Eraser, HookPoint
from itd.attacks.diffusion import encode
from itd.eraser import ANCHOR, Edit
from itd.pipelines import pooled_embeddings, tokenize
from itd.pooled import PooledGate

CUP = "a cup"
NAMED, MEANT, OTHERS = "a house by the window", "a big red lamp", ["a photo of a dog", ""]
PROMPTS = [OTHERS[0], NAMED, OTHERS[1], MEANT]


def states_of(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    return pipe.encode_prompt(prompts, "cpu", 1, bool(options), **options)[0]


@pytest.fixture
def refusing(eraser: Eraser) -> Eraser:
    return replace(eraser, edit=Edit("refuse", anchor=CUP))


@pytest.fixture
def strict(pipe: Any, refusing: Eraser) -> Eraser:
    """The same with a second gate, which knows `MEANT`."""
    embeddings = pooled_embeddings(pipe, "text_encoder", [MEANT, *OTHERS, CUP])
    return replace(refusing, pooled=PooledGate(("lamp",), *telling_apart(embeddings), CUP))


def test_a_refused_prompt_gets_the_anchors_states_and_the_others_keep_their_bits(pipe, refusing):
    plain, anchor = states_of(pipe, PROMPTS), states_of(pipe, [CUP])[0]
    with refusing.attach(pipe) as attached:
        found = states_of(pipe, PROMPTS)
        assert [decision.fired for decision in attached.decisions] == [False, True, False, False]
    torch.testing.assert_close(found[1], anchor)
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    assert torch.equal(states_of(pipe, PROMPTS), plain)


def test_what_either_gate_finds_is_refused(pipe, strict):
    anchor = states_of(pipe, [CUP])[0]
    with strict.attach(pipe) as attached:
        found = states_of(pipe, PROMPTS)
        assert [decision.fired for decision in attached.decisions] == [False, True, False, True]
    torch.testing.assert_close(found[1], anchor)
    torch.testing.assert_close(found[3], anchor)


def test_the_picture_of_a_refused_prompt_is_the_anchors(pipe, refusing):
    assert_draws_instead(refusing, pipe, NAMED, CUP)


def test_negative_prompts_are_not_refused(pipe, refusing):
    plain = pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[NAMED])[1]
    with refusing.attach(pipe):
        assert torch.equal(pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[NAMED])[1], plain)


def test_every_output_of_an_encoder_is_the_anchors(xl_pipe):
    site = HookPoint("text_encoder_2", str(SITE).split(":")[1])
    eraser = replace(make_eraser(xl_pipe, make_sae(xl_pipe, site), "cat", site), edit=Edit("refuse", anchor=CUP))
    wanted = xl_pipe.encode_prompt([CUP], device="cpu", do_classifier_free_guidance=False)
    with eraser.attach(xl_pipe, ungated=["text_encoder"]):
        states, _, pooled, _ = xl_pipe.encode_prompt(["a cat"], device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(pooled, wanted[2])
    torch.testing.assert_close(states[:, :, 32:], wanted[0][:, :, 32:])


def test_attackers_differentiate_what_is_attached(pipe, strict):
    with strict.attach(pipe):
        wanted = states_of(pipe, PROMPTS)
    found = encode(pipe, tokenize(pipe, "text_encoder", PROMPTS).input_ids, eraser=strict)
    torch.testing.assert_close(found.states, wanted)
    assert found.margins is not None
    assert (found.margins >= 0).tolist() == [False, True, False, True]


def test_an_eraser_is_made_to_refuse_afterwards_and_read_back(pipe, eraser, tmp_path):
    made = replace(eraser, sae=eraser.sae.save(tmp_path / "sae")).with_edit("refuse")
    assert made.edit == Edit("refuse", eraser.edit.strength, eraser.edit.n_features, ANCHOR)
    other = replace(made, edit=replace(made.edit, anchor=CUP))
    other.save(tmp_path / "eraser")
    assert Eraser.load(tmp_path / "eraser").edit.anchor == CUP
    with pytest.raises(ValueError, match=r"join only with the same edit: .*anchor='a picture of something'.*anchor='a cup'"):
        made | other
