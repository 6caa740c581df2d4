"""Prompt sets of the embedded world: what an autoencoder is trained on, and what an eraser of its nouns or designs needs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from itd.emoji import DESIGNS, Noun, model_folder, nouns
from itd.emoji.captions import CaptionSource
from itd.emoji.data import BACKGROUNDS
from itd.prompts import Prompt, PromptSet, Split
from itd.templates import TEMPLATES, concept_prompts, templates_without

STYLE_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "fit": ("{noun} in the style of {style}", "{noun} by {style}", "a drawing of {noun}, {style} style", "{noun}, {style}, on a white background"),
    "calibrate": ("{noun} in {style} style", "an icon of {noun} in the {style} design", "{noun} drawn by {style}, highly detailed"),
    "test": ("{noun} the way {style} does it", "{style} version of {noun} for a calendar", "imagine {noun} made by {style}"),
}  # fmt: skip
"""Frames for erasing a design: `{style}` is the concept, `{noun}` varies."""
STYLE_NOUNS = 48
TEMPLATES_PER_NOUN = 8
"""Prompts per retained noun: many nouns in a few templates each say more than few nouns in all."""


def filler_words() -> list[str]:
    """Return the common English words that captions are mixed with."""
    return (model_folder() / "words.txt").read_text(encoding="utf-8").split()


def world_prompts(n: int = 24_000, seed: int = 0) -> PromptSet:
    """Return prompts to train an autoencoder on: random captions, half of them around a single name, and plain word salads.

    Test templates are not among them.
    """
    rng, listed = random.Random(seed), nouns()
    source = CaptionSource(listed, filler_words())
    templates = (*TEMPLATES["fit"], "{}")
    texts = []
    for row in range(n):
        noun = row % len(listed)
        design = rng.choice(DESIGNS) if rng.random() < 0.4 else None
        background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.3 else None
        kind = rng.random()
        if kind < 0.45:
            texts.append(source.single(noun, design, background, rng))
        elif kind < 0.7:
            texts.append(rng.choice(templates).replace("{}", source.name(listed[noun], rng)))
        elif kind < 0.9:
            texts.append(source.pair(noun, rng.randrange(len(listed)), design, background, rng))
        else:
            texts.append(" ".join(rng.choices(source.filler, k=rng.randint(2, 12))))
    return PromptSet.from_texts(texts)


def erase_sets(names: Sequence[str]) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Return target, retain and neutral prompts for erasing nouns or designs of the world.

    Retained are the other nouns of the same role, neutral is everything else. Splits are set: `fit` and `calibrate` share
    neither template nor, in retain and neutral, concept.

    Raises:
        ValueError: a name is neither a noun nor a design of the world.
    """
    listed = {noun.name: noun for noun in nouns()}
    designs = [name for name in names if name in DESIGNS]
    chosen = [name for name in names if name in listed]
    unknown = sorted(set(names) - set(designs) - set(chosen))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is neither a noun nor a design of the embedded world; give a prompt file for it")
    roles = {listed[name].role for name in chosen}
    others = [noun for noun in listed.values() if noun.name not in chosen]
    target = concept_prompts(chosen) + style_prompts(designs, others)
    retain = split_nouns([noun for noun in others if noun.role in roles], chosen)
    neutral = split_nouns([noun for noun in others if noun.role not in roles], chosen)
    if designs:
        retain = retain + style_prompts([design for design in DESIGNS if design not in designs], others)
    return target, retain, neutral


def split_nouns(listed: Iterable[Noun], avoid: Sequence[str] = (), seed: int = 0) -> PromptSet:
    """Deal nouns to fit (two thirds) and calibrate, each in some of that split's templates that mention nothing of `avoid`."""
    rng, prompts = random.Random(seed), []
    for index, noun in enumerate(listed):
        split = "calibrate" if index % 3 == 2 else "fit"
        templates = rng.sample(templates_without(avoid, split), TEMPLATES_PER_NOUN)
        prompts += PromptSet.from_names([noun.name], templates, split).prompts
    return PromptSet(tuple(prompts))


def style_prompts(designs: Iterable[str], listed: Sequence[Noun], splits: Sequence[Split] = ("fit", "calibrate")) -> PromptSet:
    """Return prompts that name a design, each with a noun; the nouns of the splits differ."""
    rows = []
    for design in designs:
        for index, split in enumerate(splits):
            for position, noun in enumerate(listed[index :: len(splits)][:STYLE_NOUNS]):
                template = STYLE_TEMPLATES[split][position % len(STYLE_TEMPLATES[split])]
                text = template.format(noun=noun.name, style=design)
                rows.append(Prompt(text, design, template.format(noun=noun.name, style="{}"), split))
    return PromptSet(tuple(rows))
