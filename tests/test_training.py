from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.training import DenseAdam, dense_aux_loss, dense_loss
from safetensors.torch import save_file
from tiny import make_store

from itd import SAE, ActivationStore, SAEConfig, TrainConfig, activations, train, training
from itd.kernels import RowGradients
from itd.training import (
    CHECKPOINT,
    PARAMETERS,
    START_ROWS,
    Trainer,
    geometric_median,
    initial_weights,
    precision,
    starting_rows,
)  # fmt: skip

SIZE = SAEConfig(d_model=12, n_latents=40, k=4)
SHORT = TrainConfig(n_tokens=12 * 32, batch_tokens=32, warmup_steps=3, k_aux=8, dead_tokens=64, checkpoint_every=3)


class Killed(Exception):
    """Stands for whatever ends a run."""


def same_weights(a: SAE, b: SAE) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in PARAMETERS)


def make_trainer(store: ActivationStore, config: SAEConfig, settings: TrainConfig, seed: int = 4) -> Trainer:
    """Make a trainer in double precision, with random biases."""
    trainer = Trainer(store, config, settings)
    trainer.store = ActivationStore(store.x.double(), store.weight, store.hook_point)
    generator = torch.Generator().manual_seed(seed)
    for name in PARAMETERS:
        scale = 0.3 if name.startswith("b_") else 0.05
        noise = scale * torch.randn(trainer.weights[name].shape, generator=generator)
        trainer.weights[name] = (trainer.weights[name] + noise).double()
        trainer.first[name], trainer.second[name] = trainer.first[name].double(), trainer.second[name].double()
    if trainer.metric is not None:
        trainer.metric = trainer.metric.double()
    trainer.weights["W_dec"] /= trainer.weights["W_dec"].norm(dim=1, keepdim=True)
    trainer.renew_screen()
    return trainer


def assert_equal_weights(trainer: Trainer, dense: DenseAdam) -> None:
    for name in PARAMETERS:
        torch.testing.assert_close(trainer.weights[name], dense.weights[name].detach(), rtol=1e-5, atol=1e-7)


# One step


@pytest.mark.parametrize("ours", [True, False], ids=["whitened, relative rates", "plain"])
def test_steps_equal_dense_adam_on_the_autograd_of_the_loss_when_every_row_is_touched(
    store: ActivationStore, ours: bool
) -> None:
    config = SAEConfig(d_model=12, n_latents=10, k=6)
    settings = TrainConfig(n_tokens=6 * 256, batch_tokens=256, k_aux=0, warmup_steps=2, whiten=ours, relative_rates=ours)
    trainer = make_trainer(store, config, settings)
    start = {name: value.clone() for name, value in trainer.weights.items()}
    dense = DenseAdam(trainer.weights, trainer.rates)
    for step in range(6):
        x = trainer.draw(step)
        loss = dense_loss(x, dense.weights, config.k, trainer.variance, trainer.metric)
        unweighted = dense_loss(x, dense.weights, config.k, trainer.variance)
        assert trainer.step(step) == pytest.approx(unweighted.item(), rel=1e-6)
        dense.step(loss, trainer.learning_rate(step))
        assert (trainer.last_step == step).all(), "every row is touched"
    assert_equal_weights(trainer, dense)
    assert not torch.allclose(trainer.weights["W_enc"], start["W_enc"], rtol=1e-3)


def test_steps_with_dead_latents_equal_dense_adam_on_both_losses(store: ActivationStore) -> None:
    config = SAEConfig(d_model=12, n_latents=10, k=3)
    settings = TrainConfig(n_tokens=6 * 256, batch_tokens=256, k_aux=2, aux_weight=0.5, dead_tokens=1, warmup_steps=2)
    trainer = make_trainer(store, config, settings)
    trainer.weights["W_enc"][:4] *= 1e-3
    trainer.weights["b_enc"][:4] = torch.tensor([0.01, 0.02, 0.03, 0.04], dtype=torch.float64)
    trainer.weights["b_enc"][4:] += 3.0
    trainer.idle[:4] = settings.dead_tokens
    dense = DenseAdam(trainer.weights, trainer.rates)
    for step in range(6):
        x = trainer.draw(step)
        loss = dense_loss(x, dense.weights, config.k, trainer.variance, trainer.metric)
        dead = trainer.idle >= settings.dead_tokens
        assert dead[:4].all()
        trainer.step(step)
        loss = loss + settings.aux_weight * dense_aux_loss(x, dense.weights, config.k, dead, settings.k_aux, trainer.metric)
        dense.step(loss, trainer.learning_rate(step))
        touched = trainer.last_step == step
        assert touched[4:].all()
        for row in (~touched).nonzero().flatten():
            assert not any(dense.first[name][row].any() for name in ("W_enc", "b_enc", "W_dec"))
    assert_equal_weights(trainer, dense)


def test_moments_of_a_skipped_row_decay_as_if_its_gradient_had_been_zero(store: ActivationStore) -> None:
    trainer = make_trainer(store, SIZE, SHORT)
    dense_first, dense_second = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for step in range(8):
        grad = torch.randn(12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        grad = grad if step in (0, 1, 5, 7) else torch.zeros_like(grad)
        dense_first, dense_second = 0.9 * dense_first + 0.1 * grad, 0.999 * dense_second + 0.001 * grad**2
        if grad.any():
            zero = torch.zeros(1, dtype=torch.float64)
            trainer.update(
                RowGradients(
                    torch.tensor([3]), trainer.weights["W_dec"][3:4].clone(), grad[None], zero, torch.zeros_like(grad[None])
                ),
                step,
            )
    torch.testing.assert_close(trainer.first["W_enc"][3], dense_first, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(trainer.second["W_enc"][3], dense_second, rtol=1e-5, atol=1e-9)


def test_rows_that_are_not_touched_stay_bit_identical(store: ActivationStore) -> None:
    trainer = make_trainer(store, SAEConfig(12, 200, 4), TrainConfig(n_tokens=64, batch_tokens=8, k_aux=0))
    before = {name: trainer.weights[name].clone() for name in ("W_enc", "b_enc", "W_dec")}
    trainer.step(1)
    untouched = trainer.last_step == 0
    assert 0 < int(untouched.sum()) < 200
    for name, value in before.items():
        assert torch.equal(trainer.weights[name][untouched], value[untouched])
        assert not torch.equal(trainer.weights[name], value)


def same_steps(*settings: TrainConfig, n_steps: int = 12) -> list[Trainer]:
    trainers = [Trainer(make_store(), SIZE, each) for each in settings]
    for step in range(n_steps):
        for trainer in trainers:
            trainer.step(step)
    return trainers


def test_screening_trains_the_same_weights() -> None:
    always, never = same_steps(*(TrainConfig(**{**SHORT.__dict__, "screen": screen}) for screen in ("always", "never")))
    assert always.screen is not None
    assert never.screen is None
    for name in PARAMETERS:
        torch.testing.assert_close(always.weights[name], never.weights[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(always.screen.W[:, :-2].float(), always.weights["W_enc"].bfloat16().float())
    torch.testing.assert_close(always.screen.norm, always.weights["W_enc"].norm(dim=1))


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_small_moments_lead_to_the_same_error(store: ActivationStore, moments: Any) -> None:
    settings = TrainConfig(n_tokens=300 * 64, batch_tokens=64, lr=3e-3, dead_tokens=2000)
    small = TrainConfig(**{**settings.__dict__, "moments": moments})
    full_trainer, small_trainer = Trainer(store, SIZE, settings), Trainer(store, SIZE, small)
    assert small_trainer.second["b_enc"].dtype == torch.float32
    assert small_trainer.second["W_enc"].nbytes <= full_trainer.second["W_enc"].nbytes / 2
    if moments == "bfloat16":
        assert 2 * small_trainer.second["W_enc"].nbytes == full_trainer.second["W_enc"].nbytes
    errors = [train(store, SIZE, each).metrics["fvu"] for each in (settings, small)]
    assert errors[1] < 1.02 * errors[0]


def test_training_ends_with_the_error_of_dense_adam(store: ActivationStore) -> None:
    """Rows that are not active stay where they are, while dense Adam lets them coast: it makes no difference to the error."""
    settings = TrainConfig(n_tokens=300 * 64, batch_tokens=64, lr=3e-3, k_aux=0, init="random", whiten=False)
    trainer = Trainer(store, SIZE, settings)
    start = trainer.fvu(store.x)
    dense = DenseAdam(trainer.weights, trainer.rates)
    for step in range(settings.n_steps):
        loss = dense_loss(trainer.draw(step), dense.weights, SIZE.k, trainer.variance)
        dense.step(loss, trainer.learning_rate(step))
        trainer.step(step)
    dense_fvu = SAE(SIZE, **{name: value.detach() for name, value in dense.weights.items()}).fvu(store.x)
    assert trainer.fvu(store.x) < 1.02 * dense_fvu < 0.5 * start


def test_decoder_rows_keep_unit_norm(store: ActivationStore) -> None:
    trainer = make_trainer(store, SIZE, SHORT)
    for step in range(12):
        trainer.step(step)
    norms = trainer.weights["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_learning_rate_warms_up_and_decays(store: ActivationStore) -> None:
    linear = Trainer(store, SIZE, TrainConfig(n_tokens=100, batch_tokens=1, warmup_steps=10, lr=0.5))
    flat = Trainer(store, SIZE, TrainConfig(n_tokens=100, batch_tokens=1, warmup_steps=10, lr=0.5, decay="none"))
    assert flat.learning_rate(0) == pytest.approx(0.05)
    assert flat.learning_rate(9) == flat.learning_rate(99) == 0.5
    assert 0 < linear.learning_rate(99) < linear.learning_rate(50) < 0.5


# Batches and starting weights


def test_a_batch_depends_on_seed_and_step_only(store: ActivationStore) -> None:
    trainer, again = Trainer(store, SIZE, SHORT), Trainer(store, SIZE, SHORT)
    other = Trainer(store, SIZE, TrainConfig(**{**SHORT.__dict__, "seed": 1}))
    trainer.draw(3)
    assert torch.equal(trainer.draw(7), again.draw(7))
    assert not torch.equal(trainer.draw(7), trainer.draw(8))
    assert not torch.equal(trainer.draw(7), other.draw(7))


@pytest.mark.parametrize(("weighting", "share"), [("unique", 1 / 2), ("sqrt", 3 / 4), ("count", 9 / 10)])
def test_activations_are_drawn_by_their_weight(weighting: Any, share: float) -> None:
    store = ActivationStore(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0, 9.0]))
    settings = TrainConfig(n_tokens=20_000, batch_tokens=20_000, weighting=weighting)
    batch = Trainer(store, SAEConfig(2, 4, 1), settings).draw(0)
    assert float(batch[:, 0].mean()) == pytest.approx(share, abs=0.02)


def test_the_geometric_median_is_where_the_pulls_cancel() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] += 1000
    median = geometric_median(x, n_steps=500)
    pulls = (x - median) / (x - median).norm(dim=1, keepdim=True)
    assert pulls.sum(0).norm() < 1e-3
    assert (x.mean(0) - x[1:].mean(0)).norm() > 10
    assert (median - x[1:].mean(0)).norm() < 1


def test_the_precision_inverts_the_covariance_and_counts_every_direction_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 1.0, 0.3, 3.0])
    x = torch.randn(2000, 4, generator=generator) @ torch.randn(4, 4, generator=generator) * scales
    metric = precision(x, shrinkage=0)
    torch.testing.assert_close(metric @ torch.cov(x.T), torch.eye(4), rtol=1e-3, atol=1e-3)
    centred = x - x.mean(0)
    assert float((centred @ metric * centred).sum() / len(x)) == pytest.approx(4, rel=1e-2)
    shrunk = precision(x[:3])
    assert shrunk.isfinite().all()
    assert float((shrunk * torch.cov(x[:3].T)).sum()) == pytest.approx(4, rel=1e-3)


def test_whitening_spares_directions_of_little_variance() -> None:
    """What varies little is reconstructed better by the whitened loss than by the plain one."""
    store = make_store()
    quiet = ActivationStore(store.x * torch.tensor([10.0] * 6 + [0.5] * 6), store.weight)
    shares = []
    for whiten in (True, False):
        settings = TrainConfig(n_tokens=300 * 128, batch_tokens=128, lr=3e-3, dead_tokens=2000, whiten=whiten)
        sae = train(quiet, SIZE, settings)
        error = (sae.decode(sae.encode(quiet.x)) - quiet.x).var(0) / quiet.x.var(0)
        shares.append(float(error[6:].mean()))
    assert shares[0] < 0.9 * shares[1]


@pytest.mark.parametrize("init", ["data", "random"])
def test_starting_weights_reconstruct_better_than_nothing(store: ActivationStore, init: Any) -> None:
    weights = initial_weights(store, SIZE, TrainConfig(init=init))
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(40))
    assert SAE(SIZE, **weights).fvu(store.x) < 1
    unscaled = SAE(SIZE, **(weights | {"W_enc": 3 * weights["W_dec"]}))
    assert unscaled.fvu(store.x) > SAE(SIZE, **weights).fvu(store.x)


@pytest.mark.parametrize("init", ["data", "random"])
def test_starting_rows_do_not_depend_on_the_range_that_is_asked_for(store: ActivationStore, init: Any) -> None:
    config, settings = SAEConfig(d_model=12, n_latents=2 * START_ROWS + 100, k=4), TrainConfig(init=init)
    whole = starting_rows(store, config, settings)
    first, last = START_ROWS - 30, 2 * START_ROWS + 50
    part = starting_rows(store, config, settings, first, last)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(part[name], whole[name][first:last])
    assert torch.equal(part["b_dec"], whole["b_dec"])
    assert not torch.equal(whole["W_dec"][:100], whole["W_dec"][START_ROWS : START_ROWS + 100])


# AuxK


def kill_latents(trainer: Trainer, dead: slice) -> None:
    """Shrink encoder rows so far that their latents never reach the top k."""
    trainer.weights["W_enc"][dead] *= 1e-4
    trainer.weights["b_enc"][dead] = 1e-4
    trainer.renew_screen()


def dead_after(k_aux: int, ours: bool) -> tuple[float, float]:
    """Return the share of killed latents that are dead early and late in training, with or without AuxK."""
    settings = TrainConfig(
        whiten=ours,
        relative_rates=ours,
        decay="none",
        lr=3e-3,
        batch_tokens=128,
        n_tokens=300 * 128,
        k_aux=k_aux,
        dead_tokens=2000,
    )
    trainer = Trainer(make_store(), SIZE, settings)
    kill_latents(trainer, slice(0, 20))
    shares = []
    for step in range(settings.n_steps):
        trainer.step(step)
        shares.append(float((trainer.idle[:20] >= settings.dead_tokens).float().mean()))
    return max(shares[:30]), shares[-1]


@pytest.mark.parametrize("ours", [True, False], ids=["whitened, relative rates", "plain"])
def test_dead_latents_are_revived_by_aux_k_and_stay_dead_without(ours: bool) -> None:
    before, after = dead_after(k_aux=20, ours=ours)
    assert before > 0.9
    assert after < 0.5
    before, after = dead_after(k_aux=0, ours=ours)
    assert before > 0.9
    assert after == 1.0


def test_dead_is_counted_in_tokens(store: ActivationStore) -> None:
    trainer = Trainer(store, SIZE, SHORT)
    kill_latents(trainer, slice(0, 20))
    for step in range(5):
        trainer.step(step)
    assert (trainer.idle[:20] == 5 * SHORT.batch_tokens).all()
    assert (trainer.idle[20:] < 5 * SHORT.batch_tokens).any()


# Runs


def test_training_explains_more_than_the_start(store: ActivationStore) -> None:
    settings = TrainConfig(n_tokens=200 * 64, batch_tokens=64, lr=3e-3, dead_tokens=1000, init="random", whiten=False)
    start = SAE(SIZE, **initial_weights(store, SIZE, settings)).fvu(store.x)
    sae = train(store, SIZE, settings)
    assert sae.metrics["fvu"] == pytest.approx(sae.fvu(store.x), rel=1e-3)
    assert sae.metrics["fvu"] < 0.5 * start
    assert sae.metrics["tokens"] == settings.n_tokens
    assert 0 <= sae.metrics["dead_share"] <= 1
    assert sae.hook_point == store.hook_point


def test_training_is_the_same_every_time_and_depends_on_the_seed(store: ActivationStore) -> None:
    other = TrainConfig(**{**SHORT.__dict__, "seed": 1})
    assert same_weights(train(store, SIZE, SHORT), train(store, SIZE, SHORT))
    assert not same_weights(train(store, SIZE, SHORT), train(store, SIZE, other))


@pytest.mark.parametrize("killed_at", [0, 1, 3, 5, 6, 11])
def test_a_run_killed_in_any_step_ends_with_the_same_weights(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = train(store, SIZE, SHORT)
    steps: list[int] = []
    real_step = Trainer.step

    def step_or_die(trainer: Trainer, step: int) -> float:
        if step == killed_at and killed_at not in steps:
            steps.append(step)
            trainer.weights["W_enc"].zero_()
            raise Killed
        steps.append(step)
        return real_step(trainer, step)

    monkeypatch.setattr(Trainer, "step", step_or_die)
    with pytest.raises(Killed):
        train(store, SIZE, SHORT, out=tmp_path)
    del steps[:-1]
    resumed = train(store, SIZE, SHORT, out=tmp_path)
    assert same_weights(resumed, whole)
    assert steps[1:] == list(range(killed_at - killed_at % 3, 12)), "it goes on after the last checkpoint"


CHILD = """
import os, signal
from pathlib import Path
import torch
from safetensors.torch import load_file
from itd import ActivationStore, SAEConfig, TrainConfig, activations, train

real, saved = activations.save_file, []

def save_or_die(tensors, path, metadata=None):
    saved.append(path)
    if len(saved) == 3:
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path, metadata=metadata)

torch.set_num_threads({threads})
activations.save_file = save_or_die
train(ActivationStore(**load_file({store!r})), {size!r}, {settings!r}, out={out!r})
"""


def test_a_process_killed_while_it_writes_a_checkpoint_can_be_resumed(store: ActivationStore, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "store.safetensors"
    save_file({"x": store.x, "weight": store.weight}, data)
    script = CHILD.format(threads=torch.get_num_threads(), store=str(data), size=SIZE, settings=SHORT, out=str(run))
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert died.returncode == -9, died.stderr.decode()
    assert Trainer(store, SIZE, SHORT).load(run / CHECKPOINT)[0] == 6
    assert same_weights(train(store, SIZE, SHORT, out=run), train(store, SIZE, SHORT))


def test_a_finished_run_is_not_trained_again(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(store, SIZE, SHORT, out=tmp_path)

    def never(trainer: Trainer, step: int) -> float:
        raise AssertionError("there is nothing left to do")

    monkeypatch.setattr(Trainer, "step", never)
    assert same_weights(train(store, SIZE, SHORT, out=tmp_path), first)


def test_the_interval_of_checkpoints_does_not_matter(store: ActivationStore, tmp_path: Path) -> None:
    often = TrainConfig(**{**SHORT.__dict__, "checkpoint_every": 1})
    assert same_weights(train(store, SIZE, often, out=tmp_path), train(store, SIZE, SHORT))


@pytest.mark.parametrize("what", ["settings", "size", "activations", "weights"])
def test_a_checkpoint_of_another_run_is_refused(store: ActivationStore, tmp_path: Path, what: str) -> None:
    train(store, SIZE, SHORT, out=tmp_path)
    settings = TrainConfig(**{**SHORT.__dict__, "lr": 0.5}) if what == "settings" else SHORT
    size = SAEConfig(12, 41, 4) if what == "size" else SIZE
    if what == "activations":
        store = make_store(seed=1)
    elif what == "weights":
        store = ActivationStore(store.x, store.weight + 1, store.hook_point)
    with pytest.raises(ValueError, match="is a checkpoint of other activations or settings"):
        train(store, size, settings, out=tmp_path)


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(store: ActivationStore, tmp_path: Path) -> None:
    train(store, SIZE, SHORT, tmp_path)
    path = tmp_path / training.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{training.CHECKPOINT} is not a safetensors file .*; delete it and train again"):
        train(store, SIZE, SHORT, tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_nothing_half_written(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    real_save = activations.save_file

    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        real_save(tensors, path, metadata=metadata)

    monkeypatch.setattr(activations, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        train(store, SIZE, SHORT, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert Trainer(store, SIZE, SHORT).load(tmp_path / CHECKPOINT)[0] == 3
    assert same_weights(train(store, SIZE, SHORT, out=tmp_path), train(store, SIZE, SHORT))


# Bad input


def test_activations_of_another_width_are_refused(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match="d_model is 13, the recorded activations have 12"):
        train(store, SAEConfig(13, 40, 4), SHORT)


def test_a_training_that_does_not_fit_is_refused_before_anything_is_allocated(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(training, "Trainer", never)
    with pytest.raises(ValueError, match=r"n_latents = 1099511627776 needs .* GB.*the largest n_latents that fits is \d+"):
        train(store, SAEConfig(12, 2**40, 4), SHORT)


@pytest.mark.parametrize("name", ["n_tokens", "batch_tokens", "checkpoint_every", "dead_tokens"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_the_learning_rate_must_be_positive(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        TrainConfig(lr=lr)


@pytest.mark.parametrize("name", ["warmup_steps", "k_aux", "aux_weight"])
def test_what_may_be_switched_off_must_not_be_negative(name: str) -> None:
    TrainConfig(**{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -3"):
        TrainConfig(**{name: -3})
