"""Object detection: COCO, VOC and rows as they are read, and what a detector learns from them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from atoll.client.training.local_sgd import train_model
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.data.shard import Shard
from atoll.datasets.synthetic.png import rgb_png
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner, sum_states
from atoll.tasks import task_named
from atoll.tasks.detection.task import DETECTION

DATA = DataSection(source="./here")
FACTS = {"classes": ["square"], "most": 1}


def scene(number: int, side: int = 48) -> tuple[bytes, list[float]]:
    """A bright square on dark ground, and its box."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
    x, y = (int(v) for v in rng.integers(2, side // 2, 2))
    pixels[y : y + side // 3, x : x + side // 3] += 180
    return rgb_png(pixels), [float(x), float(y), float(x + side // 3), float(y + side // 3)]


def images(root: Path, count: int = 3) -> list[list[float]]:
    root.mkdir(parents=True, exist_ok=True)
    boxes = []
    for number in range(count):
        data, box = scene(number)
        (root / f"{number}.png").write_bytes(data)
        boxes.append(box)
    return boxes


def as_rows(root: Path) -> Path:
    lines = [
        {"image": f"{n}.png", "boxes": [box], "classes": ["square"]} for n, box in enumerate(images(root))
    ]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def coco_of(boxes: list[list[float]]) -> dict[str, Any]:
    return {
        "images": [{"id": n + 10, "file_name": f"{n}.png"} for n in range(len(boxes))],
        "annotations": [
            {"image_id": n + 10, "category_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for n, (x1, y1, x2, y2) in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "square"}],
    }


def as_coco(root: Path) -> Path:
    boxes = images(root / "images")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_all.json").write_text(json.dumps(coco_of(boxes)))
    return root


def xml_of(number: int, box: list[float]) -> str:
    x1, y1, x2, y2 = (int(v) for v in box)
    corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    one = f"<object><name>square</name><bndbox>{corners}</bndbox></object>"
    return f"<annotation><filename>{number}.png</filename>{one}</annotation>"


def as_voc(root: Path) -> Path:
    (root / "Annotations").mkdir(parents=True)
    for number, box in enumerate(images(root / "JPEGImages")):
        (root / "Annotations" / f"{number}.xml").write_text(xml_of(number, box))
    return root


@pytest.mark.parametrize("make", [as_rows, as_coco, as_voc])
def test_every_layout_holds_the_same_examples(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    table = DETECTION.read(make(tmp_path / "a"), DATA, {})
    by_rows = DETECTION.read(as_rows(tmp_path / "b"), DATA, {})
    assert DETECTION.keys(table.train) == DETECTION.keys(by_rows.train)
    assert DETECTION.local_info(table.train, DATA, {}) == FACTS


def test_train_and_test_folders_of_coco_are_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        boxes = images(tmp_path / split, count)
        (tmp_path / split / "_annotations_coco.json").write_text(json.dumps(coco_of(boxes)))
    table = DETECTION.read(tmp_path, DATA, {})
    assert table.test is not None
    assert (len(table.train), len(table.test)) == (3, 2)


def test_an_image_without_boxes_and_a_crowd(tmp_path: Path) -> None:
    written = coco_of(images(tmp_path / "d"))
    written["annotations"][0]["iscrowd"] = 1
    (tmp_path / "d" / "annotations.json").write_text(json.dumps(written))
    table = DETECTION.read(tmp_path / "d", DATA, {})
    assert sorted(map(len, table.train["boxes"][:])) == [0, 1, 1]
    assert "crowds" in table.notes[0]
    crowds = {"crowds, without a box of their own": 1}
    assert table.counts == (Counts("examples", 3, 3), Counts("annotations", 3, 2, crowds))


def test_the_images_of_a_split_that_is_not_used_are_counted(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        boxes = images(tmp_path / split, count)
        (tmp_path / split / "_annotations_coco.json").write_text(json.dumps(coco_of(boxes)))
    table = DETECTION.read(tmp_path, DATA, {})
    assert table.counts[0] == Counts("examples", 5, 3, {"of other splits than train and test": 2})


def test_what_is_written_is_read_back_with_the_same_keys(tmp_path: Path) -> None:
    table = DETECTION.read(as_coco(tmp_path / "d"), DATA, {})
    DETECTION.write(table.train, tmp_path / "out", DATA)
    again = DETECTION.read(tmp_path / "out", DATA, {})
    assert DETECTION.keys(again.train) == DETECTION.keys(table.train)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"boxes": [[5, 5, 5, 9]], "classes": ["a"]}, "is empty, expected x1 < x2"),
        ({"boxes": [[5, 5, 60, 9]], "classes": ["a"]}, "outside the image, expected it within 48 x 48"),
        ({"boxes": [[-4, 5, 6, 9]], "classes": ["a"]}, "outside the image"),
        ({"boxes": [[1, 2, 3]], "classes": ["a"]}, "a box of 3 numbers, expected"),
        ({"boxes": [[1, 2, 3, 4]], "classes": []}, "1 boxes and 0 classes, expected a class a box"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    images(tmp_path)
    good = {"image": "1.png", "boxes": [[1, 2, 3, 4]], "classes": ["a"]}
    lines = [good, {"image": "0.png"} | row]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=said) as told:
        DETECTION.read(tmp_path, DATA, {})
    assert "line 2" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("categories"), "expected COCO's images, annotations, categories"),
        (lambda w: w["annotations"][1].update(category_id=9), "annotation 1: 9, expected image_id"),
        (lambda w: w["annotations"][1].update(bbox=[1, 2]), "annotation 1: .*expected .*bbox of 4 numbers"),
        (lambda w: w["annotations"][1].update(bbox=[1, 2, 0, 5]), "is empty, expected x1 < x2"),
    ],
)
def test_bad_coco_is_one_line(tmp_path: Path, change: Callable[[Any], object], said: str) -> None:
    written = coco_of(images(tmp_path / "d"))
    change(written)
    (tmp_path / "d" / "annotations.json").write_text(json.dumps(written))
    with pytest.raises(DataError, match=said):
        DETECTION.read(tmp_path / "d", DATA, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>", "expected VOC XML"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><annotation/>", "declares entities"),
        ("<annotation/>", "no filename, expected the image's"),
    ],
)
def test_bad_voc_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    root = as_voc(tmp_path / "d")
    (root / "Annotations" / "1.xml").write_text(text)
    with pytest.raises(DataError, match=said):
        DETECTION.read(root, DATA, {})


def test_boxes_are_scaled_with_the_picture() -> None:
    data, box = scene(0)
    _, shard = prepared(job(), [(data, box)])
    # 64 / 48 of the square's own pixels.
    assert shard.targets_of([0])[0, 0].tolist() == pytest.approx([*(v * 64 / 48 for v in box), 0])


def job(method: str = "full", name: str = "ssdlite320_mobilenet_v3_large", **tables: object) -> Job:
    table: dict[str, object] = {
        "name": "small",
        "seed": 5,
        "task": {"name": "object-detection"},
        "data": {"source": "./here"},
        "backbone": {"name": f"torchvision:{name}", "weights": "random", "image_size": 64},
        "tune": {"method": method},
        "train": {"lr": 0.0003, "batch_size": 4, "optimizer": "adam"},
    }
    return Job.parse(table | tables, origin="test")


def prepared(asked: Job, pairs: list[tuple[bytes, list[float]]] | None = None) -> tuple[Learner, Shard]:
    pairs = pairs or [scene(n) for n in range(6)]
    table = pa.table(
        {
            "image": [{"bytes": image, "path": None} for image, _ in pairs],
            "boxes": [[box] for _, box in pairs],
            "classes": [["square"] for _ in pairs],
        }
    )
    keys = [hashlib.sha256(image).digest() for image, _ in pairs]
    learner = Learner.of(asked, task_named("object-detection"), FACTS)
    return learner, learner.task.shard(Dataset(table), FACTS, keys)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
@pytest.mark.parametrize("method", ["head", "last-k", "lora", "full"])
def test_every_way_of_tuning_moves_the_head(method: str, name: str) -> None:
    learner, shard = prepared(job(method, name))
    before = learner.initial()
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    place = "head" if name.startswith("ssd") else "roi_heads.box_predictor"
    in_head = {f"backbone.model.{place}.{n}" for n, _ in learner.model.head.named_parameters()}
    assert in_head <= set(update.delta)
    assert (set(update.delta) == in_head) == (method == "head")
    assert all(torch.isfinite(t).all() for t in update.delta.values())
    assert any(update.delta[n].any() for n in in_head)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_what_is_measured_over_clients_is_that_of_all_data_and_a_rerun_the_same_bits(name: str) -> None:
    learner, shard = prepared(job(name=name))
    tensors = learner.initial()
    parts = [shard.select([0, 3, 4]), shard.select([1, 2, 5])]
    over_clients = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    together = learner.compute(learner.evaluate(tensors, shard))
    assert {m: over_clients[m] for m in ("map", "map50")} == {m: together[m] for m in ("map", "map50")}
    assert over_clients["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert learner.compute(learner.evaluate(tensors, shard)) == together


def test_training_lowers_the_loss_of_the_untrained_detector() -> None:
    many = {"lr": 0.0003, "batch_size": 3, "optimizer": "adam", "epochs": 8}
    learner, shard = prepared(job(train=many))
    before = learner.initial()
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    after = {name: before[name] + delta for name, delta in update.delta.items()}
    untrained, trained = (learner.compute(learner.evaluate(t, shard)) for t in (before, after))
    assert trained["loss"] < 0.8 * untrained["loss"], (untrained, trained)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("fasterrcnn_resnet50_fpn", 800),  # the shorter side of its published weights' pictures
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 320),
        ("ssd300_vgg16", 300),
        ("ssdlite320_mobilenet_v3_large", 320),
    ],
)
def test_without_a_size_pictures_are_as_large_as_the_networks_own(name: str, own: int) -> None:
    asked = job(backbone={"name": f"torchvision:{name}", "weights": "random"})
    data, box = scene(0)
    learner, shard = prepared(asked, [(data, box)])
    assert shard.targets_of([0])[0, 0].tolist() == pytest.approx([*(v * own / 48 for v in box), 0], rel=1e-6)
    assert f"{own} x {own}, the network's own size" in learner.task.inputs_description


def test_a_size_that_a_network_makes_nothing_of_is_refused_by_name() -> None:
    asked = job(backbone={"name": "torchvision:ssd300_vgg16", "weights": "random", "image_size": 128})
    with pytest.raises(ConfigError, match=r"backbone\.image_size: .* 128 x 128, .*\(its own is 300\)"):
        _ = prepared(asked)[0].model


def test_example_level_privacy_is_refused_by_name() -> None:
    private = {
        "unit": "example", "where": "client", "epsilon": 5.0, "delta": 1e-5, "clipping_norm": 1.0,
        "sampling_rate": 0.5, "steps": 1,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="object-detection has no example-level privacy"):
        DETECTION.check(job(privacy=private))


def test_a_backbone_of_another_kind_is_refused() -> None:
    learner, _ = prepared(job(name="resnet18"))
    with pytest.raises(
        WeightsError, match="is no detection model, expected one of atoll:small-detector, torch"
    ):
        _ = learner.model


def test_of_a_picture_with_more_boxes_than_the_job_allows_the_first_are_used() -> None:
    """What a greeting tells is then the job's own number, whatever the pictures have."""
    boxes = [[[float(i), 0.0, float(i + 4), 4.0] for i in range(count)] for count in (3, 1)]
    table = pa.table(
        {
            "image": pa.array([{"bytes": scene(i)[0], "path": None} for i in range(2)]),
            "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float64()))),
            "classes": pa.array([["square"] * len(one) for one in boxes]),
        }
    )
    options = {"max_boxes": 2}
    told = DETECTION.local_info(Dataset(table), DATA, options)
    assert told == {"classes": ["square"], "most": 2}
    task = Learner.of(job(task={"name": "object-detection", "options": options}), DETECTION, told).task
    shard = task.shard(Dataset(table), told)
    assert shard.table.shape == (2, 2, 5)
    assert sorted((shard.table[:, :, 4] >= 0).sum(1).tolist()) == [1, 2]
    with pytest.raises(ConfigError, match=r"task\.options: max_boxes: expected greater than or equal to 1"):
        DETECTION.check(job(task={"name": "object-detection", "options": {"max_boxes": 0}}))
