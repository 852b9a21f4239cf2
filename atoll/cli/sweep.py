"""The verb that runs a grid of jobs and draws what it found, sweep; and what simulate --compare does."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.display import ProgressView, escape, gauge, out, sanitize, stop_if_asked
from atoll.cli.run import Interrupted, JobFile, OutDir, Overrides, Plugins, Processes, Vary
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, JobError
from atoll.plugins import load_files

if TYPE_CHECKING:
    from rich.table import Table

    from atoll.backbones.extract import Progress
    from atoll.sim.sweep.grid import Base, Grid, Planned, SweepFolder
    from atoll.sim.sweep.results import Row

SEEDS = 10


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        cls=Verb,
        epilog="Example: atoll sweep jobs/digits-frontier.toml --vary privacy.epsilon=0.5,1,2,4,8,inf",
    )(sweep)


def sweep(
    job: JobFile,
    vary: Vary = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help=f"Runs of every combination; {SEEDS} if not said."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2, max=1000, help="Cross-validate inside the clients, by so many folds of their data."
        ),
    ] = None,
    out_dir: OutDir = None,
    workers: Processes = None,
    overrides: Overrides = None,
    plot_only: Annotated[
        bool, typer.Option("--plot-only", help="Draw what is there anew, and run nothing.")
    ] = False,
    plugin: Plugins = None,
) -> Path:
    """Run a grid of a job's variations over several seeds: one table, one plot.

    privacy.epsilon=inf is the same job without privacy. The same command goes on where a killed one was.
    """
    load_files(plugin or ())
    from atoll.server.job_checks import check_simulated
    from atoll.sim.sweep.grid import Base, Grid, SweepFolder, planned

    repeats = seeds or (SEEDS if folds is None else 1)
    grid = Grid.of(vary or [], repeats, folds) if vary or folds or not plot_only else None
    base = Base.load(job, overrides or (), list(grid.keys) if grid else ())
    folder = SweepFolder(out_dir or Path("runs") / f"{base.name}-sweep")
    folder.check(base)
    if grid is None:
        known = folder.grid()
        grid = Grid(known.keys, seeds or known.seeds, known.folds)
    runs = planned(base, grid)
    if plot_only:
        tell(folder, runs, base.name, {})
        return folder.path
    for run in runs:
        check_simulated(run.job)
    return _play(
        folder, base, grid, runs, workers, "sweep", lambda failures: tell(folder, runs, base.name, failures)
    )


def compare(
    job: Path,
    strategies: str,
    seeds: int,
    out_dir: Path | None,
    overrides: Sequence[str],
    workers: int | None,
) -> Path:
    """Run a job with each of several strategies over the same seeds: one table, one picture.

    A strategy that isn't the job's takes its defaults. The same command goes on where a killed one was.

    Raises:
        ConfigError: a name is unknown, or a strategy can't run with the job; before anything runs.
    """
    from atoll.server.job_checks import check_simulated
    from atoll.sim.sweep.grid import Base, SweepFolder
    from atoll.sim.sweep.strategies import grid_of, names_of, runs_of

    names = names_of(strategies)
    base = Base.load(job, overrides, [])
    folder = SweepFolder(out_dir or Path("runs") / f"{base.name}-compare")
    folder.check(base)
    runs = runs_of(base, names, seeds, check_simulated)
    return _play(
        folder, base, grid_of(names, seeds), runs, workers, "comparison",
        lambda failures: _tell_strategies(folder, runs, base.name),
    )  # fmt: skip


def _tell_strategies(folder: SweepFolder, runs: Sequence[Planned], name: str) -> None:
    """Write and show what is there of a comparison."""
    from rich.table import Table

    from atoll.sim.sweep.strategies import HEAD, compared, write_comparison

    results = [(run, result) for run in runs if (result := folder.result(run)) is not None]
    if not results:
        return
    lines = compared(results)
    written = write_comparison(folder.path, results, name, missing=len(runs) - len(results))
    shown = Table(title=f"{sanitize(name)}: means and 95 % intervals over seeds", title_justify="left")
    for place, head in enumerate(HEAD):
        shown.add_column(head, justify="right" if place else "left")
    for line in lines:
        shown.add_row(*(escape(cell) for cell in line.cells))
    out().print()
    out().print(shown)
    for line in lines:
        if line.remark is not None:
            out().print(sanitize(line.remark), highlight=False, soft_wrap=True)
    _tell_files(written)


def _play(
    folder: SweepFolder,
    base: Base,
    grid: Grid,
    runs: Sequence[Planned],
    workers: int | None,
    what: str,
    show: Callable[[dict[str, str]], None],
) -> Path:
    """Play what isn't there yet and show what there is; `show` gets what went wrong, by the run's name.

    Raises:
        ConfigError: a run can't be played, before any is.
        JobError: some failed.
    """
    from atoll.sim.sweep.grid import exclusive_lock
    from atoll.sim.sweep.runner import check_all  # torch comes with it

    check_all(runs)
    with exclusive_lock(folder.path, what):
        failures = _run_all(folder, base, grid, runs, workers)
        show(failures)
    if failures:
        raise JobError(f"{len(failures)} of {len(runs)} runs failed; the same command tries them again")
    return folder.path


def _tell_files(files: Mapping[str, Path]) -> None:
    for what, path in files.items():
        out().print(f"{what:<9} {sanitize(str(path))}", highlight=False, soft_wrap=True)


def _run_all(
    folder: SweepFolder, base: Base, grid: Grid, runs: Sequence[Planned], workers: int | None
) -> dict[str, str]:
    """Play what isn't there yet; what went wrong, by the run's name."""
    from atoll.sim.engines.process_pool import processes_for
    from atoll.sim.sweep.runner import RunPool, precompute_features
    from atoll.tasks.imports import imports_of

    waiting = [(run, folder.of(run)) for run in runs if folder.result(run) is None]
    done = len(runs) - len(waiting)
    shown = gauge()
    count = min(workers or processes_for(run.job for run in runs), max(len(waiting), 1))
    left = f"{done} are there, {count} at a time" if waiting else "all are there"
    shown.say(f"sweep     {len(runs)} runs: {_size(grid)}; {left}")
    folder.record(base, grid)
    if not waiting:
        return {}

    complete = done

    def run_ended(run: Planned, failure: str | None) -> None:
        nonlocal done, complete
        stop_if_asked()
        done, complete = done + 1, complete + (failure is None)
        if failure is not None:
            shown.say(f"[red]failed[/]    {sanitize(run.description)}: {sanitize(failure)}")
        shown.show("runs", done, len(runs), sanitize(run.description))

    try:
        with RunPool(count, ("atoll.sim.sweep.runner", *imports_of(runs[0].job))) as crew:
            crew.start()
            precompute_features([run.job for run, _ in waiting], progress_of(shown))
            return crew.play(waiting, run_ended)
    except KeyboardInterrupt:
        where = shlex.quote(str(folder.path))
        raise Interrupted(
            f"{complete} of {len(runs)} runs are complete in {where}; the same command goes on"
        ) from None
    finally:
        shown.close()


def progress_of(shown: ProgressView, note: str = "every example once, then cached") -> Progress:
    """Shows how far features have got."""

    def progress(done: int, total: int) -> None:
        stop_if_asked()
        shown.show("features", done, total, note)

    return progress


def _size(grid: Grid) -> str:
    parts = [f"{len(values)} of {key}" for key, values in grid.keys.items()]
    parts += [f"{grid.folds} folds"] if grid.folds is not None else []
    return " x ".join([*parts, f"{grid.seeds} seed{'s' if grid.seeds > 1 else ''}"])


def tell(folder: SweepFolder, runs: Sequence[Planned], name: str, failures: dict[str, str]) -> None:
    """Write the table, the picture and the sentence of what is there, and show them.

    Raises:
        ConfigError: no run is complete.
    """
    from atoll.sim.sweep.report import write_sweep
    from atoll.sim.sweep.results import Row

    rows: list[Row] = []
    for run in runs:
        result = folder.result(run)
        if result is not None:
            rows.append(Row.of(run, result, folder.of(run).name))
    if not rows:
        if failures:
            return
        raise ConfigError(f"{folder.path}: no run of this grid is complete, there is nothing to draw")
    written = write_sweep(folder.path, rows, name, missing=len(runs) - len(rows))
    out().print()
    out().print(shown_table(rows, name))
    for line in written.lines:
        out().print(sanitize(line), highlight=False, soft_wrap=True)
    _tell_files(written.files)


def shown_table(rows: Sequence[Row], name: str) -> Table:
    """A line for every combination."""
    from rich.table import Table

    from atoll.sim.sweep.grid import format_value
    from atoll.sim.sweep.results import headline_of, table

    repeats = "seeds" if rows[0].job.data.folds is None else "folds and seeds"
    shown = Table(title=f"{sanitize(name)}: mean ± standard deviation over {repeats}", title_justify="left")
    for key in rows[0].values:
        shown.add_column(escape(key), justify="right")
    shown.add_column(repeats, justify="right")
    shown.add_column((headline_of(rows) or "metric").replace("_", " "), justify="right")
    shown.add_column("epsilon spent", justify="right")
    for line in table(rows):
        cells = (escape(format_value(value)) for value in line.values.values())
        shown.add_row(*cells, str(line.seeds), line.score, line.epsilon)
    return shown
