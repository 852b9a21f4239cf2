"""The notebook in docs/ runs from top to bottom."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"


@pytest.mark.slow
@pytest.mark.processes
def test_the_tour_runs_and_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").symlink_to(TOUR.parent.parent / "jobs")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads(TOUR.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shown.append(executed("".join(cell["source"]), names))
    metrics, promised, rows = shown[1], shown[3], shown[4]
    assert metrics["federated"] > 0.7 and promised["epsilon"] <= 4.0
    assert len(rows) == 6 and {row[0] for row in rows} == {"0.5", "8", "inf"}
    assert "model.onnx" in shown[6] and shown[7].shape == (1, 10)


def executed(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last line, if that is an expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(TOUR), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(TOUR), "eval"), names) if last else None  # noqa: S307
