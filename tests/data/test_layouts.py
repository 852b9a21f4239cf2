"""Data as other tools lay it out: each layout is written by hand, and what is read is what was written."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torchvision
from PIL import Image

from atoll.data.classification import read_images
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.data.images import decode_image, image_bytes
from atoll.errors import DataError
from atoll.job.job import DataSection, Job
from atoll.tasks import task_named
from atoll.tasks.detection.task import DETECTION
from tests.tasks.images.test_detection import coco_of, images, xml_of

DATA = DataSection(source="./here")
Box = tuple[list[float], str]
Read = dict[str, list[tuple[list[float], str]]]


def read_boxes(dataset: Dataset | None, root: Path) -> Read:
    """Each image's boxes and classes, by its path."""
    assert dataset is not None
    cells = zip(dataset["image"][:], dataset["boxes"][:], dataset["classes"][:], strict=True)
    return {
        Path(image["path"]).relative_to(root.absolute()).as_posix(): list(zip(boxes, classes, strict=True))
        for image, boxes, classes in cells
    }


def squares(folder: str, boxes: list[list[float]]) -> Read:
    return {f"{folder}/{n}.png": [(box, "square")] for n, box in enumerate(boxes)}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("inside", ["", "images/"], ids=["as published", "under images"])
def test_coco_as_coco_is(tmp_path: Path, inside: str) -> None:
    expected = {}
    for split, count in (("train", 3), ("val", 2)):
        boxes = images(tmp_path / inside / f"{split}2017", count)
        write(tmp_path / f"annotations/instances_{split}2017.json", json.dumps(coco_of(boxes)))
        write(tmp_path / f"annotations/captions_{split}2017.json", "{}")
        expected[split] = squares(f"{inside}{split}2017", boxes)
    table = DETECTION.read(tmp_path, DATA, {})
    assert read_boxes(table.train, tmp_path) == expected["train"]
    assert read_boxes(table.test, tmp_path) == expected["val"]
    assert any("val is taken as the test part" in note for note in table.notes)
    assert table.counts[0] == Counts("examples", 5, 5)


def test_coco_with_a_test_part_leaves_val_out_and_counts_it(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        boxes = images(tmp_path / split, count)
        write(tmp_path / f"annotations/instances_{split}.json", json.dumps(coco_of(boxes)))
    table = DETECTION.read(tmp_path, DATA, {})
    assert table.test is not None and (len(table.train), len(table.test)) == (3, 1)
    assert table.counts[0] == Counts("examples", 6, 4, {"of other splits than train and test": 2})


def as_voc2012(root: Path, lists: dict[str, list[int]]) -> list[list[float]]:
    base = root / "VOCdevkit" / "VOC2012"
    boxes = images(base / "JPEGImages", 5)
    for number, box in enumerate(boxes):
        (base / "JPEGImages" / f"{number}.png").rename(base / "JPEGImages" / f"{number}.jpg")
        write(base / f"Annotations/{number}.xml", xml_of(number, box).replace(".png", ".jpg"))
    for name, numbers in lists.items():
        write(base / f"ImageSets/Main/{name}.txt", "".join(f"{n}\n" for n in numbers))
    return boxes


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_as_torchvision_reads_it(tmp_path: Path, below: str) -> None:
    lists = {"train": [3, 0], "val": [1], "trainval": [0, 1, 3], "square_train": [0]}
    as_voc2012(tmp_path, lists)
    table = DETECTION.read(tmp_path / below, DATA, {})
    for dataset, split in ((table.train, "train"), (table.test, "val")):
        expected: Read = {}
        theirs = torchvision.datasets.VOCDetection(str(tmp_path), year="2012", image_set=split)
        for place, (_, told) in enumerate(theirs):
            boxes: list[Box] = []
            for one in told["annotation"]["object"]:
                corner = {key: float(value) for key, value in one["bndbox"].items()}
                box = [corner["xmin"] - 1, corner["ymin"] - 1, corner["xmax"], corner["ymax"]]
                boxes.append((box, one["name"]))
            expected[Path(theirs.images[place]).relative_to(tmp_path).as_posix()] = boxes
        assert len(expected) == len(lists[split]) and read_boxes(dataset, tmp_path) == expected
    left_out = {"in no list of ImageSets/Main that is used": 2}
    assert table.counts[0] == Counts("examples", 5, 3, left_out)


def test_voc_with_a_test_list_trains_on_trainval(tmp_path: Path) -> None:
    as_voc2012(tmp_path, {"train": [0], "val": [1], "trainval": [0, 1], "test": [2, 3, 4]})
    table = DETECTION.read(tmp_path, DATA, {})
    assert table.test is not None and (len(table.train), len(table.test)) == (2, 3)


def as_yolo(root: Path, told: str, folder: Callable[[str], str] = "images/{}".format) -> dict[str, Read]:
    """Two classes; the second image of each part has no labels' file, the third an empty one."""
    write(root / "data.yaml", told)
    found = {}
    for split, count in (("train", 4), ("val", 3)):
        place = folder(split)
        boxes, expected = images(root / place, count), {}
        for n, (x1, y1, x2, y2) in enumerate(boxes):
            line = f"1 {(x1 + x2) / 96!r} {(y1 + y2) / 96!r} {(x2 - x1) / 48!r} {(y2 - y1) / 48!r}\n"
            if n != 1:
                write(root / place.replace("images", "labels") / f"{n}.txt", "" if n == 2 else line)
            expected[f"{place}/{n}.png"] = [] if n in (1, 2) else [(boxes[n], "square")]
        found[split] = expected
    return found


YOLO = "path: ../datasets/mine  # of the machine that wrote it\ntrain: images/train\nval: images/val\n"
NAMES = "names:\n  0: circle\n  1: square\n"


@pytest.mark.parametrize(
    ("told", "folder"),
    [
        (YOLO + NAMES, "images/{}"),
        ("train: images/train\nval: [images/val]\nnc: 2\nnames: [circle, square]\n", "images/{}"),
        ("train: ../train/images\nval: ../val/images\nnames: ['circle', 'square']\n", "{}/images"),
    ],
    ids=["ultralytics", "lists", "roboflow"],
)
def test_yolo_folders(tmp_path: Path, told: str, folder: str) -> None:
    expected = as_yolo(tmp_path, told, folder.format)
    table = DETECTION.read(tmp_path, DATA, {})
    for dataset, split in ((table.train, "train"), (table.test, "val")):
        found = read_boxes(dataset, tmp_path)
        assert list(found) == list(expected[split])
        for image, boxes in expected[split].items():
            assert [name for _, name in found[image]] == [name for _, name in boxes]
            for (box, _), (wanted, _) in zip(found[image], boxes, strict=True):
                assert box == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("data.yaml", "names: [a\n", r"data\.yaml: not valid YAML"),
        ("data.yaml", "- a\n", r"data\.yaml: list, expected names, train and val"),
        ("data.yaml", "train: images/train\n", r"data\.yaml: names None, expected a list of classes"),
        ("data.yaml", "val: images/val\n" + NAMES, r"data\.yaml: no train, expected the folder"),
        ("data.yaml", "train: elsewhere\n" + NAMES, r"data\.yaml: elsewhere is no folder of images"),
        ("data.yaml", "train: ../..\n" + NAMES, "leads out of"),
        ("labels/train/0.txt", "0 0.5 0.5\n", r"labels/train/0\.txt line 1: 3 values, expected class, x, y"),
        ("labels/train/0.txt", "\n7 0.5 0.5 0.1 0.1\n", r"0\.txt line 2: class 7, expected one of \[0, 1\]"),
        ("labels/train/0.txt", "1 24 24 16 16\n", r"0\.txt line 1: '1 24 24 16 16', expected class"),
        ("labels/train/0.txt", "square 0.5 0.5 0.1 0.1\n", r"0\.txt line 1: 'square', expected a number"),
    ],
)
def test_bad_yolo_is_one_line(tmp_path: Path, file: str, text: str, said: str) -> None:
    as_yolo(tmp_path, YOLO + NAMES)
    write(tmp_path / file, text)
    with pytest.raises(DataError, match=said) as told:
        DETECTION.read(tmp_path, DATA, {})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("ImageSets/Main/train.txt", "0\n9\n", r"train\.txt line 2: no Annotations/9\.xml, expected one"),
        ("Annotations/0.xml", "<annotation>", r"0\.xml: .*expected VOC XML"),
    ],
)
def test_bad_voc_is_one_line(tmp_path: Path, file: str, text: str, said: str) -> None:
    as_voc2012(tmp_path, {"train": [0, 1], "val": [2]})
    write(tmp_path / "VOCdevkit" / "VOC2012" / file, text)
    with pytest.raises(DataError, match=said):
        DETECTION.read(tmp_path, DATA, {})


def grey_pixels(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(count).integers(0, 256, (count, 9, 7), dtype=np.uint8)


def as_idx(folder: Path, suffix: str = "", dot: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 6), ("t10k", 4)):
        pixels, labels = grey_pixels(count), bytes(range(count))
        parts = {f"{split}-images{dot}idx3-ubyte": struct.pack(">4I", 2051, count, 9, 7) + pixels.tobytes(),
                 f"{split}-labels{dot}idx1-ubyte": struct.pack(">2I", 2049, count) + labels}  # fmt: skip
        for name, data in parts.items():
            (folder / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)


def read_pixels(dataset: Dataset | None) -> list[Any]:
    assert dataset is not None
    return [np.asarray(decode_image(image_bytes(cell), "image"))[:, :, 0] for cell in dataset["image"][:]]


@pytest.mark.parametrize(
    ("below", "suffix", "dot"), [("", "", "-"), ("", ".gz", "-"), ("", "", "."), ("MNIST/raw", "", "-")]
)
def test_idx_files_as_torchvision_reads_them(tmp_path: Path, below: str, suffix: str, dot: str) -> None:
    as_idx(tmp_path / below, suffix, dot)
    as_idx(tmp_path / "theirs" / "MNIST" / "raw")
    table = read_images(tmp_path)
    for dataset, train in ((table.train, True), (table.test, False)):
        theirs = torchvision.datasets.MNIST(str(tmp_path / "theirs"), train=train)
        found = read_pixels(dataset)
        assert len(found) == len(theirs) and dataset is not None
        for mine, (image, _) in zip(found, theirs, strict=True):
            assert np.array_equal(mine, np.asarray(image))
        assert dataset["label"][:] == [str(label) for label in theirs.targets.tolist()]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("train-images-idx3-ubyte", b"PK\3\4", r"starts with 50 4b 03 04, expected IDX of unsigned"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 2051, 6, 9, 7), r"0 values, expected 6 x 9 x 7 = 378"),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 2049, 1) + b"1", "1 labels, expected one for each of"),
        ("train-labels-idx1-ubyte", None, r"no IDX file of the labels to train on"),
        ("train-images-idx3-ubyte.gz", b"no gzip", r"idx3-ubyte\.gz: damaged \(.*\), expected gzip"),
    ],
)  # fmt: skip
def test_bad_idx_is_one_line(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    as_idx(tmp_path)
    (tmp_path / name.removesuffix(".gz")).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read_images(tmp_path)


def test_an_image_folder_as_torchvision_reads_it(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for place, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for n, pixels in enumerate(grey_pixels(count + place)):
                Image.fromarray(pixels).save(tmp_path / split / name / f"{n}.png")
    table = read_images(tmp_path)
    for dataset, split in ((table.train, "train"), (table.test, "test")):
        theirs = torchvision.datasets.ImageFolder(str(tmp_path / split))
        assert dataset is not None
        assert dataset["label"][:] == [theirs.classes[label] for label in theirs.targets]
        for mine, (image, _) in zip(read_pixels(dataset), theirs, strict=True):
            assert np.array_equal(mine, np.asarray(image)[:, :, 0])
    assert table.counts[0] == Counts("examples", 15, 12, {"of other splits than train and test": 3})


def tone(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(3200) * (number + 1) / 10).astype(np.float32), 16000)


@pytest.mark.parametrize("column", ["transcription", "text"])
def test_an_audio_folder_with_metadata_as_the_hub_has_it(tmp_path: Path, column: str) -> None:
    said = {"train": ["yes", "no", "up"], "test": ["down", "on"]}
    for split, texts in said.items():
        lines = [f"file_name,{column}", *(f"clips/{n}.wav,{text}" for n, text in enumerate(texts))]
        write(tmp_path / split / "metadata.csv", "\n".join(lines))
        for n in range(len(texts)):
            tone(tmp_path / split / "clips" / f"{n}.wav", n)
    table = task_named("speech-recognition").read(tmp_path, DATA, {})
    for dataset, split in ((table.train, "train"), (table.test, "test")):
        assert dataset is not None and dataset["transcript"][:] == said[split]
        names = [
            Path(cell["path"]).relative_to(tmp_path.absolute()).as_posix() for cell in dataset["audio"][:]
        ]
        assert names == [f"{split}/clips/{n}.wav" for n in range(len(names))]


def test_a_file_beside_the_job_needs_no_dot_and_slash(tmp_path: Path) -> None:
    write(tmp_path / "power.csv", "date,value\n")
    table = {"name": "t", "seed": 1, "task": {"name": "forecasting"}, "backbone": {"name": "atoll:gru"}}
    for source, expected in (
        ("power.csv", str((tmp_path / "power.csv").resolve())),
        ("./power.csv", str((tmp_path / "power.csv").resolve())),
        ("other.csv", "other.csv"),
        ("digits", "digits"),
    ):
        job = Job.parse({**table, "data": {"source": source, "test": source}}, origin="t", folder=tmp_path)
        assert job.data.source == expected and job.data.test == expected


def test_pictures_none_of_which_has_a_box_are_remarked(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.new("RGB", (8, 6), "red").save(tmp_path / "images" / split / "1.png")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images/train\nval: images/val\n")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    none = "none of the 1 pictures has a box"
    notes = DETECTION.inspect(tmp_path, DATA, {}).notes
    assert [note.partition(";")[0] for note in notes if none in note] == [f"test: {none}"]
    (tmp_path / "labels").rename(tmp_path / "label")
    assert sum(none in note for note in DETECTION.read(tmp_path, DATA, {}).notes) == 2


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("token-classification", "expected CoNLL files (.conll, "),
        ("forecasting", "expected one file of .csv, "),
        ("segmentation", "expected images/ and masks/ "),
    ],
)
def test_what_is_no_data_of_a_task_is_told_what_the_task_reads(
    task: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.xlsx").write_bytes(b"PK")
    for name, found in (("empty", "holds nothing"), ("d.xlsx", "format '.xlsx'"), ("no", "no such file")):
        with pytest.raises(DataError) as caught:
            task_named(task).read(tmp_path / name, DATA, {})
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / name}: {found}") and expected in said and "class" not in said
