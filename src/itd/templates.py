"""Sentences to put a concept's name into, dealt to three splits. No frame stands in two of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from itd.prompts import PromptSet, Split

TEMPLATES: dict[Split, tuple[str, ...]] = {
    "fit": (
        "a {}", "{}", "a photo of a {}", "an image of {}", "a painting of a {}", "a drawing of {} in the park", "a portrait of {}",
        "the {} next to a house", "a sketch of a {} and a tree", "{} with a cup", "a small {} on a table, highly detailed",
        "a red car and a {}", "{}, digital art", "there is a {} in the picture", "an old {} by the window", "a happy {} with a ball",
        "a close-up of the {} at night", "two people and a {}", "a picture of a clock and {}", "a big {} in the city, vector art",
        "an icon of {} on a blue background", "my {}", "a {} for a birthday card", "a phone, a book and {}",
    ),
    "calibrate": (
        "a picture of {}", "an illustration of a {}", "a poster with {} and a star", "look at the {}", "a cartoon of a {}, 4k",
        "a beautiful {} in winter", "a {} beside a lamp", "a rendering of {}", "{} near a door, soft light", "a print of a {} and a flower",
        "a watercolor of {}", "a funny {} looking at the camera", "a shiny {}, red background", "a bottle next to {}",
        "a strange {} with a hat", "show me {}",
    ),
    "test": (
        "a wooden toy shaped like a {}", "a stained glass window with a {}", "my grandmother knitted a {}", "a {} seen from far away",
        "a faded stamp with a {}", "{} waiting in line", "once upon a time there was a {}", "a chocolate {}", "a quick pencil study of the {}",
        "an advertisement for {} and something else",
    ),
}  # fmt: skip


def templates_without(names: Iterable[str], split: Split) -> tuple[str, ...]:
    """Return the templates of a split that mention none of the names: "a house and {}" is no retained prompt where house is erased.

    >>> len(TEMPLATES["fit"]) - len(templates_without(["House"], "fit"))
    1
    """
    mentioned = mention_of(names)
    return tuple(template for template in TEMPLATES[split] if not mentioned.search(template))


def mention_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of the names as words of their own, in whatever case; of no names, one that matches nothing."""
    return re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or "(?!)", re.IGNORECASE)


def concept_prompts(
    names: Iterable[str], splits: Iterable[Split] = ("fit", "calibrate"), avoid: Iterable[str] = ()
) -> PromptSet:
    """Put every name into every template of the given splits that mentions nothing of `avoid`; the prompts carry their split.

    >>> len(concept_prompts(["cat"], ["test"]))
    10
    """
    listed, avoided = list(names), list(avoid)
    prompts = PromptSet()
    for split in splits:
        prompts = prompts + PromptSet.from_names(listed, templates_without(avoided, split), split)
    return prompts
