"""What a site sent, before anything believes it: sizes first, then who signed it, then form.

Whatever is wrong with a message sets its own clients aside with a reason, and touches no others.
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
"""That one site may host."""
MOST_UNSIGNED = 3
"""Messages in the place of one answer that its site has not signed, before its clients are set aside."""

Came = tuple[Reply, tuple[int, str] | None]
"""A reply, with the length and the SHA-256 of what came of its client."""


def greetings(content: Content, site: str, job: Job, check: SignatureCheck | None = None) -> list[Hello]:
    """The clients of a site as they introduce themselves, with a refusal for each that can't take part.

    Without a `check` greetings are not signed.
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
    return [_believed(hello, job) for hello in hellos]


def _with_names(texts: Sequence[str], seal: Seal | None) -> list[tuple[str, str, Seal]]:
    """Each greeting with the client that it is signed for."""
    if seal is None or len(seal.signatures) != len(texts):
        raise DataError("its message has no signature of its site")
    return [(name, text, seal) for name, text in zip(seal.signatures, texts, strict=True)]


def _signed(name: str, text: str, seal: Seal, job: Job, check: SignatureCheck) -> Hello:
    """A greeting, read once its signature is found to be that client's site's."""
    if fault := check.fault(seal, name, content_sha256(text, b"")):
        return Hello(cleaned(name, 100), {}, 0, refusal=fault)
    hello = hello_from_json(text)
    if hello.client != name:
        raise DataError(f"it is signed for {cleaned(name, 100)!r} and tells of {hello.client!r}")
    return _believed(hello, job)


def _believed(hello: Hello, job: Job) -> Hello:
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
    """The replies in one message of a site that was asked for the clients `asked`.

    `greeted` says how many examples a client told of, where it did; `strangers` are names that the message
    has beside those asked for, whose content nobody looks at. Without a `check` replies are not signed.
    """

    content: Content
    asked: Sequence[str]
    greeted: Mapping[str, int] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    check: SignatureCheck | None = None
    came: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How many bytes came of each client, and their SHA-256."""

    def __iter__(self) -> Iterator[Reply]:
        """One reply for every client that was asked."""
        try:
            heads, bodies = unpacked(self.content)
            seal = seal_of(self.content)
        except DataError as error:
            yield from (Failure(name, _unreadable(error)) for name in self.asked)
            return
        self.strangers.extend(cleaned(name, 100) for name in sorted(heads.keys() - set(self.asked)))
        for name in self.asked:
            if name not in heads or name not in bodies:
                yield Failure(name, "its site sent a message without its reply")
            elif fault := self._signature_fault(seal, name, heads[name], bodies[name]):
                yield Failure(name, fault)
            else:
                yield self._reply(name, heads[name], bodies[name])

    def _signature_fault(self, seal: Seal | None, name: str, head: str, body: bytes) -> str:
        """Why it isn't what the client's site sends for this request; `came` has what it is."""
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
        greeted = self.greeted.get(name, 0)
        if greeted and isinstance(reply, Update | Measurement) and reply.num_examples > greeted:
            return Failure(name, f"{reply.num_examples} examples in its reply, {greeted} in its greeting")
        return reply


@dataclass
class UnsignedMessages:
    """Messages of one exchange in which nothing is signed by its site, as when somebody else sent them.

    The node is asked again: its site's own answer may be still to come, or have been taken away.
    """

    again: set[int] = field(default_factory=set)
    """Nodes that are to be asked again; whoever does so empties it."""
    refused: dict[int, list[Came]] = field(default_factory=dict)
    """The reasons, by node, until there is an answer that its site has signed."""
    count: Counter[int] = field(default_factory=Counter)

    def believed(self, node: int, read: Iterator[Came], check: SignatureCheck | None) -> Iterator[Came]:
        """What is read of a node's message, as far as it counts.

        Of one in which nothing is signed that is nothing, but for the last of `MOST_UNSIGNED`.
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
