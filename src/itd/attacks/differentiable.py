"""Score and edit of an eraser as differentiable functions, for attackers who know it. Tested equal to the eraser's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itd.eraser import Eraser
from itd.features import ConceptFeatures, window_scores
from itd.kernels import SparseCodes
from itd.sae import SAE


def encode(sae: SAE, x: Float[Tensor, "tokens d_model"]) -> SparseCodes:
    """Return the codes of `sae.encode`, with a gradient to x: which latents are active is held fixed."""
    with torch.no_grad():
        indices = sae.encode(x).indices
    pre_acts = torch.einsum("td,tkd->tk", x - sae.b_dec, sae.W_enc[indices]) + sae.b_enc[indices]
    return SparseCodes(pre_acts.clamp_min(0), indices)


def written(sae: SAE, codes: SparseCodes, concept: ConceptFeatures | None = None) -> Float[Tensor, "tokens d_model"]:
    """Return `sum_j acts_j W_dec[j]` over the latents of a concept, or over all."""
    acts = codes.acts
    if concept is not None:
        acts = acts * torch.isin(codes.indices, concept.indices.to(codes.indices.device))
    return torch.einsum("tk,tkd->td", acts, sae.W_dec[codes.indices])


def token_scores(eraser: Eraser, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens concepts"]:
    """Return the gate's score of every content token for every concept."""
    sae, codes = eraser.sae, encode(eraser.sae, x)
    if eraser.gate.score == "reconstruction":
        error, factor = written(sae, codes) + sae.b_dec - x, eraser.gate.strength - 1
        return torch.stack([(error + factor * written(sae, codes, c)).square().mean(-1) for c in eraser.concepts], 1)
    if eraser.gate.score == "evidence":
        tokens = [evidence(codes, concept) for concept in eraser.concepts]
    else:
        tokens = [written(sae, codes, concept).norm(dim=-1) for concept in eraser.concepts]
    return window_scores(torch.stack(tokens, 1), torch.tensor([len(x)]), [concept.window for concept in eraser.concepts])


def evidence(codes: SparseCodes, concept: ConceptFeatures) -> Float[Tensor, " tokens"]:
    """Return the matched filter's response, `scale * sum_j w_j acts_j + offset`."""
    weights = concept.spread(codes.indices.flatten().cpu()).reshape(codes.indices.shape).to(codes.acts)
    return (codes.acts * weights).sum(1) * concept.scale + concept.offset


def prompt_scores(eraser: Eraser, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " concepts"]:
    """Return the gate's score of a prompt, from the activations of its content tokens."""
    return over_tokens(eraser, token_scores(eraser, x))


def over_tokens(eraser: Eraser, tokens: Float[Tensor, "tokens concepts"]) -> Float[Tensor, " concepts"]:
    """Return a prompt's scores from those of its tokens; minus infinity where it has none."""
    if len(tokens) == 0:
        return tokens.new_full((tokens.shape[1],), -math.inf)
    return tokens.mean(0) if eraser.gate.score == "reconstruction" else tokens.amax(0)


def gate_margin(eraser: Eraser, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """Return the largest `score - threshold` over the concepts: the gate fires where it is not negative."""
    thresholds = torch.tensor(eraser.gate.thresholds, dtype=x.dtype, device=x.device)
    return (prompt_scores(eraser, x) - thresholds).amax()


def straight_through(put: Tensor, given: Tensor) -> Tensor:
    """Return `put` with the gradient that `given` has: what takes its place has none, so a search would stand still.

    Source: Athalye et al. 2018, Obfuscated gradients give a false sense of security, section 4.1 (BPDA).
    """
    return given + (put - given).detach()


def erase_activations(
    eraser: Eraser,
    x: Float[Tensor, "batch tokens d_model"],
    content: Bool[Tensor, "batch tokens"],
    editable: Bool[Tensor, "batch tokens"],
    through: bool = False,
) -> Float[Tensor, "batch tokens d_model"]:
    """Return what the eraser makes of the activations; the decision is hard, the edit has a gradient.

    through: also where an anchor's activation is put, see `straight_through`.
    """
    rows = []
    thresholds = torch.tensor(eraser.gate.thresholds)
    for row in range(len(x)):
        tokens = token_scores(eraser, x[row][content[row]])
        fired = (over_tokens(eraser, tokens).detach().cpu() >= thresholds).nonzero().flatten().tolist()
        named = (tokens.detach().cpu()[:, fired] >= thresholds[fired]).any(1)
        rows.append(edit_prompt(eraser, x[row], content[row], editable[row], fired, named, through) if fired else x[row])
    return torch.stack(rows)


def edit_prompt(
    eraser: Eraser,
    x: Float[Tensor, "tokens d_model"],
    content: Bool[Tensor, " tokens"],
    editable: Bool[Tensor, " tokens"],
    concepts: Sequence[int],
    named: Bool[Tensor, " content"],
    through: bool = False,
) -> Float[Tensor, "tokens d_model"]:
    """Edit one prompt by the features of some concepts of the eraser, whoever decided that they are in it.

    `named`: which content tokens name a concept; the edits `replace` and `refuse` put the anchor there.
    """
    sae, codes = eraser.sae, encode(eraser.sae, x)
    part = written(sae, codes, eraser.edited_features(concepts))
    base = written(sae, codes) + sae.b_dec if eraser.edit.mode == "scale" else x
    edited = base + eraser.edit.factor * part
    if eraser.edit.puts_anchors:
        assert eraser.anchors is not None
        positions = content.nonzero().flatten()
        behind = torch.arange(len(x), device=x.device) > positions[-1]
        names_it = torch.zeros_like(behind).index_fill_(0, positions[named.to(positions.device)], True)
        anchors = eraser.anchors.to(edited)
        put = torch.where(names_it[:, None], anchors[0], torch.where(behind[:, None], anchors[1], edited))
        edited = straight_through(put, edited) if through else put
    return torch.where(editable[:, None], edited, x)
