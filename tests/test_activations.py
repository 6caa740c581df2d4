from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.activations import count_activations
from tiny import build_pipeline, prompts_of

from itd import ActivationStore, HookPoint, PromptSet, activations, pipelines, record
from itd.activations import Folder, joined, stream, stream_contents

TEXTS = ["a photo of a cat", "a photo of a dog", "", "my house at night", "a photo", "a cat " * 30]


def same_store(a: ActivationStore, b: ActivationStore) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.weight, b.weight) and a.hook_point == b.hook_point


def die_in_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let the n-th batch fail; return the sizes of the batches that the encoder was called with."""
    real, calls = pipelines.activations, []

    def activations_or_die(pipe: Any, site: HookPoint, tokens: Any) -> Any:
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(len(tokens.input_ids))
        return real(pipe, site, tokens)

    monkeypatch.setattr(pipelines, "activations", activations_or_die)
    return calls


# Streaming


def test_streamed_batches_hold_what_the_encoder_gives(pipe: Any, site: HookPoint) -> None:
    prompts = PromptSet.from_texts(TEXTS)
    batches = list(stream(pipe, site, prompts, batch_size=4))
    assert [len(batch.prompts) for batch in batches] == [4, 2]
    whole = next(stream(pipe, site, prompts))
    for name in ("input_ids", "content", "editable"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(whole, name))
    torch.testing.assert_close(torch.cat([batch.x for batch in batches]), whole.x)
    assert whole.x.dtype == torch.float32


def test_half_precision_activations_are_streamed_in_full_precision(pipe: Any, site: HookPoint) -> None:
    pipe.text_encoder.to(torch.bfloat16)
    assert next(stream(pipe, site, prompts_of("cat"))).x.dtype == torch.float32


@pytest.mark.parametrize("n_tokens", [1, 9, 10_000])
def test_joined_batches_hold_what_the_batches_held(pipe: Any, site: HookPoint, n_tokens: int) -> None:
    rows = pipelines.token_rows(pipe, site.encoder, TEXTS)
    batches = list(stream_contents(pipe, site, rows, TEXTS, batch_tokens=20))
    together = list(joined(batches, n_tokens))
    assert all(len(each.keys) >= n_tokens for each in together[:-1])
    assert len(together) == {1: len(batches), 10_000: 1}.get(n_tokens, len(together))
    for name in ("prompts", "n_tokens", "keys"):
        assert list(chain(*(getattr(each, name) for each in together))) == list(
            chain(*(getattr(each, name) for each in batches))
        )
    assert torch.equal(torch.cat([each.x for each in together]), torch.cat([batch.x for batch in batches]))


# Recording


def test_recording_keeps_every_distinct_activation_with_its_count(pipe: Any, site: HookPoint) -> None:
    store, expected = record(pipe, site, PromptSet.from_texts(TEXTS)), count_activations(pipe, site, TEXTS)
    assert len(store) == len(expected)
    assert store.weight.sum() == sum(count for _, count in expected.values()) > len(store)
    for x, count in expected.values():
        distances = (store.x - x).norm(dim=1)
        assert distances.min() < 1e-4
        assert store.weight[distances.argmin()] == count


def test_duplicates_are_folded_into_weights(pipe: Any, site: HookPoint) -> None:
    once = record(pipe, site, PromptSet.from_texts(TEXTS))
    thrice = record(pipe, site, PromptSet.from_texts(TEXTS * 3))
    assert torch.equal(once.x, thrice.x)
    assert torch.equal(3 * once.weight, thrice.weight)
    uneven = record(pipe, site, PromptSet.from_texts([*TEXTS, TEXTS[3], TEXTS[3]]))
    changed = uneven.weight != once.weight
    assert torch.equal(once.x, uneven.x)
    assert torch.equal(uneven.weight[changed], once.weight[changed] + 2)
    assert int(changed.sum()) == 4 + 2, "the words, the end and one padding of that prompt"


def test_padding_is_not_repeated_and_the_begin_token_is_left_out(pipe: Any, site: HookPoint) -> None:
    store, batch = record(pipe, site, PromptSet.from_texts(["cat"])), next(stream(pipe, site, PromptSet.from_texts(["cat"])))
    assert torch.equal(store.x, batch.x[0, 1:4])


def test_outside_causal_encoders_only_equal_prompts_are_folded() -> None:
    ids, content = torch.tensor([[0, 5, 1, 1], [0, 5, 6, 1], [0, 5, 1, 1]]), torch.tensor([[False, True, False, False]] * 3)
    content[1, 2] = True
    texts = ["a", "a b", "A"]
    repeats = Counter(texts)
    causal, other = Folder(True, repeats), Folder(False, repeats)
    assert causal.add(texts, ids, content).sum(1).tolist() == [3, 2, 0]
    assert causal.weights == [3, 2, 2, 1, 1]
    assert other.add(texts, ids, content).sum(1).tolist() == [3, 3, 0]
    assert other.weights == [2, 2, 2, 1, 1, 1]


def test_a_shard_that_brings_nothing_new_is_no_obstacle(pipe: Any, site: HookPoint, tmp_path: Path) -> None:
    prompts = PromptSet.from_texts(["a cat", "A CAT", "", "a dog"])
    store = record(pipe, site, prompts, tmp_path, shard_prompts=1)
    assert same_store(ActivationStore.load(tmp_path), store)
    torch.testing.assert_close(store.x, record(pipe, site, prompts).x)


def test_a_recording_reads_back_as_it_was_made(pipe: Any, site: HookPoint, tmp_path: Path) -> None:
    made = record(pipe, site, prompts_of("cat", "dog"), tmp_path, batch_size=4, shard_prompts=5)
    assert same_store(ActivationStore.load(tmp_path), made)
    assert ActivationStore.load(tmp_path).hook_point == site


PROBES = 1
"""Calls of the encoder before the first batch: what identifies it."""


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5])
def test_an_interrupted_recording_goes_on_and_equals_one_that_was_not(
    pipe: Any, site: HookPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    prompts = prompts_of("cat", "dog") + prompts_of("cat")
    whole = record(pipe, site, prompts, tmp_path / "whole", batch_size=4, shard_prompts=6)
    with monkeypatch.context() as patch:
        die_in_batch(patch, PROBES + batch)
        with pytest.raises(KeyboardInterrupt):
            record(pipe, site, prompts, tmp_path / "part", batch_size=4, shard_prompts=6)
    with pytest.raises(ValueError, match="the recording was interrupted; record again with the same prompts"):
        ActivationStore.load(tmp_path / "part")
    calls = die_in_batch(monkeypatch, 99)
    resumed = record(pipe, site, prompts, tmp_path / "part", batch_size=4, shard_prompts=6)
    assert same_store(resumed, whole)
    assert same_store(ActivationStore.load(tmp_path / "part"), whole)
    assert sum(calls[PROBES:]) == 18 - 6 * (batch // 2), "finished shards are not computed again"


def test_a_full_disk_leaves_no_half_written_shard(
    pipe: Any, site: HookPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = activations.save_file, []

    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(activations, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        record(pipe, site, prompts_of("cat"), tmp_path, shard_prompts=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activations-00000000.safetensors", "config.json"]
    again = record(pipe, site, prompts_of("cat"), tmp_path, shard_prompts=4)
    assert same_store(ActivationStore.load(tmp_path), again)


# Bad input


@pytest.mark.parametrize("changed", ["prompts", "hook_point", "shard_prompts"])
def test_a_folder_with_another_recording_is_refused(pipe: Any, site: HookPoint, tmp_path: Path, changed: str) -> None:
    record(pipe, site, prompts_of("cat"), tmp_path)
    prompts = prompts_of("dog" if changed == "prompts" else "cat")
    place = HookPoint("text_encoder", "encoder.layers.0") if changed == "hook_point" else site
    size = 7 if changed == "shard_prompts" else 4096
    with pytest.raises(ValueError, match=f"holds a recording with another {changed}.*; name another folder"):
        record(pipe, place, prompts, tmp_path, shard_prompts=size)
    assert len(ActivationStore.load(tmp_path)) > 0


def test_a_recording_of_another_text_encoder_is_not_gone_on_with(
    pipe: Any, site: HookPoint, tmp_path: Path, tokenizer: Any
) -> None:
    store = record(pipe, site, prompts_of("cat"), tmp_path)
    other = build_pipeline(tokenizer)
    with torch.no_grad():
        other.text_encoder.encoder.layers[0].mlp.fc2.bias += 1
    with pytest.raises(ValueError, match="holds a recording of another text encoder; name another folder"):
        record(other, site, prompts_of("cat"), tmp_path)
    assert same_store(ActivationStore.load(tmp_path), store)
    other.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    other.text_encoder.to(torch.bfloat16).to(torch.float32)
    record(other, site, prompts_of("cat"), tmp_path)


def test_nothing_to_record_is_an_error(pipe: Any, site: HookPoint) -> None:
    with pytest.raises(ValueError, match="record needs at least one prompt"):
        record(pipe, site, PromptSet())


@pytest.mark.parametrize("name", ["batch_size", "shard_prompts"])
def test_no_prompt_at_a_time_is_an_error(pipe: Any, site: HookPoint, name: str) -> None:
    with pytest.raises(ValueError, match="batch_size and shard_prompts must be at least 1, got"):
        record(pipe, site, prompts_of("cat"), **{name: 0})


def test_prompts_without_content_are_an_error(pipe: Any, site: HookPoint) -> None:
    with pytest.raises(ValueError, match="no content tokens"):
        record(pipe, site, PromptSet.from_texts([""]))


def test_an_unknown_hook_point_is_an_error_before_anything_is_written(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="near matches"):
        record(pipe, HookPoint("text_encoder", "encoder.layers.9"), prompts_of("cat"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_with_nan_are_an_error(pipe: Any, site: HookPoint) -> None:
    pipe.text_encoder.embeddings.position_embedding.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity: the text encoder overflowed"):
        record(pipe, site, prompts_of("cat"))


def test_a_folder_without_a_recording_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recorded activations at"):
        ActivationStore.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ('{"kind": "sae"}', "describes a 'sae', not 'activations'")],
)
def test_a_folder_of_something_else_is_an_error_that_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        ActivationStore.load(tmp_path)


def test_a_truncated_shard_is_an_error_that_names_it(pipe: Any, site: HookPoint, tmp_path: Path) -> None:
    record(pipe, site, prompts_of("cat"), tmp_path)
    shard = tmp_path / "activations-00000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"activations-00000000\.safetensors is not a safetensors file.*record again"):
        ActivationStore.load(tmp_path)


def test_a_shard_of_other_prompts_is_an_error(pipe: Any, site: HookPoint, tmp_path: Path) -> None:
    record(pipe, site, prompts_of("cat"), tmp_path / "a")
    record(pipe, site, PromptSet.from_texts(["a dog"]), tmp_path / "b")
    name = "activations-00000000.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(ValueError, match="does not fit the prompts; delete the folder and record again"):
        record(pipe, site, prompts_of("cat"), tmp_path / "a")


def test_the_hash_of_a_store_follows_its_activations_and_weights(store: ActivationStore) -> None:
    again = ActivationStore(store.x.clone(), store.weight.clone())
    moved, heavier = ActivationStore(store.x + 1, store.weight), ActivationStore(store.x, store.weight + 1)
    assert store.sha256 == again.sha256
    assert len({store.sha256, moved.sha256, heavier.sha256, ActivationStore(store.x[:-1], store.weight[:-1]).sha256}) == 4
