"""One case for each bad input of a shard: one line that names the place, fast, and nothing touched."""

# ruff: noqa: E501  (a case a line, so that the rows can be compared)

import csv
import hashlib
import json
import os
import re
import socket
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atoll.data.classification import Table, example_keys, inspect, read_images, read_texts
from atoll.data.columns import Columns
from atoll.data.images import image_bytes
from atoll.errors import DataError

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """Builds a shard in an empty folder and says how reading it ends: an error, or a note."""

    row: int
    name: str
    make: Make
    error: str = ""
    note: str = ""
    images: bool = False

    @property
    def id(self) -> str:
        return f"row {self.row}: {self.name}"


def file(name: str, data: bytes | str) -> Make:
    """A shard that is one file."""

    def make(root: Path) -> Path:
        path = root / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return make


def member(name: str, data: bytes | str, *, good: bytes | str = "") -> Make:
    """A folder per class with a good example or two, and the file in question."""

    def make(root: Path) -> Path:
        for path, content in {"a/good": good, "b/good": good and good + good[:1], name: data}.items():
            if content != "" or path == name:
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make


def text(data: bytes | str) -> Make:
    return member("a/bad.txt", data, good="some text")


def image(data: bytes, name: str = "bad.png") -> Make:
    return member(f"a/{name}", data, good=png(3, 3))


def in_folder(make: Callable[[Path], object]) -> Make:
    """A good text and whatever `make` adds to its class folder."""

    def build(root: Path) -> Path:
        shard = text("another text")(root / "shard") if (root / "shard").mkdir() is None else root
        make(shard / "a")
        return shard

    return build


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), (1, 2, 3)), "PNG")


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def flipped(data: bytes) -> bytes:
    """A PNG whose checksum of the pixels is off by a bit."""
    at = data.index(b"IEND") - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, and packs that many zeros."""
    packer = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def floats(*values: float) -> bytes:
    return encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")


def animated() -> bytes:
    return encoded(
        Image.new("L", (4, 4), 0), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 255)]
    )


def pages() -> bytes:
    return encoded(noise(8), "TIFF", save_all=True, append_images=[noise(9)])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)


def json_rows(*rows: object) -> Make:
    return file("d.jsonl", "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def indices(root: Path) -> Path:
    """A saved dataset with a class index that stands for nothing."""
    table = pa.table({"text": ["x", "y"], "label": pa.array([0, 7])})
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "y"])}
    )
    pq.write_table(table.cast(features.arrow_schema), root / "d.parquet")
    return root / "d.parquet"


def not_utf8_parquet(root: Path) -> Path:
    raw = pa.array([b"good", b"b\xe9"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers()), "label": ["n", "y"]})
    pq.write_table(table, root / "d.parquet")
    return root / "d.parquet"


def damaged_parquet(root: Path) -> Path:
    pq.write_table(pa.table({"text": ["x" * 999] * 99, "label": ["n"] * 99}), root / "d.parquet")
    whole = (root / "d.parquet").read_bytes()
    (root / "d.parquet").write_bytes(whole[: len(whole) // 2])
    return root / "d.parquet"


def odd_features(root: Path) -> Path:
    table = pa.table({"text": ["x", "y"], "label": ["n", "y"]})
    odd = {"huggingface": '{"info": {"features": {"text": {"_type": "Odd"}}}}'}
    pq.write_table(table.replace_schema_metadata(odd), root / "d.parquet")
    return root / "d.parquet"


def not_utf8_label(root: Path) -> Path:
    raw = pa.array([b"good", b"b\xe9"], pa.binary())
    table = pa.table({"text": ["x", "y"], "label": pa.Array.from_buffers(pa.string(), 2, raw.buffers())})
    pq.write_table(table, root / "d.parquet")
    return root / "d.parquet"


def null_image(root: Path) -> Path:
    table = pa.table({"image": [{"bytes": png(1, 1), "path": None}, None], "label": ["n", "y"]})
    pq.write_table(table, root / "d.parquet")
    return root / "d.parquet"


def other_classes(root: Path) -> Path:
    for part, names in enumerate((["y", "n"], ["n", "y"])):
        rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": names})
        kinds = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        schema = rows.cast(kinds).features.arrow_schema
        table = pa.table({"text": ["x", "y"], "label": pa.array([0, 1])})
        pq.write_table(table.cast(schema), root / f"train-{part:05}-of-00002.parquet")
    return root


def damaged_saved(root: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["x"] * 99, "label": ["n"] * 99}).save_to_disk(root / "d")
    next((root / "d").glob("*.arrow")).write_bytes(b"no arrow")
    return root / "d"


def one_example(root: Path) -> Path:
    (root / "a").mkdir()
    (root / "a" / "1.txt").write_text("alone")
    return root


def one_class(root: Path) -> Path:
    one_example(root)
    (root / "a" / "2.txt").write_text("together")
    return root


def empty(root: Path) -> Path:
    return root


def missing(root: Path) -> Path:
    return root / "nowhere"


def empty_classes(root: Path) -> Path:
    (root / "a").mkdir()
    return root


def no_classes(root: Path) -> Path:
    (root / "1.txt").write_text("no class")
    return root


def leak(root: Path) -> Path:
    for split in ("train", "test"):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            (root / split / label / f"{split}.txt").write_text(f"the same {label}")
    return root


def twice(root: Path) -> Path:
    one_class(root)
    (root / "b").mkdir()
    (root / "b" / "3.txt").write_text("alone")
    return root


def listed_outside(root: Path) -> Path:
    (root / "secret.png").write_bytes(png(2, 2))
    (root / "shard").mkdir()
    (root / "shard" / "d.csv").write_text("path,label\n../secret.png,x\n")
    return root / "shard" / "d.csv"


def saved_link_out(root: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["x"], "label": ["n"]}).save_to_disk(root / "d")
    data = next((root / "d").glob("*.arrow"))
    data.rename(root / "outside.arrow")
    data.symlink_to(root / "outside.arrow")
    return root / "d"


def listed_missing(root: Path) -> Path:
    return file("d.csv", "path,label\ngone.png,x\n")(root)


def link_out(folder: Path) -> None:
    secret = folder.parent.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "bad.txt").unlink()
    (folder / "bad.txt").symlink_to(secret)


def loop(folder: Path) -> None:
    (folder / "loop.txt").symlink_to(folder / "loop.txt")


def folder_out(folder: Path) -> None:
    (folder.parent.parent / "elsewhere").mkdir()
    (folder.parent / "c").symlink_to(folder.parent.parent / "elsewhere")


def device(folder: Path) -> None:
    (folder / "zero.txt").symlink_to("/dev/zero")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")


def shard_fifo(root: Path) -> Path:
    os.mkfifo(root / "d.csv")
    return root / "d.csv"


def shard_loop(root: Path) -> Path:
    (root / "d.csv").symlink_to(root / "d.csv")
    return root / "d.csv"


def bound_socket(folder: Path) -> None:
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")
        Path(short, "s").rename(folder / "socket.txt")


def odd_name(folder: Path) -> None:
    Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_text("fine inside")


def odd_class(folder: Path) -> None:
    odd = Path(os.fsdecode(bytes(folder.parent) + b"/\xff"))
    odd.mkdir()
    (odd / "1.txt").write_text("fine inside")


def nested(folder: Path) -> None:
    (folder / "deeper").mkdir()


DICOM = bytes(128) + b"DICM" + bytes(64)
HEAD = "text,label\n"
CASES = [
    Case(23, "no such folder", missing, error="nowhere: no such file or folder, expected a folder per class"),
    Case(24, "an empty folder", empty, error="holds nothing and no class folder"),
    Case(24, "empty class folders", empty_classes, error="no examples to train on"),
    Case(24, "files without a class", no_classes, error="holds 1 files and no class folder"),
    Case(24, "a CSV of a header", file("d.csv", HEAD), error="d.csv: no examples to train on"),
    Case(24, "an empty CSV", file("d.csv", ""), error=r"d.csv line 1: empty, expected a header"),
    Case(24, "an empty JSON Lines", file("d.jsonl", ""), error=r"d.jsonl: columns \[\], expected one for the"),
    Case(25, "one class", one_class, note="train: all examples are of one class, 'a'"),
    Case(26, "one record", one_example, note="train: only one example"),
    Case(28, "an index without a class", indices, error=r"row 2: the label is class index 7, expected 0 to 1"),
    Case(29, "no label", file("d.csv", HEAD + "x,\n"), error="d.csv line 2: the label is '', which is missing"),
    Case(29, "NaN label", file("d.csv", HEAD + "x,nan\n"), error="d.csv line 2: the label is 'nan', which is"),
    Case(29, "a fraction", file("d.csv", HEAD + "x,y\nx,1.5\n"), error="d.csv line 3: the label is '1.5', exp"),
    Case(29, "a JSON fraction", json_rows({"text": "x", "label": 1.5}), error="line 1: the label is 1.5, expected"),
    Case(29, "a JSON null", json_rows({"text": "x", "label": None}), error="line 1: the label is missing"),
    Case(29, "a JSON list", json_rows({"text": "x", "label": [1]}), error=r"line 1: the label is \[1\], expected"),
    Case(29, "a control character", file("d.csv", HEAD + "x,a\x1b[31m\n"), error=r"line 2: the label is 'a\\x1b"),
    Case(32, "0 bytes", image(b""), error="bad.png: 0 bytes, expected an image", images=True),
    Case(32, "no image at all", null_image, error="d.parquet row 2: no image, expected its bytes or", images=True),
    Case(33, "a truncated JPEG", image(encoded(noise(), "JPEG")[:-900]), error="damaged image", images=True),
    Case(34, "a flipped checksum", image(flipped(encoded(noise(), "PNG"))), error="damaged image", images=True),
    Case(35, "text named jpg", image(b"hello there", "bad.jpg"), error="bad.jpg: text, expected an", images=True),
    Case(36, "SVG", image(b'<?xml version="1.0"?>\n<svg/>'), error="bad.png: an SVG drawing", images=True),
    Case(36, "HTML", image(b"<!DOCTYPE html><html>"), error="bad.png: an HTML page", images=True),
    Case(36, "PDF", image(b"%PDF-1.7\n"), error="bad.png: a PDF, expected an image", images=True),
    Case(36, "PDF for text", text(b"%PDF-1.7\n"), error="bad.txt: a PDF, expected UTF-8 text"),
    Case(37, "144 megapixels", image(bomb(12_000, 12_000)), error="12000 x 12000 pixels, at most", images=True),
    Case(37, "196 megapixels", image(bomb(14_000, 14_000)), error="decompression bomb, at most", images=True),
    Case(38, "1 x 1", image(png(1, 1)), images=True),
    Case(38, "1 x 100,000", image(bomb(1, 100_000)), error="1 x 100000 pixels, at most 65535", images=True),
    Case(39, "floats beyond 1", image(floats(0, 900)), error="floats from 0 to 900, expected 0 to 1", images=True),
    Case(40, "an animated GIF", image(animated()), note="only the first is used: .*bad.png", images=True),
    Case(40, "a TIFF of two pages", image(pages()), note="only the first is used: .*bad.png", images=True),
    Case(41, "EXIF rotation", image(turned()), images=True),
    Case(42, "DICOM", image(DICOM), error="bad.png: a DICOM file, for which there is no decoder", images=True),
    Case(43, "NaN pixel", image(floats(0, np.nan)), error="floats from nan to nan, expected 0 to 1", images=True),
    Case(43, "infinite pixel", image(floats(0, np.inf)), error="floats from 0 to inf, expected", images=True),
    Case(43, "NaN in JSON", json_rows('{"text": NaN, "label": "x"}\n'), error="line 1: NaN is no JSON number"),
    Case(44, "all pixels equal", image(encoded(Image.new("L", (5, 5), 9), "PNG")), images=True),
    Case(45, "a short row", file("d.csv", HEAD + "x,y\nz\n"), error="line 3: 1 columns, expected 2 as in the"),
    Case(45, "a long row", file("d.csv", HEAD + '"a\nb",y\nx,y,z\n'), error="line 4: 3 columns, expected 2"),
    Case(45, "a column of two types", json_rows({"text": "x", "label": 1}, {"text": "x", "label": "a"}),
         error="line 2: column 'label' is str, expected number as in .*line 1"),
    Case(45, "two types after a fraction", json_rows(*({"text": "x", "label": label} for label in (1, 2.5, "a"))),
         error="line 3: column 'label' is str, expected number as in .*line 1"),
    Case(45, "two types in one list", json_rows({"text": "x", "label": [None, 1, "a"]}),
         error=r"line 1: column 'label': '\[\]' is str, expected number as before it"),
    Case(45, "two types within a list", json_rows({"text": [{"say": "x"}], "label": 1}, {"text": [{"say": ["x"]}], "label": 1}),
         error=r"line 2: column 'text': '\[\].say' is list, expected str as in .*line 1"),
    Case(45, "a number of 70 bits", json_rows({"text": "x", "label": 2**70}), error="column 'label' has numbers that don't fit"),
    Case(46, "wrong delimiter", file("d.csv", "text;label\nx;y\n"), error="line 1: one column 'text;label', exp"),
    Case(46, "decimal comma", file("d.csv", HEAD + 'x,"1,5"\n'), error="line 2: the label is '1,5', expected a"),
    Case(46, "an open quote", file("d.csv", HEAD + '"x,y\n'), error="d.csv line 2: .*expected strict CSV"),
    Case(46, "NUL in CSV", file("d.csv", HEAD + "x\0,y\n"), error="d.csv line 2: byte 12 is NUL, expected text"),
    Case(46, "a column twice", file("d.csv", "text,text,label\n"), error="expected each name once"),
    Case(46, "broken JSON", json_rows('{"text": \n'), error="d.jsonl line 1 column 9: .*expected a JSON object"),
    Case(46, "damaged Parquet", damaged_parquet, error="d.parquet: damaged Parquet"),
    Case(46, "parts with other classes", other_classes, error=r"00001-of-00002.parquet: columns text .*'label': \['n', 'y'\].* as in .*00000-of"),
    Case(46, "Parquet of an odd type", odd_features, error="d.parquet: damaged Parquet: Feature type 'Odd'"),
    Case(46, "a damaged saved dataset", damaged_saved, error="d: damaged dataset"),
    Case(46, "an unknown format", file("d.xlsx", b"PK\3\4"), error=r"d.xlsx: format '.xlsx', expected a folder per class, or one file of .csv, .tsv"),
    Case(47, "Latin-1 file", text(b"caf\xe9"), error="bad.txt: byte 3 is 0xe9, expected UTF-8 text"),
    Case(47, "UTF-16 file", text("hi".encode("utf-16")), error="bad.txt: byte 0 is 0xff: UTF-16, expected UTF-8"),
    Case(47, "Latin-1 CSV", file("d.csv", HEAD.encode() + b"x\xe9,y\n"), error="line 2: byte 12 is 0xe9, exp"),
    Case(47, "Latin-1 after a mark", file("d.csv", b"\xef\xbb\xbftext,label\xe9\n"), error="line 1: byte 13 is 0xe9"),
    Case(47, "Latin-1 Parquet", not_utf8_parquet, error="d.parquet row 2: byte 1 is 0xe9, expected UTF-8 text"),
    Case(47, "Latin-1 label", not_utf8_label, error="d.parquet: column 'label': .*invalid UTF.?8"),
    Case(47, "a byte order mark", text(b"\xef\xbb\xbfhi"), note="a byte order mark was dropped: .*bad.txt"),
    Case(48, "empty text", text(" \n"), error="bad.txt: empty, expected some text"),
    Case(48, "NUL in text", text("a\0"), error="bad.txt: byte 1 is NUL, expected text"),
    Case(48, "10 MB file", text("x" * 10**7), error="bad.txt: 10000000 bytes of text, at most 1000000 allowed"),
    Case(48, "10 MB line", file("d.csv", HEAD + "x" * 10**7), error="line 2: longer than 8000000 bytes, the most"),
    Case(48, "2 MB field", file("d.csv", HEAD + "x" * 2 * 10**6 + ",y"), error="line 2: 2000000 bytes of text, at most 1000000"),
    Case(48, "lone surrogate", json_rows({"text": "\ud800", "label": "x"}), error=r"line 1: the lone surrogate \\ud"),
    Case(49, "a link out", in_folder(link_out), error="a/bad.txt: leads out of .*shard to .*secret.txt"),
    Case(49, "a saved dataset's link out", saved_link_out, error="data-00000-of-00001.arrow: leads out of .*/d to"),
    Case(49, "a class folder out", in_folder(folder_out), error="shard/c: leads out of .*shard to .*elsewhere"),
    Case(49, "a loop", in_folder(loop), error="a/loop.txt: too many levels of symbolic links"),
    Case(49, "a FIFO", in_folder(fifo), error="a/pipe.txt: a fifo, expected a regular file"),
    Case(49, "a socket", in_folder(bound_socket), error="a/socket.txt: a socket, expected a regular file"),
    Case(49, "a device", in_folder(device), error="a/zero.txt: leads out of"),
    Case(49, "a shard that is a FIFO", shard_fifo, error="d.csv: a fifo, expected a regular file"),
    Case(49, "a shard that is a loop", shard_loop, error="d.csv: no such file or folder"),
    Case(49, "a file name in Latin-1", in_folder(odd_name), error="udcff.txt': a name that is not UTF-8"),
    Case(49, "a class in Latin-1", in_folder(odd_class), error="udcff': a name that is not UTF-8"),
    Case(49, "a folder in a class", in_folder(nested), error="a/deeper: a folder, expected a regular file"),
    Case(49, "a path out of the CSV's folder", listed_outside, error=r"line 2: .*leads out of", images=True),
    Case(50, "a listed file that is gone", listed_missing, error="d.csv line 2: .*gone.png: no such", images=True),
    Case(50, "the same text twice", twice, note="train: 1 examples repeat the content of another one"),
    Case(50, "the same text in train and test", leak, note="test: 2 examples have the content of a training"),
]  # fmt: skip


def snapshot(root: Path) -> dict[str, str]:
    """Every name below `root`, with the hash of what is a file and the target of what is a link."""
    found = {}
    for path in root.rglob("*"):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode)
        content = (
            path.read_bytes() if is_file else str(path.readlink()).encode() if path.is_symlink() else b""
        )
        found[str(path)] = f"{stat.S_IFMT(mode)} {hashlib.sha256(content).hexdigest()}"
    return found


def read(case: Case, path: Path) -> Table:
    return (read_images if case.images else read_texts)(path, Columns())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_data_gets_one_line_and_nothing_changes(case, tmp_path):
    path = case.make(tmp_path)
    before = snapshot(tmp_path)
    if case.error:
        with pytest.raises(DataError, match=f"(?i){case.error}") as caught:
            read(case, path)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    else:
        table = read(case, path)
        assert any(re.search(case.note, note) for note in table.notes) or not case.note
    assert snapshot(tmp_path) == before


def test_classes_that_a_person_reads_as_one_are_remarked_before_a_run(tmp_path):
    (tmp_path / "d.csv").write_text(HEAD + "x,Good\ny,good \nz,bad\n")
    assert (
        "classes 'Good', 'good' differ by case or space only"
        in inspect(tmp_path / "d.csv", "text-classification").notes
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.error], ids=lambda case: case.id)
def test_findings_tell_of_bad_examples_without_raising_unless_there_is_nothing(case, tmp_path):
    task = "image-classification" if case.images else "text-classification"
    try:
        found = inspect(case.make(tmp_path), task)
    except DataError as error:
        assert re.search(case.error, str(error), re.IGNORECASE)
    else:
        lines = "\n".join(found.problems)
        assert re.search(case.error, lines, re.IGNORECASE) or not (found.problems or found.train)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read anything, so give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_without_read_permission_is_named():
    with tempfile.TemporaryDirectory() as folder:
        root = text("private")(Path(folder))
        for path in (root, root / "a", root / "b"):
            path.chmod(0o755)
        (root / "a" / "bad.txt").chmod(0)
        with as_nobody(), pytest.raises(DataError, match=r"bad.txt: cannot be read: permission denied"):
            read_texts(root)


def test_a_folder_that_may_not_be_entered_is_named():
    with tempfile.TemporaryDirectory() as folder:
        root = text("private")(Path(folder))
        for path, mode in ((root, 0o755), (root / "a", 0o600), (root / "b", 0o755)):
            path.chmod(mode)
        with as_nobody(), pytest.raises(DataError, match=r"a: cannot be .*: permission denied"):
            read_texts(root)


def test_an_image_under_a_relative_path_is_named_once(tmp_path, monkeypatch):
    image(b"")(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^a/bad.png: 0 bytes"):
        read_images(Path())


def test_an_image_deleted_after_reading_is_named_when_it_is_used(tmp_path):
    table = read_images(image(png(4, 4))(tmp_path))
    (tmp_path / "a" / "bad.png").unlink()
    with pytest.raises(DataError, match=r"bad.png: cannot be read: no such file"):
        [image_bytes(row["image"]) for row in table.train]


def test_sites_with_other_label_sets_get_the_same_names_for_the_same_classes(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\nx,2\ny,1\n")
    (tmp_path / "two.csv").write_text("text,label\ny,1.0\nz,3.0\n")
    one, two = (read_texts(tmp_path / f"{site}.csv").train for site in ("one", "two"))
    assert (one["label"], two["label"]) == (["2", "1"], ["1", "3"])
    assert set(example_keys(one)) & set(example_keys(two)) == {example_keys(one)[1]}


def test_a_long_csv_names_the_first_bad_row_and_counts_all(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("text", "label"), *[("x", "y"), ("x", "")] * 500])
    with pytest.raises(DataError, match=r"line 3: the label is ''.*the first of 500 bad examples"):
        read_texts(tmp_path / "d.csv")
