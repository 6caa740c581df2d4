"""What an eraser does to general prompts: fire rate, bit-identical pictures, FID, KID, CLIP score, perceptual distance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from itd.emoji.captions import CaptionSource
from itd.emoji.prompts import filler_words
from itd.eraser import Eraser
from itd.erasing import EraseConfig
from itd.evaluation.identities import choose, templates_free_of
from itd.evaluation.results import Measures, Report, Section
from itd.evaluation.show import pair_figures, spread
from itd.evaluation.world import DETECTOR, Case, Drawn, Made, World, leak_free_sets, require_no_leak
from itd.metrics.distribution import feature_distances
from itd.metrics.intervals import Rate, mean_rate, rate, rate_by
from itd.prompts import PromptSet, fill
from itd.settings import require_at_least
from itd.templates import TEMPLATES

LEAD = (
    "General prompts ask for nothing that is erased, but for nouns about which the eraser was told nothing, some of which have "
    "an erased word in their name, as the hot dog that of the dog. Distances between the erased and the unerased model's "
    "pictures stand beside a floor: the unerased model against itself with other seeds."
)


@dataclass(frozen=True)
class General:
    """Draw general prompts with identities erased."""

    name: ClassVar[str] = "general"

    n_prompts: int = 1000
    """Prompts, one picture each."""
    n_erased: int = 50
    """Identities that are erased."""
    caption_share: float = 0.5
    """Share of the prompts that are free captions in the manner of users, not held-out sentences."""
    renders: Path | None = None
    """Folder of the world's renders (renders.npz, made by `make emoji-world`), to compare with real pictures."""
    seed: int = 0
    """Of prompts and pictures."""
    erase: EraseConfig = field(default_factory=EraseConfig)
    """How the eraser is made."""

    def __post_init__(self) -> None:
        require_at_least(self, n_prompts=1, n_erased=1, caption_share=0)
        if self.caption_share > 1:
            raise ValueError(f"caption_share must be at most 1, got {self.caption_share}")

    def quick(self) -> General:
        """Return the subsample: 100 prompts, 10 identities."""
        return General(100, 10, self.caption_share, self.renders, self.seed, self.erase)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Run in the embedded world, on its own eraser or on the one given."""
        world = World(out, self.name, asdict(self), pipe, eraser=eraser)
        erased, _ = choose(world, self.n_erased, self.seed, eraser)
        held_out = self.held_out(world, erased)
        cases = self.cases(world, held_out, erased)
        made = Made(eraser, 0.0, 0) if eraser else self.make(world, erased, held_out)
        before, after = world.draw("unerased", cases), world.draw(self.name, cases, made.eraser)
        again = world.draw("unerased", [case._replace(seed=case.seed + 500_000) for case in cases])
        measures = Measures()
        measures.add_all("", comparisons(world, before, after))
        measures.add_all("", distances(world, "erased_unerased", after, before))
        measures.add_all("", distances(world, "floor", again, before))
        real = self.real(world, held_out)
        if real is not None:
            for name, drawn in (("erased", after), ("unerased", before)):
                measures.add_all("", feature_distances(f"{name}_real", features_of(world, drawn), real))
        fired = [i for i, flag in enumerate(after.fired) if flag]
        text = f"{len(fired)} of {len(cases)} prompts fired the gate."
        page = Section(
            "Pictures of prompts that fired", text, figures=pair_figures(world, before, after, made.eraser, fired[:24])
        )
        passed = [i for i, flag in enumerate(after.fired) if not flag]
        other = Section("Passed", figures=pair_figures(world, before, after, made.eraser, spread(passed, 12)))
        record = {
            **world.record, **DETECTOR, "settings": asdict(self), "erased": list(erased), "held_out": held_out,
            "features": {"judge": "256, last hidden layer", "clip": "image embedding of the world's own CLIP"},
            "fired": [cases[i].prompt for i in fired],
            "real": "not measured: no renders" if real is None else str(self.renders),
        }  # fmt: skip
        return Report(self.name, "General prompts", LEAD, measures.values, measures.intervals, record, (page, other))

    def held_out(self, world: World, erased: Sequence[str]) -> list[str]:
        """Return half of the general nouns that are not erased: an eraser made here hears of the other half only."""
        names = sorted(set(world.of_role("general")) - set(erased))
        return sorted(random.Random(self.seed + 5).sample(names, len(names) // 2))

    def cases(self, world: World, nouns: Sequence[str], erased: Sequence[str]) -> list[Case]:
        """Return prompts of held-out nouns, in held-out sentences and in captions, one picture each."""
        rng, templates = random.Random(self.seed + 6), templates_free_of(erased)
        source = CaptionSource([world.nouns[name] for name in nouns], filler_words())
        rows = []
        for index in range(self.n_prompts):
            name = nouns[index % len(nouns)]
            caption = rng.random() < self.caption_share
            text = source.single(index % len(nouns), None, None, rng) if caption else fill(rng.choice(templates), name)
            rows.append(Case(text, 5000 + index, name))
        return rows

    def make(self, world: World, erased: Sequence[str], held_out: Sequence[str]) -> Made:
        sets = leak_free_sets(erased, held_out)
        sides = (PromptSet.from_names(names, TEMPLATES["test"], "test") for names in (erased, held_out))
        require_no_leak(sets, *sides)
        return world.eraser(f"{self.name} {len(erased)}", sets, self.erase)

    def real(self, world: World, nouns: Sequence[str]) -> dict[str, Tensor] | None:
        """Return features of real renders of the held-out nouns on white, if they are there.

        Raises:
            FileNotFoundError: a folder is named, and holds none.
        """
        if self.renders is None:
            return None
        if not (self.renders / "renders.npz").is_file():
            raise FileNotFoundError(f"no renders.npz in {self.renders}; `make emoji-world` makes it in its work folder")
        from itd.emoji.data import World as Renders
        from itd.emoji.images import paste, premultiply

        loaded = Renders.load(self.renders)
        mine = [i for i, noun in enumerate(loaded.noun) if loaded.nouns[noun].name in set(nouns)]
        images = paste(premultiply(loaded.rgba[mine]), torch.ones(len(mine), 3))
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        cases = tuple(Case("", 0, loaded.nouns[loaded.noun[i]].name) for i in mine)
        return features_of(world, Drawn(cases, pixels, (b"",) * len(mine), (False,) * len(mine)))


def comparisons(world: World, before: Drawn, after: Drawn) -> dict[str, Rate | float]:
    """Return what happened to the pictures one by one."""
    same, fired = before.same_as(after), list(after.fired)
    seen = world.see(before), world.see(after)
    right = [sight.right(before.cases) for sight in seen]
    scores = world.clip_scores(before), world.clip_scores(after)
    gap = world.perceptual(before, after)
    changed = torch.tensor([not flag for flag in same])
    nouns = [str(case.noun) for case in before.cases]
    return {
        "gate_fires": rate_by(nouns, fired), "bit_identical": rate_by(nouns, same),
        "bit_identical_passed": rate(s for s, f in zip(same, fired, strict=True) if not f),
        "accuracy_unerased": rate_by(nouns, right[0]), "accuracy": rate_by(nouns, right[1]),
        "clip_score_unerased": mean_rate(scores[0]), "clip_score": mean_rate(scores[1]),
        "clip_score_change": mean_rate(scores[1] - scores[0]),
        "perceptual_distance": mean_rate(gap), "perceptual_distance_changed": mean_rate(gap[changed]),
    }  # fmt: skip


def features_of(world: World, drawn: Drawn) -> dict[str, Tensor]:
    return {"judge": world.see(drawn).features, "clip": world.clip_features(drawn)}


def distances(world: World, name: str, a: Drawn, b: Drawn) -> dict[str, Rate | float]:
    return feature_distances(name, features_of(world, a), features_of(world, b))
