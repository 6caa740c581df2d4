"""Enforce erasers on a diffusers pipeline: every positive prompt passes the gate, or the call fails."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from threading import RLock, local
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itd import pipelines
from itd.artifacts import bytes_of
from itd.cache import ByteCache
from itd.drafts import DraftGate, draft_states
from itd.gate import Decision, Meaning
from itd.hooks import Handle, before_forward, edit_decoded, edit_output, edit_result
from itd.kernels import same_up_to
from itd.pictures import BLACK, picture_features
from itd.pooled import PooledGate, encode_instead, put_instead
from itd.words import version_of

if TYPE_CHECKING:
    from itd.eraser import Eraser

GUARDED: WeakSet[nn.Module] = WeakSet()
"""Image models of pipelines with erasers attached."""
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
ISSUED_ROWS = 2**16
"""How many of the rows that `encode_prompt` returned last may come back as embeddings."""


class Roles:
    """Tells, while `encode_prompt` runs, which rows of the encoder's calls the gate has to see.

    A row passes without the gate only if it is part of the negative prompt, and not of a positive prompt's text that the
    gate has not seen yet. So long prompts are gated however they are cut, and what cannot be told apart is gated.

    positive, negative: token ids of the whole texts, as `pipelines.written` gives them: a typed begin or end token would else
    keep a row from being known. `ordered`: the pipeline is known to encode positive prompts first;
    otherwise a text that is on both sides is gated on both.
    """

    def __init__(self, positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]], ordered: bool) -> None:
        self.positive, self.negative, self.ordered = [list(ids) for ids in positive], negative, ordered
        self.seen: list[int | None] = [None] * len(positive)
        """Per positive prompt, how many of its tokens the gate has seen; None before the first."""
        self.n_gated = 0
        self.n_passed = 0
        """Rows that say something and passed as negative ones."""

    def gated(self, rows: Iterable[Sequence[int]]) -> list[bool]:
        """Return for each row of a call, as `pipelines.written` gives it, whether the gate has to see it."""
        listed = [list(row) for row in rows]
        marks = [self.is_gated(row) for row in listed]
        self.n_gated += sum(marks)
        self.n_passed += sum(bool(row) and not mark for row, mark in zip(listed, marks, strict=True))
        return marks

    def is_gated(self, row: list[int]) -> bool:
        if self.takes(row):
            return True
        if not any(pipelines.contains(ids, row) for ids in self.negative):
            return True
        return not self.ordered and any(pipelines.contains(ids, row) for ids in self.positive if row)

    def takes(self, row: list[int]) -> bool:
        """Count the row to a positive prompt that it begins or continues, if there is one."""
        for i, (ids, seen) in enumerate(zip(self.positive, self.seen, strict=True)):
            start = seen or 0
            begins = seen is None and (bool(row) or not ids)
            if (begins or (row and seen is not None)) and ids[start : start + len(row)] == row:
                self.seen[i] = start + len(row)
                return True
        return False


class Attachment(Handle):
    """An eraser on a pipeline. `remove()`, or leaving the `with` block, takes it off.

    `decisions`: what the gate said of the prompts of the last call; of a long prompt that the pipeline encodes in parts, of
    each part. `n_prompts`, `n_fired`: counts of these since attaching.

    With a picture gate, the decision on a prompt has what the gate said of its pictures once they are decoded. `n_pictures`,
    `n_hidden`: counts of pictures that it looked at and that came out black.
    """

    def __init__(self, eraser: Eraser, pipe: Any, ungated: Sequence[str] = (), allow_new_words: bool = False) -> None:
        self.eraser, self.pipe, self.ungated = eraser, pipe, frozenset(ungated)
        unknown = sorted(self.ungated - set(pipelines.text_encoders(pipe)))
        if unknown:
            raise ValueError(f"the pipeline has no text encoder {unknown[0]!r}; it has {pipelines.text_encoders(pipe)}")
        self.encoder = pipelines.encoder_of(pipe, eraser.hook_point.encoder)
        module = eraser.hook_point.resolve(pipe)
        eraser.require_encoder(pipelines.fingerprint(pipe, eraser.hook_point))
        self.says = pipelines.last_state(pipe, eraser.hook_point.encoder)
        self.words = None if allow_new_words else eraser.words
        if self.words is not None:
            self.words.require(pipe, eraser.hook_point.encoder)
        self.stamp = stamp_of(self.encoder)
        self.worker = eraser
        self.decisions: list[Decision] = []
        self.own = local()
        """The decisions on the prompts that this thread encoded last, whose pictures it decodes."""
        self.n_prompts = self.n_fired = 0
        self.n_pictures = self.n_hidden = 0
        self.input_ids: Int[Tensor, "batch tokens"] | None = None
        self.marks: list[bool] = []
        """Which rows of the encoder's call the gate looked at."""
        self.runs_in_call = 0
        """How often the hook ran since the pipeline began to encode a prompt."""
        self.reaches: set[Any] = set()
        """Values of `clip_skip` with which the hook point is known to decide what the image model is given."""
        self.roles: Roles | None = None
        """Which rows are gated; None outside `encode_prompt`, where all are."""
        self.enforcer = enforcer = Enforcer.of(pipe)
        enforcer.add(self)
        hooks = [before_forward(self.encoder, self.remember_tokens), edit_output(module, self.gate)]
        if eraser.pooled is not None or eraser.edit.mode == "refuse":
            hooks.append(edit_result(self.encoder, self.judge))
        super().__init__(lambda: enforcer.drop(self), *(hook.remove for hook in hooks))

    def remember_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the token ids that the encoder is called with: the masks come from them."""
        if self.enforcer.substituting:  # another thread may be between its ids and the gate
            return
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)

    def gate(self, hidden: Float[Tensor, "batch tokens d_model"]) -> Tensor | None:
        """Edit gated rows of the hook point's output; None leaves the output as it is, bit for bit."""
        if self.enforcer.substituting:
            return None
        self.runs_in_call += 1
        if self.input_ids is None:
            raise RuntimeError("the text encoder was called without input_ids: the gate cannot see the prompt; pass token ids")
        tokenizer = pipelines.tokenizer_of(self.pipe, self.eraser.hook_point.encoder)
        content = pipelines.content_mask(self.input_ids, tokenizer)
        editable = pipelines.edit_mask(self.input_ids, tokenizer)
        if self.roles is None:
            self.decisions, marks = self.new_decisions(), [True] * len(hidden)
        else:
            marks = self.roles.gated(pipelines.written(ids, tokenizer) for ids in self.input_ids.tolist())
        self.marks = marks
        if not any(marks):
            return None
        rows = torch.tensor(marks, device=hidden.device)
        given = hidden if all(marks) else hidden[rows]
        at = rows.to(content.device)
        if self.words is not None:
            self.words.require_known(self.input_ids[at].flatten().tolist(), self.pipe, self.eraser.hook_point.encoder)
        if self.worker.sae.W_enc.device != given.device:  # also where the encoder is moved, or offloaded between calls
            self.worker = self.eraser.to(given.device)
        erased = self.worker(given, content[at], editable[at])
        self.decisions += erased.decisions
        self.n_prompts += len(erased.decisions)
        self.n_fired += sum(decision.fired for decision in erased.decisions)
        if erased.x is given:
            return None
        return erased.x if all(marks) else hidden.masked_scatter(rows[:, None, None], erased.x)

    def new_decisions(self) -> list[Decision]:
        """Return an empty list for what this thread is about to encode."""
        self.own.decisions = list[Decision]()
        return self.own.decisions

    def judge(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Give gated rows that mean a concept, or are refused, what an anchor is given; None leaves the result, bit for bit."""
        if self.enforcer.substituting or not any(self.marks):
            return None
        assert self.input_ids is not None
        name, edit, pooled = self.eraser.hook_point.encoder, self.eraser.edit, self.eraser.pooled
        rows = torch.tensor(self.marks).nonzero().flatten()
        replaced = [False] * len(rows) if pooled is None else self.judge_pooled(pooled, pipelines.pooled_output(result), rows)
        if edit.mode == "refuse":
            replaced = [decision.fired for decision in self.decisions[-len(rows) :]]
        if not any(replaced):
            return None
        prompt = edit.anchor if pooled is None else pooled.anchor
        with self.enforcer.substitution():
            anchor = encode_instead(self.pipe, name, prompt, args, kwargs, self.input_ids.shape[1])
        return put_instead(result, anchor, rows[torch.tensor(replaced)])

    def judge_pooled(
        self, gate: PooledGate, embeddings: Float[Tensor, "batch d"] | None, rows: Int[Tensor, " n"]
    ) -> list[bool]:
        """Tell which rows mean a concept by their pooled embedding, and add that to their decisions.

        Raises:
            RuntimeError: the text encoder returned no pooled embedding.
        """
        if embeddings is None:
            name = self.eraser.hook_point.encoder
            raise RuntimeError(f"{name} returned no pooled embedding: the second gate cannot see the prompt; remove the eraser")
        meanings = gate.decide(embeddings[rows.to(embeddings.device)])
        self.add_meanings(meanings)
        return [bool(meaning.concepts) for meaning in meanings]

    def add_meanings(self, meanings: Sequence[Meaning]) -> None:
        """Join what a gate on the whole prompt says of the last prompts to their decisions."""
        first = self.decisions[-len(meanings) :]
        self.decisions[-len(meanings) :] = [d.with_meaning(meaning) for d, meaning in zip(first, meanings, strict=True)]
        self.n_fired += sum(bool(meaning.concepts) and not d.fired for d, meaning in zip(first, meanings, strict=True))

    def redraw(
        self, states: Float[Tensor, "batch tokens d"], n_prompts: int, anchor_of: Callable[[str], Tensor]
    ) -> Float[Tensor, "batch tokens d"]:
        """Return the states that the image model is to see: an anchor's where the draft shows a concept, else the same tensor.

        states: of every prompt, each repeated for its pictures. `anchor_of`: gives the states of a prompt.

        Raises:
            RuntimeError: the decisions are not one for each prompt.
        """
        gate = self.eraser.draft
        if gate is None:
            return states
        if len(self.decisions) != n_prompts or len(states) % n_prompts:
            raise RuntimeError(
                f"the draft gate cannot tell the prompts apart: {n_prompts} prompts, {len(self.decisions)} decisions, "
                f"{len(states)} states; nothing was generated"
            )
        repeats = len(states) // n_prompts
        meanings = gate.decide(draft_states(self.pipe, states[::repeats]))
        self.add_meanings(meanings)
        found = torch.tensor([bool(meaning.concepts) for meaning in meanings for _ in range(repeats)], device=states.device)
        return torch.where(found[:, None, None], anchor_of(gate.anchor), states) if found.any() else states

    def look(self, latents: Float[Tensor, "n c h w"]) -> Bool[Tensor, " n"]:
        """Tell which finished pictures show a concept. latents: as the image model has them."""
        gate = self.eraser.picture
        if gate is None:
            return torch.zeros(len(latents), dtype=torch.bool)
        meanings = gate.decide(picture_features(self.pipe, latents))
        hidden = torch.tensor([bool(meaning.concepts) for meaning in meanings])
        self.n_pictures += len(meanings)
        self.n_hidden += int(hidden.sum())
        decisions: list[Decision] = getattr(self.own, "decisions", [])
        if decisions and len(meanings) % len(decisions) == 0:
            repeats = len(meanings) // len(decisions)
            for i, meaning in enumerate(meanings):
                decisions[i // repeats] = decisions[i // repeats].with_meaning(meaning)
        return hidden

    def begin_call(self, arguments: dict[str, Any], has_prompt: bool, ordered: bool) -> None:
        """Expect the prompts of a call of `encode_prompt`."""
        name = self.eraser.hook_point.encoder
        if getattr(self.pipe, name, None) is not self.encoder:
            raise RuntimeError(f"{name} was replaced after the eraser was attached; remove and attach it again")
        self.require_unchanged()
        positive = texts_of(arguments, "prompt", name) if has_prompt else []
        is_told = has_prompt or arguments.get("prompt_embeds") is not None  # else nothing that is said passes as negative
        negative = (texts_of(arguments, "negative_prompt", name) if is_told else []) or [""]
        self.runs_in_call, self.decisions = 0, self.new_decisions()
        tokenizer = pipelines.tokenizer_of(self.pipe, name)
        rows = [pipelines.token_rows(self.pipe, name, texts, whole=True) for texts in (positive, negative)]
        ids = [[pipelines.written(row, tokenizer) for row in side] for side in rows]
        self.roles = Roles(ids[0], ids[1], ordered)

    def require_unchanged(self) -> None:
        """Raise RuntimeError if the encoder's weights were written to and it says something else now than when attached."""
        stamp = stamp_of(self.encoder)
        if stamp == self.stamp:
            return
        name = self.eraser.hook_point.encoder
        says = pipelines.last_state(self.pipe, name)
        if not (says.isnan().any() or same_up_to(says, self.says)):  # NaN is the gate's to say
            raise RuntimeError(f"{name} was changed after the eraser was attached; remove it and attach one made for it")
        if self.words is not None:
            self.words.require(self.pipe, name)
        self.stamp = stamp

    def require_reach(self, clip_skip: Any, encode: Callable[[], Any]) -> None:
        """Raise ValueError if what `encode` returns does not depend on the hook point, as with a `clip_skip` to before it."""
        if clip_skip in self.reaches or self.eraser.edit.mode == "refuse":
            return
        plain = first_tensor(encode())
        with edit_output(self.eraser.hook_point.resolve(self.pipe), torch.neg, here=True):
            turned = first_tensor(encode())
        if torch.equal(plain, turned):
            raise ValueError(
                f"clip_skip={clip_skip} gives the image model states from before {self.eraser.hook_point}, which no edit can "
                "reach; use a smaller one, or an eraser at an earlier layer or with the edit refuse"
            )
        self.reaches.add(clip_skip)

    def end_call(self) -> str | None:
        """Gate every call of the encoder again; return why a positive prompt may have passed unseen since `begin_call`."""
        assert self.roles is not None
        roles, self.roles = self.roles, None
        if self.runs_in_call == 0 or roles.n_gated < len(roles.positive):
            return "did not run while the prompt was encoded"
        if roles.n_passed and None in roles.seen:
            return "cannot tell the prompt from the negative one in what was encoded"
        return None


def texts_of(arguments: dict[str, Any], name: str, encoder: str) -> list[str]:
    """Return the texts that a pipeline gives to an encoder: those for `text_encoder_2` are `prompt_2`, or else `prompt`."""
    own = arguments.get(name + encoder.removeprefix("text_encoder"))
    found = arguments.get(name) if own is None else own
    if found is None:
        return []
    return [found] if isinstance(found, str) else list(found)


class Enforcer:
    """One per pipeline: wraps `encode_prompt` and guards the image model while at least one eraser is attached."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.attachments: list[Attachment] = []
        self.lock = RLock()
        """Prompts are encoded by one thread at a time: the gate has to know whose they are."""
        self.state = local()
        self.issued: ByteCache[bool] = ByteCache(ISSUED_ROWS)
        """Digests of the embeddings that `encode_prompt` returned last, with whether they may come back as positive ones."""
        self.admitted: dict[str, tuple[Tensor, int | None]] = {}
        self.watched: tuple[Any, Handle] | None = None
        """The decoder whose pictures are looked at, where an eraser has a gate for them."""
        self.encode_prompt: Callable[..., Any] = pipe.encode_prompt
        self.replaced = vars(pipe).get("encode_prompt")
        """The pipeline's own attribute, where it had one that hid the method of its class."""
        self.signature = inspect.signature(self.encode_prompt)
        self.guarded = pipelines.image_model(pipe)
        if self.guarded in GUARDED:
            raise ValueError(
                "another pipeline shares this image model and has an eraser attached, which would refuse what this one says: "
                "remove that eraser first"
            )
        GUARDED.add(self.guarded)
        self.guard = before_forward(self.guarded, self.check_embeddings)
        pipe.encode_prompt = self.encode_gated
        setattr(pipe, pipelines.ENFORCER, self)

    @classmethod
    def of(cls, pipe: Any) -> Enforcer:
        return getattr(pipe, pipelines.ENFORCER, None) or cls(pipe)

    def add(self, attachment: Attachment) -> None:
        """Enforce one more eraser; embeddings that were encoded without it are not accepted any more.

        Raises:
            ValueError: a draft or picture gate of another image model, or for a pipeline that it cannot be enforced on.
        """
        draft, picture = attachment.eraser.draft, attachment.eraser.picture
        try:
            if draft is not None:
                self.require_drafts(draft)
            if picture is not None:
                picture.require_image_model(self.pipe)
        except BaseException:
            self.release_unused()
            raise
        self.attachments.append(attachment)
        if picture is not None and self.watched is None:
            self.watched = self.pipe.vae, edit_decoded(self.pipe.vae, self.hide)
        self.issued.clear()
        self.admitted.clear()

    def drop(self, attachment: Attachment) -> None:
        """Forget an attachment; with the last one the pipeline is as it was."""
        self.attachments.remove(attachment)
        self.release_unused()

    def require_drafts(self, gate: DraftGate) -> None:
        """Raise ValueError if a draft gate is of another image model, or positive prompts cannot be told in what is encoded."""
        if not self.is_known:
            kind = type(self.pipe).__name__
            raise ValueError(f"a draft gate is enforced on diffusers' Stable Diffusion pipelines only, this is {kind}")
        gate.require_image_model(self.pipe)

    def release_unused(self) -> None:
        """Leave the pipeline as it was if no eraser is attached, and its decoder if none has a picture gate."""
        if self.watched and not any(attachment.eraser.picture for attachment in self.attachments):
            self.watched[1].remove()
            self.watched = None
        if not self.attachments:
            self.guard.remove()
            GUARDED.discard(self.guarded)
            del self.pipe.encode_prompt
            if self.replaced is not None:
                self.pipe.encode_prompt = self.replaced
            delattr(self.pipe, pipelines.ENFORCER)

    @torch.no_grad()
    def hide(self, given: Float[Tensor, "n c h w"], images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"] | None:
        """Black out the pictures in which a picture gate sees a concept; None leaves all, bit for bit.

        given: latents as the decoder gets them.
        """
        if self.substituting:
            return None
        unet = self.pipe.unet
        latents = (given * self.pipe.vae.config.scaling_factor).to(pipelines.device_of(unet), unet.dtype)
        hidden = torch.stack([attachment.look(latents) for attachment in self.attachments]).any(0).to(images.device)
        return images.masked_fill(hidden[:, None, None, None], BLACK) if hidden.any() else None

    def encode_gated(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline's `encode_prompt` with the gate armed for the positive prompts; see `encode_alone`."""
        if self.substituting:
            return self.encode_prompt(*args, **kwargs)
        with self.lock:
            return self.encode_alone(*args, **kwargs)

    def encode_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Call `encode_prompt` while no other thread does.

        Raises:
            ValueError: embeddings were passed by hand.
            RuntimeError: the gate did not run on the prompts or could not tell them from negative ones, no edit could reach
                what is returned, a text encoder has no gate, or a network that is guarded was replaced or changed.
        """
        self.require_same_parts()
        arguments = self.signature.bind(*args, **kwargs).arguments
        by_hand = [name for name in EMBEDDINGS if arguments.get(name) is not None]
        for name in by_hand:
            if not self.passed(arguments[name], positive=True):
                raise ValueError(f"{name} did not pass the gate of the attached eraser; pass the prompt as text")
        has_prompt = arguments.get("prompt") is not None and arguments.get("prompt_embeds") is None
        if has_prompt:
            self.require_all_gated()
            for attachment in self.attachments:
                attachment.require_reach(arguments.get("clip_skip"), lambda: self.encode_instead(pipelines.PROBE, args, kwargs))
        begun: list[Attachment] = []
        try:
            for attachment in self.attachments:
                attachment.begin_call(arguments, has_prompt, self.is_known)
                begun.append(attachment)
            result = self.encode_prompt(*args, **kwargs)
        finally:
            unseen = [attachment.end_call() for attachment in begun]
        for attachment, why in zip(self.attachments, unseen, strict=True):
            if has_prompt and why:
                raise RuntimeError(
                    f"the gate at {attachment.eraser.hook_point} {why}; "
                    "nothing was generated: remove the eraser to generate without it"
                )
        n_prompts = max(len(texts_of(arguments, "prompt", "text_encoder")), 1) if has_prompt else 0
        if n_prompts and any(attachment.eraser.draft is not None for attachment in self.attachments):
            result = self.redrawn(result, n_prompts, args, kwargs)
        self.issue(result if isinstance(result, tuple) else (result,))
        return result

    def require_same_parts(self) -> None:
        """Raise RuntimeError if a network that is guarded is no longer that of the pipeline."""
        if pipelines.image_model(self.pipe) is not self.guarded:
            raise RuntimeError("the image model was replaced after the eraser was attached; remove and attach it again")
        if self.watched and self.watched[0] is not self.pipe.vae:
            raise RuntimeError("the vae was replaced after the eraser was attached; remove and attach it again")

    def redrawn(self, result: tuple[Tensor, ...], n_prompts: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the draft gates see what `encode_prompt` returned, and put anchors where they fire."""
        states, *rest = result
        for attachment in self.attachments:
            states = attachment.redraw(states, n_prompts, lambda prompt: self.encode_instead(prompt, args, kwargs)[0])
        return (states, *rest)

    def encode_instead(self, prompt: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `encode_prompt` says of another prompt, alone, when it is called with the same arguments otherwise."""
        bound = self.signature.bind(*args, **kwargs)
        for name in list(bound.arguments):
            if name.startswith(("prompt_", "negative_")):  # of a second encoder, or of negative prompts: as many as the prompts
                bound.arguments.pop(name)
        bound.arguments |= {"prompt": prompt, "num_images_per_prompt": 1}
        with self.substitution():
            return self.encode_prompt(*bound.args, **bound.kwargs)

    @property
    def substituting(self) -> bool:
        """Whether this thread encodes an anchor, drafts a prompt or checks one, which no gate looks at."""
        return getattr(self.state, "substituting", False)

    @contextmanager
    def substitution(self) -> Generator[None, None, None]:
        """Let no gate look at what this thread encodes or drafts inside."""
        before, self.state.substituting = self.substituting, True
        try:
            yield
        finally:
            self.state.substituting = before

    @property
    def is_known(self) -> bool:
        """Whether `encode_prompt` is one of diffusers' own for Stable Diffusion: positive prompts first, in and out."""
        function = getattr(self.encode_prompt, "__func__", self.encode_prompt)
        family = any(cls.__name__.startswith("StableDiffusion") for cls in type(self.pipe).__mro__)
        return family and getattr(function, "__module__", "").startswith("diffusers.pipelines.")

    def require_all_gated(self) -> None:
        """Raise RuntimeError if a text encoder conditions the image model and no attached eraser gates it."""
        gated = {attachment.eraser.hook_point.encoder for attachment in self.attachments}
        accepted = {name for attachment in self.attachments for name in attachment.ungated}
        for name in pipelines.text_encoders(self.pipe):
            if name not in gated | accepted:
                raise RuntimeError(
                    f"{name} reads the prompt too and no attached eraser gates it, so what is erased can enter through it; "
                    f"attach an eraser made for it, or accept that with eraser.attach(pipe, ungated=[{name!r}]) "
                    f"(--ungated {name})"
                )

    def issue(self, outputs: Sequence[Any]) -> None:
        """Keep what identifies the rows of the embeddings that `encode_prompt` returned.

        Where it is known which of them are positive, these may be passed back by hand; rows of negative prompts, which
        were not gated, may not.
        """
        known = self.is_known and len(outputs) in (2, 4)
        for i, output in enumerate(outputs):
            for row in output if isinstance(output, Tensor) else ():
                key = digest(row)
                self.issued.put(key, (known and i % 2 == 0) or bool(self.issued.get(key)), 1)

    def passed(self, states: Tensor, positive: bool = False) -> bool:
        """Tell whether every row came from `encode_gated` since the last eraser was attached, as a positive one if asked."""
        found = [self.issued.get(digest(row)) for row in states]
        return all(each is not None and (each or not positive) for each in found)

    def check_embeddings(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise RuntimeError unless every row of the image model's text states came from `encode_gated`."""
        if self.substituting:
            return
        states = {
            "encoder_hidden_states": kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None),
            "text_embeds": (kwargs.get("added_cond_kwargs") or {}).get("text_embeds"),
        }
        for name, value in states.items():
            if value is None or self.is_admitted(name, value):
                continue
            if not self.passed(value):
                raise RuntimeError(
                    "text states reached the image model without passing the gate of the attached eraser; "
                    "let the pipeline that it is attached to encode the prompt"
                )
            self.admitted[name] = value, version_of(value)

    def is_admitted(self, name: str, states: Tensor) -> bool:
        """Tell whether these states were checked in the step before and not written to since."""
        known, version = self.admitted.get(name, (None, None))
        return known is states and version is not None and version == version_of(states)


def stamp_of(module: nn.Module) -> list[tuple[int, int | None, int]]:
    """Return numbers that change when a parameter is replaced, moved or written to."""
    return [(id(parameter), version_of(parameter), parameter.data_ptr()) for parameter in module.parameters()]


def first_tensor(result: Any) -> Tensor:
    """Return the states in what `encode_prompt` returned: all of it, or the first of several."""
    return result if isinstance(result, Tensor) else result[0]


def digest(row: Tensor) -> bytes:
    """Return what identifies a tensor's bits and shape, without keeping the tensor."""
    return hashlib.blake2b(bytes_of(row) + str((row.dtype, row.shape)).encode(), digest_size=16).digest()


def attach(eraser: Eraser, pipe: Any, ungated: Sequence[str] = (), allow_new_words: bool = False) -> Attachment:
    """Attach an eraser to a pipeline; see `Eraser.attach`."""
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt; itd attaches to diffusers text-to-image pipelines")
    return Attachment(eraser, pipe, ungated, allow_new_words)
