"""The code that server and sites must share: which files, and their hashes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import atoll

HASHES = "code.json"
"""What a run's bundle calls the server's hashes."""

ALONE = ("cli", "export", "report", "sim", "__main__.py", "api.py", "tracking.py", "trained.py")
"""What may differ between a server and its sites: no run between them executes it at both."""


def installed_files() -> dict[str, Path]:
    """The Python files that server and sites share, by their path inside the package, in order."""
    root = Path(atoll.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in python_files(root)}
    return {name: files[name] for name in sorted(files) if name.split("/")[0] not in ALONE}


def python_files(root: Path) -> Iterator[Path]:
    """All of a folder, also through links: in a checkout some of the package's folders are links."""
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def installed_hashes() -> dict[str, str]:
    """The sha256 of each of these files."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in installed_files().items()}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The files that one side lacks or has otherwise, in order."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


SHOWN = 5


def shown_files(names: Sequence[str]) -> str:
    """The first of some files, for one line.

    >>> shown_files(["a.py", "b.py"]), shown_files(list("abcdef"))
    ('a.py, b.py', 'a, b, c, d, e …')
    """
    return ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
