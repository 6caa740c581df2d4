"""Protocols that measure an eraser, each one call or one command, resumable, with a report in JSON, Markdown and HTML."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import tyro

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

QUICK = "This is a quick run, on a subsample: its settings are in the record, its intervals are wide."


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


def with_settings(protocol: EvaluationProtocol, settings: Sequence[str]) -> EvaluationProtocol:
    """Return a protocol with other settings, each said as `NAME=VALUE`: `n_kept=25`, `counts=1,5`, `erase.n_features=64`.

    Commas part several values; names of settings within settings are joined by a point.

    Raises:
        ValueError: no `NAME=VALUE`, a setting that the protocol does not have, or a value that it cannot take.
    """
    if not settings:
        return protocol
    arguments = list[str]()
    for setting in settings:
        name, _, value = setting.partition("=")
        if not name or not value:
            raise ValueError(f"a setting is NAME=VALUE, as seed=1; got {setting!r}")
        arguments += [f"--{name.replace('_', '-')}", *value.split(",")]
    given: Any = protocol
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            return tyro.cli(type(given), default=given, args=arguments, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as error:
        known, why = ", ".join(field.name for field in fields(given)), error.__context__
        reason = f"its settings are {known}" if why is None else getattr(why, "message", str(why))
        raise ValueError(f"the protocol {protocol.name!r} cannot be set to {', '.join(settings)}: {reason}") from error


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
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        report = chosen.run(Path(folder), pipe, eraser)
    if quick:
        report = replace(report, lead=f"{report.lead} {QUICK}", record={**report.record, "quick": True})
    if out is not None:
        report.save(out)
    return report
