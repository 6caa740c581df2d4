"""Rivals on a tiny pipeline, each against a case worked out by hand, and the laws that all of them obey."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import FRAMES, NOUNS, SITE, make_sae

from benchmarks.rivals import gates
from benchmarks.rivals.edits import EDITS, GateAndEdit, Gated, edited_states, naming_tokens
from benchmarks.rivals.esd import ErasedDiffusion, cross_attention
from benchmarks.rivals.gates import GATES, Cosine, Features, Gate, Probe, StringMatch, make_eraser, mean_activations
from benchmarks.rivals.safree import Filtered, Safree, filtered, trigger_tokens
from benchmarks.rivals.systems import (
    Itd,
    NegativePrompt,
    NoErasure,
    Projection,
    SafeLatentDiffusion,
    Tuned,
    in_one_prompt,
    project_out,
    span_projection,
)
from benchmarks.rivals.task import Maker, Task, copy_with
from benchmarks.rivals.uce import UnifiedConceptEditing, last_states, text_layers
from itd import Eraser, PromptSet, emoji, pipelines
from itd.activations import stream
from itd.attacks.diffusion import encode_texts
from itd.gate import SCORES
from itd.prompts import Split

OPTIONS = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16}
WHOLE: tuple[Maker, ...] = (
    NoErasure(), NegativePrompt(), SafeLatentDiffusion(warmup=0), Safree(alpha=0.0, gamma=50.0), Projection(),
    UnifiedConceptEditing(), ErasedDiffusion(n_steps=2, lr=1e-2, sampling_steps=2), Itd(),
    Tuned(UnifiedConceptEditing(ridge=1.0)),
)  # fmt: skip


def prompts(names: tuple[str, ...], split: Split) -> PromptSet:
    frames = FRAMES[:5] if split == "fit" else FRAMES[5:]
    return PromptSet.from_names(names, frames, split)


@pytest.fixture
def task(pipe: Any) -> Task:
    def both(*names: str) -> PromptSet:
        return prompts(names, "fit") + prompts(names, "calibrate")

    kept, neutral = both("cat", "dog", "horse"), both("lamp", "cup")
    return Task(pipe, make_sae(pipe), SITE, both("house", "boat"), kept, neutral, OPTIONS, fpr=0.2)


def weights(pipe: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for part in (pipe.unet, pipe.text_encoder, pipe.vae) for p in part.parameters()]


# Laws of all systems


@pytest.mark.parametrize("maker", WHOLE, ids=lambda maker: maker.name)
def test_a_rival_draws_and_leaves_the_pipeline_as_it_was(maker: Maker, task: Task) -> None:
    before, states = weights(task.pipe), encode_texts(task.pipe, ["a house"]).states
    rival = maker(task)
    asked = ["a photo of a house", "a photo of a cat", "a photo of a house"]
    images = rival.draw(asked, [1, 1, 2])
    assert images.shape == (3, 3, 16, 16)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert not torch.allclose(images[0], images[2], atol=1e-4), "another seed, another picture"
    again = rival.draw(asked[1:], [1, 2])
    assert torch.allclose(images[1:], again, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(task.pipe), strict=True))
    assert torch.equal(encode_texts(task.pipe, ["a house"]).states, states)
    fired = rival.fired(asked)
    assert fired is None or len(fired) == 3


@pytest.mark.parametrize("maker", WHOLE[1:], ids=lambda maker: maker.name)
def test_a_rival_changes_what_it_erases(maker: Maker, task: Task) -> None:
    asked = (["a photo of a house", "a photo of a boat"], [1, 2])
    assert not torch.allclose(maker(task).draw(*asked), NoErasure()(task).draw(*asked), atol=1e-4)


@pytest.mark.parametrize("maker", [Tuned(Safree(gamma=20.0)), Tuned(UnifiedConceptEditing(ridge=2.0))], ids=lambda m: m.name)
def test_a_tuned_rival_is_the_same_with_its_settings_under_another_name(maker: Tuned, task: Task) -> None:
    rival, plain = maker(task), maker.maker(task)
    assert rival.name == maker.name == f"{plain.name}, tuned"
    assert torch.equal(rival.draw(["a house"], [1]), plain.draw(["a house"], [1]))


def test_no_erasure_is_the_pipeline(task: Task) -> None:
    generator = torch.Generator().manual_seed(7)
    plain = task.pipe(["a house"], generator=[generator], output_type="pt", **OPTIONS).images
    assert torch.equal(NoErasure()(task).draw(["a house"], [7]), plain)


def test_pictures_are_drawn_once(task: Task) -> None:
    first = task.draw_bare(["a house", "a cat", "a house"], [1, 1, 1])
    assert first[0] is first[2]
    assert task.draw_bare(["a house"], [1])[0] is first[0]
    assert task.draw_bare(["a house"], [2])[0] is not first[0]
    assert len(task.memory) == 3


def test_what_rivals_share_is_made_once_and_charged_to_each(task: Task) -> None:
    made: list[int] = []

    def make() -> str:
        made.append(1)
        task.once("inner", lambda: sum(range(200_000)))
        return "value"

    _, first = task.timed(lambda: task.once("outer", make))
    value, second = task.timed(lambda: task.once("outer", make))
    assert (value, len(made)) == ("value", 1)
    assert first > 0
    assert second >= task.made["outer"][1] >= task.made["inner"][1] > 0
    _, third = task.timed(lambda: task.once("another", lambda: task.once("inner", int)))
    assert third >= task.made["inner"][1]


# Gates


@pytest.mark.parametrize("maker", GATES, ids=lambda maker: maker.name)
def test_a_gate_separates_what_it_was_fitted_on(maker: Any, task: Task) -> None:
    gate = maker(task)
    own, other = task.target.of("fit").texts, task.others.of("fit").texts
    scores = [gate.score(texts).amax(1) for texts in (own, other)]
    assert gate.score(own).shape == (len(own), 2)
    assert float(scores[0].mean()) > float(scores[1].mean())
    assert gate.fired(own) == (scores[0] >= gate.threshold).tolist()
    assert sum(gate.fired(own)) / len(own) > sum(gate.fired(other)) / len(other)


@pytest.mark.parametrize("maker", [Cosine(), Probe(), *(Features(name) for name in SCORES)], ids=lambda maker: maker.name)
def test_gates_are_calibrated_to_the_same_rate_on_the_same_prompts(maker: Any, task: Task) -> None:
    gate, negatives = maker(task), task.others.of("calibrate").texts
    assert sum(gate.fired(negatives)) <= task.fpr * (len(negatives) + 1)
    loose = maker(replace(task, fpr=0.6, made={}))
    assert loose.threshold < gate.threshold


def test_string_match_by_hand(task: Task) -> None:
    gate = StringMatch()(task)
    texts = ["a House!", "two houses", "the boathouse", "boat and house", "a hous", ""]
    assert gate.concepts(texts) == [(0,), (0,), (), (0, 1), (), ()]


def test_cosine_by_hand(task: Task) -> None:
    """One prompt per concept and one that stays: the score is the cosine of the differences to the latter."""
    one = PromptSet.from_names(["house"], ["a {}"], "fit") + prompts(("house",), "calibrate")
    stay = PromptSet.from_names(["cat"], ["a {}"], "fit") + prompts(("cat",), "calibrate")
    gate = Cosine()(replace(task, target=one, retain=stay, neutral=PromptSet()))
    house, cat, dog = encode_texts(task.pipe, ["a house", "a cat", "a dog"]).pooled
    assert float(gate.score(["a house"])) == pytest.approx(1, abs=1e-5)
    wanted = torch.nn.functional.cosine_similarity(dog - cat, house - cat, dim=0)
    assert float(gate.score(["a dog"])) == pytest.approx(float(wanted), abs=1e-5)


def test_the_probe_reads_the_mean_over_content_tokens(task: Task) -> None:
    batch = next(stream(task.pipe, SITE, PromptSet.from_texts(["a big red house", ""])))
    found = mean_activations(task, PromptSet.from_texts(["a big red house", ""]))
    assert torch.allclose(found[0], batch.x[0, 1:5].mean(0), atol=1e-6)
    assert found[1].abs().max() == 0


def test_the_probe_separates_by_hand() -> None:
    """The classes lie at 1 and -1 on the first axis, alike on the second.

    The penalised loss w^2 / 2 + C n log(1 + exp(-w)) is least where w (1 + exp(w)) = C n; n counts both classes as large.
    """
    own, others = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])
    for C, negatives, n in ((1.0, others, 4), (3.0, others, 4), (1.0, others.repeat(2, 1), 6)):
        w, b = Probe(C).fit(own, negatives)
        assert float(w[0]) * (1 + math.exp(float(w[0]))) == pytest.approx(C * n, rel=1e-2)
        assert [float(w[1]), b] == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize("name", SCORES)
def test_the_feature_gates_are_those_of_the_eraser(name: Any, task: Task) -> None:
    gate, eraser = Features(name)(task), make_eraser(task, name)
    texts = [frame.format(noun) for noun in NOUNS for frame in FRAMES[::3]]
    assert gate.fired(texts) == [check.fired for check in eraser.check(task.pipe, texts)]
    assert any(gate.fired(texts))
    assert not all(gate.fired(texts))


# Edits


def fixed_gate(*fires: str) -> Gate:
    """Fires for the first concept where one of the words stands."""
    return Gate("fixed", lambda texts: torch.tensor([[float(any(w in t for w in fires)), 0.0] for t in texts]), 0.5)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_under_its_own_gate_is_what_the_eraser_does(edit: str, task: Task) -> None:
    system = GateAndEdit(Features("evidence"), edit)(task)
    assert isinstance(system, Gated)
    asked = [frame.format(noun) for noun in ("house", "cat") for frame in FRAMES[:3]]
    seeds = list(range(len(asked)))
    fired = system.fired(asked)
    assert any(fired)
    with system.editor.attach(task.pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        wanted = task.pipe(asked, generator=generators, output_type="pt", **OPTIONS).images
    images = system.draw(asked, seeds)
    assert torch.allclose(images, wanted, atol=2e-3)
    bare = NoErasure()(task).draw(asked, seeds)
    for row, flag in enumerate(fired):
        assert torch.allclose(images[row], bare[row], atol=1e-5) != flag


def test_what_the_gate_passes_is_the_bare_picture_and_what_it_flags_is_edited(task: Task) -> None:
    system = Gated("x", task, fixed_gate("cat"), make_eraser(task))
    asked = ["a photo of a cat", "a photo of a house", "a photo of a dog"]
    images, bare = system.draw(asked, [3, 4, 5]), NoErasure()(task).draw(asked, [3, 4, 5])
    assert torch.equal(images[1:], bare[1:]), "the gate decides, not the editor"
    assert system.fired(asked) == [True, False, False]


@pytest.mark.parametrize("maker", GATES, ids=lambda maker: maker.name)
@pytest.mark.parametrize("flag", [False, True])
def test_prompts_may_be_all_flagged_or_none(maker: Any, flag: bool, task: Task) -> None:
    fitted = maker(task)
    system = Gated("x", task, Gate(fitted.name, fitted.score, float("-inf" if flag else "inf")), make_eraser(task))
    asked = ["a photo of a house", "a photo of a dog"]
    assert system.fired(asked) == [flag, flag]
    bare = NoErasure()(task).draw(asked, [3, 4])
    assert [torch.equal(*pair) for pair in zip(system.draw(asked, [3, 4]), bare, strict=True)] == [not flag, not flag]


def test_the_concepts_that_are_edited_are_those_that_the_gate_names(task: Task) -> None:
    editor, text = make_eraser(task).with_edit("subtract", -8.0), "a photo of a boat"
    both, first, second = (edited_states(task.pipe, editor, [text], [found]) for found in ((0, 1), (0,), (1,)))
    plain = encode_texts(task.pipe, [text]).states
    assert editor.names == ("house", "boat")
    assert float((second - plain).norm()) > float((first - plain).norm())
    assert float((both - plain).norm()) > 0
    assert torch.equal(both[:, 0], plain[:, 0]), "the begin token stays"


def test_some_token_always_names_the_concept(task: Task, eraser: Eraser) -> None:
    batch = next(stream(task.pipe, SITE, PromptSet.from_texts(["a photo of a house", "my lamp at night"])))
    named = [naming_tokens(eraser, x[mask], [0]) for x, mask in zip(batch.x, batch.content, strict=True)]
    assert named[0].tolist() == [False, False, False, False, True]
    assert named[1].sum() >= 1


def test_an_unknown_edit_is_named() -> None:
    with pytest.raises(ValueError, match="paper, remove, subtract, replace, got 'erase'"):
        GateAndEdit(StringMatch(), "erase")


# Whole systems


def test_itd_is_the_eraser_attached(task: Task) -> None:
    asked = (["a photo of a house", "a photo of a dog"], [3, 4])
    ours, bare = Itd()(task), NoErasure()(task)
    assert ours.fired(asked[0]) == [True, False]
    images, plain = ours.draw(*asked), bare.draw(*asked)
    assert not torch.allclose(images[0], plain[0], atol=1e-3)
    assert torch.allclose(images[1], plain[1], atol=1e-5)
    eraser = task.made["shipped default"][0]
    assert (eraser.edit.mode, eraser.records[0]["config"]["fpr"]) == ("subtract", 0.002), "not the rate of the comparison"


def test_a_preset_is_completed_with_what_the_embedded_world_sets(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "erase", lambda *args: args[-1])
    strict: Any = gates.shipped_eraser(task, "strict")
    assert (strict.edit, strict.anchor) == ("refuse", emoji.ANCHOR)


def test_the_publication_has_its_own_features_threshold_and_edit(task: Task) -> None:
    rival = Itd("paper")(task)
    assert rival.name == "publication"
    eraser = task.made["shipped paper"][0]
    assert eraser.records[0]["config"]["selection"] == "difference"
    scores = torch.tensor(eraser.records[0]["positives"])
    assert eraser.gate.thresholds == (pytest.approx(0.99 * float(scores.min())),), "one for all that the features stand for"
    assert (eraser.gate.score, eraser.edit.mode, eraser.edit.strength) == ("reconstruction", "scale", -8)
    assert make_eraser(task, "reconstruction").gate.thresholds != eraser.gate.thresholds


def test_the_negative_prompt_is_that_of_the_pipeline(task: Task) -> None:
    generator = torch.Generator().manual_seed(5)
    options = {**OPTIONS, "negative_prompt": "house, boat"}
    wanted = task.pipe("a cat", generator=generator, output_type="pt", **options).images
    assert torch.allclose(NegativePrompt()(task).draw(["a cat"], [5]), wanted, atol=1e-5)


LONG = (*NOUNS, "park", "night", "table", "window", "photo")
"""More names than the text encoder reads with commas between them."""


@pytest.mark.parametrize("maker", [NegativePrompt(), SafeLatentDiffusion()], ids=lambda maker: maker.name)
@pytest.mark.parametrize("names", [NOUNS, LONG], ids=["commas", "spaces"])
def test_the_text_encoder_reads_every_name(maker: Maker, names: tuple[str, ...], task: Task) -> None:
    rows: list[list[int]] = []
    encoder = task.pipe.text_encoder
    handle = encoder.register_forward_pre_hook(lambda _module, args: rows.extend(args[0].tolist()))
    maker(replace(task, target=prompts(names, "fit"))).draw(["a"], [0])
    handle.remove()
    (read,) = [row for row in rows if len(set(row)) > 4]
    assert all(pipelines.contains(read, part) for part in pipelines.token_rows(task.pipe, "text_encoder", names, whole=True))


def test_names_that_do_not_fit_are_refused(task: Task) -> None:
    assert in_one_prompt(task.pipe, ["house", "boat"]) == "house, boat"
    assert in_one_prompt(task.pipe, LONG) == " ".join(LONG)
    with pytest.raises(ValueError, match="26 names are 26 tokens, the text encoder reads 22"):
        in_one_prompt(task.pipe, [*LONG, *LONG])


def test_safe_latent_diffusion_without_safety_guidance_is_the_pipeline(task: Task) -> None:
    """A threshold that every prediction passes steers nowhere; a real one does."""
    asked = (["a house"], [5])
    off, on = SafeLatentDiffusion(threshold=-1e9, warmup=0, momentum=0.0)(task), SafeLatentDiffusion(warmup=0)(task)
    bare = NoErasure()(task).draw(*asked)
    assert torch.allclose(off.draw(*asked), bare, atol=1e-3)
    assert not torch.allclose(on.draw(*asked), bare, atol=1e-3)


def test_safe_latent_diffusion_guides_by_hand(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel each: prompt above the threshold, slightly below it, far below it, and prompt and safety concept alike.

    mu (unsafe - plain) is 0, 0.5 x 1.25, 1 x 2 and 0. The second step, after the warm-up, adds 0.5 x 0.25 of that as momentum.
    """
    plain, asked, unsafe = [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.25, 2.0, 1.0]
    said = torch.tensor([plain, asked, unsafe])[:, :, None, None].expand(-1, -1, 8, 8)
    monkeypatch.setattr(task.pipe.unet, "forward", lambda *_args, **_kwargs: SimpleNamespace(sample=said))
    guided, step = [], task.pipe.scheduler.step

    def spy(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guided.append(output[0, :, 0, 0].tolist())
        return step(output, *args, **kwargs)

    monkeypatch.setattr(task.pipe.scheduler, "step", spy)
    settings = SafeLatentDiffusion(guidance=2.0, warmup=1, threshold=0.025, momentum=0.5, beta=0.75)
    settings(replace(task, options={**OPTIONS, "num_inference_steps": 2})).draw(["a cat"], [0])
    assert guided[0] == pytest.approx([2.0, 2.0, 2.0, 1.0]), "the pipeline's guidance of 2"
    assert guided[1] == pytest.approx([2.0, 2 * (1 - 1.125 * 0.625), 2 * (1 - 1.125 * 2.0), 1.0])


def test_the_projection_on_a_span_by_hand() -> None:
    rows = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    assert torch.allclose(span_projection(rows), torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]), atol=1e-6)
    two = span_projection(torch.tensor([[1.0, 0.0, 0.0], [1.0, 3.0, 0.0]]))
    assert torch.allclose(two, torch.diag(torch.tensor([1.0, 1.0, 0.0])), atol=1e-6)
    assert torch.allclose(two @ two, two, atol=1e-6)


def test_the_text_projection_by_hand() -> None:
    """Of (1, 2, 5) lies 11 / 25 of (3, 4, 0) in its span; the begin token keeps it."""
    x = torch.tensor([[[1.0, 2.0, 5.0]] * 2])
    found = project_out(x, span_projection(torch.tensor([[3.0, 4.0, 0.0]])))
    assert torch.allclose(found, torch.tensor([[[1.0, 2.0, 5.0], [1 - 33 / 25, 2 - 44 / 25, 5.0]]]), atol=1e-6)


def test_the_text_projection_removes_what_tells_a_name_from_those_that_stay(task: Task) -> None:
    house, *kept = encode_texts(task.pipe, ["house", *task.kept]).pooled
    direction = house - torch.stack(kept).mean(0)
    seen: list[torch.Tensor] = []
    handle = task.pipe.unet.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["encoder_hidden_states"][-1, 1:]), with_kwargs=True
    )
    for maker in (NoErasure(), Projection()):
        maker(task).draw(["a house"], [0])
    handle.remove()
    before, after = seen[0], seen[-1]
    assert (before @ direction).abs().max() > 0.1
    assert (after @ direction).abs().max() < 1e-3


def test_safree_detects_the_token_that_holds_the_concept_by_hand() -> None:
    """The concept is the first axis. Without the third token nothing of it is left, and all the rest is."""
    concepts = torch.diag(torch.tensor([1.0, 0.0]))
    without = torch.tensor([[5.0, 1.0], [5.0, 1.0], [0.0, 2.0]])
    assert trigger_tokens(without, concepts, 0.01).tolist() == [False, False, True]
    assert trigger_tokens(without, concepts, 1.5).tolist() == [False, False, False]
    assert trigger_tokens(without[:1], concepts, 0.01).tolist() == [False]


def test_safree_projects_by_hand() -> None:
    """Prompts span (1, 1, 0), the concept is the first axis. In the other order nothing of (2, 0, 5) would be left."""
    x, prompt = torch.tensor([[2.0, 0.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0], [3.0, 3.0, 0.0]])
    assert torch.allclose(
        filtered(x, prompt, torch.diag(torch.tensor([1.0, 0.0, 0.0]))), torch.tensor([[0.0, 1.0, 0.0]]), atol=1e-6
    )


def test_safree_filters_for_as_many_steps_as_the_paper_says() -> None:
    settings = Safree()
    assert settings.n_steps(1.0, 50) == 5, "nothing changed: sigmoid(0) = 1/2 of gamma = 10"
    assert settings.n_steps(-1.0, 50) == round(10 / (1 + math.exp(-2)))
    assert settings.n_steps(-1.0, 25) == round(5 / (1 + math.exp(-2)))


def test_safree_changes_only_trigger_tokens_and_frees_them_of_the_concept(task: Task) -> None:
    system = Safree(alpha=0.0)(task)
    assert isinstance(system, Filtered)
    text = "a photo of a house"
    original, projected, n_steps = system.states(text)
    flags, _, positions = system.triggers(text)
    changed = (projected != original).any(-1)[0].nonzero().flatten()
    assert changed.tolist() == positions[flags].tolist() != []
    assert (projected[0, changed] @ system.concepts).abs().max() < 1e-3
    assert (original[0, changed] @ system.concepts).abs().max() > 1e-2
    assert n_steps >= 0
    empty = system.states("")
    assert torch.equal(empty[0], empty[1])
    assert empty[2] == 0


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
def test_safree_gives_the_original_states_back_after_its_steps(
    n_steps: int, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Safree()(task)
    assert isinstance(system, Filtered)
    original, other = encode_texts(task.pipe, ["a house", "a cat"]).states.split(1)
    monkeypatch.setattr(Filtered, "states", lambda *_: (original, other, n_steps))
    seen: list[bool] = []
    handle = task.pipe.unet.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(torch.equal(kwargs["encoder_hidden_states"][-1:], other)), with_kwargs=True
    )
    system.draw(["a house"], [0])
    handle.remove()
    assert seen == [step < n_steps for step in range(3)]


def test_uce_by_hand() -> None:
    """One dimension per concept: the erased axis takes the anchor's value, the kept axis its own, the free one stays."""
    W = torch.tensor([[1.0, 2.0, 3.0]])
    e, p = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    exact = UnifiedConceptEditing(ridge=1e-9).edit(W, e, p, p)
    assert torch.allclose(exact, torch.tensor([[2.0, 2.0, 3.0]]), atol=1e-5)
    soft = UnifiedConceptEditing(ridge=1.0).edit(W, e, p, p)
    assert torch.allclose(soft, torch.tensor([[1.5, 2.0, 3.0]]), atol=1e-5), "half way with as much ridge as evidence"
    weighted = UnifiedConceptEditing(ridge=1.0, erase_scale=3.0).edit(W, e, p, p)
    assert float(weighted[0, 0]) == pytest.approx((3 * 2 + 1) / 4)


def test_uce_edits_keys_and_values_of_the_text_only(task: Task) -> None:
    rival = UnifiedConceptEditing(anchor="tree", ridge=1e-4)(task)
    before, after = dict(task.pipe.unet.named_parameters()), dict(rival.pipe.unet.named_parameters())  # type: ignore[attr-defined]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.removesuffix(".weight").rsplit(".attn2.")[1] for name in changed} == {"to_k", "to_v"}
    house, tree, cat = last_states(task.pipe, ["house", "tree", "cat"])
    for old, new in zip(text_layers(task.pipe.unet), text_layers(rival.pipe.unet), strict=True):  # type: ignore[attr-defined]
        assert (new(house) - old(tree)).norm() < 0.3 * (old(house) - old(tree)).norm()
        assert (new(cat) - old(cat)).norm() < 0.3 * (new(house) - old(house)).norm()


def test_the_last_state_is_that_of_the_last_token(task: Task) -> None:
    states = encode_texts(task.pipe, ["red house"]).states[0]
    assert torch.equal(last_states(task.pipe, ["red house"])[0], states[2])


def test_esd_wants_the_opposite_of_the_concept_by_hand() -> None:
    plain, asked = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0])
    assert ErasedDiffusion(eta=1.0).wanted(plain, asked).tolist() == [-2.0, 2.0]
    assert ErasedDiffusion(eta=0.5).wanted(plain, asked).tolist() == [-0.5, 2.0]


def test_esd_learns_it_in_the_cross_attention_only(task: Task) -> None:
    import copy

    unet = copy.deepcopy(task.pipe.unet)
    losses = ErasedDiffusion(n_steps=40, lr=3e-3, sampling_steps=2).train(unet, task.pipe, ["house"])
    assert sum(losses[-10:]) < sum(losses[:10])
    before, after = dict(task.pipe.unet.named_parameters()), dict(unet.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".attn2." in name for name in changed)
    assert len(changed) <= len(cross_attention(unet))
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_esd_meets_the_concept_half_denoised(task: Task) -> None:
    concept, empty = encode_texts(task.pipe, ["house", ""]).states.split(1)
    trainer = ErasedDiffusion(sampling_steps=4, batch_size=2)
    drawn = [
        trainer.half_denoised(task.pipe.unet, task.pipe, concept, empty, torch.Generator().manual_seed(s)) for s in range(6)
    ]
    assert {x.shape for x, _ in drawn} == {(2, 4, 8, 8)}
    assert len({int(t) for _, t in drawn}) > 1


def test_a_copy_shares_what_is_not_replaced(task: Task) -> None:
    other = copy_with(task.pipe, unet=task.pipe.unet)
    assert other is not task.pipe
    assert other.text_encoder is task.pipe.text_encoder
