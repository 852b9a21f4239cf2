"""Of a cohort that must stay secret nothing is said: not who is in it, and not how many."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import atoll.server.rounds.aggregation
import atoll.server.rounds.round_log
from atoll.errors import InconsistentUpdates, JobError
from atoll.job.job import Job
from atoll.protocol.messages import Failure, Reply
from atoll.protocol.requests import Request
from atoll.server.app import FlowerTransport
from atoll.server.rounds.central_dp import CentralDp
from atoll.server.run.checkpoint import latest
from atoll.server.run.run_job import run_job
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.scheduler import RETRIES, BlockScheduler
from atoll.sim.population.population import Population

CLIENTS = 8


def setting(**federation: Any) -> Job:
    table = {
        "name": "secret", "seed": 3,
        "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": CLIENTS, "cohort_rate": 0.5, "rounds": 2, "quorum": 0.5} | federation,
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
    }  # fmt: skip
    return Job.parse(table, origin="test")


class Failing(InlineTransport):
    """All clients fail whose number is below that."""

    below = 0

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Iterable[Reply]:
        for reply in super().send_and_receive(request, names, timeout):
            failed = int(reply.client[-4:]) < self.below
            yield Failure(reply.client, f"{reply.client} has a full disk") if failed else reply


@pytest.fixture
def visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., str]:
    """What a run says and writes when the last so many clients are drawn, of which some fail."""

    def play(drawn: int, below: int) -> str:
        def uniforms(self: Any, round: int, count: int) -> torch.Tensor:
            return (torch.arange(count) < count - drawn).double()

        monkeypatch.setattr(CentralDp, "sampling_uniforms", uniforms)
        caplog.clear()
        said, out = "", tmp_path / f"run-{drawn}-{below}"
        carrier = Failing.of(Population.of(setting()))
        carrier.below = below
        try:
            run_job(setting(), carrier, out, lambda learner: None)
        except InconsistentUpdates as error:
            said = str(error)
        files = [out / name for name in ("metrics.jsonl", "result.json", "report.html")]
        written = [path.read_text() for path in files if path.exists()]
        checkpoint = latest(out / "checkpoints", setting().hash)
        sent = [] if checkpoint is None else [checkpoint.bytes_up, checkpoint.bytes_down]
        return "\n".join([said, caplog.text, *written, json.dumps(sent)])

    return play


def without_noise(text: str) -> str:
    """Numbers with fractions, and hashes, are noise and time."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?|[0-9a-f]{32,}|run-\d-\d", "", text)


def test_below_the_quorum_it_is_said_that_too_few_replied_and_no_more(visible: Callable[..., str]) -> None:
    few, many = visible(2, CLIENTS), visible(5, CLIENTS)
    assert "round 1: too few of those who were drawn sent usable updates" in few
    assert "client-000" not in few + many and "disk" not in few + many
    assert without_noise(few) == without_noise(many)


def facts(text: str) -> list[Any]:
    """Of every round's line what isn't noise or time."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"round"')]
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "model_sha256"} for line in lines]


def test_a_round_says_the_same_whoever_takes_part(visible: Callable[..., str]) -> None:
    one, other = visible(3, 0), visible(7, CLIENTS - 6)
    assert facts(one) == facts(other) and len(facts(one)) == 2
    assert "client-000" not in one + other
    assert one.splitlines()[-1] == other.splitlines()[-1] == "[0, 0]"


def test_simulated_devices_do_not_tell_how_many_were_asked(tmp_path: Path) -> None:
    line = {"simulated": {"seconds": 2.0, "elapsed": 3.0, "unavailable": 4, "late": 1, "surplus": 2}}
    state = SimpleNamespace(round=1, tensors={})
    run = SimpleNamespace(setup=SimpleNamespace(job=setting()), state=state, update_bytes=lambda round: 8)
    public = atoll.server.rounds.round_log._public_fields(cast(Any, run), line)
    assert public["simulated"] == {"seconds": 2.0, "elapsed": 3.0}


def test_a_site_that_is_gone_or_sends_rubbish_has_no_name(caplog: pytest.LogCaptureFixture) -> None:
    open_job = Job.parse(
        json.loads(setting().canonical) | {"privacy": {"unit": "none"}}, origin="test"
    )  # fmt: skip
    for job, named in ((setting(), False), (open_job, True)):
        caplog.clear()
        carrier = FlowerTransport(cast(Any, None), "test", nodes={"client-0003": 5}, job=job)
        carrier._miss(5, patience=1.0)
        assert ("client-0003" in caplog.text) == named and "connection lost" in caplog.text


@pytest.mark.parametrize("tells", [True, False])
def test_a_worker_that_keeps_dying_names_no_client(tells: bool) -> None:
    shift: BlockScheduler[Any] = BlockScheduler(
        cast(Any, None), 1, cast(Any, None), cast(Any, None), tells_clients=tells
    )
    with pytest.raises(JobError) as error:
        for _ in range(RETRIES):
            shift._count_death(["client-0003", "client-0005"])
    assert ("client-0003 and 1 more" in str(error.value)) == tells


@pytest.mark.parametrize("room", [atoll.server.rounds.aggregation, atoll.server.rounds.round_log])
def test_a_planted_leak_is_found(
    room: Any, visible: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "unless_secret", lambda job, said, instead: said)
    if room is atoll.server.rounds.aggregation:
        few, many = visible(2, CLIENTS), visible(5, CLIENTS)
        assert without_noise(few) != without_noise(many) and "client-000" in few
    else:
        assert facts(visible(3, 0)) != facts(visible(7, CLIENTS - 6))
