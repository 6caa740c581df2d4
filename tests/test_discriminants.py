"""Gates on the whole prompt: their discriminants, and that erasers make, keep and join them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, SITE, prompts_of
from torch import Tensor

from itd import SAE, EraseConfig, Eraser, Retained, add_concepts, erase
from itd.discriminants import Discriminants
from itd.drafts import DraftGate
from itd.gate import PART_WAY
from itd.pooled import PooledGate

ANCHOR = "a cup"
OTHERS = ["a photo of a dog", "my horse at night", "", "one tree in the park"]
OTHER_NOUNS = prompts_of("dog", "horse", "house", "tree")


def gaussian(mean: tuple[float, float], n: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(mean) + torch.randn(n, 2, generator=generator) * torch.tensor([1.0, 3.0])


def fitted(fpr: float = 0.02, part_way: float | None = None) -> PooledGate:
    own = gaussian((8.0, 3.0), seed=1), gaussian((8.0, 3.0), seed=2)
    others = gaussian((0.0, 0.0), seed=3), gaussian((0.0, 0.0), seed=4)
    return PooledGate.fit({"lamp": own}, others, fpr, ANCHOR, part_way)


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


def test_a_threshold_elsewhere_is_where_the_class_has_it_in_a_moved_unit():
    vectors = gaussian((4.0, 1.5), seed=9)
    plain, late = fitted().scores(vectors), fitted(part_way=0.6).scores(vectors)
    torch.testing.assert_close(late, plain - 0.6 + PART_WAY)
    assert not torch.equal(plain >= PART_WAY, late >= PART_WAY), "some lie between the two, or the test shows little"


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


# Making, keeping and joining


GATES: dict[str, type[Discriminants]] = {"pooled": PooledGate, "draft": DraftGate}


@pytest.fixture(params=GATES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def settings(kind: str) -> EraseConfig:
    return EraseConfig(pooled_gate=kind == "pooled", draft_gate=kind == "draft")


def gate_of(eraser: Eraser, kind: str) -> Discriminants:
    gate = getattr(eraser, kind)
    assert isinstance(gate, GATES[kind])
    return gate


def test_erase_makes_the_gate_records_what_it_does_and_keeps_it(pipe: Any, tmp_path: Path, saved_sae: SAE, kind: str) -> None:
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=settings(kind))
    assert gate_of(made, kind).names == ("cat",)
    calibration = made.records[0][kind]
    assert calibration["threshold"] == GATES[kind].part_way
    assert 0 <= calibration["recall"] <= 1
    made.save(tmp_path)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert gate_of(loaded, kind).anchor == EraseConfig().anchor
    prompts = [frame.format("cat") for frame in FRAMES] + OTHERS
    for mine, theirs in zip(loaded.check(pipe, prompts), made.check(pipe, prompts), strict=True):
        assert mine.concepts == theirs.concepts
        assert mine.meaning is not None
        assert theirs.meaning is not None
        assert mine.meaning.by == kind
        assert mine.meaning.score == pytest.approx(theirs.meaning.score, abs=1e-4)


def test_without_it_nothing_of_it_is_made(pipe: Any, saved_sae: SAE, tmp_path: Path, kind: str) -> None:
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS)
    assert getattr(made, kind) is None
    assert kind not in made.records[0]
    made.save(tmp_path)
    assert getattr(Eraser.load(tmp_path, saved_sae), kind) is None


def test_an_added_concept_gets_its_direction(pipe: Any, sae: SAE, kind: str) -> None:
    kept = Retained.make(pipe, sae, SITE, OTHER_NOUNS)
    made = erase(pipe, sae, SITE, prompts_of("cat"), kept, config=settings(kind))
    more = add_concepts(made, pipe, prompts_of("boat"), kept)
    assert gate_of(more, kind).names == ("cat", "boat")
    assert torch.equal(gate_of(more, kind).directions[0], gate_of(made, kind).directions[0])


def test_many_concepts_share_the_rate_of_as_many_as_may_have_it_each(pipe: Any, sae: SAE, kind: str) -> None:
    kept = Retained.make(pipe, sae, SITE, OTHER_NOUNS)
    config = replace(settings(kind), full_rates=1, **{f"{kind}_fpr": 0.5})
    made = erase(pipe, sae, SITE, prompts_of("cat"), kept, config=config)
    more = add_concepts(made, pipe, prompts_of("boat"), kept)
    both = erase(pipe, sae, SITE, prompts_of("cat") + prompts_of("boat"), kept, config=config)
    assert [record[kind]["rule"].split(",")[1] for record in (*more.records, *both.records)] == [
        " fpr=0.5", " fpr=0.25", " fpr=0.25",
    ]  # fmt: skip


def test_altered_weights_of_the_gate_are_noticed(pipe: Any, saved_sae: SAE, tmp_path: Path, kind: str) -> None:
    erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=settings(kind)).save(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"anchor"', '"ankor"'))
    with pytest.raises(ValueError, match="ankor"):
        Eraser.load(tmp_path, saved_sae)


def test_erasers_join_only_if_both_or_neither_have_the_gate(pipe: Any, sae: SAE, eraser: Eraser, kind: str) -> None:
    guarded = erase(pipe, sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=settings(kind))
    assert gate_of(guarded | guarded, kind).names == ("cat",)
    bare = replace(guarded, **{kind: None})
    for one, other in ((guarded, bare), (bare, guarded)):
        with pytest.raises(ValueError, match=f"an eraser with a {kind} gate joins only another with one"):
            one | other
