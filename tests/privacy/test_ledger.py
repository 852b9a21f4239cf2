"""The ledger: nothing that was charged is ever lost, and a changed one is refused."""

import json
import os
import random
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.errors import BudgetExhausted, DataError
from atoll.job.job import Job
from atoll.kit.kit import Budget
from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.privacy.ledger import Entry, Ledger
from atoll.protocol.requests import TrainRequest
from tests.support.processes import python

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


def test_what_a_job_was_charged_for_is_told_by_round_and_data_of_an_open_ledger_and_of_a_read_one(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "a new" / "folder" / "ledger.jsonl", Release(2.0, 1.0)
    opened = Ledger.open(path, "data")
    for round, data in ((1, "x"), (1, "x"), (2, "y")):
        opened.charge(Entry("a", round, "client", RELEASE, data=data))
    opened.charge(Entry("b", 1, "example", other, count=3, data="z"))
    for ledger in (opened, Ledger.open(path, "data")):
        assert ledger.rounds_of("a") == {1: 2, 2: 1} and ledger.rounds_of("b") == {1: 1}
        assert ledger.spent_on("a") == {RELEASE: 3} and ledger.spent_on("b") == {other: 3}
        assert (ledger.data_of("a"), ledger.data_of("b")) == ({"x", "y"}, {"z"})
        assert ledger.has("a", 2) and not ledger.has("b", 2)
        assert not (
            ledger.rounds_of("c") or ledger.spent_on("c") or ledger.data_of("c") or ledger.has("c", 1)
        )


@pytest.mark.parametrize(
    ("options", "syncs"), [({}, True), ({"durable": True}, True), ({"durable": False}, False)]
)
def test_a_charge_waits_for_the_disk_unless_it_protects_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], syncs: bool
) -> None:
    ledger, synced = Ledger.open(tmp_path / "ledger.jsonl", "data", **options), []
    monkeypatch.setattr(os, "fsync", synced.append)
    ledger.charge(entry(1))
    assert bool(synced) == syncs


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


def books(folder: Path, charges: float) -> PrivacyLedgers:
    """A site's, whose budget is enough for so many rounds on a client's data."""
    enough = epsilon({dp_plan().event: int(charges) * dp_plan().per_round}, 1e-5)
    return PrivacyLedgers(folder, Budget(epsilon=enough, delta=1e-5))


def dp_plan() -> DpPlan:
    found = dp_plan_of(JOB, "example")
    assert found is not None
    return found


JOB = Job.parse(
    {
        "name": "books", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels"}, "federation": {"clients": 2, "rounds": 50},
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.25},
    },
    origin="test",
)  # fmt: skip


def charge(ledgers: PrivacyLedgers, run: str, round: int) -> bool:
    """Whether a round could be paid for."""
    request = TrainRequest(JOB.canonical, JOB.hash, round, {}, {}, run=run)
    try:
        ledgers.charge("c", "data", JOB, dp_plan(), request)
    except BudgetExhausted:
        return False
    return True


def spends_no_more_than_its_budget(folder: Path) -> bool:
    """Two ledgers that are open on one folder, which charge in turn."""
    one, other = books(folder, 4), books(folder, 4)
    for ledgers in (one, other):
        assert not ledgers.ledger("c", "example").entries
    paid = [
        charge(ledgers, f"run-{i}", round) for round in range(1, 5) for i, ledgers in enumerate((one, other))
    ]
    return paid == [True] * 4 + [False] * 4


def test_a_run_stops_at_its_own_target_where_the_site_has_no_budget(tmp_path: Path) -> None:
    plan, charged = dp_plan(), PrivacyLedgers(tmp_path)
    target = epsilon({plan.event: 3 * plan.per_round}, 1e-5)
    # Nothing is planned, so that the target alone decides.
    plan = replace(plan, releases=0, promise=plan.promise.model_copy(update={"epsilon": target}))
    request = TrainRequest(JOB.canonical, JOB.hash, 1, {}, {}, run="run")
    assert [charged.charge("c", "data", JOB, plan, request) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(BudgetExhausted, match=f"above the target {target}"):
        charged.charge("c", "data", JOB, plan, request)


def test_two_ledgers_on_one_folder_spend_one_budget(tmp_path: Path) -> None:
    assert spends_no_more_than_its_budget(tmp_path)
    ledger = Ledger.open(tmp_path / "c.jsonl", "example of c")
    assert epsilon(ledger.spent, 1e-5) <= books(tmp_path, 4).budget.epsilon  # type: ignore[union-attr]


def test_a_decision_by_what_was_read_before_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: what others wrote is read when it is decided already, as a line is appended."""
    decided = PrivacyLedgers.charge

    def decide_first(self: PrivacyLedgers, client: str, *given: Any) -> int:
        ledger = self.ledger(client, "example")
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "alone", nullcontext)
            patch.setattr(ledger, "charge", lambda entry: None)
            count = decided(self, client, *given)
        ledger.charge(Entry(given[-1].run, given[-1].round, "example", dp_plan().event, dp_plan().per_round))
        return count

    monkeypatch.setattr(PrivacyLedgers, "charge", decide_first)
    assert not spends_no_more_than_its_budget(tmp_path)


SPENDER = """
import sys, time
from pathlib import Path
from tests.privacy.test_ledger import books, charge
ledgers = books(Path(sys.argv[1]), 4)
ledgers.ledger("c", "example")
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
print(sum(charge(ledgers, sys.argv[2], round) for round in range(1, 5)), flush=True)
"""


@pytest.mark.processes
def test_two_processes_that_charge_at_once_spend_one_budget(tmp_path: Path) -> None:
    start = tmp_path / "start"
    spenders = [python(SPENDER, tmp_path / "books", name, start) for name in ("a", "b")]
    for spender in spenders:
        assert spender.stdout is not None and spender.stdout.readline() == "ready\n"
    start.touch()
    paid = [int(spender.communicate()[0]) for spender in spenders]
    ledger = Ledger.open(tmp_path / "books" / "c.jsonl", "example of c")
    assert sum(paid) == len(ledger.entries) == 4
    assert ledger.spent == {dp_plan().event: 4 * dp_plan().per_round}


def test_what_another_wrote_is_seen_once_the_ledger_is_ones_own(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "ledger.jsonl"), Ledger.open(tmp_path / "ledger.jsonl", "data")
    one.charge(entry(4))
    with other.alone():
        assert other.spent[RELEASE] == 4
        with other.alone():
            other.charge(entry(5))
    assert Ledger.open(tmp_path / "ledger.jsonl", "data").spent[RELEASE] == 5


def test_the_first_line_says_the_format_that_is_kept_for_good(tmp_path: Path) -> None:
    """Ledgers outlive versions of Atoll: another format needs a reader of this one."""
    filled(tmp_path / "ledger.jsonl")
    first, *entries = (json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert (first["format"], first["data"]) == (1, "data")
    wanted = {"job": "job", "round": 1, "unit": "client", "noise_multiplier": 1.1, "sampling_rate": 0.05,
              "count": 1, "data": ""}  # fmt: skip
    assert entries[0].items() >= wanted.items()
