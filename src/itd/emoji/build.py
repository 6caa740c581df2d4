"""Build the embedded world from the npm packages: fetch, render, train each part, assemble, evaluate, write the card.

Every stage keeps what it made under one folder and is skipped, or goes on, when it is run again.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from itd.activations import record
from itd.emoji.clip import VOCABULARY_FILES, clip_processor, tokenizer_texts, train_clip, train_tokenizer, train_vision
from itd.emoji.data import DESIGNS, NAMES_SOURCE, SOURCES, WORDS_SOURCE, World, render_world
from itd.emoji.judge import Judge, train_judge
from itd.emoji.on_policy import train_on_policy
from itd.emoji.stages import StageConfig
from itd.emoji.unet import PoolConfig, build_pool, build_scheduler, train_latent_eye, train_unet
from itd.emoji.vae import train_decoder, train_vae
from itd.sae import SAEConfig
from itd.training import TrainConfig, train

logger = logging.getLogger(__name__)

N_WORDS = 6000
"""Common English words that captions are mixed with."""
PREFIX = "text_model."


@dataclass(frozen=True)
class WorldConfig:
    """Settings of every stage."""

    vae: StageConfig
    decoder: StageConfig
    eye: StageConfig
    clip: StageConfig
    vision: StageConfig
    judge: StageConfig
    latent_eye: StageConfig
    unet: StageConfig
    unet_on_policy: StageConfig
    pool: PoolConfig
    sae: SAEConfig
    sae_training: TrainConfig
    work: Path = Path("runs/emoji")
    """Where sources, checkpoints and unassembled parts are kept."""
    out: Path = Path("models/emoji")
    """The shipped folder."""


def package_folder(package: str, sources: Path) -> Path:
    """Return the unpacked npm package, fetching it when it is not there.

    Raises:
        RuntimeError: npm is missing or could not get the package.
    """
    folder = sources / package.replace("@", "").replace("/", "-")
    if not (folder / "package").is_dir():
        if shutil.which("npm") is None:
            raise RuntimeError("npm is needed to fetch the emoji designs: install Node.js")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm pack {package} failed: {done.stderr.strip()}")
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def fetch_world(config: WorldConfig) -> tuple[World, list[str]]:
    """Fetch the designs and names, render them once, and return the world and the filler words."""
    sources, folder = config.work / "sources", config.work / "world"
    words_file = package_folder(WORDS_SOURCE, sources) / "build" / "resources" / "english.txt"
    if not (folder / "renders.npz").exists():
        packages = {design: package_folder(package, sources) for design, package in SOURCES.items()}
        render_world(packages, package_folder(NAMES_SOURCE, sources)).save(folder)
    world = World.load(folder)
    return world, filler(words_file.read_text(encoding="utf-8").split(), world)


def filler(words: list[str], world: World) -> list[str]:
    """Return the most common words that neither name nor imply a noun of the world."""
    said = {word for noun in world.nouns for phrase in (noun.name, *noun.implicit, *DESIGNS) for word in phrase.split()}
    return [word for word in words if len(word) > 1 and word not in said][:N_WORDS]


def build_world(config: WorldConfig, measured: bool = True) -> None:
    """Run every stage that is not done, then assemble and, where it is to be `measured`, evaluate."""
    from itd.emoji.evaluate import evaluate_world

    world, words = fetch_world(config)
    tokenizer = build_tokenizer(world, words, config)
    judge = build_judge(world, config)
    vae = build_vae_stage(world, config)
    clip = build_clip_stage(world, words, tokenizer, config)
    build_unet_stage(world, words, vae, clip, tokenizer, config)
    build_vision_stage(world, clip, tokenizer, config)
    build_decoder_stage(world, vae, config)
    assemble(world, words, judge, config)
    train_sae(config)
    if measured:
        evaluate_world(config)


def build_tokenizer(world: World, words: list[str], config: WorldConfig) -> CLIPTokenizer:
    folder = config.work / "tokenizer"
    if not folder.exists():
        train_tokenizer(tokenizer_texts(world, words), folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def build_judge(world: World, config: WorldConfig) -> Judge:
    if not (config.work / "judge").exists():
        train_judge(world, config.judge, config.work)
    return Judge.load(config.work / "judge")


def build_vae_stage(world: World, config: WorldConfig) -> AutoencoderKL:
    if not (config.work / "vae").exists():
        train_vae(world, config.vae, config.work)
    return AutoencoderKL.from_pretrained(config.work / "vae", local_files_only=True).eval()


def build_decoder_stage(world: World, vae: AutoencoderKL, config: WorldConfig) -> None:
    """Train the decoder on, now that the image latents are settled, and write the whole autoencoder."""
    if not (config.work / "autoencoder").exists():
        train_decoder(world, vae, config.decoder, config.work)


def build_clip_stage(world: World, words: list[str], tokenizer: CLIPTokenizer, config: WorldConfig) -> CLIPModel:
    if not (config.work / "text").exists():
        train_clip(world, words, tokenizer, config.eye, config.clip, config.work).save_pretrained(config.work / "text")
    return CLIPModel.from_pretrained(config.work / "text", local_files_only=True).eval()


def build_vision_stage(world: World, clip: CLIPModel, tokenizer: CLIPTokenizer, config: WorldConfig) -> None:
    """Give the CLIP its vision tower and write it whole."""
    if not (config.work / "clip").exists():
        train_vision(world, clip, config.eye, config.vision, config.work)
        clip_processor(tokenizer).save_pretrained(config.work / "clip")
        clip.eval().save_pretrained(config.work / "clip")


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """Return the text tower of a CLIP as the text encoder of a pipeline, fp32."""
    text_config: Any = clip.config.text_config
    encoder = CLIPTextModel(text_config).eval()
    prefix = PREFIX if any(key.startswith(PREFIX) for key in encoder.state_dict()) else ""
    tower = clip.text_model.state_dict()
    encoder.load_state_dict({prefix + key.removeprefix(PREFIX): value for key, value in tower.items()})
    return encoder


def build_unet_stage(
    world: World, words: list[str], vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, config: WorldConfig
) -> UNet2DConditionModel:
    finished, first = config.work / "unet_on_policy", config.work / "unet"
    if not finished.exists():
        pool = build_pool(world, words, vae, text_tower(clip), tokenizer, config.pool, config.work)
        eye = train_latent_eye(pool, len(world.nouns), config.latent_eye, config.work)
        if not first.exists():
            train_unet(pool, eye, config.unet, config.work)
        unet = UNet2DConditionModel.from_pretrained(first, local_files_only=True)
        train_on_policy(world, pool, eye, vae, unet, config.unet_on_policy, config.work)
    return UNet2DConditionModel.from_pretrained(finished, local_files_only=True).eval()


def assemble(world: World, words: list[str], judge: Judge, config: WorldConfig) -> None:
    """Write the shipped folder: the pipeline, the CLIP and the judge in fp16, nouns and words.

    Unfinished training can be assembled too: the parts are read from the working folder.
    """
    out, work = config.out, config.work
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)
    clip = CLIPModel.from_pretrained(work / "clip", local_files_only=True).half()
    build: Any = StableDiffusionPipeline  # its annotations do not allow to leave the safety checker out
    pipe = build(
        vae=AutoencoderKL.from_pretrained(work / "autoencoder", local_files_only=True).half(),
        text_encoder=text_tower(clip.float()).half(), tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet_on_policy", local_files_only=True).half(),
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(out)
    add_prefix(out / "text_encoder" / "model.safetensors")
    save_clip(clip.half(), tokenizer, out)
    for folder in ("tokenizer", "clip"):
        copy_vocabulary(work / "tokenizer", out / folder)
    judge.save(out / "judge")
    shutil.copy(work / "world" / "nouns.json", out / "nouns.json")
    (out / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def add_prefix(path: Path) -> None:
    """Name text-encoder weights as published checkpoints do, `text_model.*`, which old and new transformers read."""
    tensors = load_file(path)
    save_file({PREFIX + key.removeprefix(PREFIX): value for key, value in tensors.items()}, path, metadata={"format": "pt"})


def copy_vocabulary(tokenizer: Path, folder: Path) -> None:
    """Put the files that transformers 4 reads a tokenizer from beside those of transformers 5."""
    for name in VOCABULARY_FILES:
        shutil.copy(tokenizer / name, folder / name)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the CLIP as two shards, of which the text tower is the pipeline's own file: it is not stored twice."""
    folder = out / "clip"
    shutil.rmtree(folder, ignore_errors=True)
    clip.config.save_pretrained(folder)
    clip_processor(tokenizer).save_pretrained(folder)
    rest = {k: v.contiguous() for k, v in clip.state_dict().items() if not k.startswith(PREFIX)}
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    text_file = "../text_encoder/model.safetensors"
    shards = {key: "model-rest.safetensors" for key in rest}
    shards |= {key: text_file for key in load_file(out / "text_encoder" / "model.safetensors")}
    index = {"metadata": {"total_size": sum(p.numel() * 2 for p in clip.parameters())}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def train_sae(config: WorldConfig) -> None:
    """Record the world's prompts at the hook point and train the shipped autoencoder, in fp16."""
    from itd.emoji import HOOK_POINT, load_pipeline
    from itd.emoji.prompts import world_prompts

    pipe = load_pipeline(config.out)
    store = record(pipe, HOOK_POINT, world_prompts(), config.work / "activations")
    sae = train(store, config.sae, config.sae_training, config.work / "sae")
    sae.save(config.out / "sae", torch.float16)


def few_steps(config: WorldConfig, work: Path, out: Path) -> WorldConfig:
    """Return a configuration of a few steps per stage, which shows that the recipe runs."""

    def few(stage: StageConfig) -> StageConfig:
        return replace(stage, steps=2, batch_size=8)

    return replace(
        config, vae=few(config.vae), decoder=few(config.decoder), eye=few(config.eye), clip=few(config.clip),
        vision=few(config.vision), judge=few(config.judge), latent_eye=few(config.latent_eye), unet=few(config.unet),
        unet_on_policy=few(config.unet_on_policy), pool=PoolConfig(64, 16),
        sae_training=replace(config.sae_training, n_tokens=2048), work=work, out=out,
    )  # fmt: skip
