"""Tiny real pipelines, built offline from random weights, and an eraser that knows one word from the others."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from itd import SAE, ActivationStore, Edit, Eraser, FeatureStats, Gate, HookPoint, PromptSet, SAEConfig, TrainConfig, record
from itd.activations import stream
from itd.emoji.clip import write_vocabulary
from itd.explain import Check
from itd.features import matched_filter
from itd.gate import score
from itd.pipelines import fingerprint
from itd.training import initial_weights
from itd.words import KnownWords

D_MODEL, N_LAYERS, MAX_TOKENS = 32, 3, 24
SITE = HookPoint("text_encoder", "encoder.layers.1")
NOUNS = ("cat", "dog", "horse", "house", "tree", "boat", "lamp", "cup")
FRAMES = (
    "a {}", "a photo of a {}", "a drawing of the {}", "one {} in the park", "my {} at night", "a big red {}",
    "the {} by a window", "two people and a {}", "a small {} on a table",
)  # fmt: skip


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer whose words are those of the frames and nouns; other text falls into letters."""
    from tokenizers import pre_tokenizers

    words = sorted({word for frame in FRAMES for word in frame.replace("{}", "").split()} | set(NOUNS))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges: list[tuple[str, str]] = []
    for piece in [*letters, *(letter + "</w>" for letter in letters)]:
        vocabulary.setdefault(piece, len(vocabulary))
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(pieces[-1], len(vocabulary))
    with TemporaryDirectory() as folder:
        write_vocabulary(vocabulary, merges, Path(folder))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=MAX_TOKENS)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew: zero biases and unit norms, which training starts from, hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 1.0 if "token_embedding" in name else 0.1
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def image_parts(cross_attention_dim: int, **unet: Any) -> dict[str, Any]:
    """Build the image half of a pipeline: pictures of 16 x 16 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=cross_attention_dim,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **unet,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear", set_alpha_to_one=False)
    return {"vae": randomise(vae, 11), "unet": randomise(model, 12), "scheduler": scheduler}


def build_pipeline(tokenizer: CLIPTokenizer) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        text_encoder=build_text_encoder(tokenizer), tokenizer=tokenizer, **image_parts(D_MODEL), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_safety_checker(pipe: Any) -> Any:
    """Return the pipeline with diffusers' own safety checker, whose thresholds every picture exceeds: all come out black."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    checker: Any = randomise(StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)), 13)
    checker.concept_embeds_weights.fill_(-2)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    checked = type(pipe)(**{**pipe.components, "safety_checker": checker, "feature_extractor": extractor})
    checked.set_progress_bar_config(disable=True)
    return checked


def build_xl_pipeline(tokenizer: CLIPTokenizer) -> Any:
    from diffusers import StableDiffusionXLPipeline

    parts = image_parts(
        2 * D_MODEL,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    pipe = StableDiffusionXLPipeline(
        text_encoder=build_text_encoder(tokenizer), text_encoder_2=build_text_encoder(tokenizer, 1, projection=True),
        tokenizer=tokenizer, tokenizer_2=tokenizer, **parts, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sae(pipe: Any, site: HookPoint = SITE) -> SAE:
    """Make an autoencoder of the tiny text encoder: rows taken from its activations, everything else random."""
    recorded = record(pipe, site, prompts_of(*NOUNS))
    config = SAEConfig(D_MODEL, n_latents=256, k=8)
    generator = torch.Generator().manual_seed(5)
    weights = initial_weights(recorded, config, TrainConfig(init="data", whiten=True))
    for name, scale in {"W_enc": 0.02, "b_enc": 0.1, "b_dec": 0.1}.items():
        weights[name] = weights[name] + scale * torch.randn(weights[name].shape, generator=generator)
    return SAE(config, **weights, hook_point=site)


def make_store(n: int = 600, d_model: int = 12, seed: int = 0) -> ActivationStore:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, d_model, generator=generator)
    codes = torch.rand(n, 30, generator=generator) * (torch.rand(n, 30, generator=generator) < 0.1)
    x = codes @ directions + 0.05 * torch.randn(n, d_model, generator=generator) + torch.randn(d_model, generator=generator)
    return ActivationStore(
        x, torch.randint(1, 20, (n,), generator=generator).float(), HookPoint("text_encoder", "encoder.layers.1")
    )


def prompts_of(*nouns: str) -> PromptSet:
    """Put nouns into every frame."""
    return PromptSet.from_names(nouns, FRAMES)


def make_eraser(pipe: Any, sae: SAE, noun: str, site: HookPoint = SITE, edit: Edit | None = None) -> Eraser:
    """Make an eraser whose threshold lies between the noun's prompts and all others."""
    prompts = prompts_of(noun), prompts_of(*(other for other in NOUNS if other != noun))
    stats = [FeatureStats(sae), FeatureStats(sae)]
    for part, side in zip(prompts, stats, strict=True):
        for batch in stream(pipe, site, part):
            side.update(batch.x, batch.content)
    concept = matched_filter(*stats, noun, n_features=16)

    def scores(part: PromptSet) -> torch.Tensor:
        rows = [(x, mask) for batch in stream(pipe, site, part) for x, mask in zip(batch.x, batch.content, strict=True)]
        return torch.stack([score("evidence", sae, [concept], x[mask]).concepts[0] for x, mask in rows])

    low, high = float(scores(prompts[1]).max()), float(scores(prompts[0]).min())
    assert low < high, "the tiny text encoder tells the nouns apart"
    gate = Gate("evidence", ((low + high) / 2,))
    anchors = torch.randn(2, sae.config.d_model, generator=torch.Generator().manual_seed(9))
    known = KnownWords.of(pipe, site.encoder)
    return Eraser(sae, site, (concept,), gate, edit or Edit(), fingerprint(pipe, site), anchors, words=known)


def telling_apart(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return direction and offset of a discriminant that is 1 on the first vector and 0 on the others."""
    centre = vectors[1:].mean(0)
    direction = torch.linalg.pinv(vectors - centre) @ torch.tensor([1.0] + [0.0] * (len(vectors) - 1))
    return direction[None], -(centre @ direction)[None]


def assert_check_says_what_is_enforced(eraser: Eraser, pipe: Any, prompts: list[str]) -> list[Check]:
    """Compare `check` with the gates that are attached, all of them; return the checks."""
    with eraser.attach(pipe) as attached:
        pipe.encode_prompt(prompts, "cpu", 1, False)
    checks = eraser.check(pipe, prompts)
    assert [check.fired for check in checks] == [decision.fired for decision in attached.decisions]
    for check, decision in zip(checks, attached.decisions, strict=True):
        assert check.meaning is not None
        assert decision.meaning is not None
        assert abs(check.meaning.score - decision.meaning.score) <= 1e-4
    return checks


def assert_draws_instead(eraser: Eraser, pipe: Any, prompt: str, anchor: str) -> None:
    """Compare the picture of a prompt, with the eraser attached, with that of its anchor without."""
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    wanted = pipe([anchor], generator=torch.Generator().manual_seed(0), **options).images
    with eraser.attach(pipe):
        found = pipe([prompt], generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(found, wanted)
