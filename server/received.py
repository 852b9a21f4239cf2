"""Checks of the messages that sites send: sizes first, then signatures, then the content's form.

A fault in a message sets only the clients of that message aside, with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from atoll.data.diagnostics import counts_from_json
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.kit.signed_replies import SignatureCheck
from atoll.protocol.flower_content import Content, seal_of, unpacked, unpacked_greetings
from atoll.protocol.messages import (
    Failure,
    Hello,
    Measurement,
    Reply,
    Seal,
    Update,
    cleaned,
    content_sha256,
    decode_reply,
    hello_from_json,
)
from atoll.server.rounds.validation import MAX_EXAMPLES
from atoll.tasks import task_named
from atoll.tasks.info_checks import check_info

MOST_CLIENTS = 10_000
"""The number of clients that one site may host."""
MOST_UNSIGNED = 3
"""After this many unsigned messages in place of one answer, the site's clients are set aside."""

Came = tuple[Reply, tuple[int, str] | None]
"""(a client's reply, (bytes received, their SHA-256)); None where nothing was received."""


def greetings(content: Content, site: str, job: Job, check: SignatureCheck | None = None) -> list[Hello]:
    """The greetings in a site's message, one per client, each with a refusal if it is invalid.

    Without a `check`, greetings carry no signatures.
    """
    try:
        texts = unpacked_greetings(content)
        if len(texts) > MOST_CLIENTS:
            raise DataError(f"{len(texts)} clients, expected at most {MOST_CLIENTS}")
        if check is not None:
            return [_signed(*one, job, check) for one in _with_names(texts, seal_of(content))]
        hellos = [hello_from_json(text) for text in texts]
    except DataError as error:
        return [Hello(site, {}, 0, refusal=cleaned(f"its greeting cannot be read: {error}"))]
    return [_checked(hello, job) for hello in hellos]


def _with_names(texts: Sequence[str], seal: Seal | None) -> list[tuple[str, str, Seal]]:
    """(client, greeting, signatures) for each greeting; the client is the one that it is signed for."""
    if seal is None or len(seal.signatures) != len(texts):
        raise DataError("its message has no signature of its site")
    return [(name, text, seal) for name, text in zip(seal.signatures, texts, strict=True)]


def _signed(name: str, text: str, seal: Seal, job: Job, check: SignatureCheck) -> Hello:
    """A greeting, parsed only if its signature is valid and from the site of the client `name`."""
    if fault := check.fault(seal, name, content_sha256(text, b"")):
        return Hello(cleaned(name, 100), {}, 0, refusal=fault)
    hello = hello_from_json(text)
    if hello.client != name:
        raise DataError(f"it is signed for {cleaned(name, 100)!r} and tells of {hello.client!r}")
    return _checked(hello, job)


def _checked(hello: Hello, job: Job) -> Hello:
    if hello.refusal:
        return replace(hello, data_info={}, num_examples=0, counts=[])
    try:
        if not 0 <= hello.num_examples <= MAX_EXAMPLES:
            raise DataError(f"num_examples: expected 0 to {MAX_EXAMPLES}, found {hello.num_examples}")
        counts_from_json(hello.counts)
        check_info(task_named(job.task.name), job, hello.data_info)
    except DataError as error:
        return Hello(hello.client, {}, 0, refusal=cleaned(str(error)))
    return hello


@dataclass(frozen=True)
class Replies:
    """Iterates over the replies in one message of a site that was asked for the clients in `names`.

    `greeted` has the number of examples in each client's greeting, where it reports one. `strangers` gets the
    names in the message that weren't asked for; their content is ignored. Without a `check`, replies carry no
    signatures.
    """

    content: Content
    names: Sequence[str]
    greeted: Mapping[str, int] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    check: SignatureCheck | None = None
    came: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By client: (bytes received, their SHA-256)."""

    def __iter__(self) -> Iterator[Reply]:
        """One reply for every client in `names`; a Failure with the reason where there is no valid one."""
        try:
            heads, bodies = unpacked(self.content)
            seal = seal_of(self.content)
        except DataError as error:
            yield from (Failure(name, _unreadable(error)) for name in self.names)
            return
        self.strangers.extend(cleaned(name, 100) for name in sorted(heads.keys() - set(self.names)))
        for name in self.names:
            if name not in heads or name not in bodies:
                yield Failure(name, "its site sent a message without its reply")
            elif fault := self._signature_fault(seal, name, heads[name], bodies[name]):
                yield Failure(name, fault)
            else:
                yield self._reply(name, heads[name], bodies[name])

    def _signature_fault(self, seal: Seal | None, name: str, head: str, body: bytes) -> str:
        """Why the reply isn't one that the client's site has signed for this request; empty if it is.

        Size and hash of the reply are recorded in `came`.
        """
        try:
            digest = content_sha256(head, body)
        except DataError as error:
            return _unreadable(error)
        self.came[name] = (len(head) + len(body), digest.hex())
        return self.check.fault(seal, name, digest) if self.check is not None else ""

    def _reply(self, name: str, head: str, body: bytes) -> Reply:
        try:
            reply = decode_reply(head, body)
        except DataError as error:
            return Failure(name, _unreadable(error))
        if reply.client != name:
            return Failure(name, f"its reply is that of {cleaned(reply.client, 100)!r}")
        if self.check is not None and not isinstance(reply, Failure) and reply.run != self.check.expected.run:
            return Failure(name, "its reply was made for another run")
        greeted = self.greeted.get(name, 0)
        if greeted and isinstance(reply, Update | Measurement) and reply.num_examples > greeted:
            return Failure(name, f"{reply.num_examples} examples in its reply, {greeted} in its greeting")
        return reply


@dataclass
class UnsignedMessages:
    """The messages of one exchange that contain no valid signature of their site, as if forged.

    The node is asked again: its site's own answer may still arrive, or may have been intercepted.
    """

    again: set[int] = field(default_factory=set)
    """Nodes to ask again; the sender removes them."""
    refused: dict[int, list[Came]] = field(default_factory=dict)
    """By node, the failures of its last unsigned message, until its site's signed answer arrives."""
    count: Counter[int] = field(default_factory=Counter)

    def accepted(self, node: int, read: Iterator[Came], check: SignatureCheck | None) -> Iterator[Came]:
        """The replies in a node's message that count; none if nothing in it is validly signed.

        After `MOST_UNSIGNED` unsigned messages of a node, the failures in the last one count.
        """
        refused: list[Came] = []
        for one in read:
            if check is None or check.accepted or not isinstance(one[0], Failure):
                yield one
            else:
                refused.append(one)
        self.count[node] += 1
        if check is None or check.accepted or self.count[node] == MOST_UNSIGNED:
            self.refused.pop(node, None)
            yield from refused
        else:
            self.refused[node] = refused
            self.again.add(node)


def _unreadable(error: DataError) -> str:
    return cleaned(f"its reply cannot be read: {error}")
