from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import make_store

from itd import SAE, SAEConfig, TrainConfig, scale, train
from itd.activations import ActivationStore
from itd.scale import ScaleArguments, TokenParallel, main, train_in_processes
from itd.training import CHECKPOINT, PARAMETERS, Trainer

SIZE = SAEConfig(d_model=12, n_latents=41, k=4)
SETTINGS = TrainConfig(
    n_tokens=12 * 9, batch_tokens=9, lr=0.01, warmup_steps=3, k_aux=8, aux_weight=1.0, dead_tokens=1, checkpoint_every=5
)
HALF = replace(SETTINGS, moments="bfloat16", screen="always", init="random", whiten=False)
SMALL = replace(HALF, moments="int8")
CASES = {"tokens": SETTINGS, "latents": SETTINGS, "latents-half": HALF, "latents-small": SMALL}


def in_a_process(rank: int, folder: str) -> None:
    """Train every case as one of two processes; the first writes the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, settings in CASES.items():
        split = "tokens" if name == "tokens" else "latents"
        out = Path(folder) / name
        sae = train_in_processes(make_store(), SIZE, settings, out, split)
        again = train_in_processes(make_store(), SIZE, settings, out, split)
        assert (sae is None) == (again is None) == (rank > 0)
        if sae is not None and again is not None:
            save_file({key: getattr(sae, key) for key in PARAMETERS}, out / "weights.safetensors")
            (out / "metrics.txt").write_text(f"{sae.metrics['fvu']} {sae.metrics['dead_share']}")
            assert all(torch.equal(getattr(sae, key), getattr(again, key)) for key in PARAMETERS)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of weights that two processes have trained."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_a_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(trained: Path, name: str) -> None:
    found = load_file(trained / name / "weights.safetensors")
    alone = train(make_store(), SIZE, CASES[name])
    start = Trainer(make_store(), SIZE, CASES[name]).weights
    tolerance = 1e-3 if CASES[name].moments == "float32" else 1e-2
    for key in PARAMETERS:
        torch.testing.assert_close(found[key], getattr(alone, key), rtol=tolerance, atol=tolerance / 10)
        assert not torch.allclose(found[key], start[key], rtol=tolerance, atol=tolerance / 10)
    fvu, dead_share = map(float, (trained / name / "metrics.txt").read_text().split())
    assert fvu == pytest.approx(alone.metrics["fvu"], rel=tolerance)
    assert dead_share == pytest.approx(alone.metrics["dead_share"], abs=1e-6)


def test_the_cases_use_dead_latents() -> None:
    """Control: without AuxK the weights would be others, so that the comparison covers it."""
    with_aux, without = (train(make_store(), SIZE, replace(SETTINGS, k_aux=k_aux)) for k_aux in (8, 0))
    assert not torch.allclose(with_aux.W_dec, without.W_dec, rtol=1e-3, atol=1e-4)


def test_each_process_keeps_its_part_of_the_latents_only(trained: Path) -> None:
    parts = [load_file(trained / "latents" / f"checkpoint-{rank}-of-2.safetensors") for rank in range(2)]
    assert [len(part["weights/W_enc"]) for part in parts] == [20, 21]
    assert [path.name for path in (trained / "tokens").glob("checkpoint*")] == [CHECKPOINT]
    assert not list((trained / "latents").glob("part-*"))


def test_one_process_goes_on_where_two_that_shared_tokens_were_stopped(trained: Path) -> None:
    trainer = Trainer(make_store(), SIZE, SETTINGS)
    assert trainer.load(trained / "tokens" / CHECKPOINT)[0] == SETTINGS.n_steps
    found = load_file(trained / "tokens" / "weights.safetensors")
    assert all(torch.equal(trainer.weights[key], found[key]) for key in PARAMETERS)


# One process


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that torchrun sets for a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def write_store(folder: Path) -> ActivationStore:
    """Write activations as `record` does."""
    import json

    from itd.activations import write_tensors

    store = make_store()
    folder.mkdir()
    write_tensors(folder / "x.safetensors", {"x": store.x})
    write_tensors(folder / "weight.safetensors", {"weight": store.weight})
    config = {"kind": "activations", "finished": True, "shards": ["x.safetensors"], "hook_point": str(store.hook_point)}
    (folder / "config.json").write_text(json.dumps(config))
    return store


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("split", ["tokens", "latents"])
def test_the_command_trains_and_saves_an_autoencoder(tmp_path: Path, split: str) -> None:
    store = write_store(tmp_path / "acts")
    arguments = ["--activations", str(tmp_path / "acts"), "--out", str(tmp_path / "out"), "--split", split]
    arguments += ["--n-latents", "41", "--k", "4", "--n-tokens", "330", "--batch-tokens", "33"]
    assert main(arguments) == 0
    assert not dist.is_initialized()
    sae = SAE.load(tmp_path / "out" / "sae")
    expected = train(store, SIZE, TrainConfig(n_tokens=330, batch_tokens=33))
    torch.testing.assert_close(sae.W_dec, expected.W_dec, rtol=1e-4, atol=1e-5)
    assert sae.hook_point == store.hook_point


@pytest.mark.usefixtures("alone")
def test_processes_that_disagree_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo")
    try:
        trainer = TokenParallel(make_store(), SIZE, SETTINGS)
        monkeypatch.setattr(scale, "gather_rows", lambda x, n: torch.cat([x, x + 1]))
        with pytest.raises(RuntimeError, match="the processes hold different weights"):
            trainer.save(tmp_path / CHECKPOINT, 1, 0.0)
    finally:
        dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_without_torchrun_the_command_says_how_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert "RANK" not in os.environ
    with pytest.raises(ValueError, match="started by torchrun"):
        main(["--activations", str(tmp_path), "--out", str(tmp_path)])


@pytest.mark.usefixtures("alone")
def test_parts_with_fewer_latents_than_k_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda: 20)
    try:
        with pytest.raises(ValueError, match="20 processes cannot share 41 latents"):
            train_in_processes(make_store(), SIZE, SETTINGS, tmp_path, "latents")
    finally:
        dist.destroy_process_group()


def test_the_defaults_are_the_paper_size() -> None:
    arguments = ScaleArguments(activations=Path("a"), out=Path("b"))
    assert (arguments.n_latents, arguments.k, arguments.split) == (2**19, 64, "latents")
