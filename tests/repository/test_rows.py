"""docs/faults.md: every row is there once, and every test that it names, by the source alone."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
ROWS = {"Faults": 44, "Bad inputs": 86}
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[row (\d+)\])?`")


def sections() -> dict[str, list[str]]:
    """The lines of each section's table, by its title."""
    parts = re.split(r"^## (.*)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {
        title: [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((TESTS / file).read_text("utf-8"))


@cache
def functions_in(file: str) -> frozenset[str]:
    return frozenset(node.name for node in tree_of(file).body if isinstance(node, ast.FunctionDef))


@cache
def rows_in(file: str) -> frozenset[int]:
    """The rows that a file has cases of: first in a call `Case(…)` or a tuple, or a key of a table."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Case":
            found += node.args[:1]
        elif isinstance(node, ast.Tuple):
            found += node.elts[:1]
        elif isinstance(node, ast.Dict):
            found += node.keys
    return frozenset(one.value for one in found if isinstance(one, ast.Constant) and type(one.value) is int)


@pytest.mark.parametrize("title", ROWS)
def test_every_row_is_there_once_and_names_a_test(title: str) -> None:
    lines = sections()[title]
    assert [int(line.split("|")[1]) for line in lines] == [*range(1, ROWS[title] + 1)]
    for line in lines:
        assert line.count("|") == 5 and NAMED.search(line), line


@pytest.mark.parametrize("title", ROWS)
def test_every_test_that_a_row_names_is_there(title: str) -> None:
    for line in sections()[title]:
        cell = line.split("|")[4]
        assert NAMED.sub("", cell).strip(" ,") == "", line
        for file, name, row in NAMED.findall(cell):
            assert name in functions_in(file), f"{file}::{name}"
            assert not row or int(row) in rows_in(file), f"{file} has no case of row {row}"
