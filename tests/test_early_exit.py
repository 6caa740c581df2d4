from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.early_exit import naive_bound
from torch import Tensor

from itd import SAE, ConceptFeatures, Eraser, Gate, HookPoint, SAEConfig, early_exit
from itd.early_exit import EarlyExit, length_bound
from itd.gate import ScoreName, score
from itd.kernels import SparseCodes, topk_encode

SITE = HookPoint("text_encoder", "encoder.layers.1")
NAMES: tuple[ScoreName, ...] = ("evidence", "contribution")
NO_LATENTS = torch.zeros(0, dtype=torch.int64)


def draw(seed: int, d_model: int = 8, n_latents: int = 60, k: int = 5) -> tuple[SAE, tuple[ConceptFeatures, ...], Tensor]:
    """Draw an autoencoder, three concepts (one with a weight below zero, one without features) and ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE.random(SAEConfig(d_model, n_latents, k), seed=seed, hook_point=SITE)
    concepts = []
    for name, n, sign in (("a", 6, 1.0), ("b", 3, -1.0), ("empty", 0, 1.0)):
        indices = torch.randperm(n_latents, generator=generator)[:n].sort().values
        weights = torch.rand(n, generator=generator)
        weights[:1] *= sign
        unit = torch.rand(2, generator=generator)
        concepts.append(ConceptFeatures(name, indices, weights, 0.5 + float(unit[0]), float(unit[1]) - 0.5))
    size = 10 ** (4 * float(torch.rand(1, generator=generator)) - 2)
    return sae, tuple(concepts), size * torch.randn(10, d_model, generator=generator)


def most_active(sae: SAE, n: int) -> Tensor:
    codes = sae.encode(2 * torch.randn(500, sae.config.d_model, generator=torch.Generator().manual_seed(77)))
    counts = torch.bincount(codes.indices[codes.acts > 0], minlength=sae.config.n_latents)
    return counts.topk(n).indices


def decisions(gate: Gate, sae: SAE, concepts: tuple[ConceptFeatures, ...], x: Tensor, often: Tensor | None) -> list[object]:
    exit_ = gate.early_exit(sae, concepts, often)
    found = gate.decide(sae, concepts, x, exit_)
    return [found.fired, found.concepts, found.score, found.threshold, found.token_scores.tolist()]


# Identical decisions


@given(seed=st.integers(0, 10_000), n_often=st.integers(0, 60), margin=st.sampled_from([-0.1, 0.0, 1e-6, 1e-3, 0.3, 3.0]))
@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_decisions_are_those_of_the_full_computation(
    name: ScoreName, window: int, seed: int, n_often: int, margin: float
) -> None:
    sae, concepts, x = draw(seed)
    concepts = (replace(concepts[0], window=window), *concepts[1:])
    exact = score(name, sae, concepts, x).concepts
    gate = Gate(name, tuple((exact + margin * exact.abs()).tolist()))
    often = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:n_often]
    full = gate.decide(sae, concepts, x)
    expected = [full.fired, full.concepts, full.score, full.threshold, full.token_scores.tolist()]
    assert decisions(gate, sae, concepts, x, often) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("towards", [-math.inf, math.inf])
def test_thresholds_one_bit_from_the_score_are_decided_alike(name: ScoreName, towards: float) -> None:
    for seed in range(60):
        sae, concepts, x = draw(seed)
        exact = score(name, sae, concepts, x).concepts
        for thresholds in (exact, torch.nextafter(exact, torch.tensor(towards))):
            gate = Gate(name, tuple(thresholds.tolist()))
            full = gate.decide(sae, concepts, x)
            quick = gate.decide(sae, concepts, x, gate.early_exit(sae, concepts, most_active(sae, 20)))
            assert (quick.fired, quick.concepts) == (full.fired, full.concepts)
            assert full.fired or towards > 0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@pytest.mark.parametrize("name", NAMES)
def test_a_settled_token_reaches_what_is_said_however_it_is_computed(name: ScoreName, seed: int) -> None:
    """The full computation is repeated token by token, all at once and in another order of the latents."""
    sae, concepts, x = draw(seed)
    exit_ = Gate(name, (0.0,) * 3).early_exit(sae, concepts, most_active(sae, 20))
    assert exit_ is not None
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    shuffled = replace(sae, W_enc=sae.W_enc[order], b_enc=sae.b_enc[order], W_dec=sae.W_dec[order])
    moved = []
    for concept in concepts:
        indices, at = place[concept.indices].sort()
        moved.append(replace(concept, indices=indices, weights=concept.weights[at]))
    ways = [
        score(name, sae, concepts, x).tokens,
        torch.cat([score(name, sae, concepts, token[None]).tokens for token in x]),
        score(name, shuffled, moved, x).tokens,
    ]
    for quantile in (0.1, 0.5, 0.9, 1.0):
        thresholds = ways[0].quantile(quantile, dim=0)
        some = exit_.below(x, thresholds.tolist())
        settled = exit_.settle(x, thresholds.tolist())
        for tokens in ways:
            assert (tokens[some] < thresholds).all()
            for row, reached in zip(tokens, settled, strict=True):
                if reached is not None:
                    assert tuple((row >= thresholds).nonzero().flatten().tolist()) == reached
        assert all(reached == () for reached, below in zip(settled, some.tolist(), strict=True) if below)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_that_by_loops_but_for_rounding(seed: int) -> None:
    sae, concepts, x = draw(seed)
    often = most_active(sae, 20)
    for c, concept in enumerate(concepts):
        exit_ = EarlyExit.make(sae, [concept], often)
        for token in x:
            bound = naive_bound(sae, concept, often.tolist(), token)
            slack = 1e-4 * (1 + abs(bound) + float(token.norm()))
            assert bool(exit_.below(token[None], [bound + slack])), (c, bound)
            assert not bool(exit_.below(token[None], [bound]))


# What it is for


def test_most_prompts_are_decided_early_and_more_with_the_latents_that_are_often_active() -> None:
    sae, concepts, _ = draw(3)
    prompts = 2 * torch.randn(300, 1, 8, generator=torch.Generator().manual_seed(1))
    thresholds = torch.stack([score("evidence", sae, concepts, x).concepts for x in prompts]).amax(0) + 0.1
    shares = []
    for often in (NO_LATENTS, most_active(sae, 30)):
        exit_ = EarlyExit.make(sae, concepts, often)
        shares.append(float(exit_.below(prompts[:, 0], thresholds.tolist()).float().mean()))
    shares.append(sum(reached == () for reached in exit_.settle(prompts[:, 0], thresholds.tolist())) / 300)
    assert 0 < shares[0] < shares[1] < shares[2]
    assert shares[1] > 0.5


def test_a_prompt_that_is_decided_early_is_not_encoded_until_its_score_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, concepts, x = draw(5)
    gate = Gate("evidence", (1e6,) * 3)
    exit_ = gate.early_exit(sae, concepts, None)
    n_encoded: list[int] = []
    encode = SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda self, rows: n_encoded.append(len(rows)) or encode(self, rows))
    decision = gate.decide(sae, concepts, x, exit_)
    assert (decision.fired, decision.early, n_encoded) == (False, True, [])
    assert decision.score == float(score("evidence", sae, concepts, x).concepts.max())
    assert gate.decide(sae, concepts, x).score == decision.score
    assert not gate.decide(sae, concepts, x).early


def test_a_prompt_that_certainly_fires_is_decided_early_and_not_encoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, concepts, x = draw(5)
    exact = score("evidence", sae, concepts, x)
    gate = Gate("evidence", tuple((exact.concepts - 0.01 * exact.concepts.abs()).tolist()))
    exit_ = gate.early_exit(sae, concepts, most_active(sae, 20))
    monkeypatch.setattr(SAE, "encode", lambda *_: pytest.fail("encoded in full"))
    decision = gate.decide(sae, concepts, x, exit_)
    monkeypatch.undo()
    assert (decision.fired, decision.early, decision.concepts) == (True, True, (0, 1, 2))
    assert torch.equal(decision.scores.tokens, exact.tokens)


def test_tokens_are_compared_with_as_many_latents_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, concepts, x = draw(5)
    exit_ = EarlyExit.make(sae, concepts, NO_LATENTS)
    thresholds = [(score("evidence", sae, concepts, x).concepts + margin).tolist() for margin in (-0.1, 0.1, 1.0, 10.0)]
    expected = [exit_.settle(x, each) for each in thresholds]
    n_rows: list[int] = []

    def counted(x: Tensor, W_enc: Tensor, *rest: Any) -> SparseCodes:
        n_rows.append(len(W_enc))
        return topk_encode(x, W_enc, *rest)

    monkeypatch.setattr(early_exit, "topk_encode", counted)
    monkeypatch.setattr(early_exit, "PART_LATENTS", 13)
    taken = []
    for each, settled in zip(thresholds, expected, strict=True):
        n_rows.clear()
        assert exit_.settle(x, each) == settled
        taken.append(sum(n_rows))
    assert taken[0] == 60  # what fires is known only from all
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < 60


def test_only_the_rows_that_are_needed_are_kept() -> None:
    sae, concepts, _ = draw(1)
    exit_ = EarlyExit.make(sae, concepts, most_active(sae, 20))
    assert exit_.n_bytes == (6 + 3 + 20) * (8 + 1) * 4
    assert torch.equal(exit_.often.W_enc, sae.W_enc[most_active(sae, 20)])


def test_the_papers_score_always_takes_the_full_computation() -> None:
    sae, concepts, _ = draw(1)
    assert Gate("reconstruction", (1.0,) * 3).early_exit(sae, concepts, None) is None


# Failing closed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_tokens_that_are_not_finite_or_overflow_are_left_to_the_full_computation(value: float) -> None:
    sae, concepts, x = draw(2)
    x[3, 1] = value
    marked = EarlyExit.make(sae, concepts, most_active(sae, 20)).below(x, [1e9] * 3)
    assert not marked[3]
    assert marked.sum() == 9


@pytest.mark.parametrize("part", ["W_enc", "b_enc"])
@pytest.mark.parametrize("where", ["features", "often"])
def test_damaged_rows_mark_nothing_that_could_fire(part: str, where: str) -> None:
    sae, concepts, x = draw(2)
    often = most_active(sae, 20)
    damaged = getattr(sae, part).clone()
    damaged[concepts[0].indices if where == "features" else often] = math.nan
    exit_ = EarlyExit.make(replace(sae, **{part: damaged}), concepts, often)
    exact = score("evidence", sae, concepts, x)
    marked = exit_.below(x, exact.concepts.tolist())
    assert not marked[exact.tokens.argmax(0)].any()


def test_nothing_is_marked_where_products_are_not_computed_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, concepts, x = draw(2)
    exit_ = EarlyExit.make(sae, concepts, NO_LATENTS)
    assert exit_.below(x, [1e9] * 3).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert not exit_.below(x, [1e9] * 3).any()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert not exit_.below(x, [1e9] * 3).any()


def test_another_width_is_left_to_the_full_computation_and_its_error() -> None:
    sae, concepts, x = draw(2)
    gate = Gate("evidence", (1e9,) * 3)
    with pytest.raises(ValueError, match="activations have d_model 7, this autoencoder takes 8"):
        gate.decide(sae, concepts, x[:, :7], gate.early_exit(sae, concepts, None))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, concepts, x = draw(4)
    exit_ = EarlyExit.make(sae, concepts, most_active(sae, 20))
    thresholds = score("evidence", sae, concepts, x).tokens.quantile(0.8, dim=0).tolist()
    at_once = exit_.below(x, thresholds)
    monkeypatch.setattr(early_exit, "CHUNK_BYTES", 1)
    assert torch.equal(exit_.below(x, thresholds), at_once)
    assert exit_.below(x[:0], thresholds).shape == (0,)


def test_a_length_is_never_rounded_down() -> None:
    rows = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    assert (length_bound(rows).double() >= rows.double().norm(dim=1)).all()
    assert (length_bound(rows) < rows.norm(dim=1) * 1.001).all()


# In an eraser


def test_an_eraser_edits_the_same_bits_with_and_without_the_early_exit() -> None:
    sae, concepts = draw(3)[0], draw(3)[1][:2]
    x = 2 * torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(1))
    content, editable = torch.ones(40, 6, dtype=torch.bool), torch.ones(40, 6, dtype=torch.bool)
    content[:, [0, 5]], editable[:, 0] = False, False
    scores = torch.stack([score("evidence", sae, concepts, row[1:5]).concepts for row in x])
    eraser = Eraser(sae, SITE, concepts, Gate("evidence", tuple(scores.quantile(0.9, dim=0).tolist())))
    quick = replace(eraser, often=most_active(sae, 30))
    found = quick(x, content, editable)
    vars(eraser)["early_exit"] = None
    full = eraser(x, content, editable)
    assert torch.equal(found.x, full.x)
    assert [each.concepts for each in found.decisions] == [each.concepts for each in full.decisions]
    assert [each.score for each in found.decisions] == [each.score for each in full.decisions]
    assert all(each.early for each in found.decisions)
    assert not any(each.early for each in full.decisions)
    assert any(each.fired for each in found.decisions)


@pytest.mark.parametrize(
    ("often", "message"),
    [([3, 3, 4], "must be distinct"), ([0, 60], "those of an autoencoder of 60 latents"), ([-1, 2], "of 60 latents")],
)
def test_latents_that_cannot_be_counted_once_are_an_error(often: list[int], message: str) -> None:
    sae, concepts, _ = draw(1)
    with pytest.raises(ValueError, match=message):
        Eraser(sae, SITE, concepts, Gate("evidence", (1.0,) * 3), often=torch.tensor(often))
