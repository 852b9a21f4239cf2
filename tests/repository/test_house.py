"""The house rules: floors, where Flower may be touched, sizes, words that don't belong."""

import ast
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.kit.code_hashes import HASHES
from atoll.server.deploy.flower_control import bundle

ROOT = Path(__file__).parents[2]
ROOMS = ("atoll", "client", "server", "sim", "strategies")
"""The package, and the rooms that lie beside it and are linked into it."""
FLOWER = {
    "server/app.py", "client/app.py", "sim/engines/ray.py", "strategies/flower.py",
    "atoll/protocol/flower_content.py",
    "server/deploy/serve.py", "server/deploy/flower_control.py", "server/deploy/executor.py",
    "server/deploy/superlink.py", "server/deploy/object_files.py",
    "client/deploy/join.py", "client/deploy/executor.py",
}  # fmt: skip
MOST_FILES = 16
MODULES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHER_TESTS = {"federation", "fault_simulation", "repository", "support"}
"""Folders of tests that are no room's: real sites, simulated ones, the repository, what others build on."""
TEMPLATES = sorted(p for room in ROOMS for kind in ("j2", "css") for p in (ROOT / room).rglob(f"*.{kind}"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.processes
def test_the_floors_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_flower_is_touched_only_where_the_plan_says() -> None:
    touching = {name_of(p) for p in MODULES if any(i.split(".")[0] == "flwr" for i in imports(p))}
    assert touching <= FLOWER, touching - FLOWER


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_stays_readable(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, (
                f"{node.name} has {node.end_lineno - node.lineno} lines"
            )


@pytest.mark.parametrize("path", TEMPLATES, ids=name_of)
def test_a_template_stays_readable(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 500


def test_html_is_written_in_templates_alone() -> None:
    """Where it is put together of strings, nothing escapes what goes in."""
    closing = re.compile(r"</(html|body|section|div|p|h\d|ul|li|dl|dd|table|tr|td|span|figure|pre|code)>")
    assert [name_of(path) for path in MODULES if closing.search(path.read_text("utf-8"))] == []


def test_no_module_is_a_drawer() -> None:
    names = {p.stem for p in MODULES}
    assert not names & {"utils", "helpers", "common", "misc"}
    assert not [n for n in names if n.startswith("base_")]


def test_nothing_unpickles_or_seeds_globally() -> None:
    for path in MODULES:
        text = path.read_text("utf-8")
        assert not re.search(
            r"pickle\.loads?\(|torch\.manual_seed\(|np\.random\.seed\(|(?<!\.)\brandom\.seed\(", text
        ), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_no_broad_except_without_its_reason() -> None:
    for path in MODULES:
        for line in path.read_text("utf-8").splitlines():
            if re.search(r"except (Exception|BaseException)\b|except:", line):
                assert "noqa: BLE001 - " in line, f"{name_of(path)}: {line.strip()}"


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    shown = [*MODULES, *TEMPLATES, *TESTS]
    folders = {path.parent for path in shown}
    crowded = {
        name_of(folder): count
        for folder in folders
        if (count := len([p for p in shown if p.parent == folder and p.name != "__init__.py"])) > MOST_FILES
    }
    assert crowded == {}


def test_tests_lie_where_what_they_test_does() -> None:
    """Of a room's files a room in `tests/` has the tests, and of the package's own, `tests/` itself."""
    rooms = {path.name for path in (ROOT / "atoll").iterdir() if path.is_dir()}
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in TESTS if path.parent != ROOT / "tests"}
    assert folders - rooms == OTHER_TESTS


def test_the_rooms_that_lie_outside_are_linked_into_the_package() -> None:
    for room in ROOMS[1:]:
        link = ROOT / "atoll" / room
        assert link.is_symlink() and str(link.readlink()) == f"../{room}"


def test_the_bundle_holds_no_code_but_what_imports_the_installed_apps() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        code = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
        hashes = json.loads(archive.read(HASHES))
    assert set(code) == {"server_app.py", "client_app.py"}
    assert all(text.count("\n") == 3 and "import app" in text for text in code.values())
    assert {"server/app.py", "client/app.py", "tasks/task.py", "errors.py"} <= set(hashes)
    assert not any(name.startswith(("cli/", "sim/")) for name in hashes)


def test_documents_name_files_that_are_there() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
