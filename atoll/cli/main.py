"""The command line: one verb a function, one line for every mistake."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import FrameType

import click
import typer

from atoll.cli import audit, distil, export, init, inspect, predict, site, sweep, tune
from atoll.cli import run as run_verbs
from atoll.cli.display import OneLine, err, interrupted, sanitize
from atoll.cli.usage import Verbs, verbs_of, what_is_wrong
from atoll.errors import JobError
from atoll.system import child_process

app = typer.Typer(
    name="atoll",
    cls=Verbs,
    help="Fine-tune one pretrained backbone across many clients whose data never leaves them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_verbs.register(app)
sweep.register(app)
tune.register(app)
site.register(app)
inspect.register(app)
init.register(app)
predict.register(app)
export.register(app)
distil.register(app)
audit.register(app)

INTERRUPTED = 130
PATIENCE = 2.0
"""Seconds that an interrupted command waits for its own threads."""


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print what a run's bits depend on, and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and library messages."),
) -> None:
    """Options that go before the verb."""
    if version:
        from atoll.cli.versions import versions

        for line in versions():
            typer.echo(line)
        raise typer.Exit()
    quiet_libraries(debug)


def quiet_libraries(debug: bool) -> None:
    """One voice on the terminal: ours. `--debug` lets everyone speak."""
    if debug:
        from rich.logging import RichHandler

        chatty = RichHandler(console=err(), show_time=False, markup=False)
        logging.basicConfig(level=logging.DEBUG, handlers=[chatty], format="%(message)s")
        return
    logging.basicConfig(level=logging.WARNING, handlers=[OneLine()])
    warnings.simplefilter("ignore")
    for name in ("flwr", "transformers", "datasets", "httpx", "huggingface_hub", "torch", "ray", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point: runs a verb and turns every error into one line and an exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _ensure_std_streams()
    if threading.current_thread() is threading.main_thread():
        _on_stop(_interrupt_once)
    code = run(sys.argv[1:])
    _on_stop(signal.SIG_IGN)  # there is only the way out left
    is_stopped = code == INTERRUPTED
    if is_stopped and _stopped_by:
        code = 128 + _stopped_by[0]
    if is_stopped and not _all_threads_end():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _all_threads_end() -> bool:
    """Give other threads a moment; one of a library may wait for replies that nobody sends any more."""
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    end = time.monotonic() + PATIENCE
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in others)


_stopped_by: list[int] = []
"""The signal that ended the work, once one has."""


def _on_stop(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """What Ctrl-C does, and SIGTERM, which a scheduler sends before it kills."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """The first signal ends the work; more don't disturb its tidying up, which is short and silent."""
    _on_stop(signal.SIG_IGN)
    _stopped_by.append(number)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.disable()
        sys.unraisablehook = _say_nothing
    interrupted.set()
    raise KeyboardInterrupt


def _say_nothing(_: object) -> None:
    """An interrupt that met a `__del__` is lost there, but not to us; Python would print where."""


def _ensure_std_streams() -> None:
    """Where a standard stream is closed, or can't write a letter: nowhere, or a replacement for it."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for as long as we live
        else:
            stream.reconfigure(errors="replace")


QUIET = child_process.QUIET | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""Settings of libraries that would report home, chat, or start threads of their own."""


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    debug = "--debug" in arguments
    if debug:  # welcome anywhere on the line
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        outcome = verbs_of(app).main(arguments, prog_name="atoll", standalone_mode=False)
        sys.stdout.flush()
        if outcome == INTERRUPTED:  # what Typer makes of Ctrl-C
            return _complain(
                "this command was stopped before its end", INTERRUPTED, False, label="interrupted"
            )
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 2
    except click.UsageError as error:
        return _complain(what_is_wrong(error, arguments, verbs_of(app)), 2, debug)
    except run_verbs.Interrupted as stopped:
        return _complain(str(stopped), INTERRUPTED, debug, label="interrupted")
    except JobError as error:
        return _complain(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _complain("this command was stopped before its end", INTERRUPTED, debug, label="interrupted")
    except BrokenPipeError:
        return _on_broken_pipe()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1, debug)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug of ours, said in one line
        return _complain(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _on_broken_pipe() -> int:
    """The reader of our output is gone: what is still to be flushed goes nowhere, without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 1


def _complain(message: str, code: int, debug: bool, *, label: str = "error") -> int:
    if debug:
        traceback.print_exc()
    try:
        err().print(f"[bold red]{label}:[/] {sanitize(message)}", highlight=False, soft_wrap=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return code
