"""The report's templates filled in, with all text from outside escaped.

The templates and the style sheet are files beside this one. Text comes out escaped whoever wrote it, and
a name that a template was not given is an error. Only `Markup` is written as it is: plots, and what the
templates' own macros return.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

SYMBOLS = {control: 0x2400 + control for control in range(32)}
"""For each control character the symbol that shows it."""


def fill_in(name: str, **content: object) -> str:
    """The text of a template, with `content` in its places.

    Raises:
        jinja2.UndefinedError: the template names something that `content` has not.
    """
    return ENVIRONMENT.get_template(name).render(content)


def printable(value: object) -> object:
    """Text with its control characters shown as symbols, so that no name hides one.

    A percent sign stays on its number's line. `Markup` and numbers come back as they are.

    >>> printable("a\\nb"), printable("92.6 %")
    ('a␊b', '92.6\\xa0%')
    """
    if type(value) is not str:
        return value
    return value.translate(SYMBOLS).replace(" %", "\N{NO-BREAK SPACE}%")


def _source(name: str) -> str:
    """The text of a file of this room."""
    return (files("atoll.report") / name).read_text("utf-8")


ENVIRONMENT = Environment(
    loader=FunctionLoader(_source),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=printable,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
