"""Tokenizer and CLIP of the embedded world, trained contrastively on captions and renders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from itd.emoji.captions import CaptionSource
from itd.emoji.data import BACKGROUNDS, DESIGNS, UNSAID, World
from itd.emoji.images import background_colors, paste, pick, premultiply, side_by_side
from itd.emoji.judge import conv, degrade, warp
from itd.emoji.stages import StageConfig, run_stage

VOCABULARY = 4096
VOCABULARY_FILES = "vocab.json", "merges.txt"
MAX_TOKENS = 40
EMBEDDING = 256
SHARPNESS = 30.0
"""Inverse temperature of the classification by cosine."""
BOS, EOS = 0, 1
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Train a CLIP-format byte-pair encoding: lower case, end-of-word suffix, padded with the end token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    write_vocabulary(model["vocab"], merges, folder)
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=MAX_TOKENS)
    clip_tokenizer.save_pretrained(folder)
    return clip_tokenizer


def write_vocabulary(vocabulary: dict[str, int], merges: Iterable[tuple[str, ...]], folder: Path) -> None:
    """Write a byte-pair encoding as `vocab.json` and `merges.txt`: transformers 4 reads no other form."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOCABULARY_FILES[0]).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / VOCABULARY_FILES[1]).write_text("\n".join(lines), encoding="utf-8")


def tokenizer_texts(world: World, words: list[str], n_captions: int = 60_000) -> Iterator[str]:
    """Yield what the tokenizer is trained on: captions, names, tags and the most common English words."""
    rng = random.Random(0)
    source = CaptionSource(world.nouns, words)
    for _ in range(n_captions):
        yield random_caption(world, source, rng)
    for noun in world.nouns:
        yield from (noun.name, *noun.tags)
    for rank, word in enumerate(words):
        yield from [word] * (8 if rank < 1500 else 2)


def random_caption(world: World, source: CaptionSource, rng: random.Random) -> str:
    """Caption a random image of the world: a single noun, or in a quarter of the cases a scene."""
    design = rng.choice(DESIGNS) if rng.random() < 0.7 else None
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.5 else None
    noun = rng.randrange(len(world.nouns))
    if rng.random() < 0.25:
        return source.pair(noun, rng.randrange(len(world.nouns)), design, background, rng)
    return source.single(noun, design, background, rng)


def build_clip() -> CLIPModel:
    """Build the untrained CLIP: a 6-layer, 256-wide text tower and a 4-layer vision transformer with 8 x 8 patches.

    Token embeddings start as large as what a layer writes, so that a word stays readable in the residual stream.
    """
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=EMBEDDING, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8,
        projection_dim=EMBEDDING,
    )  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING))
    with torch.no_grad():
        clip.text_model.embeddings.token_embedding.weight.mul_(10)
        clip.logit_scale.fill_(2.6)
    return clip


class Labels(NamedTuple):
    """What an image shows, or what its caption says of it."""

    nouns: Float[Tensor, "n nouns"]
    """Each row sums to 1; a scene has two nouns."""
    design: Int[Tensor, " n"]
    """Index of the design, or UNSAID."""
    background: Int[Tensor, " n"]
    """Index of the background, or UNSAID."""


class Eye(nn.Module):
    """A convolutional image tower, which learns faster than a transformer: it sets the space that both towers are drawn to.

    An embedding lies near the learned directions of its nouns, its design and its background.
    """

    def __init__(self, n_nouns: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AvgPool2d(2), conv(3, 32, 1), conv(32, 64, 2), conv(64, 96, 1), conv(96, 128, 2),
            conv(128, 192, 1), conv(192, 256, 2), nn.Flatten(), nn.Linear(256 * 16, EMBEDDING),
        )  # fmt: skip
        self.nouns = nn.Linear(EMBEDDING, n_nouns, bias=False)
        self.designs = nn.Linear(EMBEDDING, len(DESIGNS), bias=False)
        self.backgrounds = nn.Linear(EMBEDDING, len(BACKGROUNDS), bias=False)

    def forward(self, pixels: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "n 256"]:
        return F.normalize(self.body(pixels.contiguous(memory_format=torch.channels_last)), dim=-1)

    def naming_loss(self, embedding: Float[Tensor, "n 256"], labels: Labels) -> Float[Tensor, ""]:
        """Return the mean cross-entropy to nouns, design and background, of which those unsaid count nothing."""

        def logits(directions: nn.Linear) -> Tensor:
            return embedding @ F.normalize(directions.weight, dim=1).T * SHARPNESS

        attributes = ((self.designs, labels.design), (self.backgrounds, labels.background))
        loss = F.cross_entropy(logits(self.nouns), labels.nouns, reduction="sum")
        for directions, said in attributes:
            loss = loss + F.cross_entropy(logits(directions), said, ignore_index=UNSAID, reduction="sum")
        return loss / len(embedding)


class Reader(nn.Module):
    """The text tower in training: tokens to a unit embedding."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.text_model, self.text_projection, self.logit_scale = clip.text_model, clip.text_projection, clip.logit_scale

    def forward(self, tokens: Any, n_chunks: int = 4) -> Float[Tensor, "n 256"]:
        """Read captions in chunks of like length, so that little is spent on padding, which a causal tower need not mask."""
        ids, lengths = tokens["input_ids"], tokens["attention_mask"].sum(1)
        order = lengths.argsort()
        pooled = [self.text_model(ids[rows, : int(lengths[rows[-1]])]).pooler_output for rows in order.chunk(n_chunks)]
        return F.normalize(self.text_projection(torch.cat(pooled)[order.argsort()]), dim=-1)


@dataclass(frozen=True)
class Shots:
    """A batch of images to draw: a sticker, in a scene a second one, and a background, each by index."""

    left: Int[Tensor, " n"]
    right: Int[Tensor, " n"]
    """-1 where the image is a single sticker."""
    shade: Int[Tensor, " n"]


class Studio:
    """Draws images of the world and says what they show.

    Most are single stickers, a quarter are scenes of two in one design.
    """

    def __init__(self, world: World) -> None:
        self.world, self.stickers, self.colors = world, premultiply(world.rgba), background_colors()
        self.nouns, self.designs = torch.from_numpy(world.noun), torch.from_numpy(world.design)
        self.members = [torch.nonzero(self.designs == design)[:, 0] for design in range(len(DESIGNS))]

    def shots(self, n: int) -> Shots:
        left, right, shade = pick(n, len(self.stickers)), torch.full((n,), -1), pick(n, len(self.colors))
        shade[torch.rand(n) < 0.4] = 0
        for row in range(n // 4):
            members = self.members[int(self.designs[left[row]])]
            right[row] = members[pick(1, len(members))]
        return Shots(left, right, shade)

    def pixels(self, shots: Shots, augment: bool) -> Float[Tensor, "n 3 64 64"]:
        """Return the images in [-1, 1], on demand moved, blurred, recoloured and noisy."""
        stickers, scene = self.stickers[shots.left], shots.right >= 0
        if augment:
            stickers = warp(stickers, 0.7)
        if scene.any():
            stickers[scene] = side_by_side(stickers[scene], self.stickers[shots.right[scene]])
        images = paste(stickers, self.colors[shots.shade])
        return degrade(images) if augment else images

    def labels(self, shots: Shots) -> Labels:
        n_nouns, scene = len(self.world.nouns), shots.right >= 0
        shown = F.one_hot(self.nouns[shots.left], n_nouns).float()
        shown[scene] = (shown[scene] + F.one_hot(self.nouns[shots.right[scene]], n_nouns)) / 2
        return Labels(shown, self.designs[shots.left], shots.shade)


def caption_shots(studio: Studio, shots: Shots, source: CaptionSource, rng: random.Random) -> tuple[list[str], Labels]:
    """Caption images, naming most designs and all backgrounds but white; the labels hold what the captions say."""
    labels, names, texts = studio.labels(shots), list(BACKGROUNDS), []
    design, background = labels.design.clone(), labels.background.clone()
    for row, (left, right, shade) in enumerate(zip(shots.left, shots.right, shots.shade, strict=True)):
        named, shown = rng.random() < 0.7, bool(shade) or rng.random() < 0.2
        design[row] = design[row] if named else UNSAID
        background[row] = shade if shown else UNSAID
        style, ground = DESIGNS[int(design[row])] if named else None, names[int(shade)] if shown else None
        noun = int(studio.nouns[left])
        if right >= 0:
            texts.append(source.pair(noun, int(studio.nouns[right]), style, ground, rng))
        else:
            texts.append(source.single(noun, style, ground, rng))
    return texts, Labels(labels.nouns, design, background)


def train_clip(
    world: World, words: list[str], tokenizer: CLIPTokenizer, eye_config: StageConfig, text: StageConfig, folder: Path
) -> CLIPModel:
    """Train a convolutional image tower to name what it sees, then the text tower towards it.

    Loss of the text tower: symmetric contrastive against the fixed image embeddings, plus half the naming loss of what the
    caption says.
    Source: Zhai et al. 2022, LiT: zero-shot transfer with locked-image text tuning.
    """
    torch.manual_seed(text.seed)
    studio, clip, source = Studio(world), build_clip(), CaptionSource(world.nouns, words)
    eye = train_eye(studio, eye_config, folder)
    for parameter in eye.parameters():
        parameter.requires_grad_(False)
    album, embeddings = fill_album(studio, eye)
    reader = Reader(clip)

    def text_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = pick(text.batch_size, len(album.left))
        shots = Shots(album.left[rows], album.right[rows], album.shade[rows])
        texts, labels = caption_shots(studio, shots, source, random.Random(text.seed * 1_000_003 + step))
        read = reader(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))
        logits = read @ embeddings[rows].T * reader.logit_scale.exp().clamp(max=100)
        goal = torch.arange(len(rows))
        contrastive = (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)) / 2
        named = eye.naming_loss(read, labels)
        accuracy = (logits.argmax(1) == goal).float().mean().item()
        return contrastive + 0.5 * named, {"accuracy": accuracy, "naming": named.item()}

    run_stage("clip", folder, reader, text, text_loss)
    return clip.eval()


def train_eye(studio: Studio, config: StageConfig, folder: Path) -> Eye:
    """Train the convolutional image tower on augmented images."""
    torch.manual_seed(config.seed)
    eye = Eye(len(studio.world.nouns))

    def eye_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        shots = studio.shots(config.batch_size)
        loss = eye.naming_loss(eye(studio.pixels(shots, augment=True)), studio.labels(shots))
        return loss, {}

    trained = run_stage("eye", folder, eye, config, eye_loss)
    assert isinstance(trained, Eye)
    return trained


@torch.no_grad()
def fill_album(studio: Studio, eye: Eye, n: int = 48_000, seed: int = 0) -> tuple[Shots, Float[Tensor, "n 256"]]:
    """Draw the images whose captions the text tower learns from, and embed them."""
    torch.manual_seed(seed)
    parts = [studio.shots(512) for _ in tqdm(range(n // 512), desc="draw", disable=True)]
    embeddings = [eye(studio.pixels(part, augment=False)) for part in tqdm(parts, desc="embed images", mininterval=5)]
    fields = zip(*((part.left, part.right, part.shade) for part in parts), strict=True)
    return Shots(*(torch.cat(field) for field in fields)), torch.cat(embeddings)


def train_vision(world: World, clip: CLIPModel, eye_config: StageConfig, config: StageConfig, folder: Path) -> None:
    """Train the vision transformer towards the embeddings of the convolutional tower that `train_clip` has left in `folder`."""
    torch.manual_seed(config.seed)
    studio = Studio(world)
    eye = train_eye(studio, eye_config, folder)
    student = nn.ModuleDict({"model": clip.vision_model, "projection": clip.visual_projection})

    def vision_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels = studio.pixels(studio.shots(config.batch_size), augment=True)
        with torch.no_grad():
            goal = eye(pixels)
        mine = F.normalize(student["projection"](student["model"](pixels).pooler_output), dim=-1)
        logits, labels = mine @ goal.T * SHARPNESS, torch.arange(len(pixels))
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return F.cross_entropy(logits, labels) + 4 * (1 - (mine * goal).sum(1)).mean(), {"accuracy": accuracy}

    run_stage("vision", folder, student, config, vision_loss)


def clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Pair the tokenizer with the preprocessing of the vision tower: 64 x 64, to [-1, 1]."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return CLIPProcessor(images, tokenizer)
