"""One federation: a server and sites as machines, each with its disk, that work, die and start again."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

import atoll.client.app as client_app
from atoll.client.audit_log import AuditLog
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.client.policy import Policy
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.errors import JobError
from atoll.job.job import Job
from atoll.privacy.ledger import Ledger
from atoll.server.app import FlowerTransport
from atoll.server.rounds.central_dp import LedgerLocation
from atoll.server.run.run_job import disk_errors_as_job_errors, run_job
from atoll.server.run_audit import RunAuditLog
from tests.fault_simulation.disk import Died, Disk
from tests.fault_simulation.faults import SERVER, START, WORK, Fault, Scenario
from tests.fault_simulation.jobs import (
    HeldShards,
    canaries_of,
    client_name,
    identity_of,
    job_of,
    roster,
    shared_work,
    signer_of,
)
from tests.fault_simulation.network import Answer, Line, SimulatedGrid
from tests.fault_simulation.observed import Observed
from tests.fault_simulation.schedule import Hangs, Scheduler

EXTRA_LIVES = 4
"""Starts of the server without a new fault, after which a run has ended or never will."""
RESTART_SECONDS = 8.0
HALF = 0.5
BOOKS = "the federation"


@dataclass
class Machine:
    """A server or a site: its files, its disk, and the process that runs on it."""

    number: int
    name: str
    folder: Path
    disk: Disk
    site: Site | None = None
    shards: HeldShards | None = None
    answered: dict[str, Any] = field(default_factory=dict)


@dataclass
class World:
    """One scenario as it is played."""

    scenario: Scenario
    folder: Path
    seen: Observed = field(default_factory=Observed)
    life: int = 0
    run_at_work: str = ""
    passed: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.job: Job = job_of(self.scenario.job, self.scenario.clients, self.scenario.rounds)
        self.scheduler = Scheduler(self.scenario.seed)
        self.plan: dict[tuple[str, int, int], list[Fault]] = defaultdict(list)
        for fault in self.scenario.faults:
            self.plan[fault.point, fault.who, fault.at].append(fault)
        self.left = len(self.scenario.faults)
        self.server = self._machine(SERVER, "server")
        self.acting = self.server
        self.sites = [self._machine(n, client_name(n - 1)) for n in range(1, self.scenario.clients + 1)]
        if self.scenario.refusing:
            self.seen.refused = (self.sites[self.scenario.refusing - 1].name, self.job.hash)
        lines = {m.number: Line(m.number, m.name, self._handler(m), signer_of(m.name)) for m in self.sites}
        self.grid = SimulatedGrid(
            self.scheduler, self.meet, lines, self._server_faults, self._note_request, self._note_reply,
            self._note_forgery, self.seen.largest,
        )  # fmt: skip
        self.app = ClientApp()
        client_app.register(self.app, lambda job, context: cast(Site, self.acting.site))
        self.greetings: Counter[tuple[int, int]] = Counter()
        self.vectors: dict[tuple[bytes, str], Any] = {}
        self.forgeries: dict[int, tuple[str, RecordDict]] = {}
        """By the identity of the message's content: what kind of forgery it is, and the content."""
        self.nonces = itertools.count(1)

    def _machine(self, number: int, name: str) -> Machine:
        folder = self.folder / name
        folder.mkdir(parents=True)
        machine = Machine(number, name, folder, Disk(lambda point: self.meet(point, number)))
        if number != SERVER:
            machine.shards = HeldShards(self.scenario.job, self.scenario.clients, name)
        return machine

    def meet(self, point: str, who: int) -> list[Fault]:
        """The faults of the plan that come now."""
        self.passed[point, who] += 1
        found = self.plan.pop((point, who, self.passed[point, who]), [])
        for fault in found:
            self.seen.happened[fault.kind] += 1
            self.scheduler.note(f"fault: {fault.kind} at {who}")
        return found

    # -- the server ---------------------------------------------------------------------------------------

    def play(self) -> Observed:
        """Everything, until the run has ended or nothing can help it any more."""
        out = self.seen.out = self.server.folder / "run"
        if self.scenario.again:
            self._life(self.server.folder / "earlier", most_seconds=3.0)
            shutil.rmtree(self.server.folder / "earlier", ignore_errors=True)
            self.seen.result = None  # a short run may have ended within that time
        spare = EXTRA_LIVES
        try:
            while self.seen.result is None and spare and not self.seen.crashes:
                happened = self.seen.happened.total()
                self._life(out)
                spare = EXTRA_LIVES if self.seen.happened.total() > happened else spare - 1
        except Hangs as error:
            self.seen.ended.append(str(error))
        self._take_stock()
        return self.seen

    def _life(self, out: Path, most_seconds: float | None = None) -> None:
        """One process of the server, from its start to its end."""
        self.life += 1
        self.grid.forget()
        self._damage(out, self.meet(START, SERVER))
        self.server.disk.restart(self.scheduler.draw)
        self.acting = self.server
        self.seen.begun[self.life] = max(self.seen.durable, default=0)
        if most_seconds is not None:
            life = self.life
            self.scheduler.after(most_seconds, lambda: self._end(life))
        try:
            with disk_errors_as_job_errors(out):
                audit = RunAuditLog.open(self.server.folder / "state", self.job)
            carrier = FlowerTransport(
                cast(Grid, self.grid), "simulated faults", roster=roster(), signed=True, audit=audit
            )
            self.seen.result = run_job(
                self.job, carrier, out,
                lambda learner: None, on_event=audit.happened, resume=(out / "job.toml").is_file(),
                ledgers=LedgerLocation(self.server.folder / "state" / "ledger.jsonl", BOOKS), report=False,
            )  # fmt: skip
            self._says("done")
        except Died:
            self.seen.killed.add(self.life)
            self._says("died")
        except JobError as error:
            self._says(f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is, a user would have seen it as it is
            self.seen.crashes.append(f"server: {type(error).__name__}: {error}")
            self._says(f"{type(error).__name__}: {error}")
        self.acting = self.server
        self._pause()

    def _end(self, life: int) -> None:
        """Kill the server, if it still is that process."""
        if self.life == life:
            self.server.disk.die(power=False)

    def _pause(self) -> None:
        """Let the messages that are on their way arrive; a server that starts again takes a few seconds."""
        self.life += 1
        self.server.disk.is_dead = True
        self.scheduler.sleep(2.0)
        self.life -= 1

    def _says(self, words: str) -> None:
        words = words.replace(str(self.folder), "")
        self.seen.ended.append(words)
        self.scheduler.note(f"server: {words}")

    def _server_faults(self, faults: list[Fault]) -> None:
        for fault in faults:
            self.server.disk.die(power=fault.kind == "server loses power")

    def _damage(self, out: Path, faults: list[Fault]) -> None:
        """Change one byte of the newest checkpoint, or of every one."""
        found = sorted((out / "checkpoints").glob("round-*.safetensors"))
        for fault in faults:
            for path in found[-1:] if fault.amount < HALF else found:
                content = bytearray(path.read_bytes())
                content[int(fault.amount * (len(content) - 1))] ^= 1
                path.write_bytes(content)

    # -- the sites ----------------------------------------------------------------------------------------

    def _handler(self, machine: Machine) -> Any:
        return lambda message: self._handle(machine, message)

    def _handle(self, machine: Machine, message: Message) -> Answer | None:
        """What a site answers; nothing where it dies."""
        line, before = self.grid.lines[machine.number], self.acting
        faults = {fault.kind: fault for fault in self.meet(WORK, machine.number)}
        if (fault := faults.get("site cut off")) is not None:
            self._cut_off(line, SECONDS_CUT_OFF * fault.amount)
            return int(ErrorCode.NODE_UNAVAILABLE), "not connected"
        if "data unreadable" in faults:
            assert machine.shards is not None
            machine.shards.unreadable += 1
        self.acting = machine
        try:
            if "site killed before its work" in faults:
                machine.disk.die(power=False)
            answer = self._answer(machine, message)
            if "site killed after its work" in faults or "site loses power" in faults:
                machine.disk.die(power="site loses power" in faults)
            return answer
        except Died:
            self.scheduler.note(f"{machine.name} died")
            machine.site, machine.answered = None, {}
            self._cut_off(line, RESTART_SECONDS * self.scheduler.draw())
            return None
        finally:
            self.acting = before

    def _answer(self, machine: Machine, message: Message) -> Answer:
        try:
            if machine.site is None:
                machine.disk.restart(self.scheduler.draw)
                machine.site = self._site(machine)
            vars(client_app)["_answered"] = machine.answered
            reply = self.app(message, cast(Context, None))
        except Exception as error:  # noqa: BLE001 - as atoll.client.deploy.executor does
            if not isinstance(error, JobError | OSError):
                self.seen.crashes.append(f"{machine.name}: {type(error).__name__}: {error}")
            return (
                int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION),
                f"{type(error).__name__}; the site's log has the rest",
            )
        site = machine.site
        self.seen.largest("replies kept", len(machine.answered))
        self.seen.largest("learners kept", len(site._learners))
        self.seen.largest("secure sums kept", len(site.secure_session.participants))
        content: RecordDict = reply.content
        return content

    def _site(self, machine: Machine) -> Site:
        """As `atoll.client.app.folder_site` makes it."""
        assert machine.shards is not None
        refuses = machine.number == self.scenario.refusing
        site = Site(
            machine.shards, discreet=True,
            ledgers=PrivacyLedgers(machine.folder / "ledgers"),
            memory=ClientStateStore(machine.folder / "memory"),
            policy=Policy(max_rounds=self.scenario.rounds - 1 or 1, tasks=["none"]) if refuses else None,
            audit=AuditLog.open(machine.folder / "state"),
            secure_session=SecureAggregationSession(identity=identity_of(machine.name)),
            signer=signer_of(machine.name),
        )  # fmt: skip
        site._learners.update(shared_work().learners.get(self.job.hash, {}))
        site._cache._loaded.update(shared_work().loaded.get((self.job.hash, machine.name), {}))
        return site

    def _cut_off(self, line: Line, seconds: float) -> None:
        line.is_on = False

        def back() -> None:
            line.is_on, line.activations = True, line.activations + 1

        self.scheduler.after(seconds, back)

    # -- what is seen -------------------------------------------------------------------------------------

    def _note_request(self, message: Message, number: int) -> None:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        self.scheduler.note(f"server sends {kind} to {node}")
        if kind == "query":
            self.greetings[self.life, node] += 1
            self.seen.largest("greetings of a site", self.greetings[self.life, node])

    def _note_reply(self, name: str, content: RecordDict) -> None:
        """Look for what must not leave a site."""
        found = [
            value
            for record in content.config_records.values()
            for value in record.values()
            if isinstance(value, str | bytes)
        ]
        canaries = canaries_of(self.scenario.job, self.scenario.clients, name)
        for value in found:
            blob = value.encode() if isinstance(value, str) else value
            if b"canary-" in blob or any(canary in blob for canary in canaries):
                self.seen.leaks.append(f"{name}: rows or names of them in what it sent")

    def _note_forgery(self, kind: str, content: RecordDict) -> None:
        self.seen.forged[kind] += 1
        self.forgeries[id(content)] = kind, content

    def forgery(self, content: RecordDict) -> str:
        """What kind of forgery a message is; nothing of an honest one."""
        return self.forgeries.get(id(content), ("", content))[0]

    def _take_stock(self) -> None:
        """Read what the ledgers hold at the end."""
        self._count(self.server, self.server.folder / "state" / "ledger.jsonl", BOOKS, BOOKS)
        for machine in self.sites:
            path = machine.folder / "ledgers" / f"{machine.name}.jsonl"
            self._count(machine, path, machine.name, f"example of {machine.name}")
        self.acting = self.server

    def _count(self, machine: Machine, path: Path, name: str, fingerprint: str) -> None:
        self.acting = machine
        machine.disk.restart(self.scheduler.draw)
        try:
            if path.exists():
                self.seen.charged[name] = len(Ledger.open(path, fingerprint).entries)
        except JobError as error:
            self.seen.crashes.append(f"the ledger of {name} cannot be read: {type(error).__name__}")


SECONDS_CUT_OFF = 30.0


@contextmanager
def a_world(scenario: Scenario, folder: Path) -> Iterator[World]:
    """The world of a scenario in a new folder, which goes when the block ends."""
    folder.mkdir(parents=True)
    try:
        yield World(scenario, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
