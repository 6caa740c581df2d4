from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.features import dense_codes, dense_maxima, evidence_weights, fisher_weights, select_by_sets
from torch import Tensor

from itd import SAE, ConceptFeatures, FeatureStats, SAEConfig
from itd.features import (
    PromptCodes,
    all_indices,
    dense_acts,
    fisher_filter,
    matched_filter,
    naming_tokens,
    positions,
    prompt_maxima,
    set_difference,
    token_filter,
    token_stats,
    window_scores,
)
from itd.kernels import SparseCodes

SAE_ = SAE.random(SAEConfig(d_model=8, n_latents=30, k=4), seed=2)


def draw_prompts(n: int, seed: int, shift: float = 0.0) -> list[Tensor]:
    """Draw prompts of 0 to 6 content tokens; the first has none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [0, *torch.randint(1, 7, (n - 1,), generator=generator).tolist()]
    direction = torch.randn(8, generator=torch.Generator().manual_seed(99))
    return [2 * torch.randn(length, 8, generator=generator) + shift * direction for length in lengths]


def pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch with padding in front and behind that must not count, and the mask of what does."""
    x, mask = torch.full((len(prompts), 9, 8), 50.0), torch.zeros(len(prompts), 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        x[row, 1 : 1 + len(prompt)] = prompt
        mask[row, 1 : 1 + len(prompt)] = True
    return x, mask


def stats_of(prompts: list[Tensor], k_sel: int = 3, batch_size: int = 100) -> FeatureStats:
    stats = FeatureStats(SAE_, k_sel)
    for start in range(0, len(prompts), batch_size):
        stats.update(*pad(prompts[start : start + batch_size]))
    return stats


def assert_same_statistics(a: FeatureStats, b: FeatureStats) -> None:
    assert a.n_prompts == b.n_prompts
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.variance, b.variance)
    torch.testing.assert_close(a.largest, b.largest)
    assert torch.equal(a.selected, b.selected)


# Statistics


def test_statistics_equal_those_of_all_prompts_at_once() -> None:
    prompts = draw_prompts(12, seed=0)
    maxima, stats = dense_maxima(SAE_, prompts), stats_of(prompts)
    torch.testing.assert_close(stats.mean, maxima.mean(0))
    torch.testing.assert_close(stats.variance, maxima.var(0, correction=0))
    torch.testing.assert_close(stats.largest, maxima.amax(0))
    assert stats.n_prompts == 12


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_streamed_statistics_equal_those_at_once(batch_size: int) -> None:
    prompts = draw_prompts(12, seed=0)
    assert_same_statistics(stats_of(prompts, batch_size=batch_size), stats_of(prompts))


@pytest.mark.parametrize("cut", [0, 1, 7, 12])
def test_merged_statistics_equal_those_together(cut: int) -> None:
    prompts = draw_prompts(12, seed=0)
    merged = stats_of(prompts[:cut]) + stats_of(prompts[cut:])
    assert_same_statistics(merged, stats_of(prompts))


def test_the_order_of_prompts_does_not_matter() -> None:
    prompts = draw_prompts(12, seed=0)
    assert_same_statistics(stats_of(prompts[::-1]), stats_of(prompts))


def test_padding_does_not_count_and_content_does() -> None:
    prompts = draw_prompts(5, seed=0)
    (x, mask), plain = pad(prompts), stats_of(prompts)
    x[~mask] = -70.0
    assert_same_statistics(FeatureStats(SAE_, 3).update(x, mask), plain)
    x[mask] += 1.0
    assert not torch.allclose(FeatureStats(SAE_, 3).update(x, mask).mean, plain.mean)


def test_a_prompt_without_content_counts_as_a_prompt_without_activity() -> None:
    stats = stats_of([torch.zeros(0, 8)])
    assert stats.n_prompts == 1
    assert not stats.mean.any()
    assert not stats.selected.any()


def test_empty_statistics_are_zero() -> None:
    stats = FeatureStats(SAE_)
    assert stats.n_prompts == 0
    assert not stats.mean.any()
    assert not stats.variance.any()


def test_maxima_name_every_active_latent_once_with_its_largest_act() -> None:
    codes = SparseCodes(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[7, 3], [7, 5]]))
    maxima = prompt_maxima(codes)
    assert dict(zip(maxima.indices.tolist(), maxima.acts.tolist(), strict=True)) == {7: 3.0, 3: 2.0}


def test_statistics_over_other_autoencoders_or_k_sel_do_not_merge() -> None:
    with pytest.raises(ValueError, match="only over the same autoencoder and k_sel"):
        FeatureStats(SAE_, 3) + FeatureStats(SAE_, 4)
    with pytest.raises(ValueError, match="only over the same autoencoder and k_sel"):
        FeatureStats(SAE_, 3) + FeatureStats(SAE.random(SAE_.config, seed=8), 3)


def test_k_sel_must_be_positive() -> None:
    with pytest.raises(ValueError, match="k_sel must be at least 1, got 0"):
        FeatureStats(SAE_, 0)


# Selection


@pytest.mark.parametrize("k_sel", [1, 3, 30])
def test_the_papers_selection_equals_that_by_sets(k_sel: int) -> None:
    target, retain = draw_prompts(6, seed=0, shift=1.5), draw_prompts(8, seed=1)
    expected = select_by_sets(SAE_, target, retain, k_sel)
    found = set_difference(stats_of(target, k_sel), stats_of(retain, k_sel), "concept")
    assert found.indices.tolist() == sorted(expected)
    assert found.name == "concept"
    if k_sel == 3:
        assert expected


def test_nothing_is_left_of_a_concept_that_equals_the_retained() -> None:
    prompts = draw_prompts(6, seed=0)
    assert len(stats_of(prompts).union()) > 0
    assert len(set_difference(stats_of(prompts), stats_of(prompts), "concept")) == 0


@pytest.mark.parametrize("n_features", [1, 4, 100])
@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_the_matched_filter_equals_that_by_loops(n_features: int, eps: float) -> None:
    target, retain = draw_prompts(6, seed=0, shift=1.5), draw_prompts(8, seed=1)
    expected = evidence_weights(SAE_, target, retain, n_features, eps)
    found = matched_filter(stats_of(target), stats_of(retain), "concept", n_features, eps)
    assert found.indices.tolist() == sorted(expected)
    torch.testing.assert_close(found.weights, torch.tensor([expected[j] for j in sorted(expected)]), rtol=1e-4, atol=1e-6)
    assert float(found.weights.norm()) == pytest.approx(1)
    assert (found.weights > 0).all()


def test_eps_changes_the_matched_filter() -> None:
    target, retain = stats_of(draw_prompts(6, seed=0, shift=1.5)), stats_of(draw_prompts(8, seed=1))
    small, large = (matched_filter(target, retain, "c", 100, eps) for eps in (0.01, 100.0))
    assert not torch.allclose(small.weights, large.weights)


def test_a_matched_filter_of_what_is_retained_is_empty() -> None:
    stats = stats_of(draw_prompts(6, seed=0))
    assert len(matched_filter(stats, stats, "concept")) == 0


@pytest.mark.parametrize("n_features", [1, 4, 100])
@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_fishers_discriminant_equals_that_from_dense_maxima(n_features: int, shrinkage: float) -> None:
    target, retain = draw_prompts(6, seed=0, shift=1.5), draw_prompts(8, seed=1)
    expected = fisher_weights(SAE_, target, retain, n_features, shrinkage)
    found = fisher_filter(stats_of(target), stats_of(retain), codes_of(retain), "concept", n_features, shrinkage)
    assert found.indices.tolist() == sorted(expected)
    torch.testing.assert_close(found.weights, torch.tensor([expected[j] for j in sorted(expected)]), rtol=1e-3, atol=1e-4)
    assert float(found.weights.norm()) == pytest.approx(1)


def test_what_a_neighbour_shares_speaks_against_the_concept() -> None:
    def codes(*rows: tuple[float, float]) -> PromptCodes:
        acts = torch.tensor(rows)
        return PromptCodes(
            SparseCodes(acts, torch.tensor([[0, 1]]).expand(len(rows), 2).contiguous()), torch.ones(len(rows)).long()
        )

    target = codes((1.0, 0.3), (1.0, 0.3))
    retained = codes((1.0, 1.0), (0.9, 1.1), *[(0.0, 0.0)] * 6)
    stats = [FeatureStats(SAE_).update_codes(part) for part in (target, retained)]
    found, plain = fisher_filter(*stats, retained, "concept", shrinkage=0.1), matched_filter(*stats, "concept")
    assert found.indices.tolist() == plain.indices.tolist() == [0, 1]
    assert found.weights[0] > 0 > found.weights[1]
    assert (plain.weights > 0).all()


def test_a_discriminant_of_what_is_retained_is_empty() -> None:
    prompts = draw_prompts(6, seed=0)
    assert len(fisher_filter(stats_of(prompts), stats_of(prompts), codes_of(prompts), "concept")) == 0


# Tokens


def pairs(*prompts: list[tuple[float, float]]) -> PromptCodes:
    """Return the codes of prompts whose tokens have acts at the latents 3 and 7."""
    acts = torch.tensor([token for prompt in prompts for token in prompt]).reshape(-1, 2)
    indices = torch.tensor([[3, 7]]).expand(len(acts), 2).contiguous()
    return PromptCodes(SparseCodes(acts, indices), torch.tensor([len(prompt) for prompt in prompts]))


FIRST, LAST, BOTH, NEITHER = (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)
NAMED = pairs([NEITHER, BOTH], [BOTH, NEITHER, FIRST], [], [NEITHER, NEITHER, BOTH])
APART = pairs([FIRST, NEITHER, LAST], [LAST, FIRST], [NEITHER] * 4, [])


def test_moments_of_tokens_are_those_of_all_tokens_of_all_prompts() -> None:
    prompts = draw_prompts(9, seed=2)
    dense = dense_codes(SAE_, torch.cat(prompts))
    found = token_stats(codes_of(prompts).codes, SAE_.config.n_latents)
    torch.testing.assert_close(found.mean, dense.mean(0))
    torch.testing.assert_close(found.variance, dense.var(0, correction=0))
    assert not token_stats(codes_of([torch.zeros(0, 8)]).codes, 30).mean.any()


def test_the_tokens_that_name_a_concept_are_those_its_filter_scores_highest() -> None:
    concept = ConceptFeatures("c", torch.tensor([3, 7]), torch.tensor([0.6, 0.8]))
    assert naming_tokens(concept, NAMED).tolist() == [1, 2, 7]
    prompts = pairs([LAST, BOTH, NEITHER], [BOTH], [], [NEITHER, LAST, LAST])
    assert naming_tokens(replace(concept, window=2), prompts).tolist() == [0, 1, 3, 5, 6]


def test_a_filter_of_tokens_tells_both_in_one_token_from_both_in_one_prompt() -> None:
    start = ConceptFeatures("c", torch.tensor([3]), torch.ones(1))
    found = token_filter(start, NAMED, APART, token_stats(APART.codes, 30))
    assert found.indices.tolist() == [3, 7]
    assert float(found.weights.norm()) == pytest.approx(1)
    named, apart = (strongest(found, prompts) for prompts in (NAMED, APART))
    assert named[named.isfinite()].min() > 1.9 * apart[apart.isfinite()].max()
    maxima = [prompts.largest(dense_acts(prompts.codes, found.indices))[0].tolist() for prompts in (NAMED, APART)]
    assert maxima[0] == maxima[1] == [1.0, 1.0], "the maxima of prompts do not tell them apart"


def test_a_filter_of_windows_tells_a_name_of_two_tokens_from_either_token_twice() -> None:
    named = pairs([NEITHER, FIRST, LAST], [FIRST, LAST, NEITHER], [NEITHER, NEITHER, FIRST, LAST])
    halves = pairs([FIRST, NEITHER, LAST], [LAST, LAST, NEITHER], [FIRST, FIRST], [NEITHER, LAST], [FIRST, NEITHER, NEITHER])
    start = ConceptFeatures("c", torch.tensor([3, 7]), torch.tensor([1.0, 0.5]), window=2)
    found = token_filter(start, named, halves, token_stats(halves.codes, 30), shrinkage=0.5)
    assert (found.window, found.indices.tolist()) == (2, [3, 7])
    assert (found.weights > 0).all()
    assert strongest(found, named).min() == pytest.approx(float(found.weights.mean()))
    assert strongest(found, halves).max() == pytest.approx(float(found.weights.max()))
    single = token_filter(replace(start, window=1), named, halves, token_stats(halves.codes, 30), shrinkage=0.5)
    assert strongest(single, named).max() <= strongest(single, halves).max(), "single tokens do not tell them apart"


def strongest(concept: ConceptFeatures, prompts: PromptCodes) -> Tensor:
    scores = dense_acts(prompts.codes, concept.indices) @ concept.weights[:, None]
    return prompts.largest(window_scores(scores, prompts.n_tokens, [concept.window]))


def test_a_filter_of_tokens_is_fishers_discriminant_in_double_precision() -> None:
    target, retained = draw_prompts(6, seed=0, shift=1.5), draw_prompts(8, seed=1)
    start = matched_filter(stats_of(target), stats_of(retained), "concept", 100)
    moments = token_stats(codes_of(retained).codes, 30)
    found = token_filter(start, codes_of(target), codes_of(retained), moments, 100, 0.5, n_rounds=1)
    named = torch.cat(target)[naming_tokens(start, codes_of(target))]
    z_named, z_retained = (dense_codes(SAE_, x).double()[:, found.indices] for x in (named, torch.cat(retained)))
    gap, covariance = z_named.mean(0) - z_retained.mean(0), torch.cov(z_retained.T)
    own = covariance.diagonal()
    weights = torch.linalg.inv(covariance + 0.5 * torch.diag(own + 0.1 * own.max())) @ gap
    torch.testing.assert_close(found.weights.double(), weights / weights.norm(), rtol=1e-3, atol=1e-4)
    assert (gap > 0).all()


def test_a_filter_without_prompts_is_what_it_started_with() -> None:
    start, nothing = ConceptFeatures("c", torch.tensor([3]), torch.ones(1)), pairs([], [])
    assert token_filter(start, nothing, APART, token_stats(APART.codes, 30)) is start


@pytest.mark.parametrize("windows", [(1, 1), (2, 1), (3, 5)])
def test_a_tokens_score_is_that_of_the_best_window_it_is_in(windows: tuple[int, int]) -> None:
    n_tokens = torch.tensor([3, 0, 1, 6, 2])
    values = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = window_scores(values, n_tokens, windows)
    for part, scores in zip(values.split(n_tokens.tolist()), found.split(n_tokens.tolist()), strict=True):
        for column, window in enumerate(windows):
            size = min(window, len(part))
            means = [part[i : i + size, column].mean() for i in range(len(part) - size + 1)]
            best = [max(means[i] for i in range(len(means)) if i <= token < i + size) for token in range(len(part))]
            assert scores[:, column].tolist() == pytest.approx([float(value) for value in best])
            assert not len(part) or scores[:, column].max() <= part[:, column].max() + 1e-6


def test_a_window_without_tokens_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the window of 'c' must be at least 1 token, got 0"):
        ConceptFeatures("c", torch.tensor([3]), torch.ones(1), window=0)


# Algebra


def features(*indices: int, name: str = "a") -> ConceptFeatures:
    weights = torch.arange(1.0, 1.0 + len(indices)) / 10
    return ConceptFeatures(name, torch.tensor(indices, dtype=torch.int64), weights)


def test_a_union_has_the_features_of_both_with_the_larger_weight() -> None:
    union = features(1, 4, 6) | features(2, 4, 9, name="b")
    assert union.indices.tolist() == [1, 2, 4, 6, 9]
    torch.testing.assert_close(union.weights, torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3]))
    assert union.name == "a, b"


def test_union_is_idempotent_commutative_and_associative_in_its_features() -> None:
    a, b, c = features(1, 4, 6), features(2, 4, 9), features(0, 9)
    for left, right in [(a | a, a), (a | b, b | a), ((a | b) | c, a | (b | c)), (a | features(), a)]:
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.weights, right.weights)


def test_a_difference_has_the_features_that_the_other_lacks() -> None:
    difference = features(1, 4, 6) - features(4, 5)
    assert difference.indices.tolist() == [1, 6]
    torch.testing.assert_close(difference.weights, torch.tensor([0.1, 0.3]))
    assert len(features(1, 4) - features(1, 4)) == 0
    assert (features() - features(1)).indices.tolist() == []


def test_weights_are_spread_over_other_features_with_zeros() -> None:
    at = torch.tensor([0, 1, 4, 5, 29])
    torch.testing.assert_close(features(1, 4, 6).spread(at), torch.tensor([0, 0.1, 0.2, 0, 0]))
    assert not features().spread(at).any()


def test_all_indices_are_distinct_and_sorted() -> None:
    assert all_indices([features(6, 8), features(1, 6), features()]).tolist() == [1, 6, 8]
    assert all_indices([]).tolist() == []


def test_concepts_are_equal_when_nothing_differs() -> None:
    a = features(1, 4)
    assert a.equals(features(1, 4))
    for other in (
        features(1, 5),
        features(1, 4, 6),
        features(1, 4, name="b"),
        ConceptFeatures("a", a.indices, a.weights, scale=2.0),
        ConceptFeatures("a", a.indices, a.weights, window=2),
    ):
        assert not a.equals(other)


# Codes of many prompts


def codes_of(prompts: list[Tensor]) -> PromptCodes:
    return PromptCodes(SAE_.encode(torch.cat(prompts)), torch.tensor([len(prompt) for prompt in prompts]))


def test_statistics_from_codes_are_those_from_activations() -> None:
    prompts = draw_prompts(12, seed=1)
    a, b = stats_of(prompts), FeatureStats(SAE_, 3).update_codes(codes_of(prompts))
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.variance, b.variance)
    assert torch.equal(a.selected, b.selected)
    assert a.n_prompts == b.n_prompts == 12


def test_the_latents_that_are_often_active_are_those_of_most_prompts() -> None:
    prompts = draw_prompts(40, seed=1)
    counts = (dense_maxima(SAE_, prompts) > 0).sum(0)
    halves = stats_of(prompts[:15]) + stats_of(prompts[15:])
    assert torch.equal(halves.n_active, counts)
    often = halves.often()
    assert len(often) == min(4 * SAE_.config.k, int((counts > 0).sum()))
    assert counts[often].min() >= counts.sort(descending=True).values[len(often) - 1]
    assert len(often.unique()) == len(often)
    assert counts[often].tolist() == sorted(counts[often].tolist(), reverse=True)
    assert len(halves.often(most=3)) == 3
    assert len(FeatureStats(SAE_).often()) == 0


@pytest.mark.parametrize("table_from", [0, 10**9])
def test_a_table_and_a_search_find_the_same_places(table_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itd.features.TABLE_FROM", table_from)
    indices = torch.tensor([[0, 3, 29], [4, 4, 7], [8, 1, 2]])
    assert positions(indices, torch.tensor([1, 4, 7])).tolist() == [[3, 3, 3], [1, 1, 2], [3, 0, 3]]
    assert positions(indices, torch.tensor([29])).tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]


def test_codes_of_some_prompts_are_those_of_each() -> None:
    prompts = draw_prompts(9, seed=2)
    keep = torch.tensor([True, False, True, True, False, False, True, True, False])
    found, expected = codes_of(prompts).keep(keep), codes_of([p for p, k in zip(prompts, keep, strict=True) if k])
    assert torch.equal(found.n_tokens, expected.n_tokens)
    torch.testing.assert_close(found.codes.acts.sort(1).values, expected.codes.acts.sort(1).values)


def test_the_largest_value_of_a_prompt_is_over_its_tokens_and_of_none_minus_infinity() -> None:
    prompts = draw_prompts(9, seed=2)
    values = torch.randn(sum(map(len, prompts)), 2, generator=torch.Generator().manual_seed(0))
    found = codes_of(prompts).largest(values)
    for row, part in zip(found, values.split([len(prompt) for prompt in prompts]), strict=True):
        assert torch.equal(row, part.amax(0) if len(part) else torch.full((2,), -torch.inf))
