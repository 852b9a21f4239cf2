"""The server's log, in its kit: who submitted what; `run_audit` writes what happens in runs.

Whoever submits a job needs no torch for it, so this module doesn't bring it in.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from atoll.job.job import Job
from atoll.system.audit_file import AuditFile


@dataclass
class ServerAuditLog:
    """The log of one server's kit, for the lines of one job; every run and every submission writes to it."""

    file: AuditFile
    job: Job

    @classmethod
    def open(cls, state: Path, job: Job) -> Self:
        """As `AuditFile.open`."""
        return cls(AuditFile.open(state), job)

    def submitted(self, run_id: int, out: Path) -> None:
        """Write down who of this machine has started a run."""
        self.write("submit", "accepted", flower_run=run_id, out=str(out), by=_user_name(), uid=os.getuid())

    def write(self, request: str, decision: str, *, durable: bool = True, **fields: Any) -> None:
        """Add a line on what was asked in this job, and what was decided; as `AuditFile.write`."""
        of = {"asked": request, "job": self.job.name, "job_sha256": self.job.hash}
        self.file.write({**of, "decision": decision, **fields}, durable=durable)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return ""
