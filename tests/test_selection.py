from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from itd.screening import Bound
from itd.selection import Pool


def feed(values: Tensor, k: int, tile: int, bound: Bound | None = None, norm: Tensor | None = None) -> Pool:
    """Offer values (n_latents, n) to a pool, tile by tile."""
    pool = Pool(values.shape[1], k, values[:0], bound, norm)
    for indices in torch.arange(len(values)).split(tile):
        pool.offer(values[indices], indices)
    pool.compact()
    return pool


def largest(values: Tensor, k: int) -> Tensor:
    """Return (n, k): the largest of every token, sorted, negative ones as 0."""
    return values.sort(dim=0, descending=True).values[:k].T.clamp_min(0)


def arranged(kind: str, n_latents: int, n: int, seed: int = 0) -> Tensor:
    values = torch.randn(n_latents, n, generator=torch.Generator().manual_seed(seed))
    if kind == "rising":
        return values.sort(dim=0).values
    if kind == "falling":
        return values.sort(dim=0, descending=True).values
    if kind == "ties":
        return (values * 2).round()
    return values - 3.5 if kind == "rarely positive" else values


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "ties", "rarely positive"])
@pytest.mark.parametrize("tile", [16, 50, 700])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_largest_are_found_in_any_order(kind: str, tile: int, k: int) -> None:
    values = arranged(kind, 700, 9)
    pool = feed(values, k, tile)
    assert torch.equal(pool.upper[:, :k].clamp_min(0), largest(values, k))
    assert torch.equal(values.T.gather(1, pool.indices[:, :k]), pool.upper[:, :k])
    assert all(len(set(row)) == k for row in pool.indices[:, :k].tolist())
    assert not pool.overflow.any()


@given(n_latents=st.integers(1, 200), n=st.integers(1, 4), tile=st.integers(1, 90), data=st.data())
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
def test_the_largest_are_found_for_any_size(n_latents: int, n: int, tile: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n_latents))
    values = arranged(data.draw(st.sampled_from(["random", "rising", "ties"])), n_latents, n, seed=n_latents)
    assert torch.equal(feed(values, k, tile).upper[:, :k].clamp_min(0), largest(values, k))


def test_few_values_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    n_found: list[int] = []
    search = Pool.search

    def count(pool: Pool, *arguments: Tensor) -> object:
        found = search(pool, *arguments)
        n_found.append(len(found.tokens))
        return found

    monkeypatch.setattr(Pool, "search", count)
    values = arranged("random", 20_000, 8)
    feed(values, 8, 400)
    assert 0 < sum(n_found) < values.numel() / 50


def test_within_a_bound_nothing_is_lost() -> None:
    """Values that are wrong by up to their bound: every one of the truly largest is among the candidates, or it is said."""
    generator = torch.Generator().manual_seed(1)
    exact = arranged("random", 3000, 12)
    norm, per_token = torch.rand(3000, generator=generator), 0.1 * torch.rand(12, generator=generator)
    radius = norm[:, None] * per_token + 0.01
    wrong = exact + radius * (2 * torch.rand(exact.shape, generator=generator) - 1)
    pool = feed(wrong, 8, 100, Bound(per_token, 0.01, 1e-6), norm)
    assert not pool.overflow.all()
    for token in (~pool.overflow).nonzero().flatten().tolist():
        candidates = set(pool.indices[token, : int(pool.fill[token])].tolist())
        assert set(exact[:, token].topk(8).indices.tolist()) <= candidates
        assert len(candidates) < 40
    naive = wrong.topk(8, dim=0).indices
    assert not torch.equal(naive.sort(dim=0).values, exact.topk(8, dim=0).indices.sort(dim=0).values)


def test_more_candidates_than_there_is_room_for_are_reported() -> None:
    values = torch.ones(2000, 2)
    values[:, 1] = arranged("random", 2000, 1)[:, 0]
    pool = feed(values, 4, 100, Bound(torch.tensor([0.1, 1e-6]), 0.0, 0.0), torch.ones(2000))
    assert pool.overflow.tolist() == [True, False]
