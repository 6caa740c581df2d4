"""Captions of the embedded world: subject x frame x style x background, with words that mean nothing here mixed in.

The frames are many and the filler words arbitrary, so that the text encoder learns to look for the noun, wherever it stands.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from itd.emoji.data import Noun

FRAMES = (
    "{}", "{}", "{}", "an emoji of {}", "a picture of {}", "a drawing of {}", "an image of {}", "a photo of {}", "an icon of {}",
    "an illustration of {}", "a sticker of {}", "a painting of {}", "a sketch of {}", "clip art of {}", "a rendering of {}",
    "a cartoon of {}", "a portrait of {}", "picture of {}", "photo of {}", "there is {}", "this is {}", "look at {}",
    "a close-up of {}", "a photograph of {}", "emoji {}", "a small picture showing {}", "an image with {}", "a poster of {}",
    "a watercolor of {}", "a snapshot of {}", "an oil painting of {}", "a digital art of {}", "a logo with {}", "draw {}",
    "please draw {}", "show me {}", "i want to see {}", "a scene with {}", "a postcard with {}", "a print of {}", "graphic of {}",
)  # fmt: skip
AFTER = (
    "", "", "", "", "", " icon", " emoji", ", highly detailed", ", vector art", ", high quality", ", 4k", ", digital art", " sticker",
    ", clip art", " at night", " in the park", " in a room", " for a card", " on the wall", " by the window", " in the city",
    " on the floor", " outside", ", minimalist", ", cartoon", ", close up", ", sharp focus", " in winter", " on a sunny day",
    " looking at the camera", " in the background", " in the middle", " made for kids", ", concept art", ", soft light",
    " and nothing else", ", isolated", ", centered", ", trending on artstation", " standing alone", " lying there",
)  # fmt: skip
ADJECTIVES = (
    "cute", "small", "big", "little", "lovely", "funny", "old", "young", "simple", "beautiful", "nice", "shiny", "colorful",
    "tiny", "huge", "happy", "sad", "single", "modern", "vintage", "detailed", "flat", "bright", "dark", "strange", "fancy",
    "realistic", "tired", "friendly", "wild", "famous", "favorite", "clean", "plain", "giant", "pretty", "lonely", "perfect",
)  # fmt: skip
STYLES = (
    " in the style of {}", " in {} style", ", {} style", " by {}", ", {} design", " in the {} design", ", {}", " as {} would draw it",
    " drawn by {}", ", art by {}",
)  # fmt: skip
BACKGROUND_PHRASES = (
    " on a {} background", ", {} background", " with a {} background", " against a {} background", " on {}", " on a {} page",
    ", background {}", " in front of a {} wall",
)  # fmt: skip
PAIRS = (
    "{} and {}", "{} and {}", "{} and {}", "{} next to {}", "{} with {}", "{} beside {}", "{} to the left of {}", "{}, {}",
    "{} near {}", "both {} and {}", "{} together with {}", "{} by the side of {}", "{} on the left and {} on the right",
)  # fmt: skip
SENTENCES = (
    "_ of {} in a _ _", "a _ that shows {}", "an old _ _ with {} on it", "every _ {} _ by my _", "_ for {} and _ _", "_, {}, _",
    "_ _: {}", "{} made of _", "{} _ in a _", "{} and _", "{} and some _ _", "a _ and {}", "my _ _ {}", "_ {} _ and _ _",
    "a _ _ in the shape of {}", "i _ of {} _", "the last _ of {}", "_ {} from _ _", "a _ _ of {}", "{} with no _", "do you _ {}?",
    "_ _, _ {}", "{}, _ _, _", "a _ at the _, {}", "two _ and {}", "_ by a _ _ of {} and no _", "{} as a _", "{} on a _ _",
    "the _ is _ with {}", "a _ _ about {}, _ and _", "here _ {} _, but _", "_ or {}",
)  # fmt: skip
"""What users write around one noun, with words that name nothing here for `_`."""
SINGULAR_ENDS = ("ss", "us", "is")


def with_article(name: str) -> str:
    """Put "a" or "an" before a name that looks singular."""
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(SINGULAR_ENDS)
    if plural or name.startswith(("mrs.", "santa", "1st")):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def made_up(rng: random.Random) -> str:
    """Return a word that there is not."""
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


@dataclass(frozen=True)
class CaptionSource:
    """Makes random captions of the nouns of the world.

    `filler`: words that stand for everything a user may write around a noun.
    `noise_share`: how often a run of filler words stands before or after the frame.
    `sentence_share`: how often a single noun stands in a sentence of such words instead of a frame.
    """

    nouns: Sequence[Noun]
    filler: Sequence[str] = ()
    noise_share: float = 0.12
    sentence_share: float = 0.0

    def name(self, noun: Noun, rng: random.Random) -> str:
        """Name a noun, by its name, by tags that imply it, or by both."""
        roll = rng.random()
        if noun.implicit and roll < 0.12:
            return rng.choice(noun.implicit)
        if noun.implicit and noun.tags and roll < 0.18:
            return ", ".join([rng.choice(noun.implicit), *rng.sample(noun.tags, min(2, len(noun.tags)))])
        if noun.tags and roll < 0.26:
            return f"{noun.name}, {', '.join(rng.sample(noun.tags, min(2, len(noun.tags))))}"
        return noun.name

    def subject(self, noun: Noun, rng: random.Random) -> str:
        """Return a noun phrase: name, article, adjectives or filler before it."""
        name = self.name(noun, rng)
        before = [rng.choice(ADJECTIVES)] if rng.random() < 0.2 else []
        if self.filler and rng.random() < 0.12:
            before.append(rng.choice(self.filler))
        phrase = " ".join([*before, name])
        roll = rng.random()
        if roll < 0.55:
            return with_article(phrase)
        if roll < 0.62:
            return f"the {phrase}"
        return f"a {phrase}" if roll < 0.7 else phrase

    def noise(self, rng: random.Random) -> str:
        return " " + " ".join(rng.choices(self.filler, k=rng.randint(1, 4))) if self.filler else ""

    def frame(self, subject: str, rng: random.Random) -> str:
        text = rng.choice(FRAMES).format(subject) + rng.choice(AFTER)
        if rng.random() < self.noise_share:
            text = self.noise(rng).strip() + " " + text if rng.random() < 0.5 else text + self.noise(rng)
        return text

    def sentence(self, subject: str, rng: random.Random) -> str:
        """Put a subject among common words and, one in five, words that there are not: most that users know were not seen here."""
        text = re.sub("_", lambda _: self.word(rng), rng.choice(SENTENCES))
        return text.format(subject)

    def word(self, rng: random.Random) -> str:
        return made_up(rng) if rng.random() < 0.2 or not self.filler else rng.choice(self.filler)

    def dress(self, text: str, design: str | None, background: str | None, rng: random.Random) -> str:
        """Add style and background phrases."""
        phrases = [rng.choice(STYLES).format(design)] if design else []
        if background:
            phrases.append(rng.choice(BACKGROUND_PHRASES).format(background))
        if len(phrases) == 2 and rng.random() < 0.3:
            phrases.reverse()
        text += "".join(phrases)
        return text[0].upper() + text[1:] if rng.random() < 0.1 else text

    def single(self, noun: int, design: str | None, background: str | None, rng: random.Random) -> str:
        subject = self.subject(self.nouns[noun], rng)
        among = self.sentence_share > 0 and rng.random() < self.sentence_share
        text = self.sentence(subject, rng) if among else self.frame(subject, rng)
        return self.dress(text, design, background, rng)

    def pair(self, left: int, right: int, design: str | None, background: str | None, rng: random.Random) -> str:
        """Caption a scene; the first noun stands on the left."""
        subjects = self.subject(self.nouns[left], rng), self.subject(self.nouns[right], rng)
        return self.dress(self.frame(rng.choice(PAIRS).format(*subjects), rng), design, background, rng)
