"""The final bits of a small job for everything that a job can ask for, and where they were seen.

`python -m tests.repository.golden` runs all of them and writes `tests/repository/golden.json`, for this
processor and these versions, as the last record. Bits of another processor or of other versions are kept
beside them; whoever changes bits on purpose takes those out of the other records.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atoll.cli.versions import CPUINFO, cpu_capability
from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.support.task_data import ready
from tests.support.task_jobs import TABLES, job_of

FILE = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "torchvision", "transformers", "peft", "opacus", "numpy", "flwr")

CLIENT = {
    "unit": "client",
    "noise_multiplier": 0.7,
    "delta": 1e-3,
    "clipping_norm": 0.5,
    "seeded_noise": True,
}
EXAMPLE = {
    "unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5,
    "seeded_noise": True,
}  # fmt: skip
BOTH = {
    "unit": "both", "seeded_noise": True,
    "client": {"noise_multiplier": 0.7, "delta": 1e-3, "clipping_norm": 0.5},
    "example": {"noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5},
}  # fmt: skip

DIGITS: dict[str, Any] = {
    "seed": 7,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32},
    "train": {"lr": 0.02, "batch_size": 16},
    "federation": {"clients": 4, "cohort": 3, "rounds": 3},
}
HEADS: dict[str, dict[str, Any]] = {
    **{f"strategy-{name}": {"strategy": {"name": name}} for name in (
        "fedavg", "fedavgm", "fedprox", "fedadagrad", "fedadam", "fedyogi", "reptile", "flwr:FedYogi",
        "flwr:Krum", "scaffold", "feddyn", "diloco",
    )},
    "strategy-scaffold-by-full-gradients": {"strategy": {"name": "scaffold", "options": {"option": 1}}},
    **{f"selection-{rule}": {"federation": {"selection": rule}}
       for rule in ("by-size", "power-of-choice", "oort")},
    "learning-rate-schedule": {"strategy": {"name": "fedavgm", "lr_schedule": "cosine", "lr_warmup": 1}},
    **{f"compression-{scheme}": {"federation": {"compression": scheme}}
       for scheme in ("fp16", "int8", "int4", "top-k", "sign")},
    "strategy-fedcompass": {
        "strategy": {"name": "fedcompass", "options": {"min_steps": 2, "max_steps": 6}},
        "federation": {"cohort": None, "concurrency": 4, "rounds": 5},
    },
    "strategy-flanders": {
        "strategy": {"name": "flanders", "options": {"hostile": 1}},
        "federation": {"cohort": None, "rounds": 5},
    },
    "strategy-signsgd": {
        "strategy": {"name": "signsgd"}, "federation": {"compression": "sign", "error_feedback": False},
    },
    **{f"closed-form-{kind}": {"tune": {"head_init": kind}, "federation": {"rounds": 1}}
       for kind in ("prototype", "ridge")},
    "closed-form-random-features": {
        "tune": {"head_init": "ridge", "hidden": 32}, "federation": {"rounds": 1},
    },
    **{f"imbalance-{kind}": {"train": {"imbalance": kind}}
       for kind in ("weights", "focal", "logits", "sampling")},
    "personal-mixture": {"personal": {"keep": "mixture"}},
    **{f"partition-{table['kind']}": {"data": {"partition": table, "classes": [str(c) for c in range(10)]}}
       for table in (
        {"kind": "iid"}, {"kind": "pathological", "classes_per_client": 5},
        {"kind": "resampled", "examples": 40},
    )},
    "optimizer-adam": {"train": {"optimizer": "adam", "weight_decay": 0.01, "epochs": 2}},
    "steps": {"train": {"steps": 7}},
    "hidden-layer": {"tune": {"hidden": 16}},
    "label-smoothing": {"train": {"label_smoothing": 0.1}},
    "augmented": {"train": {"augment": ["crop", "flip"], "cached_views": 2}},
    "shots": {"data": {"shots": 2}},
    "patience": {"evaluate": {"patience": 1}},
    "adapted": {"evaluate": {"adapt": 2}},
    "channels-last": {"backbone": {"channels_last": True}},
    "client-privacy": {"privacy": CLIENT},
    "client-privacy-adaptive": {"privacy": CLIENT | {"clipping": "adaptive"}},
    "client-privacy-compressed": {"privacy": CLIENT, "federation": {"compression": "int8"}},
    "example-privacy": {"privacy": EXAMPLE},
    "example-privacy-distributed": {"privacy": EXAMPLE | {"where": "distributed"}},
    "client-privacy-distributed": {"privacy": CLIENT | {"where": "distributed"}},
    "both-units": {"privacy": BOTH},
    "poisson-cohorts": {"privacy": CLIENT, "federation": {"cohort": None, "cohort_rate": 0.6}},
    "secure-sum": {"federation": {"secure_aggregation": True, "cohort": 4}},
    "engine-loop": {"engine": "loop"},
    "engine-cohort": {"engine": "cohort"},
    "workers": {"workers": 2},
}  # fmt: skip
"""On features, whose rounds take milliseconds."""
NETWORKS: dict[str, dict[str, Any]] = {
    "full-example-privacy": {"method": "full", "privacy": EXAMPLE},
    "lora-example-privacy": {"method": "lora", "privacy": EXAMPLE},
    "full-ghost-norms": {"method": "full", "privacy": EXAMPLE | {"ghost_norms": True}},
    "last-k": {"method": "last-k"},
    "lora": {"method": "lora"},
    "lora-rslora": {"method": "lora", "tune": {"method": "lora", "rank": 4, "rslora": True}},
    "lora-fedsb": {"method": "lora", "tune": {"method": "lora", "rank": 4, "lora_merge": "fedsb"}},
    "full-client-privacy": {"method": "full", "privacy": CLIENT},
    "full-int8": {"method": "full", "federation": {"clients": 2, "rounds": 2, "compression": "int8"}},
    "personal-norms": {"method": "full", "personal": {"keep": "norms"}},
    "personal-head": {"method": "last-k", "personal": {"keep": "head"}},
    "full-scaffold": {
        "method": "full", "strategy": {"name": "scaffold"}, "train": {"lr": 0.05, "batch_size": 16},
    },
    "full-loop": {"method": "full", "engine": "loop"},
    "full-cohort": {"method": "full", "engine": "cohort"},
    "full-bf16": {"method": "full", "train": {"lr": 0.01, "batch_size": 16, "precision": "bf16"}},
    "full-steps": {"method": "full", "train": {"lr": 0.01, "batch_size": 16, "steps": 3}},
    "full-accumulated": {"method": "full", "train": {"lr": 0.01, "batch_size": 8, "accumulate": 2}},
    "seeds": {"method": "seeds", "tune": {"method": "seeds", "seeds": 64}, "train": {
        "lr": 0.001, "batch_size": 8, "steps": 5, "lr_schedule": "cosine",
    }},
    "schedule": {"method": "head", "tune": {"method": "head", "then": [
        {"method": "last-k", "layers": 1, "after": 1}, {"method": "full", "after": 1, "lr": 0.001},
    ]}, "federation": {"clients": 2, "rounds": 3}},
}  # fmt: skip
"""On a small encoder of texts."""


def jobs() -> Iterator[tuple[str, Callable[[Path], Job], dict[str, Any]]]:
    """(name, the job once its data is in a folder, options of `simulate`), one for everything."""
    for task in TABLES:
        for method in ("head", "full"):
            yield f"{task}-{method}", _of_task(task, method, {}), {}
    for name, tables in NETWORKS.items():
        method, options, more = _parted(tables)
        yield f"texts-{name}", _of_task("text-classification", method, more), options
    for name, tables in HEADS.items():
        _, options, more = _parted(tables)
        table = (
            DIGITS | {key: DIGITS.get(key, {}) | value for key, value in more.items()} | {"name": "digits"}
        )
        yield f"digits-{name}", _of_table(table), options


def _of_task(task: str, method: str, more: dict[str, Any]) -> Callable[[Path], Job]:
    def made(folder: Path) -> Job:
        (folder / task).mkdir(parents=True, exist_ok=True)
        return ready(job_of(task, method, **more), folder / task)

    return made


def _of_table(table: dict[str, Any]) -> Callable[[Path], Job]:
    return lambda folder: Job.parse(table, origin="test")


def _parted(tables: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A way of tuning, options of `simulate`, and a job's tables."""
    options = {key: tables[key] for key in ("engine", "workers") if key in tables}
    rest = {key: value for key, value in tables.items() if key not in (*options, "method")}
    return tables.get("method", ""), options, rest


def bits(make: Callable[[Path], Job], folder: Path, out: Path, options: dict[str, Any]) -> str:
    """The `model_sha256` of the run, as its file has it, whose every key is of the type that is declared."""
    result = simulate(make(folder), out, on_event=ignore_events, report=False, **options)
    assert RunResult.read(out).to_json() == result.to_json()
    return result.model_sha256


def place() -> dict[str, str]:
    """What the bits depend on: the kind of processor, and the versions."""
    fields = dict(
        [part.strip() for part in line.partition(":")[::2]]
        for line in (CPUINFO.read_text("utf-8").split("\n\n")[0].splitlines() if CPUINFO.is_file() else ())
    )
    kind = " ".join(fields.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return {"processor": f"{platform.machine()} {kind} {cpu_capability()}"} | {
        package: version(package) for package in PACKAGES
    }


def main() -> None:
    """Run all jobs, and keep their bits with what they depend on."""
    records = json.loads(FILE.read_text()) if FILE.exists() else []
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (job, make, options) in enumerate(jobs()):
            found[job] = bits(make, Path(name) / "data", Path(name) / str(number), options)
            sys.stdout.write(f"{job:40} {found[job]}\n")
    records = [record for record in records if record["place"] != place()]
    FILE.write_text(json.dumps([*records, {"place": place(), "bits": found}], indent=1) + "\n")


if __name__ == "__main__":
    main()
