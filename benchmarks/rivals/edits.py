"""Any gate with any edit of the eraser: what passes is drawn by the bare pipeline, what fires is edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.rivals.gates import Gate, GateMaker, make_eraser
from benchmarks.rivals.task import Rival, Task, draw_in_batches
from itd import pipelines
from itd.attacks.differentiable import edit_prompt, token_scores
from itd.attacks.diffusion import ENCODER
from itd.eraser import Edit, Eraser
from itd.erasing import PRESETS
from itd.hooks import edit_output

OURS = PRESETS["default"]
EDITS: dict[str, Edit] = {
    "paper": Edit("scale", -8.0),
    "remove": Edit("remove", 0.0, OURS.n_edited),
    "subtract": Edit("subtract", OURS.strength, OURS.n_edited),
    "replace": Edit("replace", OURS.strength, OURS.n_edited),
}
"""Edits by the name that the table gives them."""


@dataclass(frozen=True)
class GateAndEdit:
    """Settings of a gate with an edit."""

    gate: GateMaker
    edit: str

    def __post_init__(self) -> None:
        if self.edit not in EDITS:
            raise ValueError(f"edit must be one of {', '.join(EDITS)}, got {self.edit!r}")

    @property
    def name(self) -> str:
        return f"{self.gate.name} + {self.edit}"

    def __call__(self, task: Task) -> Rival:
        editor = replace(make_eraser(task), edit=EDITS[self.edit])
        return Gated(self.name, task, task.once(repr(self.gate), lambda: self.gate(task)), editor)


@dataclass(frozen=True, eq=False)
class Gated:
    """The gate decides on prompts, the features of `editor` are edited, for the concepts that the gate names."""

    name: str
    task: Task
    gate: Gate
    editor: Eraser

    def fired(self, prompts: Sequence[str]) -> list[bool]:
        return self.gate.fired(prompts)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        concepts = self.gate.concepts(prompts)
        by_row: dict[int, Tensor] = {}
        for draw, flag in ((self.task.draw_bare, False), (self.draw_flagged, True)):
            listed = [i for i, found in enumerate(concepts) if bool(found) == flag]
            if not listed:
                continue
            drawn = draw([prompts[i] for i in listed], [seeds[i] for i in listed])
            by_row |= dict(zip(listed, drawn, strict=True))
        return torch.stack([by_row[i] for i in range(len(prompts))])

    def draw_flagged(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """Draw flagged prompts; gates that flag the same concepts share the picture."""
        concepts = dict(zip(prompts, self.gate.concepts(prompts), strict=True))

        def draw(part: Sequence[str], part_seeds: Sequence[int]) -> Tensor:
            return draw_in_batches(
                lambda texts, generators: self.draw_edited(texts, [concepts[text] for text in texts], generators),
                part,
                part_seeds,
            )

        keys = [f"{self.editor.edit} {concepts[prompt]}" for prompt in prompts]
        return self.task.remember(keys, prompts, seeds, draw)

    def draw_edited(self, prompts: list[str], concepts: Sequence[Sequence[int]], generators: list[torch.Generator]) -> Tensor:
        states = edited_states(self.task.pipe, self.editor, prompts, concepts)
        return self.task.pipe(prompt_embeds=states, generator=generators, output_type="pt", **self.task.options).images


@torch.no_grad()
def edited_states(
    pipe: Any, editor: Eraser, prompts: Sequence[str], concepts: Sequence[Sequence[int]]
) -> Float[Tensor, "batch tokens d"]:
    """Return the text states of prompts of which some concepts are edited away, whatever the editor's own gate says."""
    tokens = pipelines.tokenize(pipe, ENCODER, prompts)
    tokenizer = pipelines.tokenizer_of(pipe, ENCODER)
    encoder: Any = pipelines.encoder_of(pipe, ENCODER)
    ids = tokens.input_ids.to(next(encoder.parameters()).device)
    content, editable = pipelines.content_mask(ids, tokenizer), pipelines.edit_mask(ids, tokenizer)

    def edit(hidden: Float[Tensor, "batch tokens d"]) -> Tensor:
        rows = []
        for x, mask, free, found in zip(hidden, content, editable, concepts, strict=True):
            rows.append(edit_prompt(editor, x, mask, free, found, naming_tokens(editor, x[mask], found)) if mask.any() else x)
        return torch.stack(rows)

    with edit_output(editor.hook_point.resolve(pipe), edit):
        return encoder(ids, attention_mask=tokens.attention_mask)[0]


def naming_tokens(editor: Eraser, x: Float[Tensor, "content d"], concepts: Sequence[int]) -> Bool[Tensor, " content"]:
    """Return the tokens that reach the editor's threshold for one of the concepts; where none does, the best one."""
    scores = token_scores(editor, x)[:, list(concepts)]
    margins = (scores - torch.tensor([editor.gate.thresholds[c] for c in concepts]).to(scores)).amax(1)
    return margins >= torch.clamp(margins.amax(), max=0.0)
