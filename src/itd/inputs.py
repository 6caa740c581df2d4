"""What a command works on: the pipeline, the autoencoder, the hook point, and prompt sets from names and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from itd import emoji
from itd.artifacts import CONFIG, read_object
from itd.eraser import ANCHOR, Eraser
from itd.erasing import EraseConfig, split_sets
from itd.hooks import WRAPPER, HookPoint
from itd.prompts import Prompt, PromptSet
from itd.retained import Retained
from itd.sae import SAE
from itd.synonyms import Synonym, find_synonyms
from itd.templates import concept_prompts

PROMPT_FILES = (".csv", ".jsonl", ".parquet", ".txt")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


# Models


def load_pipeline(model: str | None, device: str = "auto", dtype: str = "auto") -> Any:
    """Load a diffusers pipeline from a folder or by its id on the Hugging Face hub; without either, the embedded world's.

    `auto`: on a CUDA device in float16 where there is one, on the CPU in float32 elsewhere.

    Raises:
        FileNotFoundError: there is no such folder, and it is no id.
        ValueError: it cannot be loaded, or there is no such device or precision.
    """
    place = find_device(device)
    precision = find_dtype(dtype, place)
    is_folder = model is not None and Path(model).is_dir()
    if model is not None and not is_folder and not HUB_ID.fullmatch(model):
        raise FileNotFoundError(f"no folder at --model {model}; an id on the hub is written OWNER/NAME")
    quiet_libraries()
    if model is None:
        return emoji.load_pipeline().to(place, precision)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, local_files_only=is_folder)
    except OSError as error:
        raise ValueError(f"no diffusers pipeline at --model {model}: {str(error).strip().splitlines()[0]}") from error
    pipe.set_progress_bar_config(leave=False)
    return pipe.to(place, precision)


def switch_off_safety_checker(pipe: Any) -> str:
    """Take a pipeline's safety checker off, for good: what it flags comes out black, with an eraser and without one.

    Return `off`, also where it was off before, or `none` for a kind of pipeline that has none.
    """
    if not hasattr(pipe, "safety_checker"):
        return "none"
    pipe.safety_checker = None
    pipe.register_to_config(requires_safety_checker=False)
    return "off"


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one.

    Raises:
        ValueError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} is not available here ({reason}); try cpu, or auto") from error
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of that name; `auto` is float16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def quiet_libraries() -> None:
    """Switch off the bars and notices that transformers and diffusers write while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def find_hook_point(model: str | None, hook_point: str | None) -> HookPoint:
    """Return the hook point that was named, or the embedded world's."""
    if hook_point is not None:
        return HookPoint.parse(hook_point)
    if model is None:
        return emoji.HOOK_POINT
    raise ValueError(
        "--hook-point is required with --model, as --hook-point text_encoder:encoder.layers.8; "
        f"`itd info --hook-points --model {model}` lists those of the model"
    )


def find_sae(model: str | None, sae: Path | None) -> SAE:
    """Load the autoencoder that was named, or the embedded world's."""
    if sae is not None:
        return SAE.load(sae)
    if model is None:
        return emoji.load_sae()
    raise ValueError("--sae is required with --model: the folder of an autoencoder; `itd record` and `itd train` make one")


def hook_point_of(pipe: Any, sae: SAE, model: str | None, hook_point: str | None) -> HookPoint:
    """Return the hook point that the autoencoder was trained at; one that was named must be the same place.

    Raises:
        ValueError: it is another place.
    """
    if sae.hook_point is None or hook_point is not None:
        site = find_hook_point(model, hook_point)
        if sae.hook_point is not None and sae.hook_point.resolve(pipe) is not site.resolve(pipe):
            raise ValueError(f"the autoencoder was trained at {sae.hook_point}, not at {site}; leave --hook-point out")
        return site
    return sae.hook_point


def load_erasers(folders: Sequence[Path], sae: Path | None = None) -> Eraser:
    """Load erasers and join them.

    Raises:
        ValueError: none is named, they do not join, or they are for several text encoders.
    """
    if not folders:
        raise ValueError("--eraser is required: the folder of an eraser; `itd erase` makes one")
    joined, *others = load_erasers_by_encoder(folders, sae)
    if others:
        encoders = ", ".join(each.hook_point.encoder for each in (joined, *others))
        raise ValueError(f"the erasers are for several text encoders: {encoders}; name those of one (`itd generate` takes all)")
    return joined


def load_erasers_by_encoder(folders: Sequence[Path], sae: Path | None = None) -> list[Eraser]:
    """Load erasers and join those that are for the same text encoder.

    Raises:
        ValueError: they do not join.
    """
    given = None if sae is None else SAE.load(sae)
    joined: dict[str, Eraser] = {}
    for folder in folders:
        encoder = encoder_in(folder)
        before = joined.get(encoder)
        eraser = Eraser.load(folder, given if before is None else before.sae)
        joined[encoder] = eraser if before is None else before | eraser
    return list(joined.values())


def encoder_in(folder: Path) -> str:
    """Return the text encoder that a folder's eraser is for; "" where there is none, as loading it will say."""
    path = folder / CONFIG
    config = read_object(path, "save the eraser again") if path.is_file() else {}
    return str(config.get("hook_point", "")).partition(":")[0]


def is_there(retained: Path | None) -> bool:
    """Tell whether a folder of what must stay was named and made."""
    return retained is not None and (retained / CONFIG).is_file()


def find_retained(folder: Path | None, pipe: Any, sae: SAE, site: HookPoint, sets: ConceptSets, seed: int) -> Retained | None:
    """Return what must stay, encoded: read from its folder, or made from the sets and kept there; None without a folder.

    Raises:
        ValueError: the folder is of another autoencoder, or the target is among what must stay.
    """
    if folder is None:
        return None
    if is_there(folder):
        return Retained.load(folder, sae)
    split_sets(*sets, seed)
    kept = Retained.make(pipe, sae, site, sets.retain, sets.neutral, seed)
    kept.save(folder)
    return kept


def eraser_to_extend(folder: Path, retained: Path | None, sae: Path | None = None) -> tuple[Eraser, Retained]:
    """Load an eraser that concepts are to be added to, and what must stay.

    Raises:
        ValueError: what must stay is not named, or was encoded by another autoencoder.
    """
    if retained is None:
        raise ValueError("--retained is required with --add-to: the folder that an earlier `itd erase --retained` made")
    eraser = load_erasers([folder], sae)
    return eraser, Retained.load(retained, eraser.sae)


def list_hook_points(pipe: Any) -> list[HookPoint]:
    """Return the layers of the pipeline's text encoders, in the spelling that every release resolves."""
    points = []
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            points += [HookPoint(name, path.removeprefix(WRAPPER)) for path in layers_of(part)]
    return points


def layers_of(encoder: nn.Module) -> list[str]:
    """Return the paths of the modules in the encoder's outermost lists: its layers."""
    lists = [path for path, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return [f"{path}.{index}" for path in outermost for index in range(len(encoder.get_submodule(path)))]  # pyright: ignore[reportArgumentType]


# Prompts


class ConceptSets(NamedTuple):
    """Prompts of what is to go, of what must stay, and of everything else."""

    target: PromptSet
    retain: PromptSet
    neutral: PromptSet


def is_file(value: str) -> bool:
    """Tell whether a value names a prompt file; anything else is the name of a concept.

    Raises:
        ValueError: it is a file, and none of prompts by its ending.
    """
    found = Path(value).suffix.lower() in PROMPT_FILES
    if not found and Path(value).is_file():
        raise ValueError(
            f"{value} is a file, but not one of prompts, which end in {', '.join(PROMPT_FILES)}; rename or convert it"
        )
    return found


def read_prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts given in words and those of a file."""
    prompts = [*texts, *(PromptSet.from_file(file).texts if file else ())]
    if not prompts:
        raise ValueError("give at least one prompt, or a file of prompts with --file")
    return prompts


def erase_settings(model: str | None, settings: EraseConfig) -> EraseConfig:
    """Return the settings, in which the embedded world draws as it is drawn with elsewhere unless they say otherwise.

    A refused prompt draws its own anchor there: it would draw some face of "a picture of something".
    """
    if model is not None:
        return settings
    unset = EraseConfig()
    own = {key: value for key, value in emoji.PICTURES.items() if getattr(settings, key) == getattr(unset, key)}
    if settings.edit == "refuse" and settings.anchor == ANCHOR:
        own["anchor"] = emoji.ANCHOR
    return replace(settings, **own)


def recording_prompts(model: str | None, files: Sequence[str], names: Sequence[str]) -> PromptSet:
    """Return what is to be recorded: files, names in the templates to fit on, or the embedded world's own prompts."""
    prompts = sum((PromptSet.from_file(file) for file in files), concept_prompts(names, ["fit"]))
    if len(prompts):
        return prompts
    if model is not None or files:
        raise ValueError("no prompts to record: give prompt files with --prompts, or concepts with --names")
    from itd.emoji.prompts import world_prompts

    return world_prompts()


def target_set(model: str | None, target: Sequence[str], synonyms: Sequence[str] = ()) -> PromptSet:
    """Return the prompts of what is to go, from names and files, and from other words for the names."""
    if not target:
        raise ValueError("--target is required: the name of a concept, or a file of prompts")
    return target_prompts([*target, *synonyms]) if model is not None else world_sets(target, synonyms).target


def find_other_words(
    pipe: Any, model: str | None, target: Sequence[str], retain: Sequence[str], encoder: str, common: int = 0
) -> dict[str, tuple[Synonym, ...]]:
    """Return the synonyms of the targets that are names; words closer to a name that stays are left out.

    Raises:
        ValueError: no target is a name.
    """
    names = [value for value in target if not is_file(value)]
    if not names:
        raise ValueError("--synonyms needs a name in --target: a prompt file says itself what is to go")
    stays = [value for value in retain if not is_file(value)]
    if model is None:
        from itd.emoji import nouns

        stays += [noun.name for noun in nouns()]
    return find_synonyms(pipe, names, stays, common=common, encoder=encoder)


def concept_sets(
    model: str | None,
    target: Sequence[str],
    retain: Sequence[str],
    neutral: Sequence[str],
    retained: bool = False,
    synonyms: Sequence[str] = (),
) -> ConceptSets:
    """Return the prompt sets of an eraser from names and files; what the embedded world knows need not be given.

    `retained`: what must stay is encoded already, only the target is asked for. `synonyms`: words to erase with the names.

    Raises:
        ValueError: no target; no retain set for a model other than the embedded world.
    """
    if not target or retained:
        return ConceptSets(target_set(model, target, synonyms), PromptSet(), PromptSet())
    if model is not None:
        if not retain:
            raise ValueError(
                "--retain is required with --model: names of what must stay, close to the target if possible, or a prompt file"
            )
        names = [value for value in (*target, *synonyms) if not is_file(value)]
        return ConceptSets(target_prompts([*target, *synonyms]), kept_prompts(retain, names), kept_prompts(neutral, names))
    found, avoid = world_sets(target, synonyms), [*target, *synonyms]
    return ConceptSets(
        found.target,
        kept_prompts(retain, avoid) if retain else found.retain,
        kept_prompts(neutral, avoid) if neutral else found.neutral,
    )


def world_sets(target: Sequence[str], synonyms: Sequence[str] = ()) -> ConceptSets:
    """Return the sets of the embedded world.

    What a target file names, by its concept or by the text of a prompt, is not retained.
    """
    from itd.emoji.prompts import erase_sets

    names = [value for value in target if not is_file(value)]
    files = target_prompts([value for value in target if is_file(value)])
    sets = ConceptSets(*erase_sets(names, synonyms))
    texts, concepts = set(files.texts), {concept.lower() for concept in files.concepts}
    others = sets.retain + sets.neutral
    named = [p.concept for p in others if p.concept and (p.concept.lower() in concepts or p.text in texts)]
    if named:
        _, retain, neutral = erase_sets([*names, *dict.fromkeys(named)], synonyms)
        sets = sets._replace(retain=retain, neutral=neutral)
    return sets._replace(target=sets.target + files)


def target_prompts(values: Iterable[str]) -> PromptSet:
    """Return prompts to erase. Prompts of a file that name no concept are one, named after the file."""
    names, prompts = [], PromptSet()
    for value in dict.fromkeys(values):
        if is_file(value):
            read = PromptSet.from_file(value)
            prompts = prompts + PromptSet(tuple(p if p.concept else replace(p, concept=Path(value).stem) for p in read))
        else:
            names.append(value)
    return concept_prompts(names) + prompts


def kept_prompts(values: Iterable[str], avoid: Iterable[str] = ()) -> PromptSet:
    """Return prompts to keep, in templates that mention nothing of `avoid`.

    Of three names two are fitted on and one is calibrated on; files are split later.
    """
    prompts: list[Prompt] = []
    n_names, avoided = 0, list(avoid)
    for value in dict.fromkeys(values):
        if is_file(value):
            prompts.extend(PromptSet.from_file(value))
        else:
            prompts.extend(concept_prompts([value], ["calibrate" if n_names % 3 == 2 else "fit"], avoided))
            n_names += 1
    return PromptSet(tuple(prompts))
