"""FLamby's Fed-TCGA-BRCA: survival of patients in six regions by a linear Cox model, with published figures.

    python -m benchmarks.tcga_brca --data FOLDER [--shards FOLDER] [NAME …]

FOLDER holds `brca.csv` (39 features, E and T) and `split.csv` (which patient is in which region's training
or test part), as FLamby (Ogier du Terrail et al. 2022) has them; the shards are written beside each other,
a folder a region with train.csv and test.csv. 100 local steps of SGD in batches of 8 in each of 5 rounds,
all regions in each; features as they are. A figure is the mean of the six regions' c-index on their test
parts, and its standard deviation over ten seeds, which also draw the first weights.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.data.shard import Shard
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.modes import modes_of
from atoll.trained import trained

SEEDS = range(1, 11)
REGIONS = 6
TIME, EVENT, PATIENT, REGION = "T", "E", "pid", "region"

ADAPTIVE = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "tau": 1e-8}
STRATEGIES: dict[str, tuple[float, dict[str, Any]]] = {
    "fedadam": (0.01, {"name": "fedadam", **ADAPTIVE}),
    "fedyogi": (0.01, {"name": "fedyogi", **ADAPTIVE}),
    "fedadagrad": (0.01, {"name": "fedadagrad", "lr": 1.0, "beta1": 0.9, "tau": 1e-8}),
    "fedavg": (0.1, {"name": "fedavg"}),
}
"""By name: the clients' learning rate, and the server's strategy, as in the authors' configuration."""

PUBLISHED = {
    "fedadam": (0.8152, 0.023), "fedyogi": (0.8152, 0.023), "fedadagrad": (0.8129, 0.004),
    "fedavg": (0.7319, 0.162),
}  # fmt: skip
"""The mean over five seeds, and its deviation."""

Rows = list[dict[str, str]]


def write_shards(data: Path, folder: Path) -> list[str]:
    """A folder a region with its training and its test part, and all training parts in one; the features.

    Raises:
        SystemExit: the folder holds other files.
    """
    for name in ("brca.csv", "split.csv"):
        if not (data / name).is_file():
            raise SystemExit(f"--data: {data / name} is missing, expected FLamby's Fed-TCGA-BRCA")
    parts = {row["pid"]: row["fold2"] for row in _rows(data / "split.csv")}
    patients = _rows(data / "brca.csv")
    features = [name for name in patients[0] if name not in (PATIENT, EVENT, TIME)]
    together: Rows = []
    for region in range(REGIONS):
        for part in ("train", "test"):
            own = [row for row in patients if parts.get(row[PATIENT]) == f"{part}_{region}"]
            _write(folder / f"region-{region}" / f"{part}.csv", own)
            together += [row | {REGION: str(region)} for row in own] if part == "train" else []
    _write(folder / "all" / "train.csv", together)
    return features


def _rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def job_of(name: str, seed: int, shards: Path, features: Sequence[str]) -> Job:
    """The published setting of one strategy."""
    lr, strategy = STRATEGIES[name]
    return Job.parse(
        {
            "name": f"tcga-brca-{name}",
            "seed": seed,
            "task": {"name": "survival", "options": {"features": list(features)}},
            "data": {
                "source": str((shards / "all").resolve()),
                "partition": {"kind": "natural", "by": REGION},
                "columns": {"time": TIME, "event": EVENT},
                "test_fraction": 0.0,
                "validation_fraction": 0.0,
            },
            "backbone": {"name": "atoll:linear", "weights": "random"},
            "tune": {"method": "full"},
            "train": {"lr": lr, "batch_size": 8, "steps": 100},
            "federation": {"clients": REGIONS, "rounds": 5},
            "strategy": strategy,
        },
        origin="benchmark",
    )


def test_parts(learner: Learner, shards: Path) -> list[Shard]:
    """Each region's own patients to test on."""
    task, job = learner.task, learner.job
    found = []
    for region in range(REGIONS):
        source = shards / f"region-{region}"
        table = task.read(source, DataSection(source=str(source), columns=job.data.columns), job.task.options)
        assert table.test is not None, "every region has a test part"
        found.append(task.shard(table.test, learner.data_info))
    return found


def c_index(name: str, seed: int, shards: Path, features: Sequence[str]) -> float:
    """The mean over the regions' test parts, after the last round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        simulate(job_of(name, seed, shards, features), run, on_event=ignore_events, report=False)
        learner, tensors = trained(run)
    measured = [learner.compute(learner.evaluate(tensors, part)) for part in test_parts(learner, shards)]
    return statistics.mean(float(values["c_index"] or "nan") for values in measured)


def line_of(name: str, values: Sequence[float]) -> str:
    """A row of the table: ours, the published figure, how far apart they are, and what the seeds are like."""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    published, deviation = PUBLISHED[name]
    apart = (mean - published) / deviation
    modes = modes_of(values)
    remark = "" if modes is None else f"**{modes.description}**"
    seeds = " ".join(f"{value:.2f}" for value in values)
    return (
        f"| `{name}` | {mean:.4f} ± {spread:.3f} | {published:.4f} ± {deviation:.3f} | {apart:+.2f} |"
        f" {seeds} | {remark} |"
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table, a row a strategy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tcga_brca")
    parser.add_argument("--data", type=Path, required=True, help="the folder with brca.csv and split.csv")
    parser.add_argument("--shards", type=Path, help="where the regions' shards are written; else nowhere")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STRATEGIES)}; else all")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in STRATEGIES]:
        parser.error(f"no strategy {unknown[0]!r}, expected some of {', '.join(STRATEGIES)}")
    with tempfile.TemporaryDirectory() as folder:
        shards: Path = given.shards or Path(folder)
        features = write_shards(given.data, shards)
        sys.stdout.write("| strategy | c-index | published | apart, in deviations | each seed | remark |\n")
        sys.stdout.write("|---|---|---|---|---|---|\n")
        for name in given.names or STRATEGIES:
            values = [c_index(name, seed, shards, features) for seed in SEEDS]
            sys.stdout.write(f"{line_of(name, values)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
