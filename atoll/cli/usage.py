"""A command line that cannot be understood, and what was probably meant."""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from pathlib import Path
from typing import get_type_hints

import click
import typer
from typer import core
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.main import get_command

from atoll.errors import did_you_mean

core.HAS_RICH = False  # what rich would draw help with takes longer to import than all else that help needs

LONGEST = 200
"""Letters of a verb's first sentence, which the list of verbs has whole."""


class Verb(TyperCommand):
    """One verb, whose arguments help lists once: Typer does, and click from 8.5 on would do it again."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments and options; Typer 0.20 loses the arguments' help under click 8.5."""
        hints = get_type_hints(unwrap(self.callback), include_extras=True) if self.callback else {}
        for param in self.params:
            helps = [info.help for info in getattr(hints.get(param.name or ""), "__metadata__", ())]
            if isinstance(param, TyperArgument) and helps:
                param.help = helps[0]
        super().format_options(ctx, formatter)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing more."""


class Verbs(TyperGroup):
    """All verbs, each with its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a verb a line, or two where its sentence is long."""
        rows = [(name, verb.get_short_help_str(LONGEST)) for name, verb in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@cache
def verbs_of(app: typer.Typer) -> click.Group:
    """The app's verbs."""
    verbs = get_command(app)
    assert isinstance(verbs, click.Group)
    return verbs


def what_is_wrong(error: click.UsageError, arguments: list[str], verbs: click.Group) -> str:
    """One line: what was found, the nearest thing there is, and where to read on."""
    verb = next((a for a in arguments if a in verbs.commands), None)
    place = f"atoll {verb}" if verb else "atoll"
    return f"{_finding(error, arguments, verbs, verb)} (see {place} --help)"


def _finding(error: click.UsageError, arguments: list[str], verbs: click.Group, verb: str | None) -> str:
    command: click.Command = verbs.commands[verb] if verb else verbs
    match error:
        case click.NoSuchOption():
            return _no_such_option(error.option_name, command, arguments)
        case click.MissingParameter():
            kind = error.param_type or (error.param.param_type_name if error.param else "argument")
            hint = error.param_hint or (
                error.param.get_error_hint(error.ctx) if error.param and error.ctx else ""
            )
            name = " ".join([hint] if isinstance(hint, str) else hint).replace("'", "")
            return f"{kind} {name} is missing. {command.epilog or ''}".rstrip()
    message = " ".join(error.format_message().split())
    if message.startswith("No such command"):
        return _no_such_verb(next((a for a in arguments if not a.startswith("-")), ""), verbs)
    return message.rstrip(".")


def _no_such_verb(verb: str, verbs: click.Group) -> str:
    if verb.endswith(".toml"):
        return f"{verb!r} is no verb, did you mean atoll simulate {verb}?"
    return f"no such verb {verb!r}, {did_you_mean(verb, verbs.commands)}"


def _no_such_option(typed: str, command: click.Command, arguments: list[str]) -> str:
    if any(a.startswith("-") and Path(a).exists() for a in arguments):
        path = next(a for a in arguments if a.startswith("-") and Path(a).exists())
        return f"no such option {typed!r}, did you mean the path ./{path}?"
    known = [
        "--help",
        "--debug",
        *(name for option in command.params for name in option.opts if name[0] == "-"),
    ]
    return f"no such option {typed!r}, {did_you_mean(typed, sorted(known), cutoff=0.5)}"
