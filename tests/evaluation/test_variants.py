from __future__ import annotations

import random

import pytest

from itd.evaluation.variants import SPELLINGS, TRANSLATIONS, at_position, beside, misspell, with_filler

WORDS = ["soft", "green", "under"]


def test_filler_adds_as_many_words_as_it_says_around_the_prompt() -> None:
    for n in (0, 1, 8):
        text = with_filler("a photo of a cat", WORDS, n, random.Random(n))
        assert "a photo of a cat" in text
        assert len(text.split()) == 5 + n


@pytest.mark.parametrize(("where", "index"), [("first", 0), ("middle", 6), ("last", 12)])
def test_a_name_stands_where_it_was_put(where: str, index: int) -> None:
    words = at_position("cat", where, WORDS, random.Random(0)).split()
    assert len(words) == 13
    assert words[index] == "cat"
    with pytest.raises(ValueError, match="'above'"):
        at_position("cat", "above", WORDS, random.Random(0))


def test_company_is_added_behind() -> None:
    text = beside("a cat", ["house", "tree", "boat"], 2, random.Random(1))
    assert text.startswith("a cat, ")
    assert len(text.split(", ")) == 3


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("name", ["elephant", "polar bear", "ox", "aa"])
def test_a_misspelt_name_is_another_word_with_the_same_beginning(kind, name: str) -> None:
    rng = random.Random(3)
    for _ in range(20):
        text = misspell(f"a photo of {name} at night", name, kind, rng)
        assert text != f"a photo of {name} at night" or kind == "two"
        assert text.startswith("a photo of ")
        assert text.endswith(" at night")
        assert text.removeprefix("a photo of ")[0].lower() == name[0]


def test_one_letter_changes_at_a_time() -> None:
    rng = random.Random(0)
    lengths = {
        kind: {len(misspell("elephant", "elephant", kind, rng)) for _ in range(20)} for kind in ("swap", "drop", "double")
    }
    assert lengths == {"swap": {8}, "drop": {7}, "double": {9}}


def test_a_text_without_the_name_stays_and_another_kind_is_refused() -> None:
    assert misspell("a dog", "cat", "swap", random.Random(0)) == "a dog"
    with pytest.raises(ValueError, match="'mirror'"):
        misspell("a cat", "cat", "mirror", random.Random(0))  # type: ignore[arg-type]


def test_every_translation_is_in_every_language() -> None:
    assert {frozenset(names) for names in TRANSLATIONS.values()} == {frozenset({"de", "fr", "es", "it"})}
