"""Text encoders without an image model, on a tiny BERT in a local folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, NOUNS, prompts_of, randomise
from transformers import BertConfig, BertModel, BertTokenizer

from itd import HookPoint, PromptSet, SAEConfig, TrainConfig, encoders, erase, pipelines, record, train
from itd.activations import stream
from itd.encoders import TextPipeline, load_text_encoder

SITE = HookPoint("text_encoder", "encoder.layer.1")


def build_bert(folder: Path, words: Sequence[str] = ()) -> Path:
    """Save a BERT with random weights whose words are the given ones, or those of the frames and nouns."""
    words = words or sorted({word for frame in FRAMES for word in frame.replace("{}", "").split()} | set(NOUNS))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    randomise(BertModel(config), 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bert(folder: Path) -> TextPipeline:
    return load_text_encoder(folder, max_tokens=16)


def states(pipe: Any, *texts: str) -> list[torch.Tensor]:
    """Return the content states of each text, encoded in one batch."""
    batch = next(stream(pipe, SITE, PromptSet.from_texts(texts)))
    return [x[mask] for x, mask in zip(batch.x, batch.content, strict=True)]


def test_content_is_what_stands_between_begin_and_end(bert: TextPipeline) -> None:
    tokens = pipelines.tokenize(bert, "text_encoder", ["a photo of a cat", "cat"])
    mask = pipelines.content_mask(tokens.input_ids, bert.tokenizer)
    assert mask.sum(1).tolist() == [5, 1]
    assert not mask[:, 0].any()
    assert tokens.input_ids.shape[1] == 7


def test_a_prompt_is_encoded_alike_alone_and_beside_a_longer_one(bert: TextPipeline) -> None:
    alone, beside = states(bert, "a cat")[0], states(bert, "a cat", "two people and a small boat on a table")[0]
    assert torch.allclose(alone, beside, atol=1e-6)


def test_the_pooled_embedding_is_the_mean_state_whatever_the_padding(bert: TextPipeline) -> None:
    texts = ["a cat", "two people and a small boat on a table"]
    found = pipelines.pooled_embeddings(bert, "text_encoder", texts)
    for row, text in zip(found, texts, strict=True):
        states = bert.text_encoder(bert.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        assert torch.allclose(row, states.mean(0) / states.mean(0).norm(), atol=1e-5)
    tokens = bert.tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.allclose(bert.text_encoder(tokens.input_ids, tokens.attention_mask).pooler_output, found, atol=1e-5)
    assert isinstance(bert.text_encoder(tokens.input_ids, return_dict=False), tuple)


def test_states_depend_on_what_follows_so_prefixes_are_not_folded(bert: TextPipeline) -> None:
    first, second = states(bert, "a cat", "a cat by a window")
    assert float((first[:2] - second[:2]).abs().max()) > 1e-4
    store = record(bert, SITE, PromptSet.from_texts(["a cat", "a cat by a window"]))
    # Content and end of both, nothing shared, and no padding, which is masked.
    assert len(store) == (2 + 1) + (5 + 1)


def test_a_recording_goes_on_though_batches_are_padded_differently(bert: TextPipeline, tmp_path: Path) -> None:
    prompts = prompts_of(*NOUNS)
    whole = record(bert, SITE, prompts, tmp_path / "a", batch_size=5, shard_prompts=20)
    record(bert, SITE, prompts, tmp_path / "b", batch_size=5, shard_prompts=20)
    (tmp_path / "b" / "activations-00000020.safetensors").unlink()
    again = record(bert, SITE, prompts, tmp_path / "b", batch_size=5, shard_prompts=20)
    assert torch.equal(again.weight, whole.weight)
    assert torch.allclose(again.x, whole.x, atol=1e-6)


def test_an_eraser_is_made_on_it_and_checks_prompts_but_does_not_attach(bert: TextPipeline) -> None:
    sae = train(record(bert, SITE, prompts_of(*NOUNS)), SAEConfig(24, 128, 8), TrainConfig(n_tokens=4000, batch_tokens=200))
    eraser = erase(bert, sae, SITE, prompts_of("house"), prompts_of(*(noun for noun in NOUNS if noun != "house")))
    hit, miss = eraser.check(bert, ["my house at night", "my cup at night"])
    assert hit.score > miss.score
    assert [token for token, _ in hit.tokens] == ["my", "house", "at", "night"]
    with pytest.raises(ValueError, match="encode_prompt"):
        eraser.attach(bert)


def test_long_prompts_are_cut(bert: TextPipeline) -> None:
    tokens = pipelines.tokenize(bert, "text_encoder", ["cat " * 40])
    assert tokens.input_ids.shape[1] == 16


def test_bad_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text encoder"):
        load_text_encoder(tmp_path)
    for max_tokens in (2, 33):
        with pytest.raises(ValueError, match=f"got {max_tokens}"):
            load_text_encoder(folder, max_tokens)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"itd\[minilm\]"):
        encoders.load_minilm()


def test_minilm_tells_names_apart() -> None:
    if importlib.util.find_spec(encoders.MINILM_PACKAGE) is None:
        pytest.skip("the extra `minilm` is not installed")
    pipe = encoders.load_minilm(32)
    site = HookPoint("text_encoder", "encoder.layer.3")
    texts = ["a portrait of Adam Driver", "a sketch of Adam Driver", "a portrait of Amy Adams"]
    batch = next(stream(pipe, site, PromptSet.from_texts(texts)))
    assert batch.x.shape[2] == 384
    last = [x[mask][-1] for x, mask in zip(batch.x, batch.content, strict=True)]
    same, other = (torch.cosine_similarity(last[0], last[i], 0) for i in (1, 2))
    assert same > other
