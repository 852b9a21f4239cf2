"""What is known of an installed package before it is imported: whether it is there, where, which version."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder that only has its name is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


@cache
def version_of(package: str) -> str:
    """An installed package's version, read from its files once a process.

    Raises:
        PackageNotFoundError: it isn't installed.
    """
    from importlib.metadata import version  # email's parser comes with it: not where nobody asks

    return version(package)


@cache
def folder_of(package: str) -> Path:
    """Where a package that we depend on lies; it isn't imported.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent
