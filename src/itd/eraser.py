"""The eraser: a pure function of tensors that edits gated prompts, an artifact, and its algebra."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itd.artifacts import CONFIG, read_config, read_tensors, reading, require_keys, save_artifact, tensors_sha256
from itd.discriminants import Discriminants
from itd.drafts import DraftGate
from itd.early_exit import EarlyExit, Reached
from itd.features import ConceptFeatures, all_indices
from itd.gate import Decision, Gate, keep_features
from itd.hooks import HookPoint
from itd.kernels import SparseCodes, same_up_to
from itd.pictures import PictureGate
from itd.pooled import PooledGate
from itd.sae import SAE
from itd.words import KnownWords

if TYPE_CHECKING:
    from itd.attachment import Attachment
    from itd.explain import Check, PromptMemory

KIND = "eraser"
SCHEMA_VERSION = 9
"""2 added the tensor `often` and the field `positives` of a record, 3 the pooled gate, 4 the draft gate, 5 the window
of a concept, 6 the picture gate, 7 the edit `refuse`, 8 the middle block's part of a draft and the thresholds of the gates
beside the one on features, 9 the words."""
WORDS = "words"
"""Field that says which words the text encoder had."""
MORE_GATES = ("pooled", "draft", "picture")
"""Fields that hold a gate beside the one on features, or None."""
INTEGERS = {"indices": torch.int64, "often": torch.int32}
"""Tensors that are not floating point, and their types."""
EARLIER_THRESHOLDS = {"pooled": 0.45, "draft": 0.25, "picture": 0.15}
"""Of these gates up to version 7, which did not say."""
EditMode = Literal["scale", "remove", "subtract", "replace", "refuse"]
EDITS: tuple[EditMode, ...] = ("scale", "remove", "subtract", "replace", "refuse")
ANCHOR = "a picture of something"
"""The prompt that stands in for others, unless another is named."""


@dataclass(frozen=True)
class Edit:
    """What is done to a gated prompt.

    scale:    x' = sum_j s_j acts_j W_dec[j] + b_dec, s_j = strength for features of the concept, else 1 (the paper's)
    remove:   x' = x - sum_{j in c} acts_j W_dec[j]
    subtract: x' = x + (strength - 1) sum_{j in c} acts_j W_dec[j]; keeps the autoencoder's error
    replace:  tokens that name the concept take an anchor's activation, the others are edited as by `subtract`
    refuse:   as `replace`; attached, all that the text encoder says of the prompt is what it says of `anchor`

    c: the features of a concept, or the `n_features` of them with the largest weights. Many features tell a concept from its
    neighbours; to edit the few that are most its own spares whatever else the prompt names.
    """

    mode: EditMode = "subtract"
    strength: float = -3.0
    n_features: int | None = None
    """Features of each concept that are edited; None: all."""
    anchor: str = ANCHOR
    """The prompt that is drawn instead, for `refuse`."""

    def __post_init__(self) -> None:
        if self.mode not in EDITS:
            raise ValueError(f"edit must be one of {EDITS}, got {self.mode!r}")
        if not math.isfinite(self.strength):
            raise ValueError(f"the edit's strength must be a finite number, got {self.strength}")
        if self.n_features is not None and self.n_features < 1:
            raise ValueError(f"an edit needs at least 1 feature of a concept, or None for all; got {self.n_features}")

    @property
    def puts_anchors(self) -> bool:
        """Tell whether activations of an anchor are put in."""
        return self.mode in ("replace", "refuse")

    @property
    def factor(self) -> float:
        """What the features' contribution is multiplied by before it is added."""
        return -1.0 if self.mode == "remove" else self.strength - 1.0


class Erased(NamedTuple):
    """Edited activations and, per prompt, the decision."""

    x: Float[Tensor, "batch tokens d_model"]
    decisions: list[Decision]


@dataclass(frozen=True, eq=False)
class Eraser:
    """Erases concepts from the text encoder's activations at one hook point.

    x' = x where the gate is silent; else the edit of the concepts that fired, at every position but the begin token.

    Source: Tian et al. 2025, Interpret then Deactivate, section 4. The default edit keeps the autoencoder's error.
    """

    sae: SAE
    hook_point: HookPoint
    concepts: tuple[ConceptFeatures, ...]
    gate: Gate
    edit: Edit = field(default_factory=Edit)
    fingerprint: Float[Tensor, " d_model"] | None = None
    """Probe activation of the text encoder that it was made for."""
    anchors: Float[Tensor, "2 d_model"] | None = None
    """For `replace` and `refuse`: activations that stand in for the concept's token and for the end of the prompt."""
    records: tuple[dict[str, Any], ...] = ()
    """Per call of `erase` that went into it: calibration, prompts' hashes, settings."""
    often: Int[Tensor, " m"] | None = None
    """Latents that are active in most prompts, distinct: what decides early that features are not active."""
    pooled: PooledGate | None = None
    """A second gate, on the text encoder's pooled embedding."""
    draft: DraftGate | None = None
    """A gate on the image model's first guess of the picture."""
    picture: PictureGate | None = None
    """A gate on the finished picture."""
    words: KnownWords | None = None
    """Words of the text encoder that it was made for; others are an error."""

    @property
    def more_gates(self) -> dict[str, Discriminants]:
        """The gates beside the one on features, by kind."""
        found = {kind: getattr(self, kind) for kind in MORE_GATES}
        return {kind: gate for kind, gate in found.items() if gate is not None}

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("an eraser needs at least one concept")
        if len(self.gate.thresholds) != len(self.concepts):
            raise ValueError(f"{len(self.concepts)} concepts need as many thresholds, got {len(self.gate.thresholds)}")
        n_latents, d_model = self.sae.config.n_latents, self.sae.config.d_model
        for concept in self.concepts:
            outside = concept.indices[(concept.indices < 0) | (concept.indices >= n_latents)].tolist()
            if outside:
                raise ValueError(f"feature {outside[0]} of {concept.name!r} is not in an autoencoder of {n_latents} latents")
            if not (concept.weights.isfinite().all() and math.isfinite(concept.scale) and math.isfinite(concept.offset)):
                raise ValueError(f"the weights of {concept.name!r} contain NaN or infinity: it could not fire; make it again")
        for name, shape in (("fingerprint", (d_model,)), ("anchors", (2, d_model))):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
        if self.often is not None and len(self.often):
            if len(self.often.unique()) != len(self.often):
                raise ValueError("the latents in `often` must be distinct, or active ones would be counted twice")
            if not 0 <= int(self.often.min()) <= int(self.often.max()) < n_latents:
                raise ValueError(f"the latents in `often` must be those of an autoencoder of {n_latents} latents")
        if self.edit.puts_anchors and self.anchors is None:
            raise ValueError(f"the edit {self.edit.mode!r} needs anchors; make the eraser with itd.erase")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch tokens d_model"],
        content: Bool[Tensor, "batch tokens"],
        editable: Bool[Tensor, "batch tokens"],
    ) -> Erased:
        """Return the activations with gated prompts edited; rows that do not fire keep their bits.

        `content`: tokens that the prompt wrote, on which the gate decides. `editable`: positions that may change.

        Raises:
            ValueError: wrong d_model, or NaN or infinity in the activations.
        """
        if not x.isfinite().all():
            raise ValueError("activations contain NaN or infinity: the text encoder overflowed; use fp32 or bf16")
        decisions = self.decide_all([row[mask] for row, mask in zip(x, content, strict=True)])
        out = x.clone() if any(decision.fired for decision in decisions) else x
        for row, decision in enumerate(decisions):
            if decision.fired:
                out[row] = self.edit_prompt(x[row], content[row], editable[row], decision)
        if not all(decision.early for decision in decisions):
            self.sae.release()
        return Erased(out, decisions)

    @cached_property
    def early_exit(self) -> EarlyExit | None:
        """What decides most prompts from few rows of the encoder; None for the paper's score."""
        return self.gate.early_exit(self.sae, self.concepts, self.often)

    @cached_property
    def memory(self) -> PromptMemory:
        """What `check` remembers of the prompts that came last."""
        from itd.explain import PromptMemory

        return PromptMemory()

    def decide(self, x: Float[Tensor, "tokens d_model"]) -> Decision:
        """Gate one prompt by the activations of its content tokens."""
        return self.gate.decide(self.sae, self.concepts, x.float(), self.early_exit)

    @torch.no_grad()
    def decide_all(self, prompts: Sequence[Float[Tensor, "tokens d_model"]]) -> list[Decision]:
        """Gate prompts, each by itself; only the early exit, whose result does not depend on it, is done for all at once."""
        if self.early_exit is None or not prompts:
            return [self.decide(x) for x in prompts]
        return self.decide_settled(prompts, self.early_exit.settle(torch.cat(list(prompts)).float(), self.gate.thresholds))

    def decide_settled(
        self, prompts: Sequence[Float[Tensor, "tokens d_model"]], settled: Sequence[Reached | None]
    ) -> list[Decision]:
        """Gate prompts of which some tokens are settled; `settled`: of all tokens, one prompt after the other."""
        tokens = iter(settled)
        return [
            self.gate.decide_settled(self.sae, self.concepts, x.float(), list(islice(tokens, len(x)))) for x in prompts
        ]  # fmt: skip

    def edit_prompt(
        self, x: Float[Tensor, "tokens d_model"], content: Tensor, editable: Tensor, decision: Decision
    ) -> Float[Tensor, "tokens d_model"]:
        """Edit one gated prompt by the features of the concepts that fired."""
        hidden = x.float()
        codes = self.codes_of(hidden, content, editable, decision.scores.codes)
        written = self.sae.write(keep_features(codes, self.edited_features(decision.concepts)))
        base = self.sae.decode(codes) if self.edit.mode == "scale" else hidden
        edited = base + self.edit.factor * written
        if self.edit.puts_anchors:
            edited = self.put_anchors(edited, content, decision)
        return torch.where(editable[:, None], edited, hidden).to(x.dtype)

    def edited_features(self, concepts: Sequence[int]) -> ConceptFeatures:
        """Return the features that the edit of some concepts changes, each with weight 1."""
        indices = all_indices([self.concepts[c].strongest(self.edit.n_features) for c in concepts])
        return ConceptFeatures("", indices, torch.ones(len(indices)))

    def codes_of(
        self, x: Float[Tensor, "tokens d_model"], content: Tensor, editable: Tensor, known: SparseCodes
    ) -> SparseCodes:
        """Return the codes of all editable positions; those of the content are known from the decision."""
        rest = editable & ~content
        encoded = self.sae.encode(x[rest])
        acts = x.new_zeros(len(x), encoded.acts.shape[1], dtype=encoded.acts.dtype)
        indices = torch.zeros(acts.shape, dtype=torch.int64, device=x.device)
        for where, codes in ((content, known), (rest, encoded)):
            acts[where], indices[where] = codes.acts, codes.indices
        return SparseCodes(acts, indices)

    def put_anchors(self, edited: Float[Tensor, "tokens d_model"], content: Tensor, decision: Decision) -> Tensor:
        """Set the anchor at tokens that reach the threshold by themselves, and behind the prompt's end."""
        assert self.anchors is not None
        thresholds = torch.tensor([self.gate.thresholds[c] for c in decision.concepts])
        names_it = (decision.token_scores[:, list(decision.concepts)].cpu() >= thresholds).any(1)
        positions = content.nonzero().flatten()
        anchors = self.anchors.to(edited)
        edited = edited.clone()
        edited[positions[names_it.to(positions.device)]] = anchors[0]
        edited[int(positions[-1]) + 1 :] = anchors[1]
        return edited

    def to(self, device: str | torch.device) -> Eraser:
        """Return a copy whose autoencoder is on another device."""
        return replace(self, sae=self.sae.to(device))

    def with_edit(self, mode: EditMode, strength: float | None = None) -> Eraser:
        """Return a copy that edits differently; gate and features stay, and which of them are edited."""
        return replace(self, edit=replace(self.edit, mode=mode, strength=self.edit.strength if strength is None else strength))

    def __or__(self, other: Eraser) -> Eraser:
        """Erase what either erases. No training: more concepts are more features.

        Raises:
            ValueError: another autoencoder, hook point, text encoder, edit or score.
        """
        if self.sae is not other.sae and (self.sae.sha256 is None or self.sae.sha256 != other.sae.sha256):
            raise ValueError("erasers join only over the same autoencoder; make both with the same SAE")
        for what in ("hook_point", "edit"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(f"erasers join only with the same {what}: {getattr(self, what)} and {getattr(other, what)}")
        if self.fingerprint is not None and other.fingerprint is not None:
            self.require_encoder(other.fingerprint)
        if self.words and other.words and not self.words.agrees(other.words):
            raise ValueError("erasers join only for the same words of the text encoder; make both on one pipeline")
        for kind in MORE_GATES:
            if (getattr(self, kind) is None) != (getattr(other, kind) is None):
                raise ValueError(
                    f"an eraser with a {kind} gate joins only another with one; make both with {kind}_gate, or neither"
                )
        mine = list(zip(self.concepts, self.gate.thresholds, strict=True))
        fresh = [
            (concept, threshold)
            for concept, threshold in zip(other.concepts, other.gate.thresholds, strict=True)
            if not any(threshold == known and concept.equals(same) for same, known in mine)
        ]
        gates = {kind: gate | getattr(other, kind) for kind, gate in self.more_gates.items()}
        scores = self.gate | replace(other.gate, thresholds=tuple(threshold for _, threshold in fresh))
        if not fresh and all(len(gate.names) == len(self.more_gates[kind].names) for kind, gate in gates.items()):
            return self
        return replace(
            self,
            concepts=self.concepts + tuple(concept for concept, _ in fresh),
            gate=scores,
            records=self.records + tuple(record for record in other.records if record not in self.records),
            often=other.often if self.often is None else self.often,
            words=self.words or other.words,
            **gates,
        )

    def require_encoder(self, fingerprint: Float[Tensor, " d_model"]) -> None:
        """Raise ValueError if a probe activation is not that of the text encoder this eraser was made for."""
        if self.fingerprint is None:
            return
        if not same_up_to(fingerprint, self.fingerprint):
            same_shape = fingerprint.shape == self.fingerprint.shape
            difference = (fingerprint - self.fingerprint).norm() / self.fingerprint.norm() if same_shape else torch.tensor(1.0)
            raise ValueError(
                f"the eraser was made for another text encoder (probe activation differs by {float(difference):.0%}); "
                "make it again with itd.erase on this pipeline"
            )

    def attach(self, pipe: Any, ungated: Sequence[str] = (), allow_new_words: bool = False) -> Attachment:
        """Enforce the eraser on a pipeline; a context manager and a handle with `remove()`.

        Attached means enforced: a gate that did not run, embeddings passed by hand, a replaced text encoder or NaN
        activations raise instead of passing. Negative prompts are not gated. Removal restores the pipeline bit for bit.

        A pipeline with several text encoders needs an eraser attached to each before it generates, or `ungated`: names of
        those that may read the prompt without one.

        Words that the text encoder learnt after the eraser was made (textual inversion) are an error in positive prompts, as
        is an embedding that was changed; `allow_new_words` leaves them to the gates.

        With a picture gate, pictures that show a concept come out of the pipeline's `vae.decode` black.

        Raises:
            ValueError: unknown hook point, another text encoder or other embeddings of its words, or no text encoder of a name
                in `ungated`; a draft or picture gate of another image model.
        """
        from itd.attachment import attach

        return attach(self, pipe, ungated, allow_new_words)

    def check(self, pipe: Any, prompts: str | Sequence[str], allow_new_words: bool = False) -> list[Check]:
        """Say, per prompt: score, threshold, fired, and which tokens and features decided. Generates nothing.

        Erasers that are attached to the pipeline have no part in it.

        Raises:
            ValueError: another text encoder; words that it learnt after the eraser was made, unless `allow_new_words`.
        """
        from itd.explain import check

        return check(self, pipe, [prompts] if isinstance(prompts, str) else list(prompts), allow_new_words)

    def save(self, folder: str | Path) -> None:
        """Write the eraser: a few kB per concept. Its autoencoder is named by hash and place, not copied.

        Raises:
            ValueError: the autoencoder was never saved, or the folder holds something other than an eraser.
        """
        if self.sae.sha256 is None:
            raise ValueError("save the autoencoder first (sae = sae.save(folder)): the eraser names it by its hash")
        named = {"sae": {"sha256": self.sae.sha256, "source": self.sae.source}, "records": list(self.records)}
        save_artifact(folder, KIND, self.settings | named, {"features": self.tensors}, SCHEMA_VERSION)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides and edits, but for its tensors and the autoencoder, as plain values."""
        concepts = [
            {"name": c.name, "n_features": len(c), "scale": c.scale, "offset": c.offset, "window": c.window}
            for c in self.concepts
        ]
        own = {"hook_point": str(self.hook_point), "concepts": concepts, "gate": self.gate.to_dict(), "edit": asdict(self.edit)}
        gates = {kind: self.more_gates.get(kind) for kind in MORE_GATES}
        words = {} if self.words is None else {WORDS: asdict(self.words)}
        return own | {kind: described_gate(gate) if gate else None for kind, gate in gates.items()} | words

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of features and gates, by the names under which they are saved."""
        tensors = {
            "indices": torch.cat([concept.indices for concept in self.concepts]),
            "weights": torch.cat([concept.weights for concept in self.concepts]),
        }
        for name in ("fingerprint", "anchors"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        if self.often is not None:
            tensors["often"] = self.often.to(torch.int32)
        for kind, gate in self.more_gates.items():
            tensors |= {f"{kind}_directions": gate.directions, f"{kind}_offsets": gate.offsets}
            origin = getattr(gate, "origin", None)
            if origin is not None:
                tensors[f"{kind}_origin"] = origin
        return tensors

    @property
    def sha256(self) -> str:
        """One hash of all that decides and edits, the autoencoder's included: erasers that share it do the same."""
        return tensors_sha256(self.tensors, json.dumps([self.sae.sha256, self.settings], sort_keys=True))

    @classmethod
    def load(cls, folder: str | Path, sae: SAE | None = None) -> Eraser:
        """Read what `save` wrote. The autoencoder is read from where it was, or given.

        Raises:
            FileNotFoundError: no eraser there.
            ValueError: an altered file, or the autoencoder is another one, is none, or is not to be found.
        """
        keys = ("sae", "hook_point", "concepts", "gate", "edit", "records")
        place = Path(folder) / CONFIG
        config = read_config(folder, KIND, keys, range(1, SCHEMA_VERSION + 1), optional=(*MORE_GATES, WORDS))
        require_keys(place, config["sae"], ("sha256", "source"))
        if not isinstance(config["concepts"], list):
            raise ValueError(f"{place}: expected a list of concepts, found {config['concepts']!r}; save it again")
        for concept in config["concepts"]:
            require_keys(place, concept, ("name", "n_features", "scale", "offset"), optional=("window",))
        if WORDS in config:
            require_keys(place, config[WORDS], ("n", "sha256"))
        more = {kind: config[kind] for kind in MORE_GATES if config.get(kind) is not None}
        needed_tensors = ["indices", "weights"]
        for kind, described in more.items():
            require_keys(place, described, ("concepts", "anchor"), optional=("threshold", "widths"))
            needed_tensors += [f"{kind}_directions", f"{kind}_offsets"]
        origins = "draft_origin", "picture_origin"
        tensors = read_tensors(folder, config, "features", needed_tensors, ("fingerprint", "anchors", "often", *origins))
        needed = find_sae(config["sae"], sae, folder)
        with reading(folder):
            for name, tensor in tensors.items():
                expected = INTEGERS.get(name)
                if not (tensor.is_floating_point() if expected is None else tensor.dtype == expected):
                    raise ValueError(f"{name} is of type {tensor.dtype}, expected {expected or 'floating point'}")
            sizes = [concept["n_features"] for concept in config["concepts"]]
            indices, weights = tensors["indices"].split(sizes), tensors["weights"].split(sizes)
            concepts = tuple(
                ConceptFeatures(c["name"], i, w, c["scale"], c["offset"], c.get("window", 1))
                for c, i, w in zip(config["concepts"], indices, weights, strict=True)
            )
            return cls(
                needed,
                HookPoint.parse(config["hook_point"]),
                concepts,
                Gate.from_dict(config["gate"]),
                Edit(**config["edit"]),
                tensors.get("fingerprint"),
                tensors.get("anchors"),
                tuple(config["records"]),
                tensors["often"].long() if "often" in tensors else None,
                PooledGate(*gate_parts(PooledGate, more, tensors)) if "pooled" in more else None,
                DraftGate(
                    *gate_parts(DraftGate, more, tensors),
                    origin=tensors.get("draft_origin"),
                    widths=tuple(more["draft"].get("widths", ())),
                )
                if "draft" in more
                else None,
                PictureGate(*gate_parts(PictureGate, more, tensors), origin=tensors.get("picture_origin"))
                if "picture" in more
                else None,
                KnownWords(**config[WORDS]) if WORDS in config else None,
            )


def described_gate(gate: Discriminants) -> dict[str, Any]:
    """Return what is saved of a gate on the whole prompt beside its tensors."""
    described: dict[str, Any] = {"concepts": list(gate.names), "anchor": gate.anchor, "threshold": gate.part_way}
    widths = getattr(gate, "widths", ())
    return described | ({"widths": list(widths)} if widths else {})


def gate_parts(
    gate: type[Discriminants], described: dict[str, dict[str, Any]], tensors: dict[str, Tensor]
) -> tuple[tuple[str, ...], Tensor, Tensor, str]:
    """Return names, directions, offsets and anchor of a gate on the whole prompt, as they were saved.

    If another threshold was saved, the offsets are moved by the difference: the gate decides as it did.
    """
    kind, own = gate.kind, described[gate.kind]
    moved = gate.part_way - own.get("threshold", EARLIER_THRESHOLDS[kind])
    return tuple(own["concepts"]), tensors[f"{kind}_directions"], tensors[f"{kind}_offsets"] + moved, own["anchor"]


def find_sae(wanted: dict[str, Any], sae: SAE | None, folder: str | Path) -> SAE:
    """Return the autoencoder that an eraser needs: the one given, or the one at its recorded place.

    Raises:
        ValueError: it is not there, it is none, or it is another one.
    """
    if sae is None:
        try:
            sae = SAE.load(resolve_source(str(wanted["source"])))
        except FileNotFoundError as error:
            raise ValueError(
                f"the autoencoder of {folder} is not at {wanted['source']}; pass it: Eraser.load(folder, sae=SAE.load(...)), "
                "or --sae FOLDER on the command line"
            ) from error
    if not isinstance(sae, SAE):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"sae must be an autoencoder, got {sae!r}; load it first: SAE.load(folder)")
    if sae.sha256 != wanted["sha256"]:
        raise ValueError(
            f"{folder} was made with another autoencoder (sha256 {str(wanted['sha256'])[:12]}, given {str(sae.sha256)[:12]}); "
            "pass the one it was made with"
        )
    return sae


def resolve_source(source: str) -> Path:
    """Return the folder of a recorded autoencoder; the shipped one is found wherever itd is installed."""
    if source == "itd.emoji":
        from itd.emoji import sae_folder

        return sae_folder()
    return Path(source)
