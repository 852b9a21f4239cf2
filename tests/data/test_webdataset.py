"""Tar files of WebDataset: the same examples as the Hub's own reader, bad ones refused in a line."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from atoll.data.classification import read_images
from atoll.data.diagnostics import Counts
from atoll.data.images import decode_image
from atoll.errors import DataError
from atoll.job.job import DataSection
from atoll.tasks import task_named

DATA = DataSection(source="./here")
Member = tuple[str, bytes]


def tar_of(path: Path, members: Sequence[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(number: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(3200) * (number + 1) / 10), 16000, format="WAV")
    return file.getvalue()


def pictures(numbers: Sequence[int], folder: str = "") -> list[Member]:
    return [
        (f"{folder}{n:04d}.{ending}", data)
        for n in numbers
        for ending, data in (("png", png(n)), ("cls", str(n % 3).encode()))
    ]


def test_pictures_and_classes_are_those_that_the_hubs_reader_finds(tmp_path: Path) -> None:
    parts = {"train": [range(5), range(5, 8)], "test": [range(8, 10)], "val": [range(10, 11)]}
    for split, shards in parts.items():
        for number, rows in enumerate(shards):
            tar_of(tmp_path / f"flowers-{split}-{number:06d}.tar", pictures(rows, "./deep/"))
    table = read_images(tmp_path)
    for split, ours in (("train", table.train), ("test", table.test)):
        files = sorted(map(str, tmp_path.glob(f"*-{split}-*.tar")))
        theirs = list(
            datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
        )
        assert ours is not None and len(ours) == len(theirs) == sum(map(len, parts[split]))
        assert ours["label"][:] == [str(row["cls"]) for row in theirs]
        for cell, row in zip(ours["image"][:], theirs, strict=True):
            pixels = np.asarray(decode_image(cell["bytes"], "a picture"))
            assert np.array_equal(pixels, np.asarray(row["png"]))
    assert table.counts[0] == Counts("examples", 11, 10, {"of other splits than train and test": 1})


def test_shards_without_a_splits_name_are_all_trained_on_in_their_order(tmp_path: Path) -> None:
    for number in (1, 0):
        tar_of(tmp_path / f"part-{number}.tar", pictures(range(4 * number, 4 * number + 4)))
    table = read_images(tmp_path)
    assert table.test is None and table.train["label"][:] == [str(n % 3) for n in range(8)]
    alone = read_images(tmp_path / "part-1.tar")
    assert alone.train["label"][:] == [str(n % 3) for n in range(4, 8)]


def test_texts_sounds_and_objects_become_the_columns_that_tasks_know(tmp_path: Path) -> None:
    said = ["yes", "größe"]
    sounds = [
        (f"{n}.{ending}", data)
        for n, text in enumerate(said)
        for ending, data in (
            ("wav", wav(n)),
            ("transcript.txt", text.encode()),
            ("json", b'{"speaker": "s1"}'),
        )
    ]
    heard = task_named("speech-recognition").read(tar_of(tmp_path / "calls.tar", sounds), DATA, {})
    assert heard.train["transcript"][:] == said and heard.train["speaker"][:] == ["s1", "s1"]
    assert [cell["bytes"] for cell in heard.train["audio"][:]] == [wav(0), wav(1)]
    rows = [{"text": f"text {n}", "label": "ab"[n % 2], "n": n} for n in range(4)]
    lines = [(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
    read = task_named("text-classification").read(tar_of(tmp_path / "rows.tar", lines), DATA, {})
    assert [read.train[name][:] for name in rows[0]] == [[row[name] for row in rows] for name in rows[0]]


def test_a_tar_file_beside_what_was_unpacked_from_it_is_not_read(tmp_path: Path) -> None:
    for n in range(4):
        file = tmp_path / "ab"[n % 2] / f"{n}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(n))
    tar_of(tmp_path / "all.tar", pictures(range(9)))
    assert sorted(set(read_images(tmp_path).train["label"][:])) == ["a", "b"]


def linked() -> list[Any]:
    member = tarfile.TarInfo("0.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return [member]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", png(0)), ("0.cls", b"cat")], r"t\.tar 0\.cls: 'cat', expected a whole number"),
        ([("0.cls", b"1"), ("0.cls", b"1")], r"t\.tar 0\.cls: a second value for 'label', expected one"),
        ([*pictures([0, 1]), ("0000.txt", b"x")], r"t\.tar 0000\.txt: the key 0000 again, expected an exam"),
        ([("0.json", b"[1]")], r"t\.tar 0\.json: list, expected a JSON object"),
        ([("0.txt", b"\xff"), ("0.cls", b"1")], r"t\.tar 0\.txt: byte 0 is 0xff, expected UTF-8"),
        ([("0.png", png(0)), ("1.cls", b"1")], r"t\.tar 0.*label|t\.tar 1: "),
        ([("0.png", b"no picture"), ("0.cls", b"1")], r"t\.tar 0: "),
        ([], r"no examples|columns \[\]"),
    ],
)
def test_a_bad_shard_is_one_line_that_names_the_example(
    tmp_path: Path, members: list[Member], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_images(tar_of(tmp_path / "t.tar", members))
    assert "\n" not in str(caught.value)


def test_links_and_torn_files_are_refused_and_hidden_ones_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        tar.addfile(linked()[0])
    with pytest.raises(DataError, match=r"l\.tar 0\.png: a link or a device, expected files"):
        read_images(tmp_path / "l.tar")
    whole = tar_of(tmp_path / "whole.tar", [("._0000.png", b"x"), ("README", b"x"), *pictures(range(4))])
    assert any("2 files without an ending" in note for note in read_images(whole).notes)
    for torn in (700, len(whole.read_bytes()) // 2):
        (tmp_path / "torn.tar").write_bytes(whole.read_bytes()[:torn])
        with pytest.raises(DataError, match=r"torn\.tar"):
            read_images(tmp_path / "torn.tar")
