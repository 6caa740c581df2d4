"""From codes to the features of a concept: streaming statistics, selection, set algebra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itd.kernels import SparseCodes
from itd.sae import SAE

TABLE_FROM = 2**14
"""From this many indices, a table of all latents is faster than a binary search for each."""


@dataclass(frozen=True, eq=False)
class ConceptFeatures:
    """The features of one concept.

    indices: (n_features,) latents, sorted, distinct; weights: (n_features,) of the matched filter, unit norm.
    The score of a token is `scale * sum_j weights_j z_j + offset`; see `itd.gate`.
    window: consecutive tokens over which scores are averaged: a name of several tokens is not in any one of them.
    """

    name: str
    indices: Int[Tensor, " n_features"]
    weights: Float[Tensor, " n_features"]
    scale: float = 1.0
    offset: float = 0.0
    window: int = 1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"the window of {self.name!r} must be at least 1 token, got {self.window}")

    def __len__(self) -> int:
        return len(self.indices)

    def __or__(self, other: ConceptFeatures) -> ConceptFeatures:
        """Union; where both have a feature, the larger weight counts."""
        indices = torch.cat([self.indices, other.indices]).unique()
        weights = torch.maximum(self.spread(indices), other.spread(indices))
        return ConceptFeatures(f"{self.name}, {other.name}", indices, weights, window=max(self.window, other.window))

    def __sub__(self, other: ConceptFeatures) -> ConceptFeatures:
        """Features of this concept that the other does not have."""
        keep = ~torch.isin(self.indices, other.indices)
        return replace(self, indices=self.indices[keep], weights=self.weights[keep])

    def equals(self, other: ConceptFeatures) -> bool:
        """Tell whether both are the same concept with the same features, weights and units."""
        mine, theirs = ((c.name, c.scale, c.offset, c.window) for c in (self, other))
        return mine == theirs and torch.equal(self.indices, other.indices) and torch.equal(self.weights, other.weights)

    def strongest(self, n: int | None) -> ConceptFeatures:
        """Return the `n` features with the largest weights, or all."""
        if n is None or n >= len(self):
            return self
        keep = self.weights.topk(n).indices.sort().values
        return replace(self, indices=self.indices[keep], weights=self.weights[keep])

    def spread(self, indices: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the weights at `indices`, 0 where this concept has no such feature."""
        weights = torch.zeros(len(indices))
        if len(self) == 0:
            return weights
        position = torch.searchsorted(self.indices, indices).clamp_max(len(self) - 1)
        return torch.where(self.indices[position] == indices, self.weights[position], weights)


@dataclass(frozen=True, eq=False)
class PromptCodes:
    """Codes of the content tokens of prompts, one prompt after the other.

    codes: (tokens, k); n_tokens: (prompts,) content tokens of each.
    """

    codes: SparseCodes
    n_tokens: Int[Tensor, " prompts"]

    def __len__(self) -> int:
        return len(self.n_tokens)

    def __iter__(self) -> Iterator[SparseCodes]:
        sizes = self.n_tokens.tolist()
        return map(SparseCodes, self.codes.acts.split(sizes), self.codes.indices.split(sizes))

    def keep(self, prompts: Bool[Tensor, " prompts"]) -> PromptCodes:
        """Return the codes of the marked prompts only."""
        tokens = prompts.repeat_interleave(self.n_tokens)
        return PromptCodes(SparseCodes(self.codes.acts[tokens], self.codes.indices[tokens]), self.n_tokens[prompts])

    def largest(self, values: Float[Tensor, "tokens n"]) -> Float[Tensor, "prompts n"]:
        """Return the maximum over each prompt's tokens; minus infinity for a prompt without any."""
        owner = torch.arange(len(self)).repeat_interleave(self.n_tokens)
        start = torch.full((len(self), values.shape[1]), -torch.inf, dtype=values.dtype)
        return start.scatter_reduce_(0, owner[:, None].expand_as(values), values, "amax")


class FeatureStats:
    """Streaming statistics of per-prompt maxima `z_j = max over content tokens of acts_j`. Mergeable.

    mean, variance: (n_latents,) over prompts; `union(k_sel)`: latents among the k_sel largest of any prompt.
    n_active: (n_latents,) prompts in which a latent is active.
    """

    def __init__(self, sae: SAE, k_sel: int = 128) -> None:
        if k_sel < 1:
            raise ValueError(f"k_sel must be at least 1, got {k_sel}")
        self.sae, self.k_sel = sae, k_sel
        n = sae.config.n_latents
        self.n_prompts = 0
        self.total = torch.zeros(n, dtype=torch.float64)
        self.squares = torch.zeros(n, dtype=torch.float64)
        self.largest = torch.zeros(n)
        self.selected = torch.zeros(n, dtype=torch.bool)
        self.n_active = torch.zeros(n, dtype=torch.int64)

    def update(self, x: Float[Tensor, "batch tokens d_model"], mask: Bool[Tensor, "batch tokens"]) -> FeatureStats:
        """Add prompts; `mask` marks the tokens that count."""
        return self.update_codes(PromptCodes(self.sae.encode(x[mask]), mask.sum(1)))

    def update_codes(self, prompts: PromptCodes) -> FeatureStats:
        """Add prompts that are encoded."""
        for codes in prompts:
            self.add(prompt_maxima(codes))
        return self

    def add(self, maxima: SparseCodes) -> None:
        """Add one prompt by its maxima: distinct indices (n,) and acts (n,)."""
        indices, acts = maxima.indices, maxima.acts.double()
        self.n_prompts += 1
        self.n_active[indices] += 1
        self.total[indices] += acts
        self.squares[indices] += acts.square()
        self.largest[indices] = torch.maximum(self.largest[indices], maxima.acts)
        top = maxima.acts.topk(min(self.k_sel, len(acts)))
        self.selected[indices[top.indices[top.values > 0]]] = True

    def __add__(self, other: FeatureStats) -> FeatureStats:
        """Merge two runs over the same autoencoder."""
        if self.sae is not other.sae or self.k_sel != other.k_sel:
            raise ValueError("statistics merge only over the same autoencoder and k_sel")
        merged = FeatureStats(self.sae, self.k_sel)
        merged.n_prompts = self.n_prompts + other.n_prompts
        merged.total, merged.squares = self.total + other.total, self.squares + other.squares
        merged.largest, merged.selected = torch.maximum(self.largest, other.largest), self.selected | other.selected
        merged.n_active = self.n_active + other.n_active
        return merged

    @property
    def mean(self) -> Float[Tensor, " n_latents"]:
        return (self.total / max(1, self.n_prompts)).float()

    @property
    def variance(self) -> Float[Tensor, " n_latents"]:
        mean = self.total / max(1, self.n_prompts)
        return (self.squares / max(1, self.n_prompts) - mean.square()).clamp_min(0).float()

    def often(self, share: float = 1 / 16, most: int = 2**15) -> Int[Tensor, " n"]:
        """Return the latents that are active in most prompts, those first: `share` of all, at least 4 k, at most `most`."""
        config = self.sae.config
        size = min(max(round(share * config.n_latents), 4 * config.k), most, int((self.n_active > 0).sum()))
        return self.n_active.topk(size).indices

    def union(self, name: str = "") -> ConceptFeatures:
        """Return the union over prompts of their k_sel largest latents, weighted by their mean. Source: ItD, section 4.2."""
        indices = self.selected.nonzero().flatten()
        weights = self.mean[indices]
        return ConceptFeatures(name, indices, weights / weights.norm().clamp_min(1e-12))


def prompt_maxima(codes: SparseCodes) -> SparseCodes:
    """Return, for the codes (tokens, k) of one prompt, every active latent once, with its largest act."""
    indices, inverse = codes.indices.flatten().unique(return_inverse=True)
    acts = torch.zeros(len(indices)).scatter_reduce_(0, inverse, codes.acts.flatten(), "amax")
    active = acts > 0
    return SparseCodes(acts[active], indices[active])


def set_difference(target: FeatureStats, retain: FeatureStats, name: str) -> ConceptFeatures:
    """Select as the paper does: the union over target prompts minus the union over retain prompts."""
    return target.union(name) - retain.union()


def matched_filter(
    target: FeatureStats, retain: FeatureStats, name: str, n_features: int = 32, eps: float = 0.01
) -> ConceptFeatures:
    """Select the latents that tell a concept from the retained prompts, in closed form.

    w_j = max(0, mean_target(z_j) - mean_retain(z_j)) / (var_retain(z_j) + eps * max var_retain); the `n_features` largest,
    unit norm. This is Fisher's discriminant with a diagonal covariance.
    """
    variance = retain.variance
    gap = (target.mean - retain.mean).clamp_min(0)
    weights, indices = (gap / (variance + eps * variance.max().clamp_min(1e-12))).topk(min(n_features, len(gap)))
    indices, order = indices[weights > 0].sort()
    chosen = weights[weights > 0][order]
    return ConceptFeatures(name, indices, chosen / chosen.norm().clamp_min(1e-12))


def fisher_filter(
    target: FeatureStats, retain: FeatureStats, retained: PromptCodes, name: str, n_features: int = 64, shrinkage: float = 0.3
) -> ConceptFeatures:
    """Select latents as `matched_filter` does, and weigh them with the covariance they have on the retained prompts.

    w = (S + shrinkage * (diag S + 0.1 max_j S_jj I))^-1 (mean_target(z) - mean_retain(z)), unit norm, where S is the
    covariance of the per-prompt maxima of the `n_features` latents with the largest mean_target - mean_retain in units of
    their deviation. A latent that a neighbour of the concept has too may weigh less than nothing.
    Source: Friedman 1989, Regularized discriminant analysis.
    """
    gap = target.mean - retain.mean
    indices = most_telling(gap, retain.variance, n_features)
    maxima = retained.largest(dense_acts(retained.codes, indices)).clamp_min(0)
    return ConceptFeatures(name, indices, fisher_weights(maxima, gap[indices], shrinkage))


class TokenStats(NamedTuple):
    """Moments of every latent over single tokens."""

    mean: Float[Tensor, " n_latents"]
    variance: Float[Tensor, " n_latents"]


def token_stats(codes: SparseCodes, n_latents: int) -> TokenStats:
    """Return mean and variance of every latent over the tokens; zero, where there are none."""
    sums = torch.zeros(2, n_latents, dtype=torch.float64)
    indices = codes.indices.flatten().cpu()
    for row, power in enumerate((1, 2)):
        sums[row].scatter_add_(0, indices, codes.acts.flatten().cpu().double().pow(power))
    mean, square = sums / max(1, len(codes.acts))
    return TokenStats(mean.float(), (square - mean.square()).clamp_min(0).float())


def token_filter(
    start: ConceptFeatures,
    target: PromptCodes,
    retained: PromptCodes,
    others: TokenStats,
    n_features: int = 256,
    shrinkage: float = 0.02,
    n_rounds: int = 3,
) -> ConceptFeatures:
    """Select latents that tell the tokens which name a concept from all tokens of what stays.

    The gate compares a prompt's strongest window of tokens, so the filter is Fisher's discriminant of windows. Which tokens of
    a prompt name the concept is found in turns: the window that the filter so far, at first `start`, scores highest.

        w = (S + shrinkage * (diag S + 0.1 max_j S_jj I))^-1 (mean_naming(z) - mean_retained(z)), unit norm

    S: covariance over the retained windows of the `n_features` latents with the largest difference of means in units of their
    deviation over tokens. `others`: `token_stats` of the retained tokens.

    Source: Andrews et al. 2003, Support vector machines for multiple-instance learning, section 3, for the turns.
    """
    found = start
    named = torch.zeros(0, dtype=torch.int64)
    for _ in range(n_rounds):
        before, named = named, naming_tokens(found, target)
        if torch.equal(before, named):
            break
        chosen = SparseCodes(target.codes.acts[named], target.codes.indices[named])
        gap = token_stats(chosen, len(others.mean)).mean - others.mean
        indices = most_telling(gap, others.variance, n_features)
        means = window_means(dense_acts(retained.codes, indices), retained.n_tokens, start.window)
        weights = fisher_weights(means[means.isfinite().all(1)], gap[indices], shrinkage)
        found = replace(start, indices=indices, weights=weights)
    return found


def naming_tokens(concept: ConceptFeatures, prompts: PromptCodes) -> Int[Tensor, " n"]:
    """Return, for every prompt that has tokens, the places of the window that a filter scores highest; of equals the first."""
    scores = dense_acts(prompts.codes, concept.indices) @ concept.weights
    means = window_means(scores[:, None], prompts.n_tokens, concept.window)[:, 0]
    stops = prompts.n_tokens.cumsum(0)
    places = []
    for begin, stop in zip((stops - prompts.n_tokens).tolist(), stops.tolist(), strict=True):
        if stop > begin:
            last = begin + int(means[begin:stop].argmax())
            places.append(torch.arange(last + 1 - min(concept.window, stop - begin), last + 1))
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def window_means(
    values: Float[Tensor, "tokens n"], n_tokens: Int[Tensor, " prompts"], window: int
) -> Float[Tensor, "tokens n"]:
    """Return the mean over each token and the `window - 1` before it in its prompt; minus infinity where there are fewer.

    Of a prompt that is shorter than the window, the mean over all of it, at its last token. A mean is never rounded above its
    largest value.
    """
    if window == 1:
        return values
    sizes = n_tokens.repeat_interleave(n_tokens)
    place = torch.arange(len(values)) - (n_tokens.cumsum(0) - n_tokens).repeat_interleave(n_tokens)
    sizes, place = sizes.clamp_max(window).to(values.device), place.to(values.device)
    total = peak = values
    for back in range(1, window):
        earlier = torch.cat([torch.zeros_like(values[:back]), values[:-back]])[: len(values)]
        inside = (place >= back)[:, None]
        total = total + torch.where(inside, earlier, 0)
        peak = torch.where(inside, torch.maximum(peak, earlier), peak)
    means = torch.minimum(total / sizes[:, None], peak)
    return torch.where((place >= sizes - 1)[:, None], means, -torch.inf)


def window_scores(
    values: Float[Tensor, "tokens concepts"], n_tokens: Int[Tensor, " prompts"], windows: Sequence[int]
) -> Float[Tensor, "tokens concepts"]:
    """Return for every token and concept the score of the best window of that concept that the token is in.

    A window's score is the mean over its tokens, so it is at most that of its strongest token.
    """
    if all(window == 1 for window in windows):
        return values
    stops = n_tokens.cumsum(0).repeat_interleave(n_tokens).to(values.device)
    left = stops - torch.arange(len(values), device=values.device)
    found = values.clone()
    for window in set(windows) - {1}:
        columns = [column for column, own in enumerate(windows) if own == window]
        best = means = window_means(values[:, columns], n_tokens, window)
        for ahead in range(1, min(window, len(means))):
            later = torch.cat([means[ahead:], torch.full_like(means[:ahead], -torch.inf)])
            best = torch.where((left > ahead)[:, None], torch.maximum(best, later), best)
        found[:, columns] = best
    return found


def most_telling(gap: Float[Tensor, " n_latents"], variance: Float[Tensor, " n_latents"], n_features: int) -> Int[Tensor, " n"]:
    """Return the latents with the largest difference of means in units of their deviation, above 0, sorted."""
    deviation = (variance + 0.01 * variance.max().clamp_min(1e-12)).sqrt()
    _, indices = (gap.clamp_min(0) / deviation).topk(min(n_features, len(gap)))
    return indices[gap[indices] > 0].sort().values


def fisher_weights(
    acts: Float[Tensor, "n features"], gap: Float[Tensor, " features"], shrinkage: float
) -> Float[Tensor, " features"]:
    """Return `(S + shrinkage * (diag S + 0.1 max_j S_jj I))^-1 gap`, unit norm; S: covariance of the acts."""
    if len(gap) == 0:
        return torch.zeros(0)
    covariance = torch.cov(acts.T).reshape(len(gap), len(gap))
    variance = covariance.diagonal()
    floor = 0.1 * variance.max().clamp_min(1e-12)
    weights = torch.linalg.solve(covariance + shrinkage * torch.diag(variance + floor), gap)
    return weights / weights.norm().clamp_min(1e-12)


def dense_acts(codes: SparseCodes, features: Int[Tensor, " n"]) -> Float[Tensor, "tokens n"]:
    """Return the acts of some latents (sorted, distinct) at every token, dense over those only."""
    acts = torch.zeros(len(codes.acts), len(features) + 1, device=codes.acts.device)
    if len(features) == 0:
        return acts[:, :0]
    return acts.scatter_add_(1, positions(codes.indices, features), codes.acts)[:, :-1]


def positions(indices: Int[Tensor, "tokens k"], features: Int[Tensor, " n"]) -> Int[Tensor, "tokens k"]:
    """Return where among the features (sorted, distinct, at least one) each index stands, n where it does not."""
    n = len(features)
    if indices.numel() < TABLE_FROM:
        found = torch.searchsorted(features, indices).clamp_max(n - 1)
        return torch.where(features[found] == indices, found, n)
    table = torch.full((1 + int(max(indices.max(), features[-1])),), n, device=indices.device)
    table[features] = torch.arange(n, device=indices.device)
    return table[indices]


def all_indices(concepts: Sequence[ConceptFeatures]) -> Int[Tensor, " n"]:
    """Return the distinct features of several concepts, sorted."""
    return torch.cat([concept.indices for concept in concepts] or [torch.zeros(0, dtype=torch.int64)]).unique()
