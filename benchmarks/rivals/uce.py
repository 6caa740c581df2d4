"""Unified concept editing: the cross-attention's keys and values, edited in closed form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.rivals.systems import Bare
from benchmarks.rivals.task import Rival, Task, copy_with
from itd import pipelines
from itd.attacks.diffusion import ENCODER, encode_texts


@dataclass(frozen=True)
class UnifiedConceptEditing:
    """W = (s sum_e W0 c_e* c_e^T + sum_p W0 c_p c_p^T + l W0) (s sum_e c_e c_e^T + sum_p c_p c_p^T + l I)^-1.

    c_e: state of the last token of an erased name, c_e*: that of the anchor; c_p: of names that are kept; W0: the old weights.

    Source: Gandikota et al. 2024, Unified concept editing in diffusion models, equation 7; l is that of the released code.
    """

    name: ClassVar[str] = "uce"

    anchor: str = "something"
    """What an erased name is to mean."""
    erase_scale: float = 1.0
    """Weight s of the erased names."""
    preserve_scale: float = 1.0
    """Weight of the kept names, 1 in the equation."""
    ridge: float = 0.1
    """Weight l of the old weights."""

    def __call__(self, task: Task) -> Rival:
        unet = copy.deepcopy(task.pipe.unet)
        erased, anchor, kept = (last_states(task.pipe, names) for names in (task.names, [self.anchor], task.kept))
        for layer in text_layers(unet):
            layer.weight.data = self.edit(layer.weight.data, erased, anchor.expand_as(erased), kept)
        return Bare(self.name, copy_with(task.pipe, unet=unet), task)

    def edit(
        self, W: Float[Tensor, "out d"], erased: Float[Tensor, "e d"], anchors: Float[Tensor, "e d"], kept: Float[Tensor, "p d"]
    ) -> Float[Tensor, "out d"]:
        """Return the edited weights."""
        old, c, to, keep = (part.double() for part in (W, erased, anchors, kept))
        ridge = self.ridge * torch.eye(old.shape[1], dtype=old.dtype)
        preserved = self.preserve_scale * keep.T @ keep + ridge
        left = self.erase_scale * (old @ to.T) @ c + old @ preserved
        right = self.erase_scale * c.T @ c + preserved
        return torch.linalg.solve(right, left, left=False).to(W)


def text_layers(unet: nn.Module) -> list[Any]:
    """Return the linear layers that make keys and values from text states."""
    return [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


@torch.no_grad()
def last_states(pipe: Any, names: Sequence[str]) -> Float[Tensor, "n d"]:
    """Return the text state of the last token of each name."""
    tokenizer = pipelines.tokenizer_of(pipe, ENCODER)
    ids = pipelines.tokenize(pipe, ENCODER, names).input_ids
    last = pipelines.content_end(ids, tokenizer) - 1
    return encode_texts(pipe, names).states[torch.arange(len(ids)), last]
