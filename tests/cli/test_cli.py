"""The command line as a newcomer meets it: one line for every mistake, and nothing left behind."""

# ruff: noqa: E501  (a mistake a line, so that the answers can be compared)

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from atoll import __version__
from atoll.cli import versions
from atoll.cli.listing import CATALOGUE
from atoll.cli.main import app
from atoll.cli.main import run as command_line
from atoll.cli.usage import verbs_of
from atoll.cli.versions import cpu_capability
from atoll.client.local_data import FolderShards
from atoll.data.classification import example_keys
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.server.run.directory import RunDirectory
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.data.test_bad_data import CASES, Case, as_nobody, encoded, noise, png, snapshot
from tests.support.processes import WATCHDOG_SECONDS, atoll, python, wait_until
from tests.support.small import few_pictures

VERBS = (
    "demo", "simulate", "sweep", "partition", "provision", "serve", "join", "submit", "status", "logs", "stop",
    "report", "predict", "export", "check", "list", "audit", "track", "distil",
    "tune", "advise", "check-policy", "verify-log", "enroll", "accept", "forget", "init", "chat",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
DIGITS: dict[str, Any] = {
    "name": "digits",
    "seed": 11,
    "task": {"name": "image-classification"},
    "data": {"source": "digits"},
    "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32},
    "federation": {"clients": 2, "rounds": 1},
}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs one command line here; (exit code, what it printed, what it said on stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command_line([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def refused(answer: tuple[int, str, str], pattern: str = "") -> str:
    """The one line of a refusal."""
    code, _, line = answer
    assert code == 2, answer
    assert line.startswith("error: ") and line.count("\n") == 1 and "Traceback" not in line, line
    assert re.search(pattern, line, re.IGNORECASE), line
    assert len(line) < 900
    return line


def toml(path: Path, table: dict[str, Any], **tables: Any) -> Path:
    """A job file."""
    path.write_text(tomli_w.dumps(table | {k: table.get(k, {}) | v for k, v in tables.items()}))
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("backbone") / "bert")


def text_table(bert: Path, source: Path | str) -> dict[str, Any]:
    return {
        "name": "texts",
        "seed": 3,
        "task": {"name": "text-classification"},
        "data": {"source": str(source)},
        "backbone": {"name": str(bert), "max_tokens": 16},
        "federation": {"clients": 2, "rounds": 1},
    }


def some_texts(folder: Path, classes: tuple[str, ...] = ("bad", "good"), count: int = 6) -> Path:
    """A folder per class."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for i in range(count):
            (folder / label / f"{i}.txt").write_text(f"{label} {chr(97 + i)}")
    return folder


def some_images(folder: Path) -> Path:
    for number, label in enumerate("ab"):
        (folder / label).mkdir(parents=True)
        for i in range(5):
            (folder / label / f"{i}.png").write_bytes(png(4 + i, 5 + number))
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("text run")
    job = toml(folder / "job.toml", text_table(bert, some_texts(folder / "data")))
    assert command_line(["simulate", str(job), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image run")
    job = toml(folder / "job.toml", DIGITS)
    assert command_line(["simulate", str(job), "--out", str(folder / "run")]) == 0
    return folder / "run"


# Verbs, options, help (row 79)


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("simulte x.toml", "no such verb 'simulte', did you mean 'simulate'"),
        ("frobnicate", "no such verb 'frobnicate', expected one of demo, simulate"),
        ("jobs/bbc-news.toml", "did you mean atoll simulate jobs/bbc-news.toml"),
        ("simulate x.toml --worker 3", "no such option '--worker', did you mean '--workers'"),
        ("--helpp", "no such option '--helpp', did you mean '--help'"),
        ("simulate x.toml --zzz", "no such option '--zzz', expected one of"),
        ("simulate", r"argument JOB is missing. Example: atoll simulate .*see atoll simulate --help"),
        ("check x", "option --task is missing. Example: atoll check"),
        ("simulate x.toml y.toml", "unexpected extra argument"),
        ("simulate x.toml --workers 0", "'--workers': 0 is not in the range 1"),
        ("simulate x.toml --workers two", "'--workers': 'two' is not a valid int"),
        ("simulate x.toml --engine x", "--engine: expected one of inline, loop, cohort, ray, found 'x'"),
        ("simulate x.toml --set", r"'--set' requires an argument.*see atoll simulate --help"),
        ("list x", "list x: expected one of tasks, backbones, strategies, partitions, sources, metrics"),
        ("list task", "list task: did you mean 'tasks'"),
        ("logs abc --server x", "'abc' is not a valid int"),
    ],
)
def test_a_command_line_that_is_not_understood_gets_one_line(say: Say, line: str, pattern: str) -> None:
    refused(say(*line.split()), pattern)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(say: Say, verb: str) -> None:
    code, printed, _ = say(verb, "--help")
    assert code == 0
    assert f"Example: atoll {verb}" in " ".join(printed.split())
    assert say(verb, "-h") == (code, printed, "")
    for param in verbs_of(app).commands[verb].params:
        assert getattr(param, "help", None), param


def test_the_verbs_are_all_tested_here() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)  # type: ignore[union-attr]


def test_atoll_alone_prints_its_help(say: Say) -> None:
    code, printed, said = say()
    assert code == 2 and said == ""
    assert all(verb in printed for verb in VERBS) and "Usage: atoll" in printed
    assert say("--help")[0] == 0


def test_the_version_comes_with_what_the_bits_depend_on(say: Say) -> None:
    code, printed, said = say("--version")
    assert (code, said) == (0, "")
    assert printed.splitlines() == [
        f"atoll {__version__}",
        f"torch {torch.__version__.partition('+')[0]}",
        f"Flower {version('flwr')}",
        f"Opacus {version('opacus')}",
        f"processor {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    ]


@pytest.mark.parametrize("asked", ["avx2", "default", "AVX512", ""])
@pytest.mark.processes
def test_the_processor_is_asked_as_torch_asks_it(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
    told, _ = python("import torch; print(torch.backends.cpu.get_cpu_capability())").communicate()
    assert cpu_capability() == told.strip()


@pytest.mark.parametrize(
    ("flags", "capability"),
    [
        ("fpu fma avx2 avx512vl avx512bw avx512dq", "AVX512"),
        ("fpu fma avx2 avx512vl avx512bw", "AVX2"),
        ("fpu fma avx2", "AVX2"),
        ("fpu avx2", "DEFAULT"),
    ],
)
def test_older_processors_have_less(
    flags: str, capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512dq\n")
    monkeypatch.setattr(versions, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert cpu_capability() == capability


@pytest.mark.parametrize(
    ("words", "offered"), [("atoll simu", {"simulate"}), ("atoll simulate --work", {"--workers"})]
)
def test_a_shell_completes_verbs_and_options(
    words: str, offered: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_ATOLL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        command_line([])
    assert set(capsys.readouterr().out.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed_for_the_shell(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        command_line(["--show-completion"])
    script = capsys.readouterr().out.strip()
    assert f"_ATOLL_COMPLETE=complete_{shell}" in script
    with pytest.raises(SystemExit):
        command_line(["--install-completion"])
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(script in text for text in written)


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("tasks", {"text-classification", "image-classification"}),
        ("backbones", {"hf:all-MiniLM-L6-v2", "torchvision:mobilenet_v2", "torchvision:resnet50"}),
        ("strategies", {"fedavg", "fedadam"}),
        ("partitions", {"iid", "dirichlet", "pathological", "natural", "resampled"}),
        ("sources", {"bbc-news", "digits", "fashion-mnist"}),
    ],
)
def test_lists_have_a_line_for_each(say: Say, what: str, some: set[str]) -> None:
    code, printed, said = say("list", what)
    lines = printed.splitlines()
    assert (code, said) == (0, "")
    assert {line.split()[0] for line in lines} >= some
    assert all(len(line.split()) > 1 and not line.startswith(" ") for line in lines)


# A job that is refused leaves nothing, and everything as it was (rows 1-50, 85)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_run_on_bad_data_ends_in_one_line_and_leaves_nothing(
    case: Case, say: Say, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = case.make(tmp_path / "data")
    table = DIGITS | {"data": {"source": str(source)}} if case.images else text_table(bert, source)
    job = toml(tmp_path / "job.toml", table)
    before = snapshot(tmp_path)
    answer = say("simulate", job, "--out", tmp_path / "new" / "run")
    if answer[0] == 0:
        assert not case.error
        assert case.note == "" or re.search(case.note, answer[1])
        after = {k: v for k, v in snapshot(tmp_path).items() if not k.startswith(str(tmp_path / "new"))}
    else:
        refused(answer, case.error)
        after = snapshot(tmp_path)
    assert after == before


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("task.name=image-clasification", "task.name: unknown task .*did you mean 'image-classification'"),
        ("task.name=text-classification", "data.source: digits is for image-classification"),
        ("data.source=digitz", "data.source 'digitz': did you mean 'digits'"),
        ("federation.clients=5000", "5000 clients cannot share 1438 training examples"),
        ("federation.cohort=3", "cohort must be at most clients = 2, found 3"),
        ('data.partition={kind="natural", by="hospital"}', "no column 'hospital', found"),
        ('data.classes=["0","1"]', r"label '2' is not in data.classes"),
        ("strategy.name=fedavgg", "did you mean 'fedavg'"),
        ("strategy.tau=1", "strategy.tau: fedavg does not use it"),
        ("train.device=cuda", "train.device: 'cuda' cannot be used on this machine"),
        ("train.device=toaster", "train.device: 'toaster' cannot be used"),
        ("backbone.name=torchvision:resnet5O", "did you mean 'resnet50'"),
        ("backbone.weights=/nowhere.pth", "backbone.weights: no such file /nowhere.pth"),
        ("train.lrr=1", "train.lrr: unknown key, did you mean 'lr'"),
        ("train.grad_clip=1", "train.grad_clip: unknown key, did you mean 'clip_norm'"),
        ('data.source="a/\\u0000"', "data.source: NUL cannot be part of a path"),
        ("data.source=~nobody-here/x", "~nobody-here/x: no such file or folder"),
        ("data.source=", "data.source '': expected one of"),
        ("lr=0.1", "lr: unknown key, did you mean 'train.lr' or 'strategy.lr'"),
        ("rounds=3", "rounds: unknown key, did you mean 'federation.rounds'"),
        ("train.lr", "--set train.lr: expected key=value, such as train.lr=0.05"),
        (
            "data.partition={kind=natural,by=label}",
            "not valid TOML: .*put it in single quotes, for the shell",
        ),
        ("=3", "--set =3: expected key=value"),
        ("train..lr=3", "expected key=value"),
        ("train.lr=0,1", "train.lr: expected number, found '0,1'"),
    ],
)
def test_a_job_that_cannot_run_leaves_nothing(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, pattern: str
) -> None:
    import torch

    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    job = toml(tmp_path / "job.toml", DIGITS)
    for where in ([], ["--out", "some/new/folder"]):
        refused(say("simulate", job, "--set", override, *where), pattern)
    assert [p.name for p in tmp_path.iterdir()] == ["job.toml"]


def test_a_refused_job_leaves_an_old_run_whole_even_with_force(
    say: Say, tmp_path: Path, image_run: Path
) -> None:
    before = snapshot(image_run)
    job = toml(tmp_path / "job.toml", DIGITS, data={"classes": ["0", "1"]})
    refused(say("simulate", job, "--out", image_run, "--force"), "is not in data.classes")
    refused(say("simulate", job, "--out", image_run, "--resume"), "changed job: data.classes")
    refused(say("simulate", job, "--out", image_run), "exists and is not empty; use --resume")  # row 80
    assert snapshot(image_run) == before


def test_a_second_demo_into_the_same_folder_is_refused(say: Say, image_run: Path) -> None:
    refused(say("demo", "--out", image_run), "exists and is not empty, choose another --out")


def test_force_replaces_nothing_but_a_run(say: Say, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path / "mine")
    job = toml(tmp_path / "job.toml", DIGITS)
    refused(
        say("simulate", job, "--out", tmp_path / "mine", "--force"), "no run directory .*replaces nothing"
    )
    assert snapshot(tmp_path / "mine") == before


def test_an_empty_folder_that_was_there_stays_and_what_a_kill_left_is_no_hindrance(
    say: Say, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    job = toml(tmp_path / "job.toml", DIGITS)
    refused(say("simulate", job, "--out", tmp_path / "run", "--set", 'data.classes=["0"]'))
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "run" / ".lock").write_text("1\n")
    (tmp_path / "run" / ".job.toml.partial").write_text("format = ")
    assert say("simulate", job, "--out", tmp_path / "run")[0] == 0
    assert not (tmp_path / "run" / ".job.toml.partial").exists()


def test_an_output_that_cannot_be_written_is_named(say: Say, tmp_path: Path) -> None:  # row 81
    job = toml(tmp_path / "job.toml", DIGITS)
    (tmp_path / "file").write_text("mine")
    refused(say("simulate", job, "--out", tmp_path / "file"), "file: exists and is not empty")
    refused(say("simulate", job, "--out", tmp_path / "file" / "run"), "file/run: cannot be ")
    refused(say("simulate", job, "--out", "/proc/no/run"), "/proc/no/run: cannot be written")
    refused(say("partition", job, "--out", "/proc/no/shards"), "/proc/no/shards: cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_without_permission_is_named() -> None:  # row 81
    job = Job.parse(DIGITS, origin="test")
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder)
        locked.chmod(0o555)
        with as_nobody(), pytest.raises(ConfigError) as caught:
            RunDirectory.open(locked / "a" / "run", job, resume=False, force=False)
        assert str(caught.value) == f"{locked}/a/run: cannot be written (Permission denied)"
        locked.chmod(0o000)
        for options in ({"resume": True, "force": False}, {"resume": False, "force": False}):
            with (
                as_nobody(),
                pytest.raises(ConfigError, match=r"run: cannot be (read|written) \(Permission denied"),
            ):
                RunDirectory.open(locked / "run", job, **options)
        locked.chmod(0o755)
        assert list(locked.iterdir()) == []


def test_unicode_spaces_and_leading_dashes_are_just_names(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Path
) -> None:  # row 82
    monkeypatch.chdir(tmp_path)
    some_texts(tmp_path / "-my données 資料")
    toml(tmp_path / "-jöb 1.toml", text_table(bert, "./-my données 資料"))
    code, printed, said = say("simulate", "--out", "-rün [bold]x 資", "--", "-jöb 1.toml")
    assert (code, said) == (0, "")
    assert "run directory  -rün [bold]x 資\n" in printed
    assert (tmp_path / "-rün [bold]x 資" / "report.html").is_file()
    refused(say("simulate", "-jöb 1.toml"), "did you mean the path ./-jöb 1.toml")
    code, _, said = say("check", "--task", "text-classification", "--", "-my données 資料")
    assert (code, said) == (0, "")


# Ten likely mistakes of a newcomer


def class_less(folder: Path) -> Path:
    folder.mkdir()
    (folder / "1.png").write_bytes(png(3, 3))
    return folder


def other_columns(path: Path) -> Path:
    path.write_text("message,verdict\n" + "".join(f"text {i},v{i % 2}\n" for i in range(9)))
    return path


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ("simulate", "argument JOB is missing. Example: atoll simulate jobs/"),
        ("simulate nojob.toml", "nojob.toml: no such file"),
        ("simulate images.toml --set task.name=image-classificaton", "did you mean 'image-classification'"),
        ("simulate ../images.toml --set data.source=./below/texts", r"paths in a job start at its own folder, did you mean .*/texts"),
        ("simulate images.toml --set data.source=images", "or a path such as ./images"),
        ("simulate images.toml --set backbone.weights=pretrained --set backbone.offline=true", "no weights found; looked in .*squeezenet1_1-.*to provide them put"),
        ("simulate images.toml --set data.source=./flat", "holds 1 files and no class folder, expected a folder per class"),
        ("simulate images.toml --set federation.clients=50", "50 clients cannot share 8 training examples, set fewer"),
        ("simulate texts.toml --set data.source=./other.csv", "expected one for the label .*its name can be given as data.label"),
        ("simulate texts.toml --set federation.cohort=9", "cohort must be at most clients = 2, found 9"),
        ("simulate texts.toml --out done", "done: exists and is not empty; use --resume to go on, --force"),
        ("simulate texts.toml --out done --resume --set federation.rounds=9", "changed job: federation.rounds; start it anew with another --out"),
        ("simulate images.toml --set data.source=./texts", "0.txt: text, expected an image"),
        ("simulate texts.toml --set data.source=./images", "a PNG image, expected UTF-8 text"),
        ("simulate images.toml --set backbone.name={bert}", "bert is not a vision model, found bert"),
        ("simulate texts.toml --set backbone.name=torchvision:squeezenet1_1 --set backbone.weights=random", "does not read text, expected hf:NAME or a folder"),
        ("simulate texts.toml --set backbone.name=all-MiniLM-L6-v2", "no folder all-MiniLM-L6-v2, did you mean 'hf:all-MiniLM-L6-v2'"),
        ("simulate images.toml --set backbone.name=mobilenet_v2", "did you mean 'torchvision:mobilenet_v2'"),
        ("simulate texts.toml --resume --out nothing", "nothing: nothing to resume, there is no job.toml; leave --resume out"),
        ("simulate texts --out x", "texts: found a folder, expected a TOML file"),
    ],
    ids=lambda value: value if value.startswith("simulate") else "",
)  # fmt: skip
def test_a_newcomers_mistake_is_answered_with_what_to_do(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Path, text_run: Path, arguments: str, pattern: str
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    some_texts(tmp_path / "texts"), some_images(tmp_path / "images"), class_less(tmp_path / "flat")
    some_texts(tmp_path / "below" / "below" / "texts")
    other_columns(tmp_path / "other.csv")
    toml(tmp_path / "images.toml", DIGITS, data={"source": "./images"})
    toml(tmp_path / "texts.toml", text_table(bert, "./texts"))
    if "done" in arguments:
        assert say("simulate", "texts.toml", "--out", "done")[0] == 0
    if "../" in arguments:
        monkeypatch.chdir(tmp_path / "below")
    before = snapshot(tmp_path)
    refused(say(*arguments.format(bert=bert).split()), pattern)
    assert snapshot(tmp_path) == before


def test_a_finished_run_has_nothing_to_resume_and_is_left_as_it_is(say: Say, text_run: Path) -> None:
    before = snapshot(text_run)
    code, printed, said = say("simulate", text_run / "job.toml", "--out", text_run, "--resume")
    assert (code, said) == (0, "")
    assert "this run is complete, nothing is left to do" in printed and "model sha256" in printed
    assert snapshot(text_run) == before


# check, report, predict


def test_check_says_what_is_there_and_whether_it_can_be_used(say: Say, tmp_path: Path) -> None:
    good = some_texts(tmp_path / "good")
    code, printed, said = say("check", good, "--task", "text-classification")
    assert (code, said) == (0, "") and "ready" in printed
    (good / "bad" / "empty.txt").write_text("")
    code, printed, said = say("check", good, "--task", "text-classification")
    assert refused((code, printed, said), "good: 1 examples cannot be used; mend or remove them")
    assert "unreadable  " in printed and "empty.txt: empty, expected some text" in printed
    (tmp_path / "d.csv").write_text("text,label\nx,a\n")
    bad = say("check", tmp_path / "d.csv", "--task", "text-classification", "--label", "nope")
    assert bad[1] == "" and refused(bad, "d.csv: columns .*, expected one called 'nope' as the label")
    refused(say("check", good, "--task", "text"), "unknown task 'text'")
    refused(say("check", tmp_path / "none", "--task", "text-classification"), "none: no such file or folder")


def test_a_report_is_written_anew(say: Say, image_run: Path, tmp_path: Path) -> None:
    (image_run / "report.html").unlink()
    assert say("report", image_run) == (0, f"report  {image_run}/report.html\n", "")
    assert (image_run / "report.html").is_file()
    refused(say("report", tmp_path / "none"), "none: no such run directory")
    refused(say("report", tmp_path), "no run directory, expected one that atoll simulate")


def test_a_text_run_answers_texts_and_text_files(say: Say, text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good c")
    code, printed, said = say("predict", text_run, "good c", tmp_path / "a.txt", "long " * 200, "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert (code, said) == (0, "") and len(rows) == 3
    assert rows[0]["all"] == rows[1]["all"] and set(rows[0]["all"]) == {"bad", "good"}
    assert rows[0]["probability"] == max(rows[0]["probability"], 0.5)
    code, printed, _ = say("predict", text_run, "good [red]c", "x" * 90)
    assert code == 0 and "good [red]c" in printed and "x" * 59 + "…" in printed


def test_an_image_run_answers_image_files(say: Say, image_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8))
    code, printed, said = say("predict", image_run, tmp_path / "a.png", "--json")
    assert (code, said) == (0, "")
    assert len(json.loads(printed)["all"]) == 10


@pytest.mark.parametrize(
    ("kind", "given", "pattern"),
    [
        ("image", "none.png", "none.png: cannot be read: no such file"),
        ("image", "note.txt", "note.txt: text, expected an image"),
        ("image", "", "half.jpg: damaged image"),
        ("image", "empty", "empty: a folder without files to predict, expected some .png"),
        ("image", "half.jpg", "half.jpg: damaged image"),
        ("text", "none.txt", "none.txt: cannot be read: no such file"),
        ("text", "latin.txt", "latin.txt: byte 0 is 0xe9, expected UTF-8 text"),
        ("text", "image.png", "image.png: a PNG image, expected UTF-8 text"),
        ("text", "", "latin.txt: byte 0 is 0xe9, expected UTF-8 text"),
    ],
)
def test_an_input_that_cannot_be_used_is_named(
    say: Say, request: pytest.FixtureRequest, tmp_path: Path, kind: str, given: str, pattern: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "image.png").write_bytes(png(8, 8))
    (tmp_path / "half.jpg").write_bytes(encoded(noise(), "JPEG")[:-900])
    refused(say("predict", request.getfixturevalue(f"{kind}_run"), tmp_path / given), pattern)


def test_predict_and_report_tell_how_to_finish_a_run(say: Say, text_run: Path, tmp_path: Path) -> None:
    refused(say("predict", text_run, "", "--json"), "input '': empty, expected some text")
    refused(say("predict", tmp_path / "none", "x"), "none: no such run directory")
    (tmp_path / "half way").mkdir()
    (tmp_path / "half way" / "job.toml").write_bytes((text_run / "job.toml").read_bytes())
    way = r"not finished.*go on with: atoll simulate '.*half way/job.toml' --out '.*half way' --resume"
    refused(say("predict", tmp_path / "half way", "x"), way)
    refused(say("report", tmp_path / "half way"), way)
    (tmp_path / "half way" / "model").mkdir()
    (tmp_path / "half way" / "model" / "model.json").write_text("{}")
    refused(say("predict", tmp_path / "half way", "x"), "model.json: damaged")


# partition


def same_shards(job: Path, folder: Path) -> None:
    """The shards on disk, read as a site reads them, are those of the simulation."""
    loaded = Job.load(job)
    population, task = Population.of(loaded), task_named(loaded.task.name)
    data_info = task.local_info(population.train, loaded.data, {})
    names = population.names(loaded)
    assert {p.name for p in folder.iterdir()} == {*names, "held-out-test"}
    for name in names:
        simulated = population.dataset(loaded, name)
        written = FolderShards.of(name, [folder / name]).dataset(loaded, name)
        assert set(example_keys(written)) == set(example_keys(simulated))
        there, here = task.shard(written, data_info), task.shard(simulated, data_info)
        assert there.keys == here.keys
        assert there.targets.tolist() == here.targets.tolist()
        assert list(there.inputs) == list(here.inputs)


ODD = ("a/b", ".hidden", "train", "x" * 150, "Ünï cödé", "C:\\d", "..", "1")


def odd_texts(root: Path) -> dict[str, Any]:
    with (root / "odd.jsonl").open("w") as file:
        for i in range(40):
            row = {"body": f"text\n{i} é", "verdict": ODD[i % len(ODD)], "hospital": f"h{i % 3}"}
            file.write(json.dumps(row) + "\n")
    return {"source": "./odd.jsonl", "text": "body", "label": "verdict"}


def odd_images(root: Path) -> dict[str, Any]:
    rows = ["picture,kind"]
    for i in range(40):
        (root / f"{i}.png").write_bytes(png(3 + i, 4))
        rows.append(f"{i}.png,{ODD[i % len(ODD)]}")
    (root / "odd.csv").write_text("\n".join(rows) + "\n")
    return {"source": "./odd.csv", "image": "picture", "label": "kind"}


def plain_texts(root: Path) -> dict[str, Any]:
    some_texts(root / "texts", count=20)
    return {"source": "./texts", "partition": {"kind": "dirichlet", "alpha": 0.5}}


def plain_images(root: Path) -> dict[str, Any]:
    return {"source": "digits", "partition": {"kind": "pathological", "classes_per_client": 4}}


def natural(root: Path) -> dict[str, Any]:
    """Columns of other types, one of them with a hole, in Parquet."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "text": [f"text {i}" for i in range(30)],
        "label": [f"c{i % 2}" for i in range(30)],
        "day": [datetime.date(2020, 1, 1 + i % 3) for i in range(30)],
        "score": [float("nan") if i == 4 else i / 7 for i in range(30)],
    }
    pq.write_table(pa.table(columns), root / "d.parquet")
    return {"source": "./d.parquet"}


@pytest.mark.parametrize("data", [plain_texts, odd_texts, natural, plain_images, odd_images])
def test_partitioned_shards_are_the_simulated_ones(
    say: Say, tmp_path: Path, bert: Path, data: Callable[[Path], dict[str, Any]]
) -> None:
    table = DIGITS if "images" in data.__name__ else text_table(bert, "")
    job = toml(tmp_path / "job.toml", table | {"data": data(tmp_path)}, federation={"clients": 3})
    code, printed, said = say("partition", job, "--out", tmp_path / "my shards")
    assert (code, said) == (0, "")
    assert f"--data '{tmp_path}/my shards/client-0000'" in printed
    same_shards(job, tmp_path / "my shards")
    assert not list(tmp_path.glob(".*"))


def test_partition_refuses_an_existing_folder_and_leaves_nothing_of_a_refused_job(
    say: Say, tmp_path: Path, bert: Path
) -> None:
    job = toml(tmp_path / "job.toml", text_table(bert, some_texts(tmp_path / "texts")))
    before = snapshot(tmp_path)
    refused(
        say("partition", job, "--out", tmp_path / "texts"), "exists and is not empty, expected a new folder"
    )
    refused(say("partition", job), "option --out is missing")
    refused(say("partition", job, "--out", tmp_path / "s", "--set", "federation.clients=50"), "cannot share")
    refused(
        say("partition", job, "--out", tmp_path / "s", "--set", "data.source=digits"), "digits is for image"
    )
    assert snapshot(tmp_path) == before
    (tmp_path / ".s.partial" / "client-0000").mkdir(parents=True)  # what a kill has left
    assert say("partition", job, "--out", tmp_path / "s")[0] == 0
    assert not (tmp_path / ".s.partial").exists()


# Real processes: terminals, pipes, interrupts (rows 83, 84, 86)


@pytest.fixture
def long_job(tmp_path: Path) -> Path:
    return toml(tmp_path / "long job.toml", DIGITS, federation={"rounds": 100_000, "clients": 4})


def started(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A process of its own, as a person starts it."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    settings["env"] = {**os.environ, "PYTHONPATH": str(ROOT), **options.get("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "atoll", *map(str, arguments)], text=True, start_new_session=True, **settings
    )


def until_rounds(count: int, run: Path, process: Any) -> None:
    """Wait until so many rounds are whole."""

    def whole() -> bool:
        return len(list(run.glob("checkpoints/round-*"))) >= count

    wait_until(whole, f"{count} rounds", alive=lambda: process.poll() is None)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)], ids=str
)
@pytest.mark.slow
@pytest.mark.processes
def test_an_interrupted_run_keeps_its_rounds_and_says_how_to_go_on(
    tmp_path: Path, long_job: Path, number: signal.Signals, times: int
) -> None:  # row 86
    run = tmp_path / "my run"
    process = atoll("simulate", long_job, "--set", "train.lr=0.02", "--out", run)
    until_rounds(2, run, process)
    for _ in range(times):
        os.killpg(process.pid, number)
        time.sleep(0.02)
    printed, said = process.communicate(timeout=WATCHDOG_SECONDS)
    assert process.returncode == 128 + number
    assert "Traceback" not in printed + said and said.count("\n") == 1
    line = re.fullmatch(r"interrupted: (\d+) of 100000 rounds are whole in (.*); go on with: (.*)\n", said)
    assert line and int(line[1]) >= 2 and line[2] == str(run)
    assert line[3] == f"atoll simulate '{long_job}' --set train.lr=0.02 --out '{run}' --resume"
    if (number, times) != (signal.SIGINT, 1):
        return
    again = atoll("simulate", long_job, "--set", "train.lr=0.02", "--out", run, "--resume")
    wait_until(
        lambda: len((run / "metrics.jsonl").read_text().splitlines()) > int(line[1]) + 1, "more rounds"
    )
    os.killpg(again.pid, signal.SIGINT)
    printed, said = again.communicate(timeout=WATCHDOG_SECONDS)
    assert again.returncode == 130 and f"resumed   after round {line[1]} of 100000" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ["--workers", "2"]),
        (signal.SIGINT, ["--engine", "ray"]),
        (signal.SIGTERM, ["--workers", "2"]),
    ],
    ids=str,
)
@pytest.mark.processes
def test_a_signal_ends_the_workers_too_without_a_word_of_theirs(
    tmp_path: Path, long_job: Path, number: signal.Signals, options: list[str]
) -> None:  # row 86
    run = tmp_path / "run"
    process = atoll("simulate", long_job, *options, "--out", run)
    until_rounds(2, run, process)
    os.killpg(process.pid, number)
    printed, said = process.communicate(timeout=WATCHDOG_SECONDS)
    assert process.returncode == 128 + number
    assert said.startswith("interrupted: ") and said.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.processes
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path, long_job: Path) -> None:
    run = tmp_path / "run"
    process = started(
        "simulate", long_job, "--workers", "2", "--out", run,
        "--set", "tune.method=full", "--set", "data.test_fraction=0.95", "--set", "evaluate.every=100000",
    )  # fmt: skip
    until_rounds(1, run, process)
    assert alive_in_group(process.pid) > 3  # the command, the fork server and two workers
    process.kill()
    process.wait()
    wait_until(lambda: not alive_in_group(process.pid), "end of all its processes")


def alive_in_group(group: int) -> int:
    """How many processes of a process group there are, without those that only wait to be reaped."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            count += int(number) == group and state != "Z"
    return count


@pytest.mark.slow
@pytest.mark.processes
def test_ctrl_c_before_the_first_round_leaves_nothing(tmp_path: Path) -> None:
    job = toml(tmp_path / "job.toml", DIGITS, backbone={"image_size": 224})
    process = atoll("simulate", job, "--out", tmp_path / "run", env={"ATOLL_CACHE": str(tmp_path / "cache")})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("features"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=WATCHDOG_SECONDS)
    assert process.returncode == 130
    assert said == "interrupted: no round had begun, and nothing is left behind\n"
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_a_partition_leaves_no_shard(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toml(tmp_path / "job.toml", DIGITS)
    task, written = task_named("image-classification"), type(task_named("image-classification")).write

    def write(self: Any, *arguments: Any) -> None:
        if arguments[1].name == "client-0001":
            raise KeyboardInterrupt
        written(self, *arguments)

    monkeypatch.setattr(type(task), "write", write)
    code, printed, said = say("partition", job, "--out", tmp_path / "shards")
    assert (code, printed, said) == (130, "", f"interrupted: no shard is left in {tmp_path}/shards\n")
    assert [p.name for p in tmp_path.iterdir()] == ["job.toml"]


def test_ctrl_c_in_any_verb_is_said(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed() -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setitem(CATALOGUE, "tasks", pressed)
    answer = say("list", "tasks")
    assert answer == (130, "", "interrupted: this command was stopped before its end\n")


@pytest.mark.slow
@pytest.mark.processes
def test_a_pipe_gets_plain_lines_whatever_the_locale_and_no_escape_codes(tmp_path: Path) -> None:
    few = few_pictures(30) | {"test_fraction": 0.2}
    job = toml(tmp_path / "job.toml", DIGITS, data=few, federation={"rounds": 3})
    odd = {"LC_ALL": "C", "LANG": "C", "TZ": "Nowhere/Odd+99", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    process = started("simulate", job, "--out", tmp_path / "rün", env=odd, stdin=subprocess.DEVNULL)
    printed, said = process.communicate(timeout=WATCHDOG_SECONDS)
    assert (process.returncode, said) == (0, "")  # row 84
    assert "\x1b" not in printed and "\r" not in printed and printed.isascii()
    assert "rounds    1 of 3  train loss " in printed and "rounds    3 of 3  train loss " in printed
    assert (tmp_path / "rün" / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.processes
def test_nobody_who_listens_is_no_reason_for_a_traceback() -> None:  # row 83
    reader, writer = os.pipe()
    os.close(reader)
    process = started("list", "backbones", stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=WATCHDOG_SECONDS)[1] == ""
    closed = ["bash", "-c", f"{sys.executable} -m atoll list x >&- 2>&-; echo $?"]
    assert subprocess.run(closed, cwd=ROOT, capture_output=True, text=True).stdout == "2\n"


def test_debug_shows_a_traceback(tmp_path: Path, say: Say) -> None:
    code, _, said = say("simulate", tmp_path / "none.toml", "--debug")
    assert code == 2 and "Traceback" in said and said.rstrip().endswith("none.toml: no such file")


def test_a_bug_of_ours_is_one_line_too(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[None]:
        raise ZeroDivisionError("[red]line 1\nline 2\x1b[31m")

    monkeypatch.setitem(CATALOGUE, "tasks", broken)
    code, _, said = say("list", "tasks")
    assert code == 1
    assert said == "error: internal error: ZeroDivisionError: [red]line 1 line 2�[31m (--debug shows where)\n"


def test_progress_in_a_pipe_comes_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    from atoll.cli.display import Lines

    gauge = Lines(every=1000)
    for done in range(1, 6):
        gauge.show("rounds", done, 5, f"loss {done}")
    assert capsys.readouterr().out == "rounds    1 of 5  loss 1\nrounds    5 of 5  loss 5\n"
    gauge = Lines(every=0)
    for done in range(1, 4):
        gauge.show("rounds", done, 5, "")
    assert capsys.readouterr().out == "rounds    1 of 5\nrounds    2 of 5\nrounds    3 of 5\n"
