"""Prompts to activations at a hook point, each distinct one once, on disk in resumable shards."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from itd import pipelines
from itd.artifacts import CONFIG, itd_version, read_object, safetensors_errors
from itd.hooks import HookPoint
from itd.kernels import same_up_to
from itd.prompts import PromptSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Activations of some prompts. `content` marks what the prompt wrote, `editable` all but the begin token."""

    prompts: PromptSet
    input_ids: Int[Tensor, "batch tokens"]
    x: Float[Tensor, "batch tokens d_model"]
    content: Bool[Tensor, "batch tokens"]
    editable: Bool[Tensor, "batch tokens"]


def stream(
    pipe: Any, site: HookPoint, prompts: PromptSet, batch_size: int = 64, desc: str = "encode prompts"
) -> Iterator[Batch]:
    """Yield activations of the prompts, batch by batch, in fp32 on the CPU, with a progress bar when it takes long."""
    tokenizer = pipelines.tokenizer_of(pipe, site.encoder)
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc=desc, unit="batch", disable=len(prompts) < 8 * batch_size, leave=False):
        part = prompts[start : start + batch_size]
        tokens = pipelines.tokenize(pipe, site.encoder, part.texts)
        x = pipelines.activations(pipe, site, tokens).float().cpu()
        ids = tokens.input_ids
        yield Batch(part, ids, x, pipelines.content_mask(ids, tokenizer), pipelines.edit_mask(ids, tokenizer))


class Contents(NamedTuple):
    """Activations of the content tokens of some prompts, one prompt after the other."""

    prompts: list[int]
    """Places of the prompts among those that were given."""
    x: Float[Tensor, "tokens d_model"]
    n_tokens: list[int]
    """Content tokens of each prompt."""
    keys: list[bytes]
    """Per token, what its activation depends on: in a causal encoder the prompt up to it, elsewhere all of it and the place."""

    @classmethod
    def join(cls, parts: Sequence[Contents]) -> Contents:
        """Put several together, in order."""
        prompts, x, n_tokens, keys = zip(*parts, strict=True)
        return cls(list(chain(*prompts)), torch.cat(x), list(chain(*n_tokens)), list(chain(*keys)))

    def split(self) -> list[Float[Tensor, "tokens d_model"]]:
        """Return the activations of each prompt."""
        return list(self.x.split(self.n_tokens))


def stream_contents(
    pipe: Any,
    site: HookPoint,
    rows: Sequence[Sequence[int]],
    texts: Sequence[str],
    batch_tokens: int = 1024,
    desc: str = "encode prompts",
) -> Iterator[Contents]:
    """Yield activations of content tokens in fp32 on the CPU, shortest prompts first, without padding where it has no part.

    `rows`: the texts' token ids, from `pipelines.token_rows`.
    """  # fmt: skip
    tokenizer, encoder = pipelines.tokenizer_of(pipe, site.encoder), pipelines.encoder_of(pipe, site.encoder)
    causal = pipelines.needs_no_padding(encoder)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = list(group_by_size(order, [len(row) for row in rows], batch_tokens))
    for group in tqdm(groups, desc=desc, unit="batch", disable=len(groups) < 16, leave=False):
        if causal:
            tokens = pipelines.pad_rows([rows[i] for i in group], tokenizer)
        else:
            tokens = pipelines.tokenize(pipe, site.encoder, [texts[i] for i in group])
        content = pipelines.content_mask(tokens.input_ids, tokenizer)
        x = pipelines.activations(pipe, site, tokens).float().cpu()
        keys = [key for ids, mask in zip(tokens.input_ids, content, strict=True) for key in token_keys(ids, mask, causal)]
        yield Contents(list(group), x[content], content.sum(1).tolist(), keys)


def joined(batches: Iterable[Contents], n_tokens: int) -> Iterator[Contents]:
    """Put batches together until they have that many tokens."""
    waiting: list[Contents] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(each.keys) for each in waiting) >= n_tokens:
            yield Contents.join(waiting)
            waiting.clear()
    if waiting:
        yield Contents.join(waiting)


def group_by_size(order: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Yield runs of `order`, which ascends in size, that take at most `most` when each is padded to the largest."""
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end - start + 1) * sizes[order[end]] > most:
            yield order[start:end]
            start = end


def token_keys(ids: Int[Tensor, " tokens"], content: Bool[Tensor, " tokens"], causal: bool) -> list[bytes]:
    """Return, for each content token, what identifies all that its activation depends on."""
    keys: list[bytes] = []
    running = hashlib.blake2b(b"" if causal else ids.numpy().tobytes(), digest_size=16)
    for token, counts in zip(ids.tolist(), content.tolist(), strict=True):
        running.update(token.to_bytes(4, "little"))
        if counts:
            keys.append(running.copy().digest())
    return keys


class ActivationStore:
    """Distinct activations and how often each occurred.

    x: (n, d_model) fp32; weight: (n,) occurrences. On disk: `config.json` and one safetensors file per shard.
    """

    def __init__(self, x: Float[Tensor, "n d_model"], weight: Float[Tensor, " n"], hook_point: HookPoint | None = None) -> None:
        if len(x) == 0:
            raise ValueError("an activation store needs at least one activation; the prompts have no content tokens")
        if not x.isfinite().all():
            raise ValueError("activations contain NaN or infinity: the text encoder overflowed; use fp32 or bf16")
        self.x, self.weight, self.hook_point = x, weight, hook_point

    def __len__(self) -> int:
        return len(self.x)

    @property
    def d_model(self) -> int:
        return self.x.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of a sample of the activations and of all weights, to recognise the store when training resumes."""
        rows = self.x[:: max(1, len(self) // 64)].contiguous()
        return hashlib.sha256(rows.numpy().tobytes() + self.weight.numpy().tobytes()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> ActivationStore:
        """Read a finished recording.

        Raises:
            FileNotFoundError: nothing was recorded there.
            ValueError: it is something else; or the recording was interrupted, then run `record` again with the same
                arguments to finish it.
        """
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"no recorded activations at {folder}")
        config = read_object(path, "record again into another folder")
        if config.get("kind") != "activations":
            raise ValueError(f"{path} describes a {config.get('kind')!r}, not 'activations'")
        if not config["finished"]:
            raise ValueError(f"{folder}: the recording was interrupted; record again with the same prompts to finish it")
        x = torch.cat([read_tensor(Path(folder) / name, "x") for name in config["shards"]])
        return cls(x, read_tensor(Path(folder) / "weight.safetensors", "weight"), HookPoint.parse(config["hook_point"]))


def read_tensor(path: Path, name: str) -> Tensor:
    with safetensors_errors(path, "delete the folder and record again"), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


class Folder:
    """Folds activations that must be equal into one with a weight.

    In a causal encoder a state depends on the tokens up to its own position only, so prompts that share a prefix share
    its states; elsewhere the whole prompt is the key. Of the padding only the first position is kept: the rest repeats it;
    none where it is masked, as then nothing reads it and its length may depend on the batch.
    `repeats` says how often a text occurs among the prompts.
    """

    def __init__(self, causal: bool, repeats: Mapping[str, int], masked: bool = False) -> None:
        self.causal, self.repeats, self.masked = causal, repeats, masked
        self.seen: dict[bytes, int] = {}
        self.weights: list[float] = []

    def add(
        self, texts: Sequence[str], input_ids: Int[Tensor, "batch tokens"], content: Bool[Tensor, "batch tokens"]
    ) -> Bool[Tensor, "batch tokens"]:
        """Count a batch; mark the activations that are new: content, the end token, one padding."""
        new = torch.zeros_like(content)
        positions = torch.arange(content.shape[1])
        first = torch.where(content, positions, content.shape[1]).amin(1).tolist()
        last = torch.where(content, positions, -1).amax(1).tolist()
        for row, ids in enumerate(input_ids.numpy()):
            end = min(last[row] + (2 if self.masked else 3), len(ids))
            for position in range(first[row], end):
                prefix = ids[: position + 1] if self.causal else ids[: end if self.masked else len(ids)]
                key = hashlib.blake2b(prefix.tobytes() + position.to_bytes(4, "little"), digest_size=12).digest()
                if key not in self.seen:
                    self.seen[key] = len(self.weights)
                    self.weights.append(0.0)
                    new[row, position] = True
                self.weights[self.seen[key]] += self.repeats[texts[row]]
        return new


def record(
    pipe: Any,
    site: HookPoint,
    prompts: PromptSet,
    out: str | Path | None = None,
    batch_size: int = 64,
    shard_prompts: int = 4096,
) -> ActivationStore:
    """Run the prompts through the text encoder up to the hook point and keep every distinct activation.

    With `out`, a shard is written for every `shard_prompts` prompts, and a recording that was stopped goes on after its
    last shard.

    Raises:
        ValueError: no prompts, less than one at a time, an unknown hook point, or `out` holds a recording of other prompts
            or of another text encoder.
    """
    if len(prompts) == 0:
        raise ValueError("record needs at least one prompt")
    if batch_size < 1 or shard_prompts < 1:
        raise ValueError(f"batch_size and shard_prompts must be at least 1, got {batch_size} and {shard_prompts}")
    site.resolve(pipe)
    unique = prompts.unique()
    encoder = pipelines.encoder_of(pipe, site.encoder)
    counted = Folder(pipelines.is_causal(encoder), Counter(prompts.texts), pipelines.uses_attention_mask(encoder))
    config = {
        "kind": "activations", "itd_version": itd_version(), "hook_point": str(site), "prompts_sha256": prompts.sha256,
        "fingerprint": pipelines.fingerprint(pipe, site).tolist(), "shard_prompts": shard_prompts,
        "finished": False, "shards": [],
    }  # fmt: skip
    if out is not None:
        claim_folder(Path(out), config)
    shards = []
    for start in range(0, len(unique), shard_prompts):
        part = unique[start : start + shard_prompts]
        path = None if out is None else Path(out) / f"activations-{start:08d}.safetensors"
        shards.append(record_shard(pipe, site, part, counted, path, batch_size))
    weight = torch.tensor(counted.weights)
    store = ActivationStore(torch.cat(shards), weight, site)
    if out is not None:
        write_tensors(Path(out) / "weight.safetensors", {"weight": weight})
        names = [f"activations-{start:08d}.safetensors" for start in range(0, len(unique), shard_prompts)]
        config |= {"finished": True, "shards": names}
        (Path(out) / CONFIG).write_text(json.dumps(config, indent=2))
    return store


def claim_folder(out: Path, config: dict[str, Any]) -> None:
    """Make the folder, or check that what it holds is the same recording."""
    path = out / CONFIG
    if path.is_file():
        found = read_object(path, "name another folder")
        for key in ("kind", "hook_point", "prompts_sha256", "shard_prompts"):
            if found.get(key) != config[key]:
                raise ValueError(f"{out} holds a recording with another {key}; name another folder")
        mine, theirs = (torch.tensor(each["fingerprint"]) for each in (config, {**config, **found}))
        if not same_up_to(mine, theirs):
            raise ValueError(f"{out} holds a recording of another text encoder; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))


def record_shard(
    pipe: Any, site: HookPoint, prompts: PromptSet, counted: Folder, path: Path | None, batch_size: int
) -> Float[Tensor, "n d_model"]:
    """Return the new activations of some prompts; a shard that is on disk is counted and read, not computed again."""
    if path is not None and path.is_file():
        tokens = pipelines.tokenize(pipe, site.encoder, prompts.texts).input_ids
        content = pipelines.content_mask(tokens, pipelines.tokenizer_of(pipe, site.encoder))
        x = read_tensor(path, "x")
        if int(counted.add(prompts.texts, tokens, content).sum()) != len(x):
            raise ValueError(f"{path} does not fit the prompts; delete the folder and record again")
        return x
    batches = stream(pipe, site, prompts, batch_size, desc="record activations")
    x = torch.cat([batch.x[counted.add(batch.prompts.texts, batch.input_ids, batch.content)] for batch in batches])
    if path is not None:
        write_tensors(path, {"x": x})
    return x


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write to a temporary file, then rename; nothing half-written stays."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
