"""Atoll where only its declared packages are installed: everything else is hidden, and it works.

Where an extra is missing, the verb that needs it says in one line what to install.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from atoll.cli.main import run as command_line
from atoll.job.job import Job
from atoll.server.run.directory import job_toml
from atoll.server.run.run_job import validate_job
from atoll.sim.population.population import Population
from atoll.sim.population.write_shards import write_shards
from tests.federation.places import result_of
from tests.repository.hiding import ROOT, Without, closure, hiding_environment, installed, modules_of
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PRIVATE: dict[str, Any] = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2, "seeded_noise": True,
}  # fmt: skip
SGD = {"lr": 0.01, "optimizer": "sgd"}


@cache
def needed() -> frozenset[str]:
    """The distributions that come with Atoll without extras."""
    return closure(PROJECT["dependencies"])


@pytest.fixture(scope="module")
def declared_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which an interpreter finds nothing but the closure of the dependencies."""
    hidden = installed() - needed()
    assert {"pytest", "ruff", "optuna", "onnx", "torchao", "torch-pruning", "tensorboard"} <= hidden
    env = hiding_environment(tmp_path_factory.mktemp("hiding") / "site", hidden)
    look = (
        "from importlib import metadata, util\n"
        "print(util.find_spec('pytest'), util.find_spec('optuna'), util.find_spec('google.auth'),"
        " *(one.name for one in metadata.distributions() if one.name in ('pytest', 'opacus')))\n"
        "import pytest"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], env=os.environ | env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "None None None opacus\n"
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'pytest'\n")
    return env


ALL_VERBS = """
import json, sys
from pathlib import Path
from atoll.job.job import Job
from tests.federation.places import federation_of
from tests.support.processes import atoll, python
print("found", *python("from importlib import util; print(util.find_spec('optuna'))").communicate())
folder, job = Path(sys.argv[1]), json.loads(sys.argv[3])
for number, arguments in enumerate(json.loads(sys.argv[2])):
    log = folder / f"verb-{number}.log"
    print("exit code", atoll(*arguments, log=log).wait(), log.read_text(), flush=True)
with federation_of(folder / "federation", "client-0000") as federation:
    federation.join("client-0000", folder / "shards" / "client-0000").says("is connected")
    submitted = federation.submit(Job.parse(job, origin="test"), folder / "real")
    asked = federation.start("status", "status", "--server", str(federation.server))
    print("exit codes", submitted.ends(), asked.ends(), flush=True)
    for running in federation.running.values():
        print(running.text(), flush=True)
"""
"""Verbs, and a federation of one real site, each a process of its own from one fork server."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.federation
def test_the_demo_private_jobs_and_a_real_federation_need_nothing_that_is_not_declared(
    declared_only: dict[str, str], tmp_path: Path
) -> None:
    jobs = {
        "lora": job_of("text-classification", "lora", privacy=PRIVATE, train=SGD),
        "lstm": job_of(
            "forecasting", "full", privacy=PRIVATE, train=SGD,
            backbone={"name": "atoll:lstm", "weights": "random", "options": {"width": 8, "layers": 1}},
        ),
    }  # fmt: skip
    verbs = [["demo", "--out", str(tmp_path / "demo")]]
    for name, job in jobs.items():
        (tmp_path / f"{name}.toml").write_text(job_toml(ready(job, tmp_path)))
        verbs.append(["simulate", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name)])
    real = digits_at_one_client()
    write_shards(real, tmp_path / "shards")
    demo = Job.load(ROOT / "jobs" / "bbc-news.toml")
    validate_job(demo)
    Population.of(demo)  # its data and its backbone are fetched with pip, which is nobody's dependency
    done = subprocess.run(
        [sys.executable, "-c", ALL_VERBS, str(tmp_path), json.dumps(verbs), real.canonical],
        env=os.environ | declared_only, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert (done.stdout.count("exit code 0 "), done.stdout.count("exit codes 0 0\n")) == (len(verbs), 1), said
    assert "sitecustomize" not in said and said.startswith("found None\n")
    assert result_of(tmp_path / "demo")["final"]["server"]["accuracy"] > 0.9
    for name in jobs:
        privacy = result_of(tmp_path / name)["privacy"]
        assert (privacy["unit"], privacy["releases"] > 0, privacy["epsilon"] > 0) == ("example", True, True)
    assert "clients   client-0000" in said and "health   serving" in said
    assert len(result_of(tmp_path / "real")["rounds"]) == 1


def digits_at_one_client() -> Job:
    return Job.parse(
        {
            "name": "alone",
            "seed": 1,
            "task": {"name": "image-classification"},
            "data": {"source": "digits"},
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "train": {"lr": 1.0, "batch_size": 32},
            "federation": {"clients": 1, "rounds": 1},
        },
        origin="test",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its run."""
    folder = tmp_path_factory.mktemp("finished")
    job = ready(job_of("image-classification", "head"), folder)
    (folder / "job.toml").write_text(job_toml(job))
    assert command_line(["simulate", str(folder / "job.toml"), "--out", str(folder / "run")]) == 0
    return folder


VERBS: list[tuple[str, str]] = [
    ("export", "export run --format onnx"),
    ("export", "export run --format onnx-int8"),
    ("torchao", "export run --format torchao-int8"),
    ("prune", "export run --format safetensors --prune 0.5 --prune-kind structured"),
    ("prune", "simulate job.toml --set backbone.prune=0.5 --set backbone.prune_kind=structured"),
    ("track", "simulate job.toml --track tensorboard"),
    ("track", "simulate job.toml --track mlflow"),
    ("track", "simulate job.toml --track wandb"),
    ("track", "track run --to tensorboard"),
    ("track", "track run --to mlflow"),
    ("tune", "tune job.toml"),
]


def test_every_extra_has_a_verb_that_needs_it() -> None:
    assert {extra for extra, _ in VERBS} == set(EXTRAS) - {"dev"}


@pytest.mark.parametrize(("extra", "verb"), VERBS)
def test_without_an_extra_the_verb_says_in_one_line_what_to_install(
    extra: str,
    verb: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hide_for_a_test(monkeypatch, closure(EXTRAS[extra]) - needed())
    words = [str(finished / word) if word in ("run", "job.toml") else word for word in verb.split()]
    out = ["--out", str(tmp_path / "out")] if words[0] != "track" else []
    assert command_line([*words, *out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith(f"pip install 'atoll[{extra}]'\n")
    assert said.count("\n") == 1 and "internal error" not in said
    assert not (tmp_path / "out").exists()


def hide_for_a_test(monkeypatch: pytest.MonkeyPatch, packages: frozenset[str]) -> None:
    """Until its end this interpreter doesn't find the packages, though it may have imported them before."""
    hidden = modules_of(packages)
    finders = [Without(packages, hidden) if one is PathFinder else one for one in sys.meta_path]
    assert finders != sys.meta_path
    monkeypatch.setattr(sys, "meta_path", finders)
    for name in list(sys.modules):
        parts = name.split(".")
        if any(".".join(parts[: i + 1]) in hidden for i in range(len(parts))):
            monkeypatch.delitem(sys.modules, name)
