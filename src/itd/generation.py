"""Pictures from prompts, one at a time, so that each depends on its prompt and seed only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from itd import emoji
from itd.artifacts import CONFIG, read_json
from itd.attachment import Attachment
from itd.eraser import Eraser
from itd.gate import Decision

METADATA = "metadata.json"
OWN_FILE = re.compile(r"[0-9]{3,}-[a-z0-9-]+\.png")
"""Name of a picture as it is written here: nothing else that `metadata.json` may name is deleted."""
MAX_SLUG = 60


@dataclass(frozen=True)
class Picture:
    """An image, what it was made from, and what the gates said, as `metadata.json` has it; None without an eraser."""

    image: Any
    prompt: str
    seed: int
    gate: dict[str, Any] | None


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    erasers: Sequence[Eraser],
    options: Mapping[str, Any],
    ungated: Sequence[str] = (),
    allow_new_words: bool = False,
) -> Iterator[Picture]:
    """Yield one picture per prompt and seed, with the erasers attached.

    Pictures are not batched: kernels may round differently for another batch size, and a prompt that passes the gate has to
    give the bits that the bare pipeline gives. `options` go to the pipeline, `ungated` and `allow_new_words` to
    `Eraser.attach`.

    Raises:
        ValueError: `ungated` names a text encoder that an eraser is for.
    """
    for name in (eraser.hook_point.encoder for eraser in erasers):
        if name in ungated:
            raise ValueError(f"{name} is said to be ungated, but an eraser is for it; leave one of them out")
    with ExitStack() as stack:
        attached = [stack.enter_context(eraser.attach(pipe, ungated, allow_new_words)) for eraser in erasers]
        for prompt in prompts:
            for seed in seeds:
                image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
                yield Picture(image, prompt, seed, gate_of(attached))


def pipeline_options(
    model: str | None, steps: int | None, guidance_scale: float | None, negative_prompt: str | None
) -> dict[str, Any]:
    """Return what is passed to the pipeline; what is None is left to it, or to the embedded world.

    Raises:
        ValueError: less than one step.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    world = {"num_inference_steps": emoji.STEPS, "guidance_scale": emoji.GUIDANCE_SCALE} if model is None else {}
    named = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    return world | {name: value for name, value in named.items() if value is not None}


def consecutive_seeds(first: int, n: int) -> range:
    """Return the seeds of a prompt's n images."""
    if n < 1:
        raise ValueError(f"n, the images per prompt, must be at least 1, got {n}")
    return range(first, first + n)


def write_pictures(pictures: Iterator[Picture], out: Path, total: int) -> list[dict[str, Any]]:
    """Write pictures as `000-slug.png` and their `metadata.json`; those of an earlier run in the folder go first.

    What was written before an interruption stays, with its metadata.

    Raises:
        ValueError: the folder holds something else.
    """
    for old in earlier_pictures(out):
        old.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    write_metadata(rows, out)
    for index, picture in enumerate(tqdm(pictures, desc="generate", unit="image", total=total, disable=total < 2)):
        file = f"{index:03d}-{slug(picture.prompt)}.png"
        picture.image.save(out / file)
        rows.append({"file": file, "prompt": picture.prompt, "seed": picture.seed, "gate": picture.gate})
        write_metadata(rows, out)
    return rows


def write_metadata(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    (out / METADATA).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def earlier_pictures(out: Path) -> list[Path]:
    """Return the pictures that an earlier run wrote into the folder, as its `metadata.json` names them.

    Raises:
        ValueError: the folder holds something other than such a run.
    """
    path = out / METADATA
    if not path.is_file():
        if any(each.name != CONFIG for each in out.iterdir()):
            raise ValueError(f"{out} holds something other than pictures that `itd generate` drew; name another folder")
        return []
    rows = read_json(path, "name another folder")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and OWN_FILE.fullmatch(str(r.get("file"))) for r in rows):
        raise ValueError(f"{path} is not a list of pictures that `itd generate` drew; name another folder")
    return [out / row["file"] for row in rows]


def picture_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per picture: its file and, with an eraser, what the gate said."""
    lines = []
    for row in rows:
        gate = row["gate"]
        verdict = "" if gate is None else f"  fires: {', '.join(gate['concepts'])}" if gate["fired"] else "  passes"
        lines.append(f"{row['file']}{verdict}")
    return lines


def gate_of(attachments: Sequence[Attachment]) -> dict[str, Any] | None:
    """Return what attached erasers said of the last prompt, for JSON; None without an eraser.

    Where several erasers spoke, or one did on several parts of a long prompt, `parts` has what each said, and of what text
    encoder; `fired` and `concepts` are of any of them.
    """
    rows = [
        {"encoder": attachment.eraser.hook_point.encoder, **gate_row(decision, attachment.eraser.names)}
        for attachment in attachments
        for decision in attachment.decisions
    ]
    if len(rows) < 2:
        return rows[0] if rows else None
    concepts = dict.fromkeys(concept for row in rows for concept in row["concepts"])
    return {"fired": any(row["fired"] for row in rows), "concepts": list(concepts), "parts": rows}


def gate_row(decision: Decision, names: Sequence[str]) -> dict[str, Any]:
    """Return a decision for JSON, which has no infinity: a prompt without words has no score.

    `names`: concepts of the eraser. `concepts`: those of any gate. `score` and `threshold` are of the gate on features, those
    in `meaning` of another.
    """
    meaning = decision.meaning
    concepts = [*(names[c] for c in decision.concepts), *(meaning.concepts if meaning else ())]
    return {
        "fired": decision.fired,
        "score": decision.score if math.isfinite(decision.score) else None,
        "threshold": decision.threshold,
        "concepts": list(dict.fromkeys(concepts)),
        **({"meaning": meaning._asdict()} if meaning else {}),
    }


def slug(prompt: str) -> str:
    """Return the prompt's words for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:MAX_SLUG].rstrip("-") or "image"
