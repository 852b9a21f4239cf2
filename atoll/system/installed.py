"""What an installed package's source says, for those who need not wait until the package is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def folder_of(package: str) -> Path:
    """Where a package that we depend on lies; it isn't imported.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(found.origin).parent


def parsed(folder: Path, mark: str = "") -> Iterator[ast.Module]:
    """The syntax trees of the Python files in a folder, of those alone that hold the `mark`."""
    for path in sorted(folder.glob("*.py")):
        text = path.read_text("utf-8")
        if mark in text:
            yield ast.parse(text)
