"""Find a module inside a text encoder, read its output, edit its output. The only module that registers hooks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Self, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

WRAPPER = "text_model."
"""Prefix that CLIP text encoders had before transformers 5.6 and that saved names still carry."""

Result = TypeVar("Result")
Edit = Callable[[Float[Tensor, "batch tokens d_model"]], Tensor | None]


@dataclass(frozen=True)
class HookPoint:
    """A place whose output is the residual stream, e.g. `HookPoint("text_encoder", "encoder.layers.8")`.

    `encoder`: name of the pipeline's component. `path`: dotted module path inside it; given with or without `text_model.`,
    kept without, so that both spellings are one place.
    """

    encoder: str
    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.removeprefix(WRAPPER))

    def resolve(self, pipe: Any) -> nn.Module:
        """Return the module, whichever spelling of its path the encoder has.

        Raises:
            ValueError: the pipeline has no such encoder, or the encoder no such module; near matches are named.
        """
        encoder = getattr(pipe, self.encoder, None)
        if not isinstance(encoder, nn.Module):
            found = [name for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
            raise ValueError(f"the pipeline has no encoder {self.encoder!r}; its modules are {found}")
        return find_module(encoder, self.path)

    def __str__(self) -> str:
        return f"{self.encoder}:{self.path}"

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """Read the form that `str` writes, `encoder:path`.

        Raises:
            ValueError: it is not of this form.
        """
        encoder, colon, path = text.partition(":")
        if not (encoder and colon and path):
            raise ValueError(f"a hook point is written ENCODER:PATH, as text_encoder:encoder.layers.8; got {text!r}")
        return cls(encoder, path)


def find_module(encoder: nn.Module, path: str) -> nn.Module:
    """Return the submodule at `path`, with or without the `text_model.` prefix; list near matches if there is none."""
    modules = dict(encoder.named_modules())
    for spelling in (path, WRAPPER + path, path.removeprefix(WRAPPER)):
        if spelling and spelling in modules:
            return modules[spelling]
    names = [name.removeprefix(WRAPPER) for name in modules if name]
    near = difflib.get_close_matches(path, names, n=5, cutoff=0.5) or names[:5]
    raise ValueError(f"{type(encoder).__name__} has no module {path!r}; near matches: {', '.join(near)}")


def untuple(output: Any) -> Tensor:
    """Return the hidden states of a layer's output, which older releases wrap in a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise ValueError(f"a hook point must give a tensor (batch, tokens, d_model), got {type(hidden).__name__}")
    return hidden


def retuple(output: Any, hidden: Tensor) -> Any:
    """Put `hidden` back into the form that `output` has."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Handle:
    """What was attached; `remove()` takes it off again. Also a context manager."""

    def __init__(self, *removers: Callable[[], None]) -> None:
        self._removers = list(removers)

    @property
    def attached(self) -> bool:
        return bool(self._removers)

    def remove(self) -> None:
        """Undo the attachment, in reverse order. A second call does nothing."""
        while self._removers:
            self._removers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in other threads, so that what they run is neither read, edited nor stopped."""
    owner = get_ident()
    return lambda *given: hook(*given) if get_ident() == owner else None


def edit_output(module: nn.Module, edit: Edit, here: bool = False) -> Handle:
    """Replace the module's output by `edit(output)` where that is not None, before any other hook sees it.

    here: in this thread only.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = edit(untuple(output))
        return None if hidden is None else retuple(output, hidden)

    return Handle(module.register_forward_hook(of_this_thread(hook) if here else hook, prepend=True).remove)


def before_forward(module: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Handle:
    """Call `look(args, kwargs)` before every forward of the module."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(args, kwargs)

    return Handle(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)


def edit_result(module: nn.Module, edit: Callable[[tuple[Any, ...], dict[str, Any], Any], Any], here: bool = False) -> Handle:
    """Replace all that the module returns by `edit(args, kwargs, result)` where that is not None.

    here: in this thread only.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return edit(args, kwargs, result)

    chosen = of_this_thread(hook) if here else hook
    return Handle(module.register_forward_hook(chosen, with_kwargs=True, prepend=True).remove)


def edit_decoded(vae: Any, edit: Callable[[Tensor, Tensor], Tensor | None]) -> Handle:
    """Replace the pictures that `vae.decode` returns by `edit(latents, pictures)` where that is not None.

    Handles on one autoencoder come off in reverse order.
    """
    decode, own = vae.decode, vars(vae).get("decode")

    def edited(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = decode(latents, *args, **kwargs)
        images = edit(latents, result[0])
        if images is None:
            return result
        return (images, *result[1:]) if isinstance(result, tuple) else type(result)(sample=images)

    def restore() -> None:
        del vae.decode
        if own is not None:
            vae.decode = own

    vae.decode = edited
    return Handle(restore)


class _Stop(Exception):
    """Ends a forward pass once the wanted activation is there."""


@contextmanager
def recording(module: nn.Module) -> Generator[list[Tensor], None, None]:
    """Collect the module's outputs; the forward pass that calls it goes on."""
    outputs: list[Tensor] = []
    with edit_output(module, outputs.append, here=True):
        yield outputs


def run_up_to(module: nn.Module, run: Callable[[], Any], read: Callable[[Any], Tensor] = untuple) -> Tensor:
    """Call `run()` and stop it as soon as `module` has given its output, of which `read` returns what is wanted.

    What other threads run goes on. By default these are hidden states, (batch, tokens, d_model).

    Raises:
        RuntimeError: `run` ended without calling the module.
    """
    outputs: list[Tensor] = []

    def keep(_args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any) -> None:
        outputs.append(read(result))
        raise _Stop

    with edit_result(module, keep, here=True):
        try:
            run()
        except _Stop:
            return outputs[0]
    raise never_reached(module)


def run_past(module: nn.Module, run: Callable[[], Result], read: Callable[[Any], Tensor] = untuple) -> tuple[Result, Tensor]:
    """Call `run()` and return its result, and what `module` gave on the way; see `run_up_to`.

    Raises:
        RuntimeError: `run` ended without calling the module.
    """
    outputs: list[Tensor] = []

    def keep(_args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any) -> None:
        outputs.append(read(result))

    with edit_result(module, keep, here=True):
        result = run()
    if not outputs:
        raise never_reached(module)
    return result, outputs[0]


def never_reached(module: nn.Module) -> RuntimeError:
    return RuntimeError(f"the forward pass never reached {type(module).__name__}: it is not part of what ran")
