"""Verbs that run jobs on this machine: demo, simulate, partition."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.display import out, print_summary, sanitize, watching
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, JobError
from atoll.plugins import load_files
from atoll.server.events import Event, RoundEnded

if TYPE_CHECKING:
    from atoll.job.job import Job
    from atoll.report.run_result import RunResult
    from atoll.strategies import Strategy

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.lr=0.05."),
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (TOML).")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="FILE", help="A Python file that brings a strategy, …; can be given again."
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", metavar="NAME", help="Follow it in tensorboard, mlflow or wandb; can be given again."
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option("--vary", metavar="KEY=A,B,C", help="A key and its values; can be given again."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Processes; as many as there are cores if not said.")
]
OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the run directory goes.")]


class Interrupted(JobError):
    """Ctrl-C; the message says what is kept, and how to go on."""


SEEDS = 5
"""Of every strategy that is compared."""

ENGINES = ("inline", "loop", "cohort", "ray")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(cls=Verb, epilog="Example: atoll demo")(demo)
    app.command(cls=Verb, epilog="Example: atoll simulate jobs/bbc-news.toml --set federation.rounds=5")(
        simulate
    )
    app.command(cls=Verb, epilog="Example: atoll partition jobs/bbc-news.toml --out shards")(partition)


def demo(out: OutDir = None) -> None:
    """Fine-tune a head on a real sentence encoder over 20 clients; offline, about a minute."""
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty, choose another --out")
    run_here(_demo_job(), out, force=out is None, default=Path("runs/demo"))


def simulate(
    job: JobFile,
    engine: Annotated[
        str, typer.Option(help="inline, loop, cohort or ray; the bits are the same.")
    ] = "inline",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="How many work at a time; else what suits job and machine."),
    ] = None,
    out: OutDir = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole round.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an old run in --out.")] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Strategies to run the job with, over --seeds: a table, a picture."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help=f"Runs of every strategy that is compared; {SEEDS} if not said."
        ),
    ] = None,
    track: Track = None,
    plugin: Plugins = None,
) -> None:
    """Run a whole federation on this machine."""
    load_files(plugin or ())
    if compare is not None:
        from atoll.cli.sweep import compare as compare_strategies

        options = {
            "--engine": engine != "inline",
            "--resume": resume,
            "--force": force,
            "--track": bool(track),
        }
        for option in (option for option, is_given in options.items() if is_given):
            raise ConfigError(
                f"{option}: has no meaning with --compare, whose same command goes on: remove it"
            )
        compare_strategies(job, compare, seeds or SEEDS, out, overrides or (), workers)
        return
    if seeds is not None:
        raise ConfigError("--seeds: has no meaning without --compare: remove it, or see atoll sweep")
    if engine not in ENGINES:
        raise ConfigError(f"--engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    loaded = load(job, overrides)
    default = Path("runs") / loaded.name
    run_here(
        loaded, out, engine=engine, workers=workers, resume=resume, force=force, default=default,
        track=track or (),
    )  # fmt: skip


def run_here(
    job: Job,
    where: Path | None,
    *,
    default: Path,
    engine: str = "inline",
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    track: Sequence[str] = (),
    strategy: Strategy | None = None,
) -> Path:
    """Simulate with a live display, then say what came out; the run directory.

    A `strategy` is used instead of the one that the job names.
    """
    from atoll.server.job_checks import check_simulated
    from atoll.tracking import Tracking, check_trackers

    check_trackers(track)
    where = where or (default if force else next_free_path(default, resume=resume))
    finished = _finished(where, job) if resume else None
    if finished is not None:
        out().print(sanitize(f"{where}: this run is complete, nothing is left to do"), soft_wrap=True)
        print_summary(finished, where)
        return where
    check_simulated(job)
    from atoll.sim.engines.engine import default_workers
    from atoll.sim.engines.engine import (
        simulate as simulate_job,  # torch comes with it: not before there is work to do
    )

    tracking = Tracking(job, where, track)

    def on_event(event: Event) -> None:
        watcher.on_event(event)
        if isinstance(event, RoundEnded) and track:
            tracking.line(dict(event.line))

    try:
        with watching(job.federation.rounds) as watcher:
            result = simulate_job(
                job,
                where,
                engine=engine,
                workers=workers or default_workers(job, engine),
                on_event=on_event,
                progress=watcher.features,
                resume=resume,
                force=force,
                strategy=strategy,
            )
    except KeyboardInterrupt:
        raise Interrupted(resume_hint(where, job.federation.rounds)) from None
    if track:
        tracking.end(result)
    print_summary(result, where)
    for name, place in tracking.places.items():
        out().print(f"{name:<13}  {sanitize(place)}", highlight=False, soft_wrap=True)
    return where


def _finished(where: Path, job: Job) -> RunResult | None:
    """The result of a run of this very job that has nothing left to do."""
    from atoll.report.run_result import RunResult

    return RunResult.of_job(where, job.hash) if (where / "report.html").is_file() else None


def resume_hint(where: Path, rounds: int) -> str:
    """What an interrupted run has left, and the command that continues it."""
    if not (where / "job.toml").is_file():
        return "no round had begun, and nothing is left behind"
    whole = [int(p.stem.removeprefix("round-")) for p in (where / "checkpoints").glob("round-*")]
    command = shlex.join(["atoll", *resuming(sys.argv[1:], where)])
    return f"{max(whole, default=0)} of {rounds} rounds are whole in {where}; go on with: {command}"


def resuming(arguments: list[str], where: Path) -> list[str]:
    """The command line that resumes the run which this one started in `where`."""
    remaining = [a for a in arguments if a not in ("--force", "--resume")]
    if remaining[:1] == ["demo"]:
        remaining = ["simulate", str(where / "job.toml"), *remaining[1:]]
    if not any(a == "--out" or a.startswith("--out=") for a in remaining):
        remaining += ["--out", str(where)]
    return [*remaining, "--resume"]


def load(path: Path, overrides: list[str] | None) -> Job:
    """The job; a path in it that would be right from here, but not from the job's folder, is told apart."""
    from atoll.job.job import Job

    job = Job.load(path, overrides or ())
    paths = {
        "data.source": job.data.source, "data.test": job.data.test,
        "backbone.name": job.backbone.name, "backbone.weights": job.backbone.weights,
    }  # fmt: skip
    for key, value in paths.items():
        if value is None or not Path(value).is_absolute() or Path(value).exists():
            continue
        meant = Path(os.path.relpath(value, path.parent.resolve())).absolute()
        if meant.exists():
            raise ConfigError(
                f"{path}: {key}: no {value}; paths in a job start at its own folder,"
                f" did you mean {meant.resolve()}?"
            )
    return job


def next_free_path(path: Path, *, resume: bool) -> Path:
    """The path itself, or `path-2`, `path-3`, …: the first that is free, or to resume the last taken."""
    candidates = [path]
    while candidates[-1].exists():
        candidates.append(path.with_name(f"{path.name}-{len(candidates) + 1}"))
    return candidates[-2] if resume and len(candidates) > 1 else candidates[-1]


def partition(
    job: JobFile,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the shards.")],
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Write the simulated clients' shards as folders, one a client, for a real federation."""
    load_files(plugin or ())
    from atoll.server.job_checks import check_simulated

    check_simulated(loaded := load(job, overrides))
    from atoll.sim.population.write_shards import write_shards  # torch comes with it

    try:
        names = write_shards(loaded, out_dir)
    except KeyboardInterrupt:
        raise Interrupted(f"no shard is left in {out_dir}") from None
    first = shlex.quote(str(out_dir / names[0]))
    for line in (
        f"{len(names)} shards written to {out_dir}: {names[0]} to {names[-1]}",
        f"join one with: atoll join KIT --data {first}",
    ):
        out().print(sanitize(line), highlight=False, soft_wrap=True)


def _demo_job() -> Job:
    """The embedded default; `jobs/bbc-news.toml` is the same job."""
    from atoll.job.job import Job

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
