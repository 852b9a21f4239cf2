"""Hashes of an extension's code, so that cached results of one version are not used for another."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Code:
    """The code of an extension as it was imported."""

    sha256: str
    """One hash of its module's file and of all its own files that this file imports, directly or not."""
    uses: tuple[str, ...]
    """The packages that these files import, each with its `__version__`: `numpy 2.1.0`."""


def code_of(name: str) -> Code | None:
    """The code of an imported module and of its own files that it imports; None where it has no file.

    Own files are those of its package, and those outside the standard library and installed packages.
    Modules that are imported inside a function, when it is called, are not seen.
    """
    module = sys.modules.get(name)
    if module is None or _file_of(module) is None:
        return None
    top, digests, uses = name.partition(".")[0], set(), set()
    waiting, seen = [module], {name}
    while waiting:
        one = waiting.pop()
        file = _file_of(one)
        assert file is not None
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
        for other in _held_by(one):
            if other.__name__ in seen:
                continue
            seen.add(other.__name__)
            if _is_own(other, top):
                waiting.append(other)
            elif other.__name__.partition(".")[0] not in ("atoll", *sys.stdlib_module_names):
                uses.add(_with_version(other.__name__.partition(".")[0]))
    digest = hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()
    return Code(digest, tuple(sorted(uses)))


def _held_by(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that a module imports, and those that define the objects it imports."""
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        other = sys.modules.get(name) if isinstance(name, str) else None
        if other is not None:
            yield other


def _is_own(module: ModuleType, top: str) -> bool:
    file, package = _file_of(module), module.__name__.partition(".")[0]
    if file is None or package == "atoll":
        return False
    return package == top or not any(file.is_relative_to(folder) for folder in _installed())


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    path = Path(file).resolve() if isinstance(file, str) else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


@cache
def _installed() -> tuple[Path, ...]:
    """The folders of the standard library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({Path(sysconfig.get_path(name)).resolve() for name in names})


def _with_version(package: str) -> str:
    return f"{package} {getattr(sys.modules.get(package), '__version__', '?')}"
