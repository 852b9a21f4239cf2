"""Change one expression of a module at a time and see whether a test notices.

    python -m tools.mutants atoll/privacy/clipping.py --count 40 --seed 1

A mutant is the module with one comparison, operator, number or truth value changed, a condition turned round,
or a call left out. Each is tried in a process of its own, in which the mutated source is imported instead of
the file: on the test files that import the module (no test that starts processes), the quick ones first, then
on the watchdogs of tests/privacy/runs/test_sabotage.py, and at the last on the tests of the module's folder.
Those that no test notices are listed: a hole in the tests, or a change that makes no difference, which
`tests/mutants.toml` then explains.

The tests are run in processes that are forked from one that has torch, SciPy and pytest imported and nothing
of Atoll's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import os
import random
import re
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tests.budget import budgets

ROOT = Path(__file__).parents[1]
EXPLAINED = ROOT / "tests" / "mutants.toml"
PATIENCE = 5.0
"""Times what the tests take on the module as it is, and a minute: a mutant that takes longer makes a test
hang, and is noticed."""
REPORTED = 10
"""After so many mutants a line on the terminal says where the run is."""
TESTS_SECONDS = 45.0
"""Of test files' budgets, at most, before the watchdogs."""
WATCHDOGS = ("tests/privacy/runs/test_sabotage.py", "-k", "test_the_code_as_it_is_passes")

IMPORTED = (
    "torch", "numpy", "scipy.stats", "scipy.optimize", "pyarrow", "pydantic", "pytest", "torchvision",
    "transformers", "dp_accounting", "opacus", "torchmetrics", "peft", "hypothesis",
)  # fmt: skip
"""What takes long to import and isn't Atoll's."""

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
EXCHANGED = {"max": "min", "min": "max", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, how the line reads, and the module's code with it."""

    line: int
    what: str
    source: str
    code: CodeType

    @property
    def key(self) -> str:
        """How `tests/mutants.toml` names it: the line's text and the change, not its number."""
        return f"{self.source} | {self.what}"


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    text = path.read_text("utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    found = []
    for number in range(len(list(_places(tree)))):
        changed = copy.deepcopy(tree)
        node, what = list(_places(changed))[number]
        said = what(node)
        if said:
            code = compile(ast.fix_missing_locations(changed), str(path), "exec")
            found.append(Mutant(node.lineno, said, lines[node.lineno - 1].strip(), code))
    return found


def _places(tree: ast.Module) -> Iterator[tuple[Any, Any]]:
    """(node, what changes it in place and says how) of all that can be changed."""
    silent = {id(part) for node in ast.walk(tree) for root in _silent(node) for part in ast.walk(root)}
    for node in ast.walk(tree):
        if id(node) in silent:
            continue
        if isinstance(node, ast.Compare):
            for place in range(len(node.ops)):
                if type(node.ops[place]) in SWAPPED:
                    yield node, lambda n, place=place: _compare(n, place)
        elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
            yield node, _operator
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, _sign
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield node, _constant
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node, _condition
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXCHANGED:
            yield node, _exchange
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, _leave_out


def _silent(node: ast.AST) -> list[ast.AST]:
    """Parts whose change no test should see: texts of errors and logs, annotations, names of types."""
    if isinstance(node, ast.Raise):
        return [node]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        logs = isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"
        return [node] if logs else []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        inner = node.value.func
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "logger"
        ):
            return [node]
    if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
        return [node.annotation]
    if isinstance(node, ast.FunctionDef):
        return [*node.decorator_list, *([node.returns] if node.returns else [])]
    if isinstance(node, ast.ClassDef):
        return list(node.decorator_list)
    if isinstance(node, ast.FormattedValue | ast.JoinedStr):
        return [node]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast":
        return [node.args[0]]
    return []


def _compare(node: ast.Compare, place: int) -> str:
    old = node.ops[place]
    node.ops[place] = SWAPPED[type(old)]()
    return f"{type(old).__name__} -> {type(node.ops[place]).__name__}"


def _operator(node: Any) -> str:
    old = node.op
    node.op = SWAPPED[type(old)]()
    return f"{type(old).__name__} -> {type(node.op).__name__}"


def _sign(node: Any) -> str:
    node.op = ast.UAdd()
    return "minus left out"


def _constant(node: ast.Constant) -> str:
    old = node.value
    assert isinstance(old, bool | int | float)
    node.value = (not old) if isinstance(old, bool) else old + 1
    return f"{old!r} -> {node.value!r}"


def _condition(node: Any) -> str:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return "condition turned round"


def _exchange(node: Any) -> str:
    old = node.func.id
    node.func.id = EXCHANGED[old]
    return f"{old} -> {node.func.id}"


def _leave_out(node: Any) -> str:
    told = ast.unparse(node.value)[:60]
    node.value = ast.Constant(None)
    return f"left out: {told}"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another code than its file's."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, vars(module))


def module_name(path: Path) -> str:
    """`atoll.privacy.clipping` of atoll/privacy/clipping.py."""
    return ".".join(path.with_suffix("").parts)


def tests_of(name: str) -> list[str]:
    """The module's own test file, and others that import it, quick ones first, of so many seconds in all."""
    parent, _, leaf = name.rpartition(".")
    imports = re.compile(
        rf"^\s*(from {name} import|import {name}\b|from {parent} import (\([^)]*|.*)\b{leaf}\b)", re.MULTILINE
    )
    federated = {"federation", "fault_simulation"}  # starts processes, or plays whole federations
    files = [
        file.relative_to(ROOT / "tests").as_posix()
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if not federated & set(file.parts) and imports.search(file.read_text("utf-8"))
    ]
    own = [file for file in files if Path(file).stem == f"test_{leaf}"]
    return [f"tests/{file}" for file in [*own, *_quick(set(files) - {*own}, at_least=not own)]]


def tests_beside(path: Path) -> list[str]:
    """Quick test files of the module's folder, which may reach it through others."""
    folder = path.relative_to("atoll").parent
    files = [(folder / file.name).as_posix() for file in (ROOT / "tests" / folder).glob("test_*.py")]
    return [f"tests/{file}" for file in _quick(files)]


def _quick(files: Iterable[str], *, at_least: bool = False) -> list[str]:
    """The quickest of these files, of `TESTS_SECONDS` in all; with `at_least`, one if there is any."""
    allowed = budgets()
    chosen: list[str] = []
    seconds = 0.0
    for file in sorted(files, key=lambda file: (allowed.get(file, 1.0), file)):
        seconds += allowed.get(file, 1.0)
        is_first = at_least and not chosen
        if f"tests/{file}" != WATCHDOGS[0] and (seconds <= TESTS_SECONDS or is_first):
            chosen.append(file)
    return chosen


def is_noticed(path: Path, mutant: Mutant | None, tests: Sequence[str], seconds: float = 300.0) -> bool:
    """Whether a test fails, in a process of its own, with the mutant for the module; None: with the file.

    So does one that isn't through after `seconds`.
    """
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        with contextlib.suppress(BaseException):
            code = _run(path, mutant, tests)
        os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) not in (0, 5)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run(path: Path, mutant: Mutant | None, tests: Sequence[str]) -> int:
    import pytest

    if mutant is not None:
        sys.meta_path.insert(0, _Finder(module_name(path), path, mutant.code))
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--no-header",
        "-m",
        "not processes and not matrix",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main([*options, *tests]))


def import_first() -> None:
    """Once, in the process from which all others are forked."""
    for name in IMPORTED:
        importlib.import_module(name)


def explained() -> dict[str, dict[str, str]]:
    """Why a mutant makes no difference, by its key, by file."""
    table: dict[str, dict[str, str]] = (
        tomllib.loads(EXPLAINED.read_text("utf-8")) if EXPLAINED.exists() else {}
    )
    return table


def survivors(path: Path, chosen: Sequence[Mutant]) -> Iterator[Mutant]:
    """Those that no test notices."""
    tests = tests_of(module_name(path))
    wider = [file for file in tests_beside(path) if file not in tests]
    began = time.monotonic()
    if tests and is_noticed(path, None, tests):
        sys.exit(f"{path}: its tests fail as it is: {' '.join(tests)}")
    patience = 60.0 + PATIENCE * (time.monotonic() - began)
    for done, mutant in enumerate(chosen):
        if done % REPORTED == 0:
            print(f"{path}: {done} of {len(chosen)}, at line {mutant.line}", file=sys.stderr, flush=True)
        noticed = bool(tests) and is_noticed(path, mutant, tests, patience)
        noticed = noticed or is_noticed(path, mutant, WATCHDOGS)
        if not noticed and not (wider and is_noticed(path, mutant, wider)):
            yield mutant


def _lines(text: str) -> range:
    """`100-180` as a range of both."""
    first, _, last = text.partition("-")
    return range(int(first), int(last) + 1)


def main(arguments: Sequence[str]) -> int:
    """List the survivors of each file; 1 if one isn't explained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=20, help="mutants of a file, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=_lines, default=range(1, 1_000_000), help="only these, as in 100-180")
    given = parser.parse_args(arguments)
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import_first()
    known, left = explained(), 0
    for path in given.files:
        every = [mutant for mutant in mutants_of(path) if mutant.line in given.lines]
        chosen = random.Random(f"{given.seed}/{path}").sample(every, min(given.count, len(every)))
        reasons = known.get(path.as_posix(), {})
        tried = sorted((m for m in chosen if m.key not in reasons), key=lambda mutant: mutant.line)
        new = 0
        for mutant in survivors(path, tried):
            new += 1
            print(f"  {path}:{mutant.line}: {mutant.what}\n      {mutant.source}", flush=True)
        left += new
        print(
            f"{path}: {len(tried)} of {len(every)} mutants, {new} not noticed; "
            f"{len(chosen) - len(tried)} explained",
            flush=True,
        )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
