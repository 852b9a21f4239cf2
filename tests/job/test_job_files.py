"""Job files as they come: YAML beside TOML, and what is no file that can be read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from atoll.cli.main import run
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.toml import LARGEST, read_job
from atoll.system.yaml_text import parse_yaml

JOB_TOML = """
name = "digits"
seed = 1
[task]
name = "image-classification"
[data]
source = "digits"
partition = { kind = "dirichlet", alpha = 0.5 }
classes = ["no", "yes"]
[backbone]
name = "raw:pixels"
image_size = 8
[train]
lr = 1e-3
[federation]
clients = 3
rounds = 10
"""
JOB_YAML = """
name: digits
seed: 1
task: {name: image-classification}
data:
  source: digits
  partition: {kind: dirichlet, alpha: 0.5}
  classes: [no, yes]   # words, as YAML 1.2 has them
backbone:
  name: raw:pixels
  image_size: 8
train:
  lr: 1e-3
federation:
  clients: 3
  rounds: 0010
"""


@pytest.mark.parametrize("name", ["job.yaml", "job.YML"])
def test_a_job_is_the_same_in_yaml_and_in_toml(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(JOB_YAML)
    (tmp_path / "job.toml").write_text(JOB_TOML)
    job = Job.load(tmp_path / name, ["train.lr=0.5"])
    assert job.hash == Job.load(tmp_path / "job.toml", ["train.lr=0.5"]).hash
    assert Job.load(tmp_path / name).train.lr == 1e-3


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1), ("-7", -7), ("010", 10), ("0x1f", 31), ("0o17", 15), ("1.5", 1.5), ("1e-3", 1e-3),
        (".5", 0.5),
        ("+1.", 1.0), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("1:30", "1:30"), ("2024-03-01", "2024-03-01"),
        ("1_000", "1_000"), ('"1"', "1"), ("'true'", "true"), ("a.b", "a.b"), ("-", "-"),
    ],
)  # fmt: skip
def test_plain_words_are_read_as_yaml_1_2_says(written: str, value: object) -> None:
    if written == "-":
        written = '"-"'
    read = parse_yaml(f"a: {written}", "x")["a"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "job.yaml: not valid YAML: the key a comes twice or is no text (at line 2, column 1)"),
        ("1: 2", "the key 1 comes twice or is no text"),
        ("a: &x [1]\nb: *x", "anchors and aliases are not read (at line 1, column 4)"),
        ("a: [1", "not valid YAML"),
        ("- 1", "no table"),
        ("just words", "no table"),
        ("a: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: \x01", "not valid YAML"),
        ("", "the file is empty, expected YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_job_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_job(tmp_path / "job.yaml")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_loader_of_others_is_left_as_it_is() -> None:
    assert yaml.safe_load("no") is False


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with (tmp_path / "huge.toml").open("wb") as file:
        file.truncate(LARGEST + 1)
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000 + "]" * 5000)
    (tmp_path / "folder.toml").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.toml"))
        for name, said in {
            "fifo.toml": "no regular file", "zero.yaml": "no regular file", "socket.toml": "no regular file",
            "huge.toml": "67,108,865 bytes", "deep.toml": "nested too deeply",
            "folder.toml": "found a folder",
        }.items():  # fmt: skip
            assert run(["simulate", str(tmp_path / name)]) == 2
            line = capsys.readouterr().err
            assert line.startswith("error: ") and said in line and name in line and line.count("\n") == 1


def test_an_override_that_is_nested_too_deeply_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(JOB_TOML)
    assert run(["simulate", str(tmp_path / "job.toml"), "--set", "a=" + "[" * 5000 + "]" * 5000]) == 2
    assert "not valid TOML" in capsys.readouterr().err
