"""Promises kept by real processes: ledgers in the kits, secure sums under masks, budgets of sites."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from privacy.accounting import Release, epsilon
from server.submit import status
from tests.federation.conftest import CLIENTS, Ring, job
from tests.federation.places import result_of

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]

CLASSES = {"classes": [str(digit) for digit in range(10)]}
EXAMPLE = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5,
}  # fmt: skip
CLIENT = {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-2, "clipping_norm": 0.5}


def entries(path: Path) -> list[dict[str, Any]]:
    """A ledger's charges as they stand in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def ledger_of(ring: Ring, client: str, kind: str = "") -> Path:
    kit = "client-0000" if client == "client-0000" else "pair"
    return ring.federation.kits[kit] / "state" / "ledgers" / f"{client}{kind}.jsonl"


def test_a_secure_sum_over_real_sites_has_the_bits_of_the_simulation(ring: Ring) -> None:
    setting = job("secure", federation={"secure_aggregation": True})
    result = ring.whole().run(setting)
    assert result["model_sha256"] == ring.expected(setting)
    assert [line["trained"] for line in result["rounds"]] == [3, 3]


def test_a_site_that_dies_in_a_secure_sum_stops_the_round_and_not_the_run(ring: Ring) -> None:
    """Three clients are the fewest for a sum, so a round without one is tried again when it is back."""
    setting = job("secure-killed", federation={"secure_aggregation": True})
    federation, out = ring.whole(), ring.federation.folder / "secure-killed"
    held = ring.hold("secure-killed", 1)
    submitted = federation.submit(setting, out)
    ring.alone().says("round 1 of secure-killed: mask client-0000")
    ring.alone().kill()
    held.unlink()
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    assert result_of(out)["model_sha256"] == ring.expected(setting)


def test_noise_of_clients_is_charged_at_each_site_before_it_leaves(ring: Ring) -> None:
    for where, kind in (("client", ""), ("distributed", "")):
        setting = job(f"noise-{where}", data=CLASSES, privacy=EXAMPLE | {"where": where})
        result = ring.whole().run(setting)
        claim = result["privacy"]
        per_round = 4 if where == "client" else 1
        cost = Release(1.0, 0.25)
        assert claim["epsilon"] == epsilon({cost: 2 * per_round}, 1e-4)
        assert claim["where"] == where and not claim["seeded_noise"]
        for client in CLIENTS:
            last = entries(ledger_of(ring, client, kind))[-2:]
            assert [(line["round"], line["count"], line["noise_multiplier"]) for line in last] == [
                (1, per_round, 1.0), (2, per_round, 1.0),
            ]  # fmt: skip
            assert len({line["job"] for line in last}) == 1
            assert all(len(line["data"]) == 64 for line in last)
        assert result["final"]["clients"] == {}
        assert all(line["loss"] is None for line in result["rounds"])


def test_noise_at_the_server_is_charged_in_its_kit_across_runs(ring: Ring) -> None:
    path = ring.federation.server / "state" / "ledger.jsonl"
    for times in (1, 2):
        setting = job(f"central-{times}", data=CLASSES, privacy=CLIENT)
        claim = ring.whole().run(setting)["privacy"]
        assert len(entries(path)) == 2 * times
        assert claim["epsilon"] == epsilon({Release(0.5, 1.0): 2}, 1e-2)
        assert claim["epsilon_of_all_runs"] == epsilon({Release(0.5, 1.0): 2 * times}, 1e-2)


def test_a_site_whose_budget_is_spent_says_so_and_the_run_goes_on_without_it(ring: Ring) -> None:
    kit = ring.federation.kits["client-0000"] / "kit.toml"
    before = kit.read_text()
    assert ring.whole().running["client-0000"].end() == 0
    shutil.move(ledger_of(ring, "client-0000"), ring.federation.folder / "old-ledger.jsonl")
    enough = epsilon({Release(1.0, 0.25): 4}, 1e-4)
    kit.write_text(f"{before}\n[budget]\nepsilon = {enough}\ndelta = 1e-4\n")
    try:
        setting = job("budget", data=CLASSES, privacy=EXAMPLE)
        first, second = ring.whole().run(setting)["rounds"]
        assert first["set_aside"] == {}
        assert second["set_aside"] == {
            "client-0000": "the site's privacy budget for this client's data is spent"
        }
        assert len(entries(ledger_of(ring, "client-0000"))) == 1
    finally:
        kit.write_text(before)
        ring.alone().end()


def test_a_site_killed_while_it_trains_in_private_is_charged_for_both_tries(ring: Ring) -> None:
    setting = job("killed-private", data=CLASSES, privacy=EXAMPLE)
    federation, out = ring.whole(), ring.federation.folder / "killed-private"
    held = ring.hold("killed-private", 2)
    before = len(entries(ledger_of(ring, "client-0000")))
    submitted = federation.submit(setting, out)
    ring.alone().says("round 2 of killed-private: train client-0000")
    ring.alone().kill()
    held.unlink()
    ring.alone()
    assert submitted.ends() == 0, submitted.text()
    charged = [line["round"] for line in entries(ledger_of(ring, "client-0000"))[before:]]
    assert charged == [1, 2, 2]
    assert result_of(out)["privacy"]["releases"] == 4 * len(charged)


def test_a_real_run_with_seeded_noise_is_refused_in_one_line(ring: Ring) -> None:
    setting = job("seeded", data=CLASSES, privacy=CLIENT | {"seeded_noise": True})
    submitted = ring.whole().submit(setting, ring.federation.folder / "seeded")
    assert submitted.ends() != 0
    assert "privacy.seeded_noise: anybody who has the job can subtract" in submitted.text()
    assert "Traceback" not in submitted.text()
    assert status(ring.federation.server).online
