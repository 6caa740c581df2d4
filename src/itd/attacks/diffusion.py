"""What white-box attacks differentiate: token embeddings to text states through the eraser, and the denoising loss.

Written for pipelines with one text encoder whose states condition a U-Net (`StableDiffusionPipeline` and its kind).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itd import pipelines
from itd.attacks.base import Criterion, Goal, NotApplicable, System
from itd.attacks.differentiable import erase_activations, gate_margin, straight_through
from itd.discriminants import Discriminants
from itd.drafts import draft
from itd.eraser import Eraser
from itd.hooks import edit_output

ENCODER = "text_encoder"
REFERENCES = 8
"""Pictures of the concept by the unerased pipeline that a white-box attack may learn from."""


class Encoded(NamedTuple):
    """Text states, pooled embedding, and by how much the gate's threshold is passed (None without an eraser)."""

    states: Float[Tensor, "batch tokens d"]
    pooled: Float[Tensor, "batch d"]
    margins: Float[Tensor, " batch"] | None


def require_single_encoder(pipe: Any) -> None:
    """Raise NotApplicable for a pipeline whose image model a white-box attack cannot call."""
    if getattr(pipe, "text_encoder_2", None) is not None or not isinstance(getattr(pipe, "unet", None), nn.Module):
        kind = type(pipe).__name__
        raise NotApplicable(f"white-box attacks need one text encoder and a unet, {kind} has others; use a black-box attack")


def token_embedding(pipe: Any) -> nn.Embedding:
    """Return the text encoder's table of token embeddings."""
    encoder: Any = pipelines.encoder_of(pipe, ENCODER)
    return encoder.get_input_embeddings()


def prompt_ids(pipe: Any, text: str) -> Int[Tensor, " n"]:
    """Return the content tokens of a prompt."""
    tokens = pipelines.tokenize(pipe, ENCODER, [text]).input_ids
    return tokens[0][pipelines.content_mask(tokens, pipelines.tokenizer_of(pipe, ENCODER))[0]]


def frame(pipe: Any, ids: Int[Tensor, "batch n"]) -> Int[Tensor, "batch tokens"]:
    """Put begin, end and padding around content tokens, as the pipeline's tokenizer does.

    Raises:
        ValueError: more tokens than fit.
    """
    tokenizer = pipelines.tokenizer_of(pipe, ENCODER)
    room = tokenizer.model_max_length - 2
    if ids.shape[1] > room:
        raise ValueError(f"{ids.shape[1]} tokens do not fit into the {room} of the text encoder; use fewer")
    framed = torch.full((len(ids), tokenizer.model_max_length), tokenizer.pad_token_id)
    framed[:, 0] = tokenizer.bos_token_id
    framed[:, 1 : 1 + ids.shape[1]] = ids
    framed[:, 1 + ids.shape[1]] = tokenizer.eos_token_id
    return framed


def encode(
    pipe: Any,
    input_ids: Int[Tensor, "batch tokens"],
    embeddings: Float[Tensor, "batch tokens d"] | None = None,
    eraser: Eraser | None = None,
    through: bool = False,
) -> Encoded:
    """Run the text encoder on token ids, or on embeddings in their place, through an eraser if there is one.

    Differentiable in `embeddings`. What the eraser does is computed by `itd.attacks.differentiable`, not by an attached one,
    which has no gradient.

    through: keep the prompt's own gradient where an anchor is put in its place, for who has no gate's score to descend on.

    Raises:
        NotApplicable: the text encoder has no pooled embedding.
    """
    encoder: Any = pipelines.encoder_of(pipe, ENCODER)
    device = next(encoder.parameters()).device
    tokenizer = pipelines.tokenizer_of(pipe, ENCODER)
    content, editable = (mask(input_ids, tokenizer).to(device) for mask in (pipelines.content_mask, pipelines.edit_mask))
    margins: list[Tensor] = []

    def erase(hidden: Float[Tensor, "batch tokens d"]) -> Tensor:
        assert eraser is not None
        margins.extend(gate_margin(eraser, x[mask]) for x, mask in zip(hidden, content, strict=True))
        return erase_activations(eraser, hidden, content, editable, through)

    hooks = [] if embeddings is None else [edit_output(token_embedding(pipe), lambda _: embeddings)]
    hooks += [] if eraser is None else [edit_output(eraser.hook_point.resolve(pipe), erase)]
    try:
        output = encoder(input_ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    pooled = pipelines.pooled_output(output)
    if pooled is None:
        raise NotApplicable(f"{type(encoder).__name__} has no pooled embedding, which the attack needs")
    encoded = Encoded(output.last_hidden_state, pooled, torch.stack(margins) if margins else None)
    if eraser is None:
        return encoded
    if eraser.pooled is not None:
        encoded = behind_gate(pipe, eraser.pooled, encoded, encoded.pooled, through)
    if eraser.edit.mode == "refuse" and encoded.margins is not None:
        encoded = put_anchor(pipe, eraser.edit.anchor, encoded, encoded.margins >= 0, through)
    if eraser.draft is not None:
        encoded = behind_gate(pipe, eraser.draft, encoded, draft(pipe, encoded.states), through)
    return encoded


def behind_gate(pipe: Any, gate: Discriminants, encoded: Encoded, vectors: Float[Tensor, "batch d"], through: bool) -> Encoded:
    """Return what a gate on the whole prompt lets through; the decision is hard, the closest gate's margin has a gradient."""
    assert encoded.margins is not None
    margins = gate.scores(vectors).amax(1) - gate.part_way
    closest = encoded._replace(margins=torch.maximum(encoded.margins, margins))
    return put_anchor(pipe, gate.anchor, closest, margins >= 0, through)


def put_anchor(pipe: Any, prompt: str, encoded: Encoded, fired: Bool[Tensor, " batch"], through: bool) -> Encoded:
    """Give the prompts that fired what the text encoder says of another prompt; margins stay."""
    if not fired.any():
        return encoded
    anchor = encode_texts(pipe, [prompt])
    states = torch.where(fired[:, None, None], anchor.states, encoded.states)
    pooled = torch.where(fired[:, None], anchor.pooled, encoded.pooled)
    if through:
        states, pooled = straight_through(states, encoded.states), straight_through(pooled, encoded.pooled)
    return encoded._replace(states=states, pooled=pooled)


def encode_texts(pipe: Any, texts: Sequence[str]) -> Encoded:
    """Encode prompts as the unerased pipeline does."""
    with torch.no_grad():
        return encode(pipe, pipelines.tokenize(pipe, ENCODER, texts).input_ids)


# Denoising


def noised(
    pipe: Any, x0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], t: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """Return x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, and what the image model is trained to say of it.

    a_t is the scheduler's cumulative product of alphas.

    Raises:
        ValueError: the scheduler has another kind of prediction.
    """
    alphas = pipe.scheduler.alphas_cumprod.to(x0)[t][:, None, None, None]
    kind = pipe.scheduler.config.prediction_type
    x_t = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
    if kind == "epsilon":
        return x_t, noise
    if kind == "v_prediction":
        return x_t, alphas.sqrt() * noise - (1 - alphas).sqrt() * x0
    if kind == "sample":
        return x_t, x0
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, the scheduler has {kind!r}")


def predict(pipe: Any, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], states: Float[Tensor, "b tokens d"]) -> Tensor:
    """Return the image model's prediction; one row of text states serves all pictures."""
    states = states.expand(len(x_t), -1, -1) if len(states) == 1 else states
    return pipe.unet(x_t, t.to(x_t.device), encoder_hidden_states=states).sample


def guess(
    pipe: Any, x_t: Float[Tensor, "n c h w"], said: Float[Tensor, "n c h w"], t: Int[Tensor, " n"]
) -> Float[Tensor, "n c h w"]:
    """Return the x_0 that a prediction means: `sqrt(a_t) x_t - sqrt(1 - a_t) v`, or `(x_t - sqrt(1 - a_t) eps) / sqrt(a_t)`."""
    alphas = pipe.scheduler.alphas_cumprod.to(x_t)[t][:, None, None, None]
    kind = pipe.scheduler.config.prediction_type
    if kind == "sample":
        return said
    if kind == "v_prediction":
        return alphas.sqrt() * x_t - (1 - alphas).sqrt() * said
    return (x_t - (1 - alphas).sqrt() * said) / alphas.sqrt()


def draw_timesteps(pipe: Any, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    return torch.randint(pipe.scheduler.config.num_train_timesteps, (n,), generator=generator)


@torch.no_grad()
def reference_latents(system: System, goal: Goal, criterion: Criterion, n: int = REFERENCES) -> Float[Tensor, "m c h w"]:
    """Return image latents of the concept, drawn by the unerased pipeline: what the attacker knows of it.

    Of n pictures those that meet the criterion; all of them if none does.
    """
    drawn = system.without_eraser().draw([goal.prompt] * n, range(goal.seed + 10_000, goal.seed + 10_000 + n))
    shown = torch.tensor(criterion(drawn.images))
    images = drawn.images[shown] if shown.any() else drawn.images
    parameter = next(system.pipe.vae.parameters())
    encoded = system.pipe.vae.encode((2 * images - 1).to(parameter)).latent_dist.mean
    return encoded * system.pipe.vae.config.scaling_factor


@contextmanager
def borrowed_row(pipe: Any, token: int, embedding: Float[Tensor, " d"]) -> Generator[None, None, None]:
    """Give a token another embedding for a while: textual inversion without a new token. The old one comes back bit for bit."""
    weight = token_embedding(pipe).weight
    before = weight.data[token].clone()
    weight.data[token] = embedding.detach().to(weight)
    try:
        yield
    finally:
        weight.data[token] = before
