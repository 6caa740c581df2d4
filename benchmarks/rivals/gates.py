"""Gates: does a prompt contain an erased concept, and which? All are calibrated on the same prompts to the same rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from benchmarks.rivals.task import Task
from itd.activations import stream
from itd.attacks.differentiable import prompt_scores
from itd.attacks.diffusion import encode_texts
from itd.eraser import Eraser
from itd.erasing import PRESETS, EraseConfig, erase
from itd.gate import calibrate
from itd.inputs import erase_settings
from itd.prompts import PromptSet

Score = Callable[[Sequence[str]], Float[Tensor, "prompts concepts"]]


@dataclass(frozen=True, eq=False)
class Gate:
    """A score per prompt and concept, and the threshold that fires."""

    name: str
    score: Score
    threshold: float

    def concepts(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return, per prompt, the concepts that reach the threshold."""
        return [tuple(row.nonzero().flatten().tolist()) for row in self.score(prompts) >= self.threshold]

    def fired(self, prompts: Sequence[str]) -> list[bool]:
        return [bool(found) for found in self.concepts(prompts)]


class GateMaker(Protocol):
    """Settings of a gate; the call fits it to a task."""

    @property
    def name(self) -> str: ...

    def __call__(self, task: Task) -> Gate: ...


def calibrated(name: str, score: Score, task: Task) -> Gate:
    """Return the gate with the threshold that the task's false-positive rate asks for, on its held-out prompts."""
    positives, negatives = (score(part.of("calibrate").texts).amax(1) for part in (task.target, task.others))
    return Gate(name, score, calibrate(positives, negatives, fpr=task.fpr).threshold)


@dataclass(frozen=True)
class StringMatch:
    """The concept's name as whole words, or its plural; 1 or 0."""

    name: ClassVar[str] = "string"

    def __call__(self, task: Task) -> Gate:
        patterns = [re.compile(rf"\b{re.escape(name)}(s|es)?\b", re.IGNORECASE) for name in task.names]

        def score(prompts: Sequence[str]) -> Tensor:
            return torch.tensor([[float(bool(p.search(text))) for p in patterns] for text in prompts]).reshape(
                -1, len(patterns)
            )

        return Gate(self.name, score, 0.5)


@dataclass(frozen=True)
class Cosine:
    """Cosine of the prompt's pooled embedding to the concept's, the mean over its prompts.

    Both less the mean of the prompts that stay: without it every cosine of a CLIP is close to 1.
    """

    name: ClassVar[str] = "cosine"

    def __call__(self, task: Task) -> Gate:
        centre = pooled(task.pipe, task.others.of("fit").texts).mean(0)
        fit = task.target.of("fit")
        own = torch.stack([pooled(task.pipe, fit.about(name).texts).mean(0) for name in task.names]) - centre

        def score(prompts: Sequence[str]) -> Tensor:
            return F.normalize(pooled(task.pipe, prompts) - centre, dim=1) @ F.normalize(own, dim=1).T

        return calibrated(self.name, score, task)


@dataclass(frozen=True)
class Probe:
    """One logistic regression per concept, its prompts against all that stay, on the mean activation of the content tokens."""

    name: ClassVar[str] = "probe"

    C: float = 1.0
    """Inverse of the L2 penalty."""

    def __call__(self, task: Task) -> Gate:
        positive, negative = (mean_activations(task, part.of("fit")) for part in (task.target, task.others))
        centre, scale = negative.mean(0), negative.std(0).clamp_min(1e-6)
        labels = [prompt.concept for prompt in task.target.of("fit")]
        weights, biases = [], []
        for name in task.names:
            own = positive[torch.tensor([label == name for label in labels])]
            w, b = self.fit((own - centre) / scale, (negative - centre) / scale)
            weights.append(w)
            biases.append(b)

        def score(prompts: Sequence[str]) -> Tensor:
            x = (mean_activations(task, PromptSet.from_texts(prompts)) - centre) / scale
            return x @ torch.stack(weights).T + torch.tensor(biases)

        return calibrated(self.name, score, task)

    def fit(self, own: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " d"], float]:
        """Return the weights and the bias that separate both; they count the same, however many there are."""
        from sklearn.linear_model import LogisticRegression

        y = [1] * len(own) + [0] * len(others)
        fitted = LogisticRegression(C=self.C, class_weight="balanced", max_iter=1000).fit(torch.cat([own, others]).numpy(), y)
        return torch.from_numpy(fitted.coef_[0]).float(), float(fitted.intercept_[0])


@dataclass(frozen=True)
class Features:
    """The gate of an eraser, by one of its scores; all score the features that `itd.erase` selects by default."""

    name: Literal["evidence", "contribution", "reconstruction"] = "evidence"

    def __call__(self, task: Task) -> Gate:
        eraser = make_eraser(task, self.name)
        return Gate(self.name, lambda prompts: eraser_scores(task.pipe, eraser, prompts), eraser.gate.thresholds[0])


@dataclass(frozen=True)
class Shipped:
    """The first gate of `itd.erase` as it is shipped: a threshold and a false-positive rate of its own for every concept."""

    name: ClassVar[str] = "itd"

    def __call__(self, task: Task) -> Gate:
        eraser = shipped_eraser(task, "default")
        return Gate(self.name, lambda prompts: eraser_scores(task.pipe, eraser, prompts), eraser.gate.thresholds[0])


EDITED: tuple[GateMaker, ...] = (
    StringMatch(), Cosine(), Probe(), Features("reconstruction"), Features("contribution"), Features("evidence"),
)  # fmt: skip
"""Gates that are combined with every edit."""
GATES: tuple[GateMaker, ...] = (*EDITED, Shipped())
"""Gates that are compared alone."""


def make_eraser(task: Task, score: Literal["evidence", "contribution", "reconstruction"] = "evidence") -> Eraser:
    """Return the eraser that itd makes for the task, with its default features and one threshold for all concepts."""
    return erased_once(task, f"eraser {score}", EraseConfig(score=score, calibration="shared", fpr=task.fpr))


def shipped_eraser(task: Task, preset: str) -> Eraser:
    """Return what `itd.erase` makes of the task by a preset, whatever rate the others are calibrated to.

    What the preset leaves open is the embedded world's own, as on the command line: what is drawn for a refused prompt.
    """
    return erased_once(task, f"shipped {preset}", erase_settings(None, PRESETS[preset]))


def erased_once(task: Task, key: str, config: EraseConfig) -> Eraser:
    """Return what `itd.erase` makes of the task, the first time by making it."""
    sets = (task.target, task.retain, task.neutral)
    return task.once(key, lambda: erase(task.pipe, task.sae, task.site, *sets, config))


@torch.no_grad()
def eraser_scores(pipe: Any, eraser: Eraser, prompts: Sequence[str]) -> Float[Tensor, "prompts concepts"]:
    """Return the score of every prompt for every concept of an eraser."""
    rows = []
    for batch in stream(pipe, eraser.hook_point, PromptSet.from_texts(prompts)):
        rows += [prompt_scores(eraser, x[mask]) for x, mask in zip(batch.x, batch.content, strict=True)]
    return torch.stack(rows)


def pooled(pipe: Any, prompts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n d"]:
    """Return the text encoder's pooled embeddings."""
    starts = range(0, len(prompts), batch_size)
    return torch.cat([encode_texts(pipe, prompts[start : start + batch_size]).pooled.float().cpu() for start in starts])


def mean_activations(task: Task, prompts: PromptSet) -> Float[Tensor, "n d_model"]:
    """Return each prompt's mean activation over its content tokens; zeros where it has none."""
    rows = []
    for batch in stream(task.pipe, task.site, prompts):
        weights = batch.content[..., None].float()
        rows.append((batch.x * weights).sum(1) / weights.sum(1).clamp_min(1))
    return torch.cat(rows)
