"""The house rules: floors, where Flower may be touched, sizes, words that don't belong."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("atoll", "client", "privacy", "protocol", "server", "sim", "strategies", "tasks")
FLOWER = {
    "server/app.py", "client/app.py", "sim/grid.py", "sim/ray.py", "strategies/flower.py",
    "server/serve.py", "client/join.py",
    # what serve, submit and join are made of: Flower's Control API and a site's executor
    "server/control.py", "server/executor.py", "client/executor.py",
    "protocol/flower_content.py",
}  # fmt: skip
MODULES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


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
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, (
                f"{node.name} has {node.end_lineno - node.lineno} lines"
            )


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


def test_the_bundle_ships_code_alone() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    assert all(pattern.endswith("/**/*.py") for pattern in include)
    assert not any(pattern.startswith(("sim/", "atoll/", "tests/")) for pattern in include)


def test_documents_name_files_that_are_there() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
