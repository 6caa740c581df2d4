from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.erasing import PaperEraser, content_of
from reference.features import evidence_weights
from reference.gate import naive_evidence
from tiny import FRAMES, NOUNS, prompts_of

from itd import PRESETS, SAE, EraseConfig, Eraser, HookPoint, Prompt, PromptSet, SAEConfig, erase, pipelines
from itd.erasing import calibration_of, name_windows, split_sets
from itd.features import ConceptFeatures
from itd.gate import threshold_for_fpr, threshold_for_recall

OTHERS = tuple(noun for noun in NOUNS if noun not in ("house", "boat"))
NEUTRAL = PromptSet.from_texts(
    [
        "two people",
        "a big red park",
        "the night",
        "my window",
        "one small table",
        "people by the window",
        "a photo of people",
        "",
    ]
)


def deal(prompts: PromptSet) -> PromptSet:
    """Deal frames to splits, so that every noun is in each: five to fit, three to calibrate, one to test."""
    split_of = dict(zip(FRAMES, ("fit", "fit", "calibrate") * 2 + ("fit", "calibrate", "test"), strict=True))
    return PromptSet(tuple(replace(prompt, split=split_of[prompt.template]) for prompt in prompts))  # type: ignore[index]


TARGET, RETAIN = deal(prompts_of("house", "boat")), deal(prompts_of(*OTHERS))
CONFIG = EraseConfig(selection="evidence", calibration="shared", n_features=16, fpr=0.1)


def make(pipe: Any, sae: SAE, site: HookPoint, config: EraseConfig | str = CONFIG, **sets: PromptSet) -> Eraser:
    chosen = {"target": TARGET, "retain": RETAIN, "neutral": NEUTRAL} | sets
    return erase(pipe, sae, site, config=config, **chosen)


def same_eraser(a: Eraser, b: Eraser) -> bool:
    return a.gate == b.gate and all(x.equals(y) for x, y in zip(a.concepts, b.concepts, strict=True))


# What comes out


@pytest.mark.parametrize("selection", ["fisher", "token", "evidence"])
def test_erasing_fires_on_new_prompts_of_the_targets_and_on_no_others(
    pipe: Any, sae: SAE, site: HookPoint, selection: Any
) -> None:
    eraser = make(pipe, sae, site, replace(CONFIG, selection=selection))
    assert eraser.names == ("house", "boat")
    targets = eraser.check(pipe, TARGET.of("test").texts)
    assert [check.concepts for check in targets] == [("house",), ("boat",)]
    assert not any(check.fired for check in eraser.check(pipe, [*RETAIN.of("test").texts, *NEUTRAL.texts]))


def test_the_whole_chain_changes_images_of_targets_only(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site)

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(prompt, num_inference_steps=2, output_type="np", generator=generator).images)

    prompts = ("a small house on a table", "a small cat on a table", "")
    plain = [draw(prompt) for prompt in prompts]
    with eraser.attach(pipe):
        gated = [draw(prompt) for prompt in prompts]
    assert [torch.equal(a, b) for a, b in zip(plain, gated, strict=True)] == [False, True, True]


def test_features_and_scores_are_those_of_the_matched_filter(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site)
    negative = split_sets(TARGET, RETAIN, NEUTRAL, CONFIG.seed)[1]
    retain = [content_of(pipe, site, text) for text in negative.of("fit").texts]
    for concept in eraser.concepts:
        target = [content_of(pipe, site, text) for text in TARGET.of("fit").about(concept.name).texts]
        expected = evidence_weights(sae, target, retain, CONFIG.n_features, CONFIG.eps)
        assert concept.indices.tolist() == sorted(expected)
        torch.testing.assert_close(concept.weights, torch.tensor([expected[j] for j in sorted(expected)]), rtol=1e-3, atol=1e-4)
        raw = replace(concept, scale=1.0, offset=0.0)
        low = torch.tensor([naive_evidence(sae, raw, x) for x in retain if len(x)]).quantile(0.99)
        high = torch.tensor([naive_evidence(sae, raw, x) for x in target]).median()
        assert concept.scale == pytest.approx(1 / float(high - low), rel=0.1)
        assert float(high) * concept.scale + concept.offset == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rates", [{"fpr": 0.1}, {"fpr": None, "recall": 0.8}])
def test_the_threshold_is_calibrated_on_the_held_out_prompts(
    pipe: Any, sae: SAE, site: HookPoint, rates: dict[str, Any]
) -> None:
    eraser = make(pipe, sae, site, replace(CONFIG, **rates))
    negative = split_sets(TARGET, RETAIN, NEUTRAL, CONFIG.seed)[1].of("calibrate")
    scores = [
        torch.tensor([check.score for check in eraser.check(pipe, prompts.texts)])
        for prompts in (TARGET.of("calibrate"), negative)
    ]
    expected = threshold_for_fpr(scores[1], 0.1) if rates.get("fpr") else threshold_for_recall(scores[0], 0.8)
    assert eraser.gate.thresholds[0] == eraser.gate.thresholds[1]
    assert eraser.gate.thresholds[0] == pytest.approx(expected, rel=1e-4)
    calibration = calibration_of(eraser)[0]
    assert calibration.threshold == eraser.gate.thresholds[0]
    assert (calibration.n_positives, calibration.n_negatives) == (len(TARGET.of("calibrate")), len(negative))
    assert calibration.recall == pytest.approx(float((scores[0] >= expected).double().mean()), abs=0.01)
    assert calibration.curve


def apart(pipe: Any, sae: SAE, site: HookPoint, config: EraseConfig) -> tuple[Eraser, torch.Tensor, torch.Tensor]:
    """Return an eraser, and the scores per concept of the held-out prompts: of what stays, and of each concept's own."""
    eraser = make(pipe, sae, site, config)
    negative = split_sets(TARGET, RETAIN, NEUTRAL, config.seed)[1].of("calibrate")

    def scores(prompts: PromptSet, concept: ConceptFeatures) -> torch.Tensor:
        found = [content_of(pipe, site, text) for text in prompts.texts]
        return torch.tensor([naive_evidence(sae, concept, x) for x in found if len(x)])

    own = [scores(TARGET.of("calibrate").about(concept.name), concept) for concept in eraser.concepts]
    return eraser, torch.stack([scores(negative, concept) for concept in eraser.concepts], 1), torch.stack(own, 1)


def test_a_concepts_threshold_is_part_of_the_way_from_what_stays_to_its_own(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser, others, own = apart(pipe, sae, site, replace(CONFIG, calibration="apart"))
    assert eraser.gate.thresholds == (0.45, 0.45)
    for column in range(2):
        assert threshold_for_fpr(others[:, column], 0.1) == pytest.approx(0, abs=0.02)
        assert float(own[:, column].quantile(0.05)) == pytest.approx(1, abs=0.02)
    assert calibration_of(eraser)[0].rule == "fpr=0.1, 45% of the way"


def test_a_concept_that_something_kept_resembles_leaves_the_others_thresholds_alone(
    pipe: Any, sae: SAE, site: HookPoint
) -> None:
    # What is to be kept is the house in capitals, which the tokenizer does not tell from it.
    frames = [frame for frame in FRAMES if "calibrate" in {p.split for p in RETAIN if p.template == frame}]
    twin = PromptSet(tuple(Prompt(frame.format("HOUSE"), "home", frame, "calibrate") for frame in frames))
    config = replace(CONFIG, calibration="apart", fpr=0.02)
    plain, blurred = make(pipe, sae, site, config), make(pipe, sae, site, config, retain=RETAIN + twin)
    held_out = TARGET.of("calibrate") + TARGET.of("test")
    fired = {name: [check.fired for check in blurred.check(pipe, held_out.about(name).texts)] for name in ("house", "boat")}
    assert all(fired["boat"])
    assert not all(fired["house"])
    assert all(check.fired for check in plain.check(pipe, TARGET.of("test").texts))


def test_the_test_split_has_no_part_in_the_eraser_and_the_others_have(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site)
    without = {name: TARGET.filter(lambda p, name=name: p.split != name or p.template == FRAMES[0]) for name in ("test", "fit")}
    other_texts = PromptSet(tuple(replace(p, text="a lamp and a cup") if p.split == "test" else p for p in TARGET))
    assert same_eraser(make(pipe, sae, site, target=without["test"]), eraser)
    assert same_eraser(make(pipe, sae, site, target=other_texts), eraser)
    assert not same_eraser(make(pipe, sae, site, target=without["fit"]), eraser)


def test_erasing_is_the_same_every_time_and_batches_do_not_matter(pipe: Any, sae: SAE, site: HookPoint) -> None:
    assert same_eraser(make(pipe, sae, site), make(pipe, sae, site))


def test_prompts_without_splits_are_split_by_the_seed(pipe: Any, sae: SAE, site: HookPoint) -> None:
    loose = {"target": prompts_of("house", "boat"), "retain": prompts_of(*OTHERS)}
    first, again = make(pipe, sae, site, **loose), make(pipe, sae, site, **loose)
    other = make(pipe, sae, site, replace(CONFIG, seed=5), **loose)
    assert same_eraser(first, again)
    assert not same_eraser(first, other)
    assert first.names == ("house", "boat")


def test_prompts_without_a_concept_are_one_concept(pipe: Any, sae: SAE, site: HookPoint) -> None:
    nameless = PromptSet(tuple(replace(prompt, concept=None) for prompt in TARGET.about("house")))
    eraser = make(pipe, sae, site, target=nameless)
    assert eraser.names == ("target",)
    assert [check.fired for check in eraser.check(pipe, ["a house", "a cat"])] == [True, False]


def test_an_eraser_remembers_how_it_was_made(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site)
    (made,) = eraser.records
    assert made["config"]["n_features"] == 16
    assert made["concepts"] == ["house", "boat"]
    assert made["prompts_sha256"] == {"target": TARGET.sha256, "retain": RETAIN.sha256, "neutral": NEUTRAL.sha256}
    assert torch.equal(eraser.fingerprint, pipelines.fingerprint(pipe, site))  # type: ignore[arg-type]
    assert (eraser.edit.mode, eraser.edit.strength, eraser.hook_point) == ("subtract", -3.0, site)


def test_a_window_is_as_many_tokens_as_the_name_has_where_the_prompts_say_it(pipe: Any, site: HookPoint) -> None:
    named = PromptSet.from_names(["house", "red boat"], ["a {} there", "{}", "the {}"], "fit")
    other = PromptSet(tuple(Prompt(text, "red boat house") for text in ("a red house", "a red boat house", "the boat")))
    assert name_windows(pipe, site, named) == {"house": 1, "red boat": 2}
    assert name_windows(pipe, site, other) == {"red boat house": 1}


def test_an_erased_concept_survives_saving(pipe: Any, saved_sae: SAE, site: HookPoint, tmp_path: Any) -> None:
    made = make(pipe, saved_sae, site)
    made = replace(made, concepts=(replace(made.concepts[0], window=2), *made.concepts[1:]))
    made.save(tmp_path / "eraser")
    loaded = Eraser.load(tmp_path / "eraser")
    assert same_eraser(loaded, made)
    assert calibration_of(loaded) == calibration_of(made)
    prompts = [*TARGET.of("test").texts, *RETAIN.of("test").texts]
    assert [check.score for check in loaded.check(pipe, prompts)] == [check.score for check in made.check(pipe, prompts)]


def test_erasers_made_apart_join(pipe: Any, sae: SAE, site: HookPoint) -> None:
    parts = [make(pipe, sae, site, target=TARGET.about(noun)) for noun in ("house", "boat")]
    joined = parts[0] | parts[1]
    checks = joined.check(pipe, ["a small house on a table", "a small boat on a table", "a small cat on a table"])
    assert [check.concepts for check in checks] == [("house",), ("boat",), ()]
    assert len(calibration_of(joined)) == 2


def test_the_anchor_stands_in_under_replace(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site, replace(CONFIG, edit="replace", anchor="a photo of a cat"))
    states = pipe.text_encoder(
        pipe.tokenizer(["a photo of a cat"], padding="max_length", return_tensors="pt").input_ids, output_hidden_states=True
    )
    assert eraser.anchors is not None
    torch.testing.assert_close(eraser.anchors, states.hidden_states[2][0, 5:7])
    with eraser.attach(pipe):
        ids = pipe.tokenizer(["a photo of a house"], padding="max_length", return_tensors="pt").input_ids
        replaced = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(replaced[5], eraser.anchors[0])
    torch.testing.assert_close(replaced[6:], eraser.anchors[1].expand(len(replaced) - 6, -1))


def test_an_anchor_that_would_be_refused_itself_is_an_error(pipe: Any, sae: SAE, site: HookPoint) -> None:
    refusing = replace(CONFIG, edit="refuse", anchor="a photo of a cat")
    eraser = make(pipe, sae, site, refusing)
    assert eraser.edit.anchor == "a photo of a cat"
    with pytest.raises(ValueError, match=r"anchor 'a small house' is drawn .* refused itself, for house; give another anchor"):
        make(pipe, sae, site, replace(refusing, anchor="a small house"))
    assert make(pipe, sae, site, replace(CONFIG, anchor="a small house")).edit.mode == "subtract"


@pytest.mark.parametrize("anchor", ["a photo of a cat " * 12, "cat"])
def test_an_anchor_of_any_length_gives_two_activations(pipe: Any, sae: SAE, site: HookPoint, anchor: str) -> None:
    anchors = make(pipe, sae, site, replace(CONFIG, anchor=anchor)).anchors
    assert anchors is not None
    assert anchors.shape == (2, 32)


def test_an_anchor_without_words_is_an_error(pipe: Any, sae: SAE, site: HookPoint) -> None:
    with pytest.raises(ValueError, match="the anchor '' has no content tokens; give a prompt with words"):
        make(pipe, sae, site, replace(CONFIG, anchor=""))


# The paper


@pytest.mark.parametrize("k_sel", [3, 8])
def test_the_paper_preset_equals_the_papers_formulas(pipe: Any, sae: SAE, site: HookPoint, k_sel: int) -> None:
    target = TARGET.about("house")
    made = make(pipe, sae, site, replace(PRESETS["paper"], k_sel=k_sel), target=target, neutral=PromptSet())
    texts = [target.of("fit").texts, RETAIN.of("fit").texts, target.of("calibrate").texts]
    twin = PaperEraser.make(pipe, sae, site, texts, k_sel, -8.0)
    assert made.concepts[0].indices.tolist() == sorted(twin.features)
    assert twin.features
    assert made.gate.thresholds[0] == pytest.approx(twin.threshold, rel=1e-4)
    prompts = [*target.texts, *RETAIN.texts[:20]]
    fired = []
    for prompt, check in zip(prompts, made.check(pipe, prompts), strict=True):
        assert check.score == pytest.approx(twin.score(prompt), rel=1e-3)
        fired.append(check.fired)
        expected = twin.states(prompt)
        with made.attach(pipe):
            ids = pipe.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
            found = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert any(fired)
    assert not all(fired)


def test_the_paper_preset_takes_all_concepts_as_one_union(pipe: Any, sae: SAE, site: HookPoint) -> None:
    config = replace(PRESETS["paper"], k_sel=4)
    both = make(pipe, sae, site, config, neutral=PromptSet())
    parts = [make(pipe, sae, site, config, target=TARGET.about(noun), neutral=PromptSet()) for noun in ("house", "boat")]
    indices = set(parts[0].concepts[0].indices.tolist()) | set(parts[1].concepts[0].indices.tolist())
    assert len(both.concepts) == 1
    assert both.concepts[0].indices.tolist() == sorted(indices)
    assert calibration_of(both)[0].rule == "0.99*min"


def test_a_preset_is_taken_by_name(pipe: Any, sae: SAE, site: HookPoint) -> None:
    eraser = make(pipe, sae, site, "paper")
    assert (eraser.gate.score, eraser.edit.mode, eraser.edit.strength) == ("reconstruction", "scale", -8.0)
    assert make(pipe, sae, site, "default").gate.score == "evidence"
    with pytest.raises(ValueError, match=r"preset must be one of \['default', 'paper', 'strict', 'style'\], got 'typo'"):
        make(pipe, sae, site, "typo")


# What is weak is reported


def test_a_concept_without_features_of_its_own_is_reported(
    pipe: Any, sae: SAE, site: HookPoint, caplog: pytest.LogCaptureFixture
) -> None:
    twin = PromptSet(tuple(replace(p, text=p.text.upper(), concept="dwelling") for p in TARGET.about("house")))
    with caplog.at_level(logging.WARNING):
        eraser = make(pipe, sae, site, target=TARGET.about("boat") + twin, retain=RETAIN + TARGET.about("house"))
    assert set(eraser.records[0]["weak"]) == {"dwelling"}
    assert "dwelling" in caplog.text
    assert "its prompts may pass" in caplog.text
    assert "boat:" not in caplog.text


def test_a_strong_concept_is_not_reported(pipe: Any, sae: SAE, site: HookPoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        eraser = make(pipe, sae, site)
    assert eraser.records[0]["weak"] == {}
    assert caplog.text == ""


@pytest.mark.parametrize("calibration", ["apart", "shared"])
def test_a_false_positive_rate_that_so_few_prompts_cannot_guarantee_is_reported(
    pipe: Any, sae: SAE, site: HookPoint, caplog: pytest.LogCaptureFixture, calibration: Any
) -> None:
    n = len(split_sets(TARGET, RETAIN, NEUTRAL, CONFIG.seed)[1].of("calibrate"))
    for fpr, guaranteed in ((1 / (n + 1), ""), (0.002, f" ({1 / (n + 1):.2g} guaranteed)")):
        config = replace(CONFIG, calibration=calibration, fpr=fpr, pooled_gate=True, pooled_fpr=fpr)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            eraser = make(pipe, sae, site, config)
        rules = [calibration_of(eraser)[0].rule, eraser.records[0]["pooled"]["rule"]]
        assert all(f"fpr={fpr}{guaranteed}" in rule for rule in rules)
        assert caplog.text.count(f"{n} held-out prompts of what must stay guarantee") == (2 if guaranteed else 0)


# Bad input


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"target": PromptSet()}, "the target set is empty: name at least one concept"),
        ({"retain": PromptSet(), "neutral": PromptSet()}, "the retain set is empty: give prompts of what must stay"),
        ({"retain": RETAIN + prompts_of("boat")}, "the target is inside the retain set: 'boat' is in both; remove it from one"),
        ({"retain": RETAIN + PromptSet((Prompt("x", "HOUSE"),))}, "inside the retain set: 'HOUSE' is in both"),
        ({"neutral": PromptSet.from_texts(["a house"])}, "inside the retain set: 'a house' is in both"),
        ({"target": prompts_of("house")[:1]}, "the concept 'house' has no prompts to fit: give at least 3 prompts per concept"),
        ({"target": TARGET.of("fit")}, "the concept 'house' has no prompts to calibrate"),
        ({"retain": RETAIN.of("calibrate"), "neutral": PromptSet()}, "no retain prompts to fit: give at least 3 concepts"),
    ],
)
def test_sets_that_cannot_be_used_are_errors(
    pipe: Any, sae: SAE, site: HookPoint, sets: dict[str, PromptSet], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(pipe, sae, site, **sets)


def test_a_leak_between_splits_that_were_given_is_an_error(pipe: Any, sae: SAE, site: HookPoint) -> None:
    leaking = TARGET + PromptSet((replace(TARGET.of("fit")[0], split="calibrate"),))
    with pytest.raises(ValueError, match="held-out prompts leak by text, as 'a house'"):
        make(pipe, sae, site, target=leaking)


@pytest.mark.parametrize("text", ["", "  ", "<|startoftext|> <|endoftext|>"])
def test_a_target_prompt_that_says_nothing_is_an_error(pipe: Any, sae: SAE, site: HookPoint, text: str) -> None:
    empty = PromptSet((Prompt(text, "house", split="calibrate"),))
    with pytest.raises(ValueError, match=r"the target prompt '.*' of 'house' has no words; leave it out"):
        make(pipe, sae, site, target=TARGET + empty)


def test_an_autoencoder_of_another_width_is_an_error(pipe: Any, site: HookPoint) -> None:
    with pytest.raises(ValueError, match="activations have d_model 32, this autoencoder takes 16"):
        make(pipe, SAE.random(SAEConfig(16, 64, 4)), site)


def test_an_unknown_hook_point_is_an_error(pipe: Any, sae: SAE) -> None:
    with pytest.raises(ValueError, match=r"near matches: .*encoder\.layers\.1"):
        make(pipe, sae, HookPoint("text_encoder", "encoder.layer.1"))


def test_nan_activations_are_an_error(pipe: Any, sae: SAE, site: HookPoint) -> None:
    pipe.text_encoder.embeddings.position_embedding.weight[2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity: the text encoder overflowed"):
        make(pipe, sae, site)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "typo"}, r"selection must be one of \('fisher', 'token', 'evidence', 'difference'\), got 'typo'"),
        ({"calibration": "typo"}, r"calibration must be one of \('apart', 'shared'\), got 'typo'"),
        ({"n_features": 0}, "n_features must be at least 1, got 0"),
        ({"k_sel": -1}, "k_sel must be at least 1, got -1"),
        ({"full_rates": 0}, "full_rates must be at least 1, got 0"),
        ({"pooled_part_way": 0.0}, "pooled_part_way must be more than 0 and at most 1, got 0.0"),
        ({"n_edited": 0}, "n_edited must be at least 1, or None for all features; got 0"),
        ({"score": "typo"}, r"score must be one of \('evidence', 'contribution', 'reconstruction'\), got 'typo'"),
        ({"edit": "typo"}, r"edit must be one of \('scale', .*, got 'typo'"),
        ({"fpr": 0.0}, "fpr must lie between 0 and 1, got 0.0"),
        ({"fpr": None, "recall": 1.0}, "recall must lie between 0 and 1, got 1.0"),
        ({"pooled_fpr": float("nan")}, "pooled_fpr must lie between 0 and 1, got nan"),
        ({"draft_fpr": 2.0}, "draft_fpr must lie between 0 and 1, got 2.0"),
        ({"picture_fpr": -1.0}, "picture_fpr must lie between 0 and 1, got -1.0"),
        ({"recall": 0.95}, "or a recall, not both: got 0.002 and 0.95; for a recall set fpr=None"),
        ({"shrinkage": 0.0}, "shrinkage must be a number above 0, got 0.0"),
        ({"shrinkage": -1.0}, "shrinkage must be a number above 0, got -1.0"),
        ({"eps": 0.0}, "eps must be a number above 0, got 0.0"),
        ({"strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"picture_steps": 0}, "picture_steps must be at least 1, or None for the pipeline's own; got 0"),
    ],
)
def test_settings_out_of_range_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EraseConfig(**changes)
