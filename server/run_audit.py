"""What came from sites in a run, what was decided and what left: lines in the server's log.

A round has a line for each request that left, one for what came back, and one for how it ended, which alone
is waited for until it is on the disk: a power cut may take the lines of the round under way. Of messages
there is the length and the SHA-256 that sites sign and log too; who took part in a secret cohort is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import JobError
from atoll.job.privacy import unless_secret
from atoll.protocol.messages import Failure, Hello, Reply, cleaned, content_sha256
from atoll.protocol.requests import Request, work_name
from atoll.report.run_result import RunResult
from atoll.server.audit_log import ServerAuditLog
from atoll.server.events import ClientsFound, Event, FinalEvaluationBegun, RoundEnded, RunResumed

SECRET = "a cohort that is secret"


@dataclass
class RunAuditLog(ServerAuditLog):
    """What is written while runs of one job are played."""

    @contextmanager
    def of_run(self, run_id: int, out: Path, *, resume: bool) -> Iterator[Callable[[RunResult], None]]:
        """Write down that the block works on a run, and how it ends; what is yielded takes the result."""
        self.write("run", "resumed" if resume else "begun", flower_run=run_id, out=str(out))

        def end(result: RunResult) -> None:
            self.write("run", "completed", flower_run=run_id, model=result.model_sha256)

        try:
            yield end
        except JobError as error:
            self.write("run", "failed", flower_run=run_id, why=cleaned(str(error)))
            raise

    def greeted(self, site: str, hellos: Iterable[Hello]) -> None:
        """Write down who a site says it brings, and who is refused for what."""
        by_client = {h.client: h.refusal or "takes part" for h in hellos}
        self.write("greeting", "received", site=site, clients=by_client, durable=False)

    def left_out(self, site: str, client: str) -> None:
        """Write down that a site has named a client that another one is."""
        why = "the client is another site's, by the roster or as it came first"
        self.write("greeting", "refused", site=site, client=client, why=why, durable=False)

    def sent(self, request: Request, head: str, letters: Mapping[str, tuple[Sequence[str], bytes]]) -> None:
        """Write down what is about to be sent: by site, for which clients and with which body."""
        bodies = {id(body): body for _, body in letters.values()}  # mostly one for all sites
        digests = {key: content_sha256(head, body).hex() for key, body in bodies.items()}
        to = {
            site: {
                "clients": list(clients),
                "bytes": len(head) + len(body),
                "sha256": digests[id(body)],
            }
            for site, (clients, body) in letters.items()
        }
        self._of_request(request, "asked", to=unless_secret(self.job, to, SECRET))

    def refused(self, request: Request, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down what no site has signed in the place of its answer, for which it is asked again."""
        self._of_request(request, "refused", of=unless_secret(self.job, answers, SECRET))

    def answered(self, request: Request, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down what came of whom, and whose message was refused for what, as `answer_of` tells it."""
        self._of_request(request, "received", of=unless_secret(self.job, answers, SECRET))

    def happened(self, event: Event) -> None:
        """Write down a step of the run; the end of a round is on the disk before the next begins."""
        match event:
            case ClientsFound():
                names = [*event.roster.names]
                self.write("clients", "found", clients=names, refused=dict(event.roster.refused))
            case RunResumed():
                self.write("run", "resumed", round=event.round, durable=False)
            case RoundEnded():
                self.write(
                    "round", "ended", round=event.line["round"], set_aside=dict(event.line["set_aside"])
                )
            case FinalEvaluationBegun():
                self.write("final measurements", "begun", durable=False)

    def _of_request(self, request: Request, decision: str, **fields: Any) -> None:
        of = {"run": request.run, "round": request.round}
        self.write(work_name(request), decision, **of, **fields, durable=False)


def answer_of(reply: Reply, came: tuple[int, str] | None) -> dict[str, Any]:
    """What the log says of a client's answer; `came` are its message's length and SHA-256, if one came."""
    line = {"refused": reply.reason} if isinstance(reply, Failure) else {"what": type(reply).__name__}
    return line if came is None else {**line, "bytes": came[0], "sha256": came[1]}
