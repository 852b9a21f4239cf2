"""A Flower grid in memory: the real server and real sites in one process, and faults between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import atoll.client.app as client_app
import atoll.server.app as server_app
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.client.local_data import FolderShards
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.kit.roster import FederationRoster, SiteIdentity
from atoll.kit.signed_replies import ReplySigner
from atoll.report.run_result import RunResult
from atoll.server.app import FlowerTransport
from atoll.server.events import ignore_events
from atoll.server.run.run_job import run_job
from atoll.server.run_audit import RunAuditLog
from atoll.sim.population.write_shards import write_shards
from tests.federation.places import provisioned
from tests.support.clock import TurnedClock

Change = Callable[[str, str, RecordDict], RecordDict | str]
"""What becomes of a reply: (the request's kind, the site, the reply) to another one, or to an error."""


def unchanged(kind: str, site: str, reply: RecordDict) -> RecordDict | str:
    return reply


@dataclass
class MemoryGrid:
    """Sites by name, each with its Flower app; what `change` makes of a reply is what the server gets.

    Where it is `signed`, sites sign what they send and the server reads nothing else; a hostile site that
    changes what it sends signs it itself, so other tests do without.
    """

    sites: dict[str, Site]
    roster: FederationRoster | None = None
    change: Change = unchanged
    signed: bool = False
    waiting: dict[str, Any] = field(default_factory=dict)
    pushed: int = 0

    @classmethod
    def of(cls, job: Job, folder: Path, change: Change = unchanged, *, signed: bool = False) -> MemoryGrid:
        """A site for each of the job's clients, with its shard as files in a new folder."""
        sites = {}
        names = write_shards(job, folder / "shards")
        kits = provisioned(folder / "kits", tuple(names), port=9092)
        for name in names:
            shards = FolderShards.of(name, [folder / "shards" / name])
            ledgers = PrivacyLedgers(folder / "ledgers" / name)
            memory = ClientStateStore(folder / "memory" / name)
            session = SecureAggregationSession(identity=SiteIdentity.load(kits[name]))
            sites[name] = Site(
                shards, discreet=True, ledgers=ledgers, memory=memory, secure_session=session,
                signer=ReplySigner.load(kits[name]) if signed else None,
            )  # fmt: skip
        return cls(sites, FederationRoster.load(kits["server"]), change, signed)

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=number, name=name, last_activated_at="now")
            for number, name in enumerate(self.sites, start=1)
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            self.pushed += 1
            names.append(f"message-{self.pushed}")
            self.waiting[names[-1]] = self._answer(message)
        return names

    def _answer(self, message: Message) -> RecordDict | str:
        name = list(self.sites)[message.metadata.dst_node_id - 1]
        app = ClientApp()
        client_app.register(app, lambda job, context: self.sites[name])
        reply = app(message, cast(Context, None))
        return self.change(message.metadata.message_type.partition(".")[0], name, reply.content)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        return [_arrived(name, self.waiting.pop(name)) for name in message_ids if name in self.waiting]

    def run(self, job: Job, out: Path, audit: RunAuditLog | None = None) -> RunResult:
        """The result of a whole run of the server, in which waiting takes no time."""
        watch = ignore_events if audit is None else audit.happened
        with in_a_server_app(), patch.object(server_app, "time", TurnedClock()):
            carrier = FlowerTransport(
                cast(Grid, self), "test", roster=self.roster, signed=self.signed, audit=audit
            )
            return run_job(job, carrier, out, lambda learner: None, on_event=watch, report=False)


def _arrived(name: str, content: RecordDict | str) -> Any:
    error = SimpleNamespace(code=ErrorCode.UNKNOWN, reason=content) if isinstance(content, str) else None
    return SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id=name),
        has_error=lambda: error is not None,
        error=error,
        content=content,
    )


@contextmanager
def in_a_server_app() -> Iterator[None]:
    """Flower lets messages be made in the process of a run only."""
    numbers: Sequence[str] = ("_task_id", "_run_id", "_node_id")
    with patch.multiple(TaskIdentity, **dict.fromkeys(numbers, 1)):
        yield
