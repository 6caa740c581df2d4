"""The arguments of a command, kept beside what it made, so that the file re-creates it."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from itd.artifacts import itd_version, read_object

COMMAND = "command.json"
"""Where the arguments are kept in a folder whose `config.json` is the artifact's own."""
NOT_KEPT = "config"

Values = Mapping[str, Any]
T = TypeVar("T")


def command_name(command: type) -> str:
    return command.__name__.lower()


# To and from JSON


def flatten_arguments(args: Any) -> dict[str, Any]:
    """Return the arguments of a command under the names of their flags, as values for JSON."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            values |= flatten_arguments(value)
        elif field.name != NOT_KEPT:
            values[field.name] = plain(value)
    return values


def plain(value: Any) -> Any:
    """Return a value for JSON; groups of a repeated flag become one list."""
    if isinstance(value, tuple):
        return list(flat(value))
    return str(value) if isinstance(value, Path) else value


def flat(groups: Sequence[Any]) -> Iterator[Any]:
    """Yield the values of a flag that takes several and may be repeated."""
    for group in groups:
        if isinstance(group, tuple):
            yield from flat(group)
        else:
            yield str(group) if isinstance(group, Path) else group


def read_arguments(path: Path, command: type) -> dict[str, Any]:
    """Read what `write_arguments` wrote, and check names and types.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a command's, is of another command, or holds an unknown or ill-typed argument.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no arguments at {path}")
    content = read_object(path, "name a file of arguments that a command of itd wrote")
    if not isinstance(content.get("arguments"), dict) or "command" not in content:
        raise ValueError(f"{path} does not hold the arguments of a command: it needs 'command' and an object 'arguments'")
    name, values = command_name(command), content["arguments"]
    if content["command"] != name:
        raise ValueError(f"{path} holds the arguments of `itd {content['command']}`, not of `itd {name}`")
    known = argument_types(command)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path}: `itd {name}` has no argument {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return {key: read_value(known[key], value, f"{path}: {key}") for key, value in values.items()}


def argument_types(command: type) -> dict[str, Any]:
    """Return the type of every argument by the name of its flag."""
    known: dict[str, Any] = {}
    hints = get_type_hints(command)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            known |= argument_types(hint)  # pyright: ignore[reportArgumentType]
        elif field.name != NOT_KEPT:
            known[field.name] = hint
    return known


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type asked for, or raise ValueError naming `where`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return read_value(option, value, where)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list):
        if get_origin(options[0]) is tuple:
            return (read_value(options[0], value, where),)
        return tuple(read_value(options[0], item, where) for item in value)
    elif origin is Literal and value in options:
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r}, which is not {getattr(hint, '__name__', str(hint))}")


# What the flags on the command line are laid over


def base_arguments(command: type[T], argv: Sequence[str], presets: Mapping[str, Values], either: tuple[str, ...]) -> T:
    """Return what the command's flags are laid over: its defaults, then the preset, then the file of `--config`.

    A preset named on the command line counts more than the file. A flag given on the command line empties its field, so that
    a repeated flag does not add to what was there; of the flags in `either`, one that is given clears the others.
    """
    given = flags_in(argv)
    values: dict[str, Any] = {}
    if given.get("config"):
        values = read_arguments(Path(given["config"]), command)
        values = {**presets.get(values.get("preset", ""), {}), **values}
    values |= presets.get(given.get("preset", ""), {})
    if set(either) & set(given):
        values |= dict.fromkeys(either)
    return build(command, {name: value for name, value in values.items() if name not in given})


def flags_in(argv: Sequence[str]) -> dict[str, str]:
    """Return the flags of a command line, by field name, each with the word behind it."""
    found = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def build(command: type[T], values: Values) -> T:
    """Make a command from values by flag name; what is required and not there is marked for the parser to ask for."""
    import tyro

    hints, arguments = get_type_hints(command), {}
    for field in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            arguments[field.name] = tyro.MISSING
    return command(**arguments)


# Folders


def write_arguments(args: Any, path: Path) -> None:
    """Keep the arguments of a command in a file that `--config` reads."""
    content = {"command": command_name(type(args)), "itd_version": itd_version(), "arguments": flatten_arguments(args)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def run_folder(args: Any, path: Path) -> Generator[None]:
    """Keep the arguments at `path` from the start of a run, so that one that was stopped can go on.

    What was there comes back if the command refuses its arguments.

    Raises:
        ValueError: the folder holds something else.
    """
    require_run_of(path, command_name(type(args)))
    before = path.read_bytes() if path.exists() else None
    write_arguments(args, path)
    try:
        yield
    except Exception:
        if before is not None:
            path.write_bytes(before)
        else:
            path.unlink(missing_ok=True)
        raise
    write_arguments(args, path)


def require_run_of(path: Path, name: str) -> None:
    """Raise ValueError if the file is there and is not of a run of this command."""
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is a file; name a folder")
    found = read_object(path, "name another folder") if path.is_file() else {"command": name}
    if found.get("command") != name:
        what = f"kind {found['kind']!r}" if "kind" in found else f"command {found.get('command')!r}"
        raise ValueError(f"{path.parent} holds something else, of {what}; name another folder")
