"""Enforce erasers on a diffusers pipeline: every positive prompt passes the gate, or the call fails."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itd import pipelines
from itd.gate import Decision
from itd.hooks import Handle, before_forward, edit_output

if TYPE_CHECKING:
    from itd.eraser import Eraser

ENFORCER = "_itd_enforcer"
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")


class Attachment(Handle):
    """An eraser on a pipeline. `remove()`, or leaving the `with` block, takes it off.

    `decisions`: what the gate said of the prompts of the last call. `n_prompts`, `n_fired`: counts since attaching.
    """

    def __init__(self, eraser: Eraser, pipe: Any) -> None:
        self.eraser, self.pipe = eraser, pipe
        self.encoder = pipelines.encoder_of(pipe, eraser.hook_point.encoder)
        module = eraser.hook_point.resolve(pipe)
        eraser.require_encoder(pipelines.fingerprint(pipe, eraser.hook_point))
        device = next(module.parameters()).device
        self.worker = eraser if eraser.sae.W_enc.device == device else eraser.to(device)
        self.decisions: list[Decision] = []
        self.n_prompts = self.n_fired = 0
        self.input_ids: Int[Tensor, "batch tokens"] | None = None
        self.fired_in_call = 0
        """How often the hook ran since the pipeline began to encode a prompt."""
        self.gated_calls: int | None = None
        """How many more encoder calls carry positive prompts; None outside `encode_prompt`, where all are gated."""
        enforcer = Enforcer.of(pipe)
        enforcer.add(self)
        look = before_forward(self.encoder, self.remember_tokens)
        hook = edit_output(module, self.gate)
        super().__init__(lambda: enforcer.drop(self), look.remove, hook.remove)

    def remember_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the token ids that the encoder is called with: the masks come from them."""
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)

    def gate(self, hidden: Float[Tensor, "batch tokens d_model"]) -> Tensor | None:
        """Edit gated rows of the hook point's output; None leaves the output as it is, bit for bit."""
        self.fired_in_call += 1
        if self.gated_calls is not None:
            if self.gated_calls == 0:
                return None
            self.gated_calls -= 1
        if self.input_ids is None:
            raise RuntimeError("the text encoder was called without input_ids: the gate cannot see the prompt; pass token ids")
        tokenizer = pipelines.tokenizer_of(self.pipe, self.eraser.hook_point.encoder)
        content = pipelines.content_mask(self.input_ids, tokenizer)
        editable = pipelines.edit_mask(self.input_ids, tokenizer)
        erased = self.worker(hidden, content, editable)
        self.decisions = erased.decisions
        self.n_prompts += len(erased.decisions)
        self.n_fired += sum(decision.fired for decision in erased.decisions)
        return None if erased.x is hidden else erased.x

    def begin_call(self, has_prompt: bool) -> None:
        if getattr(self.pipe, self.eraser.hook_point.encoder, None) is not self.encoder:
            raise RuntimeError(
                f"{self.eraser.hook_point.encoder} was replaced after the eraser was attached; remove and attach it again"
            )
        self.fired_in_call, self.gated_calls = 0, int(has_prompt)

    def end_call(self) -> int:
        """Gate every call of the encoder again; return how often the hook ran since `begin_call`."""
        self.gated_calls = None
        return self.fired_in_call


class Enforcer:
    """One per pipeline: wraps `encode_prompt` and guards the image model while at least one eraser is attached."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.attachments: list[Attachment] = []
        self.issued: set[bytes] = set()
        """Digests of the embeddings that `encode_prompt` returned: what may reach the image model."""
        self.admitted: Tensor | None = None
        self.encode_prompt: Callable[..., Any] = pipe.encode_prompt
        self.replaced = vars(pipe).get("encode_prompt")
        """The pipeline's own attribute, where it had one that hid the method of its class."""
        self.signature = inspect.signature(self.encode_prompt)
        self.guard = before_forward(pipelines.image_model(pipe), self.check_embeddings)
        pipe.encode_prompt = self.encode_gated
        setattr(pipe, ENFORCER, self)

    @classmethod
    def of(cls, pipe: Any) -> Enforcer:
        return getattr(pipe, ENFORCER, None) or cls(pipe)

    def add(self, attachment: Attachment) -> None:
        """Enforce one more eraser; embeddings that were encoded without it are not accepted any more."""
        self.attachments.append(attachment)
        self.issued, self.admitted = set(), None

    def drop(self, attachment: Attachment) -> None:
        """Forget an attachment; with the last one the pipeline is as it was."""
        self.attachments.remove(attachment)
        if not self.attachments:
            self.guard.remove()
            del self.pipe.encode_prompt
            if self.replaced is not None:
                self.pipe.encode_prompt = self.replaced
            delattr(self.pipe, ENFORCER)

    def encode_gated(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline's `encode_prompt` with the gate armed for the positive prompts.

        Raises:
            ValueError: embeddings were passed by hand.
            RuntimeError: the gate did not run, or the text encoder was replaced.
        """
        arguments = self.signature.bind(*args, **kwargs).arguments
        by_hand = [name for name in EMBEDDINGS if arguments.get(name) is not None]
        for name in by_hand:
            if not self.passed(arguments[name]):
                raise ValueError(f"{name} did not pass the gate of the attached eraser; pass the prompt as text")
        has_prompt = not by_hand and arguments.get("prompt") is not None
        try:
            for attachment in self.attachments:
                attachment.begin_call(has_prompt)
            result = self.encode_prompt(*args, **kwargs)
        finally:
            ran = [attachment.end_call() for attachment in self.attachments]
        for attachment, n_runs in zip(self.attachments, ran, strict=True):
            if has_prompt and n_runs == 0:
                raise RuntimeError(
                    f"the gate at {attachment.eraser.hook_point} did not run while the prompt was encoded; "
                    "nothing was generated: remove the eraser to generate without it"
                )
        outputs = result if isinstance(result, tuple) else (result,)
        self.issued.update(digest(row) for output in outputs if isinstance(output, Tensor) for row in output)
        return result

    def passed(self, states: Tensor) -> bool:
        """Tell whether every row came from `encode_gated` since the last eraser was attached."""
        return all(digest(row) in self.issued for row in states)

    def check_embeddings(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise RuntimeError unless every row of the image model's text states came from `encode_gated`."""
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if states is None or states is self.admitted:
            return
        if not self.passed(states):
            raise RuntimeError(
                "text states reached the image model without passing the gate of the attached eraser; "
                "let the pipeline encode the prompt"
            )
        self.admitted = states


def digest(row: Tensor) -> bytes:
    """Return what identifies a tensor's bits and shape, without keeping the tensor."""
    values = torch.atleast_1d(row.detach().cpu()).contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().tobytes() + str((row.dtype, row.shape)).encode(), digest_size=16).digest()


def attach(eraser: Eraser, pipe: Any) -> Attachment:
    """Attach an eraser to a pipeline; see `Eraser.attach`."""
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt; itd attaches to diffusers text-to-image pipelines")
    return Attachment(eraser, pipe)
