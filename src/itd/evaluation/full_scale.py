"""Any pipeline and eraser on prompt files, with the detectors and settings that papers use: Stable Diffusion at full size."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from itd import report
from itd.eraser import Eraser
from itd.evaluation.conditions import promises
from itd.evaluation.detectors import Clip, CommandDetector, Detector, NudeNet, clean_fid, find_clean_fid, finite_number
from itd.evaluation.ledger import Ledger
from itd.evaluation.provenance import eraser_record, pipeline_record
from itd.evaluation.results import Measures, Report, Section
from itd.inputs import switch_off_safety_checker
from itd.metrics.alignment import clip_score
from itd.metrics.detection import NUDENET_THRESHOLDS, Detection, detection_sweep, harmonic_mean
from itd.metrics.distribution import feature_distances
from itd.metrics.intervals import Rate, mean_rate, rate, rate_by
from itd.plots import Line, line_plot
from itd.prompts import csv_rows
from itd.settings import require_at_least

Side = Literal["target", "kept", "general"]
SIDES: tuple[Side, ...] = ("target", "kept", "general")
SEEDS = ("evaluation_seed", "seed")
GUIDANCES = ("evaluation_guidance", "guidance")
LEAD = (
    "Each picture is drawn alone, with the same seed without and with the eraser. Whether the prompts were held out from the "
    "eraser is up to who made it: the record names the prompt sets that it was made from by their hashes."
)


class Row(NamedTuple):
    """One picture to draw."""

    side: Side
    prompt: str
    seed: int
    guidance: float
    concept: str | None


@dataclass(frozen=True)
class Shot:
    """One picture that was drawn: its file, the hash of its pixels, and what the gate said."""

    row: Row
    file: Path
    digest: str
    fired: bool


@dataclass(frozen=True)
class FullScale:
    """Measure a given eraser on a given pipeline."""

    name: ClassVar[str] = "full-scale"

    target: Path | None = None
    """CSV of prompts about what is erased: prompt and, where they are there, class, evaluation_seed, evaluation_guidance."""
    kept: Path | None = None
    """CSV of prompts about what must stay."""
    general: Path | None = None
    """CSV of general prompts, such as captions of COCO."""
    limit: int | None = None
    """Prompts per file at most, evenly spread."""
    n_seeds: int = 1
    """Pictures per prompt that has no seed of its own; MACE draws 5 per celebrity and sentence."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Guidance of prompts that have none of their own."""
    scheduler: Literal["pipeline", "ddim", "dpm"] = "ddim"
    """Sampler: DDIM as in the papers, DPM-Solver++, or what the pipeline has."""
    detector: Literal["none", "nudenet", "command"] = "none"
    """What looks at the pictures."""
    command: str | None = None
    """For the detector `command`: what is run with a folder of pictures and a file to write."""
    detector_name: str = "command"
    """For the detector `command`: its name in the record."""
    detector_weights: tuple[Path, ...] = ()
    """For the detector `command`: files of its weights, whose hashes go into the record."""
    thresholds: tuple[float, ...] = NUDENET_THRESHOLDS
    """Scores from which a detection counts."""
    clip: str | None = None
    """Folder or id of a CLIP for scores, and for FID and KID on its features: openai/clip-vit-base-patch32 in the papers."""
    clean_fid: bool = False
    """FID and KID on Inception features, by the package clean-fid."""
    real: Path | None = None
    """Folder of real pictures for the general prompts, such as COCO's."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More arguments of the pipeline, such as height and width."""
    seed: int = 0
    """First seed of prompts that have none."""

    def __post_init__(self) -> None:
        if not any(self.files.values()):
            raise ValueError("full-scale needs prompts: --target, --kept or --general, each a CSV with a column prompt")
        if self.detector == "command" and not self.command:
            raise ValueError("the detector 'command' needs --command, which is run with a folder and a file to write")
        require_at_least(self, steps=1, n_seeds=1, **({} if self.limit is None else {"limit": 1}))
        if (self.clean_fid or self.real) and self.general is None:
            raise ValueError("FID is measured on general prompts: give --general")

    @property
    def files(self) -> dict[Side, Path | None]:
        return {"target": self.target, "kept": self.kept, "general": self.general}

    def quick(self) -> FullScale:
        """Return the subsample: 20 prompts per file, one picture each."""
        from dataclasses import replace

        return replace(self, limit=min(20, self.limit or 20), n_seeds=1)

    def run(self, out: Path, pipe: Any = None, eraser: Eraser | None = None) -> Report:
        """Draw, detect, compare. The pipeline's safety checker is taken off: it blackens pictures in both arms.

        Raises:
            ValueError: no pipeline, no eraser, or prompt files that cannot be read.
        """
        if pipe is None or eraser is None:
            raise ValueError("full-scale measures a given eraser on a given pipeline: --model and --eraser are required")
        set_scheduler(pipe, self.scheduler)
        checker = switch_off_safety_checker(pipe)
        detector = self.find_detector()
        clip = None if self.clip is None else Clip(self.clip, pipe._execution_device)
        judges: dict[str, Detector | Clip | None] = {"detector": detector, "clip": clip}
        # Before hours of drawing, as a judge may be missing.
        judged_by = {name: None if judge is None else judge.describe() for name, judge in judges.items()}
        if self.clean_fid:
            find_clean_fid()
        if self.real is not None:
            pictures_in(self.real)
        facts = pipeline_record(pipe) | {"eraser": eraser_record(eraser), "drawing": self.drawing()}
        rows = [row for side in SIDES for row in self.rows(side)]
        ledger = Ledger(out / "cells", {"protocol": self.name, **facts})
        before = self.draw(out, ledger, pipe, rows, None)
        after = self.draw(out, ledger, pipe, rows, eraser)
        measures = Measures()
        for side in SIDES:
            here = [i for i, row in enumerate(rows) if row.side == side]
            if here:
                measures.add_all(side, gate_rates([after[i] for i in here], [before[i] for i in here]))
        sections = [Section("Gate", figures=figures(before, after))]
        if detector is not None:
            sections.append(self.detections(ledger, detector, judged_by["detector"], before, after, measures))
        if clip is not None:
            self.clip_measures(ledger, clip, before, after, measures)
        if self.clean_fid:
            folders = [out / "pictures" / arm / "general" for arm in ("erased", "unerased")]
            pairs = {"erased_unerased": folders} | ({"erased_real": [folders[0], self.real]} if self.real else {})
            for name, (a, b) in pairs.items():
                measures.add_all(name, ledger.cell(f"clean fid {name} {self.real}", lambda a=a, b=b: clean_fid(a, b)))
        measures.add_all("", promises(eraser))
        record = facts | judged_by | {"safety_checker": checker, "settings": asdict(self), "n_pictures": len(rows)}
        return Report(self.name, "Full scale", LEAD, measures.values, measures.intervals, record, tuple(sections))

    def drawing(self) -> dict[str, Any]:
        """Return what the pictures depend on beside model and eraser: another detector looks at the same ones."""
        names = ("limit", "n_seeds", "steps", "guidance_scale", "scheduler", "options", "seed")
        prompts = {side: digest_of(path) for side, path in self.files.items() if path}
        return {name: getattr(self, name) for name in names} | {"prompts_sha256": prompts}

    def rows(self, side: Side) -> list[Row]:
        """Read a prompt file.

        Raises:
            ValueError: it has no column `prompt`, no prompts, or a seed or guidance that is no number.
        """
        path = self.files[side]
        if path is None:
            return []
        listed = [(where, row) for where, row in csv_rows(path, ["prompt"]) if (row["prompt"] or "").strip()]
        if not listed:
            raise ValueError(f"{path} has no prompts")
        if self.limit is not None and len(listed) > self.limit:
            listed = [listed[i * len(listed) // self.limit] for i in range(self.limit)]
        rows: list[Row] = []
        for index, (where, row) in enumerate(listed):
            own, guidance = number_in(row, SEEDS, where), number_in(row, GUIDANCES, where)
            if own is not None and own != int(own):
                raise ValueError(f"{where}: the seed is {own}, which is no whole number")
            seeds = [int(own)] if own is not None else [self.seed + index * self.n_seeds + s for s in range(self.n_seeds)]
            concept = row.get("concept") or row.get("class") or None
            rows += [Row(side, row["prompt"], s, self.guidance_scale if guidance is None else guidance, concept) for s in seeds]
        return rows

    def draw(self, out: Path, ledger: Ledger, pipe: Any, rows: Sequence[Row], eraser: Eraser | None) -> list[Shot]:
        """Draw the pictures one by one, each kept; a run that was stopped goes on with the first that is missing."""
        arm = "unerased" if eraser is None else "erased"
        files = [out / "pictures" / arm / row.side / f"{index:06d}.png" for index, row in enumerate(rows)]
        missing = [i for i, file in enumerate(files) if not (file.is_file() and ledger.has(f"{arm} {i}"))]
        attached = None if eraser is None or not missing else eraser.attach(pipe)
        with attached or nullcontext():
            for i in tqdm(missing, desc=f"draw {arm}", unit="image", initial=len(rows) - len(missing), total=len(rows)):
                row = rows[i]
                image = pipe(
                    row.prompt, generator=torch.Generator().manual_seed(row.seed), num_inference_steps=self.steps,
                    guidance_scale=row.guidance, **self.options,
                ).images[0]  # fmt: skip
                fired = False if attached is None else attached.decisions[0].fired
                save_picture(image, files[i])
                value = {"digest": digest_pixels(image), "fired": fired}
                ledger.cell(f"{arm} {i}", lambda value=value: value)
        found = [ledger.cell(f"{arm} {i}", dict) for i in range(len(rows))]
        return [Shot(row, file, cell["digest"], cell["fired"]) for row, file, cell in zip(rows, files, found, strict=True)]

    def find_detector(self) -> Detector | None:
        if self.detector == "nudenet":
            return NudeNet(lowest=min(self.thresholds))
        if self.detector == "command":
            return CommandDetector(str(self.command), self.detector_name, self.detector_weights)
        return None

    def detections(
        self,
        ledger: Ledger,
        detector: Detector,
        described: Any,
        before: Sequence[Shot],
        after: Sequence[Shot],
        measures: Measures,
    ) -> Section:
        """Return the threshold sweep, in shares of pictures and in parts found, of which a picture may have several.

        For concepts with names also how often a name is the strongest finding. described: by what the detector is kept.
        """
        rows: list[dict[str, Any]] = []
        top: dict[str, dict[str, Rate]] = {}
        for side in SIDES:
            for arm, shots in (("unerased", before), ("erased", after)):
                mine = [shot for shot in shots if shot.row.side == side]
                if not mine:
                    continue
                found = self.found(ledger, detector, f"detect {described} {arm} {side}", mine)
                labels = sorted({d.label for picture in found for d in picture})
                for threshold, rates in detection_sweep(found, labels, self.thresholds).items():
                    parts = Counter(d.label for picture in found for d in picture if d.score >= threshold)
                    parts["any"] = parts.total()
                    measures.add(f"{side}.{arm}.detected@{threshold:g}", rates["any"])
                    measures.add(f"{side}.{arm}.parts@{threshold:g}", parts["any"])
                    at = {"side": side, "arm": arm, "threshold": threshold}
                    rows += [at | {"class": label, "share": share, "parts": parts[label]} for label, share in rates.items()]
                if self.detector == "command" and any(shot.row.concept for shot in mine):
                    top.setdefault(side, {})[arm] = named_right(mine, found)
                    measures.add(f"{side}.{arm}.accuracy", top[side][arm])
                    measures.add(f"{side}.{arm}.no_object", rate(not picture for picture in found))
        if {"target", "kept"} <= set(top):
            shares = 1 - top["target"]["erased"].value, top["kept"]["erased"].value
            measures.add("harmonic_mean", harmonic_mean(*shares))
        lines = [
            Line(f"{side}, {arm}", [(t, measures.values[f"{side}.{arm}.detected@{t:g}"]) for t in self.thresholds])
            for side in SIDES
            for arm in ("unerased", "erased")
            if f"{side}.{arm}.detected@{self.thresholds[0]:g}" in measures.values
        ]
        plot = line_plot(lines, "Detections", "threshold", "share of pictures", y_range=(0, 1))
        return Section("Detections", tables=(rows,), plots=(plot,))

    def found(self, ledger: Ledger, detector: Detector, key: str, shots: Sequence[Shot]) -> list[list[Detection]]:
        cells = ledger.cell(key, lambda: [list(map(list, p)) for p in detector.detect([s.file for s in shots])])
        return [[Detection(label, score) for label, score in picture] for picture in cells]

    def clip_measures(
        self, ledger: Ledger, clip: Clip, before: Sequence[Shot], after: Sequence[Shot], measures: Measures
    ) -> None:
        """Add CLIP scores by side, and FID and KID of general pictures on CLIP features."""
        for side in SIDES:
            arms = {"unerased": before, "erased": after}
            features: dict[str, torch.Tensor] = {}
            for arm, shots in arms.items():
                mine = [shot for shot in shots if shot.row.side == side]
                if not mine:
                    break

                def embed(mine: Sequence[Shot] = mine) -> dict[str, torch.Tensor]:
                    return {"image": clip.images([s.file for s in mine]), "text": clip.texts([s.row.prompt for s in mine])}

                found = ledger.tensors(f"clip {clip.digest} {arm} {side}", embed)
                features[arm] = found["image"]
                measures.add(f"{side}.{arm}.clip_score", mean_rate(clip_score(found["image"], found["text"])))
            if side == "general" and len(features) == 2 and len(features["erased"]) > 1:
                erased, unerased = ({"clip": features[arm]} for arm in ("erased", "unerased"))
                measures.add_all("general", feature_distances("erased_unerased", erased, unerased))
                if self.real is not None:
                    real = ledger.tensors(
                        f"clip {clip.digest} {self.real}", lambda: {"image": clip.images(pictures_in(self.real))}
                    )["image"]
                    for arm, mine in features.items():
                        measures.add_all("general", feature_distances(f"{arm}_real", {"clip": mine}, {"clip": real}))


ENDINGS = (".png", ".jpg", ".jpeg")


def pictures_in(folder: Path | None) -> list[Path]:
    """Return the pictures of a folder.

    Raises:
        FileNotFoundError: there are fewer than two.
    """
    found = sorted(p for p in (folder.iterdir() if folder and folder.is_dir() else ()) if p.suffix.lower() in ENDINGS)
    if len(found) < 2:
        raise FileNotFoundError(f"{folder} holds {len(found)} pictures; real pictures are compared as a set of at least 2")
    return found


def set_scheduler(pipe: Any, name: str) -> None:
    """Give the pipeline the sampler that was asked for, with the noise schedule that it has."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    kinds: dict[str, Any] = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
    if name in kinds and not isinstance(pipe.scheduler, kinds[name]):
        pipe.scheduler = kinds[name].from_config(pipe.scheduler.config)


def number_in(row: Mapping[str, Any], columns: Sequence[str], where: str) -> float | None:
    """Return the number in the first of the columns that is there."""
    column = next((name for name in columns if row.get(name)), None)
    return None if column is None else finite_number(row[column], f"{where}: {column}")


def save_picture(image: Any, file: Path) -> None:
    """Write to a temporary file, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    image.save(temporary, "PNG")
    temporary.replace(file)


def digest_pixels(image: Any) -> str:
    return hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16).hexdigest()


def digest_of(path: Path) -> str:
    """Return the hash of a prompt file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gate_rates(after: Sequence[Shot], before: Sequence[Shot]) -> dict[str, Rate | float]:
    """Return the fire rate, and the share of pictures with the same pixels, of all and of those that passed."""
    same = [a.digest == b.digest for a, b in zip(after, before, strict=True)]
    return {
        "gate_fires": by_concept(after, [shot.fired for shot in after]), "bit_identical": rate(same),
        "bit_identical_passed": rate(s for s, shot in zip(same, after, strict=True) if not shot.fired),
    }  # fmt: skip


def by_concept(shots: Sequence[Shot], flags: Sequence[bool]) -> Rate:
    """Return a share, with an interval over concepts where there are several, else over prompts."""
    return rate_by((shot.row.concept or shot.row.prompt for shot in shots), flags)


def named_right(shots: Sequence[Shot], found: Sequence[Sequence[Detection]]) -> Rate:
    """Return how often the strongest finding is the concept that was asked for, among pictures of named concepts."""
    strongest = [max(picture, key=lambda d: d.score).label.lower() if picture else "" for picture in found]
    named = [(shot, label) for shot, label in zip(shots, strongest, strict=True) if shot.row.concept]
    return by_concept([s for s, _ in named], [label == str(s.row.concept).lower() for s, label in named])


def figures(before: Sequence[Shot], after: Sequence[Shot], n: int = 12) -> tuple[str, ...]:
    """Return pictures without and with the eraser, some of every side, at most 256 pixels wide to keep the page small."""
    from PIL import Image

    found = []
    for side in SIDES:
        here = [i for i, shot in enumerate(before) if shot.row.side == side]
        for i in here[:: max(1, len(here) // n)][:n]:
            pair = []
            for shot in (before[i], after[i]):
                picture = Image.open(shot.file).convert("RGB")
                picture.thumbnail((256, 256))
                pair.append(np.asarray(picture))
            same = before[i].digest == after[i].digest
            found.append(report.plain_pair(pair[0], pair[1], f"{side}: {before[i].row.prompt}", after[i].fired, same))
    return tuple(found)
