"""What the server asks of nodes over a grid that loses messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from atoll.job.job import Job
from atoll.protocol.flower_content import bodies_of, packed, packed_greetings
from atoll.protocol.messages import Hello, Measurement, encode_reply, hello_to_json
from atoll.protocol.requests import EvaluateRequest
from atoll.server import app
from atoll.server.app import FlowerTransport
from tests.support.clock import TurnedClock
from tests.support.memory_grid import in_a_server_app

NODE = 7


@dataclass
class LossyGrid:
    """One node, which answers every message but the first ones."""

    lost: int
    answer: RecordDict
    pushed: int = 0
    waiting: dict[str, Message] = field(default_factory=dict)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=NODE, name="north", last_activated_at="now")]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            self.pushed += 1
            names.append(f"message-{self.pushed}")
            if self.pushed > self.lost:
                self.waiting[names[-1]] = message
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        found = [name for name in message_ids if self.waiting.pop(name, None) is not None]
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=name),
                has_error=lambda: False,
                content=self.answer,
            )
            for name in found
        ]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    """The carrier's."""
    turned = TurnedClock()
    monkeypatch.setattr(app, "time", turned)
    return turned


@pytest.fixture(autouse=True)
def in_an_app() -> Iterator[None]:
    with in_a_server_app():
        yield


def test_a_greeting_that_was_lost_is_sent_again_well_before_the_wait_is_over(clock: TurnedClock) -> None:
    hello = hello_to_json(Hello("north", {"classes": ["a", "b"]}, 12))
    grid = LossyGrid(lost=2, answer=packed_greetings([hello]))
    table = {
        "name": "lost",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {"source": "digits"},
        "backbone": {"name": "torchvision:squeezenet1_1"},
        "federation": {"clients": 1, "wait": 60},
    }
    roster = FlowerTransport(cast(Grid, grid), "test").discover_clients(Job.parse(table, origin="test"))
    assert (list(roster.names), roster.sizes.tolist()) == (["north"], [12])
    assert grid.pushed == 3 and clock.now < 1000 + 20


def measured() -> RecordDict:
    head, body = encode_reply(Measurement("north", 1, 12, {"seen": torch.tensor(5)}))
    return packed({"north": head}, bodies_of({"north": body}))


REQUEST = EvaluateRequest("{}", "", 1, {}, {"w": torch.zeros(2)})


def test_a_request_that_was_lost_is_sent_again_before_a_short_round_is_over() -> None:
    grid = LossyGrid(lost=2, answer=measured())
    carrier = FlowerTransport(cast(Grid, grid), "test", nodes={"north": NODE})
    (reply,) = carrier.send_and_receive(REQUEST, ["north"], timeout=2.0)
    assert isinstance(reply, Measurement) and reply.num_examples == 12
    assert grid.pushed == 3


@pytest.mark.parametrize("timeout", [12.0, 300.0])
def test_a_node_that_never_answers_is_waited_for_until_the_deadline_and_not_longer(
    timeout: float, clock: TurnedClock
) -> None:  # rows 5, 9
    grid = LossyGrid(lost=10**6, answer=measured())
    carrier = FlowerTransport(cast(Grid, grid), "test", nodes={"north": NODE})
    assert list(carrier.send_and_receive(REQUEST, ["north"], timeout=timeout)) == []
    assert timeout <= clock.now - 1000 <= timeout + 1
