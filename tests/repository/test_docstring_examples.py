"""The examples in docstrings: each is run, and prints what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.repository.test_house import MODULES, ROOT, name_of

SHOWN = [
    "atoll.api",
    "atoll.client.site",
    "atoll.privacy.central",
    "atoll.strategies.strategy",
    "atoll.tasks.task",
]
"""What people build on: these have an example."""


def with_examples() -> list[str]:
    paths = [name_of(path) for path in MODULES if "    >>> " in path.read_text("utf-8")]
    names = [path.removesuffix(".py").replace("/", ".") for path in paths]
    return [name if name.startswith("atoll.") else f"atoll.{name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", with_examples())
def test_the_examples_of_docstrings_print_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0 and found.attempted > 0


def test_what_people_build_on_has_an_example() -> None:
    assert set(SHOWN) <= set(with_examples())
