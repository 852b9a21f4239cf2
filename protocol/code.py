"""The code that server and sites must share: which files, and their hashes."""

import hashlib
import importlib.util
from pathlib import Path

ROOMS = ("client", "privacy", "protocol", "server", "strategies", "tasks")


def installed_files() -> dict[str, Path]:
    """Every Python file of the installed rooms, by its path inside a bundle, in order."""
    return {
        f"{room}/{path.relative_to(folder).as_posix()}": path
        for room in ROOMS
        for folder in [_room_folder(room)]
        for path in sorted(folder.rglob("*.py"))
    }


def _room_folder(room: str) -> Path:
    spec = importlib.util.find_spec(room)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def installed_hashes() -> dict[str, str]:
    """The sha256 of every Python file of the installed rooms."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in installed_files().items()}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The files that one side lacks or has otherwise, in order."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
