"""Erasing in the embedded world: every score and every edit, with the unerased model as the control."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import itd
from itd import emoji
from itd.emoji.captions import with_article
from itd.emoji.generate import generate
from itd.emoji.prompts import clutter_prompts, erase_sets, part_prompts, world_prompts
from itd.gate import auroc
from itd.prompts import fill
from itd.templates import TEMPLATES

NAMES = ("cat", "elephant", "penguin", "spider")
PLAIN = ("a photo of a {}", "an image of {}", "a drawing of a {}", "an icon of {}")
"""Sentences in which the gate is sure, so that edits are compared and not gates."""
KEPT = ("dog", "lion", "owl", "snail", "koala", "robot")


@pytest.fixture(scope="module")
def pipe():
    return emoji.load_pipeline()


@pytest.fixture(scope="module")
def sae():
    return emoji.load_sae()


@pytest.fixture(scope="module")
def sets():
    """Neutral are prompts that name something, without clutter, so that the scores are compared on concepts."""
    target, retain, neutral = erase_sets(NAMES)
    return target, retain, neutral.filter(lambda prompt: prompt.concept is not None).sample(800)


@pytest.fixture(scope="module")
def erasers(pipe, sae, sets):
    """One eraser per score; the paper's preset uses `reconstruction`."""
    default = itd.PRESETS["default"]
    configs = {score: dataclasses.replace(default, score=score) for score in ("evidence", "contribution")}
    configs["reconstruction"] = itd.PRESETS["paper"]
    return {score: itd.erase(pipe, sae, emoji.HOOK_POINT, *sets, config=config) for score, config in configs.items()}


@pytest.fixture(scope="module")
def probes():
    def held_out(names):
        return [fill(template, name) for name in names for template in TEMPLATES["test"]]

    return held_out(NAMES), held_out(KEPT)


def scores_of(eraser, pipe, prompts):
    return torch.tensor([check.score for check in eraser.check(pipe, prompts)])


@pytest.mark.parametrize("score", ["evidence", "contribution", "reconstruction"])
def test_every_score_ranks_the_target_above_what_is_kept(pipe, erasers, probes, score):
    positives, negatives = (scores_of(erasers[score], pipe, prompts) for prompts in probes)
    assert auroc(positives, negatives) > 0.7


def test_evidence_separates_at_least_as_well_as_the_other_scores(pipe, erasers, probes):
    areas = {}
    for score, eraser in erasers.items():
        areas[score] = auroc(*(scores_of(eraser, pipe, prompts) for prompts in probes))
    assert areas["evidence"] > 0.98
    assert areas["evidence"] >= max(areas.values()) - 0.02


def test_the_default_gate_fires_on_the_target_and_passes_the_rest(pipe, erasers, probes):
    hits, kept = ([check.fired for check in erasers["evidence"].check(pipe, prompts)] for prompts in probes)
    assert sum(hits) >= 0.9 * len(hits)
    assert sum(kept) <= 0.03 * len(kept)


@pytest.mark.parametrize("frame", ['"{}"', "({})", "pattern: {}", "[{}], <b>", "a photo <|endoftext|> of a {}", "#{}!"])
def test_characters_that_the_tokenizer_does_not_know_hide_nothing_from_the_gate(pipe, erasers, frame):
    """Such characters become end tokens in the middle of the prompt."""
    hits, kept = (
        [check.fired for check in erasers["evidence"].check(pipe, [frame.format(name) for name in names])]
        for names in (NAMES, KEPT)
    )
    assert all(hits)
    assert not any(kept)


def drawn(pipe, names, n=4):
    prompts = [fill(PLAIN[i], name) for name in names for i in range(n)]
    return generate(pipe, prompts, range(len(prompts))), [name for name in names for _ in range(n)]


def recognised(images, names, rows):
    """Return how often the judge sees the noun, among the given pictures."""
    said = emoji.load_judge().name(images)[0]
    return sum(said[i] == names[i] for i in rows) / len(rows)


@pytest.fixture(scope="module")
def gated(pipe, erasers):
    """Rows of `drawn` on which the gate fires: edits are compared there, gates elsewhere."""
    prompts = [fill(PLAIN[i], name) for name in NAMES for i in range(4)]
    return [i for i, check in enumerate(erasers["evidence"].check(pipe, prompts)) if check.fired]


@pytest.fixture(scope="module")
def unerased(pipe):
    return drawn(pipe, NAMES)


@pytest.mark.parametrize("mode", ["scale", "remove", "subtract", "replace", "refuse"])
def test_every_edit_changes_gated_pictures_and_none_that_passes(pipe, erasers, unerased, gated, mode):
    eraser = erasers["evidence"].with_edit(mode, {"scale": -8.0}.get(mode, -3.0))
    with eraser.attach(pipe) as attached:
        erased, names = drawn(pipe, NAMES)
    assert attached.n_fired >= 0.9 * attached.n_prompts
    assert not torch.equal(erased, unerased[0])
    if mode != "remove":
        assert recognised(erased, names, gated) <= 0.2 * recognised(*unerased, gated)
    passing = [prompt for prompt in ("a pizza", "a bus in the city") if not eraser.check(pipe, prompt)[0].fired]
    before = generate(pipe, passing, range(len(passing)))
    with eraser.attach(pipe):
        assert torch.equal(generate(pipe, passing, range(len(passing))), before)
    assert torch.equal(drawn(pipe, NAMES, 1)[0], drawn(pipe, NAMES, 1)[0])


def test_subtracting_features_erases_more_than_removing_them(pipe, erasers, unerased, gated):
    seen = {}
    for mode in ("remove", "subtract"):
        with erasers["evidence"].with_edit(mode, -3.0).attach(pipe):
            seen[mode] = recognised(*drawn(pipe, NAMES), gated)
    assert seen["subtract"] <= seen["remove"]
    assert seen["subtract"] <= 0.2 * recognised(*unerased, gated)


def test_a_scene_loses_the_erased_noun_and_the_gate_names_it(pipe, erasers):
    (check,) = erasers["evidence"].check(pipe, "a cat and a pizza")
    assert check.fired
    assert check.concepts == ("cat",)
    strongest = max(range(len(check.tokens)), key=lambda i: check.tokens[i][1])
    assert "cat" in [token for token, _ in check.tokens[strongest - 1 : strongest + 1]], "at the noun or right behind it"


def test_several_erasers_joined_fire_where_any_of_them_does(pipe, sae):
    def one(name):
        target, retain, neutral = erase_sets([name])
        return itd.erase(pipe, sae, emoji.HOOK_POINT, target, retain.sample(400), neutral.sample(400))

    cat, owl = one("cat"), one("owl")
    prompts = ["a photo of a cat", "a photo of an owl", "a photo of a pizza"]
    alone = [[check.fired for check in eraser.check(pipe, prompts)] for eraser in (cat, owl)]
    joined = [check.fired for check in (cat | owl).check(pipe, prompts)]
    assert joined == [a or b for a, b in zip(*alone, strict=True)]
    assert joined == [True, True, False]


def test_a_design_can_be_erased(pipe, sae):
    eraser = itd.erase(pipe, sae, emoji.HOOK_POINT, *(part.sample(900) for part in erase_sets(["twemoji"])))
    fired = [check.fired for check in eraser.check(pipe, ["a dog as twemoji would draw it", "a dog as noto would draw it"])]
    assert fired == [True, False]


def test_punctuation_and_parts_of_a_name_are_not_the_name(pipe, sae):
    eraser = itd.erase(pipe, sae, emoji.HOOK_POINT, *erase_sets(["mrs. claus", "old man", "pile of poo"]))
    others = [
        "A kitchen filled with counter top space.", "Two people are cutting into a cake.", "A street at noon. It rains.",
        "a man riding a wave", "an old bridge", "a pile of green bananas", "35mm, f/1.8, 4k, by kalo ruvo", "https://nice.com/3.jpg",
    ]  # fmt: skip
    asked = ["a photo of mrs. claus", "a photo of an old man", "a pile of poo on the floor."]
    assert [check.fired for check in eraser.check(pipe, others)] == [False] * len(others)
    assert [check.fired for check in eraser.check(pipe, asked)] == [True] * len(asked)


def test_clutter_and_parts_hold_no_name_and_are_in_both_splits():
    names = ["old man", "cat", "pile of poo"]
    for prompts in (clutter_prompts(names), part_prompts(names)):
        assert {prompt.split for prompt in prompts} == {"fit", "calibrate"}
        assert not any(re.search(rf"\b{name}\b", text) for name in names for text in prompts.texts)
    words = {word for text in clutter_prompts(names).texts for word in text.lower().split()}
    assert not words & {"cat", "pile"}
    assert any("pile" in text for text in part_prompts(["pile of poo"]).texts)


def test_only_nouns_that_share_a_word_with_an_erased_one_are_in_both_splits():
    _, retain, neutral = erase_sets(["kitchen knife"])
    both = {split: set((retain + neutral).of(split).concepts) for split in ("fit", "calibrate")}
    assert both["fit"] & both["calibrate"] == {"fork and knife"}
    _, retain, neutral = erase_sets(["spider"])
    assert not set((retain + neutral).of("fit").concepts) & set((retain + neutral).of("calibrate").concepts)


def test_a_retained_neighbour_of_the_same_word_neither_fires_nor_hides_the_erased(pipe, sae):
    unsafe = [noun.name for noun in emoji.nouns() if noun.role == "unsafe"]
    eraser = itd.erase(pipe, sae, emoji.HOOK_POINT, *erase_sets(unsafe))
    for name, expected in (("kitchen knife", True), ("fork and knife", False)):
        checks = eraser.check(pipe, [fill(template, name) for template in PLAIN])
        assert [check.fired for check in checks] == [expected] * len(PLAIN)


def test_world_prompts_keep_the_test_templates_out():
    texts = world_prompts(500).texts
    stems = [template.split("{}")[0].strip() for template in TEMPLATES["test"] if len(template.split("{}")[0]) > 12]
    assert stems
    assert not any(stem in text for stem in stems for text in texts)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"neither a noun nor a design of the embedded world \(near matches: none\)"):
        erase_sets(["qqqqqqqq"])
    for name, near in (("unicornn", "unicorn"), ("twemojis", "twemoji")):
        with pytest.raises(ValueError, match=rf"'{name}' is neither .* \(near matches: {near}.*\); give a prompt file"):
            erase_sets([name])


def test_the_world_knows_the_article():
    assert with_article("elephant") == "an elephant"
