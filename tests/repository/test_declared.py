"""The check of declared packages: it holds here, and it goes red when somebody forgets one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.declared import findings

ROOT = Path(__file__).parents[2]

PYPROJECT = """
[project]
name = "small"
dependencies = ["numpy>=2", "Pillow", "flwr[simulation]"]

[project.optional-dependencies]
tune = ["optuna"]
dev = ["small[tune]", "pytest", "ruff"]

[tool.hatch.build.targets.wheel]
packages = ["room", "hall"]

[tool.declared.optional]
tune = ["room/search.py"]

[tool.declared.unimported]
"flwr[simulation]" = "starts it"
ruff = "a program"
"""
FILES = {
    "room/first.py": "import numpy.linalg\nfrom hall import second\nimport flwr",
    "room/search.py": "def look():\n    import optuna",
    "hall/second.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from PIL import Image",
    "tests/test_first.py": "import pytest\nimport ray\nfrom tests import other",
}


def findings_in(root: Path, *more: tuple[str, str], pyproject: str = PYPROJECT) -> list[str]:
    """What the check says of the small project with these files in place of its own."""
    (root / "pyproject.toml").write_text(pyproject)
    for name, text in (FILES | dict(more)).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return findings(root)


def test_what_is_imported_here_is_declared_and_what_is_declared_is_imported() -> None:
    assert findings(ROOT) == []


def test_a_project_that_declares_what_it_imports_passes(tmp_path: Path) -> None:
    assert findings_in(tmp_path) == []


def test_what_tools_keep_in_hidden_folders_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tests" / ".environments").mkdir(parents=True)
    (tmp_path / "tests" / ".environments" / "other.py").write_bytes(b"# \xa4\nimport scipy")
    assert findings_in(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("hall/more.py", "import scipy", "imports scipy of scipy, which is not declared"),
        ("hall/more.py", "def f():\n    import scipy", "imports scipy of scipy, which is not declared"),
        ("hall/more.py", "import nrrd", "imports nrrd of pynrrd, which is not declared"),
        ("hall/more.py", "import ray2", "imports ray2, which no installed package has"),
        ("hall/more.py", "import pytest", "imports pytest, which only the extra dev declares"),
        ("hall/more.py", "import optuna", "imports optuna, which only the extra tune declares"),
        ("hall/more.py", "from tests import other", "imports tests, which does not ship"),
        ("tests/more.py", "import scipy", "imports scipy of scipy, which is not declared"),
    ],
)
def test_an_import_that_is_not_declared_for_its_place_is_named(
    tmp_path: Path, path: str, text: str, said: str
) -> None:
    assert findings_in(tmp_path, (path, text)) == [f"{path}: {said}"]


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("hall/second.py", "", "dependencies: nothing that it is for imports pillow"),
        ("room/search.py", "", "tune: nothing that it is for imports optuna"),
        ("tests/test_first.py", "", "dev: nothing that it is for imports pytest"),
    ],
)
def test_a_package_that_nothing_imports_is_named(tmp_path: Path, path: str, text: str, said: str) -> None:
    assert said in findings_in(tmp_path, (path, text))


def test_an_extra_of_a_package_needs_its_reason_too(tmp_path: Path) -> None:
    without = PYPROJECT.replace('"flwr[simulation]" = "starts it"\n', "")
    assert findings_in(tmp_path, pyproject=without) == [
        "dependencies: nothing that it is for imports flwr[simulation]"
    ]


def test_exceptions_that_nothing_needs_are_named(tmp_path: Path) -> None:
    more = PYPROJECT.replace('ruff = "a program"', 'ruff = "a program"\nmypy = "gone"\nnumpy = "because"')
    more = more.replace('tune = ["room/search.py"]', 'tune = ["room/search.py", "hall/second.py"]')
    more = more.replace('"pytest", ', '"pytest", "numpy", ')
    assert sorted(findings_in(tmp_path, pyproject=more)) == [
        "dev: numpy is one of the dependencies already",
        "tool.declared.optional: hall/second.py imports nothing of the extra tune",
        "tool.declared.unimported: mypy is not declared",
        "tool.declared.unimported: numpy is imported",
    ]
