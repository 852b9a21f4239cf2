"""Runs in TensorBoard, MLflow and W&B: what is read back there is what the run directory holds."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from atoll import tracking
from atoll.cli.main import run as command_line
from atoll.job.job import Job
from atoll.tracking import Tracking, numbers_of

TABLE: dict[str, Any] = {
    "name": "followed",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits"},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"batch_size": 32, "lr": 1.0},
    "federation": {"clients": 4, "rounds": 3},
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "job.toml").write_text(tomli_w.dumps(TABLE))
    given = ["simulate", str(folder / "job.toml"), "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert command_line([*given, "--track", "tensorboard", "--track", "mlflow"]) == 0
    return folder


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def mlflow_runs(database: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("followed")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_tensorboard_has_every_round_and_the_result(followed: Path) -> None:
    result = json.loads((followed / "run" / "result.json").read_text())
    found = scalars(followed / "run" / "tensorboard")
    for line in result["rounds"]:
        assert found["loss"][line["round"]] == pytest.approx(line["loss"])
        assert found["metrics/accuracy"][line["round"]] == pytest.approx(line["metrics"]["accuracy"])
        assert found["bytes_up"][line["round"]] == line["bytes_up"]
    assert found["final/server/accuracy"] == {3: pytest.approx(result["final"]["server"]["accuracy"])}


def test_mlflow_has_every_round_the_settings_and_the_result(followed: Path) -> None:
    from mlflow.tracking import MlflowClient

    result = json.loads((followed / "run" / "result.json").read_text())
    (run,) = mlflow_runs(followed / "mlflow.db")
    client = MlflowClient(tracking_uri=f"sqlite:///{followed / 'mlflow.db'}")
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "metrics/accuracy")}
    assert history == {line["round"]: pytest.approx(line["metrics"]["accuracy"]) for line in result["rounds"]}
    assert run.info.status == "FINISHED"
    assert run.data.tags["job.train.lr"] == "1.0"
    assert run.data.tags["result.model_sha256"] == result["model_sha256"]
    assert run.data.metrics["final/server/accuracy"] == pytest.approx(result["final"]["server"]["accuracy"])


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: a log in LevelDB's format behind seven bytes, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # a block's end is filled up
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if not kind:
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
@pytest.mark.processes
def test_wandb_has_every_round_the_settings_and_the_result_and_nothing_of_the_machine(
    followed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    for patience in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):  # a busy machine is no failure
        monkeypatch.setenv(patience, "600")
    shutil.copytree(followed / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert command_line(["track", str(tmp_path / "run"), "--to", "wandb"]) == 0
    wandb.teardown()  # as at the end of a process: only this waits until the file is written to its end
    (file,) = (tmp_path / "run" / "wandb").rglob("*.wandb")
    records = wandb_records(file)
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    accuracies = [line["metrics/accuracy"] for line in lines if "metrics/accuracy" in line]
    assert accuracies == pytest.approx([line["metrics"]["accuracy"] for line in result["rounds"]])
    config = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.HasField("config")
        for item in record.config.update
    }
    assert config["job.train.lr"] == "1.0" and config["result.model_sha256"] == result["model_sha256"]
    told = "\n".join(map(str, records))
    assert result["model_sha256"] in told
    for secret in (socket.gethostname(), getpass.getuser(), sys.executable):  # a name may have two letters
        assert not re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", told), secret


def test_a_run_directory_is_written_afterwards_too(followed: Path, tmp_path: Path) -> None:
    shutil.copytree(followed / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    assert command_line(["track", str(tmp_path / "run"), "--to", "tensorboard", "--to", "mlflow"]) == 0
    assert scalars(tmp_path / "run" / "tensorboard") == scalars(followed / "run" / "tensorboard")
    assert len(mlflow_runs(tmp_path / "mlflow.db")) == 1


def test_a_resumed_run_goes_on_where_it_was_tracked(tmp_path: Path) -> None:
    job = Job.parse(TABLE, origin="test")
    names = ("tensorboard", "mlflow")
    first = Tracking(job, tmp_path / "run", names)
    for round in (1, 2, 3):
        first.line({"round": round, "loss": float(round)})
    again = Tracking(job, tmp_path / "run", names)
    for round in (3, 4):
        again.line({"round": round, "loss": 10.0 * round})
    (run,) = mlflow_runs(tmp_path / "mlflow.db")
    assert run.data.metrics["loss"] == 40.0
    assert scalars(tmp_path / "run" / "tensorboard")["loss"] == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


def test_a_tracker_that_fails_costs_its_lines_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Full:
        place = "nowhere"

        def __init__(self, *about: object) -> None: ...
        def log_text(self, values: object) -> None: ...
        def close(self) -> None: ...
        def numbers(self, values: object, round: int) -> None:
            seen.append(round)
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Full)
    followed = Tracking(Job.parse(TABLE, origin="test"), tmp_path, ["tensorboard"])
    followed.line({"round": 1})
    followed.line({"round": 2})
    assert seen == [1]
    assert "tensorboard is left out from here on" in caplog.text and "No space left" in caplog.text


def test_what_there_is_not_is_refused_before_anything_runs(
    followed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["simulate", str(followed / "job.toml"), "--out", str(tmp_path / "run")]
    assert command_line([*given, "--track", "neptune"]) == 2
    assert "--track: expected one of tensorboard, mlflow, wandb, found 'neptune'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_finite_numbers_are_told() -> None:
    line = {
        "loss": float("nan"),
        "trained": 3,
        "set_aside": {"a": "why"},
        "flag": True,
        "metrics": {"f1": 0.5},
    }
    assert dict(numbers_of(line)) == {"trained": 3.0, "metrics/f1": 0.5}
