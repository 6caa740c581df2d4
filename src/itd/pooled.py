"""A second gate, on the pooled embedding of the whole prompt: it finds prompts that mean a concept without its features.

The first gate reads states early in the text encoder, token by token, and edits what it finds there. Words that have nothing to
do with a concept, put together until the encoder's output is the concept's, leave no feature to find. They do arrive at the
concept's place in the pooled embedding, which is computed anyway. There a linear discriminant per concept decides, and as there
is nothing to edit, the prompt is replaced: its states become those of an anchor.

Sources: Liu et al. 2024, Latent Guard: a safety framework for text-to-image generation (a check in the space of the text
encoder's output, there learned); Fisher 1936 for the discriminant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itd import pipelines
from itd.gate import PART_WAY, Meaning, unit_apart

SHRINKAGE = 0.1
"""How much of the mean variance is added to the covariance's diagonal."""


@dataclass(frozen=True, eq=False)
class PooledGate:
    """Decides by `directions_c . e + offsets_c`, e: the pooled embedding. Fires from `PART_WAY`.

    In units of the concept: 0 is what retained prompts reach, 1 what its own do (`itd.gate.unit_apart`).
    """

    names: tuple[str, ...]
    directions: Float[Tensor, "concepts d"]
    offsets: Float[Tensor, " concepts"]
    anchor: str
    """The prompt whose states a prompt that fires is given."""

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.directions) == len(self.offsets):
            raise ValueError(
                f"{len(self.names)} concepts need as many directions and offsets, "
                f"got {len(self.directions)} and {len(self.offsets)}"
            )
        if not (self.directions.isfinite().all() and self.offsets.isfinite().all()):
            raise ValueError("the pooled gate's weights contain NaN or infinity: it could not fire; make the eraser again")

    @classmethod
    def fit(
        cls,
        own: Mapping[str, tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]],
        others: tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]],
        fpr: float,
        anchor: str,
    ) -> PooledGate:
        """Fit `w_c = (S + 0.1 tr(S) / d I)^-1 (mean_c - mean)`, S and mean of what must stay, and calibrate each concept.

        own, others: embeddings to fit on and, held out from these, to calibrate on, per concept and of what must stay.
        """
        centre = others[0].mean(0)
        centred = (others[0] - centre).double()
        covariance = centred.T @ centred / len(centred)
        covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean() + 1e-12)
        directions, offsets = list[Tensor](), list[float]()
        for fit, held_out in own.values():
            direction = torch.linalg.solve(covariance, (fit.mean(0) - centre).double()).float()
            scale, offset = unit_apart(held_out @ direction, others[1] @ direction, fpr)
            directions.append(scale * direction)
            offsets.append(offset)
        return cls(tuple(own), torch.stack(directions), torch.tensor(offsets), anchor)

    def scores(self, embeddings: Float[Tensor, "prompts d"]) -> Float[Tensor, "prompts concepts"]:
        """Score prompts by their pooled embeddings.

        Raises:
            ValueError: embeddings of another width.
        """
        if embeddings.shape[1] != self.directions.shape[1]:
            raise ValueError(
                f"pooled embeddings are {embeddings.shape[1]} wide, the pooled gate was made for {self.directions.shape[1]}"
            )
        x = embeddings.float()
        return x @ self.directions.T.to(x.device) + self.offsets.to(x.device)

    def decide(self, embeddings: Float[Tensor, "prompts d"]) -> list[Meaning]:
        """Decide on prompts, each by itself.

        Raises:
            ValueError: another width, or embeddings that are NaN, which no threshold could stop.
        """
        scores = self.scores(embeddings)
        if scores.isnan().any():
            raise ValueError("pooled embeddings contain NaN: the text encoder overflowed; use fp32 or bf16")
        found = []
        for row in scores.tolist():
            fired = tuple(name for name, score in zip(self.names, row, strict=True) if score >= PART_WAY)
            found.append(Meaning(fired, max(row), PART_WAY))
        return found

    def __or__(self, other: PooledGate) -> PooledGate:
        """Join the gates of two erasers.

        Raises:
            ValueError: they replace prompts by different anchors.
        """
        if self.anchor != other.anchor:
            raise ValueError(f"pooled gates join only with the same anchor: {self.anchor!r} and {other.anchor!r}")
        known = {(name, direction.numpy().tobytes()) for name, direction in zip(self.names, self.directions, strict=True)}
        fresh = [i for i, name in enumerate(other.names) if (name, other.directions[i].numpy().tobytes()) not in known]
        return replace(
            self,
            names=self.names + tuple(other.names[i] for i in fresh),
            directions=torch.cat([self.directions, other.directions[fresh]]),
            offsets=torch.cat([self.offsets, other.offsets[fresh]]),
        )


def encode_instead(
    pipe: Any, encoder: str, prompt: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_tokens: int
) -> Any:
    """Return what the text encoder says of another prompt when it is called with the same arguments otherwise."""
    module: nn.Module = pipelines.encoder_of(pipe, encoder)
    tokenizer = pipelines.tokenizer_of(pipe, encoder)
    row = tokenizer([prompt], padding="max_length", max_length=n_tokens, truncation=True, return_tensors="pt")
    device = next(module.parameters()).device
    given: dict[str, Any] = dict(kwargs)
    if given.get("attention_mask") is not None:
        given["attention_mask"] = row.attention_mask.to(device)
    ids = row.input_ids.to(device)
    if args:
        return module.forward(ids, *args[1:], **given)
    return module.forward(**{**given, "input_ids": ids})


def put_instead(result: Any, other: Any, rows: Int[Tensor, " n"]) -> Any:
    """Return an encoder's result in which some rows of every tensor are those of another result, of one row."""
    if isinstance(result, Tensor):
        changed = result.clone()
        changed[rows.to(result.device)] = other[0].to(result.dtype)
        return changed
    if isinstance(result, Mapping):
        return type(result)(**{key: put_instead(value, other[key], rows) for key, value in result.items()})
    if isinstance(result, tuple | list):
        return type(result)(put_instead(a, b, rows) for a, b in zip(result, other, strict=True))
    return result
