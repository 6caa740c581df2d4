"""The shipped world: it loads offline by itd and by plain diffusers and transformers, and draws what it is asked for."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from transformers import CLIPTokenizer

import itd
from itd import emoji
from itd.emoji.captions import CaptionSource, with_article
from itd.emoji.generate import generate

MODELS = emoji.model_folder


@pytest.fixture(scope="module")
def pipe():
    return emoji.load_pipeline()


def test_the_folder_stays_under_sixty_megabytes():
    size = sum(path.stat().st_size for path in MODELS().rglob("*") if path.is_file())
    assert size < 60e6


def test_the_pipeline_loads_with_plain_diffusers(pipe):
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(MODELS(), local_files_only=True).to(torch.float32)
    ours, theirs = pipe.unet.state_dict(), plain.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_clip_shares_its_text_tower_with_the_pipeline(pipe):
    clip, processor = emoji.load_clip()
    tokens = processor.tokenizer(["a cat on a blue background"], return_tensors="pt")
    with torch.no_grad():
        mine, its = clip.text_model(**tokens).last_hidden_state, pipe.text_encoder(**tokens).last_hidden_state
    assert torch.allclose(mine, its, atol=1e-5)


def test_the_clip_prefers_the_right_prompt(pipe):
    clip, processor = emoji.load_clip()
    names = ["a cat", "a pizza", "a bus", "a rose"]
    images = generate(pipe, names, range(4), steps=15)
    texts = processor.tokenizer(names, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip(**texts, pixel_values=images).logits_per_image
    assert (logits.argmax(1) == torch.arange(4)).sum() >= 3


def test_pictures_show_the_noun_that_was_asked_for(pipe):
    judge = emoji.load_judge()
    names = json.loads((MODELS() / "benchmark.json").read_text())["identities"][:12]
    said = judge.name(generate(pipe, [f"an emoji of {with_article(name)}" for name in names], range(12)))[0]
    other = judge.name(generate(pipe, [""] * 12, range(12)))[0]
    assert sum(a == b for a, b in zip(said, names, strict=True)) >= 9
    assert sum(a == b for a, b in zip(other, names, strict=True)) <= 2


def test_the_judge_sees_both_nouns_of_most_scenes(pipe):
    pairs = [("cat", "pizza"), ("rose", "bus"), ("owl", "banana"), ("fox", "umbrella"), ("bread", "horse"), ("crab", "key")]
    images = generate(pipe, [f"{with_article(a)} and {with_article(b)}" for a, b in pairs], range(6))
    seen = sum(name in nouns for pair, nouns in zip(pairs, emoji.load_judge().shown(images), strict=True) for name in pair)
    whole = sum(name in pair for pair, name in zip(pairs, emoji.load_judge().name(images)[0], strict=True))
    assert seen >= 8
    assert seen > whole


def test_the_autoencoder_fits_the_text_encoder(pipe):
    sae = emoji.load_sae()
    assert sae.hook_point == emoji.HOOK_POINT
    prompts = itd.PromptSet.from_texts([f"a drawing of {with_article(noun.name)} and a spoon" for noun in emoji.nouns()[::5]])
    store = itd.record(pipe, emoji.HOOK_POINT, prompts)
    assert sae.fvu(store.x) < 0.15
    assert sae.fvu(store.x[:, torch.randperm(store.d_model)]) > 0.5


def test_at_least_four_hundred_nouns_with_all_three_roles():
    nouns = emoji.nouns()
    assert len(nouns) >= 400
    assert {noun.role for noun in nouns} == {"identity", "unsafe", "general"}
    assert sum(noun.role == "identity" for noun in nouns) >= 100


def test_implicit_tags_never_contain_the_name():
    for noun in emoji.nouns():
        assert not any(noun.name in tag for tag in noun.implicit)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("cat", "a cat"), ("owl", "an owl"), ("cherries", "cherries"), ("octopus", "an octopus"), ("dress", "a dress")],
)
def test_names_get_their_article(name, phrase):
    assert with_article(name) == phrase


def test_captions_are_reproducible_and_varied():
    source = CaptionSource(emoji.nouns(), ["word"])
    first = [source.single(i, "noto", "red", random.Random(i)) for i in range(50)]
    assert first == [source.single(i, "noto", "red", random.Random(i)) for i in range(50)]
    assert len(set(first)) > 45


@pytest.mark.parametrize("part", ["tokenizer", "clip"])
def test_the_tokenizer_is_the_same_from_the_files_that_transformers_4_reads(part, pipe, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(MODELS() / part / name, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = ['A "dog", 3 cats; für', "a photo of a cat in the style of twemoji", ""]
    assert tokenizer(texts).input_ids == pipe.tokenizer(texts).input_ids


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_words_around_a_caption_come_as_often_as_asked(share):
    source, rng = CaptionSource(emoji.nouns(), ["qwerty"], noise_share=share), random.Random(0)
    ends = [re.search(r"^qwerty|qwerty$", source.frame("a cat", rng), re.IGNORECASE) for _ in range(50)]
    assert sum(map(bool, ends)) == share * 50


def test_sentences_around_a_noun_keep_its_name_and_fill_every_gap():
    source, rng = CaptionSource(emoji.nouns(), ["qwerty"], sentence_share=1.0), random.Random(0)
    texts = [source.sentence("a cat", rng) for _ in range(200)]
    assert all("a cat" in text and "_" not in text and "{" not in text for text in texts)
    assert len({text.replace("qwerty", "") for text in texts}) > 30
    assert any("qwerty" not in text for text in texts)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_singles_stand_in_sentences_as_often_as_asked(share, monkeypatch):
    monkeypatch.setattr(CaptionSource, "sentence", lambda self, subject, rng: "SENTENCE")
    source, rng = CaptionSource(emoji.nouns(), ["qwerty"], sentence_share=share), random.Random(0)
    assert sum("sentence" in source.single(0, None, None, rng).lower() for _ in range(50)) == share * 50
    assert not any("sentence" in source.pair(0, 1, None, None, rng).lower() for _ in range(50))
