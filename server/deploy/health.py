"""The server's health over the standard gRPC health protocol: whether it accepts jobs, and which runs go on.

The service names of `grpc.health.v1.Health`, which systemd, Kubernetes and load balancers can query:

- the empty name and `atoll.federation`: SERVING only while the server can accept a job;
- `atoll.run.RUN_ID`: SERVING from a run's submission to its end, then NOT_SERVING;
- any other name: NOT_FOUND.

Probes use no TLS, so answers aren't encrypted; they contain only these names and states.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from pydantic import ValidationError

from atoll.errors import ConfigError
from atoll.kit.kit import Address
from atoll.server.deploy.status import Run

EVERYTHING, FEDERATION = "", "atoll.federation"
THREADS = 2
"""Two threads are enough: a check is answered at once, and Watch uses no thread."""
GRACE_SECONDS = 1.0


def address_from(text: str) -> Address:
    """Parse an address such as `127.0.0.1:50051` or `[::1]:50051`; raises ConfigError if it is none."""
    parts = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
    try:
        if parts:
            return Address(host=parts["v6"] or parts["host"], port=int(parts["port"]))
    except ValidationError:
        pass
    raise ConfigError(f"--health: expected HOST:PORT such as 127.0.0.1:50051, found {text!r}")


class Health:
    """The health state of every service name; may be set from any thread."""

    def __init__(self) -> None:
        self.servicer = HealthServicer()
        self._lock = threading.Lock()
        self._runs: dict[int, bool] = {}
        self._serves: bool | None = None
        self._stopped = False
        self.not_serving("the server is starting")

    @property
    def trouble(self) -> str:
        """Why the server can't accept a job; empty while it can."""
        return self._trouble

    @property
    def going_on(self) -> frozenset[int]:
        """The ids of the runs that are SERVING."""
        with self._lock:
            return frozenset(run for run, goes_on in self._runs.items() if goes_on)

    def knows(self, run_id: int) -> bool:
        """Whether this run's state has been set."""
        with self._lock:
            return run_id in self._runs

    def serving(self) -> None:
        """Set that the server can accept a job."""
        self._set_federation("")

    def not_serving(self, trouble: str) -> None:
        """Set that the server can't accept a job, and why."""
        self._set_federation(trouble)

    def _set_federation(self, trouble: str) -> None:
        with self._lock:
            if self._stopped:
                return
            self._trouble, serves = trouble, not trouble
            if serves != self._serves:  # watchers are notified of every call, so only of changes
                self._serves = serves
                self._set(EVERYTHING, serves)
                self._set(FEDERATION, serves)

    def update(self, runs: Iterable[Run]) -> None:
        """Set the states of these runs; a run that has ended stays NOT_SERVING."""
        with self._lock:
            for run in runs:
                goes_on = not (run.finished or self._stopped) and self._runs.get(run.run_id, True)
                if self._runs.get(run.run_id) != goes_on:
                    self._runs[run.run_id] = goes_on
                    self._set(f"atoll.run.{run.run_id}", goes_on)

    def _set(self, name: str, serving: bool) -> None:
        states = HealthCheckResponse
        self.servicer.set(name, states.SERVING if serving else states.NOT_SERVING)

    def stop(self) -> None:
        """Set every name to NOT_SERVING for good; later changes are ignored."""
        with self._lock:
            self._stopped, self._trouble = True, "the server is stopping"
            self._runs = dict.fromkeys(self._runs, False)
            self.servicer.enter_graceful_shutdown()


@contextmanager
def answered(health: Health, address: Address | None) -> Iterator[str]:
    """Within, health probes are answered at the yielded address: `address`, or a free port of loopback.

    Raises:
        ConfigError: the server can't listen on the address.
    """
    wanted = str(address) if address else "127.0.0.1:0"
    if address:
        _check_free(address)
    server = grpc.server(ThreadPoolExecutor(THREADS, "health"), options=(("grpc.so_reuseport", 0),))
    add_HealthServicer_to_server(health.servicer, server)
    try:
        port = server.add_insecure_port(wanted)
    except RuntimeError as error:
        raise ConfigError(f"--health: cannot listen on {wanted}") from error
    server.start()
    try:
        yield wanted if address else f"127.0.0.1:{port}"
    finally:
        server.stop(GRACE_SECONDS).wait()


def _check_free(address: Address) -> None:
    """Raises ConfigError, with the reason that gRPC doesn't give, if this process can't listen there."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(where)
            tried.listen()
    except OSError as error:
        raise ConfigError(f"--health: cannot listen on {address}: {error.strerror}") from error
