"""Protocols that measure an eraser, each one call or one command, resumable, with a report in JSON, Markdown and HTML."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from itd.eraser import Eraser

if TYPE_CHECKING:
    from itd.evaluation.results import Report

ProtocolName = Literal["identities", "styles", "unsafe", "general", "many", "gate", "minilm", "full-scale"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
CLASSES: dict[str, tuple[str, str]] = {
    "identities": ("identities", "Identities"), "styles": ("styles", "Styles"), "unsafe": ("unsafe", "Unsafe"),
    "general": ("general", "General"), "many": ("many", "Many"), "gate": ("gate", "GateAlone"), "minilm": ("minilm", "MiniLM"),
    "full-scale": ("full_scale", "FullScale"),
}  # fmt: skip
"""Name -> module and class. They are imported when they are asked for: most load diffusers."""


class EvaluationProtocol(Protocol):
    """What is measured, as an immutable object: its fields are the settings, `run` does it."""

    name: ClassVar[str]

    def quick(self) -> EvaluationProtocol:
        """Return the same protocol on a stated subsample."""
        ...

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Measure, keeping every cell below `out/cells`; a run that was stopped goes on there."""
        ...


def find_protocol(name: str, **settings: Any) -> EvaluationProtocol:
    """Return a protocol by its name, with settings.

    Raises:
        ValueError: there is none of that name, or it has no such setting.
    """
    if name not in CLASSES:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {name!r}")
    module, cls = CLASSES[name]
    try:
        return getattr(import_module(f"itd.evaluation.{module}"), cls)(**settings)
    except TypeError as error:
        raise ValueError(f"the protocol {name!r} cannot be set so: {error}") from error


def evaluate(
    pipe: Any,
    protocol: EvaluationProtocol | str,
    eraser: Eraser | None = None,
    out: str | Path | None = None,
    quick: bool = False,
) -> Report:
    """Measure an eraser, or the erasers that the protocol makes.

    Args:
        pipe: a pipeline; None for the one that the protocol is written for.
        protocol: a protocol or its name; see `PROTOCOLS`.
        eraser: measured instead of the protocol's own, where the protocol allows it.
        out: folder of the cells and the report; a run that was stopped goes on there. Without it, nothing is kept.
        quick: a stated subsample.

    Raises:
        ValueError: an unknown protocol, or `out` holds results with other settings or weights.
    """
    chosen = find_protocol(protocol) if isinstance(protocol, str) else protocol
    chosen = chosen.quick() if quick else chosen
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return chosen.run(Path(folder), pipe, eraser)
    report = chosen.run(Path(out), pipe, eraser)
    report.save(out)
    return report
