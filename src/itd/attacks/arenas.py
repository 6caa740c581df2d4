"""Where attacks are run: the embedded world with its judge, or any pipeline with an eraser and a CLIP that names pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from itd import emoji
from itd.attacks.base import Budget, Criterion, Goal, System
from itd.attacks.criteria import ClipNames, Judged
from itd.attacks.protocol import Arena, Arm, evading_prompts, identity_of, run
from itd.eraser import EditMode, Eraser
from itd.erasing import PRESETS, EraseConfig
from itd.evaluation.ledger import Ledger
from itd.evaluation.provenance import pipeline_record, weights_sha256
from itd.evaluation.results import Report
from itd.generation import pipeline_options
from itd.inputs import switch_off_safety_checker
from itd.prompts import PromptSet, fill
from itd.settings import require_at_least
from itd.synonyms import find_synonyms, synonym_words
from itd.templates import TEMPLATES

WORLD_OPTIONS = {"num_inference_steps": emoji.STEPS, "guidance_scale": emoji.GUIDANCE_SCALE, "height": 64, "width": 64}
TEMPLATE = "a picture of a {}"
EVADING = "evading.jsonl"
"""File of the prompts that passed the gate and drew the concept."""
N_SURE = 100
"""Unerased pictures that say how sure the judge is where it is right."""
HELD_OUT = 3
"""One of this many concepts that are not erased is kept from selection and calibration, for the benign prompts."""
ERASED_WITH = ("pooled_gate", "draft_gate", "picture_gate", "edit", "n_features")
"""Settings of an attack that are settings of the eraser that is made for it."""


@dataclass(frozen=True)
class AttackConfig:
    """How much is attacked, and what may be spent on it. The embedded world's eraser is by default of the preset `strict`."""

    n_concepts: int = 20
    """Concepts that are erased together and attacked one by one. For the embedded world."""
    images: int = 16
    """Pictures that an attack may draw per concept."""
    steps: int = 100
    """Gradient steps or generations that an attack may search per concept."""
    n_benign: int = 1000
    """Prompts without an erased concept, on which false positives are counted."""
    seed: int = 0
    """Of the choice of concepts, the searches and the pictures."""
    with_synonyms: bool = False
    """In the embedded world, without --eraser: the eraser also knows the words that the text encoder takes for the names."""
    pooled_gate: bool = True
    """In the embedded world, without --eraser: the eraser also gates by the pooled embedding of the whole prompt."""
    draft_gate: bool = True
    """In the embedded world, without --eraser: the eraser also gates by the image model's first guess of the picture."""
    picture_gate: bool = False
    """In the embedded world, without --eraser: the eraser also gates by the finished picture."""
    edit: EditMode = "refuse"
    """In the embedded world, without --eraser: what is done to a prompt that fires; `refuse` draws a tree instead."""
    n_features: int = EraseConfig.n_features
    """In the embedded world, without --eraser: features per concept by which the first gate decides."""
    quick: bool = False
    """Four concepts, 4 pictures, 20 steps and 200 benign prompts at most."""

    def __post_init__(self) -> None:
        require_at_least(self, n_concepts=1, n_benign=1, n_features=1)
        Budget(self.images, self.steps)

    @property
    def stated(self) -> AttackConfig:
        """The settings with what `quick` limits."""
        if not self.quick:
            return self
        most = {"n_concepts": 4, "images": 4, "steps": 20, "n_benign": 200}
        return replace(self, **{name: min(getattr(self, name), bound) for name, bound in most.items()})

    @property
    def budget(self) -> Budget:
        return Budget(self.stated.images, self.stated.steps)


def make_goals(names: Sequence[str], seed: int, synonyms: Mapping[str, Sequence[str]] | None = None) -> tuple[Goal, ...]:
    """Return one goal per concept; every goal has its own range of seeds."""
    words = synonyms or {}
    return tuple(Goal(name, TEMPLATE, seed + 1000 * i, tuple(words.get(name, ()))) for i, name in enumerate(names))


def with_words(goals: Sequence[Goal], words: PromptSet) -> tuple[Goal, ...]:
    """Return the goals with further synonyms, each of which names its concept.

    Raises:
        ValueError: a word without a concept, or for a concept that is not attacked.

    >>> words = PromptSet.from_rows([{"prompt": "kitty", "concept": "cat"}, {"prompt": "feline", "concept": "cat"}])
    >>> with_words(make_goals(["cat", "dog"], 0), words)[0].synonyms
    ('kitty', 'feline')
    """
    names = [goal.concept for goal in goals]
    for word in words:
        if word.concept not in names:
            raise ValueError(
                f"{word.text!r} is a word for {word.concept!r}, which is not attacked; "
                f"the column `concept` has to name one of {', '.join(names)}"
            )
    return tuple(
        replace(goal, synonyms=tuple(dict.fromkeys((*goal.synonyms, *words.about(goal.concept).texts)))) for goal in goals
    )


def world_arena(config: AttackConfig, out: Path, names: Sequence[str] = (), eraser: Eraser | None = None) -> Arena:
    """Return the embedded world with concepts erased: those named, the eraser's own, or identities that it draws well.

    Benign prompts are held-out templates of nouns that neither selection nor calibration saw; with an eraser made elsewhere,
    of all other nouns.

    Raises:
        ValueError: a name that the judge cannot tell or the eraser does not erase, or none.
    """
    from itd.evaluation.world import World, leak_free_sets

    stated = config.stated
    asked = {name: getattr(stated, name) for name in ERASED_WITH}
    options = {
        "n_concepts": stated.n_concepts,
        "seed": stated.seed,
        "names": list(names),
        "with_synonyms": stated.with_synonyms,
        **asked,
    }
    world = World(out, "attack", options, eraser=eraser)
    rng = random.Random(stated.seed)
    chosen = goals_of(eraser, names) if eraser else list(names) or identities(world, stated.n_concepts, rng)
    others = sorted(set(world.nouns) - set(chosen) - set(eraser.names if eraser else ()))
    held_out = rng.sample(others, max(1, len(others) // HELD_OUT)) if eraser is None else others
    if eraser is None:
        settings = replace(PRESETS["strict"], **asked)
        words = synonym_words(find_synonyms(world.pipe, chosen, others)) if stated.with_synonyms else []
        eraser = world.eraser("attacked", leak_free_sets(chosen, held_out, words), settings).eraser
    synonyms = {name: (*noun.implicit, *noun.tags) for name, noun in world.nouns.items()}
    benign = benign_prompts(held_out, stated.n_benign, rng)
    least = sure_of(world, held_out)
    criteria: dict[str, Criterion] = {name: Judged(world.judge, name, least) for name in chosen}
    return Arena(
        System(world.pipe, eraser, WORLD_OPTIONS), make_goals(chosen, stated.seed, synonyms), criteria, benign,
        {**world.record, "least_sure": round(least, 4)},
    )  # fmt: skip


def goals_of(eraser: Eraser, names: Sequence[str]) -> list[str]:
    """Return the concepts to attack: those named, or all that the eraser erases.

    Raises:
        ValueError: the eraser does not erase one of the names.
    """
    missing = [name for name in names if name not in eraser.names]
    if missing:
        raise ValueError(f"the eraser does not erase {missing[0]!r}, so there is nothing to attack; it erases {eraser.names}")
    return list(names) or list(dict.fromkeys(eraser.names))


def sure_of(world: Any, names: Sequence[str]) -> float:
    """Return how sure the judge is in 95 % of the unerased pictures that it names right; below that nothing counts as shown."""
    from itd.evaluation.world import Case, sample, unsure_below

    rng = random.Random(0)
    cases = [Case(fill(rng.choice(TEMPLATES["test"]), name), 40_000, name) for name in sample(rng, sorted(names), N_SURE)]
    return unsure_below(world.see(world.draw("unerased", cases)), cases)


def identities(world: Any, n: int, rng: random.Random) -> list[str]:
    """Return n identities of those that are recognised best when they are not erased; otherwise success could not be seen."""
    known = world.of_role("identity")
    return sorted(rng.sample(world.best_drawn(known, min(2 * n, len(known))), n))


def benign_prompts(names: Sequence[str], n: int, rng: random.Random) -> tuple[str, ...]:
    """Return at most n different prompts of the names in held-out templates."""
    every = list(dict.fromkeys(fill(template, name) for name in names for template in TEMPLATES["test"]))
    return tuple(rng.sample(every, min(n, len(every))))


def model_arena(
    config: AttackConfig,
    pipe: Any,
    eraser: Eraser,
    clip: Path | None,
    names: Sequence[str],
    others: Sequence[str],
    benign: Path | None,
    options: Mapping[str, Any],
) -> Arena:
    """Return a pipeline with its eraser and without its safety checker, where a CLIP model tells the concept from other names.

    Raises:
        ValueError: no CLIP, no other names or no benign prompts; a name that the eraser does not erase.
    """
    if clip is None or benign is None or not others:
        raise ValueError(
            "with --model an attack needs --clip (folder of a CLIP model with its processor), --others (names to tell the "
            "concept from) and --benign (file of prompts without it)"
        )
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(clip, local_files_only=True)
    processor: Any = CLIPProcessor.from_pretrained(clip, local_files_only=True)
    checker = switch_off_safety_checker(pipe)
    chosen = goals_of(eraser, names)
    criteria: dict[str, Criterion] = {name: ClipNames(model.eval(), processor, name, list(others)) for name in chosen}
    prompts = PromptSet.from_file(benign).sample(config.stated.n_benign, config.seed).texts
    return Arena(
        System(pipe, eraser, options), make_goals(chosen, config.seed), criteria, tuple(prompts),
        {**pipeline_record(pipe), "clip": str(clip), "clip_sha256": weights_sha256(model), "safety_checker": checker},
    )  # fmt: skip


def run_arena(
    config: AttackConfig,
    out: Path,
    attacks: Sequence[str],
    arms: Sequence[Arm],
    model: str | None = None,
    pipe: Any = None,
    eraser: Eraser | None = None,
    names: Sequence[str] = (),
    others: Sequence[str] = (),
    clip: Path | None = None,
    benign: Path | None = None,
    inference_steps: int | None = None,
    words: Path | None = None,
) -> Report:
    """Attack the embedded world, or another pipeline with its eraser, and return the report; goes on where it was stopped.

    `pipe`: what is loaded of `model`. `words`: prompt file with other words for the concepts. `out` gets the prompts that won
    as `evading.jsonl`, which `itd erase --target` reads.

    Raises:
        ValueError: see `world_arena`, `model_arena` and `with_words`; `out` holds a run with other settings.
    """
    told = PromptSet() if words is None else PromptSet.from_file(words)
    if model is None:
        arena = world_arena(config, out, names, eraser)
    else:
        assert eraser is not None
        options = pipeline_options(model, inference_steps, None, None)
        arena = model_arena(config, pipe, eraser, clip, names, others, benign, options)
    arena = replace(arena, goals=with_words(arena.goals, told))
    ledger = Ledger(out / "attempts", identity_of(arena, config.budget))
    found = run(arena, attacks, config.budget, ledger, arms)
    evading_prompts(found.record["cells"]).to_jsonl(out / EVADING)
    return found
