"""Attacks on erased pipelines: what it takes to draw an erased concept all the same.

An attack is an immutable object; the call takes the system, the goal, the criterion of success and the budget.
"""

from __future__ import annotations

from collections.abc import Callable

from itd.attacks.base import Attack, Attempt, Budget, Criterion, Goal, System, Target, Trial
from itd.attacks.characters import Characters
from itd.attacks.criteria import ClipNames, Judged
from itd.attacks.direct import Direct
from itd.attacks.inversion import ConceptInversion
from itd.attacks.mma import TokenSearch
from itd.attacks.p4d import P4D
from itd.attacks.random_words import RandomWords
from itd.attacks.ring_a_bell import RingABell
from itd.attacks.synonyms import Synonyms
from itd.attacks.unlearn_diff import UnlearnDiff

GATE_WEIGHT = 1.0
"""Weight of the gate's score in the loss of the gate-aware attacks."""

ATTACKS: dict[str, Callable[[], Attack]] = {
    "direct": Direct,
    "random": RandomWords,
    "synonyms": Synonyms,
    "characters": Characters,
    "ring-a-bell": RingABell,
    "mma": TokenSearch,
    "p4d": P4D,
    "p4d-aware": lambda: P4D(gate_weight=GATE_WEIGHT),
    "p4d-k": lambda: P4D(every=1),
    "p4d-k-aware": lambda: P4D(every=1, gate_weight=GATE_WEIGHT),
    "unlearndiff": UnlearnDiff,
    "unlearndiff-aware": lambda: UnlearnDiff(gate_weight=GATE_WEIGHT),
    "inversion": ConceptInversion,
    "inversion-aware": lambda: ConceptInversion(gate_weight=GATE_WEIGHT),
}
"""Attacks by name; those that end in `-aware` have the gate's score in their loss."""


def find_attack(name: str) -> Attack:
    """Return an attack by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    return ATTACKS[name]()


__all__ = [
    "ATTACKS", "P4D", "Attack", "Attempt", "Budget", "Characters", "ClipNames", "ConceptInversion", "Criterion", "Direct",
    "Goal", "Judged", "RandomWords", "RingABell", "Synonyms", "System", "Target", "TokenSearch", "Trial", "UnlearnDiff",
    "find_attack",
]  # fmt: skip
