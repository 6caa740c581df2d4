"""Text for people: what an eraser is, what the gate said, what a folder holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itd import emoji
from itd.artifacts import CONFIG, read_object, reading, versions
from itd.eraser import Eraser
from itd.erasing import calibration_of
from itd.explain import Check
from itd.features import ConceptFeatures
from itd.gate import Calibration
from itd.memory import MemoryEstimate
from itd.runs import COMMAND
from itd.sae import SAEConfig

N_STRONGEST = 5
GATE_TITLES = {
    "pooled": ("second gate", "on the pooled embedding"),
    "draft": ("draft gate", "on the first guess of the picture"),
    "picture": ("picture gate", "on the finished picture"),
}


def table(rows: Iterable[Sequence[str]], indent: str = "  ", left: int = 1) -> list[str]:
    """Return aligned lines: the first `left` columns to the left, the others to the right."""
    listed = [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in listed) for column in range(len(listed[0]))] if listed else []

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return (indent + "  ".join(cells)).rstrip()

    return [line(row) for row in listed]


# Erasers


def describe_eraser(eraser: Eraser) -> str:
    """Return, per concept, its features, and how the gate was calibrated."""
    record = eraser.records[-1]
    rows = [("concept", "features", "strongest (weight)")]
    rows += [(concept.name, str(len(concept)), strongest_features(concept)) for concept in eraser.concepts]
    width = max(len(row[2]) for row in rows)
    lines = table([(name, n, text.ljust(width)) for name, n, text in rows], indent="")
    for calibration in calibration_of(eraser):
        lines += ["", *describe_calibration(calibration)]
    for kind, title in GATE_TITLES.items():
        if kind in record:
            lines += ["", ", ".join(title), *describe_rates(Calibration(**record[kind]))]
    if record["weak"]:
        lines += ["", *(f"{name}: {reason}" for name, reason in record["weak"].items())]
    return "\n".join(lines)


def strongest_features(concept: ConceptFeatures) -> str:
    top = concept.weights.topk(min(N_STRONGEST, len(concept)))
    pairs = zip(concept.indices[top.indices].tolist(), top.values.tolist(), strict=True)
    return ", ".join(f"{index} ({weight:.2f})" for index, weight in pairs) or "none"


def describe_calibration(calibration: Calibration) -> list[str]:
    return ["calibration", *describe_rates(calibration)]


def describe_rates(calibration: Calibration) -> list[str]:
    rows = [
        ("rule", calibration.rule), ("threshold", f"{calibration.threshold:.4f}"), ("recall", f"{calibration.recall:.1%}"),
        ("false positives", f"{calibration.false_positive_rate:.2%}"), ("AUROC", f"{calibration.auroc:.4f}"),
        ("held-out prompts", f"{calibration.n_positives} target, {calibration.n_negatives} retain and neutral"),
    ]  # fmt: skip
    return table(rows, left=2)


def describe_check(check: Check) -> str:
    """Return the gate's decision on a prompt and what it rests on, as aligned text."""
    verdict = f"fires: {', '.join(check.concepts)}" if check.fired else "passes"
    lines = [check.prompt or "(empty prompt)", f"  {verdict}   score {check.score:.3f}   threshold {check.threshold:.3f}"]
    if check.meaning is not None:
        meaning = check.meaning
        verdict = f"means {', '.join(meaning.concepts)}" if meaning.concepts else "passes"
        gate = GATE_TITLES[meaning.by][0]
        lines.append(f"  {gate}: {verdict}   score {meaning.score:.3f}   threshold {meaning.threshold:.3f}")
    if check.tokens:
        rows = [("token", "score"), *((token, f"{score:.3f}") for token, score in check.tokens)]
        lines += ["", *table(rows)]
    if check.features:
        hits = [(hit.concept, hit.token, str(hit.feature), f"{hit.act:.3f}") for hit in check.features]
        lines += ["", *table([("concept", "token", "feature", "act"), *hits], left=2)]
    return "\n".join(lines)


# Memory


def describe_memory(size: SAEConfig, estimates: Mapping[str, MemoryEstimate], available: int) -> str:
    """Return what each use of an autoencoder takes, part by part, and the largest one that fits."""
    head = f"n_latents {size.n_latents}, d_model {size.d_model}, k {size.k}; {available / 1e9:.1f} GB available"
    rows = [("", "GB", "largest n_latents")]
    for use, estimate in estimates.items():
        rows.append((use, f"{estimate.total(size.n_latents) / 1e9:.2f}", str(estimate.largest(available))))
        rows += [(f"  {name}", f"{size.n_latents * each / 1e9:.2f}", "") for name, each in estimate.per_latent.items()]
        rows += [(f"  {name}", f"{each / 1e9:.2f}", "") for name, each in estimate.fixed.items()]
    return "\n".join([head, "", *table(rows, indent="")])


# Folders


def describe_installation() -> str:
    """Return versions, and where the embedded world is and how large."""
    lines = [*table(versions().items(), indent="", left=2), ""]
    try:
        folder = emoji.model_folder()
    except FileNotFoundError as error:
        return "\n".join([*lines, f"embedded world: {error}"])
    parts = [(path.name, f"{size_of(path):.1f} MB") for path in sorted(folder.iterdir()) if path.is_dir()]
    world = [("nouns", str(len(emoji.nouns()))), ("designs", ", ".join(emoji.DESIGNS)), ("hook point", str(emoji.HOOK_POINT))]
    head = f"embedded world: {folder}, {size_of(folder):.1f} MB"
    return "\n".join([*lines, head, *table(world, left=2), "", *table(parts)])


def size_of(folder: Path) -> float:
    """Return the size of a folder in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def describe_folder(folder: Path) -> str:
    """Return what a folder holds: an artifact, a recording, a run of a command, or a pipeline.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds none of these.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    config, made, index = (object_in(folder / name) for name in (CONFIG, COMMAND, "model_index.json"))
    with reading(folder):
        rows = rows_of(config) or (pipeline_rows(index) if index else [])
        if made and "kind" in config:
            rows.append(("made by", f"itd {made['command']} --config {folder / COMMAND}"))
        lines = table(rows, left=2)
    if not lines:
        raise ValueError(f"{folder} is none of these: an autoencoder, an eraser, activations, a run of a command, a pipeline")
    return "\n".join([f"{folder}, {size_of(folder):.1f} MB", *lines])


def object_in(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file."""
    return read_object(path, "name a folder that itd wrote") if path.is_file() else {}


def rows_of(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a `config.json` says of its folder; nothing if it is neither an artifact's nor a run's."""
    describe = {"sae": sae_rows, "eraser": eraser_rows, "retained": retained_rows, "activations": activations_rows}
    kind = config.get("kind")
    if kind in describe:
        return [("kind", kind), *describe[kind](config), ("written by", f"itd {config['itd_version']}")]
    return run_rows(config) if "command" in config else []


def sae_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in config["sae"].items()]
    rows.append(("hook point", config["hook_point"] or "unknown"))
    return rows + [(name, f"{value:g}") for name, value in config["metrics"].items()]


def eraser_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("concepts", ", ".join(f"{c['name']} ({c['n_features']} features)" for c in config["concepts"]))]
    rows += [("hook point", config["hook_point"]), ("autoencoder", config["sae"]["source"])]
    edit, n_edited = config["edit"], config["edit"].get("n_features")
    which = "all features" if n_edited is None else f"{n_edited} features a concept"
    rows.append(("edit", f"{edit['mode']}, strength {edit['strength']:g}, {which}"))
    rows.append(("score", config["gate"]["score"]))
    for record in config["records"]:
        calibrated = record["calibration"]
        rates = f"recall {calibrated['recall']:.1%}, false positives {calibrated['false_positive_rate']:.2%}"
        rows.append(("calibration", f"{calibrated['rule']}: {rates}, AUROC {calibrated['auroc']:.4f}"))
        rows += [("weak", f"{name}: {reason}") for name, reason in record["weak"].items()]
    return rows


def retained_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("hook point", config["hook_point"]), ("autoencoder", f"sha256 {config['sae']}")]
    return rows + [(f"prompts to {name}", str(len(config[name]))) for name in ("fit", "calibrate")]


def activations_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    state = f"finished, {len(config['shards'])} shards" if config["finished"] else "interrupted; record again to finish it"
    return [("hook point", config["hook_point"]), ("state", state), ("prompts", f"sha256 {config['prompts_sha256']}")]


def run_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    arguments = [(name, "" if value is None else str(value)) for name, value in config["arguments"].items()]
    return [("run of", f"itd {config['command']}"), *arguments, ("written by", f"itd {config['itd_version']}")]


def pipeline_rows(index: dict[str, Any]) -> list[tuple[str, str]]:
    parts = [(name, part[1]) for name, part in index.items() if isinstance(part, list) and part[1]]
    return [("pipeline", index["_class_name"]), *parts]
