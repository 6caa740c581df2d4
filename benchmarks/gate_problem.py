"""The gate's benchmark at paper size: a CLIP-sized text tower, captions, an autoencoder of realistic sparsity, 50 erased names.

No weights of Stable Diffusion are needed, as a forward pass costs the same whatever its weights. The tower is CLIP ViT-L/14's
text model up to layer 8 with random weights. Its tokenizer is a byte-level BPE learnt from the captions.

The autoencoder is made, not trained. Its decoder rows are directions of the tower's own activations: each is the difference of
a token's activation and the mean, mixed with another token's and with noise, the tokens taken in turn. The encoder rows equal
the decoder rows. The biases fall with the logarithm of a latent's rank, so that activation frequencies follow a power law, as
in trained autoencoders; how steeply, is found by bisection: the sixteenth of the latents with the largest biases takes the
same share of all activations as the sixteenth that is active most often does in the embedded world's trained autoencoder, on
captions that it was not chosen on. What the early exit then meets is recorded as `made_share`: the share that latents chosen
on the prompts to fit take of the activations of those to calibrate. Names are erased by `itd.erase` itself, from public lists
of names, against other names and captions; those that it warns of, as the autoencoder has no features of them, give way to
others.
"""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.activations import PROMPTS
from benchmarks.environments import ROOT
from itd import SAE, Eraser, HookPoint, Prompt, PromptSet, Retained, SAEConfig, emoji, erase
from itd.activations import stream_contents
from itd.kernels import SparseCodes
from itd.pipelines import token_rows

logger = logging.getLogger(__name__)

FOLDER = ROOT / "runs" / "bench" / "gate"
FRAMES = {
    "fit": ("a portrait of {}", "{} at a public event", "a photo of {} in the street", "a sketch of {}"),
    "calibrate": ("an oil painting of {}", "{} gives a speech in a hall", "a picture of {} with friends"),
}


@dataclass(frozen=True)
class Problem:
    """Size of the benchmark."""

    n_latents: int = 2**19
    """Rows of encoder and decoder."""
    k: int = 64
    """Latents that may be active at a position."""
    d_model: int = 768
    """Width of the text tower; it has d_model / 64 heads."""
    layers: int = 9
    """Layers of the tower up to the hook point."""
    n_concepts: int = 50
    """Names that are erased."""
    captions: int = 2000
    """Captions in the stream that is gated."""
    retained: int = 1000
    """Other captions that must pass, for selection and calibration."""

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.d_model}-{self.layers}-{self.n_latents}-{self.k}-{self.n_concepts}-{self.retained}"

    @property
    def site(self) -> HookPoint:
        return HookPoint("text_encoder", f"encoder.layers.{self.layers - 1}")


# Prompts


def read_column(name: str, column: str = "prompt") -> list[str]:
    with (PROMPTS / name).open(newline="", encoding="utf-8-sig") as file:
        return [row[column] for row in csv.DictReader(file)]


def captions() -> tuple[list[str], str]:
    """Return captions and what they are: real ones where the prompt folder is, else the embedded world's."""
    if (PROMPTS / "coco_30k.csv").is_file():
        return list(dict.fromkeys(read_column("coco_30k.csv"))), "COCO"
    from itd.emoji.prompts import world_prompts

    return list(dict.fromkeys(world_prompts().texts)), "embedded world"


def names(n: int) -> list[str]:
    """Return n names to erase, or to keep: of public figures and artists where the lists are, then of the embedded world."""
    found: list[str] = []
    for file in ("celebrity_target.csv", "celebrity_remain.csv", "style_target.csv", "style_remain.csv"):
        if (PROMPTS / file).is_file():
            column = next(name for name in ("class", "artist", "concept", "prompt") if name in header(file))
            found += read_column(file, column)
    found += [noun.name for noun in emoji.nouns()]
    distinct = list(dict.fromkeys(found))
    if len(distinct) < n:
        raise ValueError(f"there are {len(distinct)} names, {n} are asked for; ask for fewer concepts")
    return distinct[:n]


def header(name: str) -> list[str]:
    with (PROMPTS / name).open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file))


def name_prompts(listed: list[str]) -> PromptSet:
    """Put names into frames, those to fit and those to calibrate on."""
    return PromptSet(
        tuple(
            Prompt(frame.format(name), name, frame, split)  # pyright: ignore[reportArgumentType]
            for name in listed
            for split, frames in FRAMES.items()
            for frame in frames
        )
    )


# The text tower


def build_tokenizer(texts: list[str]) -> Any:
    """Learn a tokenizer of CLIP's kind from texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=49_000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for piece in [*letters, *(letter + "</w>" for letter in letters), *model["vocab"]]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def build_tower(problem: Problem) -> Any:
    """Return what the gate needs of a pipeline: the text tower and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer([*captions()[0], *name_prompts(names(4 * problem.n_concepts)).texts])
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49_408, hidden_size=problem.d_model, intermediate_size=4 * problem.d_model, num_hidden_layers=problem.layers,
        num_attention_heads=problem.d_model // 64, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    encoder.get_input_embeddings().weight.mul_(10)  # words count more than places, as in trained towers
    return SimpleNamespace(text_encoder=encoder, tokenizer=tokenizer, components={"text_encoder": encoder})


def content_states(pipe: Any, site: HookPoint, texts: list[str], most: int) -> Tensor:
    """Return up to `most` distinct activations of the texts' content tokens."""
    seen: set[bytes] = set()
    parts: list[Tensor] = []
    for contents in stream_contents(pipe, site, token_rows(pipe, site.encoder, texts), texts):
        new = [i for i, key in enumerate(contents.keys) if key not in seen]
        seen.update(contents.keys)
        parts.append(contents.x[new])
        if sum(map(len, parts)) >= most:
            break
    return torch.cat(parts)[:most]


# The autoencoder


def share_on(latents: Tensor, codes: SparseCodes, n_latents: int) -> float:
    """Return the share of activations that falls on some latents."""
    marked = torch.zeros(n_latents, dtype=torch.bool)
    marked[latents] = True
    active = codes.acts > 0
    return float((marked[codes.indices] & active).sum() / active.sum())


def most_active(codes: SparseCodes, n_latents: int) -> Tensor:
    """Return the sixteenth of the latents that is active most often."""
    counts = torch.bincount(codes.indices[codes.acts > 0].flatten(), minlength=n_latents)
    return counts.topk(max(1, n_latents // 16)).indices


def trained_share() -> float:
    """Return the share in the embedded world's trained autoencoder: latents chosen on half of its tokens, share of the rest."""
    from itd.emoji.prompts import world_prompts

    pipe, sae = emoji.load_pipeline(), emoji.load_sae()
    x = content_states(pipe, emoji.HOOK_POINT, world_prompts().sample(2000).texts, 4000)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    halves = [sae.encode(x[part]) for part in order.chunk(2)]
    return share_on(most_active(halves[0], sae.config.n_latents), halves[1], sae.config.n_latents)


def build_sae(problem: Problem, x: Tensor, share: float, n_tokens: int = 192) -> SAE:
    """Make the autoencoder from activations; see above."""
    generator = torch.Generator().manual_seed(1)
    mean = x.mean(0)
    centred = x - mean
    W = torch.empty(problem.n_latents, problem.d_model)
    for rows in torch.arange(problem.n_latents).split(2**14):
        other = torch.randint(len(x), (len(rows),), generator=generator)
        noise = torch.randn(len(rows), problem.d_model, generator=generator) * centred.std()
        W[rows] = torch.nn.functional.normalize(centred[rows % len(x)] + 0.5 * centred[other] + noise, dim=1)
    rank = torch.randperm(problem.n_latents, generator=generator) + 1.0
    fall = -(rank.log() / torch.tensor(float(problem.n_latents)).log())
    sample = centred[torch.randperm(len(x), generator=generator)[:n_tokens]]
    low, high, size = 0.0, 4.0, float(centred.norm(dim=1).mean())
    pre_acts = sample @ W.T
    often = rank.topk(max(1, problem.n_latents // 16), largest=False).indices
    steep = 0.0
    for _ in range(9):
        steep = (low + high) / 2
        active = SparseCodes(torch.ones(len(sample), problem.k), (pre_acts + steep * size * fall).topk(problem.k).indices)
        low, high = (steep, high) if share_on(often, active, problem.n_latents) < share else (low, steep)
    bias = steep * size * fall
    bias += float((-(pre_acts + bias).topk(problem.k).values[:, -1]).clamp_min(0).max())  # k latents are active at every token
    return SAE(SAEConfig(problem.d_model, problem.n_latents, problem.k), W, bias, W.clone(), mean, problem.site)


# On disk


def prepare(problem: Problem) -> Path:
    """Make tower, autoencoder, statistics and eraser, and save them; nothing if they are there."""
    folder = problem.folder
    if (folder / "problem.json").is_file():
        return folder
    logger.warning("making the benchmark's autoencoder of %d latents", problem.n_latents)
    pipe, (texts, source) = build_tower(problem), captions()
    listed = names(4 * problem.n_concepts)
    data = [*name_prompts(listed).texts, *texts[problem.captions :]]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2)).tolist()
    x = content_states(pipe, problem.site, [data[i] for i in order[:8000]], 40_000)
    share = trained_share()
    sae = build_sae(problem, x, share).save(folder / "sae")
    kept = name_prompts(listed[3 * problem.n_concepts :])
    other = texts[problem.captions : problem.captions + problem.retained]
    neutral = PromptSet(tuple(Prompt(text, split="calibrate" if i % 3 == 2 else "fit") for i, text in enumerate(other)))
    retained = Retained.make(pipe, sae, problem.site, kept, neutral)
    retained.save(folder / "retained")
    tried = listed[: 2 * problem.n_concepts]
    weak = erase(pipe, sae, problem.site, name_prompts(tried[: problem.n_concepts * 5 // 4]), retained).records[0]["weak"]
    chosen = [name for name in tried if name not in weak][: problem.n_concepts]
    erase(pipe, sae, problem.site, name_prompts(chosen), retained).save(folder / "eraser")
    codes = retained.calibrate_codes.codes
    made = share_on(retained.stats(problem.k).often(), codes, problem.n_latents)
    about = {
        "captions": source, "share": share, "made_share": made,
        "activations": len(x), "tokens_per_caption": float(retained.calibrate_codes.n_tokens.double().mean()),
        "active": float((codes.acts > 0).double().sum(1).mean()),
    }  # fmt: skip
    (folder / "problem.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def load_eraser(problem: Problem) -> Eraser:
    return Eraser.load(problem.folder / "eraser")
