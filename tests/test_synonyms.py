from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from itd import emoji
from itd.emoji.prompts import erase_sets
from itd.eraser import Eraser
from itd.synonyms import Synonym, common_words, find_synonyms, synonym_words
from itd.templates import mention_of

WORDS = ("house", "lamp", "tree", "boat", "cat", "dog")


class Meanings(nn.Module):
    """A text encoder that knows what words mean: its pooled embedding is the meaning of the word it finds."""

    device = torch.device("cpu")
    config = SimpleNamespace(use_attention_mask=False)

    def __init__(self, tokenizer: Any, meaning: dict[str, list[float]]) -> None:
        super().__init__()
        self.tokenizer, self.meaning = tokenizer, meaning

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        rows = [next(v for word, v in self.meaning.items() if word in text.split()) for text in texts]
        return SimpleNamespace(pooler_output=torch.tensor(rows))


@pytest.fixture
def knowing(tokenizer: Any) -> Any:
    """A pipeline to which a cat is nearly a dog, a lamp nearly a house, and a tree nothing of both."""
    meaning = {
        "cat": [1.0, 0.0, 0.0], "dog": [0.95, 0.0, 0.1], "lamp": [0.0, 0.9, 0.1], "house": [0.0, 1.0, 0.0],
        "tree": [0.0, 0.0, 1.0], "boat": [0.1, 0.2, 0.95],
    }  # fmt: skip
    module = Meanings(tokenizer, meaning)
    return SimpleNamespace(
        components={"text_encoder": module, "tokenizer": tokenizer}, text_encoder=module, tokenizer=tokenizer
    )


def test_words_with_nearly_the_embedding_of_a_name_are_its_synonyms(knowing: Any) -> None:
    found = find_synonyms(knowing, ["cat"], words=WORDS)
    assert [synonym.word for synonym in found["cat"]] == ["dog"]
    assert 0.9 < found["cat"][0].similarity <= 1


@pytest.fixture
def word_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of common words, as small as can be."""
    words = ("the", "dog's", "of", "dog", "2024", "tree", "lamp")
    monkeypatch.setitem(sys.modules, "wordfreq", SimpleNamespace(iter_wordlist=lambda language: iter(words)))


@pytest.mark.usefixtures("word_list")
def test_common_words_are_candidates_too(knowing: Any) -> None:
    assert common_words(2) == ["the", "dog"]
    assert common_words(9) == ["the", "dog", "tree", "lamp"]
    assert find_synonyms(knowing, ["cat"], words=("house", "boat", "tree")) == {}
    knowing.text_encoder.meaning["the"] = [0.0, 0.5, 0.5]
    found = find_synonyms(knowing, ["cat"], words=("house", "boat", "tree"), common=2)
    assert synonym_words(found) == ["dog"]


def test_common_words_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    assert common_words(0) == []
    with pytest.raises(ImportError, match=r"itd\[synonyms\]"):
        common_words(10)
    with pytest.raises(ValueError, match="-1"):
        common_words(-1)


def test_a_word_belongs_to_the_closest_name_also_to_one_that_stays(knowing: Any) -> None:
    assert synonym_words(find_synonyms(knowing, ["cat", "house"], words=WORDS)) == ["dog", "lamp"]
    assert find_synonyms(knowing, ["cat"], ["dog"], words=WORDS) == {}, "the name of what stays is no synonym"
    assert find_synonyms(knowing, ["tree"], ["boat"], words=("cat", "dog")) == {}


def test_synonyms_are_limited_in_number_and_by_closeness(knowing: Any) -> None:
    every = find_synonyms(knowing, ["tree"], words=WORDS, close=0.01)
    assert len(every["tree"]) >= 1
    assert find_synonyms(knowing, ["cat"], words=WORDS, close=1.0) == {}
    assert find_synonyms(knowing, ["cat"], words=WORDS, most=0) == {"cat": ()}


def test_parts_of_a_name_are_no_synonyms(knowing: Any) -> None:
    assert find_synonyms(knowing, ["cat dog"], words=("cat", "dog", "house")) == {}


def test_both_encoders_of_a_large_pipeline_compare_words(xl_pipe: Any) -> None:
    for encoder in ("text_encoder", "text_encoder_2"):
        found = find_synonyms(xl_pipe, ["house"], words=WORDS, close=0.001, encoder=encoder)
        assert found["house"]
        assert all(isinstance(synonym, Synonym) for listed in found.values() for synonym in listed)


def test_bad_requests_are_refused_by_name(pipe: Any, knowing: Any) -> None:
    with pytest.raises(ValueError, match="names must not be empty"):
        find_synonyms(pipe, [])
    with pytest.raises(ValueError, match=r"close must lie .* got 1\.5"):
        find_synonyms(pipe, ["house"], close=1.5)
    knowing.text_encoder.forward = lambda ids, **_: SimpleNamespace(last_hidden_state=torch.zeros(len(ids), 4, 3))
    with pytest.raises(ValueError, match="no pooled output"):
        find_synonyms(knowing, ["cat"], words=WORDS)


@pytest.fixture(scope="module")
def world_pipe() -> Any:
    return emoji.load_pipeline()


def test_the_embedded_world_knows_that_a_revolver_is_a_gun(world_pipe: Any) -> None:
    found = synonym_words(find_synonyms(world_pipe, ["gun"], [noun.name for noun in emoji.nouns()]))
    assert "revolver" in found
    assert not {"cat", "the", "picture"} & set(found)


def test_prompts_that_stay_mention_no_synonym() -> None:
    target, retain, neutral = erase_sets(["pistol"], ["revolver", "dangerous"])
    assert target.concepts == ("pistol", "revolver", "dangerous")
    said = mention_of(["revolver", "dangerous"])
    assert not [text for text in (*retain.texts, *neutral.texts) if said.search(text)]


def test_the_command_erases_and_prints_synonyms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from itd.cli import main

    assert main(["erase", "--target", "gun", "--retain", "cat", "dog", "owl", "--synonyms", "--out", str(tmp_path / "e")]) != 0
    assert "neither a noun nor a design" in capsys.readouterr().err
    assert main(["erase", "--target", "pistol", "--common-words", "9", "--out", str(tmp_path / "e")]) != 0
    assert "--common-words 9" in capsys.readouterr().err
    assert main(["erase", "--target", "pistol", "--synonyms", "--out", str(tmp_path / "pistol")]) == 0
    assert "pistol: also" in capsys.readouterr().out
    eraser = Eraser.load(tmp_path / "pistol")
    assert eraser.names[0] == "pistol"
    assert len(eraser.names) > 1
