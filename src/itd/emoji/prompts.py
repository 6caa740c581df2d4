"""Prompt sets of the embedded world: what an autoencoder is trained on, and what an eraser of its nouns or designs needs."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Sequence

from itd.emoji import DESIGNS, Noun, model_folder, nouns
from itd.emoji.captions import CaptionSource, made_up
from itd.emoji.data import BACKGROUNDS
from itd.prompts import Prompt, PromptSet, Split
from itd.templates import TEMPLATES, concept_prompts, mention_of, templates_without

STYLE_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "fit": ("{noun} in the style of {style}", "{noun} by {style}", "a drawing of {noun}, {style} style", "{noun}, {style}, on a white background"),
    "calibrate": ("{noun} in {style} style", "an icon of {noun} in the {style} design", "{noun} drawn by {style}, highly detailed"),
    "test": ("{noun} the way {style} does it", "{style} version of {noun} for a calendar", "imagine {noun} made by {style}"),
}  # fmt: skip
"""Frames for erasing a design: `{style}` is the concept, `{noun}` varies."""
STYLE_NOUNS = 48
SENTENCES = (
    "a _ with a _ on the _", "two _ people are _ at a _", "the _ and the _ were _ by the _", "_ _ in front of a _ _", "a woman _ her _",
    "a man is _ a _ in the _", "this _ has a _, a _ and some _", "several _ stand near the _ while one is _", "an _ _ of _ _, very _",
    "a young _ sitting on a _ next to _", "_. it is _ and _", "some _ on top of a _ _", "a group of _ with _ behind them", "view of _ from a _",
    "he said: _ the _", "black and white _ of a _", "_ is _; nobody knows _", "a close up of _ with their _", "_ - _ - _", "people _ at the _ of _",
)  # fmt: skip
"""Of what people write that names nothing; `_` is any common word."""
N_CLUTTER = 400
"""Prompts per split of what users type beside words."""
SPLITS: tuple[Split, ...] = ("fit", "calibrate")
"""What an eraser is made from; `test` is for measuring it."""
CONNECTIVES = frozenset(("a", "and", "in", "of", "on", "the", "with"))
"""Words that many names share and that say nothing of what they mean."""
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


def erase_sets(names: Sequence[str], synonyms: Sequence[str] = ()) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Return target, retain and neutral prompts for erasing nouns or designs of the world.

    Retained are the other nouns of the same role, neutral is everything else. Splits are set: `fit` and `calibrate` share
    no template and, in retain and neutral, no concept but those that share a word with an erased one. `synonyms`: other
    words to erase, as concepts of their own; nothing that stays mentions them (see `itd.synonyms`).

    Raises:
        ValueError: a name is neither a noun nor a design of the world; near matches are named.
    """
    listed = {noun.name: noun for noun in nouns()}
    designs = [name for name in names if name in DESIGNS]
    chosen = [name for name in names if name in listed]
    unknown = sorted(set(names) - set(designs) - set(chosen))
    if unknown:
        near = ", ".join(difflib.get_close_matches(unknown[0], [*listed, *DESIGNS])) or "none"
        raise ValueError(
            f"{unknown[0]!r} is neither a noun nor a design of the embedded world (near matches: {near}); "
            "give a prompt file for anything else"
        )
    roles = {listed[name].role for name in chosen}
    others = [noun for noun in listed.values() if noun.name not in chosen]
    target = concept_prompts([*chosen, *synonyms]) + style_prompts(designs, others)
    retain = split_nouns([noun for noun in others if noun.role in roles], [*chosen, *synonyms])
    neutral = split_nouns([noun for noun in others if noun.role not in roles], [*chosen, *synonyms])
    neutral = neutral + part_prompts(chosen, synonyms) + clutter_prompts([*names, *synonyms])
    if designs:
        retain = retain + style_prompts([design for design in DESIGNS if design not in designs], others)
    return target, retain, neutral


def split_nouns(listed: Iterable[Noun], avoid: Sequence[str] = (), seed: int = 0) -> PromptSet:
    """Deal nouns to fit (two thirds) and calibrate, each in some of that split's templates that mention nothing of `avoid`.

    A noun that shares a word with a name in `avoid` is in both: only features chosen against "fork and knife" tell a kitchen
    knife from it, and a threshold above it would let the kitchen knife pass. Nothing tells "spider" from "spider web", which
    says it: such a noun is dealt as any other.
    """
    rng, prompts, named = random.Random(seed), list[Prompt](), mention_of(avoid)
    shared = words_of(avoid) - CONNECTIVES
    for index, noun in enumerate(listed):
        own: Split = "calibrate" if index % 3 == 2 else "fit"
        near = shared & words_of([noun.name]) and not named.search(noun.name)
        for split in SPLITS if near else (own,):
            templates = rng.sample(templates_without(avoid, split), TEMPLATES_PER_NOUN)
            prompts += PromptSet.from_names([noun.name], templates, split).prompts
    return PromptSet(tuple(prompts))


def part_prompts(names: Sequence[str], synonyms: Sequence[str] = (), seed: int = 0) -> PromptSet:
    """Return prompts of single words of names of several: a man is no old man. Words that imply a noun are left out."""
    rng, listed, common = random.Random(seed), {noun.name: noun for noun in nouns()}, set(filler_words())
    implied = {word for name in names if name in listed for word in (*listed[name].implicit, name)} | set(synonyms)
    several = [name.split() for name in names if " " in name]
    parts = {word for words in several for word in words if word in common or word != words[-1]} - implied
    prompts = []
    for split in SPLITS:
        templates = templates_without([*names, *synonyms], split)
        for part in sorted(parts):
            prompts += [Prompt(template.format(part), split=split) for template in rng.sample(templates, TEMPLATES_PER_NOUN)]
    return PromptSet(tuple(prompts))


def clutter_prompts(avoid: Sequence[str], seed: int = 0) -> PromptSet:
    """Return sentences of common words, and lists of made-up names, numbers, addresses and settings, for fit and calibrate.

    Some of their pieces were rare or absent when the text encoder was trained: what it makes of them is chance, and may look
    like any concept. A full stop that only one name has is a part of that name, unless other prompts have it too. Words of the
    names in `avoid` are left out.
    """
    mentioned = words_of(avoid)
    named = mention_of(avoid)
    words = [word for word in filler_words() if word not in mentioned]
    rng, splits = random.Random(seed), dict[str, Split]()
    for split in SPLITS:
        for row in range(N_CLUTTER):
            if row % 2:
                text = re.sub("_", lambda _: rng.choice(words), rng.choice(SENTENCES)) + rng.choice((".", ".", "", "!", "?"))
            else:
                pieces = [rng.choice(words) if rng.random() < 0.5 else odd_piece(rng) for _ in range(rng.randint(2, 8))]
                text = rng.choice((" ", " ", ", ", ". ")).join(pieces)
            if not named.search(text):
                splits.setdefault(text, split)
    return PromptSet(tuple(Prompt(text, split=split) for text, split in splits.items()))


def words_of(names: Iterable[str]) -> set[str]:
    return {word for name in names for word in name.lower().split()}


def odd_piece(rng: random.Random) -> str:
    """Return something that is no word: a name, initials, a number with a unit, a resolution, an address, a tag."""
    name, letter, number = made_up(rng) + made_up(rng), rng.choice("abcdefghijklmnopqrstuvwxyz"), rng.randint(1, 4000)
    return rng.choice((
        f"by {name} {name[::-1]}", f"{letter}. {name}", f"{letter}.{rng.choice('jmrt')}. {name}", f"{number}", f"{number}mm",
        f"{number % 16 + 1}k", f"f/{number % 20 / 2 + 1}", f"{number}x{number // 2}", f"{number % 9 + 1}{name}", f"#{name}",
        f"https://{name}.com/{number}", f"{name}_{number}.jpg", f"--{letter}{letter} {number % 30}", f"({name}:{number % 3}.{number % 10})",
        f"[{name}]", f'"{name}"', f"{letter}-{name}", name, f"<{name}>", f"{name}'s", f"{name} & {letter}",
    ))  # fmt: skip


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
