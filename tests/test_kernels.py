from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.kernels import dense_decode, dense_encode, dense_reconstruction, densify
from torch import Tensor

from itd import kernels
from itd.kernels import SparseCodes, add_gradients, keep_largest, sparse_decode, sparse_gradients, topk_encode

SHAPES = [(1, 3, 5, 1), (7, 4, 9, 2), (20, 6, 50, 5), (5, 8, 8, 8), (13, 6, 131, 7)]


def random_weights(d_model: int, n_latents: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights with biases that matter, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "W_enc": draw(n_latents, d_model), "b_enc": draw(n_latents), "W_dec": draw(n_latents, d_model), "b_dec": draw(d_model)
    }  # fmt: skip


def random_input(n: int, d_model: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode(x: Tensor, weights: dict[str, Tensor], k: int) -> SparseCodes:
    return topk_encode(x, weights["W_enc"], weights["b_enc"], weights["b_dec"], k)


def in_tiles(monkeypatch: pytest.MonkeyPatch, tile_bytes: int) -> None:
    monkeypatch.setattr(kernels, "TILE_BYTES", tile_bytes)


@pytest.mark.parametrize(("n", "d_model", "n_latents", "k"), SHAPES)
def test_sparse_encode_equals_dense(n: int, d_model: int, n_latents: int, k: int) -> None:
    weights, x = random_weights(d_model, n_latents), random_input(n, d_model)
    codes = encode(x, weights, k)
    assert codes.acts.shape == codes.indices.shape == (n, k)
    assert (codes.acts >= 0).all()
    dense = dense_encode(x, weights["W_enc"], weights["b_enc"], weights["b_dec"], k)
    torch.testing.assert_close(densify(*codes, n_latents), dense)


def test_every_latent_stands_once_in_a_code() -> None:
    codes = encode(random_input(20, 6), random_weights(6, 50), 5)
    assert all(len(set(row)) == 5 for row in codes.indices.tolist())


def test_negative_pre_activations_are_not_active() -> None:
    weights, x = random_weights(4, 9), random_input(30, 4)
    weights["b_enc"] -= 2.5
    codes = encode(x, weights, 5)
    assert (codes.acts == 0).any()
    assert (codes.acts > 0).any()
    dense = dense_encode(x, weights["W_enc"], weights["b_enc"], weights["b_dec"], 5)
    torch.testing.assert_close(densify(*codes, 9), dense)


@pytest.mark.parametrize("name", ["b_enc", "b_dec"])
def test_the_biases_count(name: str) -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    without = weights | {name: torch.zeros_like(weights[name])}
    assert not torch.equal(encode(x, weights, 5).acts, encode(x, without, 5).acts)


@pytest.mark.parametrize("tile_bytes", [1, 4 * 20 * 21, 4 * 20 * 49, 4 * 20 * 50])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_size_of_a_tile_does_not_matter(monkeypatch: pytest.MonkeyPatch, tile_bytes: int, k: int) -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    whole = encode(x, weights, k)
    in_tiles(monkeypatch, tile_bytes)
    tiled = encode(x, weights, k)
    torch.testing.assert_close(densify(*tiled, 50), densify(*whole, 50))


def test_no_tile_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    addmm = torch.addmm

    def measure(*args: Tensor) -> Tensor:
        result = addmm(*args)
        sizes.append(result.shape[1])
        return result

    monkeypatch.setattr(torch, "addmm", measure)
    in_tiles(monkeypatch, 4 * 20 * 30)
    encode(random_input(20, 6), random_weights(6, 131), 5)
    assert sizes == [30, 30, 30, 30, 11]


@given(n=st.integers(1, 6), n_latents=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_sparse_encode_equals_dense_for_any_size_and_tile(n: int, n_latents: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n_latents))
    weights, x = random_weights(3, n_latents, seed=n), random_input(n, 3, seed=k)
    with pytest.MonkeyPatch.context() as patch:
        in_tiles(patch, data.draw(st.sampled_from([1, 4 * n * (k + 1), 10**6])))
        codes = encode(x, weights, k)
    dense = dense_encode(x, weights["W_enc"], weights["b_enc"], weights["b_dec"], k)
    torch.testing.assert_close(densify(*codes, n_latents), dense)


def test_encoding_nothing_gives_nothing() -> None:
    codes = encode(random_input(0, 6), random_weights(6, 50), 5)
    assert codes.acts.shape == codes.indices.shape == (0, 5)


def test_keep_largest_takes_all_while_there_is_room() -> None:
    a = SparseCodes(torch.tensor([[3.0, 1.0]]), torch.tensor([[0, 1]]))
    b = SparseCodes(torch.tensor([[2.0]]), torch.tensor([[7]]))
    assert sorted(keep_largest(a, b, 3).indices[0].tolist()) == [0, 1, 7]
    assert sorted(keep_largest(a, b, 2).indices[0].tolist()) == [0, 7]


@pytest.mark.parametrize(("n", "d_model", "n_latents", "k"), SHAPES)
def test_sparse_decode_equals_dense(n: int, d_model: int, n_latents: int, k: int) -> None:
    weights, x = random_weights(d_model, n_latents), random_input(n, d_model)
    codes = encode(x, weights, k)
    torch.testing.assert_close(
        sparse_decode(codes, weights["W_dec"]), dense_decode(densify(*codes, n_latents), weights["W_dec"])
    )


@pytest.mark.parametrize(("n", "d_model", "n_latents", "k"), SHAPES)
def test_sparse_gradients_equal_autograd(n: int, d_model: int, n_latents: int, k: int) -> None:
    weights, x, grad = random_weights(d_model, n_latents), random_input(n, d_model), random_input(n, d_model, seed=2)
    codes = encode(x, weights, k)
    found = sparse_gradients(x - weights["b_dec"], codes, grad, weights["W_dec"])
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    (dense_reconstruction(x, leaves, k) * grad).sum().backward()
    assert found.rows.tolist() == sorted(set(codes.indices.flatten().tolist()))
    for name in ("W_enc", "b_enc", "W_dec"):
        expected = leaves[name].grad
        assert expected is not None
        torch.testing.assert_close(getattr(found, name), expected[found.rows])
        untouched = torch.ones(n_latents, dtype=torch.bool)
        untouched[found.rows] = False
        assert not expected[untouched].any()
    torch.testing.assert_close(found.b_dec, leaves["b_dec"].grad)


def test_latents_that_are_not_active_get_no_gradient() -> None:
    weights, x = random_weights(4, 9), random_input(10, 4)
    weights["b_enc"][:3] = -100.0
    codes = encode(x, weights, 8)
    found = sparse_gradients(x - weights["b_dec"], codes, random_input(10, 4, seed=2), weights["W_dec"])
    dead, alive = found.rows < 3, found.rows >= 3
    assert dead.any()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not getattr(found, name)[dead].any()
        assert getattr(found, name)[alive].any()


def test_the_sum_of_two_gradients_counts_shared_rows_twice() -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    codes, centred = encode(x, weights, 5), x - weights["b_dec"]
    parts = [
        sparse_gradients(centred[rows], SparseCodes(codes.acts[rows], codes.indices[rows]), x[rows], weights["W_dec"])
        for rows in (slice(0, 8), slice(8, 20))
    ]
    whole = sparse_gradients(centred, codes, x, weights["W_dec"])
    total = add_gradients(*parts)
    assert set(parts[0].rows.tolist()) & set(parts[1].rows.tolist())
    for found, expected in zip(total, whole, strict=True):
        torch.testing.assert_close(found, expected)
