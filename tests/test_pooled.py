"""The second gate: its discriminant, and that it is enforced as the first one is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FRAMES, SITE, make_eraser, make_sae, prompts_of
from torch import Tensor

from itd import EraseConfig, Eraser, HookPoint, Retained, add_concepts, erase
from itd.attacks.diffusion import encode
from itd.gate import PART_WAY
from itd.pipelines import pooled_embeddings, tokenize
from itd.pooled import PooledGate, put_instead

ANCHOR = "a cup"
MEANT, OTHERS = "a big red lamp", ["a photo of a dog", "my horse at night", "", "one tree in the park"]
"""The eraser under test has features of `house` only: its first gate does not fire on any of these."""

OTHER_NOUNS = prompts_of("dog", "horse", "house", "tree")


def gaussian(mean: tuple[float, float], n: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(mean) + torch.randn(n, 2, generator=generator) * torch.tensor([1.0, 3.0])


def fitted(fpr: float = 0.02) -> PooledGate:
    own = gaussian((8.0, 3.0), seed=1), gaussian((8.0, 3.0), seed=2)
    return PooledGate.fit({"lamp": own}, (gaussian((0.0, 0.0), seed=3), gaussian((0.0, 0.0), seed=4)), fpr, ANCHOR)


# Discriminant


def test_the_direction_is_that_of_the_hand_computed_discriminant():
    others, own = gaussian((0.0, 0.0), seed=3), gaussian((8.0, 3.0), seed=1)
    a, b, c = others[:, 0].var(correction=0), others[:, 1].var(correction=0), (others - others.mean(0)).prod(1).mean()
    extra = PooledGate.shrinkage * (a + b) / 2
    a, b, (u, v) = a + extra, b + extra, own.mean(0) - others.mean(0)
    expected = torch.stack([b * u - c * v, a * v - c * u])  # adjugate of [[a, c], [c, b]] times the difference of means
    torch.testing.assert_close(
        torch.nn.functional.normalize(fitted().directions[0], dim=0), torch.nn.functional.normalize(expected, dim=0)
    )


def test_zero_is_what_retained_prompts_reach_and_one_what_the_concepts_do():
    gate = fitted(fpr=0.02)
    others, own = gate.scores(gaussian((0.0, 0.0), seed=4)), gate.scores(gaussian((8.0, 3.0), seed=2))
    assert (others >= 0).double().mean() <= 0.02
    assert own.quantile(0.05) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mean", "lowest", "highest"), [((8.0, 3.0), 0.95, 1.0), ((0.0, 0.0), 0.0, 0.01)])
def test_fresh_prompts_are_told_apart(mean, lowest, highest):
    fired = [bool(meaning.concepts) for meaning in fitted().decide(gaussian(mean, seed=9))]
    assert lowest <= sum(fired) / len(fired) <= highest


def test_a_concept_like_what_must_stay_fires_at_the_stated_rate_only():
    same = gaussian((0.0, 0.0), seed=5)
    gate = PooledGate.fit({"lamp": (same, same)}, (gaussian((0.0, 0.0), seed=3), gaussian((0.0, 0.0), seed=4)), 0.02, ANCHOR)
    assert (gate.scores(gaussian((0.0, 0.0), seed=4)) >= PART_WAY).double().mean() <= 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_could_not_fire_are_refused(value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        replace(fitted(), offsets=torch.tensor([value]))


def test_nan_embeddings_are_refused():
    with pytest.raises(ValueError, match="pooled embeddings contain NaN"):
        fitted().decide(torch.full((1, 2), math.nan))


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match="3 wide, the pooled gate was made for 2"):
        fitted().decide(torch.zeros(1, 3))


def test_numbers_of_names_and_directions_must_agree():
    with pytest.raises(ValueError, match="2 concepts need as many directions and offsets, got 1 and 1"):
        replace(fitted(), names=("lamp", "cup"))


# Joining


def test_joined_gates_decide_as_each_does_alone():
    first = fitted()
    second = PooledGate(("cup",), -first.directions, first.offsets, ANCHOR)
    joined, x = first | second, gaussian((8.0, 3.0), n=20)
    both = torch.cat([x, -x])
    torch.testing.assert_close(joined.scores(both), torch.cat([first.scores(both), second.scores(both)], 1))
    assert joined.names == ("lamp", "cup")


def test_what_both_have_is_joined_once():
    assert (fitted() | fitted()).names == ("lamp",)


def test_different_anchors_do_not_join():
    with pytest.raises(ValueError, match="pooled gates join only with the same anchor: 'a cup' and 'a tree'"):
        fitted() | replace(fitted(), anchor="a tree")


def test_erasers_join_only_if_both_or_neither_have_a_pooled_gate(pipe, eraser):
    guarded = with_gate(pipe, eraser)
    assert (guarded | guarded).pooled is not None
    for one, other in ((guarded, eraser), (eraser, guarded)):
        with pytest.raises(ValueError, match="joins only another with one"):
            one | other


# Enforcement


def with_gate(pipe: Any, eraser: Eraser) -> Eraser:
    """Give an eraser a second gate that knows `MEANT` by its pooled embedding from the other prompts."""
    embeddings = pooled_embeddings(pipe, "text_encoder", [MEANT, *OTHERS, ANCHOR])
    direction = torch.linalg.pinv(embeddings - embeddings[1:].mean(0)) @ torch.tensor([1.0] + [0.0] * (len(OTHERS) + 1))
    return replace(eraser, pooled=PooledGate(("lamp",), direction[None], -(embeddings[1:].mean(0) @ direction)[None], ANCHOR))


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
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    wanted = pipe([ANCHOR], generator=torch.Generator().manual_seed(0), **options).images
    with guarded.attach(pipe):
        found = pipe([MEANT], generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(found, wanted)


def test_check_says_what_the_attached_gates_do(pipe, guarded):
    prompts = [MEANT, *OTHERS, "a house"]
    with guarded.attach(pipe) as attached:
        states_of(pipe, prompts)
    checks = guarded.check(pipe, prompts)
    assert [check.fired for check in checks] == [decision.fired for decision in attached.decisions]
    assert [check.concepts for check in checks[:-1]] == [("lamp",), *[()] * len(OTHERS)]
    assert checks[-1].concepts[0] == "house"
    for check, decision in zip(checks, attached.decisions, strict=True):
        assert check.meaning is not None
        assert decision.meaning is not None
        assert check.meaning.score == pytest.approx(decision.meaning.score, abs=1e-4)
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


# Making and keeping


def test_erase_makes_a_second_gate_and_records_what_it_does(pipe, sae, tmp_path, saved_sae):
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=EraseConfig(pooled_gate=True))
    assert made.pooled is not None
    assert made.pooled.names == ("cat",)
    calibration = made.records[0]["pooled"]
    assert calibration["threshold"] == PART_WAY
    assert 0 <= calibration["recall"] <= 1
    made.save(tmp_path)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert loaded.pooled is not None
    assert loaded.pooled.anchor == EraseConfig().anchor
    prompts = [frame.format("cat") for frame in FRAMES] + OTHERS
    for mine, theirs in zip(loaded.check(pipe, prompts), made.check(pipe, prompts), strict=True):
        assert mine.concepts == theirs.concepts
        assert mine.meaning is not None
        assert theirs.meaning is not None
        assert mine.meaning.score == pytest.approx(theirs.meaning.score, abs=1e-4)


def test_without_it_nothing_of_it_is_made(pipe, saved_sae, tmp_path):
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS)
    assert made.pooled is None
    assert "pooled" not in made.records[0]
    made.save(tmp_path)
    assert Eraser.load(tmp_path, saved_sae).pooled is None


def test_an_added_concept_gets_its_direction(pipe, sae):
    kept = Retained.make(pipe, sae, SITE, OTHER_NOUNS)
    made = erase(pipe, sae, SITE, prompts_of("cat"), kept, config=EraseConfig(pooled_gate=True))
    more = add_concepts(made, pipe, prompts_of("boat"), kept)
    assert more.pooled is not None
    assert more.pooled.names == ("cat", "boat")
    assert made.pooled is not None
    assert torch.equal(more.pooled.directions[0], made.pooled.directions[0])


def test_altered_weights_of_the_second_gate_are_noticed(pipe, saved_sae, tmp_path):
    config = EraseConfig(pooled_gate=True)
    erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=config).save(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"anchor"', '"ankor"'))
    with pytest.raises(ValueError, match="ankor"):
        Eraser.load(tmp_path, saved_sae)
