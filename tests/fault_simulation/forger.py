"""Who forges what sites send: answers changed, sent again, signed by others or for others, or not signed.

A site's own faults, of content and of name, are signed by the site as everything that it sends; a forger has
no key but that of another site of the federation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from atoll.kit.signed_replies import Exchange, ReplySigner
from atoll.protocol.flower_content import (
    add_seal,
    bodies_of,
    packed,
    packed_greetings,
    seal_of,
    unpacked,
    unpacked_greetings,
)
from atoll.protocol.messages import Seal
from tests.fault_simulation.faults import Fault

HEADER_LENGTH_BYTES = 8
"""With which safetensors begin."""
LAST_NUMBER = 4
"""So many bytes from the end lies the lowest byte of the last float."""


@dataclass(frozen=True)
class Overheard:
    """What a forger knows as an answer passes: its kind, what its site sent before, and another site.

    `earlier` are answers of the same kind, and `others` the last one that the other site sent.
    """

    name: str
    earlier: tuple[RecordDict, ...]
    others: RecordDict | None
    other_signer: ReplySigner


Forge = Callable[[Fault, RecordDict, Seal, Overheard], RecordDict | None]
Contents = dict[str, tuple[str, bytes]]


def forged(fault: Fault, answer: RecordDict, overheard: Overheard) -> RecordDict | None:
    """What a forger makes as this answer passes; nothing where it isn't a sealed one that says something."""
    seal = seal_of(answer)
    if seal is None or not all(_says_something(head) for head, _ in contents_of(answer, seal).values()):
        return None
    return FORGE[fault.kind](fault, answer, seal, overheard)


def exchange_of(seal: Seal) -> Exchange:
    """The request that a message with this seal answers."""
    return Exchange(seal.run, seal.round, seal.nonce)


def contents_of(content: RecordDict, seal: Seal) -> Contents:
    """Head and body of each client in the answer to a greeting, or in any other one."""
    if "hellos" in content.config_records:
        texts = unpacked_greetings(content)
        return {name: (text, b"") for name, text in zip(seal.signatures, texts, strict=True)}
    heads, bodies = unpacked(content)
    return {name: (head, bodies.get(name, b"")) for name, head in heads.items()}


def with_seal(content: RecordDict, contents: Contents, seal: Seal | None) -> RecordDict:
    """These contents as a message of the same form, under that seal or none."""
    if "hellos" in content.config_records:
        made = packed_greetings([head for head, _ in contents.values()])
    else:
        heads = {name: head for name, (head, _) in contents.items()}
        made = packed(heads, bodies_of({name: body for name, (_, body) in contents.items()}))
    if seal is not None:
        add_seal(made, seal)
    return made


def signed_by_its_site(content: RecordDict, answer: RecordDict, signer: ReplySigner) -> RecordDict:
    """A site's faulty content, signed as its answer to the request that `answer` was for."""
    seal = seal_of(answer)
    if seal is None or "head" not in content.config_records:
        return content
    heads, bodies = unpacked(content)
    signed = packed(heads, bodies_of(bodies))
    contents = {name: (head, bodies.get(name, b"")) for name, head in heads.items()}
    add_seal(signed, signer.seal(exchange_of(seal), contents))
    return signed


def of_client(head: str, name: str) -> str:
    """A head that says it is another client's."""
    try:
        return json.dumps(json.loads(head) | {"client": name})
    except ValueError:  # another fault has spoilt it
        return head


def _says_something(head: str) -> bool:
    """Whether it is no refusal and no failure, which who believed it couldn't be told from who did not."""
    try:
        said = json.loads(head)
    except ValueError:
        return False
    return isinstance(said, dict) and not said.get("refusal") and not said.get("reason")


def _changed(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict:
    contents = contents_of(answer, seal)
    return with_seal(answer, {n: _other(*one, fault.amount) for n, one in contents.items()}, seal)


def _other(head: str, body: bytes, amount: float) -> tuple[str, bytes]:
    """Head or body with one number changed, so that both can still be read."""
    header = int.from_bytes(body[:HEADER_LENGTH_BYTES], "little")
    if len(body) >= HEADER_LENGTH_BYTES + header + LAST_NUMBER and int(1000 * amount) % 2:
        changed = bytearray(body)
        changed[-LAST_NUMBER] ^= 1
        return head, bytes(changed)
    said = json.loads(head)
    number = said.get("num_examples", 0)
    return (json.dumps(said | {"num_examples": number // 2}) if number else f"{head} "), body


def _sent_again(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict | None:
    """An answer to an earlier request, which had another nonce."""
    seals = [(one, seal_of(one)) for one in overheard.earlier]
    before = [(one, own) for one, own in seals if own is not None and own.nonce != seal.nonce]
    if not before:
        return None
    one, own = before[int(1000 * fault.amount) % len(before)]
    return with_seal(one, contents_of(one, own), own)


def _claimed(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict | None:
    """An earlier answer with its signature, given out for that to this request."""
    before = _sent_again(fault, answer, seal, overheard)
    return None if before is None else _relabelled(before, seal, lambda name: name)


def _of_another(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict | None:
    """What another site has sent and signed, in the name of this one's client."""
    if overheard.others is None:
        return None
    return _relabelled(overheard.others, seal, lambda name: overheard.name)


def _relabelled(content: RecordDict, seal: Seal, renamed: Callable[[str], str]) -> RecordDict | None:
    """A signed message with the claims of another seal, and its clients' names changed."""
    own = seal_of(content)
    if own is None:
        return None
    contents = {
        renamed(name): (head if renamed(name) == name else of_client(head, renamed(name)), body)
        for name, (head, body) in contents_of(content, own).items()
    }
    signatures: Mapping[str, bytes] = {renamed(name): one for name, one in own.signatures.items()}
    return with_seal(content, contents, replace(seal, signatures=signatures))


def _by_another(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict:
    """The same content and claims, signed with another site's key."""
    contents = contents_of(answer, seal)
    return with_seal(answer, contents, overheard.other_signer.seal(exchange_of(seal), contents))


def _unsealed(fault: Fault, answer: RecordDict, seal: Seal, overheard: Overheard) -> RecordDict:
    return with_seal(answer, contents_of(answer, seal), None)


FORGE: Mapping[str, Forge] = {
    "reply changed under its seal": _changed,
    "reply sent again for another request": _sent_again,
    "reply sent again under this request's claims": _claimed,
    "reply of another under its name": _of_another,
    "reply under another site's seal": _by_another,
    "reply without its seal": _unsealed,
}
