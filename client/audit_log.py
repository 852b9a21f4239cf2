"""What a site was asked, what it decided and what left it: one line each, in an append-only file of its kit.

A line is on the disk before the message leaves. Of what leaves it has the length and the SHA-256, so that
who kept a message can prove that it was sent, and who has the log alone learns nothing of the data.
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
        """Write down what clients tell of themselves before they do, or why they take no part."""
        for hello in hellos:
            decision: dict[str, Any] = {"decision": "refused", "why": hello.refusal}
            if not hello.refusal:
                facts = {name: _size(value) for name, value in sorted(hello.data_info.items())}
                decision = {"decision": "told", "examples": hello.num_examples, "facts": facts}
            self.file.write({"asked": "greeting", "client": hello.client, **_of_job(job), **decision})

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
        self.file.write({"client": reply.client, **asked, **_of_job(job), **decision})


def _of_job(job: Job) -> dict[str, str]:
    return {"job": job.name, "job_sha256": job.hash}


def _size(value: Any) -> Any:
    """How much a fact tells: of a list how many, of anything else itself."""
    return f"{len(value)} of them" if isinstance(value, list | dict) else value
