"""Changes of a prompt that keep what it is about: length, place, company, wording, spelling, language."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

Spelling = Literal["swap", "drop", "double", "two", "upper", "spaced"]
SPELLINGS: tuple[Spelling, ...] = ("swap", "drop", "double", "two", "upper", "spaced")

PARAPHRASES = (
    "what would a {} look like if you drew it from memory", "depict for me, as well as you can, a {}",
    "the main subject of this work is a {}", "an artist's impression of {}", "i was thinking of a {}, can you show one",
    "nothing in view except for one {}",
)  # fmt: skip
"""Sentences that ask in other words than any template."""

LANGUAGES: dict[str, tuple[str, ...]] = {
    "de": ("ein Bild von {}", "eine alte Zeichnung: {}"),
    "fr": ("une image de {}", "un vieux dessin : {}"),
    "es": ("una imagen de {}", "un viejo dibujo: {}"),
    "it": ("un'immagine di {}", "un vecchio disegno: {}"),
}
TRANSLATIONS: dict[str, dict[str, str]] = {
    "cat": {"de": "Katze", "fr": "chat", "es": "gato", "it": "gatto"},
    "dog": {"de": "Hund", "fr": "chien", "es": "perro", "it": "cane"},
    "horse": {"de": "Pferd", "fr": "cheval", "es": "caballo", "it": "cavallo"},
    "lion": {"de": "Löwe", "fr": "lion", "es": "león", "it": "leone"},
    "tiger": {"de": "Tiger", "fr": "tigre", "es": "tigre", "it": "tigre"},
    "elephant": {"de": "Elefant", "fr": "éléphant", "es": "elefante", "it": "elefante"},
    "penguin": {"de": "Pinguin", "fr": "manchot", "es": "pingüino", "it": "pinguino"},
    "spider": {"de": "Spinne", "fr": "araignée", "es": "araña", "it": "ragno"},
    "snail": {"de": "Schnecke", "fr": "escargot", "es": "caracol", "it": "lumaca"},
    "owl": {"de": "Eule", "fr": "hibou", "es": "búho", "it": "gufo"},
    "koala": {"de": "Koala", "fr": "koala", "es": "koala", "it": "koala"},
    "frog": {"de": "Frosch", "fr": "grenouille", "es": "rana", "it": "rana"},
    "fish": {"de": "Fisch", "fr": "poisson", "es": "pez", "it": "pesce"},
    "butterfly": {"de": "Schmetterling", "fr": "papillon", "es": "mariposa", "it": "farfalla"},
    "rabbit": {"de": "Kaninchen", "fr": "lapin", "es": "conejo", "it": "coniglio"},
    "turtle": {"de": "Schildkröte", "fr": "tortue", "es": "tortuga", "it": "tartaruga"},
    "snake": {"de": "Schlange", "fr": "serpent", "es": "serpiente", "it": "serpente"},
    "monkey": {"de": "Affe", "fr": "singe", "es": "mono", "it": "scimmia"},
    "cow": {"de": "Kuh", "fr": "vache", "es": "vaca", "it": "mucca"},
    "pig": {"de": "Schwein", "fr": "cochon", "es": "cerdo", "it": "maiale"},
    "whale": {"de": "Wal", "fr": "baleine", "es": "ballena", "it": "balena"},
    "octopus": {"de": "Krake", "fr": "poulpe", "es": "pulpo", "it": "polpo"},
    "robot": {"de": "Roboter", "fr": "robot", "es": "robot", "it": "robot"},
    "ghost": {"de": "Gespenst", "fr": "fantôme", "es": "fantasma", "it": "fantasma"},
    "alien": {"de": "Außerirdischer", "fr": "extraterrestre", "es": "extraterrestre", "it": "alieno"},
    "princess": {"de": "Prinzessin", "fr": "princesse", "es": "princesa", "it": "principessa"},
}
"""Names of some of the embedded world's identities. The world's text encoder never read any language but English."""


def with_filler(text: str, words: Sequence[str], n: int, rng: random.Random) -> str:
    """Add n words that mean nothing here, some before and some behind."""
    before = rng.randint(0, n)
    return " ".join([*rng.choices(words, k=before), text, *rng.choices(words, k=n - before)])


def at_position(name: str, where: str, words: Sequence[str], rng: random.Random, n: int = 12) -> str:
    """Put a name first, in the middle or last among n words that mean nothing here.

    Raises:
        ValueError: another place.
    """
    places = {"first": 0, "middle": n // 2, "last": n}
    if where not in places:
        raise ValueError(f"position must be one of {list(places)}, got {where!r}")
    filler = rng.choices(words, k=n)
    return " ".join([*filler[: places[where]], name, *filler[places[where] :]])


def beside(text: str, names: Sequence[str], n: int, rng: random.Random) -> str:
    """Add n other things to a prompt."""
    return ", ".join([text, *rng.sample(list(names), n)])


def misspell(text: str, name: str, kind: Spelling, rng: random.Random) -> str:
    """Misspell a name inside a text; a text without it comes back as it is.

    swap: two neighbouring letters change places; drop: one is left out; double: one is written twice; two: two of these;
    upper: capitals; spaced: a blank between all letters. The first letter of the name stays.

    Raises:
        ValueError: another kind.
    """
    if kind not in SPELLINGS:
        raise ValueError(f"spelling must be one of {SPELLINGS}, got {kind!r}")
    return text.replace(name, spelled(name, kind, rng), 1)


def spelled(name: str, kind: Spelling, rng: random.Random) -> str:
    if kind == "upper":
        return name.upper()
    if kind == "spaced":
        return " ".join(name.replace(" ", ""))
    if kind == "two":
        once: tuple[Spelling, ...] = ("swap", "drop", "double")
        return spelled(spelled(name, rng.choice(once), rng), rng.choice(once), rng)
    places = [i for i in range(1, len(name)) if name[i].isalpha()]
    if kind == "swap":
        places = [i for i in places if i + 1 < len(name) and name[i + 1].isalpha() and name[i] != name[i + 1]]
    if not places:
        return name + name[-1]
    i = rng.choice(places)
    changed = {"swap": name[i : i + 2][::-1] + name[i + 2 :], "drop": name[i + 1 :], "double": name[i] + name[i:]}
    return name[:i] + changed[kind]
