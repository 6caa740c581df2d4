"""What white-box attacks differentiate, against what the eraser does, in values and in gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import NOUNS, SITE, prompts_of

from itd import SAE, Edit, Eraser, Gate, HookPoint, PromptSet
from itd.activations import stream
from itd.attacks import differentiable
from itd.eraser import EDITS, EditMode
from itd.features import ConceptFeatures
from itd.gate import SCORES, ScoreName
from itd.kernels import SparseCodes


def batch_of(pipe: Any, *nouns: str, site: HookPoint = SITE) -> Any:
    return next(stream(pipe, site, prompts_of(*nouns), batch_size=64))


def with_score(
    eraser: Eraser, boat_eraser: Eraser, name: ScoreName, mode: EditMode = "subtract", strength: float = -3.0
) -> Eraser:
    """Return an eraser of two concepts under another score, with thresholds that some prompts reach."""
    concepts = (replace(eraser.concepts[0], scale=1.7, offset=-0.2), boat_eraser.concepts[0])
    thresholds = {"evidence": (0.3, 0.4), "contribution": (0.5, 0.6), "reconstruction": (0.2, 0.3)}[name]
    return Eraser(eraser.sae, SITE, concepts, Gate(name, thresholds), Edit(mode, strength), None, eraser.anchors)


def test_codes_are_those_of_the_autoencoder(pipe: Any, sae: SAE) -> None:
    x = batch_of(pipe, *NOUNS).x.reshape(-1, sae.config.d_model)
    codes, wanted = differentiable.encode(sae, x), sae.encode(x)

    def dense(codes: SparseCodes) -> torch.Tensor:
        return torch.zeros(len(x), sae.config.n_latents).scatter_add_(1, codes.indices, codes.acts)

    assert torch.allclose(dense(codes), dense(wanted), atol=1e-5)
    assert torch.allclose(differentiable.written(sae, codes), sae.write(wanted), atol=1e-5)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("name", SCORES)
def test_the_score_is_that_of_the_gate(name: ScoreName, window: int, pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> None:
    both = with_score(eraser, boat_eraser, name)
    both = replace(both, concepts=(replace(both.concepts[0], window=window), both.concepts[1]))
    batch = batch_of(pipe, *NOUNS)
    fired = []
    for x, mask in zip(batch.x, batch.content, strict=True):
        decision = both.decide(x[mask])
        assert torch.allclose(differentiable.token_scores(both, x[mask]), decision.token_scores, atol=1e-4)
        margin = differentiable.gate_margin(both, x[mask])
        assert float(margin) == pytest.approx(decision.score - decision.threshold, abs=1e-4)
        fired.append(decision.fired)
    assert any(fired), "the gate fires on some of the prompts"


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mode", EDITS)
def test_the_edit_is_that_of_the_eraser(
    name: ScoreName, mode: EditMode, pipe: Any, eraser: Eraser, boat_eraser: Eraser
) -> None:
    both = with_score(eraser, boat_eraser, name, mode)
    batch = batch_of(pipe, "house", "boat", "cat")
    wanted = both(batch.x, batch.content, batch.editable)
    edited = differentiable.erase_activations(both, batch.x, batch.content, batch.editable)
    assert torch.allclose(edited, wanted.x, atol=1e-4)
    assert not torch.allclose(batch.x, wanted.x, atol=1e-2)
    for row, decision in enumerate(wanted.decisions):
        assert decision.fired or torch.equal(edited[row], batch.x[row])


@pytest.mark.parametrize("name", SCORES)
def test_the_score_has_the_gradient_of_finite_differences(
    name: ScoreName, pipe: Any, eraser: Eraser, boat_eraser: Eraser
) -> None:
    both = with_score(eraser, boat_eraser, name)
    batch = batch_of(pipe, "house")
    x = batch.x[0][batch.content[0]].requires_grad_()
    (gradient,) = torch.autograd.grad(differentiable.gate_margin(both, x), x)
    direction = gradient / gradient.norm()
    step = 1e-3
    ahead, behind = (differentiable.gate_margin(both, x.detach() + sign * step * direction) for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_the_edit_has_a_gradient_and_the_eraser_has_none(pipe: Any, eraser: Eraser) -> None:
    batch = batch_of(pipe, "house")
    x = batch.x[:1].clone().requires_grad_()
    edited = differentiable.erase_activations(eraser, x, batch.content[:1], batch.editable[:1])
    (gradient,) = torch.autograd.grad(edited.square().sum(), x)
    assert gradient.abs().sum() > 0
    assert not eraser(x, batch.content[:1], batch.editable[:1]).x.requires_grad


def test_a_prompt_without_content_passes(pipe: Any, eraser: Eraser) -> None:
    batch = next(stream(pipe, SITE, PromptSet.from_texts([""])))
    assert torch.equal(differentiable.erase_activations(eraser, batch.x, batch.content, batch.editable), batch.x)
    assert float(differentiable.gate_margin(eraser, batch.x[0][batch.content[0]])) == -float("inf")


def test_evidence_by_hand() -> None:
    codes = SparseCodes(torch.tensor([[2.0, 1.0], [0.5, 0.0]]), torch.tensor([[3, 7], [7, 1]]))
    concept = ConceptFeatures("c", torch.tensor([3, 7]), torch.tensor([0.6, 0.8]), scale=2.0, offset=-1.0)
    assert differentiable.evidence(codes, concept).tolist() == pytest.approx([2 * (1.2 + 0.8) - 1, 2 * 0.4 - 1])
