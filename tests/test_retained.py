from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.erasing import content_of
from reference.features import dense_codes
from test_erasing import CONFIG, NEUTRAL, OTHERS, RETAIN, TARGET, make, same_eraser
from tiny import NOUNS, build_text_encoder, prompts_of

from itd import SAE, EraseConfig, Eraser, HookPoint, Prompt, PromptSet, Retained, add_concepts, erase
from itd.erasing import calibration_of
from itd.features import FeatureStats
from itd.gate import SCORES, score, score_prompts
from itd.retained import encode_prompts


@pytest.fixture
def kept(pipe: Any, sae: SAE, site: HookPoint) -> Retained:
    return Retained.make(pipe, sae, site, RETAIN, NEUTRAL)


# Codes of prompts


def test_codes_of_prompts_are_those_of_each_prompt_by_itself(pipe: Any, sae: SAE, site: HookPoint) -> None:
    prompts = PromptSet.from_texts(["a photo of a cat", "", "a photo of a boat", "my cat at night", "a photo of a cat"])
    codes = list(encode_prompts(pipe, sae, site, prompts))
    assert len(codes) == 5
    for prompt, (acts, indices) in zip(prompts, codes, strict=True):
        x = content_of(pipe, site, prompt.text)
        dense = torch.zeros(len(x), 256).scatter_(1, indices, acts)
        torch.testing.assert_close(dense, dense_codes(sae, x), rtol=1e-4, atol=1e-4)


def test_beginnings_that_prompts_share_are_encoded_once(pipe: Any, sae: SAE, site: HookPoint, monkeypatch: Any) -> None:
    n_encoded: list[int] = []
    encode = SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda self, x: n_encoded.append(len(x)) or encode(self, x))
    encode_prompts(
        pipe, sae, site, PromptSet.from_texts(["a photo of a cat", "a photo of a boat", "a photo", "a photo of a cat"])
    )
    assert sum(n_encoded) == 6


@pytest.mark.parametrize("name", ["evidence", "contribution"])
def test_scores_from_codes_are_those_of_the_gate(pipe: Any, sae: SAE, site: HookPoint, name: Any) -> None:
    concepts, prompts = make(pipe, sae, site).concepts, PromptSet.from_texts(["a photo of a house", "", "my cat"])
    found = score_prompts(name, sae, concepts, encode_prompts(pipe, sae, site, prompts))
    for row, prompt in zip(found, prompts, strict=True):
        expected = score(name, sae, concepts, content_of(pipe, site, prompt.text)).concepts
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'reconstruction' needs the activations"):
        score_prompts("reconstruction", sae, concepts, encode_prompts(pipe, sae, site, prompts))
    assert "reconstruction" in SCORES


def test_statistics_are_those_of_the_prompts_to_fit(pipe: Any, sae: SAE, site: HookPoint, kept: Retained) -> None:
    stats = FeatureStats(sae)
    for prompt in kept.fit:
        x = content_of(pipe, site, prompt.text)
        stats.update(x[None], torch.ones(1, len(x), dtype=torch.bool))
    torch.testing.assert_close(kept.stats(128).mean, stats.mean, rtol=1e-3, atol=1e-4)
    assert torch.equal(kept.stats(128).n_active, stats.n_active)
    often = kept.stats(128).often()
    assert len(often) == 32
    assert stats.n_active[often].min() >= stats.n_active.sort(descending=True).values[31]


# Erasing with it


def test_erasing_from_what_is_retained_equals_erasing_from_the_prompts(
    pipe: Any, sae: SAE, site: HookPoint, kept: Retained
) -> None:
    made = erase(pipe, sae, site, TARGET, kept, config=CONFIG)
    plain = make(pipe, sae, site)
    assert same_eraser(made, plain)
    assert made.records == plain.records


def test_what_the_target_names_is_left_out(pipe: Any, sae: SAE, site: HookPoint) -> None:
    prompts = RETAIN + TARGET.about("house") + PromptSet((Prompt("a cat in a HOUSE", "cat", split="fit"),))
    kept = Retained.make(pipe, sae, site, prompts, NEUTRAL)
    alone = TARGET.about("house")
    assert same_eraser(erase(pipe, sae, site, alone, kept, config=CONFIG), make(pipe, sae, site, target=alone))
    left = kept.without(alone)
    assert len(left.fit) == len(RETAIN.of("fit")) + len(kept.fit.filter(lambda p: p.concept is None))
    assert kept.without(PromptSet((Prompt("a house", "hous"),))).fit == kept.fit.filter(lambda p: p.text != "a house")
    with pytest.raises(ValueError, match="nothing is left to fit without cat, "):
        Retained.make(pipe, sae, site, RETAIN).without(prompts_of(*NOUNS[:4], *OTHERS))


# Adding concepts


def test_adding_a_concept_equals_erasing_both_at_once(pipe: Any, sae: SAE, site: HookPoint, kept: Retained) -> None:
    parts = [TARGET.about(noun) for noun in ("house", "boat")]
    both = erase(pipe, sae, site, TARGET, kept, config=CONFIG)
    first = erase(pipe, sae, site, parts[0], kept, config=CONFIG)
    added = add_concepts(first, pipe, parts[1], kept)
    assert added.names == both.names == ("house", "boat")
    assert added.gate.thresholds == pytest.approx(both.gate.thresholds, rel=1e-5)
    assert all(a.equals(b) for a, b in zip(added.concepts, both.concepts, strict=True))
    alone = erase(pipe, sae, site, parts[1], kept, config=CONFIG)
    assert alone.gate.thresholds[0] != added.gate.thresholds[0], "control: one threshold is chosen anew for both"
    checks = added.check(pipe, ["a small house on a table", "a small boat on a table", "a small cat on a table"])
    assert [check.concepts for check in checks] == [("house",), ("boat",), ()]
    calibrations = calibration_of(added)
    assert [each.n_positives for each in calibrations] == [3, 3]
    assert {each.threshold for each in calibrations} == set(added.gate.thresholds)
    assert calibrations[0].false_positive_rate == pytest.approx(calibration_of(both)[0].false_positive_rate)


def test_a_concept_can_be_added_to_an_eraser_that_was_saved(pipe: Any, saved_sae: SAE, site: HookPoint, tmp_path: Path) -> None:
    Retained.make(pipe, saved_sae, site, RETAIN, NEUTRAL).save(tmp_path / "kept")
    kept = Retained.load(tmp_path / "kept", saved_sae)
    erase(pipe, saved_sae, site, TARGET.about("house"), kept, config=CONFIG).save(tmp_path / "eraser")
    added = add_concepts(Eraser.load(tmp_path / "eraser"), pipe, TARGET.about("boat"), kept)
    added.save(tmp_path / "eraser")
    assert Eraser.load(tmp_path / "eraser").names == ("house", "boat")
    both = erase(pipe, saved_sae, site, TARGET, kept, config=CONFIG)
    assert added.gate.thresholds == pytest.approx(both.gate.thresholds, rel=1e-5)
    assert all(a.equals(b) for a, b in zip(added.concepts, both.concepts, strict=True))


def test_concepts_that_cannot_be_added_are_errors(pipe: Any, sae: SAE, site: HookPoint, kept: Retained) -> None:
    house, boat = TARGET.about("house"), TARGET.about("boat")
    first = erase(pipe, sae, site, house, kept, config=CONFIG)
    with pytest.raises(ValueError, match="erases 'house' already"):
        add_concepts(first, pipe, house, kept)
    old = replace(first, records=({key: value for key, value in first.records[0].items() if key != "positives"},))
    joined = first | erase(pipe, sae, site, boat, kept, config=CONFIG)
    papers = erase(pipe, sae, site, house, kept, config=replace(CONFIG, selection="difference"))
    for eraser, message in (
        (old, "earlier versions"),
        (joined, "joined from several"),
        (papers, "'difference' and 'evidence'"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*make it again"):
            add_concepts(eraser, pipe, TARGET.about("boat"), kept)


def test_what_was_encoded_elsewhere_does_not_fit(pipe: Any, sae: SAE, site: HookPoint, kept: Retained, tokenizer: Any) -> None:
    other = SAE.random(sae.config, hook_point=site)
    with pytest.raises(ValueError, match="encoded by another autoencoder"):
        erase(pipe, other, site, TARGET, kept, config=CONFIG)
    with pytest.raises(ValueError, match=r"encoded at text_encoder:encoder\.layers\.2, not at"):
        erase(pipe, sae, site, TARGET, replace(kept, hook_point=HookPoint("text_encoder", "encoder.layers.2")), config=CONFIG)
    with pytest.raises(ValueError, match="`Retained` holds the neutral prompts too"):
        erase(pipe, sae, site, TARGET, kept, NEUTRAL, CONFIG)
    pipe.text_encoder = build_text_encoder(tokenizer, seed=8)
    with pytest.raises(ValueError, match="encoded by another text encoder"):
        erase(pipe, sae, site, TARGET, kept, config=CONFIG)


def test_an_autoencoder_of_another_place_is_an_error(pipe: Any, sae: SAE) -> None:
    with pytest.raises(
        ValueError, match=r"was trained at text_encoder:encoder\.layers\.1, not at text_encoder:encoder\.layers\.2"
    ):
        make(pipe, sae, HookPoint("text_encoder", "encoder.layers.2"))
    spelled = HookPoint("text_encoder", "text_model.encoder.layers.1")
    assert make(pipe, sae, spelled).hook_point == spelled


@pytest.mark.parametrize("name", ["target", "retain", "neutral"])
@pytest.mark.parametrize("pair", [("fit", "calibrate"), ("fit", "test"), ("calibrate", "test")])
def test_a_leak_between_given_splits_of_any_set_is_an_error(
    pipe: Any, sae: SAE, site: HookPoint, name: str, pair: tuple[Any, Any]
) -> None:
    sets = {
        "target": TARGET,
        "retain": RETAIN,
        "neutral": PromptSet((Prompt("a", split="fit"), Prompt("b", split="calibrate"))),
    }
    leaking = [Prompt("the very same text", "house" if name == "target" else "cat", split=split) for split in pair]
    with pytest.raises(ValueError, match="held-out prompts leak by text, as 'the very same text'"):
        make(pipe, sae, site, **{name: sets[name] + PromptSet(tuple(leaking))})


# On disk


def test_what_is_retained_reads_back(pipe: Any, saved_sae: SAE, site: HookPoint, tmp_path: Path) -> None:
    made = Retained.make(pipe, saved_sae, site, RETAIN, NEUTRAL)
    made.save(tmp_path / "kept")
    loaded = Retained.load(tmp_path / "kept", saved_sae)
    assert (loaded.hook_point, loaded.sha256, loaded.fit.texts) == (made.hook_point, made.sha256, made.fit.texts)
    assert torch.equal(loaded.stats(4).mean, made.stats(4).mean)
    assert torch.equal(loaded.stats(4).selected, made.stats(4).selected)
    for a, b in zip(loaded.calibrate_codes, made.calibrate_codes, strict=True):
        assert torch.equal(a.acts, b.acts)
        assert torch.equal(a.indices, b.indices)


def test_what_is_retained_is_refused_if_it_is_not_whole(pipe: Any, saved_sae: SAE, site: HookPoint, tmp_path: Path) -> None:
    made = Retained.make(pipe, saved_sae, site, RETAIN, NEUTRAL)
    made.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="made with another autoencoder"):
        Retained.load(tmp_path / "kept", SAE.random(saved_sae.config).save(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="no retained at"):
        Retained.load(tmp_path / "nowhere", saved_sae)
    path = tmp_path / "kept" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"fit": config["fit"][:-1]}))
    with pytest.raises(ValueError, match=r"kept is malformed: .* prompts to fit do not fit the codes of"):
        Retained.load(tmp_path / "kept", saved_sae)
    with pytest.raises(ValueError, match="save the autoencoder first"):
        replace(made, sae=replace(saved_sae, sha256=None)).save(tmp_path / "unsaved")


def test_settings_of_an_eraser_are_those_that_concepts_are_added_with(
    pipe: Any, sae: SAE, site: HookPoint, kept: Retained
) -> None:
    config = EraseConfig(n_features=5, fpr=None, recall=0.7, strength=-2.0)
    added = add_concepts(erase(pipe, sae, site, TARGET.about("house"), kept, config=config), pipe, TARGET.about("boat"), kept)
    assert [len(concept) for concept in added.concepts] == [5, 5]
    assert added.edit.strength == -2.0
    assert {each.rule for each in calibration_of(added)} == {"recall=0.7"}
