"""What is imported is declared in pyproject.toml, and what is declared is imported.

`python -m tools.declared` prints a line for everything that is not so, and exits with 1. An import counts
wherever it stands: at the top, in a function, or under TYPE_CHECKING.

- A room imports packages of `[project] dependencies`; those of an extra only in the places that
  `[tool.declared.optional]` names for it; those of the extra `dev` never.
- Tests, benchmarks and scripts import packages that are declared anywhere.
- Each package of the dependencies is imported by a room, each of an extra by one of its places, each of
  `dev` by a test or a benchmark. `[tool.declared.unimported]` says why one is there that isn't.

deptry does the first and some of the third. It doesn't know where an extra may be imported, and nothing of
what tests import.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from atoll.kit.code_hashes import python_files

DEV = "dev"
OUTSIDE = ("benchmarks", "docs", "tests", "tools")
"""Folders beside the rooms: they use Atoll, and don't ship with it."""


@dataclass(frozen=True)
class Declared:
    """The packages of a pyproject.toml, and what it says of their use."""

    table: Mapping[str, Any]

    @property
    def dependencies(self) -> tuple[str, ...]:
        return tuple(self.table["project"]["dependencies"])

    @property
    def extras(self) -> dict[str, tuple[str, ...]]:
        """Of each extra its own requirements, without those that name other extras of ours."""
        extras = self.table["project"].get("optional-dependencies", {})
        own = canonicalize_name(self.table["project"]["name"])
        return {
            extra: tuple(line for line in lines if name_of(line) != own) for extra, lines in extras.items()
        }

    def _said(self, what: str) -> dict[str, Any]:
        said: dict[str, Any] = self.table.get("tool", {}).get("declared", {}).get(what, {})
        return said

    @property
    def rooms(self) -> tuple[str, ...]:
        return tuple(self.table["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])

    @property
    def optional(self) -> dict[str, list[str]]:
        """By extra: files of the rooms that may import its packages."""
        return self._said("optional")

    @property
    def unimported(self) -> dict[str, str]:
        """By requirement: why it is declared though nothing imports it."""
        return self._said("unimported")

    @property
    def elsewhere(self) -> dict[str, str]:
        """By folder: why what it imports isn't ours to declare."""
        return self._said("elsewhere")


@dataclass(frozen=True)
class Import:
    """A file, and the package's module that it imports."""

    path: str
    module: str

    @property
    def packages(self) -> frozenset[str]:
        """The installed packages that have the module; none of what is ours and doesn't ship."""
        found = () if self.module in OUTSIDE else _installed().get(self.module, ())
        return frozenset(map(canonicalize_name, found))


@cache
def _installed() -> Mapping[str, list[str]]:
    """By module: the packages that have it. It takes seconds to find out."""
    return metadata.packages_distributions()


def findings(root: Path) -> list[str]:
    """A line for everything that is imported and not declared, or declared and not imported."""
    declared = Declared(tomllib.loads((root / "pyproject.toml").read_text("utf-8")))
    inside, outside = _imports(root, declared)
    return [
        *_undeclared(inside, outside, declared),
        *_unused(inside, outside, declared),
        *_needless(inside + outside, declared),
    ]


def _imports(root: Path, declared: Declared) -> tuple[list[Import], list[Import]]:
    """What the rooms import that is no room, and what the folders beside them import of others."""
    rooms = {*declared.rooms, *sys.stdlib_module_names}

    def imported(folders: Iterable[str], ours: set[str]) -> Iterator[Import]:
        for path in (path for folder in folders for path in sorted(python_files(root / folder))):
            name = path.relative_to(root).as_posix()
            if "/." in name:
                continue  # what tools keep there, such as the benchmarks' environments
            if not any(path.is_relative_to(root / other) for other in declared.elsewhere):
                modules = set(modules_of(ast.parse(path.read_text("utf-8"), name)))
                yield from (Import(name, module) for module in sorted(modules - ours))

    return list(imported(declared.rooms, rooms)), list(imported(OUTSIDE, {*rooms, *OUTSIDE}))


def modules_of(tree: ast.Module) -> Iterator[str]:
    """The top modules that are imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


def _undeclared(inside: list[Import], outside: list[Import], declared: Declared) -> Iterator[str]:
    needed = packages_of(declared.dependencies)
    by_extra = {extra: packages_of(lines) for extra, lines in declared.extras.items()}
    everything = needed.union(*by_extra.values())
    for one in inside:
        here = (extra for extra, places in declared.optional.items() if one.path in places)
        if not one.packages & needed.union(*(by_extra[extra] for extra in here)):
            yield _complaint(one, [extra for extra, names in by_extra.items() if one.packages & names])
    for one in outside:
        if not one.packages & everything:
            yield _complaint(one, [])


def _complaint(one: Import, extras: list[str]) -> str:
    what = f"{one.path}: imports {one.module}"
    if one.module in OUTSIDE:
        return f"{what}, which does not ship"
    if extras:
        return f"{what}, which only the extra {' and '.join(extras)} declares"
    if one.packages:
        return f"{what} of {' or '.join(sorted(one.packages))}, which is not declared"
    return f"{what}, which no installed package has"


def _unused(inside: list[Import], outside: list[Import], declared: Declared) -> Iterator[str]:
    yield from _nowhere("dependencies", declared.dependencies, inside, declared)
    for extra, lines in declared.extras.items():
        where = declared.optional.get(extra, ())
        users = outside if extra == DEV else [one for one in inside if one.path in where]
        yield from _nowhere(extra, lines, users, declared)


def _nowhere(place: str, lines: Iterable[str], users: list[Import], declared: Declared) -> Iterator[str]:
    imported = frozenset[str]().union(*(one.packages for one in users))
    for line in lines:
        for part in _parts(line):
            used = bool(packages_of_part(part) & imported)
            if used and part in declared.unimported:
                yield f"tool.declared.unimported: {part} is imported"
            if not used and part not in declared.unimported:
                yield f"{place}: nothing that it is for imports {part}"


def _needless(all_imports: list[Import], declared: Declared) -> Iterator[str]:
    """What is said twice, and exceptions that nothing needs."""
    once = packages_of(declared.dependencies)
    for extra, lines in declared.extras.items():
        for name in sorted(packages_of(lines) & once):
            yield f"{extra}: {name} is one of the dependencies already"
    parts = {part for lines in (declared.dependencies, *declared.extras.values()) for part in _each(lines)}
    for part in sorted(declared.unimported.keys() - parts):
        yield f"tool.declared.unimported: {part} is not declared"
    for extra, places in declared.optional.items():
        names = packages_of(declared.extras.get(extra, ()))
        users = {one.path for one in all_imports if one.packages & names}
        for path in sorted(set(places) - users):
            yield f"tool.declared.optional: {path} imports nothing of the extra {extra}"


def _each(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from _parts(line)


def _parts(line: str) -> Iterator[str]:
    """What a requirement asks for: the package, and each extra of it.

    >>> list(_parts("flwr[simulation]==1.41.0"))
    ['flwr', 'flwr[simulation]']
    """
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    yield name
    yield from (f"{name}[{extra}]" for extra in sorted(requirement.extras))


def packages_of(lines: Iterable[str]) -> frozenset[str]:
    """The packages that requirements name, and those that the extras they ask for consist of."""
    return frozenset[str]().union(*map(packages_of_part, _each(lines)))


def packages_of_part(part: str) -> frozenset[str]:
    """The package, or what an extra of it consists of where it is installed."""
    asked = Requirement(part)
    if not asked.extras:
        return frozenset({name_of(part)})
    try:
        lines = metadata.requires(asked.name) or []
    except metadata.PackageNotFoundError:
        return frozenset()
    (extra,) = asked.extras
    found = [Requirement(line) for line in lines]
    return frozenset(
        canonicalize_name(one.name)
        for one in found
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    )


def name_of(line: str) -> str:
    """The package that a requirement names, in the one way to write it."""
    return canonicalize_name(Requirement(line).name)


if __name__ == "__main__":
    said = findings(Path(__file__).parents[1])
    print("\n".join(said) or "what is imported is declared, and what is declared is imported")
    sys.exit(bool(said))
