"""Results made by hand, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from atoll.report.run_result import RunResult
from atoll.server.run.privacy_report import NO_PRIVACY

NOTHING: dict[str, Any] = {
    "name": "run", "job_hash": "", "model_sha256": "", "engine": "inline", "task": "image-classification",
    "strategy": "fedavg", "seed": 1, "seconds": 1.0, "simulated_seconds": None, "population": 0, "data": None,
    "clients_trained": 0, "bytes_up": 0, "bytes_down": 0, "peak_rss_mb": 1.0, "rounds": [],
    "final": {"server": {}, "clients": {}}, "personal": None, "baselines": {}, "privacy": NO_PRIVACY,
    "compression": None, "facts": {}, "backbone": {"name": "raw:pixels", "origin": "none"}, "trainable": {},
    "machine": {}, "notes": [],
}  # fmt: skip


def result_with(**fields: Any) -> RunResult:
    """A result of a run without rounds and clients, but for these fields."""
    return RunResult(**NOTHING | fields)
