"""A server whose deadlines can be brought on: its clock is turned once all others have answered.

While the folder $ATOLL_TEST_CUTS has a file `JOB-ROUND-KIND`, that exchange of that job (`train`, `evaluate`)
ends at its deadline as soon as no answer is missing but those of the clients whom the file names; then the
file goes away. However busy the machine is, whoever answers is heard before.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from atoll.job.job import Job
from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request
from tests.support.clock import TurnedClock

CUTS = "ATOLL_TEST_CUTS"


class AheadClock(TurnedClock):
    """Stands in for the module `time`: it goes as the real one does, and can be turned on."""

    def monotonic(self) -> float:
        return self.now + time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def main() -> None:
    """`atoll serve` whose ServerApps have a clock that can be turned."""
    import atoll.server.deploy.serve
    from atoll.cli.start import main as start

    vars(atoll.server.deploy.serve)["SUPEREXEC"] = "tests.federation.turned_server:superexec"
    start()


def superexec() -> None:
    """The entry of the process that starts ServerApps."""
    import atoll.server.deploy.executor

    vars(atoll.server.deploy.executor)["SERVER_APP"] = "tests.federation.turned_server:server_app"
    atoll.server.deploy.executor.superexec()


def server_app() -> None:
    """The entry of a run's process."""
    from atoll.server import app
    from atoll.server.deploy.executor import server_app as run_server_app

    folder, clock, exchange = Path(os.environ[CUTS]), AheadClock(0.0), app.FlowerTransport.send_and_receive

    def cut_short(
        carrier: app.FlowerTransport, request: Request, names: Sequence[str], timeout: float
    ) -> Iterator[Reply]:
        kind = type(request).__name__.removesuffix("Request").lower()
        cut = folder / f"{Job.from_json(request.job).name}-{request.round}-{kind}"
        missing = set(names)
        if cut.exists():  # what it waits for is the deadline, not the site's connection
            vars(app)["REJOIN_SECONDS"] = math.inf
        for reply in exchange(carrier, request, names, timeout):
            yield reply
            missing.discard(reply.client)
            if cut.exists() and missing == set(cut.read_text().split()):
                cut.unlink()
                clock.now += timeout

    vars(app)["time"] = clock
    app.FlowerTransport.send_and_receive = cut_short  # type: ignore[method-assign]
    run_server_app()
