"""Every task's own job: untrained, every client alone, federated, pooled; as it is, and with clients alike.

    python -m benchmarks.tasks [JOB …]        # jobs/*.toml, all but those that pretrain

Prints a table in Markdown. A job that goes on from another's run runs that first; "from nothing" is the
same federation from random weights. Seconds are of one run of the job as its file is. Runs go to a
temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from atoll.errors import InputError
from atoll.job.job import Iid, Job
from atoll.report.comparison import comparison_of
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.metric_values import lower_is_better

JOBS = Path(__file__).parents[1] / "jobs"
ROWS = ("zero_shot", "local_only", "federated", "pooled")
ALL = 'evaluate.baselines=["zero_shot", "local_only", "pooled"]'
NONE = "evaluate.baselines=[]"
HEAD = (
    "| job | task | metric | reference | untrained | alone | federated | pooled | of pooled"
    " | from nothing | seconds |"
)


@dataclass
class Bench:
    """Runs jobs in one folder; what several of them go on from runs once."""

    folder: Path
    made: dict[str, Path] = field(default_factory=dict)
    count: int = 0

    def rows(self, path: Path) -> list[str]:
        """A line for the job as it is, and one with clients alike where they aren't."""
        try:
            start = self.start(path)
            own, job = Job.load(path, start), Job.load(path, [*start, ALL])
            began = time.perf_counter()
            result = self.run(own)
            seconds = f"{time.perf_counter() - began:.0f}"
            if set(own.evaluate.baselines) != set(job.evaluate.baselines):
                result = self.run(job)
            lines = [line(path.stem, job, result, self.from_nothing(path, job), seconds)]
            if job.data.partition.kind != "iid":
                alike = job.model_copy(update={"data": job.data.model_copy(update={"partition": Iid()})})
                lines.append(line(f"{path.stem}, clients alike", alike, self.run(alike), "-", "-"))
            return lines
        except InputError as error:
            return [f"| {path.stem} | not run: {error} |"]

    def start(self, path: Path) -> list[str]:
        """The override that names the run that the job goes on from, once that has run."""
        weights = str(tomllib.loads(path.read_text(encoding="utf-8"))["backbone"].get("weights", ""))
        if not weights.startswith("../runs/"):
            return []
        name = Path(weights).name
        if name not in self.made:
            self.made[name] = self.folder / name
            simulate(Job.load(JOBS / f"{name}.toml"), self.made[name], on_event=ignore_events, report=False)
        return [f'backbone.weights="{self.made[name]}"']

    def run(self, job: Job) -> RunResult:
        self.count += 1
        return simulate(job, self.folder / f"run-{self.count}", on_event=ignore_events, report=False)

    def from_nothing(self, path: Path, job: Job) -> str:
        """The federated metric from random weights, where the job starts from others."""
        if job.backbone.weights == "random":
            return "-"
        result = self.run(Job.load(path, [NONE, 'backbone.weights="random"']))
        compared = comparison_of(result)
        return shown(compared.value("federated", compared.headline or "loss"))


def main(paths: list[str]) -> None:
    """Run the jobs one after the other, and print a row for each as soon as it is there."""
    found = [Path(path) for path in paths] or sorted(JOBS.glob("*.toml"))
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for path in found:
            if path.stem.startswith("pretrain") or path.stem == "digits-frontier":
                continue
            print("\n".join(bench.rows(path)), flush=True)


def line(name: str, job: Job, result: RunResult, nothing: str, seconds: str) -> str:
    """One row of the table."""
    compared = comparison_of(result)
    metric = compared.headline or "loss"
    references = {row: compared.value(row, metric) for row in compared.rows if row not in ROWS}
    told = ", ".join(f"{row.replace('_', ' ')} {shown(value)}" for row, value in references.items())
    values = [compared.value(row, metric) for row in ROWS]
    cells = [name, job.task.name, metric, told, *map(shown, values), share(metric, values)]
    return f"| {' | '.join([*cells, nothing, seconds])} |"


def share(metric: str, values: list[float | None]) -> str:
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
