"""Measure the embedded world: the judge on renders it did not see, unerased generations as the judge and CLIP see them."""

from __future__ import annotations

import json
import logging
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from itd.emoji import GUIDANCE_SCALE, STEPS, load_clip, load_judge, load_pipeline, load_sae
from itd.emoji.captions import with_article
from itd.emoji.card import card
from itd.emoji.data import DESIGNS, Noun, World
from itd.emoji.generate import contact_sheet, generate
from itd.emoji.images import paste, premultiply, split_scene
from itd.emoji.judge import Judge, degrade, judge_accuracy, warp

if TYPE_CHECKING:
    from itd.emoji.build import WorldConfig

logger = logging.getLogger(__name__)

N_IDENTITIES = 100
TRAINED = ("vae", "decoder", "eye", "clip", "vision", "judge", "latent_eye", "unet", "unet_on_policy")
PLAIN = ("a photo of {}", "an emoji of {}", "{}")
SELECTION_SEED, TEST_SEED = 10_000, 20_000
"""Seeds of the generations that pick the benchmark's identities, and of those that are reported."""


@torch.no_grad()
def evaluate_judge(world: World, judge: Judge, vae: Any, seed: int = 99) -> dict[str, dict[str, float]]:
    """Judge renders with unseen augmentations, on unseen backgrounds, and after the autoencoder's round trip."""
    torch.manual_seed(seed)
    stickers, nouns, designs = premultiply(world.rgba), torch.from_numpy(world.noun), torch.from_numpy(world.design)
    muted = torch.rand(len(stickers), 3) * 0.5 + 0.4
    moved = paste(warp(stickers), muted)
    plain = paste(stickers, torch.ones(len(stickers), 3))
    passed = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in plain.split(128)])
    sets = {"augmented": degrade(moved), "backgrounds": moved, "vae_round_trip": passed}
    return {name: judge_accuracy(judge, images, nouns, designs) for name, images in sets.items()}


def draw_nouns(
    pipe: Any, nouns: list[Noun], templates: tuple[str, ...], seed: int
) -> tuple[Float[Tensor, "n 3 64 64"], list[str], list[str]]:
    """Generate every noun once per template; return images, prompts and the nouns asked for."""
    rows = [(template.format(with_article(noun.name)), noun.name) for noun in nouns for template in templates]
    prompts, names = [row[0] for row in rows], [row[1] for row in rows]
    return generate(pipe, prompts, range(seed, seed + len(rows)), desc="nouns"), prompts, names


def noun_accuracy(judge: Judge, images: Float[Tensor, "n 3 64 64"], names: list[str]) -> dict[str, float]:
    """Return the share of pictures in which the judge sees the noun, per noun."""
    hits: dict[str, list[float]] = defaultdict(list)
    for said, name in zip(judge.name(images)[0], names, strict=True):
        hits[name].append(float(said == name))
    return {name: sum(values) / len(values) for name, values in hits.items()}


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def evaluate_scenes(pipe: Any, judge: Judge, nouns: list[Noun], n: int, seed: int) -> tuple[float, Tensor]:
    """Return the share of two-noun scenes in which the judge sees both nouns, each on its side, and the pictures."""
    rng = random.Random(seed)
    pairs = [rng.sample(nouns, 2) for _ in range(n)]
    prompts = [f"{with_article(a.name)} and {with_article(b.name)}" for a, b in pairs]
    images = generate(pipe, prompts, range(seed, seed + n), desc="scenes")
    left, right = (judge.name(half)[0] for half in split_scene(images))
    both = [a.name == x and b.name == y for (a, b), x, y in zip(pairs, left, right, strict=True)]
    return mean(map(float, both)), images


def evaluate_designs(pipe: Any, judge: Judge, world: World, n: int, seed: int) -> float:
    """Return the share of pictures in a named design that the judge assigns to it; each asks for a noun that the design has."""
    rng = random.Random(seed)
    asked = [DESIGNS[i % len(DESIGNS)] for i in range(n)]
    drawn = {design: [world.nouns[noun] for noun in world.noun[world.design == i]] for i, design in enumerate(DESIGNS)}
    prompts = [f"{with_article(rng.choice(drawn[design]).name)} in the style of {design}" for design in asked]
    said = judge.name(generate(pipe, prompts, range(seed, seed + n), desc="designs"))[1]
    return mean(float(a == b) for a, b in zip(asked, said, strict=True))


@torch.no_grad()
def clip_scores(images: Float[Tensor, "n 3 64 64"], prompts: list[str]) -> Float[Tensor, " n"]:
    """Return the cosine between image and prompt in the world's CLIP."""
    model, processor = load_clip()
    tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    text = model.text_projection(model.text_model(**tokens).pooler_output)
    vision = torch.cat([model.vision_model(batch).pooler_output for batch in images.split(128)])
    return F.cosine_similarity(model.visual_projection(vision), text)


def rank_agreement(judge: Judge, images: Float[Tensor, "n 3 64 64"], prompts: list[str], names: list[str]) -> float:
    """Return how probably a picture the judge accepts has a higher CLIP score than one it rejects (0.5: chance)."""
    from itd.gate import auroc

    right = torch.tensor([said == name for said, name in zip(judge.name(images)[0], names, strict=True)])
    scores = clip_scores(images, prompts)
    return auroc(scores[right], scores[~right]) if 0 < int(right.sum()) < len(right) else float("nan")


def evaluate_world(config: WorldConfig, n_scenes: int = 200, n_designs: int = 240) -> dict[str, Any]:
    """Measure the assembled world, pick the benchmark's identities, and write numbers, contact sheet and card."""
    pipe, judge = load_pipeline(config.out), load_judge()
    world = World.load(config.work / "world")
    identities = [noun for noun in world.nouns if noun.role == "identity"]
    images, _, names = draw_nouns(pipe, identities, PLAIN, SELECTION_SEED)
    scores = noun_accuracy(judge, images, names)
    ranked = sorted(identities, key=lambda noun: -scores[noun.name])[:N_IDENTITIES]
    benchmark = sorted(noun.name for noun in ranked)
    began = time.monotonic()
    images, prompts, names = draw_nouns(pipe, world.nouns, PLAIN[:2], TEST_SEED)
    seconds = (time.monotonic() - began) / len(images)
    accuracy = noun_accuracy(judge, images, names)
    scenes, scene_images = evaluate_scenes(pipe, judge, world.nouns, n_scenes, TEST_SEED + 5000)
    records = [config.work / f"{part}.json" for part in TRAINED]
    numbers = {
        "judge": evaluate_judge(world, judge, pipe.vae),
        "sae": load_sae().metrics,
        "noun_top1": mean(accuracy.values()),
        "noun_top1_benchmark": mean(accuracy[name] for name in benchmark),
        "design": evaluate_designs(pipe, judge, world, n_designs, TEST_SEED + 7000),
        "scenes_both": scenes,
        "clip_judge_agreement": rank_agreement(judge, images, prompts, names),
        "seconds_per_image": seconds,
        "steps": STEPS, "guidance_scale": GUIDANCE_SCALE,
        "n_nouns": len(world.nouns), "n_images": len(world.rgba),
        "training": {part.stem: json.loads(part.read_text()) for part in records if part.exists()},
        "weakest": sorted((name for name in accuracy if accuracy[name] < 1), key=lambda name: accuracy[name])[:30],
    }  # fmt: skip
    (config.out / "benchmark.json").write_text(json.dumps({"identities": benchmark, "accuracy": accuracy}, indent=1))
    (config.out / "metrics.json").write_text(json.dumps(numbers, indent=1))
    chosen = random.Random(0).sample(range(len(images)), 92)
    sheet = torch.cat([images[sorted(chosen)], scene_images[:8]])
    contact_sheet(sheet, 10).save(config.out / "contact-sheet.png")
    (config.out / "README.md").write_text(card(numbers), encoding="utf-8")
    return numbers
