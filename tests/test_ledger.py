"""The ledger: nothing that was charged is ever lost, and a changed one is refused."""

import random
import signal
import time
from pathlib import Path

import pytest

from atoll.errors import DataError
from atoll.privacy.accounting import Release
from atoll.privacy.ledger import Entry, Ledger
from tests.processes import python

RELEASE = Release(1.1, 0.05)


def entry(round: int, release: Release = RELEASE) -> Entry:
    return Entry("job", round, "client", release)


def filled(path: Path, count: int = 3) -> Ledger:
    ledger = Ledger.open(path, "data")
    for round in range(1, count + 1):
        ledger.charge(entry(round))
    return ledger


def test_a_ledger_read_back_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path)
    ledger.charge(Entry("other", 1, "example", Release(2.0, 1.0), count=7))
    again = Ledger.open(path, "data")
    assert again.entries == ledger.entries
    assert again.spent == {RELEASE: 3, Release(2.0, 1.0): 7}
    again.charge(entry(4))
    assert Ledger.open(path, "data").spent[RELEASE] == 4


def test_a_charge_is_on_the_disk_before_it_returns(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.jsonl", 0)
    for round in range(1, 6):
        ledger.charge(entry(round))
        assert len((tmp_path / "ledger.jsonl").read_bytes().splitlines()) == round + 1


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_line_that_was_changed_is_found(tmp_path: Path, line: int) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace("1.1", "9.9").replace('"data"', '"date"', 1)
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"ledger\.jsonl"):
        Ledger.open(path, "data")


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_line_that_was_taken_out_is_found(tmp_path: Path, gone: int) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    lines = path.read_text().splitlines(keepends=True)
    del lines[gone]
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"the ledger was changed|it was changed|belongs to other"):
        Ledger.open(path, "data")


def test_a_ledger_of_other_data_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "ledger.jsonl")
    with pytest.raises(DataError, match="belongs to other data"):
        Ledger.open(tmp_path / "ledger.jsonl", "new data")


def test_what_a_crash_left_unfinished_is_taken_off_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = Ledger.open(path, "data").spent[RELEASE]
        assert found == max(0, whole[:cut].count(b"\n") - 1)


WRITER = """
import sys
from pathlib import Path
from atoll.privacy.accounting import Release
from atoll.privacy.ledger import Entry, Ledger
ledger = Ledger.open(Path(sys.argv[1]), "data")
round = len(ledger.entries)
while True:
    round += 1
    ledger.charge(Entry("job", round, "client", Release(1.1, 0.05)))
    print(round, flush=True)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_fifty_kills_never_lose_a_charge_whose_release_was_seen(tmp_path: Path) -> None:
    """Each round prints after its charge: what was printed is at most what the ledger holds."""
    path, draw, seen = tmp_path / "ledger.jsonl", random.Random(3), 0
    for _ in range(50):
        writer = python(WRITER, path)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(draw.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        printed = [first, *writer.stdout.read().splitlines(keepends=True)]
        writer.wait()
        whole = [line for line in printed if line.endswith("\n")]
        seen = max(seen, int(whole[-1]))
        charged = len(Ledger.open(path, "data").entries)
        assert seen <= charged <= seen + 1
        seen = charged
