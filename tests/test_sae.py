from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.kernels import dense_decode, dense_encode, densify
from safetensors.torch import load_file

from itd import SAE, HookPoint, SAEConfig, artifacts
from itd.artifacts import save_artifact
from itd.sae import available_memory

CONFIG = SAEConfig(d_model=6, n_latents=40, k=5)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def random_sae(seed: int = 0) -> SAE:
    return SAE.random(CONFIG, seed, HookPoint("text_encoder", "encoder.layers.1"))


def random_input(*shape: int, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed))


def save_raw(folder: Path, **changes: Any) -> None:
    """Write an autoencoder's artifact with some tensors or parts of its config replaced or, with None, left out."""
    sae = random_sae()
    config = {"sae": {"d_model": 6, "n_latents": 40, "k": 5}, "hook_point": "text_encoder:encoder.layers.1", "metrics": {}}
    tensors = {name: getattr(sae, name) for name in NAMES}
    tensors = {name: value for name, value in (tensors | changes.pop("tensors", {})).items() if value is not None}
    save_artifact(folder, "sae", config | changes, {"sae": tensors})


# Encoding and decoding


def test_a_random_autoencoder_has_biases_and_unit_rows() -> None:
    sae = random_sae()
    assert sae.b_enc.abs().min() > 0
    assert sae.b_dec.abs().min() > 0
    assert not torch.allclose(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_codes_and_reconstruction_equal_the_dense_ones() -> None:
    sae, x = random_sae(), random_input(20)
    codes, dense = sae.encode(x), dense_encode(x, sae.W_enc, sae.b_enc, sae.b_dec, 5)
    torch.testing.assert_close(densify(*codes, 40), dense)
    torch.testing.assert_close(sae.write(codes), dense_decode(dense, sae.W_dec))
    torch.testing.assert_close(sae.decode(codes), dense_decode(dense, sae.W_dec) + sae.b_dec)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 4), (0,), (0, 3), (3, 0)])
def test_any_batch_shape_goes_through(shape: tuple[int, ...]) -> None:
    sae, x = random_sae(), random_input(*shape)
    codes = sae.encode(x)
    assert codes.acts.shape == codes.indices.shape == (*shape, 5)
    assert sae.decode(codes).shape == x.shape
    flat = sae.decode(sae.encode(x.reshape(-1, 6)))
    torch.testing.assert_close(sae.decode(codes).reshape(-1, 6), flat)


def test_half_precision_activations_are_encoded_in_full_precision() -> None:
    sae, x = random_sae(), random_input(20).to(torch.bfloat16)
    assert torch.equal(sae.encode(x).acts, sae.encode(x.float()).acts)


def test_the_fraction_of_variance_unexplained_is_what_its_name_says() -> None:
    sae, x = random_sae(), random_input(50)
    x_hat = dense_decode(dense_encode(x, sae.W_enc, sae.b_enc, sae.b_dec, 5), sae.W_dec) + sae.b_dec
    expected = float(((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert sae.fvu(x) == pytest.approx(expected, rel=1e-5)
    assert sae.fvu(x, batch_size=7) == pytest.approx(expected, rel=1e-5)


def test_a_copy_on_a_device_encodes_alike() -> None:
    sae, x = random_sae(), random_input(9)
    copy = sae.to("cpu")
    assert torch.equal(copy.encode(x).acts, sae.encode(x).acts)
    assert copy.hook_point == sae.hook_point


# Bad input


@pytest.mark.parametrize("d_model", [5, 7])
def test_activations_of_another_width_are_an_error(d_model: int) -> None:
    with pytest.raises(ValueError, match=f"activations have d_model {d_model}, this autoencoder takes 6"):
        random_sae().encode(torch.zeros(3, d_model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_an_error(value: float) -> None:
    x = random_input(4)
    random_sae().encode(x)
    x[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity: the text encoder overflowed; use fp32 or bf16"):
        random_sae().encode(x)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 4, 2), "d_model must be at least 1, got 0"),
        ((4, -1, 2), "n_latents must be at least 1, got -1"),
        ((4, 4, 0), "k must be at least 1, got 0"),
        ((4, 4, 5), "k must be at most n_latents = 4, got 5"),
    ],
)
def test_sizes_out_of_range_are_errors(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAEConfig(*size)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_shape_are_an_error(name: str) -> None:
    weights = {each: getattr(random_sae(), each) for each in NAMES}
    weights[name] = weights[name][:-1]
    with pytest.raises(ValueError, match=f"{name} has shape .*, the config asks for"):
        SAE(CONFIG, **weights)


# Memory


def test_the_size_in_bytes_is_that_of_the_weights() -> None:
    assert CONFIG.n_bytes == sum(getattr(random_sae(), name).nbytes for name in NAMES)


def test_memory_is_asked_of_the_operating_system() -> None:
    assert available_memory() > 10**6


def test_a_system_without_meminfo_gives_an_estimate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert available_memory() > 10**6


# Saving and loading


def test_an_autoencoder_reads_back_bit_for_bit(tmp_path: Path) -> None:
    sae = random_sae()
    sae.metrics["fvu"] = 0.125
    saved = sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    for each in (saved, loaded):
        assert all(torch.equal(getattr(each, name), getattr(sae, name)) for name in NAMES)
        assert (each.config, each.hook_point, each.metrics) == (sae.config, sae.hook_point, sae.metrics)
    assert saved.sha256 == loaded.sha256 != sae.sha256 is None
    assert saved.source == loaded.source == str((tmp_path / "sae").resolve())


def test_the_hash_tells_autoencoders_apart(tmp_path: Path) -> None:
    hashes = [random_sae(seed).save(tmp_path / str(i)).sha256 for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_half_precision_is_stored_and_full_precision_computed_with(tmp_path: Path) -> None:
    sae = random_sae()
    half = sae.save(tmp_path / "sae", dtype=torch.float16)
    assert load_file(tmp_path / "sae" / "sae.safetensors")["W_enc"].dtype == torch.float16
    assert half.W_enc.dtype == torch.float32
    assert torch.equal(half.W_enc, sae.W_enc.half().float())


def test_an_autoencoder_without_a_hook_point_is_saved_as_such(tmp_path: Path) -> None:
    assert SAE.random(CONFIG).save(tmp_path / "sae").hook_point is None


def test_an_autoencoder_can_be_saved_over_itself(tmp_path: Path) -> None:
    sae = random_sae().save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae").save(tmp_path / "sae")
    assert torch.equal(again.W_enc, sae.W_enc)
    assert again.sha256 == sae.sha256


def test_a_full_disk_keeps_the_old_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = random_sae(0).save(tmp_path / "sae")

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        random_sae(1).save(tmp_path / "sae")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    assert SAE.load(tmp_path / "sae").sha256 == old.sha256


def test_a_folder_without_an_autoencoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sae at"):
        SAE.load(tmp_path)


def test_the_raw_artifact_of_these_tests_loads(tmp_path: Path) -> None:
    """Control: without a change it is a good one."""
    save_raw(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").config == CONFIG


SIZES = {"d_model": 6, "n_latents": 40, "k": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": SIZES | {"typo": 1}}, r"config\.json: unknown keys \['typo'\], missing keys \[\]; save it again"),
        ({"sae": {"d_model": 6}}, r"config\.json: unknown keys \[\], missing keys \['k', 'n_latents'\]; save it again"),
        ({"sae": [6, 40, 5]}, r"config\.json: expected an object with the keys .*, found \[6, 40, 5\]"),
        ({"sae": SIZES | {"k": "five"}}, r"/sae is malformed: .*; save it again"),
        ({"sae": SIZES | {"k": 0}}, r"/sae is malformed: k must be at least 1, got 0"),
        ({"sae": SIZES | {"n_latents": 41}}, r"/sae is malformed: W_enc has shape \(40, 6\), the config asks for \(41, 6\)"),
        ({"hook_point": "encoder.layers.1"}, "/sae is malformed: a hook point is written ENCODER:PATH"),
        ({"hook_point": 8}, "/sae is malformed: "),
        ({"tensors": {"b_enc": None}}, r"sae\.safetensors: unknown keys \[\], missing keys \['b_enc'\]; save it again"),
        ({"tensors": {"extra": torch.zeros(1)}}, r"sae\.safetensors: unknown keys \['extra'\]"),
        ({"tensors": {"metrics": torch.zeros(1)}}, r"sae\.safetensors: unknown keys \['metrics'\]"),
        ({"tensors": {"b_dec": torch.zeros(7)}}, r"/sae is malformed: b_dec has shape \(7,\), the config asks for \(6,\)"),
        ({"typo": 1}, r"config\.json: unknown keys \['typo'\]"),
    ],
)
def test_an_altered_autoencoder_is_an_error_that_names_its_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_raw(tmp_path / "sae", **changes)
    with pytest.raises(ValueError, match=message):
        SAE.load(tmp_path / "sae")


def test_a_config_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    random_sae().save(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text(json.dumps(["sae"]))
    with pytest.raises(ValueError, match=r"sae/config\.json is not a JSON object; save the sae again"):
        SAE.load(tmp_path / "sae")


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_autoencoder_is_an_error(tmp_path: Path, damage: str) -> None:
    random_sae().save(tmp_path / "sae")
    path = tmp_path / "sae" / "sae.safetensors"
    bits = path.read_bytes()
    path.write_bytes(bits[:-100] if damage == "truncated" else bits[:-1] + bytes([bits[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"sae\.safetensors is truncated or altered"):
        SAE.load(tmp_path / "sae")


def test_weights_stay_in_their_file_until_they_are_used_and_may_be_given_back(tmp_path: Path) -> None:
    sae = random_sae()
    for dtype, mapped in ((torch.float32, True), (torch.float16, False)):
        loaded = sae.save(tmp_path / "sae", dtype)
        assert (loaded.mapped is not None) == mapped
        x = torch.randn(5, loaded.config.d_model)
        before = loaded.decode(loaded.encode(x))
        loaded.release()
        assert torch.equal(loaded.decode(loaded.encode(x)), before)
    sae.release()
    assert sae.to("cpu").mapped is None
