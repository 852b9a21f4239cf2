"""The process that works for a site: whatever a network does to a task, it is there for the next one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import (
    HEARTBEAT_BASE_MULTIPLIER,
    HEARTBEAT_CALL_TIMEOUT,
    HEARTBEAT_RANDOM_RANGE,
    ErrorCode,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from atoll.client.deploy import executor as rooms
from atoll.client.deploy.executor import Executor
from atoll.kit.code_hashes import installed_hashes
from atoll.server.deploy.heard import SILENT_SECONDS
from tests.support.memory_grid import in_a_server_app
from tests.support.processes import python

FAULTS = [
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("too late"),
    ObjectPullError("1234", "its sender is gone"),
    ObjectPushError("1234", 1, "session"),
    RuntimeError("its run was stopped before its message had arrived"),
]


def executor() -> Executor:
    return Executor(
        "127.0.0.1:1", b"secret", lambda message, context: message, installed_hashes(), {"name": "north"}
    )


@pytest.mark.parametrize("step", ["pull_task_input", "push_message", "push_task_output"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_task_that_a_fault_ends_does_not_end_the_site(
    step: str, fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[str] = []

    def pulled(client: Any) -> Any:
        steps.append("pull_task_input")
        message = SimpleNamespace(metadata=SimpleNamespace(message_type="train"))
        return message, SimpleNamespace(), SimpleNamespace(run_id=1), SimpleNamespace(content=b"")

    def failing(name: str, work: Any) -> Any:
        def stage(*arguments: Any) -> Any:
            if name == step:
                raise fault
            return work(*arguments)

        return stage

    site = executor()
    monkeypatch.setattr(site, "_answer", lambda message, context, run, fab: message)
    for name, work in {
        "pull_task_input": pulled,
        "push_message": lambda client, message, context: steps.append("push_message"),
        "push_task_output": lambda *arguments: steps.append("push_task_output"),
    }.items():
        monkeypatch.setattr(rooms, name, failing(name, work))
    site._work("token")
    assert "a task was withdrawn, or its reply was lost" in caplog.text and "\n" not in caplog.messages[-1]
    assert not site.working
    monkeypatch.undo()
    assert step not in steps


def test_what_an_app_raises_is_told_by_its_kind_alone() -> None:
    """The text of an error may quote the data."""

    def failing(message: Message, context: Context) -> Message:
        raise ValueError("Ann Smith, born 1970")

    site = executor()
    site.app, site.accepted = failing, {"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    context = cast(Context, SimpleNamespace(node_config={}, state=None))
    with in_a_server_app():
        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        reply = site._answer(message, context, 1, b"")
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason == "ValueError; the site's log has the rest"


SUPERNODE = """
import threading, time
from atoll.client.deploy import executor

def flower_supernode():
    threading.Thread(target=time.sleep, args=(600,)).start()  # Flower's HTTP server, which goes on
    {part}

executor.flower_supernode = flower_supernode
executor.supernode()
"""
ENDS = {
    "its connection": ("pass", "the SuperNode's connection has ended"),
    "its heartbeats": (
        "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(600)",
        "a thread of the SuperNode ended: ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("part", ENDS)
@pytest.mark.processes
def test_a_supernode_ends_with_any_of_its_parts_so_that_it_is_started_again(part: str) -> None:
    """Left alone it would live on, and its site would be deaf for good."""
    code, said = ENDS[part]
    process = python(SUPERNODE.format(part=code))
    assert process.communicate()[1].splitlines()[-1] == said
    assert process.returncode == 1


def test_heartbeats_come_before_a_site_that_trains_counts_as_silent() -> None:
    longest = (rooms.HEARTBEAT_SECONDS - HEARTBEAT_CALL_TIMEOUT) * (
        HEARTBEAT_BASE_MULTIPLIER + max(HEARTBEAT_RANDOM_RANGE)
    )
    assert 0 < longest < SILENT_SECONDS / 2
