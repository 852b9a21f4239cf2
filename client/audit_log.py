"""What a site was asked, what it decided and what left it: one line each, in an append-only file of its kit.

A line is on the disk before the message leaves. Of what leaves it has the length and the SHA-256, so that
who kept a message can prove that it was sent, and who has the log alone learns nothing of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atoll.errors import DataError
from atoll.job.job import Job
from atoll.kit.signed_replies import content_sha256
from atoll.protocol.messages import Failure, Hello, Reply
from atoll.protocol.requests import Request, work_name
from atoll.system.chained_log import ChainedLog

logger = logging.getLogger(__name__)

FILE = "audit.jsonl"
FORMAT = 1


@dataclass
class AuditLog:
    """The log of one site's kit; several processes may write to it."""

    log: ChainedLog

    @classmethod
    def open(cls, state: Path) -> AuditLog:
        """The log in a kit's state folder, read and checked; a new one if there is none.

        Raises:
            DataError: it was changed.
        """
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = cls(ChainedLog(state / FILE, _check_line))
        with opened.log.alone():
            if not opened.log.lines:
                opened.log.append({"format": FORMAT})
        return opened

    def greeted(self, job: Job, hellos: Sequence[Hello]) -> None:
        """Write down what clients tell of themselves before they do, or why they take no part."""
        for hello in hellos:
            decision: dict[str, Any] = {"decision": "refused", "why": hello.refusal}
            if not hello.refusal:
                facts = {name: _size(value) for name, value in sorted(hello.data_info.items())}
                decision = {"decision": "told", "examples": hello.num_examples, "facts": facts}
            self._write({"asked": "greeting", "client": hello.client, **_of_job(job), **decision})

    def answered(self, job: Job, request: Request, reply: Reply, head: str, body: bytes) -> None:
        """Write down what is about to be sent, as head and body, or why nothing is."""
        if isinstance(reply, Failure):
            decision: dict[str, Any] = {"decision": "refused", "why": reply.reason}
        else:
            digest = content_sha256(head, body).hex()
            decision = {
                "decision": "sent", "what": type(reply).__name__, "bytes": len(head) + len(body),
                "sha256": digest,
            }  # fmt: skip
        asked = {"asked": work_name(request), "run": request.run, "round": request.round}
        self._write({"client": reply.client, **asked, **_of_job(job), **decision})

    def _write(self, fields: Mapping[str, Any]) -> None:
        with self.log.alone():
            self.log.append({"at": datetime.now(UTC).isoformat(timespec="seconds"), **fields})


@dataclass(frozen=True)
class Verified:
    """A log that is whole: how many lines it has beside the first, and when they were written.

    Lines cut off at its end don't show in the file: who notes the hash of the last line can tell.
    """

    path: Path
    lines: int
    first: str
    last: str
    sha256: str


def verify(state: Path) -> Verified:
    """Read the log in a kit's state folder from its first line to its last.

    Raises:
        DataError: there is none, or a line was changed, removed or put in between; it names the line.
    """
    path = state / FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file; a site that has joined once has one")
    times: list[str] = []

    def read(fields: Mapping[str, Any], number: int) -> None:
        _check_line(fields, number)
        times.extend([str(fields["at"])] if number else [])

    log = ChainedLog(path, read)
    with log.alone():
        pass
    return Verified(path, len(times), times[0] if times else "", times[-1] if times else "", log.last)


def _check_line(fields: Mapping[str, Any], number: int) -> None:
    if number == 0 and fields.get("format") != FORMAT:
        raise ValueError(f"format {fields.get('format')!r}, this version of Atoll reads {FORMAT}")
    if number:
        fields["at"], fields["decision"]


def _of_job(job: Job) -> dict[str, str]:
    return {"job": job.name, "job_sha256": job.hash}


def _size(value: Any) -> Any:
    """How much a fact tells: of a list how many, of anything else itself."""
    return f"{len(value)} of them" if isinstance(value, list | dict) else value
