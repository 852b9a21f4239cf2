"""Atoll: federated fine-tuning, the same bits in simulation and in deployment.

import atoll
run = atoll.simulate(atoll.load_job("job.toml", {"federation.rounds": 5}))
run.metrics["federated"], run.predict(["a new text"]), run.export("onnx")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.api import Exported, Run, Search, Sweep, advise, load_export, load_job, simulate, sweep, tune
    from atoll.errors import InputError, JobError
    from atoll.job.job import Job
    from atoll.report.run_result import RunResult

__version__ = "0.1.0"

__all__ = [
    "Exported", "InputError", "Job", "JobError", "Run", "RunResult", "Search", "Sweep", "__version__",
    "advise", "load_export", "load_job", "simulate", "sweep", "tune",
]  # fmt: skip

_ELSEWHERE = {
    "Job": "atoll.job.job",
    "InputError": "atoll.errors",
    "JobError": "atoll.errors",
    "RunResult": "atoll.report.run_result",
}


def __getattr__(name: str) -> Any:
    """What is offered, imported when it is asked for: the command line need not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module 'atoll' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "atoll.api")), name)
