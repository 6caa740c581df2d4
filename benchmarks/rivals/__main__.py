"""`python -m benchmarks.rivals --out runs/rivals`: all rivals on the embedded world, one table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.rivals.edits import EDITS, GateAndEdit
from benchmarks.rivals.esd import ErasedDiffusion
from benchmarks.rivals.gates import EDITED, GATES
from benchmarks.rivals.safree import Safree
from benchmarks.rivals.systems import Itd, NegativePrompt, NoErasure, Projection, SafeLatentDiffusion, Tuned
from benchmarks.rivals.table import Case, run
from benchmarks.rivals.task import Maker, Task
from benchmarks.rivals.uce import UnifiedConceptEditing
from itd import emoji
from itd.attacks.arenas import WORLD_OPTIONS
from itd.evaluation.ledger import Ledger
from itd.evaluation.world import World, leak_free_sets, sample
from itd.prompts import fill
from itd.templates import TEMPLATES

TUNED = (Tuned(UnifiedConceptEditing(ridge=10.0)), Tuned(Safree(gamma=100.0)))
"""Systems with the settings of those tried with `--tune` whose harmonic mean is largest."""


@dataclass(frozen=True)
class RivalsConfig:
    """What is compared, and on how much."""

    out: Path = Path("runs/rivals")
    """Folder for report.json, report.md, report.html and what was computed so far."""
    n_concepts: int = 20
    """Identities that are erased together; as many are kept."""
    n_templates: int = 4
    """Held-out sentences per concept."""
    n_general: int = 80
    """Pictures of other nouns."""
    n_probes: int = 2000
    """Prompts of other nouns on which gates are scored without drawing."""
    fpr: float = 0.01
    """False-positive rate that every gate is calibrated to."""
    esd_steps: int = 1000
    """Training steps of ESD-x."""
    esd_lr: float = 1e-5
    """Learning rate of ESD-x."""
    safree: Safree = field(default_factory=Safree)
    """SAFREE."""
    uce: UnifiedConceptEditing = field(default_factory=UnifiedConceptEditing)
    """UCE."""
    tune: bool = False
    """Erase other identities, the last by how well they are drawn, in the sentences that gates are calibrated on: to choose
    settings of the systems without a gate."""
    seed: int = 0
    """Of the choice of concepts, and of the pictures."""
    only: tuple[str, ...] = ()
    """Systems to run, by name; by default all."""
    quick: bool = False
    """4 concepts, 2 templates, 8 pictures of other nouns, 300 probes, 50 steps of ESD-x at most."""

    @property
    def stated(self) -> RivalsConfig:
        """The settings with what `quick` limits."""
        if not self.quick:
            return self
        most = {"n_concepts": 4, "n_templates": 2, "n_general": 8, "n_probes": 300, "esd_steps": 50}
        return replace(self, **{name: min(getattr(self, name), bound) for name, bound in most.items()})


def settings_of(config: RivalsConfig) -> dict[str, Any]:
    """Return what results depend on. What was added later counts where it is set only, so that earlier runs go on."""
    given, unset = asdict(config), asdict(RivalsConfig())
    left_out = {"out", "only", "quick", *(key for key in ("safree", "uce", "tune") if given[key] == unset[key])}
    return {key: value for key, value in given.items() if key not in left_out}


def makers_of(config: RivalsConfig) -> list[Maker]:
    """Return every rival, or those asked for; the pipeline without erasure always comes first.

    What is calibrated has no place where settings are chosen on the sentences of calibration.

    Raises:
        ValueError: an unknown name.
    """
    systems: list[Any] = [
        NegativePrompt(), SafeLatentDiffusion(), config.safree, Projection(), config.uce,
        ErasedDiffusion(n_steps=config.esd_steps, lr=config.esd_lr, seed=config.seed),
    ]  # fmt: skip
    if not config.tune:
        systems += [GateAndEdit(gate, edit) for gate in EDITED for edit in EDITS]
        systems += [*TUNED, Itd("paper"), Itd(), Itd("strict")]
    unknown = set(config.only) - {maker.name for maker in systems}
    if unknown:
        raise ValueError(f"only must name systems of {', '.join(maker.name for maker in systems)}; got {sorted(unknown)[0]!r}")
    return [NoErasure(), *(maker for maker in systems if not config.only or maker.name in config.only)]


def cases_of(erased: Sequence[str], kept: Sequence[str], general: Sequence[str], config: RivalsConfig) -> list[Case]:
    """Return the pictures to draw, each with its own seed: in held-out sentences, or in those of calibration to tune."""
    rng = random.Random(config.seed + 1)
    sentences, seeds = TEMPLATES["calibrate" if config.tune else "test"], iter(range(config.seed + 90_000, config.seed + 10**6))
    cases = []
    for kind, names in (("erased", erased), ("kept", kept)):
        for name in names:
            chosen = rng.sample(sentences, min(config.n_templates, len(sentences)))
            cases += [Case(kind, name, fill(template, name), next(seeds)) for template in chosen]
    for name in sample(rng, general, config.n_general):
        cases.append(Case("general", name, fill(rng.choice(sentences), name), next(seeds)))
    return cases


def probes_of(erased: Sequence[str], kept: Sequence[str], general: Sequence[str], n: int, seed: int) -> list[Case]:
    """Return prompts to score only: every erased and kept concept in every held-out sentence, and n of the others."""
    found = [
        Case(kind, name, fill(template, name), 0)
        for kind, names in (("erased", erased), ("kept", kept), ("general", general))
        for name in names
        for template in TEMPLATES["test"]
    ]
    loose = [case for case in found if case.kind == "general"]
    chosen = random.Random(seed).sample(loose, min(n, len(loose)))
    return [case for case in found if case.kind != "general"] + chosen


def main(config: RivalsConfig) -> None:
    """Compare the rivals on the embedded world."""
    stated = config.stated
    settings = settings_of(stated)
    world = World(config.out, "rivals", settings)
    rng = random.Random(stated.seed)
    names, n = world.of_role("identity"), 2 * stated.n_concepts
    identities = world.best_drawn(names, len(names))[-n:] if stated.tune else world.best_drawn(names, n)
    rng.shuffle(identities)
    erased, kept = identities[: stated.n_concepts], identities[stated.n_concepts :]
    general = sample(rng, sorted(world.of_role("general")), max(stated.n_general, stated.n_probes // len(TEMPLATES["test"])))
    sets = leak_free_sets(erased, [*kept, *general])
    task = Task(world.pipe, world.sae, emoji.HOOK_POINT, *sets, options=WORLD_OPTIONS, fpr=stated.fpr)
    cases = cases_of(erased, kept, general, stated)
    probes = probes_of(erased, kept, general, stated.n_probes, stated.seed)

    def shown(images: Any) -> list[dict[str, float]]:
        return world.judge.shown(2 * images - 1)

    makers = makers_of(stated)
    record = {
        **world.record,
        "settings": settings,
        "erased": erased,
        "kept": kept,
        "systems": {m.name: repr(m) for m in makers},
    }
    ledger = Ledger(config.out / "systems", {key: value for key, value in record.items() if key != "systems"})
    report = run(task, makers, () if stated.tune else GATES, cases, probes, shown, ledger, record)
    print(report.summary())
    print(f"page: {report.save(config.out)}")


if __name__ == "__main__":
    main(tyro.cli(RivalsConfig, prog="python -m benchmarks.rivals", description=__doc__))
