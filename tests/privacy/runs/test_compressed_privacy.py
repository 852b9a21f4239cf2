"""Compression under a promise of privacy: what may be said of it, and bugs that would make it a lie.

Clients are protected by the clip at the server, which comes after decompression, whatever a client sends
and remembers. Examples are protected by their own noise: messages and memory follow from noised updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import atoll.client.dispatch
from atoll.client.site import Site
from atoll.client.state import error_feedback
from atoll.client.state.error_feedback import ERROR_KEY
from atoll.client.state.store import ClientStateStore
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol import compression
from atoll.protocol.messages import Update
from atoll.protocol.requests import Request, TrainRequest
from atoll.server.events import ignore_events
from atoll.server.rounds import decompression
from atoll.server.rounds.validation import ValidatedUpdates, validate_updates
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.privacy import detectors
from tests.privacy import watchdogs as w
from tests.privacy.detectors import Detected, adversaries

SCHEMES = ("fp16", "int8", "int4", "top-k", "sign")
STATES = {"train_loss.sum": torch.tensor(1.0).double(), "train_loss.count": torch.tensor(2.0).double()}


def job(scheme: str, privacy: dict[str, Any], **federation: Any) -> Job:
    table = {"clients": w.COHORT, "rounds": 3, "compression": scheme, "compression_top_k": 0.2, **federation}
    if scheme != "top-k":
        del table["compression_top_k"]
    return w.job(privacy, federation=table)


def arrived(updates: Sequence[Update], scheme: str) -> ValidatedUpdates:
    """What the server has of those updates, whose clients remember more than they may ever contribute."""
    setting, memory = job(scheme, w.clients()), ClientStateStore()
    numbers = compression.numbers_of(w.MODEL)
    request = TrainRequest(setting.canonical, setting.hash, 1, {}, w.MODEL, run="r")
    memory.save("r", 0, {u.client: {ERROR_KEY: torch.full((numbers,), 50.0)} for u in updates})
    told = [replace(u, states=STATES, num_examples=1) for u in updates]
    sent = error_feedback.compressed(iter(told), request, setting, memory)
    whole = decompression.decompressed(sent, setting, w.MODEL)
    return validate_updates(whole, [u.client for u in updates], w.MODEL, 1, blind=True)


def a_client_that_remembers_moves_the_sum_by_the_clipping_norm(scheme: str) -> None:
    detectors.check_sensitivity(
        lambda updates: w.central(w.Quiet, arrived(updates, scheme).updates, w.MODEL),
        w.people(w.MODEL), list(adversaries(w.MODEL)), w.C,
    )  # fmt: skip


def what_the_server_tells_of_messages_does_not_depend_on_values(scheme: str) -> None:
    def counted(update: Update) -> Any:
        found = arrived([replace(update, client="a")], scheme)
        return found.num_valid, found.set_aside, [u.num_examples for u in found.updates]

    ordinary = counted(w.people(w.MODEL)[0])
    for update in adversaries(w.MODEL):
        detectors.check_silence(ordinary, counted(update), update.client)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "check",
    [
        a_client_that_remembers_moves_the_sum_by_the_clipping_norm,
        what_the_server_tells_of_messages_does_not_depend_on_values,
    ],
)
def test_a_clients_promise_holds_whatever_it_sends_and_remembers(
    check: Callable[[str], None], scheme: str
) -> None:
    check(scheme)


Plant = Callable[[pytest.MonkeyPatch], None]


def feedback_at_the_server(patch: pytest.MonkeyPatch) -> None:
    """What clients' messages lost is added to the sum behind the clip."""
    original = w.Quiet.privatize

    def merged(self: Any, round: int, updates: Any, model: Any, state: Any) -> Any:
        noised, kept = original(self, round, updates, model, state)
        lost = {n: t + 0.4 * len(updates) / w.COHORT for n, t in noised.delta.items()}
        return replace(noised, delta=lost), kept

    patch.setattr(w.Quiet, "privatize", merged)


def sizes_by_values(patch: pytest.MonkeyPatch) -> None:
    """Only what isn't zero is sent, so that a message's size tells of the data."""
    original = error_feedback.compressed

    def compressed(updates: Any, request: Any, setting: Any, memory: Any) -> Any:
        for update in original(updates, request, setting, memory):
            large = float(update.delta["scales"].max()) > 1e5
            short = {name: t[: len(t) // 2] for name, t in update.delta.items()}
            yield replace(update, delta=short) if large else update

    patch.setattr(error_feedback, "compressed", compressed)


def looks_at_values(patch: pytest.MonkeyPatch) -> None:
    """An update that isn't finite is set aside by name."""
    original = decompression._whole
    patch.setattr(
        decompression,
        "_whole",
        lambda reply, how, model, blind: original(reply, how, model, blind=False),
    )


def clips_what_travels(patch: pytest.MonkeyPatch) -> None:
    """The clip is applied to the message, and what it stands for is larger."""
    original = w.Quiet.privatize

    def merged(self: Any, round: int, updates: Any, model: Any, state: Any) -> Any:
        noised, kept = original(self, round, updates, model, state)
        return replace(noised, delta={n: 3 * t for n, t in noised.delta.items()}), kept

    patch.setattr(w.Quiet, "privatize", merged)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (feedback_at_the_server, a_client_that_remembers_moves_the_sum_by_the_clipping_norm),
        (clips_what_travels, a_client_that_remembers_moves_the_sum_by_the_clipping_norm),
        (sizes_by_values, what_the_server_tells_of_messages_does_not_depend_on_values),
        (looks_at_values, what_the_server_tells_of_messages_does_not_depend_on_values),
    ],
)
def test_bugs_that_would_break_a_clients_promise_are_found(
    plant: Plant, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Detected):
        check("int8")


def example_job(scheme: str, **privacy: Any) -> Job:
    return job(scheme, w.examples(seeded_noise=True, steps=2, **privacy), clients=3)


def answers(setting: Job, name: str, patch: pytest.MonkeyPatch) -> Any:
    """What a client sends and remembers in three rounds, in which its noised updates are given ones."""
    population = Population.of(setting)
    site = Site(population, ledgers=w.PrivacyLedgers(w.new_folder()))
    data_info = population.roster(setting).data_info[0]
    learner = Learner.of(setting, task_named(setting.task.name), data_info)
    data_info = data_info | {"backbone": learner.backbone.fingerprint}
    model = learner.initial()

    def noised(work: Any, request: TrainRequest, starts: Any = None, job: Job | None = None) -> Any:
        draw = torch.Generator().manual_seed(request.round)
        for owner in work.data.names:
            delta = {n: torch.randn(t.shape, generator=draw) for n, t in model.items()}
            yield Update(owner, request.round, delta, *private_part(work.private, owner))

    def private_part(private: Any, owner: str) -> Any:
        told = private.public_fields([owner])
        return told[0][0], {key: value[0] for key, value in told[1].items()}

    patch.setattr(atoll.client.dispatch, "updates_of", noised)
    found: list[Any] = []
    for round in (1, 2, 3):
        request = TrainRequest(setting.canonical, setting.hash, round, data_info, model, run="r")
        for reply in site.answer(request, [name]):
            assert isinstance(reply, Update)
            found += [reply.delta, reply.num_examples, reply.states]
        found.append(site.memory.load_before("r", name, round + 1))
    return found


def messages_and_memory_follow_from_noised_updates(scheme: str, patch: pytest.MonkeyPatch) -> None:
    """Two clients with other examples and the same noised updates send and remember the same."""
    setting = example_job(scheme)
    told = [answers(setting, name, patch) for name in ("client-0000", "client-0001")]
    detectors.check_silence(told[0], told[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_sent_and_remembered_of_examples_follows_from_the_noised_updates(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages_and_memory_follow_from_noised_updates(scheme, monkeypatch)


@pytest.mark.parametrize("where", ["message", "memory"])
def test_a_feedback_that_knows_more_than_the_noised_update_is_found(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the error were taken before the noise was added: something of the client's own gets in."""
    original = atoll.client.dispatch.compressed

    def leaking(updates: Any, request: Request, setting: Job, memory: ClientStateStore) -> Any:
        population = Population.of(setting)
        for update in updates:
            own = float(len(population.dataset(setting, update.client)))
            if where == "message":
                update = replace(update, delta={n: t + own for n, t in update.delta.items()})
            yield from original(iter([update]), request, setting, memory)
            if where == "memory":
                state = memory.load_before("r", update.client, request.round + 1)
                memory.save("r", request.round, {update.client: state | {"own": torch.tensor(own)}})

    monkeypatch.setattr(atoll.client.dispatch, "compressed", leaking)
    with pytest.raises(Detected):
        messages_and_memory_follow_from_noised_updates("int8", monkeypatch)


PROMISES = {
    "client": w.clients(seeded_noise=True),
    "adaptive": w.clients(seeded_noise=True, clipping="adaptive"),
    "example": w.examples(seeded_noise=True, steps=2),
    "both": {
        "unit": "both", "seeded_noise": True,
        "client": {key: value for key, value in w.clients().items() if key != "unit"},
        "example": {key: value for key, value in w.examples().items() if key != "unit"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "unit", ["client", "example", *(pytest.param(u, marks=pytest.mark.slow) for u in ("adaptive", "both"))]
)
def test_private_runs_have_the_same_bits_at_once_and_one_by_one(tmp_path: Path, unit: str) -> None:
    setting = job("int8", PROMISES[unit])
    results = [
        simulate(setting, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "loop")
    ]
    assert results[0].model_sha256 == results[1].model_sha256
    assert results[0].bytes_up < results[0].bytes_down / 3
    plain = setting.model_copy(
        update={"federation": setting.federation.model_copy(update={"compression": None})}
    )
    said = simulate(plain, tmp_path / "plain", on_event=ignore_events, report=False).privacy
    assert results[0].privacy == said  # compression changes nothing of the claim


def test_expected_bytes_hide_who_took_part(tmp_path: Path) -> None:
    setting = job("int8", w.clients(seeded_noise=True), clients=4, cohort_rate=0.5)
    result = simulate(setting, tmp_path / "r", on_event=ignore_events, report=False)
    size = compression.Compression("int8", 1930).bytes  # ten classes of 192 numbers, and biases
    assert [line["bytes_up"] for line in result.rounds] == [2 * size, 4 * size, 6 * size]


@pytest.mark.parametrize(
    "privacy",
    [
        w.clients(where="distributed"),
        w.examples(where="distributed"),
        {
            "unit": "both",
            "client": {key: value for key, value in w.clients(where="distributed").items() if key != "unit"},
            "example": {key: value for key, value in w.examples().items() if key != "unit"},
        },
    ],
)
def test_secure_sums_refuse_compression_by_name(privacy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"federation\.compression: a secure sum adds whole numbers"):
        job("int8", privacy)


class Rubbish(InlineTransport):
    """One client's scales are no numbers, and one's message is too short."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            if isinstance(reply, Update) and reply.client == "client-0000":
                scales = torch.full_like(reply.delta["scales"], torch.nan)
                reply = replace(reply, delta=reply.delta | {"scales": scales})
            if isinstance(reply, Update) and reply.client == "client-0001":
                reply = replace(reply, delta=reply.delta | {"values": reply.delta["values"][1:]})
            yield reply


@pytest.mark.parametrize("unit", ["client", "example", "both"])
def test_a_hostile_message_never_reaches_the_model_and_is_named_where_that_tells_nothing(
    tmp_path: Path, unit: str
) -> None:
    setting = job("int8", PROMISES[unit], quorum=0.2)
    population = Population.of(setting)
    carrier = Rubbish.of(population, ledgers=w.PrivacyLedgers(tmp_path / "ledgers"))
    result = run_job(setting, carrier, tmp_path / "r", cached_test_set(population, None))
    aside = result.rounds[0]["set_aside"]
    assert "values have shape (1929,), expected (1930,)" in aside["client-0001"]
    if unit == "example":
        assert "scales are not all finite" in aside["client-0000"]
    else:
        assert set(aside) == {"client-0001"}  # what isn't finite counts as zero
    model = load((tmp_path / "r" / "model" / "model.safetensors").read_bytes())
    assert all(bool(torch.isfinite(t).all()) for t in model.values())
