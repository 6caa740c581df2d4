"""Checks that settings of several modules share."""

from __future__ import annotations

import math


def require_at_least(settings: object, **least: float) -> None:
    """Raise ValueError unless each of these settings, or every value of it, is finite and at least so much.

    >>> from types import SimpleNamespace
    >>> require_at_least(SimpleNamespace(sizes=(50, 0)), sizes=1)
    Traceback (most recent call last):
    ValueError: sizes must be at least 1, got (50, 0)
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        each = value if isinstance(value, tuple) else (value,)
        if not each or not all(bound <= number < math.inf for number in each):
            raise ValueError(f"{name} must be at least {bound}, got {value}")
