"""Simulated time against closed forms, and profiles that can't be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.job_checks import validate_for_deployment
from atoll.server.rounds.participation import CohortRequest
from atoll.sim.engines.engine import simulate
from atoll.sim.population.devices import Profile, VirtualClock, turnout
from atoll.sim.population.population import client_names
from tests.sim.test_simulation import DIGITS


def job(path: Path, **tables: Any) -> Job:
    federation = {"devices": str(path)} | tables.pop("federation", {})
    merged = DIGITS | {k: DIGITS.get(k, {}) | v for k, v in tables.items()}
    return Job.parse(merged | {"federation": DIGITS["federation"] | federation}, origin="test")


def profile(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "profile.csv"
    path.write_text(text)
    return path


ONE_EACH = """client,examples_per_second,download_mbps,upload_mbps,latency_seconds
client-0000,100,8,4,0.5
client-0001,50,8,4,0
client-0002,1000,1,1,0
"""


def clock(path: Path, sizes: list[int], **federation: Any) -> VirtualClock:
    setting = job(path, data={"validation_fraction": 0.1}, train={"epochs": 2}, federation=federation)
    return VirtualClock(setting, Profile.read(path, client_names(len(sizes))), np.array(sizes))


def call(cohort: list[str], goal: int, round: int = 1, attempt: int = 1) -> CohortRequest:
    return CohortRequest(round, attempt, cohort, goal, bytes_down=1_000_000, bytes_up=1_000_000)


def test_a_round_lasts_as_long_as_its_slowest_client_by_the_written_model(tmp_path: Path) -> None:
    path = profile(tmp_path, ONE_EACH)
    # 10 examples, one kept to validate: 9 * 2 / 100 = .18 s; 8 Mbit at 8 Mbit/s and at 4: 1 + 2 s; 2 * .5 s.
    found = clock(path, [10, 50, 100])(call(["client-0000"], 1))
    assert found.seconds == pytest.approx(0.18 + 3 + 1.0)
    # 45 * 2 / 50 + 3 = 4.8 s;  90 * 2 / 1000 + 16 = 16.18 s.
    found = clock(path, [10, 50, 100])(call(client_names(3)[:], 3))
    assert found.seconds == pytest.approx(16.18)
    assert list(found.names) == ["client-0000", "client-0001", "client-0002"]


def test_only_the_first_to_answer_count_where_more_were_asked(tmp_path: Path) -> None:
    found = clock(profile(tmp_path, ONE_EACH), [10, 50, 100])(call(client_names(3)[:], 2))
    assert found.names == ["client-0000", "client-0001"]
    assert (found.seconds, found.surplus) == (pytest.approx(4.8), 1)


def test_a_deadline_ends_the_round_and_names_nobody_who_came_after_it(tmp_path: Path) -> None:
    found = clock(profile(tmp_path, ONE_EACH), [10, 50, 100], deadline=10)(call(client_names(3)[:], 3))
    assert found.names == ["client-0000", "client-0001"]
    assert (found.seconds, found.late) == (10, 1)


@pytest.mark.parametrize(
    ("arrival", "goal", "deadline", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, 9.0, (["b", "c"], 2.0, 0, 0, 1)),
        ([3.0, 1.0, 2.0], 3, 2.5, (["b", "c"], 2.5, 0, 1, 0)),
        ([np.inf, 1.0, 2.0], 3, 9.0, (["b", "c"], 2.0, 1, 0, 0)),
        ([np.inf, 1.0, 5.0], 2, 3.0, (["b"], 3.0, 1, 1, 0)),
        ([np.inf, np.inf, np.inf], 2, 3.0, ([], 0.0, 3, 0, 0)),
        ([2.0, 2.0, 2.0], 2, 3.0, (["a", "b"], 2.0, 0, 0, 1)),
    ],
)
def test_who_is_in_time_by_hand(arrival: list[float], goal: int, deadline: float, expected: Any) -> None:
    found = turnout(["a", "b", "c"], np.array(arrival), goal, deadline)
    assert (list(found.names), found.seconds, found.unavailable, found.late, found.surplus) == expected


def test_the_median_round_of_exponential_devices_is_that_of_the_order_statistic(tmp_path: Path) -> None:
    """n devices whose time is exponential: the k-th arrival is expected at H(n) - H(n - k)."""
    rng = np.random.default_rng(0)
    names = [f"{i}" for i in range(20)]
    found = [turnout(names, rng.exponential(size=20), 15, np.inf).seconds or 0.0 for _ in range(20_000)]
    harmonic = [sum(1 / i for i in range(1, n + 1)) for n in (20, 5)]
    variance = sum(1 / i**2 for i in range(6, 21))
    assert np.mean(found) == pytest.approx(harmonic[0] - harmonic[1], abs=4 * (variance / 20_000) ** 0.5)


def test_clients_are_there_as_often_as_their_availability_says(tmp_path: Path) -> None:
    path = profile(tmp_path, "share,examples_per_second,availability\n1,100,0.3\n")
    counts = np.zeros(50)
    ticking = clock(path, [10] * 50)
    for round in range(1, 401):
        there = ticking(call(list(client_names(50)), 50, round)).names
        counts[[int(name[-4:]) for name in there]] += 1
    assert abs(counts.sum() / 20_000 - 0.3) < 4 * (0.21 / 20_000) ** 0.5
    assert abs(counts - 120).max() < 5 * (400 * 0.21) ** 0.5
    first = [ticking(call(list(client_names(50)), 50, 1, attempt)).names for attempt in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_kinds_of_devices_have_their_shares_and_a_client_keeps_its_kind(tmp_path: Path) -> None:
    path = profile(tmp_path, "share,examples_per_second\n1,10\n3,100\n")
    kinds = Profile.read(path, []).kinds(client_names(20_000)[:], seed=3)
    assert abs((kinds == 0).mean() - 0.25) < 4 * (0.1875 / 20_000) ** 0.5
    assert (Profile.read(path, []).kinds(client_names(20_000)[70:90], seed=3) == kinds[70:90]).all()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("client,speed\nclient-0000,1\n", "unknown column 'speed', expected client or share, examples_per"),
        ("examples_per_second\n1\n", "expected one of client and share"),
        ("client,share,examples_per_second\na,1,1\n", "expected one of client and share"),
        ("share,examples_per_second\n", "holds no row"),
        ("", "expected one of client and share"),
        (
            "share,examples_per_second\n1,0\n",
            r"line 2: examples_per_second is '0', expected a number above 0",
        ),
        ("share,examples_per_second\n1,nan\n", "examples_per_second is 'nan'"),
        ("share,examples_per_second\n1,\n", "examples_per_second is ''"),
        (
            "share,examples_per_second,availability\n1,1,1.2\n",
            "availability is '1.2', expected a number from 0",
        ),
        ("share,examples_per_second,latency_seconds\n1,1,-1\n", "latency_seconds is '-1'"),
        ("client,examples_per_second\nclient-0000,1\n", "no row for client-0001, expected one for each of 6"),
    ],
)
def test_a_profile_that_cannot_be_is_answered_in_one_line(tmp_path: Path, text: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        Profile.read(profile(tmp_path, text), client_names(6))
    assert str(caught.value).startswith(str(tmp_path / "profile.csv")) and "\n" not in str(caught.value)


def test_a_missing_profile_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.csv: cannot be read as CSV .*federation.devices"):
        simulate(job(tmp_path / "nothing.csv"), tmp_path / "r", on_event=ignore_events, report=False)
    assert not (tmp_path / "r").exists()


def test_deadline_and_over_sampling_need_devices() -> None:
    for key, value in (("deadline", 5.0), ("over_sampling", 1.5)):
        with pytest.raises(ConfigError, match=f"{key} has no meaning without devices, a profile"):
            Job.parse(DIGITS | {"federation": {key: value, "cohort": 4}}, origin="test")


def test_a_real_federation_refuses_simulated_devices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.devices: simulates devices"):
        validate_for_deployment(job(tmp_path / "p.csv"))


KINDS = "share,examples_per_second,upload_mbps,availability\n1,20,1,0.8\n1,200,10,0.9\n"


def test_a_run_tells_simulated_time_and_resumes_to_the_same(tmp_path: Path) -> None:
    setting = job(
        profile(tmp_path, KINDS),
        federation={"clients": 12, "cohort": 4, "over_sampling": 1.5, "deadline": 30.0, "rounds": 6},
    )
    whole = simulate(setting, tmp_path / "whole", on_event=ignore_events)
    lines = [line["simulated"] for line in whole.rounds]
    assert whole.simulated_seconds == lines[-1]["elapsed"] == pytest.approx(sum(x["seconds"] for x in lines))
    for line in whole.rounds:
        told = line["simulated"]
        assert len(line["cohort"]) == 6 and line["trained"] <= 4
        assert line["trained"] + told["unavailable"] + told["late"] + told["surplus"] == 6
        assert told["seconds"] <= 30.0

    def stop_after_three(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(setting, tmp_path / "cut", on_event=stop_after_three, report=False)
    again = simulate(setting, tmp_path / "cut", on_event=ignore_events, report=False, resume=True)
    assert again.model_sha256 == whole.model_sha256
    assert [line["simulated"] for line in again.rounds] == lines
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "simulated time of the run" in report and "clients asked in vain" in report
    assert "6 of the 12 clients were asked; those who answered in time trained" in report
    assert "every update that arrived in time passed the checks" in report


def test_the_engine_changes_no_bit_of_a_run_in_simulated_time(tmp_path: Path) -> None:
    setting = job(
        profile(tmp_path, KINDS), federation={"clients": 12, "cohort": 4, "over_sampling": 1.5, "rounds": 3}
    )
    hashes = {
        simulate(setting, tmp_path / engine, engine=engine, on_event=ignore_events, report=False).model_sha256
        for engine in ("inline", "loop")
    }
    assert len(hashes) == 1


def test_a_round_for_which_too_few_are_there_is_abandoned_with_the_reason(tmp_path: Path) -> None:
    path = profile(tmp_path, "share,examples_per_second,availability\n1,100,0\n")
    with pytest.raises(
        InconsistentUpdates, match=r"round 1: 0 of 4 usable updates, needed 2 \(4 clients not"
    ):
        simulate(job(path), tmp_path / "r", on_event=ignore_events, report=False)
