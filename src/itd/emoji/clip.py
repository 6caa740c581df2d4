"""Tokenizer and CLIP of the embedded world, trained contrastively on captions and renders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
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
from itd.emoji.data import BACKGROUNDS, DESIGNS, World
from itd.emoji.images import background_colors, paste, pick, premultiply, side_by_side
from itd.emoji.judge import conv
from itd.emoji.stages import StageConfig, run_stage

VOCABULARY = 4096
MAX_TOKENS = 40
EMBEDDING = 256
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
    build: Any = CLIPTokenizer
    clip_tokenizer: CLIPTokenizer = build(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)
    clip_tokenizer.save_pretrained(folder)
    return clip_tokenizer


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
    """Build the untrained CLIP: a 6-layer, 256-wide text tower and a 4-layer vision transformer with 8 x 8 patches."""
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=EMBEDDING, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8,
        projection_dim=EMBEDDING,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING))


class Teacher(nn.Module):
    """The text tower in training, against a convolutional image tower that learns faster than a transformer.

    Both towers' embeddings are also told to lie near a learned point of their noun.
    """

    def __init__(self, clip: CLIPModel, n_nouns: int) -> None:
        super().__init__()
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.logit_scale = clip.logit_scale
        self.eye = nn.Sequential(
            nn.AvgPool2d(2), conv(3, 32, 1), conv(32, 64, 2), conv(64, 96, 1), conv(96, 128, 2),
            conv(128, 192, 1), conv(192, 256, 2), nn.Flatten(), nn.Linear(256 * 16, EMBEDDING),
        )  # fmt: skip
        self.proxies = nn.Linear(EMBEDDING, n_nouns, bias=False)

    def see(self, pixels: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "n 256"]:
        return F.normalize(self.eye(pixels.contiguous(memory_format=torch.channels_last)), dim=-1)

    def read(self, tokens: Any) -> Float[Tensor, "n 256"]:
        pooled = self.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(self.text_projection(pooled), dim=-1)

    def forward(self, tokens: Any, pixels: Tensor, nouns: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the contrastive loss plus half the mean cross-entropy to the nouns (n, n_nouns) of each pair."""
        text, image, scale = self.read(tokens), self.see(pixels), self.logit_scale.exp().clamp(max=100)
        logits, labels = text @ image.T * scale, torch.arange(len(pixels))
        contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        proxies = F.normalize(self.proxies.weight, dim=1) * scale
        named = [F.cross_entropy(embedding @ proxies.T, nouns) for embedding in (text, image)]
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return contrastive + (named[0] + named[1]) / 4, {
            "accuracy": accuracy,
            "text": named[0].item(),
            "image": named[1].item(),
        }


class Pairs:
    """Draws images and their captions: single stickers and, in a quarter of the cases, scenes."""

    def __init__(self, world: World, words: list[str], seed: int) -> None:
        self.world, self.seed = world, seed
        self.source = CaptionSource(world.nouns, words)
        self.stickers, self.colors, self.names = premultiply(world.rgba), background_colors(), list(BACKGROUNDS)
        self.nouns = torch.from_numpy(world.noun)

    def caption(self, image: int, other: int | None, shade: int, rng: random.Random) -> str:
        shown = self.names[shade] if shade or rng.random() < 0.2 else None
        noun = int(self.world.noun[image])
        if other is not None:
            return self.source.pair(noun, int(self.world.noun[other]), None, shown, rng)
        design = DESIGNS[self.world.design[image]] if rng.random() < 0.7 else None
        return self.source.single(noun, design, shown, rng)

    def draw(self, n: int, step: int) -> tuple[Tensor, list[str], Tensor]:
        """Return pixels (n, 3, 64, 64) in [-1, 1], captions, and the nouns shown (n, n_nouns), summing to 1."""
        rng, n_nouns = random.Random(self.seed * 1_000_003 + step), len(self.world.nouns)
        index, other, shade = pick(n, len(self.stickers)), pick(n // 4, len(self.stickers)), pick(n, len(self.names))
        shade[torch.rand(n) < 0.4] = 0
        images, shown = self.stickers[index], F.one_hot(self.nouns[index], n_nouns).float()
        images[: n // 4] = side_by_side(images[: n // 4], self.stickers[other])
        shown[: n // 4] = (shown[: n // 4] + F.one_hot(self.nouns[other], n_nouns)) / 2
        rights = [*other.tolist(), *[None] * n]
        rows = enumerate(zip(index.tolist(), shade.tolist(), strict=True))
        texts = [self.caption(image, rights[row], color, rng) for row, (image, color) in rows]
        pixels = paste(images, self.colors[shade]).roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3))
        return pixels + 0.03 * torch.randn_like(pixels), texts, shown


def train_clip(
    world: World, words: list[str], tokenizer: CLIPTokenizer, config: StageConfig, vision: StageConfig, folder: Path
) -> CLIPModel:
    """Train the text tower with the symmetric contrastive loss, then the vision transformer towards the same embedding."""
    torch.manual_seed(config.seed)
    pairs, clip = Pairs(world, words, config.seed), build_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(2.6)
    teacher = Teacher(clip, len(world.nouns))

    def text_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, texts, shown = pairs.draw(config.batch_size, step)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return teacher(tokens, pixels, shown)

    run_stage("clip", folder, teacher, config, text_loss)
    student = nn.ModuleDict({"model": clip.vision_model, "projection": clip.visual_projection})

    def vision_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, _, _ = pairs.draw(vision.batch_size, step)
        with torch.no_grad():
            goal = teacher.see(pixels)
        mine = F.normalize(student["projection"](student["model"](pixels).pooler_output), dim=-1)
        logits, labels = mine @ goal.T * 30, torch.arange(len(pixels))
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return F.cross_entropy(logits, labels) + 4 * (1 - (mine * goal).sum(1)).mean(), {"accuracy": accuracy}

    run_stage("vision", folder, student, vision, vision_loss)
    clip.eval().save_pretrained(folder / "clip")
    clip_processor(tokenizer).save_pretrained(folder / "clip")
    return clip


def clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Pair the tokenizer with the preprocessing of the vision tower: 64 x 64, to [-1, 1]."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return CLIPProcessor(images, tokenizer)
