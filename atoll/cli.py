"""The command line: one verb a function, one line for every mistake."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings

import click
import typer

from atoll import __version__, look_verbs, run_verbs, site_verbs
from atoll.show import err
from protocol.errors import JobError

app = typer.Typer(
    name="atoll",
    help="Fine-tune one pretrained backbone across many clients whose data never leaves them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_verbs.register(app)
site_verbs.register(app)
look_verbs.register(app)

INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and library messages."),
) -> None:
    """Options that go before the verb."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()
    quiet_libraries(debug)


def quiet_libraries(debug: bool) -> None:
    """One voice on the terminal: ours. `--debug` lets everyone speak."""
    from rich.logging import RichHandler

    handler = RichHandler(console=err, show_path=debug, show_time=False, markup=False)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], format="%(message)s"
    )
    if debug:
        return
    warnings.simplefilter("ignore")
    for name in ("flwr", "transformers", "datasets", "httpx", "huggingface_hub", "torch", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point: runs a verb and turns every error into one line and an exit code."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    sys.exit(run(sys.argv[1:]))


QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
"""Settings of libraries that would report home, chat, or start threads of their own."""


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    debug = "--debug" in arguments
    if debug:  # welcome anywhere on the line
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        outcome = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 2
    except click.UsageError as error:
        return _complain(_usage(error), 2, debug)
    except JobError as error:
        return _complain(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _complain("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1, debug)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug of ours, said in one line
        return _complain(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, debug)


def _usage(error: click.UsageError) -> str:
    verb = error.ctx.command_path if error.ctx else "atoll"
    return f"{' '.join(error.format_message().split())} (see {verb} --help)"


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split("\n"))
    err.print(f"[bold red]error:[/] {_plain(line)}", highlight=False, soft_wrap=True)
    return code


def _plain(text: str) -> str:
    """Text from outside, so that it can't format, hide or forge what the terminal shows."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "�" for c in text))
