"""Every task's own job: untrained, every client alone, federated, pooled; as it is, and with clients alike.

    python -m benchmarks.tasks [JOB …]        # jobs/*.toml, all but those that pretrain

Prints a table in Markdown. Runs go to a temporary folder; nothing is timed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from protocol.errors import InputError
from protocol.job import Iid, Job
from server.comparison import comparison_of, lower_is_better
from sim.engine import simulate

JOBS = Path(__file__).parents[1] / "jobs"
ROWS = ("zero_shot", "local_only", "federated", "pooled")
HEAD = "| job | task | metric | reference | untrained | alone | federated | pooled | of pooled |"


def main(paths: list[str]) -> None:
    """Run the jobs one after the other, and print a row for each as soon as it is there."""
    found = [Path(path) for path in paths] or sorted(JOBS.glob("*.toml"))
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for path in found:
        if path.stem.startswith("pretrain") or path.stem == "digits-frontier":
            continue
        job = Job.load(path, ['evaluate.baselines=["zero_shot", "local_only", "pooled"]'])
        print(row_of(path.stem, job), flush=True)
        if job.data.partition.kind != "iid":
            data = job.data.model_copy(update={"partition": Iid()})
            print(row_of(f"{path.stem}, clients alike", job.model_copy(update={"data": data})), flush=True)


def row_of(name: str, job: Job) -> str:
    """One line of the table; a job that can't run here says why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = simulate(job, Path(folder) / "run", watch=lambda step, what: None, report=False)
        except InputError as error:
            return f"| {name} | {job.task.name} | not run: {error} |"
    compared = comparison_of(result)
    metric = compared.headline or "loss"
    references = {row: compared.value(row, metric) for row in compared.rows if row not in ROWS}
    told = ", ".join(f"{row.replace('_', ' ')} {shown(value)}" for row, value in references.items())
    values = [compared.value(row, metric) for row in ROWS]
    cells = [name, job.task.name, metric, told, *map(shown, values), share(metric, values)]
    return f"| {' | '.join(cells)} |"


def share(metric: str, values: list[Any]) -> str:
    """What part of pooled quality the federated model has."""
    federated, pooled = values[2], values[3]
    if not federated or not pooled:
        return "-"
    return f"{100 * (pooled / federated if lower_is_better(metric) else federated / pooled):.0f} %"


def shown(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
