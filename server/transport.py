"""Who carries the messages: in-process, Ray, or real processes. The rounds don't know which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from atoll.job.job import Job
from atoll.kit.roster import FederationRoster
from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request
from atoll.server.roster import ClientRoster

if TYPE_CHECKING:
    from atoll.learning.learner import Learner


class Transport(Protocol):
    """Delivers requests to clients by name and brings their replies, in any order."""

    engine: str
    uses_masking: bool
    """Whether vectors of secure sums travel under masks: not where the clients are simulated."""
    roster: FederationRoster | None
    """Whose signatures those of clients must be; None where nothing is signed."""

    def discover_clients(self, job: Job) -> ClientRoster:
        """All clients that could be reached; waits until the job's number of them is there."""
        ...

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        """Replies of the named clients as they come; those that miss the deadline are left out."""
        ...


@runtime_checkable
class SharesLearner(Protocol):
    """A transport whose clients train in the server's own process, one after the other."""

    def share(self, learner: Learner) -> None:
        """Let clients train in the network that the server measures with, so that there is one of it."""
        ...
