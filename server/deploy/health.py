"""Whether the server can accept a job and which runs go on, told by the standard gRPC health protocol.

Services of `grpc.health.v1.Health`, as systemd, Kubernetes and load balancers ask for them:

- the empty name and `atoll.federation`: SERVING only while the server can accept a job;
- `atoll.run.RUN_ID`: SERVING from a run's submission to its end, then NOT_SERVING;
- any other name: NOT_FOUND.

Probes have no TLS, so nothing is encrypted; nothing is told but these names and states.
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
"""A check is answered at once, and Watch takes no thread."""
GRACE_SECONDS = 1.0


def address_from(text: str) -> Address:
    """The address that an operator wrote as HOST:PORT; raises ConfigError if it is none."""
    parts = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
    try:
        if parts:
            return Address(host=parts["v6"] or parts["host"], port=int(parts["port"]))
    except ValidationError:
        pass
    raise ConfigError(f"--health: expected HOST:PORT such as 127.0.0.1:50051, found {text!r}")


class Health:
    """The state of every name that can be asked for; any thread may set it."""

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
        """The runs that are SERVING."""
        with self._lock:
            return frozenset(run for run, goes_on in self._runs.items() if goes_on)

    def knows(self, run_id: int) -> bool:
        """Whether the run has a name here."""
        with self._lock:
            return run_id in self._runs

    def serving(self) -> None:
        """From now on the server can accept a job."""
        self._set_federation("")

    def not_serving(self, trouble: str) -> None:
        """From now on it can't, and that is why."""
        self._set_federation(trouble)

    def _set_federation(self, trouble: str) -> None:
        with self._lock:
            if self._stopped:
                return
            self._trouble, serves = trouble, not trouble
            if serves != self._serves:  # who watches is told of changes only
                self._serves = serves
                self._set(EVERYTHING, serves)
                self._set(FEDERATION, serves)

    def update(self, runs: Iterable[Run]) -> None:
        """Take over how runs stand; one that has ended stays so."""
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
        """Nothing is SERVING any more, whatever is set later."""
        with self._lock:
            self._stopped, self._trouble = True, "the server is stopping"
            self._runs = dict.fromkeys(self._runs, False)
            self.servicer.enter_graceful_shutdown()


@contextmanager
def answered(health: Health, address: Address | None) -> Iterator[str]:
    """Within, it is answered; gives where: on the address, or on a free port of this machine's loopback.

    Raises:
        ConfigError: the address can't be listened on.
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
    """Raises ConfigError where the address is taken or not ours: gRPC doesn't say which of them it is."""
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
