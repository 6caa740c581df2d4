"""Prompts with their concept and template, split by both, so that what is tested was never seen."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from itd.artifacts import read_text

Split = Literal["fit", "calibrate", "test"]
SPLITS: tuple[Split, ...] = ("fit", "calibrate", "test")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `concept`: what it names, if it is known. `template`: the text with the concept taken out."""

    text: str
    concept: str | None = None
    template: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """An immutable sequence of prompts.

    >>> prompts = PromptSet.from_names(["cat", "dog"], ["a photo of a {}"])
    >>> [prompt.text for prompt in prompts]
    ['a photo of a cat', 'a photo of a dog']
    """

    prompts: tuple[Prompt, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return PromptSet(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __add__(self, other: PromptSet) -> PromptSet:
        return PromptSet(self.prompts + other.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def concepts(self) -> tuple[str, ...]:
        """Concepts in order of first appearance."""
        return tuple(dict.fromkeys(prompt.concept for prompt in self.prompts if prompt.concept is not None))

    @property
    def sha256(self) -> str:
        """Hash of texts and concepts, in order: what an artifact keeps of the prompts it was made from."""
        rows = json.dumps([[prompt.text, prompt.concept] for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(rows.encode()).hexdigest()

    def filter(self, keep: Callable[[Prompt], bool]) -> PromptSet:
        return PromptSet(tuple(prompt for prompt in self.prompts if keep(prompt)))

    def of(self, split: Split) -> PromptSet:
        """Return the prompts of one split."""
        return self.filter(lambda prompt: prompt.split == split)

    def about(self, concept: str) -> PromptSet:
        """Return the prompts of one concept."""
        return self.filter(lambda prompt: prompt.concept == concept)

    def sample(self, n: int, seed: int = 0) -> PromptSet:
        """Draw at most n prompts without replacement, in their order."""
        if n >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), n))
        return PromptSet(tuple(self.prompts[i] for i in chosen))

    def unique(self) -> PromptSet:
        """Keep the first prompt of every text."""
        first: dict[str, Prompt] = {}
        for prompt in self.prompts:
            first.setdefault(prompt.text, prompt)
        return PromptSet(tuple(first.values()))

    # Making prompt sets

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> PromptSet:
        """Make a prompt of every text.

        Raises:
            ValueError: one text in place of several.
        """
        require_several("texts", texts)
        return cls(tuple(Prompt(text) for text in texts))

    @classmethod
    def from_names(cls, names: Iterable[str], templates: Sequence[str], split: Split | None = None) -> PromptSet:
        """Fill every template's `{}` with every name; templates vary fastest.

        Raises:
            ValueError: a template has no `{}`, several, or other braces; one name or template in place of several.
        """
        require_several("names", names)
        require_several("templates", templates)
        for template in templates:
            if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
                raise ValueError(f"the template {template!r} needs one {{}} for the concept's name, and no other braces")
        return cls(tuple(Prompt(fill(t, name), name, t, split) for name in names for t in templates))

    @classmethod
    def from_csv(cls, path: str | Path) -> PromptSet:
        """Read a CSV with a column `prompt` and, if there are any, `concept` (or `class`) and `template`.

        Raises:
            ValueError: see `from_file`.
        """
        return cls(tuple(prompt_of(row, where) for where, row in csv_rows(path, ["prompt"])))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> PromptSet:
        """Read one JSON object per line, with the keys of `from_csv`.

        Raises:
            ValueError: see `from_file`.
        """
        # Not splitlines: a text may hold other line ends than "\n".
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
        return cls(tuple(prompt_of(parse_line(line, where), where) for where, line in lines))

    @classmethod
    def from_parquet(cls, path: str | Path) -> PromptSet:
        """Read a Parquet file with the columns of `from_csv`; needs pyarrow."""
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("reading Parquet needs pyarrow: pip install pyarrow") from error
        table = parquet.read_table(str(path))
        require_columns(path, table.column_names, ["prompt"])
        return cls(tuple(prompt_of(row, f"{path}, row {n}") for n, row in enumerate(table.to_pylist(), 1)))

    @classmethod
    def from_text(cls, path: str | Path) -> PromptSet:
        """Read one prompt per line.

        Raises:
            ValueError: see `from_file`.
        """
        lines = read_text(path).splitlines()
        return cls.from_texts(line.strip() for line in lines if line.strip())

    @classmethod
    def from_file(cls, path: str | Path) -> PromptSet:
        """Read a prompt file by its ending: .csv, .jsonl, .parquet or .txt.

        Raises:
            ValueError: the ending is none of these, or the file is not UTF-8, is malformed or has no prompt in some row; the
                message names file and line.
            FileNotFoundError: there is no such file.
        """
        readers = {
            ".csv": cls.from_csv,
            ".jsonl": cls.from_jsonl,
            ".parquet": cls.from_parquet,
            ".txt": cls.from_text,
        }
        suffix = Path(path).suffix.lower()
        if suffix not in readers:
            raise ValueError(f"{path}: a prompt file ends in {', '.join(readers)}, not {suffix!r}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no prompt file at {path}")
        return readers[suffix](path)

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]]) -> PromptSet:
        """Build from mappings; a template is recovered where the concept stands in the text.

        Raises:
            ValueError: a row has no text as its prompt.
        """
        return cls(tuple(prompt_of(row, f"row {n}") for n, row in enumerate(rows, 1)))

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object per line; `from_jsonl` reads it back, without the splits."""
        rows = ({"prompt": p.text, "concept": p.concept, "template": p.template} for p in self.prompts)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(path).write_text(text, encoding="utf-8")

    # Splitting

    def split_by_template(self, seed: int = 0, shares: tuple[float, float, float] = (0.5, 0.3, 0.2)) -> PromptSet:
        """Assign splits so that no template (or, without one, no text) stands in two.

        Every concept is in each that has three templates of its own, or all that are shared. Prompts that have a split keep it.
        """
        concepts: dict[str, set[str | None]] = {}
        for prompt in self.prompts:
            if prompt.split is None:
                concepts.setdefault(prompt.template or prompt.text, set()).add(prompt.concept)
        pools: dict[frozenset[str | None], list[str]] = {}  # what one concept alone has is dealt within the concept
        for key, owners in sorted(concepts.items()):
            pools.setdefault(frozenset(owners if len(owners) == 1 else ()), []).append(key)
        split_of = {key: split for keys in pools.values() for key, split in assign(keys, seed, shares).items()}
        return PromptSet(tuple(p if p.split else replace(p, split=split_of[p.template or p.text]) for p in self.prompts))

    def split_by_concept_and_template(self, seed: int = 0, shares: tuple[float, float, float] = (0.5, 0.3, 0.2)) -> PromptSet:
        """Assign splits so that neither a concept nor a template stands in two.

        A prompt whose concept and template fall into different splits is dropped. Prompts that have a split keep
        it; prompts without a concept are split by template.
        """
        loose = [prompt for prompt in self.prompts if prompt.split is None]
        by_template = assign(sorted({p.template or p.text for p in loose}), seed, shares)
        by_concept = assign(sorted({p.concept for p in loose if p.concept is not None}), seed + 1, shares)
        kept = []
        for prompt in self.prompts:
            split = prompt.split or by_template[prompt.template or prompt.text]
            if prompt.split or prompt.concept is None or by_concept[prompt.concept] == split:
                kept.append(replace(prompt, split=split))
        return PromptSet(tuple(kept))


def fill(template: str, name: str) -> str:
    """Put a name into a template and set "a" to "an" where the name begins with a vowel."""
    if name[:1].lower() in "aeiou":
        template = template.replace("a {}", "an {}") if template.startswith("a {}") else template.replace(" a {}", " an {}")
    return template.format(name)


def require_several(what: str, values: Iterable[str]) -> None:
    """Raise ValueError for a text, which would be taken letter by letter."""
    if isinstance(values, str):
        raise ValueError(f"{what} must be several, got the text {values!r}; write [{values!r}]")


def prompt_of(row: Any, where: str) -> Prompt:
    """Return a row as a prompt, or raise ValueError naming `where` if it has none."""
    if not isinstance(row, Mapping):
        raise ValueError(f'{where} is {row!r}; write an object, as {{"prompt": "a cat"}}')
    require_columns(where, row, ["prompt"])
    text, concept = row["prompt"], row.get("concept") or row.get("class") or None
    if not isinstance(text, str):
        raise ValueError(f'{where} has the prompt {text!r}; write a text, which may be ""')
    template = row.get("template") or recover_template(text, concept)
    if not isinstance(template, str | None):
        raise ValueError(f"{where} has the template {template!r}; write a text with {{}} for the concept, or leave it out")
    return Prompt(text, None if concept is None else str(concept), template)


def parse_line(line: str, where: str) -> Any:
    """Return what a line of JSON holds, or raise ValueError naming `where`."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not valid JSON ({error.msg} in column {error.colno}); write one object per line"
        ) from error


def recover_template(text: str, concept: Any) -> str | None:
    """Return the text with the concept replaced by `{}`, if the concept stands in it as words of its own."""
    found = re.search(rf"(?<!\w){re.escape(str(concept))}(?!\w)", text, re.IGNORECASE) if concept else None
    if found is None:
        return None
    return text[: found.start()].replace("{", "").replace("}", "") + "{}" + text[found.end() :]


def csv_rows(path: str | Path, needed: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV, each with where it stands. A row that is too short has None in the place of what it lacks.

    Raises:
        ValueError: it is not UTF-8 or not CSV, or lacks a column.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        require_columns(path, reader.fieldnames or (), needed)
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV after line {reader.line_num} ({error}); close its quotes") from error


def require_columns(where: str | Path, columns: Iterable[str], needed: Iterable[str]) -> None:
    found = list(columns)
    for name in needed:
        if name not in found:
            raise ValueError(f"{where} has no column {name!r}; its columns are {found}")


def assign(keys: Sequence[str], seed: int, shares: tuple[float, float, float]) -> dict[str, Split]:
    """Deal keys out to the splits, at random but the same for the same keys and seed; each split gets one if it can."""
    order = list(keys)
    random.Random(seed).shuffle(order)
    bounds = [round(sum(shares[:i]) * len(order)) for i in range(4)]
    if len(order) >= len(SPLITS):
        bounds[1] = min(max(bounds[1], 1), len(order) - 2)
        bounds[2] = min(max(bounds[2], bounds[1] + 1), len(order) - 1)
    return {key: split for i, split in enumerate(SPLITS) for key in order[bounds[i] : bounds[i + 1]]}


def check_leaks(fit: PromptSet, held_out: PromptSet, *, concepts: bool = True) -> None:
    """Raise ValueError if the held-out prompts share a text, a template or (if `concepts`) a concept with `fit`."""
    shared = {"text": set(fit.texts) & set(held_out.texts)}
    shared["template"] = {p.template for p in fit if p.template} & {p.template for p in held_out if p.template}
    if concepts:
        shared["concept"] = set(fit.concepts) & set(held_out.concepts)
    for kind, values in shared.items():
        if values:
            raise ValueError(
                f"{len(values)} held-out prompts leak by {kind}, as {sorted(values)[0]!r}: "
                "split with PromptSet.split_by_concept_and_template"
            )
