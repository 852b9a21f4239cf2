"""A site whose work can be held in its middle, so that a test interferes just there.

While the folder $ATOLL_TEST_HOLD has a file `JOB-ROUND-CLIENT`, that client's training in that round of that
job has begun, and is charged where it is private, but doesn't go on. The site's log says `held: ` and the
file's name once it is so.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import atoll.client.site
from atoll.job.job import Job
from atoll.protocol.messages import Reply
from atoll.protocol.requests import EvaluateRequest, Request

HOLD = "ATOLL_TEST_HOLD"
logger = logging.getLogger("atoll.client.site")


def main() -> None:
    """`atoll join` whose executor can be held."""
    import atoll.cli.site
    from atoll.cli.start import main as start

    vars(atoll.cli.site)["EXECUTOR"] = "tests.federation.held_site:executor"
    start()


def executor() -> None:
    """The entry of the process that works for the site."""
    from atoll.cli.site import executor as answer_tasks

    folder, admit = Path(os.environ[HOLD]), atoll.client.site.Site.charge_privacy

    def held(
        site: atoll.client.site.Site, job: Job, request: Request, names: Sequence[str]
    ) -> tuple[atoll.client.site.ChargedClients, list[Reply]]:
        charged_clients = admit(site, job, request, names)
        files = [folder / f"{job.name}-{request.round}-{name}" for name in names]
        for file in files if not isinstance(request, EvaluateRequest) else ():
            if file.exists():
                logger.info("held: %s", file.name)
            while file.exists():
                time.sleep(0.01)
        return charged_clients

    atoll.client.site.Site.charge_privacy = held  # type: ignore[method-assign]
    answer_tasks()
