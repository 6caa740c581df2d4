from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from itd import Prompt, PromptSet
from itd.prompts import SPLITS, assign, check_leaks, fill, recover_template
from itd.templates import TEMPLATES, concept_prompts

NAMES = ["cat", "dog", "owl", "ant", "horse", "boat"]
FRAMES = ["a {}", "a photo of a {}", "the {} by a lake", "{} at night", "my {}", "one {} and a tree"]


def grid() -> PromptSet:
    return PromptSet.from_names(NAMES, FRAMES)


# A sequence of prompts


def test_a_prompt_set_is_a_sequence_and_concatenates() -> None:
    prompts = grid()
    assert len(prompts) == 36
    assert list(prompts[:2] + prompts[2:]) == list(prompts)
    assert isinstance(prompts[1:3], PromptSet)
    assert prompts[0] == Prompt("a cat", "cat", "a {}")
    assert prompts.concepts == tuple(NAMES)
    assert prompts.about("owl").texts[0] == "an owl"
    assert len(PromptSet() + prompts) == 36


def test_unique_keeps_the_first_prompt_of_every_text_in_their_order() -> None:
    prompts = PromptSet((Prompt("b"), Prompt("a", "x"), Prompt("b", "y"), Prompt("a")))
    assert list(prompts.unique()) == [Prompt("b"), Prompt("a", "x")]


def test_a_sample_is_seeded_without_repetition_and_in_order() -> None:
    prompts = grid()
    drawn = prompts.sample(10, seed=3)
    assert drawn == prompts.sample(10, seed=3)
    assert drawn != prompts.sample(10, seed=4)
    assert len(set(drawn)) == 10
    assert [prompts.texts.index(text) for text in drawn.texts] == sorted(prompts.texts.index(text) for text in drawn.texts)
    assert prompts.sample(99) == prompts


def test_the_hash_follows_texts_concepts_and_order() -> None:
    a, b = Prompt("a", "x"), Prompt("b")
    hashes = {PromptSet(rows).sha256 for rows in [(a, b), (b, a), (a,), (Prompt("a", "y"), b), (Prompt("a"), b)]}
    assert len(hashes) == 5
    assert PromptSet((a, b)).sha256 == PromptSet((Prompt("a", "x", "{}", "fit"), b)).sha256


# Templates


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        ("a {}", "cat", "a cat"),
        ("a {}", "owl", "an owl"),
        ("photo of a {}", "Ant", "photo of an Ant"),
        ("an {}", "owl", "an owl"),
        ("a photo of the {}", "owl", "a photo of the owl"),
        ("a sea {}", "otter", "a sea otter"),
    ],
)
def test_the_article_follows_the_name(template: str, name: str, text: str) -> None:
    assert fill(template, name) == text


@pytest.mark.parametrize("template", ["a cat", "{} and {}", "a {} in {place}", "a {} }", "{{}}"])
def test_a_template_without_one_place_for_the_name_is_an_error(template: str) -> None:
    with pytest.raises(ValueError, match=rf"template '{re.escape(template)}' needs one \{{\}} .*, and no other braces"):
        PromptSet.from_names(["cat"], ["a {}", template])


def test_one_text_in_place_of_several_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"texts must be several, got the text 'a cat'; write \['a cat'\]"):
        PromptSet.from_texts("a cat")
    with pytest.raises(ValueError, match="names must be several, got the text 'cat'"):
        PromptSet.from_names("cat", ["a {}"])
    with pytest.raises(ValueError, match="templates must be several, got the text 'a "):
        PromptSet.from_names(["cat"], "a {}")


def test_a_template_is_recovered_where_the_concept_stands_in_the_text() -> None:
    assert recover_template("A photo of Adam Driver, 4k", "adam driver") == "A photo of {}, 4k"
    assert recover_template("a photo of a dog", "cat") is None
    assert recover_template("a photo of a dog", None) is None


def test_a_concept_is_found_as_words_of_its_own_only() -> None:
    assert recover_template("a scary car", "car") == "a scary {}"
    assert recover_template("a scary cat", "car") is None
    assert recover_template("code in C++, on paper", "c++") == "code in {}, on paper"


def test_the_shipped_templates_are_dealt_to_one_split_each() -> None:
    frames = [template for split in SPLITS for template in TEMPLATES[split]]
    assert len(frames) == len(set(frames))
    assert all(frame.count("{}") == 1 for frame in frames)
    prompts = concept_prompts(["cat", "owl"], SPLITS)
    assert len(prompts) == 2 * len(frames)
    check_leaks(prompts.of("fit"), prompts.of("calibrate") + prompts.of("test"), concepts=False)


def test_templates_that_mention_what_is_avoided_are_left_out() -> None:
    kept = concept_prompts(["owl"], ["fit"], avoid=["HOUSE", "red car"])
    assert len(kept) == len(TEMPLATES["fit"]) - 2
    assert not any("house" in text or "red car" in text for text in kept.texts)
    assert len(concept_prompts(["owl"], ["fit"], avoid=["use"])) == len(TEMPLATES["fit"]), "only whole words count"


# Files


def test_a_csv_is_read_with_its_concepts_and_templates(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('id,prompt,class\n1,"a cat, sleeping",cat\n2,a dog,\n')
    assert list(PromptSet.from_file(path)) == [Prompt("a cat, sleeping", "cat", "a {}, sleeping"), Prompt("a dog")]


def test_a_csv_that_a_spreadsheet_wrote_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,concept\na cat,cat\n", encoding="utf-8-sig")
    assert PromptSet.from_csv(path).texts == ["a cat"]


def test_a_csv_without_a_prompt_column_is_an_error_that_lists_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("text,class\na cat,cat\n")
    with pytest.raises(ValueError, match=r"prompts\.csv has no column 'prompt'; its columns are \['text', 'class'\]"):
        PromptSet.from_file(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"no column 'prompt'; its columns are \[\]"):
        PromptSet.from_file(path)


def test_a_jsonl_reads_back_what_it_wrote(tmp_path: Path) -> None:
    prompts = grid() + PromptSet.from_texts(["a bébé", 'a "quoted" one', "two\u2028lines"])
    prompts.to_jsonl(tmp_path / "prompts.jsonl")
    assert PromptSet.from_file(tmp_path / "prompts.jsonl") == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a cat\nun bébé".encode("latin-1"), r"a\.txt is not UTF-8 in line 2 .*; save it as UTF-8"),
        ("a.csv", "prompt\nun bébé".encode("latin-1"), r"a\.csv is not UTF-8 in line 2 .*; save it as UTF-8"),
        ("a.csv", b"concept,prompt\ncat,a cat\ndog\n", r"a\.csv, line 3 has the prompt None; write a text"),
        ("a.csv", b'prompt,concept\n"a cat,cat\na dog,dog\n', r"a\.csv is not CSV after line 1 .*; close its quotes"),
        ("a.csv", b'prompt\n"' + b"cat " * 40_000, r"a\.csv is not CSV after line 1 \(field larger .*; close its quotes"),
        ("a.jsonl", b'{"prompt": "a cat"}\n\n{"prompt"\n', r"a\.jsonl, line 3 is not valid JSON \(.* in column 10\); write"),
        ("a.jsonl", b'{"prompt": "a cat"}\n5\n', r'a\.jsonl, line 2 is 5; write an object, as \{"prompt": "a cat"\}'),
        ("a.jsonl", b'["prompt"]', r"a\.jsonl, line 1 is \['prompt'\]; write an object"),
        ("a.jsonl", b'{"prompt": "a cat", "template": 5}', r"a\.jsonl, line 1 has the template 5; write a text with \{\}"),
        ("a.jsonl", b'{"prompt": null}', r"a\.jsonl, line 1 has the prompt None; write a text"),
        ("a.jsonl", b'{"text": "a cat"}', r"a\.jsonl, line 1 has no column 'prompt'; its columns are \['text'\]"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_file_line_and_mend(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PromptSet.from_file(tmp_path / name)


def test_rows_are_numbered_in_errors() -> None:
    with pytest.raises(ValueError, match="row 2 has the prompt None"):
        PromptSet.from_rows([{"prompt": "a cat"}, {"prompt": None}])


def test_a_text_file_is_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert PromptSet.from_file(path).texts == ["a cat", "a dog"]


def test_parquet_is_read_by_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a cat", "concept": "cat"}]
    table = SimpleNamespace(column_names=["prompt", "concept"], to_pylist=lambda: rows)
    package, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    module.read_table = lambda path: table  # type: ignore[attr-defined]
    package.parquet = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    (tmp_path / "prompts.parquet").touch()
    assert list(PromptSet.from_file(tmp_path / "prompts.parquet")) == [Prompt("a cat", "cat", "a {}")]
    table.column_names = ["text"]
    with pytest.raises(ValueError, match="no column 'prompt'"):
        PromptSet.from_file(tmp_path / "prompts.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        PromptSet.from_parquet(tmp_path / "prompts.parquet")


def test_another_ending_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.csv, \.jsonl, \.parquet, \.txt, not '\.xls'"):
        PromptSet.from_file(tmp_path / "prompts.xls")
    with pytest.raises(FileNotFoundError, match="no prompt file at"):
        PromptSet.from_file(tmp_path / "prompts.csv")


# Splits


def values(prompts: PromptSet, split: Any, name: str) -> set[str]:
    return {getattr(prompt, name) for prompt in prompts.of(split)}


def test_splitting_by_template_puts_no_template_into_two_splits_and_every_concept_into_each() -> None:
    prompts = grid().split_by_template(seed=1)
    assert len(prompts) == 36
    templates = [values(prompts, split, "template") for split in SPLITS]
    assert all(templates)
    assert sum(map(len, templates)) == len(set.union(*templates))
    for split in SPLITS:
        assert values(prompts, split, "concept") == set(NAMES)


def test_concepts_with_sentences_of_their_own_are_in_every_split() -> None:
    prompts = PromptSet(tuple(Prompt(f"{name} {i}", name) for name in NAMES for i in range(4)))
    for seed in range(5):
        dealt = prompts.split_by_template(seed)
        for split in SPLITS:
            assert values(dealt, split, "concept") == set(NAMES)


def test_splitting_by_concept_and_template_shares_neither() -> None:
    prompts = grid().split_by_concept_and_template(seed=1)
    for name in ("concept", "template"):
        parts = [values(prompts, split, name) for split in SPLITS]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    check_leaks(prompts.of("fit"), prompts.of("calibrate"))
    check_leaks(prompts.of("fit") + prompts.of("calibrate"), prompts.of("test"))


def test_texts_without_a_concept_are_split_by_text() -> None:
    prompts = PromptSet.from_texts([f"text {i}" for i in range(20)] * 2).split_by_concept_and_template()
    assert len(prompts) == 40
    check_leaks(prompts.of("fit"), prompts.of("calibrate") + prompts.of("test"))


def test_splits_are_seeded_and_do_not_depend_on_the_order_of_the_prompts() -> None:
    prompts = grid()
    backwards = PromptSet(prompts.prompts[::-1]).split_by_template(seed=1)
    assert set(backwards) == set(prompts.split_by_template(seed=1))
    assert prompts.split_by_template(seed=1) != prompts.split_by_template(seed=2)


def test_prompts_that_have_a_split_keep_it() -> None:
    fixed = PromptSet.from_names(["cat"], FRAMES, split="test")
    for split in (fixed.split_by_template(), fixed.split_by_concept_and_template()):
        assert split == fixed


@pytest.mark.parametrize("n", [3, 4, 5, 10, 100])
def test_every_split_gets_something_where_there_are_three(n: int) -> None:
    dealt = assign([str(i) for i in range(n)], 0, (0.98, 0.01, 0.01))
    assert len(dealt) == n
    assert set(dealt.values()) == set(SPLITS)


def test_shares_are_kept() -> None:
    dealt = list(assign([str(i) for i in range(100)], 0, (0.5, 0.3, 0.2)).values())
    assert [dealt.count(split) for split in SPLITS] == [50, 30, 20]


@pytest.mark.parametrize(
    ("kind", "held_out"),
    [
        ("text", Prompt("a cat", "dog", "{}")),
        ("template", Prompt("a dog", "dog", "a {}")),
        ("concept", Prompt("my cat", "cat", "my {}")),
    ],
)
def test_a_leak_is_an_error_that_names_what_leaks(kind: str, held_out: Prompt) -> None:
    fit = PromptSet((Prompt("a cat", "cat", "a {}"),))
    with pytest.raises(ValueError, match=f"1 held-out prompts leak by {kind}, as "):
        check_leaks(fit, PromptSet((held_out,)))
    check_leaks(fit, PromptSet((Prompt("my dog", "dog", "my {}"),)))


def test_a_shared_concept_is_no_leak_where_only_templates_are_held_out() -> None:
    fit, held_out = PromptSet((Prompt("a cat", "cat", "a {}"),)), PromptSet((Prompt("my cat", "cat", "my {}"),))
    check_leaks(fit, held_out, concepts=False)
