"""What the server asks of nodes over a grid that loses messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from protocol.job import Job
from protocol.messages import Hello, hello_to_json
from server import app
from server.app import FlowerCarrier

NODE = 7


@dataclass
class LossyGrid:
    """One node, which answers every greeting but the first ones."""

    lost: int
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
        hello = hello_to_json(Hello("north", {}, 12))
        content = RecordDict({"hellos": ConfigRecord({"json": [hello]})})
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=name),
                has_error=lambda: False,
                content=content,
            )
            for name in found
        ]


def test_a_greeting_that_was_lost_is_sent_again_well_before_the_wait_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "HELLO_AGAIN_SECONDS", 0.2)
    for number in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, number, 1)
    grid = LossyGrid(lost=2)
    table = {
        "name": "lost",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {"source": "digits"},
        "backbone": {"name": "torchvision:squeezenet1_1"},
        "federation": {"clients": 1, "wait": 5},
    }
    roll = FlowerCarrier(cast(Grid, grid), "test").hello(Job.parse(table, origin="test"))
    assert (list(roll.names), roll.sizes.tolist()) == (["north"], [12])
    assert grid.pushed == 3
