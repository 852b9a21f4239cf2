"""The verbs that look for good settings and backbones: tune, advise."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.display import escape, gauge, out, sanitize, stop_if_asked
from atoll.cli.run import Interrupted, JobFile, OutDir, Overrides, Plugins, Processes, Vary, load
from atoll.cli.sweep import progress_of
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, JobError
from atoll.job.toml import with_absolute_paths
from atoll.plugins import load_files

if TYPE_CHECKING:
    from rich.table import Table

    from atoll.job.job import Job
    from atoll.sim.search.backbone_ranking import RankedBackbone
    from atoll.sim.search.study import Search, TrialResult

TRIALS = 20


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(cls=Verb, epilog="Example: atoll tune jobs/bbc-news.toml --range train.lr=0.01..3,log")(tune)
    app.command(
        cls=Verb,
        epilog="Example: atoll advise jobs/mnist.toml --backbones torchvision:mobilenet_v2,raw:pixels",
    )(advise)


def tune(
    job: JobFile,
    vary: Vary = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="KEY=LOW..HIGH[,log]", help="A key and a range of numbers."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="How many settings to try.")] = TRIALS,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each, whose mean counts.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the search; the job's if not said.")
    ] = None,
    out_dir: OutDir = None,
    workers: Processes = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> Path:
    """Search for the settings that are best on what clients keep back, never on the test set.

    With neither --vary nor --range what is searched follows from the job. The same command goes on where a
    killed one was.
    """
    load_files(plugin or ())
    from atoll.server.job_checks import check_simulated
    from atoll.sim.search.space import Space, check_searchable, default_space, job_of
    from atoll.sim.search.study import SearchFolder, check_optuna
    from atoll.sim.sweep.grid import Base, exclusive_lock

    named_space = Space.of(vary or (), ranges or ())
    base = Base.load(job, overrides or (), [one.key for one in named_space.keys])
    check_simulated(base_job := job_of(base, {}))
    check_searchable(base_job)
    space = named_space if named_space.keys else default_space(base_job)
    space.check(base)
    check_optuna()
    folder = SearchFolder(out_dir or Path("runs") / f"{base.name}-tune")
    seed = base_job.seed if seed is None else seed
    folder.check(base, space, seed=seed, seeds=seeds)
    from atoll.sim.engines.process_pool import processes_for  # torch comes with it

    with exclusive_lock(folder.path, "search"):
        count = min(workers or processes_for([base_job]), trials)
        search = folder.opened(base, space, seed=seed, seeds=seeds, at_once=count)
        tried = _search(search, trials, count, is_default=not named_space.keys)
        _tell(search, tried)
    return folder.path


def _search(search: Search, trials: int, workers: int, *, is_default: bool) -> list[TrialResult]:
    """Play the trials that are not there yet, a line for each."""
    from atoll.sim.population.population import Population
    from atoll.sim.search.space import checked_job
    from atoll.sim.search.trials import feature_jobs, play_trials, without_test_set
    from atoll.sim.sweep.runner import RunPool, precompute_features
    from atoll.tasks.imports import imports_of

    tried = search.trials()
    done = sum(one.outcome is not None and one.outcome.failed is None for one in tried)
    shown = gauge()
    left = f"{done} are there, {min(workers, search.at_once)} at a time" if done < trials else "all are there"
    shown.say(f"search    {trials} trials; {left}")
    options = sanitize("  ".join(search.space.as_options))
    shown.say(f"space     {'nothing was said: ' if is_default else ''}{options}")
    if done >= trials and done == len(tried):
        return tried

    def trial_ended(one: TrialResult, so_far: Sequence[TrialResult]) -> None:
        stop_if_asked()
        shown.say(_line(search, one, so_far))
        ended = sum(other.outcome is not None for other in so_far)
        shown.show("trials", ended, max(trials, len(so_far)), "")

    try:
        with RunPool(workers, ("atoll.sim.search.trials", *imports_of(checked_job(search.base, {})))) as crew:
            crew.start()
            precompute_features(
                feature_jobs(search),
                progress_of(shown),
                lambda job: without_test_set(job, Population.of(job)),
            )
            return play_trials(search, crew, trials, trial_ended)
    except KeyboardInterrupt:
        ended = sum(one.outcome is not None for one in search.trials())
        where = shlex.quote(str(search.path))
        raise Interrupted(
            f"{ended} of {trials} trials have ended in {where}; the same command goes on"
        ) from None
    finally:
        shown.close()


def _line(search: Search, one: TrialResult, so_far: Sequence[TrialResult]) -> str:
    """What a trial came to, beside the best so far."""
    from atoll.sim.sweep.grid import describe_combination

    assert one.outcome is not None
    head = f"trial {one.index + 1:<4}{sanitize(describe_combination(one.values))}"
    if one.outcome.value is None:
        colour = "red" if one.outcome.failed else "yellow"
        return f"{head}  [{colour}]{sanitize(one.outcome.reason)}[/]"
    metric = search.metric.replace("_", " ")
    best = search.ranked(so_far)[0]
    mark = "  [green]best so far[/]" if best.index == one.index else ""
    return f"{head}  {metric} {one.outcome.value:.4g}{mark}"


def _tell(search: Search, tried: Sequence[TrialResult]) -> None:
    """Write and show what was found.

    Raises:
        JobError: trials failed, or none has a value.
    """
    from atoll.sim.search.report import summary, write_search

    files = write_search(search, tried)
    ranked = search.ranked(tried)
    failed = [one for one in tried if one.outcome is not None and one.outcome.failed is not None]
    if ranked:
        out().print()
        out().print(_best_table(search, ranked))
    for line in summary(search, tried):
        out().print(sanitize(line), highlight=False, soft_wrap=True)
    for what, path in files.items():
        out().print(f"{what:<9} {sanitize(str(path))}", highlight=False, soft_wrap=True)
    if failed:
        raise JobError(f"{len(failed)} of {len(tried)} trials failed; the same command tries them again")
    if not ranked:
        reasons = [one.outcome.reason for one in tried if one.outcome is not None]
        raise JobError(f"no trial has a value: {reasons[0]}")
    command = shlex.join(["atoll", "simulate", str(files["best job"])])
    out().print(f"run it    {sanitize(command)}", highlight=False, soft_wrap=True)


def _best_table(search: Search, ranked: Sequence[TrialResult]) -> Table:
    """A line for each of the best trials."""
    from rich.table import Table

    from atoll.sim.search.report import SHOWN
    from atoll.sim.sweep.grid import format_value
    from atoll.tasks.metric_values import UNDEFINED

    table = Table(
        title=f"{sanitize(search.base.name)}: the best trials, by what clients keep back",
        title_justify="left",
    )
    table.add_column("trial", justify="right")
    for one in search.space.keys:
        table.add_column(escape(one.key), justify="right")
    metrics = [search.metric, *(["loss"] if search.metric != "loss" else [])]
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for tried in ranked[:SHOWN]:
        assert tried.outcome is not None
        values = (escape(format_value(value)) for value in tried.values.values())
        best_values = (tried.outcome.metrics.get(metric) for metric in metrics)
        table.add_row(
            str(tried.index + 1),
            *values,
            *(UNDEFINED if value is None else f"{value:.4g}" for value in best_values),
        )
    return table


def advise(
    job: JobFile,
    backbones: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Candidates; if not said, those whose weights are here."),
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="How many examples to look at; 2000 if not said.")
    ] = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Rank backbones for a job by their features of the clients' data, before anything is trained.

    In a simulation only: it looks at the features of all clients together.
    """
    load_files(plugin or ())
    from atoll.server.job_checks import source_of
    from atoll.tasks import check_task

    loaded = load(job, overrides)
    check_task(loaded.task.name)
    source_of(loaded)  # what else there is to say of them is said with torch
    ranking = advised(loaded, None if backbones is None else backbones.split(","), head)
    out().print()
    out().print(_advice_table(loaded.name, ranking))
    out().print(
        "LogME on the clients' training data, and the accuracy of a linear probe on what they keep back: of"
        " both, more is better. Nothing looked at the test set.",
        highlight=False,
        soft_wrap=True,
    )
    changes = [f"backbone.name={ranking[0].backbone}", *(overrides or ())]
    best = shlex.join(["atoll", "simulate", str(job), *(a for c in changes for a in ("--set", c))])
    out().print(f"run it    {sanitize(best)}", highlight=False, soft_wrap=True)


def advised(job: Job, backbones: Sequence[str] | None, head: int | None) -> list[RankedBackbone]:
    """What is said of each backbone, the best by LogME first, with progress.

    Raises:
        ConfigError, WeightsError: the job isn't one for this, or a backbone isn't there.
    """
    from atoll.backbones.resolve import resolve
    from atoll.sim.search.backbone_ranking import (
        HEAD,
        advise,
        candidates_here,
        check_advisable,
        with_backbone,
    )

    check_advisable(job)
    names = [name.strip() for name in backbones or ()]
    if not all(names):
        raise ConfigError("--backbones: expected names between commas, see atoll list backbones")
    candidates = [with_absolute_paths(with_backbone(job, name), Path.cwd(), "--backbones") for name in names]
    names = [one.backbone.name for one in candidates]
    for one in candidates:
        resolve(one.backbone, job.seed)
    shown = gauge()
    try:
        return advise(
            job,
            list(dict.fromkeys(names)) or candidates_here(job),
            head=head or HEAD,
            progress=lambda name: progress_of(shown, f"{name}: every example once, then cached"),
            left_out=lambda name, why: shown.say(f"left out  {sanitize(name)}: {sanitize(why)}"),
        )
    finally:
        shown.close()


def _advice_table(name: str, ranking: Sequence[RankedBackbone]) -> Table:
    from rich.table import Table

    table = Table(title=f"{sanitize(name)}: backbones, the best by LogME first", title_justify="left")
    table.add_column("backbone")
    for head in ("LogME", "probe accuracy", "features", "parameters", "ms an example"):
        table.add_column(head, justify="right")
    for one in ranking:
        table.add_row(
            sanitize(one.backbone), f"{one.logme:.3f}", f"{one.probe:.3f}", str(one.width),
            f"{one.parameters / 1e6:.1f} M", f"{one.seconds * 1e3:.1f}",
        )  # fmt: skip
    return table
