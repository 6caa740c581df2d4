"""Tokenizer and CLIP of the embedded world, trained contrastively on captions and renders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
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
from itd.emoji.stages import StageConfig, run_stage

VOCABULARY = 4096
MAX_TOKENS = 40
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
    clip_tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)
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
        max_position_embeddings=MAX_TOKENS, projection_dim=256, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, projection_dim=256
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=256))


def train_clip(world: World, words: list[str], tokenizer: CLIPTokenizer, config: StageConfig, folder: Path) -> CLIPModel:
    """Train with the symmetric contrastive loss on random stickers and scenes, slightly moved and recoloured."""
    torch.manual_seed(config.seed)
    stickers, colors, names = premultiply(world.rgba), background_colors(), list(BACKGROUNDS)
    source = CaptionSource(world.nouns, words)
    model = build_clip()
    with torch.no_grad():
        model.logit_scale.fill_(2.6)

    def draw(step: int) -> tuple[Tensor, list[str]]:
        n, rng = config.batch_size, random.Random(config.seed * 1_000_003 + step)
        index, other, background = pick(n, len(stickers)), pick(n // 4, len(stickers)), pick(n, len(names))
        background[torch.rand(n) < 0.4] = 0
        images, texts = stickers[index], []
        images[: n // 4] = side_by_side(images[: n // 4], stickers[other])
        for row, (image, shade) in enumerate(zip(index.tolist(), background.tolist(), strict=True)):
            shown = names[shade] if shade or rng.random() < 0.2 else None
            design = DESIGNS[world.design[image]] if rng.random() < 0.7 else None
            if row < len(other):
                right = int(world.noun[other[row]])
                texts.append(source.pair(int(world.noun[image]), right, None, shown, rng))
            else:
                texts.append(source.single(int(world.noun[image]), design, shown, rng))
        pixels = paste(images, colors[background])
        shift = torch.randint(-3, 4, (2,)).tolist()
        return pixels.roll(shift, (2, 3)) + 0.03 * torch.randn_like(pixels), texts

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, texts = draw(step)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        logits, labels = output.logits_per_text, torch.arange(len(texts))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return loss, {"accuracy": (logits.argmax(1) == labels).float().mean().item()}

    trained = run_stage("clip", folder, model, config, loss_of)
    trained.save_pretrained(folder / "clip")
    clip_processor(tokenizer).save_pretrained(folder / "clip")
    return trained


def clip_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Pair the tokenizer with the preprocessing of the vision tower: 64 x 64, to [-1, 1]."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return CLIPProcessor(images, tokenizer)
