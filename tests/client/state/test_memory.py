"""What clients remember: the newest state of an earlier round, whole at any instant, their own to read."""

import logging
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

from atoll.client.state import store
from atoll.client.state.store import DAYS_KEPT, ROUNDS_KEPT, ClientStateStore
from atoll.errors import DataError, JobError
from atoll.protocol.tensors import Tensors
from tests.support.processes import python, watched


def state(value: float) -> Tensors:
    return {"error": torch.full((50,), value), "head/w": torch.full((2, 3), value, dtype=torch.float64)}


def memories(folder: Path) -> list[ClientStateStore]:
    return [
        ClientStateStore(),
        ClientStateStore(folder / "site"),
        ClientStateStore(folder / "simulation", of_one_run=True),
    ]


def value_of(found: Tensors) -> float | None:
    return float(found["error"][0]) if found else None


def test_a_round_takes_the_newest_state_of_the_rounds_before_it(tmp_path: Path) -> None:
    for kept in memories(tmp_path):
        assert kept.load_before("run", "a", 5) == {}
        for round in (2, 5, 9):
            kept.save("run", round, {"a": state(round), "b": state(-round)})
        found = [value_of(kept.load_before("run", "a", round)) for round in (1, 2, 3, 5, 6, 9, 10, 99)]
        assert found == [None, None, 2, 2, 5, 5, 9, 9]
        whole = kept.load_before("run", "b", 7)
        assert all(torch.equal(whole[name], tensor) for name, tensor in state(-5).items())
        assert whole["head/w"].dtype == torch.float64


def test_a_run_remembers_the_data_that_it_began_with_over_a_restart(tmp_path: Path) -> None:
    kept = ClientStateStore(tmp_path / "site")
    assert kept.data_of("run", "a", "first") == kept.data_of("run", "a", "second") == "first"
    again = ClientStateStore(tmp_path / "site")
    assert again.data_of("run", "a", "second") == "first"
    assert again.data_of("next run", "a", "second") == again.data_of("run", "b", "second") == "second"
    again.save("run", 1, {"a": state(1)})
    assert value_of(again.load_before("run", "a", 2)) == 1
    files = list((tmp_path / "site").rglob("data.sha256"))
    assert len(files) == 3 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    for whole in (ClientStateStore(), ClientStateStore(tmp_path / "simulation", of_one_run=True)):
        assert [whole.data_of("run", "a", now) for now in ("first", "second")] == ["first", "second"]


def test_data_that_cannot_be_remembered_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("no folder")
    with pytest.raises(DataError, match=r"data\.sha256: can't be kept or read: "):
        ClientStateStore(tmp_path / "site").data_of("run", "a", "first")


def test_a_round_done_again_replaces_what_it_left_and_nothing_else(tmp_path: Path) -> None:
    for kept in memories(tmp_path):
        for round in (1, 2, 3):
            kept.save("run", round, {"a": state(round)})
        kept.save("run", 2, {"a": state(20)})
        assert [value_of(kept.load_before("run", "a", round)) for round in (2, 3, 4)] == [1, 20, 3]


def test_few_rounds_are_kept_and_they_reach_behind_the_last_two_checkpoints(tmp_path: Path) -> None:
    for kept in memories(tmp_path):
        for round in range(1, 9):
            kept.save("run", round, {"a": state(round)})
            # round 8 is under way: checkpoints of 7 and 6 are on the disk, so it may go on with 7
            if round > 1:
                assert value_of(kept.load_before("run", "a", round)) == round - 1
            if round > 2:
                assert value_of(kept.load_before("run", "a", round - 1)) == round - 2
        assert value_of(kept.load_before("run", "a", 9 - ROUNDS_KEPT)) is None
    assert len(list((tmp_path / "site").rglob("*.safetensors"))) == ROUNDS_KEPT


def test_runs_and_clients_are_kept_apart_but_in_a_runs_own_directory(tmp_path: Path) -> None:
    alone, site, simulation = memories(tmp_path)
    for kept in (alone, site, simulation):
        kept.save("one", 1, {"a": state(1)})
        assert kept.load_before("one", "b", 9) == {}
    assert alone.load_before("two", "a", 9) == site.load_before("two", "a", 9) == {}
    assert value_of(simulation.load_before("two", "a", 9)) == 1


def test_what_the_server_calls_a_run_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    kept = ClientStateStore(tmp_path / "site")
    for run in ("../../out", "/etc/passwd", "", "a\0b", "x" * 5000):
        kept.save(run, 1, {"a": state(1)})
        assert value_of(kept.load_before(run, "a", 2)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    kept = ClientStateStore(tmp_path / "deep" / "memory")
    kept.save("run", 1, {"a": state(1)})
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "memory").rglob("*")}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())
    assert stat.S_IMODE((tmp_path / "deep" / "memory").stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", [12, 60, 200, -1, "truncate", "empty"])
def test_a_damaged_state_is_named_and_never_taken_for_none(tmp_path: Path, damage: int | str) -> None:
    kept = ClientStateStore(tmp_path)
    kept.save("run", 1, {"a": state(1)})
    [path] = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    match damage:
        case int():
            content[damage] ^= 1
        case "truncate":
            del content[-3:]
        case "empty":
            content.clear()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"round-000001\.safetensors: is damaged"):
        kept.load_before("run", "a", 2)


def test_a_full_disk_is_named_and_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ClientStateStore(tmp_path)
    kept.save("run", 1, {"a": state(1)})

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"memory not written \(No space left on device\)"):
        kept.save("run", 2, {"a": state(2), "b": state(2)})
    monkeypatch.undo()
    assert value_of(kept.load_before("run", "a", 9)) == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_runs_long_past_are_let_go_of_when_a_new_one_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, store.__name__)
    kept = ClientStateStore(tmp_path)
    kept.save("old", 1, {"a": state(1)})
    kept.save("young", 1, {"a": state(2)})
    long_ago = time.time() - (DAYS_KEPT + 1) * 86400
    [folder] = [f for f in (tmp_path / "a").iterdir() if f == kept._path("old", "a", 1).parent]
    os.utime(folder, (long_ago, long_ago))
    kept.save("new", 1, {"a": state(3)})
    assert kept.load_before("old", "a", 9) == {} and "goes" in caplog.text
    assert [value_of(kept.load_before(run, "a", 9)) for run in ("young", "new")] == [2, 3]


WRITER = """
import sys
from pathlib import Path
from tests.client.state.test_memory import ClientStateStore, state
kept = ClientStateStore(Path(sys.argv[1]))
print("ready", flush=True)
for round in range(2, 100_000):
    kept.save("run", round, {"a": state(round), "b": state(-round)})
"""


@pytest.mark.processes
def test_a_kill_at_any_time_leaves_whole_states_of_the_rounds_that_may_be_gone_on_from(
    tmp_path: Path,
) -> None:
    folder, reached = tmp_path / "c", set()
    ClientStateStore(folder).save("run", 1, {"a": state(1), "b": state(-1)})
    writer = python(WRITER, folder)
    assert writer.stdout is not None
    writer.stdout.readline()
    for moment, _ in enumerate(watched("ten states")):
        if moment >= 30 and len(reached) > 10:
            break
        time.sleep(0.003 + moment % 30 * 0.0007)
        os.kill(writer.pid, signal.SIGSTOP)  # everything on the disk is now as a kill would leave it
        copy = tmp_path / f"copy{moment}"
        shutil.copytree(folder, copy)
        os.kill(writer.pid, signal.SIGCONT)
        kept = ClientStateStore(copy)
        newest = max(kept._rounds("run", "a"))
        assert value_of(kept.load_before("run", "a", newest + 1)) == newest
        assert value_of(kept.load_before("run", "b", newest)) == -(newest - 1) or newest == 1
        reached.add(newest)
        shutil.rmtree(copy)
    writer.kill()
    writer.wait()
