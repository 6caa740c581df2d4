"""Prompts of words at random."""

from __future__ import annotations

from typing import Any

from itd.vocabulary import SALAD, vocabulary_of, word_salads


def test_a_salad_has_the_text_somewhere_among_words_of_the_vocabulary(pipe: Any) -> None:
    words = vocabulary_of(pipe).without(["red", "boat"])
    places = set()
    for salad in word_salads(words, ["red boat"] * 50, seed=0):
        before, after = salad.split("red boat")
        places.add((len(before.split()), len(after.split())))
        assert set(before.split() + after.split()) <= set(words.words)
    assert {sum(place) for place in places} == set(SALAD)
    assert len(places) > len(SALAD), "not always in the same place"


def test_a_salad_around_nothing_is_words_alone_and_the_seed_decides(pipe: Any) -> None:
    words = vocabulary_of(pipe)
    salads = word_salads(words, [""] * 20, seed=1)
    assert all(len(salad.split()) in SALAD for salad in salads)
    assert salads == word_salads(words, [""] * 20, seed=1) != word_salads(words, [""] * 20, seed=2)
