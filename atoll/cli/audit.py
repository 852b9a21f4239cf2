"""The verb that attacks a finished run: audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import out, sanitize, watching
from atoll.cli.inspect import RunDir, read_result
from atoll.cli.run import Plugins
from atoll.cli.usage import Verb
from atoll.errors import ConfigError
from atoll.plugins import load_files
from atoll.sim.engines.events import AuditAdvanced

if TYPE_CHECKING:
    from rich.table import Table

    from atoll.job.job import Job
    from atoll.report.run_result import RunResult
    from atoll.sim.population.population import Population

REAL = "flower"
"""What results of real federations call their engine."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(cls=Verb, epilog="Example: atoll audit runs/bbc-news --canaries 2000")(audit)


NOT_ATTACKED = (
    "What the run claims of epsilon was not attacked: canaries of examples are classes that are exchanged,"
    " and texts have none."
)


def audit(
    run: RunDir,
    canaries: Annotated[
        int | None, typer.Option(metavar="N", help="How many canaries; 5000, if there can be so many.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure the lower bound is to be.")] = 0.95,
    shadows: Annotated[
        int, typer.Option(metavar="K", help="Runs to learn from, for a membership attack.")
    ] = 0,
    planted: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="How often each secret is planted in texts; 0: not at all."),
    ] = 8,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write what was found there as well.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Attack a simulated run: what it proves of epsilon, beside what the run claims."""
    load_files(plugin or ())
    job, result = simulated_run(run)
    if out_file is not None and (out_file.is_dir() or not out_file.parent.is_dir()):
        raise ConfigError(f"--out: expected a file, in a folder that is there, found {out_file}")
    from atoll.sim.audit.audit import Audit, audited, takes_canaries
    from atoll.sim.audit.gradient_inversion import probed
    from atoll.sim.audit.verbatim import completed_verbatim
    from atoll.sim.population.population import Population
    from atoll.trained import model_of

    how = Audit(canaries, confidence, shadows)
    population = Population.of(job)
    verbatim = completed_verbatim(job, population, partial(model_of, run))
    if not takes_canaries(job):
        findings: dict[str, Any] = {"confidence": confidence, "units": {}, "contradicted": False}
    else:
        with watching(job.federation.rounds) as watcher:
            findings = audited(
                job, result.privacy, how, population=population,
                watch=lambda done, total: watcher.on_event(AuditAdvanced(done, total)),
            )  # fmt: skip
    findings |= {"inversion": probed(job, population), "verbatim": verbatim}
    findings["exposure"] = exposure_of(job, population, planted)
    text = json.dumps(findings, indent=2, allow_nan=False)
    for path in filter(None, (run / "audit.json", out_file)):
        path.write_text(text + "\n", "utf-8")
    _print(findings, run / "audit.json")
    if findings["contradicted"]:
        raise typer.Exit(1)


def _print(findings: Mapping[str, Any], written: Path) -> None:
    """Print what each attack found, and where it is written."""
    from atoll.report.audit import what_the_audit_found

    if findings["units"]:
        out().print(bounds(findings))
    if findings["inversion"] is not None:
        out().print(given_away(findings["inversion"]))
    if findings["verbatim"] is not None:
        out().print(by_heart(findings["verbatim"]), highlight=False, soft_wrap=True)
    if findings["exposure"] is not None and "left_out" not in findings["exposure"]:
        out().print(exposures(findings["exposure"]))
    sentence = what_the_audit_found(findings) if findings["units"] else NOT_ATTACKED
    out().print(sanitize(sentence), highlight=False, soft_wrap=True)
    out().print(f"audit  {sanitize(str(written))}", highlight=False, soft_wrap=True)


def exposure_of(job: Job, population: Population, times: int) -> dict[str, Any] | None:
    """How exposed planted secrets are; for a job that can't be played again with them, why, which is said."""
    from atoll.sim.audit.exposure import exposed

    try:
        with watching(job.federation.rounds) as watcher:
            return exposed(
                job, population, times, lambda done, total: watcher.on_event(AuditAdvanced(done, total))
            )
    except ConfigError as error:
        out().print(sanitize(f"no secrets planted: {error}"), highlight=False, soft_wrap=True)
        return {"left_out": str(error)}


def simulated_run(run: Path) -> tuple[Job, RunResult]:
    """The job and the result of a run that can be played again.

    Raises:
        ConfigError: RUN is no finished run, or one of a real federation.
    """
    result = read_result(run)
    if result.engine == REAL:
        raise ConfigError(
            f"{run}: a run of real sites, whose data is not here to train it again; expected a simulation of"
            " its job"
        )
    from atoll.job.job import Job

    return Job.load(run / "job.toml"), result


def bounds(findings: Mapping[str, Any]) -> Table:
    """The claimed epsilon and what the attack proves, a column for each unit."""
    from rich.table import Table

    units: Mapping[str, Any] = findings["units"]
    sure = f"{100 * findings['confidence']:g} % confidence"
    table = Table(title=f"epsilon: claimed, and proven with {sure}", title_justify="left")
    table.add_column("")
    for unit, one in units.items():
        table.add_column(f"{unit}, delta {one['delta']:.2g}", justify="right")

    def row(name: str, *path: str, style: str = "", form: str = ".3g") -> None:
        values = [_at(one, path) for one in units.values()]
        table.add_row(name, *("-" if v is None else format(v, form) for v in values), style=style)

    row("claimed (PLD)", "claimed_epsilon", style="bold")
    for name, key in (("one-run audit", "one_run"), ("one-run audit by f-DP", "f_dp")):
        row(f"proven, {name}", key, "epsilon", style="bold")
        table.add_row("  guesses, right", *(_guesses(one[key]) for one in units.values()))
    if any(one["gaussian_sums"] for one in units.values()):
        row("proven of Gaussian noise, by sums", "gaussian_sums", "epsilon", style="bold")
        row("  confidence", "gaussian_sums", "confidence", form=".4%")
        row("  deviations apart", "gaussian_sums", "deviations", form=".2f")
    if any(one["membership"] for one in units.values()):
        row("proven, membership attack", "membership", "epsilon")
        row("  found at .1 % false alarms", "membership", "tpr_at_fpr_0.001", form=".1%")
        row("  found at 1 % false alarms", "membership", "tpr_at_fpr_0.01", form=".1%")
        row("  AUC", "membership", "auc", form=".3f")
    table.add_row("canaries", *(f"{one['canaries']:,}" for one in units.values()))
    return table


def given_away(inversion: Mapping[str, Any]) -> Table:
    """What one update gives away of its examples, without protection and with the job's."""
    from rich.table import Table

    table = Table(title="what one update of the head gives away", title_justify="left")
    for column in ("a step on", "labels found", "features (cosine)", "labels, here", "features, here"):
        table.add_column(column, justify="left" if column == "a step on" else "right")
    batch = f"{inversion['batch_size']} classes, one example each"
    for name, key in (("one example", "one"), (batch, "batch")):
        plain_one, protected = inversion["unprotected"][key], (inversion["protected"] or {}).get(key)
        if plain_one is None:
            continue
        cells = [f"{plain_one['label']:.0%}", f"{plain_one['cosine']:z.2f}"]
        cells += (
            ["-", "-"] if protected is None else [f"{protected['label']:.0%}", f"{protected['cosine']:z.2f}"]
        )
        table.add_row(f"{name} (by chance {inversion['chance'][key]:.0%})", *cells)
    return table


def exposures(findings: Mapping[str, Any]) -> Table:
    """Bits of exposure of the secrets that were planted, and of those that weren't."""
    from rich.table import Table

    title = (
        f"exposure in bits of secrets, each {findings['times']} times in texts of"
        f" {sanitize(findings['client'])}; at most {findings['at_most']:g}, and"
        f" {findings['expected']:.2f} on average where nothing is known"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "planted, mean", "most", "not planted, mean", "most"):
        table.add_column(column, justify="right" if column else "left")
    names = {
        "before": "before training",
        "after": "after training",
        "unprotected": "after it without privacy",
    }
    for key, name in names.items():
        if findings[key] is not None:
            bits = (findings[key]["planted"], findings[key]["others"])
            table.add_row(
                name, *(f"{value:.2f}" for one in bits for value in (sum(one) / len(one), max(one)))
            )
    return table


def by_heart(verbatim: Mapping[str, Any]) -> str:
    """How many of the clients' texts the model completes word for word."""
    worst = max(verbatim["clients"], key=lambda name: (verbatim["clients"][name]["after"], name))
    texts, after = verbatim["texts"], verbatim["after"]
    most = f"; most of them {sanitize(worst)}'s, {verbatim['clients'][worst]['after']}" if after else ""
    return (
        f"by heart: of {texts:,} texts of the clients, given {verbatim['given_tokens']} tokens, the model"
        f" writes the next {verbatim['written_tokens']} word for word in {after:,}, before training in"
        f" {verbatim['before']:,}{most}"
    )


def _at(one: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = one
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)


def _guesses(finding: Mapping[str, Any]) -> str:
    return f"{finding['guesses']:,}, {finding['right']:,}"
