"""Runs whose updates are compressed: the same bits everywhere, after kills too, and fewer of them sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.state import error_feedback
from atoll.client.state.store import ClientStateStore
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.protocol.compression import Compression, compress, decompress, flat
from atoll.protocol.messages import Update, encode_reply
from atoll.protocol.requests import Request, TrainRequest
from atoll.protocol.stacked_updates import stacked
from atoll.report.run_result import RunResult
from atoll.report.text import what_it_cost
from atoll.server.events import ignore_events
from atoll.server.run.directory import job_toml
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from tests.sim.test_simulation import job, kill_after, run
from tests.support.small import few_pictures

SCHEMES = ("fp16", "int8", "int4", "top-k", "sign")


def compressed(scheme: str, *, feedback: bool = True, **tables: Any) -> Job:
    federation = {"compression": scheme, "error_feedback": feedback} | tables.pop("federation", {})
    return job(federation=federation, **tables)


def hashes(result: RunResult) -> list[str]:
    return [line["model_sha256"] for line in result.rounds]


@pytest.mark.parametrize(
    ("scheme", "feedback"),
    [
        ("int4", True),
        ("top-k", True),
        ("int4", False),
        ("sign", True),
        *(
            pytest.param(scheme, feedback, marks=pytest.mark.slow)
            for scheme, feedback in (("fp16", True), ("int8", True), ("top-k", False))
        ),
    ],
)
def test_heads_have_the_same_bits_at_once_one_by_one_and_in_threads(
    tmp_path: Path, scheme: str, feedback: bool
) -> None:
    setting = compressed(scheme, feedback=feedback)
    results = [
        run(setting, tmp_path / str(number), **options)
        for number, options in enumerate(({}, {"engine": "loop"}, {"workers": 3}))
    ]
    assert hashes(results[0]) == hashes(results[1]) == hashes(results[2])
    assert not any(line["set_aside"] for line in results[0].rounds)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "top-k"])
@pytest.mark.processes
def test_networks_have_the_same_bits_in_one_process_and_in_several(tmp_path: Path, scheme: str) -> None:
    """A client's memory is reached from whichever process trains it."""
    setting = compressed(scheme, data=few_pictures(), tune={"method": "last-k"}, federation={"rounds": 2})
    results = [
        run(setting, tmp_path / str(number), **options)
        for number, options in enumerate(({}, {"engine": "loop"}, {"workers": 2}))
    ]
    assert hashes(results[0]) == hashes(results[1]) == hashes(results[2])


@pytest.mark.slow
@pytest.mark.processes
def test_ray_has_the_bits_of_one_process(tmp_path: Path) -> None:
    setting = compressed("int4", federation={"rounds": 3})
    inline, ray = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="ray", workers=2)
    assert hashes(inline) == hashes(ray)


@pytest.mark.slow
def test_every_way_to_compress_gives_other_bits_and_none_gives_the_old_ones(tmp_path: Path) -> None:
    twice = {"rounds": 2}
    plain = run(job(federation=twice), tmp_path / "plain")
    found = {plain.model_sha256}
    for scheme in SCHEMES:
        for feedback in (True, False):
            setting = compressed(scheme, feedback=feedback, federation=dict(twice))
            found.add(run(setting, tmp_path / f"{scheme}{feedback}").model_sha256)
    assert len(found) == 11
    assert not (tmp_path / "plain" / "memory").exists()


class Watched(InlineTransport):
    """Notes what clients send in every round."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        replies = super().send_and_receive(request, names, timeout)
        if isinstance(request, TrainRequest):
            self.sent.setdefault(request.round, []).extend(replies)
            self.models[request.round] = dict(request.tensors)
        return replies

    sent: dict[int, list[Update]] = {}  # noqa: RUF012 - made anew below
    models: dict[int, Any] = {}  # noqa: RUF012


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_sent_and_what_is_remembered_is_all_that_was_learnt(tmp_path: Path, scheme: str) -> None:
    """Sums of exact updates = sums of what arrived + memory: nothing is lost for good."""
    setting = compressed(scheme, train={"lr": 0.001}, federation={"cohort": 6, "rounds": 3})
    population = Population.of(setting)
    carrier = Watched.of(population, memory=ClientStateStore())
    carrier.sent, carrier.models = {}, {}
    run_job(setting, carrier, tmp_path / "r", cached_test_set(population, None))
    # the same training without compression, from the very models of the run
    exact = InlineTransport.of(population, memory=ClientStateStore())
    plain = job(train={"lr": 0.001}, federation={"cohort": 6, "rounds": 3})
    model = carrier.models[1]
    how = Compression.of(setting, model)
    assert how is not None
    learnt, arrived = torch.zeros(6, how.numbers), torch.zeros(6, how.numbers)
    data_info = json.loads((tmp_path / "r" / "result.json").read_text())["facts"]
    for round in (1, 2, 3):
        request = TrainRequest(
            plain.canonical, plain.hash, round, data_info, carrier.models[round], run="exact"
        )
        updates = exact.send_and_receive(request, population.names(plain), 60.0)
        learnt += flat(stacked(list(updates)).delta)  # type: ignore[arg-type]
        arrived += decompress(stacked(carrier.sent[round]).delta, how)
    run_name = next(iter(carrier.site.memory._held))[0]
    left = torch.stack(
        [
            carrier.site.memory.load_before(run_name, name, 4)[error_feedback.ERROR_KEY]
            for name in population.names(plain)
        ]
    )
    assert float(left.abs().max()) > 0
    torch.testing.assert_close(arrived + left, learnt, rtol=1e-4, atol=1e-6)


def test_bytes_up_are_those_of_the_messages_and_the_report_says_how_much_smaller(tmp_path: Path) -> None:
    for scheme, least in (("fp16", 2.0), ("int8", 3.9), ("int4", 7.7), ("top-k", 49.0), ("sign", 31.0)):
        setting = compressed(scheme, federation={"rounds": 1})
        population = Population.of(setting)
        carrier = Watched.of(population, memory=ClientStateStore())
        carrier.sent, carrier.models = {}, {}
        test_set, is_drawn = cached_test_set(population, None), scheme == "top-k"
        result = run_job(setting, carrier, tmp_path / scheme, test_set, report=is_drawn)
        bodies = [encode_reply(replace(u, states={}))[1] for u in carrier.sent[1]]
        values = sum(len(body) - 8 - int.from_bytes(body[:8], "little") for body in bodies)
        assert result.bytes_up == values
        smaller = result.compression["times_smaller"]
        assert smaller >= least and result.compression["scheme"] == scheme
        assert result.clients_trained * 4 * (512 * 10 + 10) == pytest.approx(values * smaller)
        assert f"compressed by {scheme}: uploads were {smaller:.1f} times smaller" in what_it_cost(result)
        if is_drawn:
            page = (tmp_path / scheme / "report.html").read_text()
            assert f"uploads were {smaller:.1f} times smaller" in page


class Breaks(InlineTransport):
    """Stops the run in a round, once its clients have trained and remember it."""

    at = 3

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        replies = super().send_and_receive(request, names, timeout)
        if isinstance(request, TrainRequest) and request.round == self.at:
            raise KeyboardInterrupt
        return replies


def interrupted(setting: Job, out: Path, at: int = 3) -> None:
    population = Population.of(setting)
    carrier = Breaks.of(population, memory=ClientStateStore(out / "memory", of_one_run=True))
    carrier.at = at
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, carrier, out, cached_test_set(population, None))


@pytest.mark.parametrize("scheme", ["int8", "top-k"])
def test_a_run_stopped_between_memory_and_checkpoint_resumes_to_the_same_bits(
    tmp_path: Path, scheme: str
) -> None:
    setting = compressed(scheme)
    whole = run(setting, tmp_path / "whole")
    interrupted(setting, tmp_path / "r")
    assert hashes(run(setting, tmp_path / "r", resume=True)) == hashes(whole)


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_bits(
    tmp_path: Path,
) -> None:
    setting = compressed("int4", federation={"cohort": 6, "rounds": 5})
    whole = run(setting, tmp_path / "whole")
    interrupted(setting, tmp_path / "r", at=4)
    last = tmp_path / "r" / "checkpoints" / "round-000003.safetensors"
    last.write_bytes(last.read_bytes()[:-3])
    assert hashes(run(setting, tmp_path / "r", resume=True)) == hashes(whole)


def test_a_run_that_was_moved_remembers(tmp_path: Path) -> None:
    setting = compressed("int4")
    whole = run(setting, tmp_path / "whole")
    interrupted(setting, tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "moved")
    assert hashes(run(setting, tmp_path / "moved", resume=True)) == hashes(whole)


def test_memory_matters_and_a_run_started_anew_has_none(tmp_path: Path) -> None:
    import shutil

    setting = compressed("int4")
    whole = run(setting, tmp_path / "whole")
    interrupted(setting, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "memory")
    assert hashes(run(setting, tmp_path / "r", resume=True)) != hashes(whole)
    assert hashes(run(setting, tmp_path / "r", force=True)) == hashes(whole)


def test_damaged_memory_ends_the_run_in_one_line_that_names_the_file(tmp_path: Path) -> None:
    setting = compressed("int4", federation={"cohort": 6})
    interrupted(setting, tmp_path / "r")
    path = tmp_path / "r" / "memory" / "client-0002" / "run" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"client-0002/run/round-000002\.safetensors: is damaged"):
        run(setting, tmp_path / "r", resume=True)


def test_a_round_that_is_tried_again_finds_the_memory_it_found_first(tmp_path: Path) -> None:
    setting = compressed("int4", federation={"quorum": 1.0})
    whole = run(setting, tmp_path / "whole")

    class Loses(InlineTransport):
        """In rounds 2 and 3 the first answer of one client is lost."""

        tried: dict[int, int] = {}  # noqa: RUF012 - made anew below

        def send_and_receive(self, request: Request, names: Any, timeout: float) -> Iterable[Any]:
            replies = list(super().send_and_receive(request, names, timeout))
            self.tried[request.round] = self.tried.get(request.round, 0) + 1
            lost = (
                isinstance(request, TrainRequest)
                and request.round in (2, 3)
                and self.tried[request.round] == 1
            )
            return replies[1:] if lost else replies

    population = Population.of(setting)
    carrier = Loses.of(population, memory=ClientStateStore())
    carrier.tried = {}
    again = run_job(setting, carrier, tmp_path / "r", cached_test_set(population, None))
    assert carrier.tried[2] == carrier.tried[3] == 2
    assert hashes(again) == hashes(whole)


@pytest.mark.slow
@pytest.mark.processes
def test_a_compressed_run_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    setting = compressed("int4", federation={"rounds": 40})
    expected = hashes(run(setting, tmp_path / "whole"))
    (tmp_path / "job.toml").write_text(job_toml(setting))
    for attempt, (rounds, last) in enumerate(((3, 5), (9, 16), (14, 34))):
        kill_after(rounds, last, attempt, tmp_path / "job.toml", tmp_path / "r")
    assert hashes(run(setting, tmp_path / "r", resume=True)) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_update_that_is_not_finite_is_set_aside_and_does_not_spoil_memory(scheme: str) -> None:
    setting = compressed(scheme)
    model = {"w": torch.zeros(20, 20)}
    how = Compression.of(setting, model)
    assert how is not None
    memory = ClientStateStore()

    def sent(round: int, value: float) -> dict[str, torch.Tensor]:
        request = TrainRequest(setting.canonical, setting.hash, round, {}, model, run="r")
        delta = {"w": torch.full((20, 20), 0.3) + torch.eye(20) * 0.7}
        delta["w"][3, 3] = value
        [update] = error_feedback.compressed([Update("a", round, delta, 1)], request, setting, memory)
        return {name: tensor.unsqueeze(0) for name, tensor in update.delta.items()}

    sent(1, 0.1)
    before = memory.load_before("r", "a", 2)[error_feedback.ERROR_KEY]
    assert not torch.isfinite(decompress(sent(2, float("nan")), how)).any()
    assert torch.equal(memory.load_before("r", "a", 3)[error_feedback.ERROR_KEY], before)
    assert torch.isfinite(decompress(sent(3, 0.2), how)).all()


def test_the_first_rounds_message_is_the_plain_compression_of_the_update() -> None:
    setting = compressed("int8")
    model = {"w": torch.zeros(20, 20)}
    request = TrainRequest(setting.canonical, setting.hash, 1, {}, model, run="r")
    delta = {"w": torch.randn(20, 20, generator=torch.Generator().manual_seed(5))}
    [update] = error_feedback.compressed([Update("a", 1, delta, 1)], request, setting, ClientStateStore())
    expected = compress(delta["w"].reshape(1, -1), Compression("int8", 400))
    assert all(torch.equal(update.delta[name], expected[name][0]) for name in expected)


def test_worker_processes_without_a_place_for_memory_are_refused() -> None:
    from atoll.sim.engines.process_pool import PooledTransport

    with pytest.raises(ValueError, match="expected the run's directory"):
        PooledTransport(Population.of(compressed("int8")), 2)


def test_results_and_reports_of_a_simulation_carry_the_scheme(tmp_path: Path) -> None:
    result = simulate(
        compressed("int8", federation={"rounds": 1}), tmp_path / "r", on_event=ignore_events, report=False
    )
    assert result.compression == {"scheme": "int8", "times_smaller": pytest.approx(3.94, abs=0.01)}
    assert run(job(federation={"rounds": 1}), tmp_path / "s").compression is None
