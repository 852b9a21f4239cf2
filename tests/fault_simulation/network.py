"""The network between server and sites: a Flower grid in memory that delays, drops and spoils."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from atoll.kit.signed_replies import ReplySigner
from atoll.protocol.flower_content import bodies_of, packed, unpacked
from tests.fault_simulation.faults import (
    BEFORE,
    FORGERIES,
    IN_PLACE,
    PULL,
    PUSH,
    REPLY,
    REQUEST,
    Fault,
)
from tests.fault_simulation.forger import Overheard, forged, of_client, signed_by_its_site
from tests.fault_simulation.jobs import SECONDS_A_ROUND
from tests.fault_simulation.schedule import Scheduler

FEWEST_SECONDS, MORE_SECONDS = 0.02, 0.3
"""How long a message is on its way: at least, and by chance up to so much more."""

Answer = RecordDict | tuple[int, str]
"""A reply's content, or the code and the reason of Flower's error in its place."""


@dataclass
class Line:
    """The connection to one site."""

    number: int
    name: str
    handle: Callable[[Message], Answer | None]
    """Hands the site a message: what it replies, or nothing where it dies of it."""
    signer: ReplySigner
    is_on: bool = True
    activations: int = 1
    last_trained: RecordDict | None = None
    """Its last reply with an update, which a fault may send again."""
    sent: dict[str, list[RecordDict]] = field(default_factory=dict)
    """What it has replied to each kind of message, which a forger may have kept."""


@dataclass
class SimulatedGrid:
    """What the server's transport takes for Flower's grid."""

    scheduler: Scheduler
    meet: Callable[[str, int], list[Fault]]
    lines: dict[int, Line]
    server_faults: Callable[[list[Fault]], None]
    note_request: Callable[[Message, int], None]
    note_reply: Callable[[str, RecordDict], None]
    note_forgery: Callable[[str, RecordDict], None]
    note_size: Callable[[str, int], None]
    inbox: dict[str, list[Any]] = field(default_factory=dict)
    pushed: int = 0
    asks_refusing: int = 0
    """The number of a site that is to be asked for work which it refuses; 0 for none."""

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=n, name=line.name, last_activated_at=str(line.activations))
            for n, line in self.lines.items()
            if line.is_on
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names: list[str] = []
        broken = self.meet(PUSH, 0)
        for message in messages:
            if broken and names:
                break
            self.pushed += 1
            names.append(f"message-{self.pushed}")
            self.note_request(message, self.pushed)
            self._send(names[-1], message)
            if self.asks_refusing and message.metadata.message_type != "query":
                self._ask_refusing(message)
        if broken:
            raise ObjectPushError("an object", 1, "a session")
        return names

    def pull_messages(self, message_ids: Sequence[str]) -> list[Any]:
        self.note_size("messages waited for, a site", len(message_ids) // max(1, len(self.lines)))
        self.server_faults(self.meet(PULL, 0))
        return [reply for name in message_ids for reply in self.inbox.pop(name, ())]

    def forget(self) -> None:
        """The server is another process: nobody asks for the replies to the messages of the one before."""
        self.inbox.clear()

    def _send(self, name: str, message: Message) -> None:
        line = self.lines[message.metadata.dst_node_id]
        delays = [FEWEST_SECONDS + MORE_SECONDS * self.scheduler.draw()]
        content: RecordDict = message.content
        for fault in self.meet(REQUEST, line.number):
            match fault.kind:
                case "refused work asked for all the same":
                    self.asks_refusing = line.number
                case "request dropped":
                    delays = []
                case "request delayed":
                    delays = [delay + SECONDS_A_ROUND * fault.amount for delay in delays]
                case "request twice":
                    delays += [2 * SECONDS_A_ROUND * fault.amount]
                case "request torn":
                    content = torn(content, fault.amount)
                case "request corrupted":
                    content = corrupted(content, fault.amount)
        for delay in delays:
            self.scheduler.after(delay, lambda: self._arrive(name, line, message, content))

    def _ask_refusing(self, message: Message) -> None:
        """Ask a site that refuses for the same work; what it replies goes nowhere, but it is looked at."""
        line, self.asks_refusing = self.lines[self.asks_refusing], 0
        heads, bodies = unpacked(message.content)
        content = packed(heads | {"names": json.dumps([line.name])}, bodies_of(bodies))
        kind = message.metadata.message_type
        again = Message(content, dst_node_id=line.number, message_type=kind, ttl=60.0)
        self.scheduler.after(FEWEST_SECONDS, lambda: self._arrive("message-0", line, again, content))

    def _arrive(self, name: str, line: Line, message: Message, content: RecordDict) -> None:
        if not line.is_on:
            self._put(name, line, (ErrorCode.NODE_UNAVAILABLE, "not connected"))
            return
        kind = message.metadata.message_type
        self.scheduler.note(f"{line.name} gets {kind} {name}")
        before, message.content = message.content, content
        try:
            answer = line.handle(message)
        finally:
            message.content = before
        if answer is not None:
            self._reply(name, line, kind, answer)

    def _reply(self, name: str, line: Line, kind: str, answer: Answer) -> None:
        delays = [FEWEST_SECONDS + MORE_SECONDS * self.scheduler.draw()]
        faults = self.meet(REPLY, line.number)
        if isinstance(answer, RecordDict):
            self.note_reply(line.name, answer)
            earlier = line.last_trained if kind == "train" else None
            line.last_trained = answer if kind == "train" else line.last_trained
            honest = answer
            for fault in faults:
                answer = self._spoilt(answer, earlier, fault, line, kind)
            if answer is not honest:
                answer = signed_by_its_site(answer, honest, line.signer)
        for fault in faults:
            match fault.kind:
                case "reply dropped":
                    delays = []
                case "reply delayed":
                    delays = [delay + SECONDS_A_ROUND * fault.amount for delay in delays]
                case "reply after its deadline":
                    delays = [delay + SECONDS_A_ROUND * (1 + fault.amount) for delay in delays]
                case "reply twice":
                    delays += [delays[0] if delays and fault.amount < 0.5 else 3 * fault.amount]
        if isinstance(answer, RecordDict):
            answer = self._with_forgeries(name, line, kind, answer, faults, delays)
        for delay in delays:
            self.scheduler.after(delay, lambda: self._put(name, line, answer))

    def _with_forgeries(
        self, name: str, line: Line, kind: str, answer: RecordDict, faults: list[Fault], delays: list[float]
    ) -> RecordDict:
        """What comes in the reply's place: it, or a forged one; others are sent before it or after it."""
        other = self.lines[line.number % len(self.lines) + 1]
        earlier, others = line.sent.setdefault(kind, []), other.sent.get(kind, [None])
        overheard = Overheard(line.name, tuple(earlier), others[-1], other.signer)
        earlier.append(answer)
        arrives = answer
        for fault in faults if delays else ():
            made = forged(fault, answer, overheard) if fault.kind in FORGERIES else None
            if made is None:
                continue
            self.note_forgery(fault.kind, made)
            if fault.amount < IN_PLACE:
                arrives = made
            else:
                delay = FEWEST_SECONDS / 2 if fault.amount < BEFORE else max(delays) + FEWEST_SECONDS
                self.scheduler.after(delay, partial(self._put, name, line, made))
        return arrives

    def _spoilt(
        self, answer: RecordDict, earlier: RecordDict | None, fault: Fault, line: Line, kind: str
    ) -> RecordDict:
        match fault.kind:
            case "reply torn":
                return torn(answer, fault.amount)
            case "reply corrupted":
                return corrupted(answer, fault.amount)
            case "reply of an earlier round" if earlier is not None:
                return earlier
            case "reply under another's name" if kind != "query":
                return renamed(answer, self._other(line))
            case "reply for another as well" if kind != "query":
                return doubled(answer, self._other(line))
        return answer

    def _other(self, line: Line) -> str:
        return self.lines[line.number % len(self.lines) + 1].name

    def _put(self, name: str, line: Line, answer: Answer) -> None:
        failed = isinstance(answer, tuple)
        error = SimpleNamespace(code=answer[0], reason=answer[1]) if isinstance(answer, tuple) else None
        self.scheduler.note(f"{line.name} replies to {name}{' with an error' if failed else ''}")
        reply = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=name),
            has_error=lambda: failed,
            error=error,
            content=answer,
        )
        self.inbox.setdefault(name, []).append(reply)


def torn(content: RecordDict, amount: float) -> RecordDict:
    """The content with its bodies cut short, or without them."""
    heads, bodies = _opened(content)
    if not bodies:
        return RecordDict()
    return packed(heads, bodies_of({n: body[: int(amount * len(body))] for n, body in bodies.items()}))


def corrupted(content: RecordDict, amount: float) -> RecordDict:
    """The content with one character of each text changed.

    Bodies travel as parts that Flower's receiver holds against their SHA-256: there a changed byte is a lost
    message.
    """
    heads, bodies = _opened(content)
    if not heads:
        return RecordDict({"hellos": ConfigRecord({"json": "?"})})
    return packed({n: _flipped(text, amount) for n, text in heads.items()}, bodies_of(bodies))


def _flipped(text: str, amount: float) -> str:
    place = int(amount * (len(text) - 1))
    return text[:place] + ("\x01" if text[place] != "\x01" else "\x02") + text[place + 1 :]


def renamed(content: RecordDict, name: str) -> RecordDict:
    """The content as if it were another client's, in what it says of itself."""
    heads, bodies = _opened(content)
    return packed({own: of_client(text, name) for own, text in heads.items()}, bodies_of(bodies))


def doubled(content: RecordDict, name: str) -> RecordDict:
    """The content with a reply for another client beside its own."""
    heads, bodies = _opened(content)
    for own in list(heads):
        if own in bodies:
            heads[name], bodies[name] = of_client(heads[own], name), bodies[own]
    return packed(heads, bodies_of(bodies))


def _opened(content: RecordDict) -> tuple[dict[str, str], dict[str, bytes]]:
    return unpacked(content) if "head" in content.config_records else ({}, {})
