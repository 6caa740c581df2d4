"""What is learnt into a text encoder after an eraser was made is an error, unless that is accepted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import D_MODEL, SITE, build_pipeline, prompts_of

from itd import SAE, EraseConfig, Eraser, erase
from itd.words import KnownWords, embeddings_of

HOUSE, CAT, LEARNT = "a photo of a house", "a photo of a cat", "a photo of a <gadget>"
OPTIONS: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A pipeline whose tokenizer may be changed."""
    return build_pipeline(copy.deepcopy(tokenizer))


def learn(pipe: Any) -> None:
    """Give the text encoder a word as diffusers' users do."""
    pipe.load_textual_inversion({"<gadget>": torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))})


UNUSED = 3
"""A token that no prompt here has."""


def change(pipe: Any) -> None:
    with torch.no_grad():
        embeddings_of(pipe, "text_encoder")[UNUSED] += 1


def test_known_words_are_the_same_in_half_precision(pipe: Any) -> None:
    whole = KnownWords.of(pipe, "text_encoder")
    assert whole is not None
    assert whole.n == len(pipe.tokenizer)
    assert set(whole.sha256) == {"float16", "bfloat16"}
    for dtype in (torch.float16, torch.bfloat16):
        cast = copy.deepcopy(pipe)
        cast.text_encoder.to(dtype)
        whole.require(cast, "text_encoder")
        half = KnownWords.of(cast, "text_encoder")
        assert half is not None
        assert set(half.sha256) < set(whole.sha256)
        assert half.agrees(whole)
        half.require(pipe, "text_encoder")
        change(cast)
        with pytest.raises(ValueError, match="the words of text_encoder are not those that the eraser was made for"):
            whole.require(cast, "text_encoder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_words_that_were_rounded_once_are_still_known(pipe: Any, dtype: torch.dtype) -> None:
    known = KnownWords.of(pipe, "text_encoder")
    assert known is not None
    pipe.text_encoder.to(dtype).to(torch.float32)
    known.require(pipe, "text_encoder")
    rounded = KnownWords.of(pipe, "text_encoder")
    assert rounded is not None
    assert rounded != known
    assert rounded.agrees(known)
    change(pipe)
    with pytest.raises(ValueError, match="the words of text_encoder are not those"):
        known.require(pipe, "text_encoder")


def test_an_encoder_that_does_not_say_where_its_words_are_has_none(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise NotImplementedError

    monkeypatch.setattr(pipe.text_encoder, "get_input_embeddings", unknown)
    assert KnownWords.of(pipe, "text_encoder") is None


def test_an_eraser_knows_the_words_and_keeps_them(pipe: Any, saved_sae: SAE, tmp_path: Path) -> None:
    others = prompts_of("dog", "horse", "tree", "lamp", "cup", "boat")
    made = erase(pipe, saved_sae, SITE, prompts_of("house"), others, config=EraseConfig(n_features=16))
    assert made.words == KnownWords.of(pipe, "text_encoder")
    made.save(tmp_path)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert loaded.words == made.words
    assert loaded.sha256 == made.sha256 != replace(made, words=None).sha256


def test_a_new_word_is_an_error_in_positive_prompts_only(own: Any, eraser: Eraser) -> None:
    plain = own(CAT, generator=torch.Generator().manual_seed(0), **OPTIONS).images
    with eraser.attach(own):
        learn(own)
        with pytest.raises(ValueError, match="the prompt has '<gadget>', a word that text_encoder did not have"):
            own(LEARNT, **OPTIONS)
        again = own(CAT, generator=torch.Generator().manual_seed(0), **OPTIONS).images
        own(CAT, negative_prompt=LEARNT, **OPTIONS)
    assert torch.equal(plain, again)
    with pytest.raises(ValueError, match="the prompt has '<gadget>'"):
        eraser.check(own, [CAT, LEARNT])
    with eraser.attach(own, allow_new_words=True) as attached:
        own(LEARNT, **OPTIONS)
        assert len(attached.decisions) == 1
    assert len(eraser.check(own, LEARNT, allow_new_words=True)) == 1


def test_a_word_whose_embedding_was_changed_is_an_error(pipe: Any, eraser: Eraser) -> None:
    eraser.check(pipe, CAT)
    change(pipe)
    for use in (eraser.attach, lambda pipe: eraser.check(pipe, CAT)):
        with pytest.raises(ValueError, match="an embedding was changed, as textual inversion does"):
            use(pipe)
    eraser.attach(pipe, allow_new_words=True).remove()
    assert not eraser.check(pipe, CAT, allow_new_words=True)[0].fired
    ids = pipe.tokenizer(["cat", "house"], add_special_tokens=False).input_ids
    table = embeddings_of(pipe, "text_encoder")
    table.data[ids[0][0]] = table.data[ids[1][0]]
    assert eraser.check(pipe, CAT, allow_new_words=True)[0].fired, "what was decided before does not count"


def test_an_embedding_that_is_changed_while_the_eraser_is_attached_is_an_error(pipe: Any, eraser: Eraser) -> None:
    with eraser.attach(pipe):
        pipe(CAT, **OPTIONS)
        change(pipe)
        with pytest.raises(ValueError, match="an embedding was changed"):
            pipe(CAT, **OPTIONS)


def test_attaching_sees_an_embedding_that_was_written_to_in_secret(pipe: Any, eraser: Eraser) -> None:
    eraser.attach(pipe).remove()
    embeddings_of(pipe, "text_encoder").data[UNUSED] += 1  # torch does not count that
    with pytest.raises(ValueError, match="an embedding was changed"):
        eraser.attach(pipe)


def test_a_table_that_lacks_words_is_an_error(pipe: Any, eraser: Eraser) -> None:
    assert eraser.words is not None
    with pytest.raises(ValueError, match="the words of text_encoder are not those"):
        replace(eraser, words=replace(eraser.words, n=10**6)).attach(pipe)


def test_embeddings_that_are_offloaded_are_not_compared(pipe: Any, eraser: Eraser) -> None:
    assert eraser.words is not None
    pipe.text_encoder.to("meta")
    assert KnownWords.of(pipe, "text_encoder") == KnownWords(eraser.words.n, {})
    eraser.words.require(pipe, "text_encoder")


def test_an_eraser_of_before_knows_no_words_and_lets_all_through(own: Any, eraser: Eraser) -> None:
    learn(own)
    change(own)
    with replace(eraser, words=None).attach(own):
        own(LEARNT, **OPTIONS)


def test_erasers_join_for_the_same_words(eraser: Eraser, boat_eraser: Eraser) -> None:
    assert (eraser | boat_eraser).words == eraser.words
    bare = replace(boat_eraser, words=None)
    assert (eraser | bare).words == (bare | eraser).words == eraser.words
    assert eraser.words is not None
    other = replace(boat_eraser, words=replace(eraser.words, sha256={"float16": "0" * 64}))
    with pytest.raises(ValueError, match="erasers join only for the same words"):
        eraser | other
