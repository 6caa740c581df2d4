from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.kernels import dense_decode, dense_encode, dense_group_encode, dense_reconstruction, densify
from torch import Tensor

from itd import kernels
from itd.kernels import (
    Group,
    RowGradients,
    SparseCodes,
    encode_groups,
    gradient_chunks,
    keep_largest,
    sort_by_latent,
    sparse_decode,
    topk_encode,
)  # fmt: skip
from itd.screening import Screen

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

    def measure(*args: Tensor, **kwargs: Tensor) -> Tensor:
        result = addmm(*args, **kwargs)
        sizes.append(len(result))
        return result

    monkeypatch.setattr(torch, "addmm", measure)
    in_tiles(monkeypatch, 8 * 20 * 70)
    encode(random_input(20, 6), random_weights(6, 131), 5)
    assert sizes == [64, 64, 3]


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


# Groups


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 2**20])
def test_groups_of_latents_are_encoded_in_one_pass(monkeypatch: pytest.MonkeyPatch, screened: bool, tile_bytes: int) -> None:
    in_tiles(monkeypatch, tile_bytes)
    weights, x = random_weights(6, 300), random_input(20, 6)
    if screened:
        weights, x = {name: value.float() for name, value in weights.items()}, x.float()
    members = torch.rand(300, generator=torch.Generator().manual_seed(3)) < 0.4
    screen = Screen.of(weights["W_enc"], weights["b_enc"]) if screened else None
    arguments = (x, weights["W_enc"], weights["b_enc"], weights["b_dec"])
    everything, some = encode_groups(*arguments, [Group(5), Group(9, members)], screen)
    torch.testing.assert_close(densify(*everything, 300), dense_encode(*arguments, 5))
    torch.testing.assert_close(densify(*some, 300), dense_group_encode(*arguments, 9, members))
    assert members[some.indices[some.acts > 0]].all()
    assert not members[everything.indices].all()


def test_a_group_with_few_members_is_filled_up_with_zeros() -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    members = torch.zeros(50, dtype=torch.bool)
    members[[3, 40]] = True
    arguments = (x, weights["W_enc"], weights["b_enc"], weights["b_dec"])
    codes = encode_groups(*arguments, [Group(5, members)])[0]
    assert codes.acts.shape == (20, 5)
    assert ((codes.acts > 0).sum(1) <= 2).all()
    torch.testing.assert_close(densify(*codes, 50), dense_group_encode(*arguments, 2, members))


# Screening


def screened_problem(kind: str, n: int = 24, d_model: int = 32, n_latents: int = 3000) -> tuple[Tensor, dict[str, Tensor]]:
    """Make activations and weights in fp32: random ones, or ones that half precision cannot tell apart."""
    weights = {name: value.float() for name, value in random_weights(d_model, n_latents).items()}
    x = 3 * random_input(n, d_model).float()
    if kind == "close":
        base, noise = weights["W_enc"][:1], weights["W_enc"]
        weights |= {"W_enc": base + 1e-4 * noise, "b_enc": 1e-4 * weights["b_enc"]}
    elif kind == "large offsets":
        x = x + 200 * torch.nn.functional.normalize(weights["W_enc"][:1], dim=1)
        weights["b_enc"] *= 30
    elif kind == "rarely positive":
        weights["b_enc"] -= 60
    return x, weights


@pytest.mark.parametrize("kind", ["random", "close", "large offsets", "rarely positive"])
@pytest.mark.parametrize("tile_bytes", [2 * 24 * 320, 2**22])
def test_screening_changes_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, tile_bytes: int) -> None:
    in_tiles(monkeypatch, tile_bytes)
    x, weights = screened_problem(kind)
    arguments = (x, weights["W_enc"], weights["b_enc"], weights["b_dec"])
    codes = topk_encode(*arguments, 8, Screen.of(weights["W_enc"], weights["b_enc"]))
    expected = dense_encode(*(value.double() for value in arguments), 8).topk(8, dim=1).values.float()
    torch.testing.assert_close(codes.acts.sort(dim=1, descending=True).values, expected, rtol=1e-4, atol=1e-4)
    pre_acts = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).clamp_min(0)
    torch.testing.assert_close(pre_acts.gather(1, codes.indices), codes.acts, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == 8 for row in codes.indices.tolist())


def test_half_precision_alone_would_change_the_selection() -> None:
    """Control: without the exact second look, the close latents are confused."""
    x, weights = screened_problem("close")
    rounded = {name: value.bfloat16().float() for name, value in weights.items()}
    exact, screened = (encode(x, w, 8) for w in (weights, rounded))
    assert any(set(a) != set(b) for a, b in zip(exact.indices.tolist(), screened.indices.tolist(), strict=True))


# Gradients


def collect(chunks: list[RowGradients]) -> RowGradients:
    return RowGradients(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def all_gradients(x: Tensor, weights: dict[str, Tensor], codes: SparseCodes, grad: Tensor) -> RowGradients:
    pairs = sort_by_latent(codes)
    return collect(list(gradient_chunks(pairs, x - weights["b_dec"], grad, weights["W_dec"])))


@pytest.mark.parametrize("chunk_pairs", [1, 7, 1024])
@pytest.mark.parametrize(("n", "d_model", "n_latents", "k"), SHAPES)
def test_sparse_gradients_equal_autograd(
    monkeypatch: pytest.MonkeyPatch, n: int, d_model: int, n_latents: int, k: int, chunk_pairs: int
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_PAIRS", chunk_pairs)
    weights, x, grad = random_weights(d_model, n_latents), random_input(n, d_model), random_input(n, d_model, seed=2)
    codes = encode(x, weights, k)
    found = all_gradients(x, weights, codes, grad)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    (dense_reconstruction(x, leaves, k) * grad).sum().backward()
    assert found.rows.tolist() == sorted(set(codes.indices[codes.acts > 0].tolist()))
    for name in ("W_enc", "b_enc", "W_dec"):
        expected = leaves[name].grad
        assert expected is not None
        torch.testing.assert_close(getattr(found, name), expected[found.rows])
        untouched = torch.ones(n_latents, dtype=torch.bool)
        untouched[found.rows] = False
        assert not expected[untouched].any()


def test_latents_that_are_not_active_are_not_touched() -> None:
    weights, x = random_weights(4, 9), random_input(10, 4)
    weights["b_enc"][:3] = -100.0
    codes = encode(x, weights, 8)
    assert (codes.indices < 3).any()
    found = all_gradients(x, weights, codes, random_input(10, 4, seed=2))
    assert (found.rows >= 3).all()
    assert found.W_enc.any(dim=1).all()


def test_no_chunk_has_more_pairs_than_allowed_unless_one_latent_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_PAIRS", 10)
    weights, x = random_weights(6, 50), random_input(40, 6)
    pairs = sort_by_latent(encode(x, weights, 5))
    counts = dict(zip(pairs.rows.tolist(), pairs.offsets.diff().tolist(), strict=True))
    chunks = list(gradient_chunks(pairs, x, x, weights["W_dec"]))
    assert len(chunks) > 5
    assert all(len(rows) == 1 or sum(counts[row] for row in rows[:-1].tolist()) < 10 for rows, *_ in chunks)


def test_pairs_list_every_act_once() -> None:
    codes = encode(random_input(20, 6), random_weights(6, 50), 5)
    pairs = sort_by_latent(codes)
    latents = pairs.rows.repeat_interleave(pairs.offsets.diff())
    found = set(zip(pairs.tokens.tolist(), latents.tolist(), pairs.acts.tolist(), strict=True))
    expected = {
        (token, latent, act)
        for token in range(20)
        for latent, act in zip(codes.indices[token].tolist(), codes.acts[token].tolist(), strict=True)
        if act > 0
    }
    assert found == expected
    assert len(pairs.tokens) == len(expected)


def test_a_row_of_two_codes_gets_the_gradient_of_both() -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    codes, centred = encode(x, weights, 5), x - weights["b_dec"]
    grads = random_input(20, 6, seed=2), random_input(20, 6, seed=3)
    both = collect(
        list(gradient_chunks(sort_by_latent(codes, codes), torch.cat([centred] * 2), torch.cat(grads), weights["W_dec"]))
    )
    whole = all_gradients(x, weights, codes, grads[0] + grads[1])
    for found, expected in zip(both, whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_no_activity_gives_no_gradient() -> None:
    weights, x = random_weights(6, 50), random_input(20, 6)
    pairs = sort_by_latent(SparseCodes(torch.zeros(20, 5), torch.zeros(20, 5, dtype=torch.int64)))
    assert list(gradient_chunks(pairs, x, x, weights["W_dec"])) == []
