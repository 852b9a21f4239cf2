"""Packages that are installed, and that an interpreter is made not to find, as if they weren't.

What hides them needs the standard library only: it runs before anything else does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, distributions, requires
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


class Without:
    """Finds what Python's own finder of installed packages finds, but nothing of the hidden ones."""

    def __init__(self, packages: Iterable[str], modules: Iterable[str]) -> None:
        self.packages, self.modules = frozenset(packages), frozenset(modules)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if name in self.modules else PathFinder.find_spec(name, path, target)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        found = PathFinder.find_distributions(context or DistributionFinder.Context())
        return (one for one in found if normal(one.name) not in self.packages)

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


def normal(name: str) -> str:
    """A package's name in the one way to write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hide(packages: Iterable[str], modules: Iterable[str]) -> None:
    """From now on this interpreter doesn't find them."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without(packages, modules)  # type: ignore[call-overload]


def hiding_environment(folder: Path, packages: frozenset[str]) -> dict[str, str]:
    """Variables under which every interpreter, and every one that it starts, doesn't find the packages.

    Python runs a `sitecustomize` at its start where it finds one; the folder gets it.
    """
    folder.mkdir()
    (folder / "hidden.json").write_text(
        json.dumps({"packages": sorted(packages), "modules": sorted(modules_of(packages))})
    )
    (folder / "sitecustomize.py").write_text(
        "import json, pathlib\nfrom tests.repository.hiding import hide\n"
        "hide(**json.loads(pathlib.Path(__file__).with_name('hidden.json').read_text()))\n"
    )
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def modules_of(packages: frozenset[str]) -> set[str]:
    """The modules that these packages have and no other one: of shared namespaces the part below."""
    mine, others = set[str](), set[str]()
    for name, modules in _modules().items():
        (mine if name in packages else others).update(modules)
    return mine - others


@cache
def _modules() -> dict[str, set[str]]:
    """By package: its modules down to the third level."""
    found: dict[str, set[str]] = {}
    for one in distributions():
        own = found.setdefault(normal(one.name), set())
        for file in one.files or ():
            parts = [part.partition(".")[0] for part in file.parts[:3]]
            if file.suffix in (".py", ".so") and ".." not in file.parts:
                own.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return found


def closure(lines: Iterable[str]) -> frozenset[str]:
    """The packages that requirements bring, with all that those require in turn, on this machine."""
    from packaging.requirements import Requirement

    brought, left = set[tuple[str, str]](), list(lines)
    while left:
        asked = Requirement(left.pop())
        for extra in ("", *asked.extras):
            if (normal(asked.name), extra) not in brought:
                brought.add((normal(asked.name), extra))
                left += [
                    line
                    for line in requires(asked.name) or ()
                    if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": extra})
                ]
    return frozenset(name for name, _ in brought)


def installed() -> frozenset[str]:
    """Every package that is installed, Atoll itself aside."""
    return frozenset(normal(one.name) for one in distributions()) - {"atoll"}
