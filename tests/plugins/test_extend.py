"""What `docs/extend.md` promises: its examples, run from an empty folder, and what it says of mistakes."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from atoll import plugins
from atoll.client.deploy.executor import CodeDiffers, Executor
from atoll.errors import ConfigError
from atoll.job.job import Job, StrategySection
from atoll.kit.extensions import refusal
from atoll.plugins import Extension, Registry, plugin_files, registry
from atoll.server.deploy.flower_control import bundle
from atoll.strategies import STRATEGIES, build_strategy
from tests.support.processes import atoll, python

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text("utf-8")
FILES = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
RUNS = re.findall(r"^```sh run\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds the page's files and nothing else."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def without_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No extension is registered, and those that the test brings are gone after it."""
    monkeypatch.setattr(registry, "_brought", {kind: {} for kind in plugins.GROUPS})
    monkeypatch.setattr(registry, "_searched", set())
    monkeypatch.setattr(plugin_files, "_files", {})


def say(folder: Path, line: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """A command line of the page, run in the folder: (exit code, output, errors)."""
    program, *arguments = shlex.split(line)
    if program == "python":
        source = (folder / arguments[0]).read_text("utf-8")
        done = python(source, cwd=folder, env=env)
    else:
        done = atoll(*arguments, cwd=folder, env=env)
    output, errors = done.communicate()
    return done.wait(), output, errors


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text("utf-8"))
    return found


def test_the_examples_are_as_short_as_the_page_claims() -> None:
    assert len(FILES["median.py"].splitlines()) <= 40
    assert len(FILES["houses.py"].splitlines()) <= 80


@pytest.mark.processes
@pytest.mark.parametrize("block", RUNS, ids=lambda block: shlex.split(block.splitlines()[-1])[-1])
def test_an_example_of_the_page_runs_from_an_empty_folder(folder: Path, block: str) -> None:
    for line in block.splitlines():
        code, output, errors = say(folder, line)
        assert code == 0, errors
    if "houses" in block:
        worth = int(re.search(r"(\d+) thousand", output)[1])  # type: ignore[index]
        assert 180 < worth < 300  # 80 square metres in the north: 240
        result = result_of(folder / "runs" / "houses")
        digest = hashlib.sha256(FILES["houses.py"].encode()).hexdigest()
        assert result["plugins"] == [{"file": str(folder / "houses.py"), "sha256": digest}]
    if "top.py" in block:
        server = result_of(folder / "runs" / "top")["final"]["server"]
        assert server["accuracy"] < server["top"] <= 1
    if "shrinking" in block:
        sizes = [len(list((folder / "shards" / f"client-{i:04d}").rglob("*.png"))) for i in range(10)]
        assert sizes == sorted(sizes, reverse=True) and sizes[9] < sizes[0] / 5
    if "notebook" in block:
        assert output.splitlines()[-1].startswith("Careful 0.")


@pytest.mark.processes
def test_the_engine_changes_no_bit_of_a_plugins_run(folder: Path) -> None:
    hashes = set()
    assert say(folder, "python make_houses.py")[0] == 0
    for engine in ("loop", "inline --workers 2"):
        line = f"atoll simulate houses.toml --plugin houses.py --force --out run --engine {engine}"
        code, _, errors = say(folder, f"{line} --set federation.rounds=2")
        assert code == 0, errors
        hashes.add(result_of(folder / "run")["model_sha256"])
    assert len(hashes) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("files", "line", "message"),
    [
        ({}, "--plugin nope.py", r"--plugin nope\.py: cannot be read \(No such file"),
        ({"bad.py": "x ="}, "--plugin bad.py", r"--plugin bad\.py, line 1: SyntaxError: invalid syntax"),
        ({"bad.py": "\n1/0"}, "--plugin bad.py", r"bad\.py, line 2: ZeroDivisionError: division by zero"),
        ({"again.py": FILES["median.py"]}, "--plugin median.py --plugin again.py",
         r"strategy 'median' is registered twice: by \S+/median\.py .* and by \S+/again\.py"),
        ({"own.py": FILES["median.py"].replace('"median"', '"fedavg"')}, "--plugin own.py",
         r"strategy 'fedavg' is registered twice: by atoll and by \S+/own\.py"),
        ({}, "--plugin median.py --set strategy.name=medain", "'medain', did you mean 'median'"),
        ({}, "--plugin median.py --set strategy.name=median --set strategy.options.step=-1",
         r"strategy\.options\.step: expected greater than 0, found -1"),
        ({}, "--plugin median.py --set strategy.name=median --set strategy.options.stepp=1",
         r"strategy\.options\.stepp: unknown key, did you mean 'step'"),
        ({}, "--plugin median.py --set strategy.name=median --set strategy.lr=1",
         r"strategy\.lr: median does not use it"),
        ({}, "--plugin shrinking.py --set data.partition.kind=shrinkin", "did you mean 'shrinking'"),
        ({}, "--plugin shrinking.py --set 'data.partition={kind=\"shrinking\", options={factor=2}}'",
         r"data\.partition\.options\.factor: expected less than or equal to 1, found 2"),
        ({"few.py": FILES["shrinking.py"].replace("np.split(rows, ends[:-1])", "[rows]")},
         "--plugin few.py --set data.partition.kind=shrinking", "returned 1 lists of rows, expected one"),
        ({"shared.py": FILES["shrinking.py"].replace("np.split(rows, ends[:-1])", "[rows[:9]] * clients")},
         "--plugin shared.py --set data.partition.kind=shrinking --set privacy.unit=example"
         " --set privacy.noise_multiplier=1.0 --set privacy.delta=1e-5 --set privacy.sampling_rate=0.2",
         r"data\.partition: shrinking \(.*shared\.py.*\) lets clients share examples"),
        ({}, "--plugin top.py --set evaluate.metrics.top.k=0",
         r"evaluate\.metrics\.top\.k: expected greater than or equal to 1, found 0"),
        ({"falls.py": FILES["top.py"].replace("(Metric):\n", "(Metric):\n    higher_is_better = False\n")},
         "--plugin falls.py --set evaluate.metrics.top.k=1",
         r"metric top: it has higher_is_better = False, which its name must say; expected one that has loss"),
        ({}, "--set evaluate.metrics.top.k=1", r"evaluate\.metrics\.top: unknown metric"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder: Path, files: Mapping[str, str], line: str, message: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    code, _, errors = say(folder, f"atoll simulate digits.toml {line}")
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert re.search(message, errors), errors


@pytest.mark.processes
def test_a_real_federation_takes_no_plugin_file(folder: Path) -> None:
    code, _, errors = say(folder, "atoll submit digits.toml --server kit --plugin median.py")
    assert code == 2 and "install it there as a package" in errors


def installed(folder: Path, version: str = "1.2") -> Path:
    """The page's package as pip leaves it: its module, and its metadata beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "median.py").write_text(FILES["median.py"])
    about = folder / f"fedmine-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: fedmine\nVersion: {version}\nSummary: A median\n"
    )
    (about / "entry_points.txt").write_text("[atoll.strategies]\nmedian = median:Median\n")
    (about / "RECORD").write_text("median.py,,\n")
    return folder


@pytest.mark.processes
def test_an_installed_package_needs_no_plugin_option(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "median.py").unlink()
    site = installed(tmp_path_factory.mktemp("site-packages"))
    start = f"import sys; sys.path.insert(0, {str(site)!r}); from atoll.cli.main import run; "
    done = python(
        start + "sys.exit(run(['simulate', 'digits.toml', '--set', 'strategy.name=median']))", cwd=folder
    )
    _, errors = done.communicate()
    assert done.wait() == 0, errors
    assert result_of(folder / "runs" / "digits")["strategy"] == "median"
    done = python(
        start + "run(['list', 'strategies']); print('median' in sys.modules)",
        cwd=folder,
    )
    output, _ = done.communicate()
    assert re.search(r"^median +fedmine 1\.2 +A median; keys: options$", output, re.MULTILINE)
    assert output.splitlines()[-1] == "False"  # a list doesn't import the package


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What extensions this test brings is gone after it."""
    without_extensions(monkeypatch)
    yield
    sys.modules.pop("median", None)


def median_job() -> Job:
    table = {
        "name": "x", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels"}, "strategy": {"name": "median", "options": {"step": 0.5}},
    }  # fmt: skip
    return Job.parse(table, origin="test")


def executor(name: str = "north") -> Executor:
    from atoll.kit.code_hashes import installed_hashes

    return Executor("", b"", lambda message, context: message, installed_hashes(), {"name": name})


@pytest.mark.processes
def test_a_site_refuses_a_run_whose_extension_it_has_not_or_has_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    site = installed(tmp_path / "server")
    monkeypatch.syspath_prepend(str(site))
    fab = bundle(median_job())
    executor()._check(fab)  # the same package: it is taken
    (site / "median.py").write_text(FILES["median.py"] + "# changed\n")
    with pytest.raises(
        CodeDiffers, match=r"^site north: extension fedmine 1\.2 has other files here: median\.py$"
    ):
        executor()._check(fab)
    (site / "fedmine-1.2.dist-info").rename(tmp_path / "gone")
    with pytest.raises(CodeDiffers, match=r"^site north: extension fedmine 1\.2 is not installed here$"):
        executor()._check(fab)
    installed(site, version="1.3")
    with pytest.raises(CodeDiffers, match=r"extension fedmine 1\.2 is not installed here, but 1\.3$"):
        executor()._check(fab)


def test_a_bundle_without_extensions_names_none() -> None:
    assert refusal({"server/app.py": "00"}) is None


@pytest.mark.processes
def test_a_bundle_cannot_hold_what_a_plugin_file_brings(tmp_path: Path, clean: None) -> None:
    (tmp_path / "median.py").write_text(FILES["median.py"])
    plugins.load_file(tmp_path / "median.py")
    with pytest.raises(ConfigError, match="expected an installed package with an entry point"):
        bundle(median_job())


def test_a_cell_may_be_run_again_and_the_last_one_counts(clean: None) -> None:
    for step in (1, 2):
        made = type("Mine", (), {"begin": id, "plan": id, "merge": id, "step": step})
        plugins.strategy("mine")(made)
    assert (
        build_strategy(median_job().strategy.model_copy(update={"name": "mine", "options": None})).step == 2
    )  # type: ignore[attr-defined]


def test_a_strategy_that_lacks_a_method_is_named(clean: None) -> None:
    plugins.strategy("mine")(type("Mine", (), {"begin": id}))
    with pytest.raises(ConfigError, match=r"mine .* has no method plan"):
        build_strategy(StrategySection(name="mine"))


def test_a_name_of_atolls_own_is_refused_whichever_comes_first(clean: None) -> None:
    with pytest.raises(ConfigError, match="'fedavg' is registered twice: by atoll and by"):
        plugins.strategy("fedavg")(type("Mine", (), {}))
    assert STRATEGIES.origin("fedavg") == "atoll"
    plugins.metric("later")(type("Mine", (), {}))

    def as_it_is(extension: Extension) -> Extension:
        return extension

    before = dict(registry._registries)
    try:
        with pytest.raises(ConfigError, match="'later' is registered twice"):
            Registry("metric", {"later": Extension("metric", "later", "", "atoll", "")}, as_it_is)
    finally:
        registry._registries.update(before)
