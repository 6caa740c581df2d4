"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import tyro

from itd import describe, inputs
from itd.activations import ActivationStore, record
from itd.artifacts import CONFIG, require_free
from itd.attacks.arenas import AttackConfig, run_arena
from itd.attacks.protocol import names_of_attacks
from itd.erasing import PRESETS, EraseConfig, add_concepts, erase
from itd.evaluation import ProtocolName
from itd.generation import consecutive_seeds, generate, picture_lines, pipeline_options, write_pictures
from itd.hooks import HookPoint
from itd.memory import MemoryConfig, free_memory
from itd.runs import COMMAND, Values, base_arguments, command_name, flat, run_folder, write_arguments
from itd.sae import SAEConfig
from itd.synonyms import synonym_words
from itd.training import PAPER_TRAINING, TrainConfig, train

DESCRIPTION = "Erase concepts from text-to-image diffusion models and leave every other prompt untouched."

Many = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
"""A flag that takes several values and may be repeated."""
Prompts = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")]
Erasers = tyro.conf.UseAppendAction[tuple[Path, ...]]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
MaybeStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all commands take."""

    presets: ClassVar[Mapping[str, Values]] = {}
    either: ClassVar[tuple[str, ...]] = ()
    """Flags of which one replaces the others."""

    config: MaybePath = None
    """File of arguments, as a run folder holds it (config.json or command.json). Flags given beside it count more."""

    def run(self) -> None:
        """Call the library and print."""
        raise NotImplementedError

    @property
    def resume_file(self) -> Path | None:
        """Arguments with which a run that was stopped goes on, if it can."""
        return None


@dataclass(frozen=True, kw_only=True)
class OnModel(Command):
    """What commands take that load a pipeline."""

    model: MaybeStr = None
    """Folder or Hugging Face id of a diffusers pipeline. Without it, the embedded world."""
    device: str = "auto"
    """Where the pipeline runs: cpu, cuda, cuda:1, mps. `auto`: a CUDA device where there is one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision of the pipeline. `auto`: float16 on a CUDA device, float32 elsewhere."""

    def pipeline(self) -> Any:
        """Load the pipeline where it is to run."""
        return inputs.load_pipeline(self.model, self.device, self.dtype)

    def given_pipeline(self) -> Any:
        """Load the pipeline of --model; None for the embedded world, which is measured as it was trained.

        Raises:
            ValueError: a device or a precision for the embedded world.
        """
        if self.model is not None:
            return self.pipeline()
        if self.device not in ("auto", "cpu") or self.dtype not in ("auto", "float32"):
            raise ValueError(
                f"the embedded world is measured on the CPU in float32, got --device {self.device} --dtype {self.dtype}; "
                "these go with --model"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Erase concepts in the embedded world and show pictures before and after."""

    out: Path = Path("runs/demo")
    """Folder for the report, its numbers and the erasers."""
    identity: str = "cat"
    """The noun that is erased first."""
    design: str = "twemoji"
    """The design that is erased second."""
    retrain: bool = False
    """Train the autoencoder first instead of taking the one that is shipped."""
    full: bool = False
    """Erase 50 of the benchmark's 100 identities instead of the short tour."""
    synonyms: bool = True
    """In the short tour, also erase the words that the text encoder takes for the nouns' names."""
    seed: int = 0
    """Seed of the prompts and pictures."""

    def run(self) -> None:
        from itd.demo import DemoConfig, run_demo

        with run_folder(self, self.out / CONFIG):
            result = run_demo(DemoConfig(**{item.name: getattr(self, item.name) for item in fields(DemoConfig)}))
        print(result.table)
        print(f"page: {result.page}")


@dataclass(frozen=True, kw_only=True)
class Record(OnModel):
    """Run prompts through a text encoder and store the activations at a hook point. Goes on where it was stopped."""

    out: Path
    """Folder for the activations."""
    prompts: Many = ()
    """Prompt files: .csv, .jsonl, .parquet, .txt. Without prompts and names, the embedded world's own prompts."""
    names: Many = ()
    """Names of concepts, which are put into sentences."""
    hook_point: MaybeStr = None
    """ENCODER:PATH, as text_encoder:encoder.layers.8. The embedded world has its own."""
    batch_size: int = 64
    """Prompts that are encoded at a time."""

    @property
    def resume_file(self) -> Path:
        return self.out / COMMAND

    def run(self) -> None:
        site = inputs.find_hook_point(self.model, self.hook_point)
        prompts = inputs.recording_prompts(self.model, list(flat(self.prompts)), list(flat(self.names)))
        pipe = self.pipeline()
        with run_folder(self, self.resume_file):
            store = record(pipe, site, prompts, self.out, self.batch_size)
        print(f"{len(prompts)} prompts, {len(store)} distinct activations of d_model {store.d_model} at {site}")
        print(f"activations: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a sparse autoencoder on stored activations. Goes on from its last checkpoint where it was stopped."""

    presets: ClassVar[Mapping[str, Values]] = {
        "default": {"n_latents": 16_384, "k": 64, **asdict(TrainConfig())},
        "paper": {"n_latents": SAEConfig.n_latents, "k": SAEConfig.k, **asdict(PAPER_TRAINING)},
    }

    activations: Path
    """Folder that `itd record` wrote."""
    out: Path
    """Folder for checkpoints and, in its folder `sae`, the autoencoder."""
    preset: Literal["default", "paper"] = "default"
    """Where the other values come from: `default` is ours, `paper` follows the publication."""
    n_latents: int = 16_384
    """Rows of encoder and decoder."""
    k: int = 64
    """Latents that may be active at a position."""
    device: str = "auto"
    """Where it is trained: cpu, cuda, cuda:1. `auto`: a CUDA device where there is one."""
    settings: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    @property
    def resume_file(self) -> Path:
        return self.out / CONFIG

    def run(self) -> None:
        device = inputs.find_device(self.device)
        with run_folder(self, self.resume_file):
            store = ActivationStore.load(self.activations)
            size = SAEConfig(d_model=store.d_model, n_latents=self.n_latents, k=self.k)
            sae = train(store, size, self.settings, self.out, device).save(self.out / "sae")
        metrics = sae.metrics
        print(f"FVU {metrics['fvu']:.4f}, dead latents {metrics['dead_share']:.1%}, {metrics['seconds']:.0f} seconds")
        print(f"autoencoder: {self.out / 'sae'}")


@dataclass(frozen=True, kw_only=True)
class Erase(OnModel):
    """Make an eraser: select the features of concepts and calibrate the gate. Nothing is trained."""

    presets: ClassVar[Mapping[str, Values]] = {name: asdict(config) for name, config in PRESETS.items()}
    either: ClassVar[tuple[str, ...]] = ("fpr", "recall")

    target: Many = ()
    """What is to go: names, or prompt files (.csv, .jsonl, .parquet, .txt); one without a column `concept` is one concept."""
    retain: Many = ()
    """What must stay, close to the target: names or prompt files. Embedded world: other nouns of the same role."""
    neutral: Many = ()
    """General prompts that must pass: names or prompt files. Embedded world: the rest of its nouns."""
    out: Path
    """Folder for the eraser."""
    sae: MaybePath = None
    """Folder of the autoencoder. The embedded world has its own."""
    hook_point: MaybeStr = None
    """ENCODER:PATH, as text_encoder:encoder.layers.8. By default where the autoencoder was trained."""
    preset: Literal["default", "style", "strict", "paper"] = "default"
    """Where the other values come from: `default` is ours, `style` edits more, `strict` refuses what any gate on the prompt
    finds, `paper` follows the publication."""
    retained: MaybePath = None
    """Folder of what must stay, encoded once. Made from --retain and --neutral if it is not there, else taken for them."""
    add_to: MaybePath = None
    """Folder of an eraser to add the concepts to, under its settings; with --retained. --out may be the same folder."""
    synonyms: bool = False
    """Also erase the words that the text encoder takes for the names: more prompts are caught, and more fire by mistake."""
    common_words: int = 0
    """With --synonyms: look for them among this many common English words too, of however many tokens. Needs itd[synonyms]."""
    settings: tyro.conf.OmitArgPrefixes[EraseConfig] = field(default_factory=EraseConfig)

    def run(self) -> None:
        require_free(self.out, "eraser")
        if self.common_words and not self.synonyms:
            raise ValueError(f"--common-words {self.common_words} says where --synonyms looks; give --synonyms too")
        target, retain, neutral = (list(flat(values)) for values in (self.target, self.retain, self.neutral))
        if self.add_to is not None:
            eraser, kept = inputs.eraser_to_extend(self.add_to, self.retained, self.sae)
            words = self.other_words(target, retain, eraser.hook_point)
            prompts = inputs.target_set(self.model, target, words)
            eraser = add_concepts(eraser, self.pipeline(), prompts, kept)
        else:
            there = inputs.is_there(self.retained)
            sets = inputs.concept_sets(self.model, target, retain, neutral, there)
            sae = inputs.find_sae(self.model, self.sae)
            pipe = self.pipeline()
            site = inputs.hook_point_of(pipe, sae, self.model, self.hook_point)
            if words := self.other_words(target, retain, site):
                sets = inputs.concept_sets(self.model, target, retain, neutral, there, words)
            kept = inputs.find_retained(self.retained, pipe, sae, site, sets, self.settings.seed)
            others = (sets.retain, sets.neutral) if kept is None else (kept, None)
            eraser = erase(pipe, sae, site, sets.target, *others, inputs.erase_settings(self.model, self.settings))
        eraser.save(self.out)
        write_arguments(self, self.out / COMMAND)
        print(describe.describe_eraser(eraser))
        print(f"eraser: {self.out}")

    def other_words(self, target: Sequence[str], retain: Sequence[str], site: HookPoint) -> list[str]:
        """Find synonyms of the names, if they are asked for, and print them."""
        if not self.synonyms:
            return []
        found = inputs.find_other_words(self.pipeline(), self.model, target, retain, site.encoder, self.common_words)
        for name, listed in found.items():
            print(f"{name}: also {', '.join(f'{synonym.word} ({synonym.similarity:.2f})' for synonym in listed)}")
        if not found:
            print("no word of the vocabulary means the same to the text encoder")
        return synonym_words(found)


@dataclass(frozen=True, kw_only=True)
class Check(OnModel):
    """Tell, for each prompt, whether the gate fires, and which tokens and features decide. Generates nothing."""

    prompts: Prompts = ()
    """Prompts to check."""
    file: MaybePath = None
    """File of prompts to check: .csv, .jsonl, .parquet or .txt."""
    eraser: Erasers = ()
    """Folder of an eraser. Repeat the flag to join several."""
    sae: MaybePath = None
    """Folder of the autoencoder, if it is no longer where it was when the eraser was made."""
    allow_new_words: bool = False
    """Leave words that the text encoder learnt after the eraser was made (textual inversion) to the gate; else an error."""
    json: bool = False
    """Print one JSON array instead of text."""
    out: MaybePath = None
    """Folder to keep the result in, as checks.json."""

    def run(self) -> None:
        prompts = inputs.read_prompts(self.prompts, self.file)
        eraser = inputs.load_erasers(self.eraser, self.sae)
        checks = eraser.check(self.pipeline(), prompts, self.allow_new_words)
        text = json.dumps([check.to_dict() for check in checks], indent=2, ensure_ascii=False, allow_nan=False)
        if self.out is not None:
            with run_folder(self, self.out / CONFIG):
                (self.out / "checks.json").write_text(text + "\n", encoding="utf-8")
        print(text if self.json else "\n\n".join(map(describe.describe_check, checks)))


@dataclass(frozen=True, kw_only=True)
class Generate(OnModel):
    """Generate images, with or without erasers. The same prompt and seed give the same bits, unless the gate fires."""

    prompts: Prompts = ()
    """Prompts to draw."""
    file: MaybePath = None
    """File of prompts to draw: .csv, .jsonl, .parquet or .txt."""
    eraser: Erasers = ()
    """Folder of an eraser. Repeat the flag for several: those of one text encoder are joined, others attached beside."""
    sae: MaybePath = None
    """Folder of the autoencoder, if it is no longer where it was when the eraser was made."""
    out: Path
    """Folder for the images and metadata.json, which has prompt, seed and decision of the gate for each."""
    seed: int = 0
    """Seed of a prompt's first image; the next one has the next seed."""
    n: int = 1
    """Images per prompt."""
    steps: MaybeInt = None
    """Denoising steps. By default what the pipeline takes."""
    guidance_scale: MaybeFloat = None
    """Weight of classifier-free guidance. By default what the pipeline takes."""
    negative_prompt: MaybeStr = None
    """What to steer away from. It is not gated."""
    ungated: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Text encoders that read the prompt without a gate, as text_encoder_2: what is erased can enter through them."""
    allow_new_words: bool = False
    """Leave words that the text encoder learnt after the eraser was made (textual inversion) to the gate; else an error."""

    def run(self) -> None:
        prompts = inputs.read_prompts(self.prompts, self.file)
        options = pipeline_options(self.model, self.steps, self.guidance_scale, self.negative_prompt)
        seeds = consecutive_seeds(self.seed, self.n)
        erasers = inputs.load_erasers_by_encoder(self.eraser, self.sae)
        pipe = self.pipeline()
        with run_folder(self, self.out / CONFIG):
            pictures = generate(pipe, prompts, seeds, erasers, options, self.ungated, self.allow_new_words)
            rows = write_pictures(pictures, self.out, len(prompts) * len(seeds))
        print("\n".join(picture_lines(rows)))
        print(f"images: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Attack(OnModel):
    """Attack an erased pipeline: can a concept be drawn all the same? Goes on where it was stopped."""

    attacks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ("all",)
    """Attacks by name, or `all`, `black` (box), `white` (box). Names that end in -aware know the gate."""
    out: Path
    """Folder for report.json, report.md, report.html, the prompts that won (evading.jsonl) and what was computed so far."""
    eraser: Erasers = ()
    """Folder of an eraser. Repeat the flag to join several. Embedded world: by default one is made."""
    sae: MaybePath = None
    """Folder of the autoencoder, if it is no longer where it was when the eraser was made."""
    target: Many = ()
    """Concepts to attack. By default those of the eraser; embedded world without one: identities that it draws well."""
    others: Many = ()
    """With --model: names that the concept is told from in the pictures."""
    clip: MaybePath = None
    """With --model: folder of a CLIP model and its processor, which names the pictures."""
    benign: MaybePath = None
    """With --model: file of prompts without the concepts, on which false positives are counted."""
    words: MaybePath = None
    """Prompt file with a column `concept`: other words for the concepts, for `synonyms`. The embedded world has some."""
    inference_steps: MaybeInt = None
    """Denoising steps. By default what the pipeline takes."""
    control: bool = True
    """Run every attack against the pipeline without the eraser too."""
    settings: tyro.conf.OmitArgPrefixes[AttackConfig] = field(default_factory=AttackConfig)

    @property
    def resume_file(self) -> Path:
        return self.out / CONFIG

    def run(self) -> None:
        names = names_of_attacks(self.attacks)
        eraser = inputs.load_erasers(self.eraser, self.sae) if self.eraser or self.model is not None else None
        pipe = self.given_pipeline()
        with run_folder(self, self.resume_file):
            found = run_arena(
                self.settings, self.out, names, ("erased", "unerased") if self.control else ("erased",), self.model, pipe,
                eraser, list(flat(self.target)), list(flat(self.others)), self.clip, self.benign, self.inference_steps,
                self.words,
            )  # fmt: skip
            page = found.save(self.out)
        print(found.summary())
        print(f"page: {page}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnModel):
    """Measure erasing by a protocol and write a report. Goes on where it was stopped.

    On the embedded world: identities, styles, unsafe, general, many, gate. On a sentence encoder: minilm. On any pipeline with
    an eraser: full-scale.
    """

    protocol: Annotated[ProtocolName, tyro.conf.Positional]
    """What is measured."""
    out: Path
    """Folder for report.json, report.md, report.html, and what is computed on the way."""
    quick: bool = False
    """A small subsample, which the report states; its intervals are wide."""
    seed: int = 0
    """Of concepts, prompts and pictures."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Other settings of the protocol, as `n_kept=25 counts=1,5 erase.n_features=64`; an unknown name lists them."""
    preset: Literal["default", "strict", "paper"] = "default"
    """How erasers are made in the embedded world: `default` is as the protocol says, `paper` follows the publication."""
    eraser: Erasers = ()
    """Folder of an eraser to measure instead of the protocol's own. Repeat the flag to join several."""
    sae: MaybePath = None
    """Folder of the autoencoder, if it is no longer where it was when the eraser was made."""
    prompts: MaybePath = None
    """minilm: folder of the public prompt sets. By default that of the environment variable ITD_PROMPTS."""
    renders: MaybePath = None
    """general: folder of the world's renders (renders.npz), to compare with real pictures."""
    target: MaybePath = None
    """full-scale: CSV of prompts about what is erased."""
    kept: MaybePath = None
    """full-scale: CSV of prompts about what must stay."""
    general: MaybePath = None
    """full-scale: CSV of general prompts."""
    limit: MaybeInt = None
    """full-scale: prompts per file at most."""
    n: int = 1
    """full-scale: pictures per prompt that has no seed of its own."""
    steps: MaybeInt = None
    """full-scale: denoising steps; 50 by default."""
    guidance_scale: MaybeFloat = None
    """full-scale: guidance of prompts that have none of their own; 7.5 by default."""
    scheduler: Literal["pipeline", "ddim", "dpm"] = "ddim"
    """full-scale: sampler."""
    detector: Literal["none", "nudenet", "command"] = "none"
    """full-scale: what looks at the pictures."""
    command: MaybeStr = None
    """full-scale: the detector `command`, run with a folder of pictures and a CSV file to write (file, label, score)."""
    detector_name: str = "command"
    """full-scale: name of the detector `command` in the record."""
    detector_weights: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """full-scale: files of that detector's weights, whose hashes go into the record."""
    clip: MaybeStr = None
    """full-scale: folder or id of a CLIP for scores, as openai/clip-vit-base-patch32."""
    clean_fid: bool = False
    """full-scale: FID and KID on Inception features, by the package clean-fid."""
    real: MaybePath = None
    """full-scale: folder of real pictures for the general prompts."""

    @property
    def resume_file(self) -> Path:
        return self.out / CONFIG

    def run(self) -> None:
        from itd.evaluation import evaluate, find_protocol, with_settings

        protocol = with_settings(find_protocol(self.protocol, **self.settings_of()), self.settings)
        inputs.quiet_libraries()
        eraser = inputs.load_erasers(self.eraser, self.sae) if self.eraser else None
        pipe = self.given_pipeline()
        with run_folder(self, self.resume_file):
            report = evaluate(pipe, protocol, eraser, self.out, self.quick)
        print(report.summary())
        print(f"page: {self.out / 'report.html'}")

    def settings_of(self) -> dict[str, Any]:
        """Return the settings of the protocol that was chosen.

        Raises:
            ValueError: a flag of another protocol was given.
        """
        full = {
            "target": self.target, "kept": self.kept, "general": self.general, "limit": self.limit, "n_seeds": self.n,
            "steps": self.steps, "guidance_scale": self.guidance_scale, "scheduler": self.scheduler, "detector": self.detector,
            "command": self.command, "detector_name": self.detector_name, "detector_weights": self.detector_weights,
            "clip": self.clip, "clean_fid": self.clean_fid, "real": self.real,
        }  # fmt: skip
        own = {"minilm": {"prompts": self.prompts}, "general": {"renders": self.renders}, "full-scale": full}
        for protocol, values in own.items():
            for name, value in values.items():
                flag = {"n_seeds": "n"}.get(name, name)
                if protocol != self.protocol and value != Evaluate.__dataclass_fields__[flag].default:
                    raise ValueError(f"--{flag.replace('_', '-')} belongs to `itd evaluate {protocol}`, not to {self.protocol}")
        chosen: dict[str, Any] = {name: value for name, value in own.get(self.protocol, {}).items() if value is not None}
        if self.protocol not in ("minilm", "full-scale") and self.preset != "default":
            chosen["erase"] = PRESETS[self.preset]
        return chosen | {"seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Info(OnModel):
    """Describe the installation, or what a folder holds: an autoencoder, an eraser, activations, a run, a pipeline."""

    path: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = None
    """Folder to describe. Without it, the installation and the embedded world."""
    hook_points: bool = False
    """List the hook points of the model instead."""
    memory: bool = False
    """Estimate instead what an autoencoder of the size below takes in training and inference; refuse what does not fit."""
    n_latents: int = SAEConfig.n_latents
    """Rows of encoder and decoder, for the estimate."""
    d_model: int = 768
    """Width of the activations, for the estimate."""
    k: int = SAEConfig.k
    """Latents that may be active at a position, for the estimate."""
    settings: tyro.conf.OmitArgPrefixes[MemoryConfig] = field(default_factory=MemoryConfig)

    def run(self) -> None:
        if self.memory:
            size = SAEConfig(self.d_model, self.n_latents, self.k)
            estimates, available = self.settings.estimate(size), free_memory()
            print(describe.describe_memory(size, estimates, available))
            estimates["training"].require(size.n_latents, available)
        elif self.hook_points:
            print("\n".join(map(str, inputs.list_hook_points(self.pipeline()))))
        else:
            print(describe.describe_installation() if self.path is None else describe.describe_folder(self.path))


COMMANDS: tuple[type[Command], ...] = (Demo, Record, Train, Erase, Check, Generate, Evaluate, Attack, Info)


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line. Raises SystemExit on `--help` and on flags that are not understood."""
    choices: list[Any] = []
    for command in COMMANDS:
        name = command_name(command)
        options: dict[str, Any] = {}
        if argv[:1] == [name]:
            options["default"] = base_arguments(command, argv, command.presets, command.either)
        choices.append(Annotated[command, tyro.conf.subcommand(name, **options)])
    commands: Any = Union[tuple(choices)]  # noqa: UP007
    return tyro.cli(commands, args=argv, prog="itd", description=DESCRIPTION)


def set_up_logging() -> None:
    """Show the library's warnings as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("itd: warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("itd").handlers = [handler]


def interrupted(command: Command | None) -> str:
    """Return the line for a run that was stopped: how to go on, where that is possible."""
    file = None if command is None else command.resume_file
    if command is None or file is None or not file.is_file():
        return "itd: interrupted"
    return f"itd: interrupted; to go on: itd {command_name(type(command))} --config {file}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 after an error, or 130 after ctrl-C."""
    set_up_logging()
    command = None
    try:
        command = parse(list(sys.argv[1:] if argv is None else argv))
        command.run()
    except KeyboardInterrupt:
        print(interrupted(command), file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("ITD_DEBUG"):
            raise
        print(f"itd: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
