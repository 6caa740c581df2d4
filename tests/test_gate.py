from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.gate import naive_auroc, naive_contribution, naive_evidence, paper_score
from torch import Tensor

from itd import SAE, ConceptFeatures, Gate, SAEConfig
from itd.gate import (
    PART_WAY,
    ROUNDING,
    SCORES,
    SMALLEST_UNIT,
    ScoreName,
    auroc,
    calibrate,
    score,
    threshold_for_fpr,
    threshold_for_recall,
    unit_apart,
)

SAE_ = SAE.random(SAEConfig(d_model=8, n_latents=30, k=6), seed=2)
CONCEPTS = (
    ConceptFeatures("a", torch.tensor([2, 5, 11, 17]), torch.tensor([0.5, 0.1, 0.7, 0.5]), scale=2.0, offset=-0.3),
    ConceptFeatures("b", torch.tensor([5, 29]), torch.tensor([0.6, 0.8])),
    ConceptFeatures("empty", torch.tensor([], dtype=torch.int64), torch.tensor([])),
)


def tokens(n: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


# Scores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 7])
def test_scores_equal_those_by_loops(seed: int, n: int) -> None:
    x = tokens(n, seed)
    for c, concept in enumerate(CONCEPTS):
        found = {name: float(score(name, SAE_, CONCEPTS, x, -8.0).concepts[c]) for name in SCORES}
        assert found["evidence"] == pytest.approx(naive_evidence(SAE_, concept, x), abs=1e-4)
        assert found["contribution"] == pytest.approx(naive_contribution(SAE_, concept, x), abs=1e-4)
        paper = paper_score(SAE_, set(concept.indices.tolist()), x, -8.0)
        assert found["reconstruction"] == pytest.approx(paper, rel=1e-4)


@pytest.mark.parametrize("name", SCORES)
def test_a_concept_scores_alike_alone_and_beside_others(name: ScoreName) -> None:
    x = tokens(6)
    together = score(name, SAE_, CONCEPTS, x)
    for c, concept in enumerate(CONCEPTS):
        torch.testing.assert_close(score(name, SAE_, [concept], x).tokens[:, 0], together.tokens[:, c])


@pytest.mark.parametrize("name", SCORES)
def test_token_scores_are_those_of_the_tokens_alone(name: ScoreName) -> None:
    x = tokens(6)
    together = score(name, SAE_, CONCEPTS, x).tokens
    assert together.shape == (6, 3)
    alone = torch.stack([score(name, SAE_, CONCEPTS, x[i : i + 1]).concepts for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[:, :2].std(0) > 0).all()


def test_only_the_papers_score_is_diluted_by_length() -> None:
    x = tokens(5)
    features = set(CONCEPTS[0].indices.tolist())
    quiet = min(tokens(60, seed=3).split(1), key=lambda t: paper_score(SAE_, features, t, -8.0))
    longer = torch.cat([x, quiet.repeat(10, 1)])
    for name in ("evidence", "contribution"):
        assert score(name, SAE_, CONCEPTS[:1], longer).concepts >= score(name, SAE_, CONCEPTS[:1], x).concepts - 1e-4
    assert (
        score("reconstruction", SAE_, CONCEPTS[:1], longer).concepts < score("reconstruction", SAE_, CONCEPTS[:1], x).concepts
    )


def test_only_the_papers_score_contains_the_error_of_the_autoencoder() -> None:
    x, empty = tokens(5), CONCEPTS[2:]
    assert score("evidence", SAE_, empty, x).concepts == 0
    assert score("contribution", SAE_, empty, x).concepts == 0
    error = (SAE_.decode(SAE_.encode(x)) - x).square().mean()
    torch.testing.assert_close(score("reconstruction", SAE_, empty, x).concepts[0], error)


def test_strength_belongs_to_the_papers_score_alone() -> None:
    x = tokens(5)
    for name in SCORES:
        same = torch.equal(score(name, SAE_, CONCEPTS, x, -8.0).concepts, score(name, SAE_, CONCEPTS, x, -2.0).concepts)
        assert same == (name != "reconstruction")


@pytest.mark.parametrize("name", SCORES)
def test_a_prompt_without_content_never_fires(name: ScoreName) -> None:
    scores = score(name, SAE_, CONCEPTS, torch.zeros(0, 8))
    assert scores.tokens.shape == (0, 3)
    assert (scores.concepts == -math.inf).all()
    assert not Gate(name, (-1e30,) * 3).decide(SAE_, CONCEPTS, torch.zeros(0, 8)).fired


@pytest.mark.parametrize("name", SCORES)
def test_nan_is_an_error_and_not_a_pass(name: ScoreName) -> None:
    x = tokens(4)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        score(name, SAE_, CONCEPTS, x)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_that_is_nan_is_an_error_and_not_a_pass(name: ScoreName) -> None:
    broken = replace(SAE_, W_dec=SAE_.W_dec * float("nan"))
    concepts = [replace(concept, offset=float("nan")) for concept in CONCEPTS]
    with pytest.raises(ValueError, match="the score is NaN"):
        score(name, broken, concepts, tokens(4))


def test_an_unknown_score_is_an_error_that_lists_the_known() -> None:
    for x in (tokens(3), tokens(0)):
        with pytest.raises(ValueError, match=r"score must be one of \('evidence', .*, got 'typo'"):
            score("typo", SAE_, CONCEPTS, x)  # type: ignore[arg-type]


# Thresholds with a guarantee

RATES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.9]


def left_out_shares(scores: list[float], threshold: object) -> float:
    """Return how often a score reaches the threshold that the others give: exact for exchangeable scores."""
    values = torch.tensor(scores)
    hits = 0
    for i in range(len(values)):
        others = torch.cat([values[:i], values[i + 1 :]])
        hits += bool(values[i] >= threshold(others))  # type: ignore[operator]
    return hits / len(values)


SCORE_LISTS = st.lists(
    st.sampled_from([-2.5, -1.0, 0.0, 0.1, 0.25, 1.0, 3.0]) | st.floats(-5, 5, width=32), min_size=2, max_size=60
)


@given(scores=SCORE_LISTS, fpr=st.sampled_from(RATES))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_a_new_negative_reaches_the_threshold_no_more_often_than_stated(scores: list[float], fpr: float) -> None:
    reached = left_out_shares(scores, lambda others: threshold_for_fpr(others, fpr))
    assert reached <= max(fpr, 1 / len(scores)) + 1e-9


@given(scores=SCORE_LISTS, recall=st.sampled_from(RATES))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_a_new_positive_reaches_the_threshold_no_less_often_than_stated(scores: list[float], recall: float) -> None:
    reached = left_out_shares(scores, lambda others: threshold_for_recall(others, recall))
    assert reached >= min(recall, 1 - 1 / len(scores)) - 1e-9


@pytest.mark.parametrize("n", [19, 40, 57])
def test_the_plain_quantile_keeps_neither_promise(n: int) -> None:
    """Control: the finite-sample correction is needed."""
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
    assert left_out_shares(scores, lambda others: others.quantile(0.9)) > 0.1
    assert left_out_shares(scores, lambda others: others.quantile(0.1)) < 0.9


@pytest.mark.parametrize("n", [20, 57, 100])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_the_thresholds_are_not_more_cautious_than_they_must_be(n: int, rate: float) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
    assert left_out_shares(scores, lambda others: threshold_for_fpr(others, rate)) > rate - 1.01 / n
    assert left_out_shares(scores, lambda others: threshold_for_recall(others, rate)) < rate + 2.01 / n


def test_on_fresh_exchangeable_data_the_rates_hold_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    reached = torch.zeros(2, dtype=torch.float64)
    for _ in range(400):
        drawn, new = torch.randn(50, generator=generator), torch.randn(200, generator=generator)
        reached[0] += (new >= threshold_for_fpr(drawn, 0.1)).double().mean()
        reached[1] += (new >= threshold_for_recall(drawn, 0.9)).double().mean()
    rates = reached / 400
    assert 0.08 < rates[0] <= 0.1 + 0.005
    assert 0.9 - 0.005 <= rates[1] < 0.92


def test_with_too_few_negatives_nothing_that_was_seen_fires() -> None:
    negatives = torch.tensor([0.5, 2.0, 1.0])
    threshold = threshold_for_fpr(negatives, 0.001)
    assert threshold > 2.0
    assert threshold == pytest.approx(2.0 * (1 + ROUNDING))
    assert threshold_for_fpr(torch.tensor([7.0]), 0.5) > 7.0
    assert threshold_for_fpr(torch.tensor([-torch.inf, -torch.inf]), 0.5) < -1e30


def test_equal_prompts_that_another_batch_rounds_differently_do_not_fire() -> None:
    negatives = torch.tensor([0.01, 0.02, 0.03, *[0.1369388699] * 4])
    threshold = threshold_for_fpr(negatives, 0.4)
    assert not (negatives * (1 + 1e-6) >= threshold).any()


def test_with_too_few_positives_everything_that_was_seen_fires() -> None:
    assert threshold_for_recall(torch.tensor([0.5, 2.0, 1.0]), 0.999) == 0.5
    assert threshold_for_recall(torch.tensor([7.0]), 0.5) == 7.0


def test_equal_negatives_do_not_fire() -> None:
    negatives = torch.zeros(100)
    assert not (negatives >= threshold_for_fpr(negatives, 0.1)).any()


@pytest.mark.parametrize("gap", [-1.0, 0.0, 0.001, 0.02, 0.3])
def test_the_unit_puts_the_threshold_part_way_and_is_never_so_small_that_it_magnifies_rounding(gap: float) -> None:
    own, others = 1 + gap + torch.linspace(0, 1, 101), torch.linspace(0, 1, 1001)
    low, high = threshold_for_fpr(others, 0.002), float(own.quantile(0.05))
    scale, offset = unit_apart(own, others, 0.002)
    threshold = low + PART_WAY * max(high - low, 0)
    assert scale * threshold + offset == pytest.approx(PART_WAY, abs=2e-5)
    assert 1 / scale == pytest.approx(max(high - low, SMALLEST_UNIT * (low - 0.5)), rel=1e-5)


@pytest.mark.parametrize("level", [0.0, -3.0, 1e6])
def test_scores_that_are_all_the_same_have_a_unit_and_do_not_fire(level: float) -> None:
    scores = torch.full((20,), level)
    scale, offset = unit_apart(scores, scores, 0.1)
    assert scale == 1
    assert (scores + offset < PART_WAY).all()


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_rates_lie_between_zero_and_one(rate: float) -> None:
    with pytest.raises(ValueError, match="a false-positive rate lies between 0 and 1"):
        threshold_for_fpr(torch.randn(5), rate)
    with pytest.raises(ValueError, match="a recall lies between 0 and 1"):
        threshold_for_recall(torch.randn(5), rate)


# Calibration


def sides() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, generator=generator) + 2, torch.randn(200, generator=generator)


def test_each_rule_calls_its_threshold() -> None:
    positives, negatives = sides()
    assert calibrate(positives, negatives, fpr=0.05).threshold == threshold_for_fpr(negatives, 0.05)
    assert calibrate(positives, negatives, recall=0.9).threshold == threshold_for_recall(positives, 0.9)
    paper = calibrate(positives, negatives)
    assert paper.threshold == pytest.approx(0.99 * float(positives.min()))
    rules = [calibrate(positives, negatives, fpr=0.05).rule, calibrate(positives, negatives, recall=0.9).rule, paper.rule]
    assert rules == ["fpr=0.05", "recall=0.9", "0.99*min"]


def test_a_calibration_reports_what_its_threshold_does() -> None:
    positives, negatives = sides()
    found = calibrate(positives, negatives, fpr=0.05)
    assert found.recall == pytest.approx(float((positives >= found.threshold).double().mean()))
    assert found.false_positive_rate == pytest.approx(float((negatives >= found.threshold).double().mean()))
    assert 0 < found.false_positive_rate <= 0.05 < found.recall < 1
    assert (found.n_positives, found.n_negatives) == (40, 200)


def test_the_curve_falls_in_threshold_and_rises_in_both_rates() -> None:
    curve = torch.tensor(calibrate(*sides(), fpr=0.05).curve)
    assert (curve[1:, 0] <= curve[:-1, 0]).all()
    assert (curve[1:, 1:] >= curve[:-1, 1:]).all()
    assert curve[-1, 1:].tolist() == [1, 1]
    assert (curve[0, 1:] < 0.1).all()


def test_a_curve_over_prompts_without_content_holds_numbers() -> None:
    positives, negatives = sides()
    negatives[:3] = -math.inf
    found = calibrate(positives, negatives, fpr=0.05)
    assert all(math.isfinite(value) for point in found.curve for value in point)
    assert math.isfinite(found.threshold)


def test_calibration_needs_both_sides_and_one_rule() -> None:
    positives, negatives = sides()
    with pytest.raises(ValueError, match="needs target and retain prompts, got 0 and 200"):
        calibrate(positives[:0], negatives)
    with pytest.raises(ValueError, match="needs target and retain prompts, got 40 and 0"):
        calibrate(positives, negatives[:0])
    for empty in ((torch.full((4,), -math.inf), negatives), (positives, torch.full((4,), -math.inf))):
        with pytest.raises(ValueError, match="prompts with content tokens, got only empty ones on one side"):
            calibrate(*empty)
    with pytest.raises(ValueError, match="a false-positive rate or a recall, not both"):
        calibrate(positives, negatives, fpr=0.1, recall=0.9)


def test_auroc_equals_the_share_of_pairs() -> None:
    positives, negatives = sides()
    assert auroc(positives, negatives) == pytest.approx(naive_auroc(positives, negatives))
    rounded = positives.round(), negatives.round()
    assert auroc(*rounded) == pytest.approx(naive_auroc(*rounded))
    assert auroc(negatives, negatives) == pytest.approx(0.5)
    assert auroc(positives + 100, negatives) == 1
    assert auroc(positives - 100, negatives) == 0


# The gate


def test_a_prompt_fires_when_any_concept_reaches_its_own_threshold() -> None:
    x = tokens(6)
    scores = score("evidence", SAE_, CONCEPTS, x).concepts.tolist()

    def decide(*margins: float) -> tuple[bool, tuple[int, ...]]:
        thresholds = tuple(s - margin for s, margin in zip(scores, margins, strict=True))
        decision = Gate("evidence", thresholds).decide(SAE_, CONCEPTS, x)
        return decision.fired, decision.concepts

    assert decide(-0.1, -0.1, -0.1) == (False, ())
    assert decide(-0.1, 0.1, -0.1) == (True, (1,))
    assert decide(0.1, 0.1, -0.1) == (True, (0, 1))
    assert decide(0.0, -0.1, -0.1) == (True, (0,))


def test_a_decision_names_the_score_and_threshold_with_the_largest_margin() -> None:
    x = tokens(6)
    scores = score("evidence", SAE_, CONCEPTS, x)
    thresholds = tuple(float(s) - margin for s, margin in zip(scores.concepts, (-0.5, -0.2, -0.4), strict=True))
    decision = Gate("evidence", thresholds).decide(SAE_, CONCEPTS, x)
    assert decision.score == float(scores.concepts[1])
    assert decision.threshold == thresholds[1]
    assert torch.equal(decision.token_scores, scores.tokens)


def test_gates_join_with_the_same_score_and_strength_only() -> None:
    joined = Gate("evidence", (1.0,)) | Gate("evidence", (2.0, 3.0))
    assert joined == Gate("evidence", (1.0, 2.0, 3.0))
    for other in (Gate("contribution", (1.0,)), Gate("evidence", (1.0,), strength=-2.0)):
        with pytest.raises(ValueError, match="gates join only with the same score and strength"):
            _ = joined | other


def test_a_gate_reads_back_from_plain_values() -> None:
    gate = Gate("contribution", (1.5, 0.1), -6.0)
    assert Gate.from_dict(gate.to_dict()) == gate


def test_a_gate_that_could_never_fire_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .*, got 'typo'"):
        Gate("typo", (1.0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        Gate("evidence", (1.0, float("nan")))
