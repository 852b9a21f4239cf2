"""The interface through which rounds reach clients: in this process, over Ray, or over the network."""

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
    """Delivers requests to clients by name, and returns their replies in any order."""

    engine: str
    """The name that `result.json` has for this transport, such as `inline`."""
    uses_masking: bool
    """Whether vectors of secure sums travel under masks; False where clients are simulated."""
    roster: FederationRoster | None
    """The federation's public keys, which verify the clients' signatures; None where nothing is signed."""

    def discover_clients(self, job: Job) -> ClientRoster:
        """The clients that take part in the job and those that refused; waits until enough are connected."""
        ...

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        """Send a request to the named clients and yield their replies as they arrive.

        A client that has not replied after `timeout` seconds is left out; one whose work failed yields a
        `Failure`. Updates are validated by the caller.
        """
        ...


@runtime_checkable
class SharesLearner(Protocol):
    """A transport whose clients train one after the other in the server's process."""

    def share(self, learner: Learner) -> None:
        """Let clients train with the server's learner, so that the network is in memory once."""
        ...
