"""The server as a Flower ServerApp, and the transport that runs its rounds over a Flower grid."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    pull_objects,
)
from flwr.superlink.grid import http_grid

from atoll.errors import InconsistentUpdates
from atoll.job.job import Job
from atoll.job.privacy import unless_secret
from atoll.kit.roster import FederationRoster
from atoll.kit.signed_replies import GREETING_ROUND, Exchange, SignatureCheck
from atoll.protocol.flower_content import NONCE, bodies_of, packed
from atoll.protocol.messages import Failure, Hello, Reply, cleaned
from atoll.protocol.requests import EvaluateRequest, Request, encode_request, has_parts_per_client
from atoll.protocol.updates_on_disk import LEAST_BYTES
from atoll.server.deploy.supervision import process_file
from atoll.server.events import ClientsFound, Event, FinalEvaluationBegun, RoundEnded, RunResumed
from atoll.server.job_checks import validate_for_deployment
from atoll.server.received import MOST_UNSIGNED, Came, Replies, UnsignedMessages, greetings
from atoll.server.resending import RESEND_SECONDS, ResendSchedule
from atoll.server.roster import ClientRoster
from atoll.server.rounds.central_dp import LedgerLocation
from atoll.server.run.run_job import disk_errors_as_job_errors, run_job
from atoll.server.run.test_set import server_test_set
from atoll.server.run_audit import RunAuditLog, answer_of
from atoll.system.lock import hold
from atoll.tasks.metric_values import format_values

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0
"""The interval of checks whether a node has reconnected while its answer is awaited."""
MARK = "atoll: "
"""The prefix of Atoll's lines in a log that also has Flower's."""
ARRIVAL_SECONDS = 0.02
"""The pause before asking again for an array that hasn't arrived; Flower waits 1 s, then 2 s, …"""
REJOIN_SECONDS = 120.0
"""How long a site may take to reconnect; the server notices a lost connection after up to a minute."""
GONE = "its site is not connected"
NO_REASON = "the site gave no reason"
LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Errors of a message that was lost with a process that died; it is sent again."""
AGAIN_SECONDS = 1.0
"""The pause before a node is asked again whose answer was lost, or not signed by its site."""
NO_NODE = -1
SHOWN_STRANGERS = 5
"""How many unexpected names in one message are logged."""


@dataclass
class FlowerTransport:
    """Sends requests to the nodes of a Flower grid and collects replies; knows each client's node.

    Only a client's own site, by the federation's roster, may answer for it. If answers are `signed`, only
    those are read whose signature is that site's for this very request.
    """

    grid: Grid
    engine: str
    uses_masking: bool = True
    roster: FederationRoster | None = None
    signed: bool = False
    audit: RunAuditLog | None = None
    resend_after: float = RESEND_SECONDS
    nodes: dict[str, int] = field(default_factory=dict)
    sites: dict[int, str] = field(default_factory=dict)
    """The registered name of each node that has been asked for greetings."""
    greeted: dict[int, list[Hello]] = field(default_factory=dict)
    gone: dict[int, float] = field(default_factory=dict)
    left_out: set[tuple[int, str]] = field(default_factory=set)
    unsigned: Counter[int] = field(default_factory=Counter)
    """How many messages with greetings each node sent in which its site had signed nothing."""
    job: Job | None = None

    def discover_clients(self, job: Job) -> ClientRoster:
        """Ask all nodes for their clients' greetings until as many clients as the job needs are connected.

        Raises:
            InconsistentUpdates: there were fewer after `federation.wait` seconds.
        """
        self.job = job
        needed, deadline = job.federation.clients, time.monotonic() + job.federation.wait
        logged = ""
        while True:
            self._greet(job, min(60.0, max(deadline - time.monotonic(), 1.0)))
            hellos = self._by_client()
            if len(hellos) >= needed:
                return ClientRoster.of(hellos)
            here = ", ".join(h.client for h in hellos) or "none yet"
            if here != logged:
                logged = here
                logger.info("waiting   %d of %d clients are here: %s", len(hellos), needed, logged)
            if time.monotonic() > deadline:
                raise InconsistentUpdates(
                    f"{len(hellos)} of {needed} clients joined within {job.federation.wait:.0f} s: {logged}"
                )
            time.sleep(POLL_SECONDS)

    def _greet(self, job: Job, timeout: float) -> None:
        sites = {node.node_id: node.name or f"node {node.node_id}" for node in self.grid.get_nodes()}
        strangers = [node for node in sites if node not in self.greeted]
        self.sites |= {node: sites[node] for node in strangers}
        for node in strangers:
            self.gone.pop(node, None)  # it is connected now
        exchanges = {node: Exchange.new(job.hash, GREETING_ROUND) for node in strangers}
        letters = {
            node: packed({"job": job.canonical, NONCE: exchange.nonce}, bodies_of({}))
            for node, exchange in exchanges.items()
        }
        for node, reply in _waited_for(self._converse(letters, "query", timeout, patience=0, again=set())):
            if reply == GONE:
                continue  # it is greeted when it is back
            check = None if isinstance(reply, str) else self._check(node, exchanges[node])
            if isinstance(reply, str):
                hellos = [Hello(sites[node], {}, 0, refusal=reply)]
            else:
                hellos = greetings(reply, sites[node], job, check)
            if self.audit is not None:
                self.audit.greeted(sites[node], hellos)
            is_signed = check is None or bool(check.accepted)
            self.unsigned[node] += not is_signed
            if is_signed or self.unsigned[node] == MOST_UNSIGNED:
                self.greeted[node] = hellos

    def _by_client(self) -> list[Hello]:
        """All clients' greetings, by name; each must come from its site in the roster, or of its name."""
        registered = {node.name: node.node_id for node in self.grid.get_nodes() if node.name}
        homes = {} if self.roster is None else self.roster.sites
        by_client: dict[str, Hello] = {}
        for node in sorted(self.greeted):
            for hello in self.greeted[node]:
                owner = registered.get(hello.client, self.nodes.get(hello.client, node))
                home = homes.get(hello.client)  # which counts also while that site isn't there
                is_owner = owner == node if home is None else self.sites.get(node) == home
                if not is_owner or (hello.client in by_client and self.nodes[hello.client] != node):
                    self._leave_out(node, hello.client)
                    continue
                by_client[hello.client], self.nodes[hello.client] = hello, node
        return [by_client[name] for name in sorted(by_client)]

    def _leave_out(self, node: int, client: str) -> None:
        if (node, client) not in self.left_out:
            self.left_out.add((node, client))
            logger.warning("node %d calls itself %s, which another one is: left out", node, client)
            if self.audit is not None:
                self.audit.left_out(self._site(node), client)

    def _site(self, node: int) -> str:
        """The name of a node's site; `node ID` if it isn't known."""
        return self.sites.get(node, f"node {node}")

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Send one message to every node that hosts any of the named clients; yields the clients' replies."""
        replies: Iterator[Reply] = _waited_for(self.ask_ahead(request, names, timeout))
        yield from replies

    def ask_ahead(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply | None]:
        """As `send_and_receive`, without waiting: yields None whenever nothing new has arrived yet."""
        answers: dict[str, dict[str, Any]] = {}

        def noted(arrived: Came | None) -> Reply | None:
            if arrived is None:
                return None
            reply, came = arrived
            answers[reply.client] = answer_of(reply, came)
            return reply

        try:
            yield from map(noted, self._exchange(request, names, timeout))
        finally:
            if self.audit is not None:
                self.audit.answered(request, answers)

    def _exchange(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Came | None]:
        """Each reply, with the size and SHA-256 of what was received; None while nothing new has arrived."""
        head, shared = encode_request(request)
        common, hosts = bodies_of({"tensors": shared}), self._hosts(names)
        exchanges = {node: Exchange.new(request.run, request.round) for node in hosts}
        letters, bodies = {}, dict.fromkeys(hosts, shared)
        for node, clients in hosts.items():
            body = common
            if has_parts_per_client(request):
                bodies[node] = encode_request(request, clients)[1]
                body = bodies_of({"tensors": bodies[node]})
            texts = {"request": head, "names": json.dumps(clients), NONCE: exchanges[node].nonce}
            letters[node] = packed(texts, body)
        if self.audit is not None:
            to = {self._site(node): (hosts[node], body) for node, body in bodies.items()}
            self.audit.sent(request, head, to)
        kind = "evaluate" if isinstance(request, EvaluateRequest) else "train"
        one_by_one, unsigned = len(shared) >= LEAST_BYTES, UnsignedMessages()
        for answer in self._converse(
            letters, kind, timeout, REJOIN_SECONDS, again=unsigned.again, one_by_one=one_by_one
        ):
            if answer is None:
                yield None
                continue
            node, reply = answer
            if isinstance(reply, str):
                unsigned.refused.pop(node, None)
                yield from ((Failure(name, reply), None) for name in hosts[node])
                continue
            check = self._check(node, exchanges[node])
            yield from unsigned.accepted(node, self._read(reply, node, hosts[node], check), check)
            if node in unsigned.again:
                self._tell_unsigned(request, unsigned.refused[node])
            del answer, reply  # they may be large, and the next one may be long in coming
        for refused in unsigned.refused.values():
            yield from refused

    def _tell_unsigned(self, request: Request, refused: Sequence[Came]) -> None:
        for reply, came in refused:
            if isinstance(reply, Failure):
                logger.warning("%s: %s; its site is asked again", self._shown(reply.client), reply.reason)
            if self.audit is not None:
                self.audit.refused(request, {reply.client: answer_of(reply, came)})

    def _check(self, node: int, exchange: Exchange) -> SignatureCheck | None:
        """The check of the signatures in a node's answer; None where answers aren't signed."""
        if not self.signed or self.roster is None:
            return None
        return SignatureCheck(self.roster, self.sites.get(node, ""), exchange)

    def _read(
        self, reply: RecordDict, node: int, names: Sequence[str], check: SignatureCheck | None
    ) -> Iterator[Came]:
        """The replies in one message of that node for the clients that it was asked for."""
        sizes = {hello.client: hello.num_examples for hello in self.greeted.get(node, ())}
        replies = Replies(reply, names, sizes, check=check)
        yield from ((one, replies.came.get(one.client)) for one in replies)
        for name in replies.strangers[:SHOWN_STRANGERS]:
            logger.warning("a reply for %s, which its site was not asked for: dropped", self._shown(name))

    def _hosts(self, names: Sequence[str]) -> dict[int, list[str]]:
        hosts: dict[int, list[str]] = {}
        for name in names:
            hosts.setdefault(self.nodes[name], []).append(name)
        return hosts

    def _converse(
        self,
        letters: Mapping[int, RecordDict],
        kind: str,
        timeout: float,
        patience: float,
        *,
        again: set[int],
        one_by_one: bool = False,
    ) -> Iterator[tuple[int, RecordDict | str] | None]:
        """(node, its reply or the reason why there is none), as replies arrive; late nodes yield nothing.

        None is yielded after each poll of all nodes; the caller should then pause. A node whose connection is
        lost has `patience` seconds to reconnect and is then asked again; so is a node that the caller adds to
        `again`. With `one_by_one`, replies, which may be large, are fetched one at a time, so that only one
        is in memory.
        """
        start = time.monotonic()
        due = ResendSchedule(letters, kind, timeout, start, self.resend_after)
        sent: dict[str, int] = {}
        activated, look = self._activations(), start + LOOK_SECONDS
        while due and time.monotonic() < start + timeout:
            if time.monotonic() > look:
                for node in self._back(activated):
                    if node in due:
                        due.is_lost(node, look)
                look = time.monotonic() + LOOK_SECONDS
            late = {node: letters[node] for node in due.late(time.monotonic())}
            sent |= self._push(late, kind, timeout)
            for messages in [[message] for message in sent] if one_by_one else [list(sent)]:
                yield from self._pulled(messages, sent, due, patience)
            while again:
                due.is_lost(again.pop(), time.monotonic() + AGAIN_SECONDS)
            for node in [n for n in due if self._is_gone(n, patience)]:
                due.answered(node)
                yield node, GONE
            if due:
                yield None

    def _pulled(
        self, messages: Sequence[str], sent: dict[str, int], due: ResendSchedule, patience: float
    ) -> Iterator[tuple[int, RecordDict | str]]:
        """The replies that have arrived to these messages, which are removed from `sent` and `due`."""
        for reply in self.grid.pull_messages(messages):
            node = sent.pop(reply.metadata.reply_to_message_id, NO_NODE)
            if node not in due:
                continue  # answered already, or the same reply comes twice
            if reply.has_error() and reply.error.code in LOST:
                due.is_lost(node, time.monotonic() + AGAIN_SECONDS)
            elif reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                due.is_lost(node)
                self._miss(node, patience)
            else:
                due.answered(node)
                yield node, _content(reply)

    def _miss(self, node: int, patience: float) -> None:
        if node not in self.gone:
            self.gone[node] = time.monotonic()
            names = ", ".join(name for name, home in self.nodes.items() if home == node)
            if patience:
                who = self._shown(names or f"node {node}")
                logger.warning("%s: connection lost, waiting up to %.0f s", who, patience)

    def _shown(self, name: str) -> str:
        """The name to show for a client or node; neutral where the cohort's members must stay secret."""
        return name if self.job is None else unless_secret(self.job, name, "a client")

    def _is_gone(self, node: int, patience: float) -> bool:
        return node in self.gone and time.monotonic() >= self.gone[node] + patience

    def _activations(self) -> dict[int, str]:
        """The time at which each node that is online connected."""
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}

    def _back(self, activated: dict[int, str]) -> set[int]:
        """Nodes that reconnected since `activated`, which is updated: messages sent to them are lost."""
        now = self._activations()
        back = {n for n, moment in now.items() if n in self.gone or activated.get(n, moment) != moment}
        activated |= now
        for node in back:
            self.gone.pop(node, None)
        return back

    def _push(self, letters: Mapping[int, RecordDict], kind: str, timeout: float) -> dict[str, int]:
        """Send each node its letter; returns the node of each message id."""
        while letters:
            messages = [
                Message(content, dst_node_id=node, message_type=kind, ttl=timeout + 60)
                for node, content in letters.items()
            ]
            try:
                return dict(zip(self.grid.push_messages(messages), letters, strict=True))
            except ObjectPushError:
                logger.warning("the SuperLink went away in the middle of a push; pushing again")
                time.sleep(1.0)
        return {}


def _waited_for(polls: Iterator[Item | None]) -> Iterator[Item]:
    """The items of `polls` without its Nones, with a pause of `POLL_SECONDS` at each None."""
    for reply in polls:
        if reply is None:
            time.sleep(POLL_SECONDS)
        else:
            yield reply


def _content(reply: Message) -> RecordDict | str:
    return cleaned(reply.error.reason or NO_REASON) if reply.has_error() else reply.content


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job in the run's configuration; results are written to its `out`."""
    configure_logging()
    _hold_process_file(context.run_id)
    _watch_uploads(grid)
    job = Job.from_json(str(context.run_config["job"]))
    validate_for_deployment(job)
    out = Path(str(context.run_config["out"]))
    resume = (out / "job.toml").is_file()
    roster = FederationRoster.load(_kit())
    with disk_errors_as_job_errors(out):
        audit = RunAuditLog.open(_kit() / "state", job)
    carrier = FlowerTransport(grid, "flower", roster=roster, signed=roster is not None, audit=audit)

    def watch(event: Event) -> None:
        announce(event)
        audit.happened(event)

    with audit.of_run(context.run_id, out, resume=resume) as end:
        end(run_job(job, carrier, out, server_test_set(job), on_event=watch, resume=resume, ledgers=_books()))


_process_file: TextIO | None = None


def _hold_process_file(run_id: int) -> None:
    """Lock the run's process file until this process ends, so that the server can tell that it is alive."""
    global _process_file
    _process_file = hold(process_file(_kit() / "state", run_id))


def _kit() -> Path:
    """The folder of the kit of the server that started this process."""
    return Path(os.environ["FLWR_HOME"]).parent.parent


def _books() -> LedgerLocation:
    """The location of the federation's privacy ledger, in its kit: it outlives runs."""
    state = _kit() / "state"
    authority = (state.parent / "ca.crt").read_bytes()
    return LedgerLocation(state / "ledger.jsonl", f"federation {hashlib.sha256(authority).hexdigest()}")


def _watch_uploads(grid: Grid) -> None:
    """Make Flower's client give up a reply at once if its sender is disconnected, not after three minutes.

    Also ask again for arrays that haven't arrived after 20 ms instead of a second.
    """
    client = cast(Any, grid)._runtime_client
    ask = client.PullMessages
    senders: dict[str, tuple[int, str | None]] = {}

    def activations() -> dict[int, str]:
        return {node.node_id: node.last_activated_at for node in grid.get_nodes()}

    def note_senders(request: Any) -> Any:
        answer = ask(request)
        senders.clear()
        now = activations() if answer.messages_list else {}
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            node = message.metadata.src_node_id
            senders.update((part.object_id, (node, now.get(node))) for part in iterate_object_tree(tree))
        return answer

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        def pull_one(object_id: str) -> bytes:
            try:
                return pull_object_fn(object_id)
            except ObjectUnavailableError:
                node, moment = senders[object_id]
                if moment is None or activations().get(node) != moment:
                    raise ObjectPullError(object_id, "its sender is gone") from None
                raise

        return pull_objects(object_ids, pull_one, initial_backoff=ARRIVAL_SECONDS, backoff_cap=0.5)

    client.PullMessages = note_senders
    vars(http_grid)["pull_objects"] = pull


def configure_logging() -> None:
    """Write Atoll's log lines to standard output, which Flower forwards to `atoll submit` and `logs`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(MARK + "%(message)s"))
    logging.getLogger("atoll").addHandler(handler)
    logging.getLogger("atoll").setLevel(logging.INFO)


def announce(event: Event) -> None:
    """Log one line for each event of the run."""
    match event:
        case ClientsFound():
            logger.info("clients   %s", ", ".join(event.roster.names))
            logger.info("backbone  %s, weights from %s", event.backbone.name, event.backbone.origin)
            if event.inputs_description:
                logger.info("inputs    %s", event.inputs_description)
        case RunResumed():
            logger.info("resumed after round %d", event.round)
        case RoundEnded():
            logger.info("%s", describe_round(event.line))
        case FinalEvaluationBegun():
            logger.info("final measurements")


def describe_round(line: Mapping[str, Any]) -> str:
    """A round in one line of text: number, loss, metrics, number of clients set aside, seconds."""
    parts = [] if line["loss"] is None else [f"train loss {line['loss']:.3f}"]
    parts += format_values({name: v for name, v in line["metrics"].items() if name != "loss"})
    parts += [f"{len(line['set_aside'])} set aside"] if line["set_aside"] else []
    return f"round {line['round']:<4} {', '.join(parts)}  ({line['seconds']:.1f} s)"
