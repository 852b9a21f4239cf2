"""`privacy.audit`: a simulation that attacks itself when it is complete."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.job import Job
from protocol.synced import replace_synced
from server.report import write_report
from server.rounds import Watch
from sim.audit import AT_THE_END, Audit, audited
from sim.population import Population

logger = logging.getLogger(__name__)


def attack_at_the_end(
    job: Job, population: Population, out: Path, result: dict[str, Any], watch: Watch
) -> dict[str, Any]:
    """The result with what the attack found under `privacy.audit`, written down and in the report.

    A job that has no room for canaries keeps its result as it is, and the run's log says why.
    """

    def played(done: int, total: int) -> None:
        watch("audit", {"done": done, "total": total})

    try:
        found = audited(job, result["privacy"], Audit(usual=AT_THE_END), population=population, watch=played)
    except ConfigError as error:
        logger.warning("no audit: %s", error)
        return result
    result = {**result, "privacy": {**result["privacy"], "audit": found}}
    replace_synced(out / "result.json", json.dumps(result, indent=2, allow_nan=False).encode())
    write_report(out, result)
    return result
