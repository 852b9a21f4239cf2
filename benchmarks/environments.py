"""Peers' own environments: made once, with pinned versions, and anew when the pins change."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / ".environments"
PINS = Path(__file__).parent / "peers"


class NotInstalled(Exception):
    """A peer's packages cannot be had here; one line says why."""


@dataclass(frozen=True)
class Environment:
    """A python with a peer's packages, and the versions that were asked for."""

    python: Path
    versions: str


def environment_of(peer: str) -> Environment:
    """The peer's environment; a peer without pins is one that Atoll itself depends on.

    Raises:
        NotInstalled: pip could not install the pinned versions.
    """
    pins = PINS / f"{peer}.txt"
    if not pins.exists():
        return Environment(Path(sys.executable), "")
    wanted = f"# python {sys.version_info.major}.{sys.version_info.minor}\n{pins.read_text('utf-8')}"
    folder = FOLDER / peer
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        _make(peer, folder, pins)
        stamp.write_text(wanted, "utf-8")
    return Environment(_python(folder), named(wanted))


def versions_of(peer: str) -> str:
    """The peer's pins on one line, whether it is installed or not; nothing for one without pins."""
    pins = PINS / f"{peer}.txt"
    return named(pins.read_text("utf-8")) if pins.exists() else ""


def named(pins: str) -> str:
    """The lines of the pins, without comments, on one line."""
    lines = [line.partition("#")[0].strip() for line in pins.splitlines()]
    return " ".join(line for line in lines if line)


def _make(peer: str, folder: Path, pins: Path) -> None:
    began = time.monotonic()
    print(f"making the environment of {peer} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _do(peer, [sys.executable, "-m", "venv", str(folder)])
    _do(peer, [str(_python(folder)), "-m", "pip", "install", "--quiet", "--requirement", str(pins)])
    print(f"{peer}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _do(peer: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        told = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line.upper()]
        raise NotInstalled(f"not installed: {(told or ['pip failed without a word'])[0].strip()[:150]}")


def _python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"
