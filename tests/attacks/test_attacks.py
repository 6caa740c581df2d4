"""One table of attacks, laws that all of them obey, and each search against what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import NOUNS

from itd import Eraser
from itd.attacks import (
    ATTACKS,
    P4D,
    Attack,
    Budget,
    Characters,
    ClipNames,
    ConceptInversion,
    Direct,
    Goal,
    Judged,
    RandomWords,
    RingABell,
    Synonyms,
    System,
    TokenSearch,
    UnlearnDiff,
    find_attack,
)  # fmt: skip
from itd.attacks.base import Drawn, NotApplicable, try_prompts
from itd.attacks.characters import EDITS
from itd.attacks.diffusion import borrowed_row, encode, encode_texts, prompt_ids
from itd.attacks.inversion import placeholder
from itd.attacks.objectives import Denoise, Loss, Match, draw_noise
from itd.attacks.p4d import Cloze
from itd.attacks.ring_a_bell import concept_direction, distances
from itd.attacks.unlearn_diff import project_to_simplex, read_off
from itd.pipelines import tokenize
from itd.vocabulary import names_of, nearest, read_vocabulary, vocabulary_of

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
GOAL = Goal("house", "a photo of a {}", seed=3, synonyms=("lamp", "tree", "house boat"))
SMALL = Budget(images=3, steps=2)
FAST: dict[str, dict[str, Any]] = {
    "ring-a-bell": {"population": 8, "n_tokens": 3},
    "mma": {"n_candidates": 6, "n_tokens": 3},
    "p4d": {"n_tokens": 3, "batch_size": 1, "n_ranked": 3},
    "p4d-aware": {"n_tokens": 3, "batch_size": 1, "n_ranked": 3},
    "p4d-k": {"batch_size": 1, "n_ranked": 3},
    "p4d-k-aware": {"batch_size": 1, "n_ranked": 3},
    "unlearndiff": {"n_tokens": 2, "batch_size": 1, "n_ranked": 3},
    "unlearndiff-aware": {"n_tokens": 2, "batch_size": 1, "n_ranked": 3},
    "inversion": {"batch_size": 1},
    "inversion-aware": {"batch_size": 1},
}


class Every:
    """Counts every picture, or none, as a success."""

    def __init__(self, answer: bool) -> None:
        self.answer, self.name, self.n_seen = answer, "every picture" if answer else "no picture", 0

    def __call__(self, images: torch.Tensor) -> list[bool]:
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        self.n_seen += len(images)
        return [self.answer] * len(images)


class Filter:
    """A system that draws a white picture for prompts with one of its words, a black one for others."""

    def __init__(self, pipe: Any, *words: str) -> None:
        self.pipe, self.words = pipe, words
        self.asked: list[tuple[str, int]] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        self.asked += zip(prompts, seeds, strict=True)
        values = [float(any(word in prompt.split() for word in self.words)) for prompt in prompts]
        images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)
        return Drawn(images, (None,) * len(prompts), (None,) * len(prompts))


class White:
    name = "white"

    def __call__(self, images: torch.Tensor) -> list[bool]:
        return (images.mean((1, 2, 3)) > 0.5).tolist()


def small(name: str) -> Attack:
    return replace(find_attack(name), **FAST.get(name, {}))  # type: ignore[type-var]


# Laws of all attacks


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_keeps_to_its_budget_and_says_what_it_did(name: str, pipe: Any, eraser: Eraser) -> None:
    attempt = small(name)(System(pipe, eraser, OPTIONS), GOAL, Every(False), SMALL)
    assert attempt.goal is GOAL
    assert 0 < attempt.n_images <= SMALL.images
    assert attempt.n_steps in (0, SMALL.steps)
    assert len(attempt.losses) == attempt.n_steps
    assert not attempt.success
    for trial in attempt.trials:
        assert trial.fired == (trial.score >= eraser.gate.thresholds[0])  # type: ignore[operator]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_criterion_decides_on_success_and_nothing_else(name: str, pipe: Any, eraser: Eraser) -> None:
    attempt = small(name)(System(pipe, eraser, OPTIONS), GOAL, Every(True), SMALL)
    assert attempt.success
    assert attempt.final is attempt.trials[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_the_pipeline_as_it_was(name: str, pipe: Any, eraser: Eraser) -> None:
    before = [parameter.clone() for part in (pipe.text_encoder, pipe.unet) for parameter in part.parameters()]
    states = encode_texts(pipe, ["a house at night"]).states
    small(name)(System(pipe, eraser, OPTIONS), GOAL, Every(False), SMALL)
    after = [parameter for part in (pipe.text_encoder, pipe.unet) for parameter in part.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    assert torch.equal(encode_texts(pipe, ["a house at night"]).states, states)
    with eraser.attach(pipe) as attached:
        pipe("a house", **OPTIONS)
        assert attached.decisions[0].fired  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["random", "characters", "ring-a-bell", "mma", "p4d", "unlearndiff", "inversion-aware"])
def test_the_same_seed_gives_the_same_attempt_and_another_seed_another(name: str, pipe: Any, eraser: Eraser) -> None:
    system = System(pipe, eraser, OPTIONS)
    once, again, other = (small(name)(system, replace(GOAL, seed=seed), Every(False), SMALL) for seed in (3, 3, 4))
    assert once == replace(again, goal=once.goal)
    assert (once.trials, once.losses) != (other.trials, other.losses)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_immutable_and_their_names_are_their_own(name: str) -> None:
    attack = find_attack(name)
    assert attack.name == name.removesuffix("-aware").removesuffix("-k")
    assert attack.access == ("white" if attack.name in ("p4d", "unlearndiff", "inversion") else "black")
    for field in fields(attack):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(attack, field.name, 0)
    assert getattr(attack, "gate_weight", 0.0) == (1.0 if name.endswith("-aware") else 0.0)


def test_an_unknown_attack_is_named() -> None:
    with pytest.raises(ValueError, match=r"p4d-aware, .* got 'p5d'"):
        find_attack("p5d")


@pytest.mark.parametrize("name", ["random", "synonyms", "characters", "ring-a-bell", "mma"])
def test_black_box_attacks_run_against_any_system_that_draws(name: str, pipe: Any) -> None:
    attempt = small(name)(Filter(pipe, "never"), GOAL, White(), SMALL)
    assert not attempt.success
    assert all(trial.fired is None for trial in attempt.trials)


@pytest.mark.parametrize("name", ["random", "synonyms", "ring-a-bell", "mma", "p4d", "inversion"])
def test_no_search_says_the_concept_by_its_name(name: str, pipe: Any, eraser: Eraser) -> None:
    attempt = small(name)(System(pipe, eraser, OPTIONS), GOAL, Every(False), SMALL)
    assert all("house" not in trial.prompt.split() for trial in attempt.trials)


# Goal, budget, trials


def test_goals_and_budgets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        Budget(images=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got -2"):
        Budget(steps=-2)
    with pytest.raises(ValueError, match=r"no \{\} for"):
        Goal("house", "a photo")
    with pytest.raises(ValueError, match="empty"):
        Goal(" ")
    with pytest.raises(ValueError, match="gate_weight must not be negative, got -1"):
        P4D(gate_weight=-1)
    with pytest.raises(ValueError, match=r"every must be at least 1, .* got 0"):
        P4D(every=0)


def test_prompts_are_tried_in_turn_with_the_next_seed_until_one_succeeds(pipe: Any) -> None:
    system = Filter(pipe, "never")
    trials = try_prompts(system, replace(GOAL, seed=10), White(), ["a", "b"], 5)
    assert [(trial.prompt, trial.seed) for trial in trials] == [("a", 10), ("b", 10), ("a", 11), ("b", 11), ("a", 12)]
    assert try_prompts(Filter(pipe, "a"), GOAL, White(), ["a", "b"], 100)[0].success
    assert len(try_prompts(Filter(pipe, "a"), GOAL, White(), ["a", "b"], 100)) == 8, "drawing stops after the batch"
    with pytest.raises(ValueError, match="no prompt"):
        try_prompts(system, GOAL, White(), [], 5)


def test_a_picture_depends_on_prompt_and_seed_and_the_gate_is_reported(pipe: Any, eraser: Eraser) -> None:
    system = System(pipe, eraser, OPTIONS)
    drawn = system.draw(["a photo of a house", "a photo of a cat"] * 5, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    assert drawn.images.shape == (10, 3, 16, 16)
    assert drawn.fired == (True, False) * 5
    assert not torch.allclose(drawn.images[0], drawn.images[4], atol=1e-4)
    bare = system.without_eraser().draw(["a photo of a house", "a photo of a cat"], [1, 1])
    assert bare.fired == (None, None)
    assert torch.allclose(drawn.images[1], bare.images[1], atol=1e-5)
    assert not torch.allclose(drawn.images[0], bare.images[0], atol=1e-5)


# Black box


def test_the_direct_prompt_meets_no_resistance_from_an_unprotected_system(pipe: Any) -> None:
    assert Direct()(Filter(pipe, "house"), GOAL, White(), SMALL).success


def test_words_at_random_are_other_ones_for_every_picture_and_as_many_as_asked_for(pipe: Any) -> None:
    words = set(vocabulary_of(pipe).words)
    trials = RandomWords(n_tokens=2)(Filter(pipe, "never"), GOAL, White(), replace(SMALL, images=20)).trials
    prompts = [trial.prompt.split() for trial in trials]
    assert len(prompts) == 20
    assert all(len(prompt) == 2 and set(prompt) <= words - {"house"} for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) > 10
    assert RandomWords(n_tokens=2)(Filter(pipe, prompts[15][0]), GOAL, White(), replace(SMALL, images=20)).success
    assert not Direct()(Filter(pipe, "cat"), GOAL, White(), SMALL).success


def test_synonyms_leave_the_name_out_and_come_closest_first(pipe: Any) -> None:
    system = Filter(pipe, "never")
    Synonyms(sentences=("one {}",))(system, GOAL, White(), Budget(images=8))
    asked = [prompt for prompt, _ in system.asked]
    assert set(asked) == {
        t.format(w) for t in ("a photo of a {}", "one {}") for w in ("lamp", "tree", "lamp tree", "tree lamp")
    }
    states = encode_texts(pipe, [GOAL.prompt, *asked]).pooled
    closeness = F.cosine_similarity(states[1:], states[:1]).tolist()
    assert closeness == sorted(closeness, reverse=True)
    with pytest.raises(ValueError, match="no synonyms"):
        Synonyms()(system, replace(GOAL, synonyms=("house boat",)), White(), SMALL)


def test_a_system_that_filters_words_falls_to_synonyms_but_not_to_the_name(pipe: Any) -> None:
    assert Synonyms()(Filter(pipe, "lamp"), GOAL, White(), Budget(images=8)).success
    assert not Direct()(Filter(pipe, "lamp"), GOAL, White(), Budget(images=8)).success


@pytest.mark.parametrize("edit", EDITS)
def test_spellings_differ_from_the_word_and_from_each_other(edit: str) -> None:
    words = Characters((edit,), most_edits=1).spellings("elephant", 6, 0)
    assert len(set(words)) == len(words) > 2
    assert "elephant" not in words
    assert all(abs(len(word) - 8) <= 1 for word in words)


def test_each_kind_of_misspelling_by_hand() -> None:
    import random

    rng = random.Random(0)
    by_hand = {"swap": "acot", "drop": "cot", "double": "coaat", "split": "co", "look_alike": "coаt", "digit": "co4t"}  # noqa: RUF001
    assert EDITS["swap"]("caot", 0, rng) == by_hand["swap"]
    assert EDITS["drop"]("coat", 2, rng) == by_hand["drop"]
    assert EDITS["double"]("coat", 2, rng) == by_hand["double"]
    assert EDITS["split"]("coat", 2, rng)[:2] == by_hand["split"]
    assert EDITS["look_alike"]("coat", 2, rng) == by_hand["look_alike"]
    assert EDITS["digit"]("coat", 2, rng) == by_hand["digit"]
    assert len(EDITS["insert"]("coat", 2, rng)) == 5
    assert EDITS["substitute"]("coat", 2, rng)[:2] == "co"


def test_a_short_name_gives_fewer_spellings_and_does_not_hang() -> None:
    assert set(Characters(("drop",), most_edits=1).spellings("ab", 10, 0)) == {"a", "b"}
    with pytest.raises(ValueError, match="shout"):
        Characters(("shout",))
    with pytest.raises(ValueError, match="most_edits must be at least 1, got 0"):
        Characters(most_edits=0)


def test_the_direction_of_a_concept_is_a_difference_of_means(pipe: Any) -> None:
    direction = concept_direction(pipe, "house", "tree")
    assert torch.allclose(direction, -concept_direction(pipe, "tree", "house"), atol=1e-6)
    assert concept_direction(pipe, "house", "house").abs().max() == 0
    assert direction[0].abs().max() == 0, "the begin token sees nothing of the prompt"


def test_ring_a_bell_comes_closer_with_every_generation(pipe: Any) -> None:
    words = vocabulary_of(pipe)
    wanted = encode_texts(pipe, ["red boat"]).states[0]
    rows, losses = RingABell(n_tokens=2, population=24).search(pipe, words, wanted, 15, seed=0)
    assert losses[-1] < losses[0]
    assert all(later <= earlier for earlier, later in pairwise(losses)), "the best half survives"
    found = distances(pipe, words.ids[rows], wanted)
    assert float(found[0]) == pytest.approx(losses[-1], rel=1e-4)
    assert found.tolist() == sorted(found.tolist()), "best first"


def test_ring_a_bell_finds_the_word_that_it_is_shown(pipe: Any) -> None:
    words = vocabulary_of(pipe)
    wanted = encode_texts(pipe, ["boat"]).states[0]
    rows, losses = RingABell(n_tokens=1, population=24).search(pipe, words, wanted, 40, seed=0)
    assert words.text(rows[0]) == "boat"
    assert losses[-1] < 1e-10


def test_the_token_search_comes_closer_than_its_start(pipe: Any) -> None:
    words = vocabulary_of(pipe).without(names_of("house"))
    wanted = encode_texts(pipe, ["a photo of a house"]).pooled
    seen, losses = TokenSearch(n_tokens=4, n_candidates=24, top=8).search(pipe, words, wanted, 12, seed=0)
    assert losses[-1] < losses[0]
    best = min(seen, key=lambda text: seen[text])
    closeness = F.cosine_similarity(encode_texts(pipe, [best]).pooled, wanted)
    assert seen[best] == pytest.approx(1 - float(closeness), abs=1e-5)
    assert "house" not in best.split()


# White box


def test_p4d_finds_the_honest_words_where_they_are_allowed(pipe: Any) -> None:
    """Started close to them, the search stays with words that say what the honest prompt says; its loss is then zero."""
    system, generator = System(pipe, options=OPTIONS), torch.Generator().manual_seed(0)
    words = vocabulary_of(pipe)
    honest = encode_texts(pipe, ["red boat"]).states
    loss = Loss(system, Match(pipe, honest))
    noise = draw_noise(pipe, torch.randn(2, 4, 8, 8, generator=generator), 4, generator)
    cloze = Cloze((None, None))
    visited, losses = P4D(n_ranked=30).search(loss, words, cloze, lambda: noise, Budget(steps=40), generator)
    assert losses == tuple(losses)
    assert min(losses) < losses[0]
    texts = [words.text(rows) for rows in visited]
    assert len(set(texts)) == len(texts)
    best = loss(tokenize(pipe, "text_encoder", [texts[0]]).input_ids, None, noise)
    assert float(best) == pytest.approx(min(losses), rel=1e-3), "what is ranked first is what had the smallest loss"


def test_p4d_k_puts_words_into_the_honest_prompt_and_leaves_its_own(pipe: Any, eraser: Eraser) -> None:
    attempt = small("p4d-k")(System(pipe, eraser, OPTIONS), GOAL, Every(False), SMALL)
    honest = GOAL.prompt.split()
    for trial in attempt.trials:
        said = trial.prompt.split()
        assert said[::2] == honest
        assert len(said) == 2 * len(honest)
        assert "house" not in said[1::2]


@pytest.mark.parametrize(("every", "parts"), [(1, "a ? green ? house ?"), (2, "a green ? house"), (9, "a green house ?")])
def test_blanks_are_put_behind_every_so_many_words(every: int, parts: str) -> None:
    assert Cloze.into("a green house", every).parts == tuple(None if part == "?" else part for part in parts.split())


def test_the_blanks_of_a_cloze_are_where_the_encoder_has_their_words(pipe: Any) -> None:
    words = vocabulary_of(pipe)
    rows = torch.tensor([0, len(words) - 1])
    cloze = Cloze(("a", "lighthousekeeper", None, "boat", None))
    assert len(prompt_ids(pipe, "lighthousekeeper")) > 1, "a word of several tokens, or the test shows little"
    text = cloze.text(words, rows)
    assert text == f"a lighthousekeeper {words.words[0]} boat {words.words[-1]}"
    assert tokenize(pipe, "text_encoder", [text]).input_ids[0, cloze.positions(pipe)].tolist() == words.ids[rows].tolist()
    with pytest.raises(NotApplicable, match="do not fit"):
        Cloze(("boat",) * 100 + (None,)).positions(pipe)


def test_the_gradient_of_unlearndiff_goes_downhill_on_fixed_noise(pipe: Any) -> None:
    system, generator = System(pipe, options=OPTIONS), torch.Generator().manual_seed(0)
    words = vocabulary_of(pipe)
    loss = Loss(system, Match(pipe, encode_texts(pipe, ["a house"]).states))
    noise = draw_noise(pipe, torch.randn(2, 4, 8, 8, generator=generator), 4, generator)
    u, losses = UnlearnDiff(n_tokens=2, lr=0.05).search(loss, words, prompt_ids(pipe, "tree"), lambda: noise, 15, generator)
    assert losses[-1] < losses[0]
    assert torch.allclose(u.sum(1), torch.ones(2), atol=1e-5)
    assert float(u.min()) >= 0


def test_the_projection_to_the_simplex_by_hand() -> None:
    rows = torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [0.6, 0.6, -1.0], [0.0, 0.0, 0.0]])
    wanted = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(project_to_simplex(rows), wanted, atol=1e-6)


def test_words_are_read_off_the_simplex_likeliest_first() -> None:
    u = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.4, 0.6]])
    choices = read_off(u, 8, torch.Generator().manual_seed(0))
    assert choices[0].tolist() == [0, 2]
    assert len({tuple(choice.tolist()) for choice in choices}) == len(choices) > 1
    assert all(u[0, a] > 0 and u[1, b] > 0 for a, b in (choice.tolist() for choice in choices))


def test_inversion_learns_a_word_that_draws_better(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On noise that stays the same, so that the loss shows the word and not the luck of the draw."""
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise(pipe, torch.randn(2, 4, 8, 8, generator=generator), 4, generator)
    monkeypatch.setattr("itd.attacks.inversion.draw_noise", lambda *_: noise)
    loss = Loss(System(pipe, options=OPTIONS), Denoise(pipe))
    attack = ConceptInversion(lr=0.05, start="cup")
    vector, losses = attack.learn(loss.system, GOAL, Every(True), vocabulary_of(pipe), "window", 30)
    ids = tokenize(pipe, "text_encoder", [GOAL.ask("window")]).input_ids
    with borrowed_row(pipe, int(prompt_ids(pipe, "window")[0]), vector):
        learnt = float(loss(ids, None, noise))
    started = float(loss(tokenize(pipe, "text_encoder", [GOAL.ask("cup")]).input_ids, None, noise))
    assert learnt < started
    assert len(losses) == 30


def test_the_placeholder_is_in_no_sentence(pipe: Any) -> None:
    word = placeholder(pipe, vocabulary_of(pipe), Goal("house", "a photo of a {} by a window"))
    assert word in vocabulary_of(pipe).words
    assert word not in ("window", "photo", "by", "of", "house")
    few = vocabulary_of(pipe).without(set(vocabulary_of(pipe).words) - {"photo"})
    with pytest.raises(ValueError, match="shorten"):
        placeholder(pipe, few, Goal("house", "a photo of {}"))


def test_a_gate_aware_inversion_passes_the_gate_that_flags_the_blind_one(pipe: Any, eraser: Eraser) -> None:
    """Both start at the erased word itself; only the attacker who knows the gate walks away from it."""
    system, words, margins = System(pipe, eraser, OPTIONS), vocabulary_of(pipe), []
    for weight in (0.0, 20.0):
        attack = ConceptInversion(lr=0.05, batch_size=1, start="house", gate_weight=weight)
        vector, _ = attack.learn(system, GOAL, Every(True), words, "window", 25)
        with borrowed_row(pipe, int(prompt_ids(pipe, "window")[0]), vector):
            ids = tokenize(pipe, "text_encoder", [GOAL.ask("window")]).input_ids
            margins.append(float(encode(pipe, ids, None, eraser).margins[0]))  # type: ignore[index]
    assert margins[1] < 0 <= margins[0]


# Vocabulary


def test_the_vocabulary_is_of_words_that_survive_writing(pipe: Any) -> None:
    words = vocabulary_of(pipe)
    assert set(NOUNS) <= set(words.words)
    assert all(len(word) > 1 and word.isalpha() for word in words.words)
    for id, word in zip(words.ids.tolist(), words.words, strict=True):
        assert prompt_ids(pipe, word).tolist() == [id]
    assert "house" not in words.without(["HOUSE"]).words
    assert len(words.without(["house"])) == len(words) - 1
    with pytest.raises(ValueError, match="no word"):
        words.without(words.words)
    assert read_vocabulary(pipe.tokenizer) is words


def test_the_names_of_a_concept_are_its_words_and_their_plurals() -> None:
    assert names_of("Bow and Arrow") == {"bow", "bows", "bowes", "and", "ands", "andes", "arrow", "arrows", "arrowes"}
    assert names_of("t-rex") == {"rex", "rexs", "rexes"}


def test_nearest_is_by_angle() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
    assert nearest(torch.tensor([[5.0, 1.0], [0.1, 0.2], [-9.0, -8.0]]), table).tolist() == [0, 1, 2]


# Criteria


class TwoNouns:
    nouns, designs = ("cat", "dog"), ("flat", "round")

    def name(self, images: torch.Tensor) -> tuple[list[str], list[str]]:
        assert float(images.min()) < 0, "the judge takes values in [-1, 1]"
        bright = (images.mean((1, 2, 3)) > 0).tolist()
        return ["cat" if b else "dog" for b in bright], ["round" if b else "flat" for b in bright]

    def shown(self, images: torch.Tensor) -> list[dict[str, float]]:
        sure = images.mean((1, 2, 3)).abs()
        return [{noun: s} for noun, s in zip(self.name(images)[0], sure.tolist(), strict=True)]


def test_the_judge_is_asked_for_noun_or_design() -> None:
    images = torch.stack([torch.full((3, 4, 4), 0.9), torch.full((3, 4, 4), 0.1)])
    assert Judged(TwoNouns(), "cat")(images) == [True, False]
    assert Judged(TwoNouns(), "dog")(images) == [False, True]
    assert Judged(TwoNouns(), "round")(images) == [True, False]
    assert Judged(TwoNouns(), "cat", 0.7)(images) == [True, False]
    assert Judged(TwoNouns(), "cat", 0.9)(images) == [False, False]
    assert "dog" in Judged(TwoNouns(), "dog").name
    with pytest.raises(ValueError, match="'bird'"):
        Judged(TwoNouns(), "bird")


def test_clip_names_the_closest_text() -> None:
    class Processor:
        def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, torch.Tensor]:
            assert images[0].shape == (4, 4, 3)
            assert images[0].dtype.name == "uint8"
            assert text == ["a picture of a cat", "a picture of a dog"]
            return {"pixels": torch.tensor([float(image.mean()) for image in images])}

    class Model:
        def __call__(self, pixels: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits_per_image=torch.stack([pixels, 255 - pixels], 1))

    images = torch.stack([torch.full((3, 4, 4), 0.9), torch.full((3, 4, 4), 0.1)])
    assert ClipNames(Model(), Processor(), "cat", ["dog"])(images) == [True, False]
    with pytest.raises(ValueError, match="other concepts"):
        ClipNames(Model(), Processor(), "cat", [])
