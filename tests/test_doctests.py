"""The examples in docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest
from test_architecture import SOURCE, sources

MODULES = [
    ".".join(("itd", *path.relative_to(SOURCE).with_suffix("").parts)) for path in sources() if ">>>" in path.read_text("utf8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
