"""Checkpoints: killed at any system call, torn, flipped, foreign; the last whole one is used."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from atoll.errors import ConfigError, JobError
from atoll.server.run import checkpoint
from atoll.server.run.checkpoint import Checkpoint, CheckpointManager, latest, save
from tests.support.processes import python, watched


def at(round: int) -> Checkpoint:
    return Checkpoint(
        round=round,
        job_hash="ab" * 32,
        tensors={"w": torch.full((3,), float(round))},
        state={"m.w": torch.full((3,), round / 2, dtype=torch.float64), "round": float(round)},
        bytes_up=10 * round,
        bytes_down=20 * round,
        data_info={"classes": ["a", "b"]},
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    save(tmp_path, at(3))
    found = latest(tmp_path, "ab" * 32)
    assert found is not None
    assert (found.round, found.job_hash, found.data_info) == (3, "ab" * 32, at(3).data_info)
    assert (found.bytes_up, found.bytes_down) == (30, 60)
    assert torch.equal(found.tensors["w"], at(3).tensors["w"])
    assert found.state["round"] == 3.0
    assert torch.equal(found.state["m.w"], at(3).state["m.w"])  # type: ignore[arg-type]


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for round in range(1, 6):
        save(tmp_path, at(round))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000004.safetensors",
        "round-000005.safetensors",
    ]


@pytest.mark.parametrize("damage", [0, 12, 60, 200, 400, -40, -9, -1, "truncate", "empty", "words"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: int | str
) -> None:
    """A flipped bit at many places, of the header, of the words and of the values; a torn file."""
    save(tmp_path, at(1))
    save(tmp_path, at(2))
    path = tmp_path / "round-000002.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case int():
            content[damage] ^= 1
        case "truncate":
            del content[-3:]
        case "empty":
            content.clear()
        case "words":
            content = bytearray(bytes(content).replace(b"abababab", b"abababac"))
    path.write_bytes(content)
    found = latest(tmp_path, "ab" * 32)
    assert found is not None and found.round == 1
    assert "round-000002.safetensors is damaged" in caplog.text


def test_every_single_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    path = tmp_path / "round-000001.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        found = latest(tmp_path, "ab" * 32)
        if found is not None:
            assert (found.round, found.bytes_up, found.data_info) == (1, 10, {"classes": ["a", "b"]})
            assert torch.equal(found.tensors["w"], at(1).tensors["w"])
            assert torch.equal(found.state["m.w"], at(1).state["m.w"])  # type: ignore[arg-type]


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    with pytest.raises(ConfigError, match="belongs to job abababababab, this one is cdcdcdcdcdcd"):
        latest(tmp_path, "cd" * 32)


def test_a_checkpoint_of_another_schema_is_refused_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 9)
    save(tmp_path, at(1))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="schema 9, this version of Atoll reads 1"):
        latest(tmp_path, "ab" * 32)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_leaves_the_older_checkpoint_and_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(tmp_path, at(1))

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        JobError, match=r"round-000002\.safetensors: checkpoint not written \(No space left on device\)"
    ):
        save(tmp_path, at(2))
    monkeypatch.undo()
    found = latest(tmp_path, "ab" * 32)
    assert found is not None and found.round == 1
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001.safetensors"]


def test_rounds_of_milliseconds_share_a_checkpoint_and_the_last_one_is_always_saved(tmp_path: Path) -> None:
    keeper = CheckpointManager(tmp_path)
    for round in range(1, 51):
        keeper.save_async(at(round))
    keeper.flush()
    found = latest(tmp_path, "ab" * 32)
    assert found is not None and found.round == 50
    assert len(list(tmp_path.iterdir())) == 2  # of the first round and of the last


def test_an_error_of_the_disk_on_the_way_stops_the_run_and_is_tried_once_more_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = CheckpointManager(tmp_path)

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    keeper.save_async(at(1))
    with pytest.raises(JobError, match="No space left on device"):
        for _ in watched("error"):
            keeper.save_async(at(2))
    monkeypatch.undo()
    keeper.flush()
    found = latest(tmp_path, "ab" * 32)
    assert found is not None and found.round == 2


WRITER = """
import sys
from pathlib import Path
from tests.server.run.test_checkpoint import at, save
print("ready", flush=True)
for round in range(2, 100_000):
    save(Path(sys.argv[1]), at(round))
"""


@pytest.mark.processes
def test_a_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Fifty moments or more, each after another fraction of a save."""
    folder, reached = tmp_path / "c", set()
    save(folder, at(1))
    writer = python(WRITER, folder)
    assert writer.stdout is not None
    writer.stdout.readline()
    for moment, _ in enumerate(watched("ten saves")):
        if moment >= 50 and len(reached) > 10:
            break
        time.sleep(0.003 + moment % 50 * 0.0007)
        os.kill(writer.pid, signal.SIGSTOP)  # everything on the disk is now as a kill would leave it
        copy = tmp_path / f"copy{moment}"
        shutil.copytree(folder, copy)
        os.kill(writer.pid, signal.SIGCONT)
        found = latest(copy, "ab" * 32)
        assert found is not None
        assert torch.equal(found.tensors["w"], at(found.round).tensors["w"])
        reached.add(found.round)
        shutil.rmtree(copy)
    writer.kill()
    writer.wait()
