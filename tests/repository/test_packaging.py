"""What is built of the repository: one package, which works from any folder."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import tomli_w

from tests.sim.test_simulation import DIGITS

ROOT = Path(__file__).parents[2]
ROOMS = ("client", "server", "sim", "strategies")

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing the wheel puts into a folder for packages."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def test_a_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"atoll"}
    assert not any(path.is_symlink() for path in installed.rglob("*"))
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "atoll").rglob("*.py")}
    ours |= {f"atoll/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {path.relative_to(installed).as_posix() for path in (installed / "atoll").rglob("*.py")} == ours
    read = {
        path.name for path in (installed / "atoll" / "report").iterdir() if path.suffix in (".j2", ".css")
    }
    assert read == {"report.html.j2", "macros.html.j2", "report.css"}


def test_a_wheel_can_be_built_of_the_sdist(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=unpacked, check=True, capture_output=True)
    with (
        zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again,
        zipfile.ZipFile(next(built.glob("*.whl"))) as first,
    ):
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_it_runs_from_a_folder_with_modules_of_the_names_of_its_rooms(
    installed: Path, tmp_path: Path
) -> None:
    for name in (*ROOMS, "tasks", "protocol", "privacy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py is the user\\'s')\n")
    (tmp_path / "job.toml").write_text(tomli_w.dumps(DIGITS | {"federation": {"clients": 3, "rounds": 1}}))
    environment = os.environ | {"PYTHONPATH": str(installed)}
    said = subprocess.run(
        [sys.executable, "-m", "atoll", "simulate", "job.toml", "--out", "run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (said.returncode, said.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").is_file()
    where = subprocess.run(
        [sys.executable, "-c", "import atoll; atoll.simulate; print(atoll.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr


def test_the_installed_command_leads_to_what_there_is() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    (entry,) = scripts.values()
    module, _, name = entry.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
