"""The verbs that use a trained model: on new inputs, with answers as files too, and in a conversation."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import err, escape, out, sanitize, stop_if_asked
from atoll.cli.inspect import ClusterNumber, RunDir
from atoll.cli.run import Plugins
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, DataError
from atoll.plugins import load_files
from atoll.trained import chat_with, decoding, trained

if TYPE_CHECKING:
    from atoll.learning.learner import Learner
    from atoll.protocol.tensors import Tensors
    from atoll.tasks.language_modeling.chat import Chat
    from atoll.tasks.language_modeling.generation import Decoding

AT_ONCE = 16
"""Inputs that are read and answered together."""

WRITTEN = ".predicted-"
"""In the name of every file that is written, so that a folder's next reading leaves it out."""

RESET, EXIT = "/reset", "/exit"
"""Lines of a chat that are no turns."""

_NOT_IN_A_NAME = re.compile(r"[^\w-]+")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(cls=Verb, epilog='Example: atoll predict runs/bbc-news "Shares fell sharply"')(predict)
    app.command(cls=Verb, epilog='Example: atoll chat runs/chat --system "Be brief."')(chat)


def predict(
    run: RunDir,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT…", help="Texts, files, or folders of files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where masks, boxes, forecasts go; else beside the input."),
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also draw a mask over its picture.")] = False,
    cluster: ClusterNumber = None,
    plugin: Plugins = None,
) -> None:
    """Use the trained model on new inputs."""
    load_files(plugin or ())
    shown: list[dict[str, Any]] = []
    for answer in answers_of(run, inputs, out_dir, write=True, overlay=overlay, cluster=cluster):
        plain = printable(answer)
        if as_json:
            typer.echo(json.dumps(plain))
        else:
            shown.append(plain)
    if not as_json:
        _print(shown, out_dir)


def printable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its arrays, which are in files, and with the files' paths as text."""
    values = {name: value for name, value in answer.items() if not hasattr(value, "__array__")}
    if "files" in values:
        values["files"] = {name: str(path) for name, path in values["files"].items()}
    return values


def _print(answers: Sequence[dict[str, Any]], out_dir: Path | None) -> None:
    from rich.table import Column, Table

    has_probability = all("probability" in answer for answer in answers)
    table = Table(Column("input", no_wrap=True, max_width=60), "label", *["probability"] * has_probability)
    for answer in answers:
        sure = [f"{answer['probability']:.3f}"] if has_probability else []
        name = answer["input"] + (f": {answer['series']}" if "series" in answer else "")
        table.add_row(sanitize(name), escape(answer["label"]), *sure)
    out().print(table)
    kinds = Counter(kind for answer in answers for kind in answer.get("files", ()))
    if kinds:
        what = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        where = str(out_dir) if out_dir is not None else "beside the inputs"
        first = next(path for answer in answers for path in answer.get("files", {}).values())
        line = f"files  {what}: {sanitize(where)}, the first is {sanitize(first)}"
        out().print(line, highlight=False, soft_wrap=True)


def answers_of(
    run: Path,
    inputs: Iterable[str],
    out_dir: Path | None,
    *,
    write: bool,
    overlay: bool,
    cluster: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The model's answer to each input, and to each file of a folder, in the order given.

    Each has its `input`, and where files are written their paths in `files`.

    Raises:
        ConfigError: RUN holds no model, or two inputs' files would have one name. DataError: an input cannot
        be read, or a file not be written.
    """
    learner, tensors = trained(run, cluster)
    sources = _sources(inputs, learner.task.input_suffixes())
    places = _places(sources, out_dir) if write else {}
    for source, series, raw, answer in _answered(learner, tensors, sources):
        named = {"input": source.name} | ({"series": series} if series else {}) | answer
        if write:
            files = learner.task.files(answer, raw, learner.data_info, overlay=overlay)
            place = places[source]
            stem = place.name + (f".{_NOT_IN_A_NAME.sub('_', series)}" if series else "")
            paths = {kind: place.with_name(f"{stem}{WRITTEN}{kind}") for kind in files}
            for kind, content in files.items():
                _write(paths[kind], content)
            named |= {"files": paths} if paths else {}
        yield named


@dataclass(frozen=True)
class _Source:
    """An input, as it is named in answers, and what its files' place is below `--out`."""

    name: str
    below: Path


def _sources(inputs: Iterable[str], suffixes: tuple[str, ...]) -> list[_Source]:
    """The inputs, with folders opened: every file of them that may be an input, by its path."""
    sources = []
    for entry in inputs:
        if not suffixes or not os.path.isdir(entry):  # noqa: PTH112 - an input may be no path at all
            sources.append(_Source(entry, Path(Path(entry).name)))
            continue
        files = sorted(path for path in Path(entry).rglob("*") if _is_input(path, Path(entry), suffixes))
        if not files:
            raise DataError(
                f"{entry}: a folder without files to predict, expected some {', '.join(suffixes)}"
            )
        sources += [_Source(str(path), path.relative_to(entry)) for path in files]
    return sources


def _is_input(path: Path, folder: Path, suffixes: tuple[str, ...]) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in suffixes and path.is_file() and not is_hidden and WRITTEN not in path.name


def _answered(
    learner: Learner, tensors: Tensors, sources: Sequence[_Source]
) -> Iterator[tuple[_Source, str, Any, dict[str, Any]]]:
    """(source, the name of a series in it, the input, the answer), some read and answered at a time."""
    inputs = (
        (source, name, raw)
        for source in sources
        for name, raw in learner.task.parse_inputs(source.name).items()
    )
    while some := list(islice(inputs, AT_ONCE)):
        answers = learner.answers(tensors, [raw for _, _, raw in some])
        for (source, name, raw), answer in zip(some, answers, strict=True):
            yield source, name, raw, answer


def _places(sources: Sequence[_Source], out_dir: Path | None) -> dict[_Source, Path]:
    """Where every input's files are to be, with its own name, to which theirs is added."""
    places = {s: Path(s.name) if out_dir is None else out_dir / s.below for s in dict.fromkeys(sources)}
    taken: dict[Path, _Source] = {}
    for source, place in places.items():
        other = taken.setdefault(place, source)
        if other is not source and place.name:
            raise ConfigError(
                f"--out: {other.name} and {source.name} would have files of one name,"
                " expected other names, or the folder that holds both"
            )
    return places


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise DataError(
            f"{path}: cannot be written: {why}; expected a place that can be: --out DIR"
        ) from None


def chat(
    run: RunDir,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the system says at the beginning.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the fewest tokens that together are so likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="What is drawn by; else the job's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; else the job's.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Talk with a trained language model; /reset begins anew, /exit or Ctrl-D ends."""
    load_files(plugin or ())
    talker = chat_with(run)
    how = decoding(talker, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    begin = [] if system is None else [{"role": "system", "content": system}]
    try:
        _talk(talker, how, seed, begin)
    except KeyboardInterrupt:
        sys.stdout.write("\n")


def _talk(talker: Chat, how: Decoding, seed: int | None, begin: list[dict[str, str]]) -> None:
    """Answer turn by turn, until there are no more."""
    turns = list(begin)
    for line in _lines():
        if line == EXIT:
            return
        if line == RESET:
            turns = list(begin)
            continue
        try:
            answer = talker.answer([*turns, {"role": "user", "content": line}], how, seed, _tell)
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            err().print(f"[bold red]error:[/] {sanitize(str(error))}", highlight=False, soft_wrap=True)
            continue
        sys.stdout.write("\n")
        sys.stdout.flush()
        turns = [*answer.seen, {"role": "assistant", "content": answer.text}]


def _lines() -> Iterator[str]:
    """The lines that aren't blank; a terminal is asked for each."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        import readline  # noqa: F401 - with it, `input` lets a line be edited
    while True:
        try:
            line = input("> ") if asks else _read_line()
        except EOFError:
            if asks:
                sys.stdout.write("\n")
            return
        if line.strip():
            yield line.strip()


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _tell(piece: str) -> None:
    """Show a piece of an answer at once; on a terminal it can't hide or forge what is there."""
    stop_if_asked()
    if sys.stdout.isatty():
        piece = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()
