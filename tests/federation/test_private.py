"""Promises kept by real processes: ledgers in the kits, secure sums under masks, budgets of sites."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atoll.privacy.accounting import Release, epsilon
from atoll.server.deploy.status import status
from tests.federation.conftest import CLASSES, CLIENTS, Ring, job
from tests.federation.places import result_of

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]

EXAMPLE = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5,
}  # fmt: skip
CLIENT = {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-2, "clipping_norm": 0.5}


def entries(path: Path) -> list[dict[str, Any]]:
    """A ledger's charges as they stand in the file; none where nothing was charged yet."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def ledger_of(ring: Ring, client: str) -> Path:
    kit = "client-0000" if client == "client-0000" else "pair"
    return ring.federation.kits[kit] / "state" / "ledgers" / f"{client}.jsonl"


@dataclass(frozen=True)
class Promised:
    """A run under both promises, and what it wrote into the ledgers.

    One site has a budget for three rounds, and is killed while it trains in the second of three.
    """

    result: dict[str, Any]
    charged: dict[str, list[dict[str, Any]]]
    central_before: int


@pytest.fixture(scope="module")
def promised(ring: Ring) -> Promised:
    kit = ring.federation.kits["client-0000"] / "kit.toml"
    without = kit.read_text()
    if "client-0000" in ring.federation.running:
        ring.federation.running["client-0000"].end()
    enough = epsilon({Release(1.0, 0.25): 3 * 4}, 1e-4)
    kit.write_text(f"{without}\n[budget]\nepsilon = {enough}\ndelta = 1e-4\n")
    if ledger_of(ring, "client-0000").exists():
        shutil.move(ledger_of(ring, "client-0000"), ring.federation.folder / "old-ledger.jsonl")
    before = {client: len(entries(ledger_of(ring, client))) for client in CLIENTS}
    central_before = len(entries(central(ring)))
    promises = {
        name: {key: value for key, value in table.items() if key != "unit"}
        for name, table in (("example", EXAMPLE), ("client", CLIENT))
    }
    setting = job("promised", data=CLASSES, federation={"rounds": 3}, privacy={"unit": "both"} | promises)
    federation, out = ring.whole(), ring.federation.folder / "promised"
    held = ring.hold("promised", 2)
    try:
        submitted = federation.submit(setting, out)
        ring.alone().says("held: promised-2-client-0000")
        ring.alone().kill()
        held.unlink()
        ring.alone()
        assert submitted.ends() == 0, submitted.text()
    finally:
        kit.write_text(without)
        ring.alone().end()
    charged = {client: entries(ledger_of(ring, client))[before[client] :] for client in CLIENTS}
    return Promised(result_of(out), charged, central_before)


def central(ring: Ring) -> Path:
    """The ledger of noise that the server adds."""
    return ring.federation.server / "state" / "ledger.jsonl"


def test_noise_of_clients_is_charged_at_each_site_before_it_leaves(promised: Promised) -> None:
    claim = promised.result["privacy"]["units"]["example"]
    assert claim["epsilon"] == epsilon({Release(1.0, 0.25): 3 * 4}, 1e-4)
    assert claim["where"] == "client" and not claim["seeded_noise"]
    for lines in promised.charged.values():
        assert {(line["count"], line["noise_multiplier"]) for line in lines} == {(4, 1.0)}
        assert len({line["job"] for line in lines}) == 1
        assert all(len(line["data"]) == 64 for line in lines)
    for client in CLIENTS[1:]:
        assert [line["round"] for line in promised.charged[client]] == [1, 2, 3]
    assert promised.result["final"]["clients"] == {}
    assert all(line["loss"] is None for line in promised.result["rounds"])


def test_a_site_killed_while_it_trains_in_private_is_charged_for_both_tries(promised: Promised) -> None:
    charged = [line["round"] for line in promised.charged["client-0000"]]
    assert charged == [1, 2, 2]
    assert promised.result["privacy"]["units"]["example"]["releases"] == 4 * len(charged)


def test_a_site_whose_budget_is_spent_says_so_and_the_run_goes_on_without_it(promised: Promised) -> None:
    first, second, third = (line["set_aside"] for line in promised.result["rounds"])
    assert first == second == {}
    assert third == {"client-0000": "the site's privacy budget for this client's data is spent"}


def test_noise_at_the_server_is_charged_in_its_kit_across_runs(ring: Ring, promised: Promised) -> None:
    claim, before = promised.result["privacy"]["units"]["client"], promised.central_before
    assert claim["epsilon"] == epsilon({Release(0.5, 1.0): 3}, 1e-2)
    assert claim["epsilon_of_all_runs"] == epsilon({Release(0.5, 1.0): before + 3}, 1e-2)
    setting = job("central", data=CLASSES, federation={"rounds": 1}, privacy=CLIENT)
    before = len(entries(central(ring)))
    assert before >= promised.central_before + 3
    claim = ring.whole().run(setting)["privacy"]
    assert len(entries(central(ring))) == before + 1
    assert claim["epsilon"] == epsilon({Release(0.5, 1.0): 1}, 1e-2)
    assert claim["epsilon_of_all_runs"] == epsilon({Release(0.5, 1.0): before + 1}, 1e-2)


def test_noise_in_a_secure_sum_is_charged_at_each_site(ring: Ring) -> None:
    privacy = EXAMPLE | {"where": "distributed"}
    setting = job("distributed", data=CLASSES, federation={"rounds": 1}, privacy=privacy)
    result = ring.whole().run(setting)
    claim = result["privacy"]
    assert claim["epsilon"] == epsilon({Release(1.0, 0.25): 1}, 1e-4)
    assert claim["where"] == "distributed" and not claim["seeded_noise"]
    lasts = [entries(ledger_of(ring, client))[-1] for client in CLIENTS]
    assert [(last["round"], last["count"], last["noise_multiplier"]) for last in lasts] == [(1, 1, 1.0)] * 3
    assert len({last["job"] for last in lasts}) == 1
    assert all(len(last["data"]) == 64 for last in lasts)
    assert result["final"]["clients"] == {}
    assert [line["loss"] for line in result["rounds"]] == [None]


def test_a_site_that_dies_in_a_secure_sum_stops_the_round_and_not_the_run(ring: Ring) -> None:
    """Three clients are the fewest for a sum, so a round without one is tried again when it is back.

    A sum in which none dies has the bits of the simulation, too: tests/federation/test_wire.py.
    """
    setting = job("secure-killed", data=CLASSES, federation={"secure_aggregation": True, "rounds": 1})
    federation, out = ring.whole(), ring.federation.folder / "secure-killed"
    held = ring.hold("secure-killed", 1)
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of secure-killed: masked sum client-0000")
    ring.alone().kill()
    held.unlink()
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)
    assert [line["trained"] for line in result_of(out)["rounds"]] == [3]


def test_a_real_run_with_seeded_noise_is_refused_in_one_line(ring: Ring) -> None:
    setting = job("seeded", data=CLASSES, privacy=CLIENT | {"seeded_noise": True})
    submitted = ring.whole().submit(setting, ring.federation.folder / "seeded")
    assert submitted.ends() != 0
    assert "privacy.seeded_noise: anybody who has the job can subtract" in submitted.text()
    assert "Traceback" not in submitted.text()
    assert status(ring.federation.server).online


def test_sites_take_turns_under_noise_that_is_correlated_over_rounds(ring: Ring) -> None:
    setting = job(
        "banded", data=CLASSES, federation={"cohort": 1, "rounds": 4},
        privacy=CLIENT | {"mechanism": "banded", "bands": 3},
    )  # fmt: skip
    before = len(entries(central(ring)))
    result = ring.whole().run(setting)
    cohorts = [line["cohort"] for line in result["rounds"]]
    assert sorted(cohorts[:3]) == [[client] for client in CLIENTS] and cohorts[3] == cohorts[0]
    charged = entries(central(ring))[before:]
    assert [line["round"] for line in charged] == [1, 2, 3, 4]
    assert len({line["data"] for line in charged}) == 1 and len(charged[0]["data"]) == 64
    # The site of round 1 takes part in round 4 again: a whole column, and the first number of another.
    first = 1 / (1 + 1 / 4 + 9 / 64)
    assert result["privacy"]["sensitivity"] == pytest.approx((1 + first) ** 0.5)
    assert result["privacy"]["epsilon"] == pytest.approx(
        epsilon({Release(0.5 / (1 + first) ** 0.5, 1.0): 1}, 1e-2), rel=1e-6
    )
