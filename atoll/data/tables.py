"""Files of rows, strictly parsed: CSV, TSV, JSON Lines, Parquet, tar and saved Hugging Face datasets."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.data.texts import decoded, without_mark
from atoll.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

    import datasets

MAX_LINE_BYTES = 8_000_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".tar")


@dataclass(frozen=True)
class Rows:
    """Rows as found, before their columns are checked.

    `name` and `where(i)` name them and row i in messages; paths in the rows are relative to `folder`;
    `class_names` has, for a column of class indices or of lists of them, what they stand for.
    """

    name: str
    table: pa.Table
    where: Callable[[int], str]
    folder: Path
    class_names: dict[str, Sequence[str]] = field(default_factory=dict)
    is_canonical: bool = False


def read_file(path: Path, diagnostics: Diagnostics) -> Rows:
    """The rows of one file, whose format its suffix says."""
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        return _read_csv(path, _DELIMITERS[suffix], diagnostics)
    if suffix == ".jsonl":
        return _read_json_lines(path, diagnostics)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".tar":
        from atoll.data.archives.webdataset import read_webdataset  # it makes rows of what is here

        return read_webdataset(path, diagnostics)
    raise DataError(
        f"{shown(path)}: format {suffix or 'unknown'!r}, expected {', '.join(SUFFIXES)} or a folder"
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several files, in their order."""
    if len(parts) == 1:
        return parts[0]
    starts = [sum(part.table.num_rows for part in parts[:index]) for index in range(len(parts))]

    def where(row: int) -> str:
        index = max(index for index, start in enumerate(starts) if start <= row)
        return parts[index].where(row - starts[index])

    first = parts[0]
    for part in parts[1:]:
        if part.table.schema != first.table.schema or part.class_names != first.class_names:
            difference = f"columns {_described(part)}, expected {_described(first)} as in {first.name}"
            raise DataError(f"{part.name}: {difference}")
    table = pa.concat_tables([part.table for part in parts])
    return Rows(shown(first.folder), table, where, first.folder, first.class_names)


def _described(rows: Rows) -> str:
    classes = f" with classes {rows.class_names}" if rows.class_names else ""
    return ", ".join(f"{field.name} ({field.type})" for field in rows.table.schema) + classes


# Text lines


def text_lines(path: Path, diagnostics: Diagnostics) -> Iterator[str]:
    """The lines of a file, each with what ends it; one that is not UTF-8 or holds NUL is told.

    Raises:
        DataError: it can't be opened, or a line is longer than `MAX_LINE_BYTES`.
    """
    with opened(path) as file:
        yield from _lines(file, path, diagnostics)


def _lines(file: BinaryIO, path: Path, diagnostics: Diagnostics) -> Iterator[str]:
    """Each line as text; one that is not UTF-8 or holds NUL is refused, and goes on with marks for it."""
    start = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        where = f"{shown(path)} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes, the most that is allowed")
        content = without_mark(line, shown(path), diagnostics) if number == 1 else line
        start += len(line)
        yield _line(content, where, start - len(content), diagnostics)


def _line(line: bytes, where: str, start: int, diagnostics: Diagnostics) -> str:
    try:
        if (nul := line.find(b"\0")) >= 0:
            raise DataError(f"{where}: byte {start + nul} is NUL, expected text")
        return decoded(line, where, start)
    except DataError as problem:
        diagnostics.error(problem)
        return line.replace(b"\0", b"?").decode("utf-8", errors="replace")


# CSV


def _read_csv(path: Path, delimiter: str, diagnostics: Diagnostics) -> Rows:
    with opened(path) as file, _long_fields():
        reader = csv.reader(_lines(file, path, diagnostics), delimiter=delimiter, strict=True)
        try:
            header = _checked_header(next(reader, []), delimiter, path)
            rows, numbers = _same_width(reader, header, path, diagnostics)
        except csv.Error as error:
            raise DataError(f"{shown(path)} line {reader.line_num}: {error}, expected strict CSV") from None
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = {
        name: pa.array(column, pa.string()) for name, column in zip(header, values, strict=True) if name
    }
    return Rows(shown(path), pa.table(columns), lambda row: f"{shown(path)} line {numbers[row]}", path.parent)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields as long as a line may be; the csv module keeps its limit, 131,072 characters, globally."""
    usual = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(usual)


def _checked_header(header: list[str], delimiter: str, path: Path) -> list[str]:
    where = f"{shown(path)} line 1"
    if not header:
        raise DataError(f"{where}: empty, expected a header with column names")
    names = [name.strip() for name in header]
    for other in (",", ";", "\t", "|"):
        if len(names) == 1 and other in names[0] and other != delimiter:
            raise DataError(
                f"{where}: one column {names[0]!r}, expected {delimiter!r} between columns, not {other!r}"
            )
    if len(set(names)) < len(names):
        raise DataError(f"{where}: columns {names}, expected each name once")
    return names


def _same_width(
    reader: CsvReader, header: list[str], path: Path, diagnostics: Diagnostics
) -> tuple[list[list[str]], list[int]]:
    rows, numbers = [], []
    line = reader.line_num + 1
    for row in reader:
        if row and len(row) != len(header):
            widths = f"{len(row)} columns, expected {len(header)} as in the header"
            diagnostics.error(DataError(f"{shown(path)} line {line}: {widths}"))
        elif row:
            rows.append(row)
            numbers.append(line)
        line = reader.line_num + 1
    return rows, numbers


# JSON Lines


def _read_json_lines(path: Path, diagnostics: Diagnostics) -> Rows:
    rows, numbers = [], []
    with opened(path) as file:
        for number, line in enumerate(_lines(file, path, diagnostics), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json_row(line.rstrip(), f"{shown(path)} line {number}"))
                numbers.append(number)
            except DataError as problem:
                diagnostics.error(problem)

    def where(row: int) -> str:
        return f"{shown(path)} line {numbers[row]}"

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: typed_column(name, rows, where) for name in names})
    return Rows(shown(path), table, where, path.parent)


def json_row(line: str, where: str) -> dict[str, object]:
    """The JSON object that a text holds, with each key once.

    Raises:
        DataError: it is something else.
    """
    try:
        row = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_once)
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: the lone surrogate {surrogate}, expected valid Unicode") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} column {error.colno}: {error.msg}; expected a JSON object") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}, expected a JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, expected a JSON object")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"keys {names}, each may come once")
    return dict(pairs)


def typed_column(name: str, rows: Sequence[dict[str, object]], where: Callable[[int], str]) -> pa.Array:
    """The values of a key as a column [rows]; null where a row lacks it.

    Raises:
        DataError: two rows have values of different kinds.
    """
    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        pass
    raise DataError(_disagreement(name, values, where))


def _disagreement(name: str, values: Sequence[object], where: Callable[[int], str]) -> str:
    """Name the first row that has another kind of value than a row before it, wherever in the column."""
    first: dict[str, tuple[str, int]] = {}
    for row, value in enumerate(values):
        for place, kind in _kinds(value):
            known, at = first.setdefault(place, (kind, row))
            if kind != known:
                inside = f": {place.lstrip('.')!r}" if place else ""
                here = f"{known} as in {where(at)}" if at != row else f"{known} as before it"
                return f"{where(row)}: column {name!r}{inside} is {kind}, expected {here}"
    return f"{where(0)}: column {name!r} has numbers that don't fit into 64 bits, expected smaller ones"


def _kinds(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Where in a JSON value there is which kind of one; the places of a list count as one place.

    >>> list(_kinds([{"role": "user", "turn": 1.5}, {"role": None}]))
    [('', 'list'), ('[]', 'dict'), ('[].role', 'str'), ('[].turn', 'number'), ('[]', 'dict')]
    """
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    yield place, "number" if is_number else type(value).__name__
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _kinds(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _kinds(inner, f"{place}[]")


# Arrow


def _read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file, decoded once to a nameless temporary file that is mapped, not held."""
    try:
        with opened(path) as file:
            parquet = pq.ParquetFile(file)
            table = mapped(parquet.schema_arrow, parquet.iter_batches(batch_size=256))
        names = _class_names(table.schema)
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{shown(path)}: damaged Parquet: {_first_line(error)}") from None
    return Rows(shown(path), table, lambda row: f"{shown(path)} row {row + 1}", path.parent, names)


def mapped(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """The batches as one table, which lies in a nameless temporary file that is mapped, not held."""
    with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
        spool = Path(folder) / "rows.arrow"
        with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        # The mapping outlives the name: nothing stays behind, even after a kill.
        return pa.ipc.open_stream(pa.memory_map(str(spool))).read_all()


def _class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    inner = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: kind.names for name, kind in inner.items() if isinstance(kind, datasets.ClassLabel)}


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path) -> dict[str, Rows]:
    """The splits of what `save_to_disk` wrote, memory-mapped; one without splits is "train"."""
    import datasets

    datasets.disable_progress_bars()
    try:
        saved = datasets.load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{shown(folder)}: damaged dataset: {_first_line(error)}") from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {name: _saved_rows(folder, name, split) for name, split in splits.items()}


def _saved_rows(folder: Path, split: str, saved: datasets.Dataset) -> Rows:
    name = f"{shown(folder)} {split}"
    names = _class_names(saved.features.arrow_schema)
    return Rows(name, saved.data.table, lambda row: f"{name} row {row + 1}", folder, names)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
