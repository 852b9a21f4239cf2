"""Verbs that run jobs on this machine: demo, simulate, partition."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atoll.show import ending, out, watching
from protocol.errors import ConfigError
from protocol.job import Job

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.lr=0.05."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (TOML).")]
OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the run directory goes.")]
ENGINES = ("inline", "loop", "cohort", "ray")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog="Example: atoll demo")(demo)
    app.command(epilog="Example: atoll simulate jobs/bbc-news.toml --set federation.rounds=5")(simulate)
    app.command(epilog="Example: atoll partition jobs/bbc-news.toml --out shards")(partition)


def demo(out: OutDir = None) -> None:
    """Fine-tune a head on a real sentence encoder over 20 clients; offline, about a minute."""
    run_here(_demo_job(), out, force=out is None, default=Path("runs/demo"))


def simulate(
    job: JobFile,
    engine: Annotated[str, typer.Option(help="inline or ray; the final bits are the same.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Worker processes.")] = 1,
    out: OutDir = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole round.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an old run in --out.")] = False,
) -> None:
    """Run a whole federation on this machine."""
    if engine not in ("inline", "ray"):
        raise ConfigError(f"--engine: expected inline or ray, found {engine!r}")
    loaded = Job.load(job, overrides or ())
    default = Path("runs") / loaded.name
    run_here(loaded, out, engine=engine, workers=workers, resume=resume, force=force, default=default)


def run_here(
    job: Job,
    where: Path | None,
    *,
    default: Path,
    engine: str = "inline",
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
) -> None:
    """Simulate with a live display, then say what came out."""
    from sim.engine import simulate as simulate_job

    where = where or (default if force else unused(default, resume=resume))
    with watching(job.federation.rounds) as watcher:
        result = simulate_job(
            job,
            where,
            engine=engine,
            workers=workers,
            watch=watcher.step,
            progress=watcher.features,
            resume=resume,
            force=force,
        )
    ending(result, where)


def unused(path: Path, *, resume: bool) -> Path:
    """The path itself, or `path-2`, `path-3`, …: the first that is free, or to resume the last taken."""
    candidates = [path]
    while candidates[-1].exists():
        candidates.append(path.with_name(f"{path.name}-{len(candidates) + 1}"))
    return candidates[-2] if resume and len(candidates) > 1 else candidates[-1]


def partition(
    job: JobFile,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the shards.")],
    overrides: Overrides = None,
) -> None:
    """Write the simulated clients' shards as folders, one a client, for a real federation."""
    from sim.shards import write_shards

    names = write_shards(Job.load(job, overrides or ()), out_dir)
    out.print(f"{len(names)} shards written to {out_dir}: {names[0]} … {names[-1]}", highlight=False)
    out.print(f"join one with: atoll join KIT --data {out_dir / names[0]}", highlight=False)


def _demo_job() -> Job:
    """The embedded default; `jobs/bbc-news.toml` is the same job."""
    return Job.parse(
        {
            "name": "bbc-news",
            "seed": 7,
            "task": {"name": "text-classification"},
            "data": {"source": "bbc-news", "partition": {"kind": "dirichlet", "alpha": 0.3}},
            "backbone": {"name": "hf:all-MiniLM-L6-v2", "weights": "pretrained", "offline": False},
            "tune": {"method": "head"},
            "train": {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.1},
            "federation": {"clients": 20, "cohort": 10, "rounds": 20},
            "strategy": {"name": "fedavg"},
            "privacy": {"unit": "none"},
            "evaluate": {"every": 1, "baselines": ["zero_shot", "local_only", "pooled"]},
        },
        origin="demo",
    )
