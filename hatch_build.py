"""Build hook: a wheel carries the weights of the embedded world; an editable install finds them in the source tree."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedWeights(BuildHookInterface):
    """Add models/emoji to the wheel as itd/emoji/models; a wheel without the weights is an error."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Leave an editable install alone: a copy of the weights would go stale."""
        if version != "editable":
            build_data["force_include"]["models/emoji"] = "itd/emoji/models"
