"""Verbs of a real federation: for its provisioner, its server, its sites and whoever submits jobs."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.display import err, escape, out, print_summary, sanitize
from atoll.cli.run import JobFile, Overrides, next_free_path
from atoll.cli.usage import Verb
from atoll.errors import ConfigError

logger = logging.getLogger(__name__)

Kit = Annotated[Path, typer.Argument(metavar="KIT", help="A kit written by atoll provision.")]
ServerKitOption = Annotated[
    Path, typer.Option("--server", metavar="KIT", help="The server's kit, on its host.")
]
RunId = Annotated[int, typer.Argument(metavar="RUN_ID", help="As atoll submit and status print it.")]
Systemd = Annotated[
    bool, typer.Option("--systemd", help="Print a systemd unit that runs this at boot, and exit.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(cls=Verb, epilog="Example: atoll provision sites.toml --out kits")(provision)
    app.command(cls=Verb, epilog="Example: atoll enroll kit north")(enroll)
    app.command(cls=Verb, epilog="Example: atoll accept kit answer")(accept)
    app.command(cls=Verb, epilog="Example: atoll serve kits/server")(serve)
    app.command(cls=Verb, epilog="Example: atoll join kits/site-a --data /data/site-a")(join)
    app.command(
        "check-policy", cls=Verb, epilog="Example: atoll check-policy kits/site-a jobs/bbc-news.toml"
    )(check_policy)
    app.command("verify-log", cls=Verb, epilog="Example: atoll verify-log kits/site-a")(verify_log)
    app.command(cls=Verb, epilog="Example: atoll submit jobs/bbc-news.toml --server kits/server")(submit)
    app.command(cls=Verb, epilog="Example: atoll status --server kits/server")(status)
    app.command(cls=Verb, epilog="Example: atoll logs 1234 --server kits/server")(logs)
    app.command(cls=Verb, epilog="Example: atoll stop 1234 --server kits/server")(stop)


def echo(line: str) -> None:
    """One line of what an operator should know."""
    out().print(escape(line), highlight=False, soft_wrap=True)


def echo_with_time(line: str) -> None:
    """As `tell`, with the time in front: for what runs for days."""
    echo(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}")


class EchoHandler(logging.Handler):
    """Log records as lines among the others, without levels and frames."""

    def emit(self, record: logging.LogRecord) -> None:
        echo_with_time(record.getMessage())


def route_logs(package: str) -> None:
    """Let a package's log lines be lines of the verb; `--debug` has set a level of its own and keeps it."""
    if logging.getLogger().level > logging.DEBUG:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(EchoHandler())
        logger.propagate = False


def show_ours(line: str) -> None:
    """Of a run's log the lines that are Atoll's; the rest is Flower's, and shown with --debug."""
    from atoll.server.app import MARK

    if line.startswith(MARK):
        echo(line.removeprefix(MARK))
    else:
        logger.debug("%s", line)


def provision(
    sites: Annotated[Path, typer.Argument(metavar="SITES", help="TOML with [server] and [[site]] tables.")],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the kits go, or are.")],
    request: Annotated[
        list[Path] | None,
        typer.Option("--request", metavar="FILE", help="A site's own, from atoll enroll; may be repeated."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Change the kits in DIR: sites are added and removed.")
    ] = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="As --update, with a new certificate for the server.")
    ] = False,
) -> None:
    """Make a certificate authority, a server kit, and one kit for every site; or change them."""
    from atoll.server.deploy import provision as provisioning

    if update or renew:
        _tell_changes(provisioning.update(sites, out_dir, request or (), renew=renew), out_dir)
        return
    for kit in provisioning.provision(sites, out_dir, request or ()):
        echo(f"kit  {kit}")
    fingerprint = hashlib.sha256((out_dir / "ca" / "ca.crt").read_bytes()).hexdigest()
    echo(f"authority {fingerprint}: sites that enroll compare it")
    echo("give each site its own kit over a safe channel; keep the folder ca offline")


def _tell_changes(changes: Any, out_dir: Path) -> None:
    for kit in changes.new:
        echo(f"new      {kit}: give it to its site")
    if changes.unchanged:
        echo(f"kept     {', '.join(changes.unchanged)}")
    if changes.removed:
        echo(f"removed  {', '.join(changes.removed)}: the server lets them in no longer")
    if changes.has_new_certificate:
        echo(f"renewed  {out_dir / 'server' / 'server.crt'}: a running server takes it, with server.key")
    if changes.has_new_roster:
        echo(
            "roster   another: send each site its folder without node.key and superexec.secret, for atoll"
            " accept; until all have it there is no secure sum"
        )
    echo(f"copy {out_dir / 'server'} over the server's kit: a running server sees it within seconds")


def enroll(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="A new folder for this site's kit.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's, as SITES has it.")],
    client: Annotated[
        list[str] | None,
        typer.Option(
            "--client", metavar="NAME", help="A client that it answers for, if not one of its own name."
        ),
    ] = None,
) -> None:
    """Make a site's key, which never leaves it, and the request that the administrator answers."""
    from atoll.kit.enrolment import enroll as make_request

    echo(f"request  {make_request(kit, name, client or ())}: send it to the federation's administrator")
    echo(f"then     atoll accept {shlex.quote(str(kit))} ANSWER, the folder that comes back")


def accept(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="This site's kit.")],
    answer: Annotated[Path, typer.Argument(metavar="ANSWER", help="The administrator's folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Take it without being asked.")] = False,
) -> None:
    """Take the administrator's answer into a site's kit: the authority, the server, the roster."""
    from atoll.kit.enrolment import read_answer

    read = read_answer(kit, answer)
    for line in read.lines:
        echo(line)
    if not yes and not (sys.stdin.isatty() and typer.confirm("take it?")):
        raise ConfigError(f"{answer}: not taken; --yes takes it without being asked")
    read.take()
    echo(f"taken    {kit}; a site that is running reads it when it joins again")


def serve(
    kit: Kit,
    health: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where gRPC health is answered; else on a free local port."),
    ] = None,
    systemd: Systemd = False,
) -> None:
    """Run a federation's server until it is stopped; runs whose process died go on by themselves."""
    if systemd:
        from atoll.kit.kit import ServerKit

        ServerKit.load(kit)
        _print_unit(["serve", kit, *(["--health", health] if health else [])], f"server of {kit.name}")
        return
    from atoll.server.deploy.serve import serve as serve_kit

    route_logs("atoll.server")
    serve_kit(kit, health_address=health, tell=echo_with_time)


def join(
    kit: Kit,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="DIR", help="The shard; more than one: clients named as the folders."),
    ],
    systemd: Systemd = False,
) -> None:
    """Take part with this site's data until it is stopped."""
    if systemd:
        from atoll.kit.kit import SiteKit

        SiteKit.load(kit)
        _print_unit(["join", kit, *(word for path in data for word in ("--data", path))], f"site {kit.name}")
        return
    from atoll.client.deploy.join import join as join_kit

    route_logs("atoll.client")
    is_debugged = logging.getLogger().isEnabledFor(logging.DEBUG)
    join_kit(kit, data, tell=echo_with_time, executor=(EXECUTOR, "--debug") if is_debugged else (EXECUTOR,))


def _print_unit(arguments: list[str | Path], description: str) -> None:
    """Write a unit to standard output as it is, for a file."""
    from atoll.system.systemd import unit

    sys.stdout.write(unit(arguments, description))
    if os.geteuid() == 0:
        err().print("note: the unit runs as root; better write another user after User=, who owns the kit")


def check_policy(kit: Kit, job: JobFile, overrides: Overrides = None) -> None:
    """Say what a site's policy says of a job, rule by rule; nothing is run and nobody is asked.

    Exit code 0 where the job is allowed, 1 where it isn't.
    """
    from rich.table import Table

    from atoll.client.policy import POLICY, Policy
    from atoll.job.job import Job
    from atoll.kit.kit import SiteKit
    from atoll.server.job_checks import check_named

    loaded = Job.load(job, overrides or ())
    check_named(loaded)
    folder = SiteKit.load(kit).folder
    policy = Policy.load(folder)
    if policy is None:
        echo(f"{folder / POLICY} is not there: its kit's budget and the job's promise alone decide")
        return
    table = Table("rule", "job", "found", "expected", "verdict")
    verdicts = policy.verdicts(loaded)
    for verdict in verdicts:
        texts = (verdict.rule, verdict.key, verdict.job_value, verdict.allowed)
        table.add_row(*map(sanitize, texts), "allowed" if verdict.holds else "[red]refused[/]")
    out().print(table)
    if policy.hours is not None:
        echo(f"hours        requests are answered {policy.hours} only")
    if not policy.measurements:
        echo("measurements no metric leaves the site, so that no model is measured here")
    refused = [verdict.rule for verdict in verdicts if not verdict.holds]
    echo(f"refused by {', '.join(refused)}" if refused else "allowed")
    if refused:
        raise typer.Exit(1)


def verify_log(
    log: Annotated[
        Path, typer.Argument(metavar="KIT", help="A site's or a server's kit, or its log's file.")
    ],
) -> None:
    """See whether the log of what a site or a server was asked, decided and sent is whole."""
    from atoll.kit.kit import ServerKit, SiteKit
    from atoll.system.audit_file import verify

    kind = ServerKit if (log / "server.crt").is_file() else SiteKit
    verdict = verify(log if log.is_file() else kind.load(log).state)
    echo(
        f"{verdict.path} is whole: {verdict.lines} lines,"
        f" {verdict.first or 'never'} to {verdict.last or 'never'}"
    )
    echo(f"sha256 of the last line  {verdict.sha256}")
    echo("lines cut off at the end don't show in the file: note this hash, and compare it later")


EXECUTOR = "atoll.cli.site:executor"


def executor() -> None:
    """In the process that works for a site: answer tasks; what it logs are lines of `atoll join` too."""
    from atoll.cli.main import quiet_libraries
    from atoll.client.deploy.executor import answer_tasks

    quiet_libraries("--debug" in sys.argv)
    route_logs("atoll.client")
    answer_tasks()


def submit(
    job: JobFile,
    server: ServerKitOption,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole round.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="Refused: sites run only what is installed there."),
    ] = None,
) -> None:
    """Run a job on the live federation, and wait for its end."""
    if plugin:
        raise ConfigError(
            f"--plugin {plugin[0]}: a real federation runs only what is installed at the server and at every"
            " site; install it there as a package with an entry point (docs/extend.md), and submit without"
        )
    from atoll.job.job import Job
    from atoll.server.job_checks import check_named, validate_for_deployment

    loaded = Job.load(job, overrides or ())
    check_named(loaded)
    validate_for_deployment(loaded)
    where = out_dir or next_free_path(server / "runs" / loaded.name, resume=resume)
    if resume and not (where / "job.toml").is_file():
        raise ConfigError(f"{where}: nothing to resume, there is no job.toml")
    if not resume and where.exists() and any(where.iterdir()):
        raise ConfigError(f"{where}: exists and is not empty; use --resume to go on, or another --out")
    from atoll.report.run_result import RunResult
    from atoll.server.deploy.submit import (
        submit as submit_job,  # Flower comes with it: not before the job is looked at
    )

    submit_job(
        loaded.canonical,
        server,
        out=where,
        show=show_ours,
        tell=echo,
        started=lambda run: echo(f"run id    {run}"),
    )
    print_summary(RunResult.read(where), where)


def status(server: ServerKitOption) -> None:
    """Which sites are connected, how the latest runs stand, and whether a job can be submitted."""
    from rich.table import Column, Table

    from atoll.server.deploy.status import status as ask

    stands = ask(server)
    unknown = "none" if stands.known else "unknown"
    silent = {name: f" (silent for {seconds:.0f} s)" for name, seconds in stands.silent.items()}
    echo(f"online   {', '.join(name + silent.get(name, '') for name in stands.online) or unknown}")
    echo(f"offline  {', '.join(stands.offline) or unknown}")
    echo(f"health   {f'not serving: {stands.trouble}' if stands.trouble else 'serving'}")
    echo(f"         answered on {stands.health} (gRPC)")
    table = Table(
        Column("run id", no_wrap=True), "status", Column("health", no_wrap=True),
        Column("submitted", no_wrap=True), "details",
    )  # fmt: skip
    for run in stands.runs:
        table.add_row(
            str(run.run_id), run.outcome or run.status,
            "serving" if run.run_id in stands.going_on else "not serving",
            moment(run.submitted), escape(run.details),
        )  # fmt: skip
    if stands.runs:
        out().print(table)


def moment(iso: str) -> str:
    """A time of the server's as this machine's clock shows it."""
    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M:%S}" if iso else ""


def logs(run: RunId, server: ServerKitOption) -> None:
    """A run's log, from its beginning to its end."""
    from atoll.server.deploy.submit import logs as show_logs

    ended = show_logs(server, run, show=show_ours, tell=echo)
    echo(f"run {ended.run_id} {ended.outcome}" + (f": {ended.details}" if ended.details else ""))


def stop(run: RunId, server: ServerKitOption) -> None:
    """Stop a run; what its rounds have made stays in its run directory."""
    from atoll.server.deploy.submit import stop as stop_run

    ended = stop_run(server, run)
    echo(f"run {ended.run_id} {ended.outcome or ended.status}")
