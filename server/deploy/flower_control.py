"""A client of Flower's Control API: registers sites, starts, lists and stops runs, and reads their logs."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.run_pb2 import Run as ProtoRun
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.kit.code_hashes import HASHES, installed_hashes
from atoll.kit.extensions import extension_hashes
from atoll.kit.kit import ServerKit
from atoll.server.deploy.status import Run
from atoll.server.deploy.superlink import TokenInterceptor

logging.getLogger("httpx").setLevel(logging.WARNING)
"""httpx logs a line for every call, and sites call every second."""

ERROR = "ServerApp failed with exception: "

_APP = """
[project]
name = "atoll"
version = "{version}"
license = "Apache-2.0"
description = "Federated fine-tuning of pretrained backbones"

[tool.flwr.app]
publisher = "atoll"
fab-include = ["*.py", "*.json"]

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
job = ""
out = ""
"""

_MODULE = '''"""The {side}'s app as it is installed."""

from atoll.{side}.app import app  # noqa: F401
'''


@dataclass(frozen=True)
class Node:
    """A site registered with the SuperLink: its name belongs to this public key (PEM)."""

    node_id: int
    name: str
    public_key: bytes
    online: bool


@dataclass(frozen=True)
class LogPart:
    """A part of a run's log, and the time of its last line, in seconds since 1970."""

    text: str
    until: float


def bundle(job: Job | None = None) -> bytes:
    """A Flower App Bundle: two modules that import the installed apps, and the hashes of the installed code.

    The hashes include those of the installed extensions that the job uses.

    Raises:
        ConfigError: the job uses an extension that was loaded from a file and isn't installed.
    """
    try:
        version = metadata.version("atoll")
    except metadata.PackageNotFoundError:
        version = "0.0.0"
    hashes = installed_hashes() | ({} if job is None else extension_hashes(job))
    files: dict[str, bytes | Path] = {
        "pyproject.toml": _APP.format(version=version).encode(),
        "server_app.py": _MODULE.format(side="server").encode(),
        "client_app.py": _MODULE.format(side="client").encode(),
        HASHES: json.dumps(hashes, indent=1).encode(),
    }
    with warnings.catch_warnings():
        # Flower 1.41 asks pathspec for a pattern style that pathspec has deprecated.
        warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)
        return build_fab_from_files(files)[0]


class FlowerControlClient:
    """Calls to the SuperLink on this machine.

    Every method raises JobError, with a message of one line, if the call is refused, and Unreachable if the
    SuperLink doesn't answer.
    """

    def __init__(self, address: str, kit: ServerKit) -> None:
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=kit.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), TokenInterceptor(kit)],
        )

    def close(self) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """All registered sites, online or not."""
        with _one_line(self._address):
            infos = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Node(info.node_id, info.name, info.public_key, info.status == "online")
            for info in infos
            if info.status != "unregistered"
        ]

    def admit(self, keys: dict[str, Path]) -> None:
        """Register exactly these sites, by name and public key file; all others are unregistered."""
        wanted = {name: _pem(path) for name, path in keys.items()}
        known = self.nodes()
        for node in known:
            if wanted.get(node.name) != node.public_key:
                with _one_line(self._address):
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        for name in wanted.keys() - {n.name for n in known if wanted.get(n.name) == n.public_key}:
            with _one_line(self._address):
                self._client.RegisterNode(RegisterNodeRequest(public_key=wanted[name], name=name))

    def config(self, run_id: int) -> tuple[str, str]:
        """(the job of a run as JSON, its run directory); both empty for a run of another app."""
        config = user_config_from_proto(self._listed(run_id).override_config)
        return str(config.get("job", "")), str(config.get("out", ""))

    def start_job(self, job: str, out: str) -> int:
        """Start a run of the job, given as JSON, in the run directory `out`; returns the run's id."""
        return self.start(bundle(Job.from_json(job)), job, out)

    def start(self, fab: bytes, job: str, out: str) -> int:
        """Start a run of the bundle `fab` with this job and run directory; returns the run's id."""
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
            override_config=user_config_to_proto({"job": job, "out": out}),
        )
        with _one_line(self._address):
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise JobError(f"the SuperLink did not start the run: {response.note or 'no reason given'}")
        return response.run_id

    def runs(self, limit: int = 20) -> list[Run]:
        """The latest `limit` runs, newest first."""
        with _one_line(self._address):
            response = self._client.ListRuns(ListRunsRequest(limit=limit))
        runs = [_run(run) for run in response.run_dict.values()]
        return sorted(runs, key=lambda run: run.submitted, reverse=True)

    def run(self, run_id: int) -> Run:
        """The status of one run."""
        return _run(self._listed(run_id))

    def _listed(self, run_id: int) -> ProtoRun:
        with _one_line(self._address):
            listed: ProtoRun = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        return listed

    def stop(self, run_id: int) -> bool:
        """Stop a run; returns whether this call stopped it."""
        with _one_line(self._address):
            return self._client.StopRun(StopRunRequest(run_id=run_id)).success

    def log(self, run_id: int, after: float = 0.0) -> Iterator[LogPart]:
        """The run's log after the time `after`, as it is written, until the run has finished."""
        with _one_line(self._address):
            for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=after)):
                yield LogPart(part.log_output, part.latest_timestamp)


class Unreachable(JobError):
    """The SuperLink doesn't answer at the moment; a later call may succeed."""


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Within, HTTP errors are raised as JobError, ConfigError or Unreachable with a message of one line."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        flower = FlowerError.from_json(error.response.text)
        if flower and flower.code == ApiErrorCode.RUN_ID_NOT_FOUND:
            raise ConfigError(
                "no run of this id is known here; atoll status lists the latest ones"
            ) from error
        reason = f"{flower.message} (code {flower.code})" if flower else str(error)
        raise JobError(f"refused by the SuperLink: {' '.join(reason.split())}") from error
    except httpx.TransportError as error:
        raise Unreachable(f"the SuperLink at {address} does not answer: {error}") from error


def _pem(path: Path) -> bytes:
    key = load_ssh_public_key(path.read_bytes())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _run(run: ProtoRun) -> Run:
    """A run's status; only if the ServerApp raised an exception do Flower's details begin with ERROR."""
    failed = run.status.status == Status.FINISHED and run.status.sub_status == SubStatus.FAILED
    return Run(
        run_id=run.run_id,
        status=run.status.status,
        outcome=run.status.sub_status,
        details=run.status.details.removeprefix(ERROR),
        submitted=run.pending_at,
        died=failed and not run.status.details.startswith(ERROR),
    )
