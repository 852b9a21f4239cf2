"""A site's audit log: a line for each request, with the decision and what was sent, in an append-only file.

A line is on disk before its message is sent. It has the message's length and SHA-256, so that whoever kept a
message can prove that it was sent, while the log alone reveals nothing about the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.job.job import Job
from atoll.protocol.messages import Failure, Hello, Reply, content_sha256
from atoll.protocol.requests import Request, work_name
from atoll.system.audit_file import AuditFile


@dataclass
class AuditLog:
    """The log of one site's kit; several processes may write to it."""

    file: AuditFile

    @classmethod
    def open(cls, state: Path) -> AuditLog:
        """As `AuditFile.open`."""
        return cls(AuditFile.open(state))

    def greeted(self, job: Job, hellos: Sequence[Hello]) -> None:
        """Record what clients are about to tell in their greetings, or why they take no part."""
        for hello in hellos:
            decision: dict[str, Any] = {"decision": "refused", "why": hello.refusal}
            if not hello.refusal:
                facts = {name: _size(value) for name, value in sorted(hello.data_info.items())}
                decision = {"decision": "told", "examples": hello.num_examples, "facts": facts}
            self.file.write({"asked": "greeting", "client": hello.client, **_of_job(job), **decision})

    def answered(self, job: Job, request: Request, reply: Reply, head: str, body: bytes) -> None:
        """Record the reply that is about to be sent as head and body, or why none is."""
        if isinstance(reply, Failure):
            decision: dict[str, Any] = {"decision": "refused", "why": reply.reason}
        else:
            digest = content_sha256(head, body).hex()
            decision = {
                "decision": "sent", "what": type(reply).__name__, "bytes": len(head) + len(body),
                "sha256": digest,
            }  # fmt: skip
        request_fields = {"asked": work_name(request), "run": request.run, "round": request.round}
        self.file.write({"client": reply.client, **request_fields, **_of_job(job), **decision})


def _of_job(job: Job) -> dict[str, str]:
    return {"job": job.name, "job_sha256": job.hash}


def _size(value: Any) -> Any:
    """What the log has of a fact: a list's length, any other value itself."""
    return f"{len(value)} of them" if isinstance(value, list | dict) else value
