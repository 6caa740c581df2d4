"""Linear discriminants that decide whether a whole prompt means a concept, on whatever vector describes the prompt.

Source: Fisher 1936 for the discriminant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from itd.gate import PART_WAY, Meaning, unit_apart

Own = Mapping[str, tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]]
"""Vectors of each concept's prompts, to fit on and, held out from these, to calibrate on."""
Others = tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]
"""The same of what must stay."""


@dataclass(frozen=True, eq=False)
class Discriminants:
    """Decides by `directions_c . e + offsets_c`, e: a vector per prompt, which subclasses say. Fires from `part_way`.

    In units of the concept: 0 is what retained prompts reach, 1 what its own do (`itd.gate.unit_apart`).
    """

    kind: ClassVar[str]
    """Name of the gate."""
    reads: ClassVar[str]
    """What it reads, in the plural."""
    shrinkage: ClassVar[float] = 0.1
    """How much of the mean variance is added to the covariance's diagonal."""
    own_quantile: ClassVar[float] = 0.05
    """Quantile of a concept's own prompts that is 1."""
    part_way: ClassVar[float] = PART_WAY
    """Every concept's threshold."""

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
            raise ValueError(
                f"the {self.kind} gate's weights contain NaN or infinity: it could not fire; make the eraser again"
            )

    @classmethod
    def fit(cls, own: Own, others: Others, fpr: float, anchor: str, part_way: float | None = None) -> Self:
        """Fit `w_c = (S + shrinkage tr(S) / d I)^-1 (mean_c - mean)`, S and mean of what must stay, and calibrate.

        part_way: where on the way from 0 to 1 every concept's threshold is put; its unit is moved by the difference to the
            class's. None: the class's.
        """
        at = cls.part_way if part_way is None else part_way
        centre = others[0].mean(0)
        centred = (others[0] - centre).double()
        covariance = centred.T @ centred / len(centred)
        covariance.diagonal().add_(cls.shrinkage * covariance.diagonal().mean() + 1e-12)
        directions, offsets = list[Tensor](), list[float]()
        for fit, held_out in own.values():
            direction = torch.linalg.solve(covariance, (fit.mean(0) - centre).double()).float()
            scores = held_out @ direction, others[1] @ direction
            scale, offset = unit_apart(*scores, fpr, cls.own_quantile, at)
            directions.append(scale * direction)
            offsets.append(offset + cls.part_way - at)
        return cls(tuple(own), torch.stack(directions), torch.tensor(offsets), anchor)

    def scores(self, vectors: Float[Tensor, "prompts d"]) -> Float[Tensor, "prompts concepts"]:
        """Score prompts.

        Raises:
            ValueError: vectors of another width.
        """
        if vectors.shape[1] != self.directions.shape[1]:
            raise ValueError(
                f"{self.reads} are {vectors.shape[1]} wide, the {self.kind} gate was made for {self.directions.shape[1]}"
            )
        x = vectors.float()
        return x @ self.directions.T.to(x.device) + self.offsets.to(x.device)

    def decide(self, vectors: Float[Tensor, "prompts d"]) -> list[Meaning]:
        """Decide on prompts, each by itself.

        Raises:
            ValueError: another width, or vectors that are NaN, which no threshold could stop.
        """
        scores = self.scores(vectors)
        if scores.isnan().any():
            raise ValueError(f"{self.reads} contain NaN: the model overflowed; use fp32 or bf16")
        found = []
        for row in scores.tolist():
            fired = tuple(name for name, score in zip(self.names, row, strict=True) if score >= self.part_way)
            found.append(Meaning(fired, max(row), self.part_way, self.kind))
        return found

    def require_joinable(self, other: Discriminants) -> None:
        """Raise ValueError unless the other gate replaces prompts by the same anchor."""
        if self.anchor != other.anchor:
            raise ValueError(f"{self.kind} gates join only with the same anchor: {self.anchor!r} and {other.anchor!r}")

    def keys(self) -> list[tuple[str, bytes]]:
        """Return what tells the discriminants apart: the names, and the bits of their weights."""
        weights = torch.cat([self.directions, self.offsets[:, None]], 1)
        return [(name, row.numpy().tobytes()) for name, row in zip(self.names, weights, strict=True)]

    def __or__(self, other: Self) -> Self:
        """Join the gates of two erasers.

        Raises:
            ValueError: see `require_joinable`.
        """
        self.require_joinable(other)
        known = set(self.keys())
        fresh = [i for i, key in enumerate(other.keys()) if key not in known]
        return replace(
            self,
            names=self.names + tuple(other.names[i] for i in fresh),
            directions=torch.cat([self.directions, other.directions[fresh]]),
            offsets=torch.cat([self.offsets, other.offsets[fresh]]),
        )
