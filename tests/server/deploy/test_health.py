"""Health by the standard gRPC protocol, asked with gRPC's own stub over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.server.deploy.health import Health, address_from, answered
from atoll.server.deploy.status import Run
from atoll.system.child_process import free_port
from tests.federation.places import provisioned

WATCHDOG = 600.0
"""Seconds that no answer takes, however busy the machine is: only a hang ends a wait."""
STATES = HealthCheckResponse


@contextmanager
def probe(address: str) -> Iterator[HealthStub]:
    with grpc.insecure_channel(address) as channel:
        yield HealthStub(channel)


def state(stub: HealthStub, name: str = "") -> str:
    """What a probe is answered, as gRPC's `grpc_health_probe` asks."""
    try:
        answer = stub.Check(HealthCheckRequest(service=name), timeout=WATCHDOG)
    except grpc.RpcError as error:
        return str(error.code().name)
    return str(STATES.ServingStatus.Name(answer.status))


def states(stub: HealthStub, name: str) -> Iterator[str]:
    """The state of a name, and each one that it changes to."""
    for answer in stub.Watch(HealthCheckRequest(service=name), timeout=WATCHDOG):
        yield str(STATES.ServingStatus.Name(answer.status))


def run_of(run_id: int, status: str = "running") -> Run:
    return Run(run_id, status, "completed" if status == "finished" else "", "", "")


def test_the_server_is_serving_only_while_it_can_accept_a_job() -> None:
    health = Health()
    with answered(health, None) as address, probe(address) as stub:
        for expected in ("the server is starting", "", "the superlink ended", ""):
            if expected:
                health.not_serving(expected)
            else:
                health.serving()
            assert health.trouble == expected
            assert {state(stub), state(stub, "atoll.federation")} == {
                "NOT_SERVING" if expected else "SERVING"
            }
        health.stop()
        health.serving()
        assert state(stub) == "NOT_SERVING" and health.trouble == "the server is stopping"


def test_before_anything_is_known_it_is_not_serving() -> None:
    with answered(Health(), None) as address, probe(address) as stub:
        assert {state(stub), state(stub, "atoll.federation")} == {"NOT_SERVING"}


def test_a_run_is_serving_until_its_end_and_unknown_names_are_not_found() -> None:
    health = Health()
    with answered(health, None) as address, probe(address) as stub:
        assert state(stub, "atoll.run.7") == "NOT_FOUND"
        health.update([run_of(7, "pending"), run_of(8, "finished")])
        assert (state(stub, "atoll.run.7"), state(stub, "atoll.run.8")) == ("SERVING", "NOT_SERVING")
        assert health.going_on == {7} and health.knows(8) and not health.knows(9)
        health.update([run_of(7, "finished")])
        health.update([run_of(7, "running")])  # asked for before, told after
        assert state(stub, "atoll.run.7") == "NOT_SERVING"
        assert state(stub, "atoll.run.") == state(stub, "other") == "NOT_FOUND"
        health.update([run_of(9)])
        health.stop()
        assert state(stub, "atoll.run.9") == "NOT_SERVING" and not health.going_on


def test_who_watches_a_name_is_told_of_every_change() -> None:
    health = Health()
    with answered(health, None) as address, probe(address) as stub:
        server, run = states(stub, "atoll.federation"), states(stub, "atoll.run.7")
        assert (next(server), next(run)) == ("NOT_SERVING", "SERVICE_UNKNOWN")
        for _ in range(3):  # what stays the same is told once
            health.serving()
            health.update([run_of(7)])
        assert (next(server), next(run)) == ("SERVING", "SERVING")
        health.update([run_of(7, "finished")])
        health.not_serving("the superexec ended")
        assert (next(server), next(run)) == ("NOT_SERVING", "NOT_SERVING")


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:50051", "127.0.0.1:50051"), ("[::1]:1", "[::1]:1"), ("a.example.org:65535",) * 2],
)
def test_an_address_is_read(text: str, address: str) -> None:
    assert str(address_from(text)) == address


@pytest.mark.parametrize(
    "text", ["", "50051", "localhost", "localhost:", ":50051", "a b:1", "::1:5", "h:0", "h:65536"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--health: expected HOST:PORT such as"):
        address_from(text)


def test_a_health_address_that_is_wrong_or_taken_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = provisioned(tmp_path, ("west",), free_port())["server"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = f"127.0.0.1:{taken.getsockname()[1]}"
        for given, said in (
            (used, f"--health: cannot listen on {used}: Address already in use"),
            ("nowhere", "--health: expected HOST:PORT such as 127.0.0.1:50051, found 'nowhere'"),
            ("192.0.2.1:5", "--health: cannot listen on 192.0.2.1:5: Cannot assign requested address"),
        ):
            assert command_line(["serve", str(kit), "--health", given]) == 2
            assert capsys.readouterr().err == f"error: {said}\n"


def test_an_address_is_free_again_for_the_next_server() -> None:
    with answered(Health(), None) as address:
        pass
    with answered(Health(), address_from(address)) as again, probe(again) as stub:
        assert again == address and state(stub) == "NOT_SERVING"
