"""Average precision from counts equals pycocotools' where scores are on the grid, and is close elsewhere."""

import contextlib
import io
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from atoll.tasks.detection.metrics import BoxAveragePrecision, greedy_matches, overlaps
from tests.tasks.adding import split, value_of

CLASSES = 3
Predictions = list[dict[str, torch.Tensor]]


def some_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, 70, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(4, 40, (count, 2))], axis=1)


def scene(seed: int, *, images: int = 30, on_grid: bool) -> tuple[Predictions, torch.Tensor]:
    """True boxes; most of them detected more or less well, some twice; and detections of nothing."""
    rng = np.random.default_rng(seed)
    targets = np.full((images, 7, 5), -1.0)
    predictions = []
    # On the grid every detection has a score of its own.
    grid = rng.permutation(np.arange(1, 1000)) / 1000
    for rows in targets:
        count = rng.integers(0, 7)
        rows[:count] = np.column_stack([some_boxes(rng, count), rng.integers(0, CLASSES, count)])
        again = rows[rng.choice(count, 2 * count, replace=True)] if count else rows[:0]
        jittered = again[:, :4] + rng.normal(0, 1.5, (len(again), 4))
        # COCOeval ignores boxes turned inside out.
        jittered = np.sort(jittered.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        boxes = np.concatenate([jittered, some_boxes(rng, rng.integers(0, 6))])
        labels = np.concatenate([again[:, 4], rng.integers(0, CLASSES, len(boxes) - len(again))])
        labels = np.where(rng.random(len(labels)) < 0.9, labels, rng.integers(0, CLASSES, len(labels)))
        scores, grid = (grid[: len(boxes)], grid[len(boxes) :]) if on_grid else (rng.random(len(boxes)), grid)
        # The best scores go, by and large, to real boxes.
        order = np.argsort(np.arange(len(boxes)) + rng.normal(0, 2, len(boxes)))
        scores = np.sort(scores)[::-1][np.argsort(order)]
        predictions.append(
            {
                "boxes": torch.tensor(boxes).reshape(-1, 4),
                "scores": torch.tensor(scores),
                "labels": torch.tensor(labels).to(torch.int64),
            }
        )
    return predictions, torch.tensor(targets)


def wide(boxes: np.ndarray) -> list[list[float]]:
    """COCO's own form: x, y, width, height."""
    return np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()


def coco(predictions: Predictions, targets: torch.Tensor) -> tuple[float, float]:
    """mAP and mAP50 by COCOeval."""
    annotations: list[dict[str, Any]] = []
    results = []
    for image, (found, rows) in enumerate(zip(predictions, targets.numpy(), strict=True), start=1):
        real = rows[rows[:, 4] >= 0]
        for box, label in zip(wide(real[:, :4]), real[:, 4], strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
        for box, score, label in zip(
            wide(found["boxes"].numpy()), found["scores"].tolist(), found["labels"].tolist(), strict=True
        ):
            results.append({"image_id": image, "category_id": label + 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(predictions))],
            "annotations": annotations,
            "categories": [{"id": c + 1} for c in range(CLASSES)],
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


def ours(*parts: tuple[Predictions, torch.Tensor]) -> tuple[float, float]:
    return (
        value_of(lambda: BoxAveragePrecision(CLASSES), *parts),
        value_of(lambda: BoxAveragePrecision(CLASSES, thresholds=(0.5,)), *parts),
    )


@pytest.mark.parametrize("seed", range(6))
def test_it_is_cocos_where_every_score_is_on_the_grid(seed):
    drawn = scene(seed, on_grid=True)
    expected = coco(*drawn)
    assert 0.1 < expected[0] < expected[1] < 0.9
    assert ours(drawn) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_just_below_cocos_where_scores_fall_between(seed):
    drawn = scene(seed, images=60, on_grid=False)
    for found, expected in zip(ours(drawn), coco(*drawn), strict=True):
        assert expected - 0.005 <= found <= expected + 1e-9


def test_more_bins_come_closer():
    drawn = scene(8, images=60, on_grid=False)
    expected = coco(*drawn)[0]
    metrics = (partial(BoxAveragePrecision, CLASSES, bins=bins) for bins in (10, 100, 10**6))
    gaps = [expected - value_of(metric, drawn) for metric in metrics]
    assert gaps[0] > gaps[1] > gaps[2] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_clients_add_up_to_the_same_bits(seed):
    drawn = scene(seed, on_grid=False)
    assert ours(*split(drawn, seed)) == ours(drawn)


def test_only_the_hundred_best_of_a_class_in_an_image_count():
    rng = np.random.default_rng(1)
    nothing = some_boxes(rng, 120) + 1000
    truth = some_boxes(rng, 1)
    targets = torch.tensor(np.column_stack([truth, [0]])[None])
    for place, expected in ((99, 0.01), (100, 0.0)):
        boxes = np.insert(nothing, place, truth[0], axis=0)
        scores = torch.linspace(1, 0.1, len(boxes), dtype=torch.float64)
        found = [
            {
                "boxes": torch.tensor(boxes),
                "scores": scores,
                "labels": torch.zeros(len(boxes), dtype=torch.int64),
            }
        ]
        assert ours((found, targets))[1] == pytest.approx(expected, abs=1e-9)
        assert coco(found, targets)[1] == pytest.approx(expected, abs=1e-9)


def test_nothing_found_is_zero_and_nothing_to_find_undefined():
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    empty = torch.full((1, 2, 5), -1.0)
    full = torch.tensor([[[0.0, 0, 5, 5, 1], [-1, -1, -1, -1, -1]]])
    assert all(math.isnan(value) for value in ours(([none], empty)))
    assert ours(([none], full)) == (0, 0)


@pytest.mark.parametrize(("label", "score"), [(3, 0.5), (-1, 0.5), (0, 1.5)])
def test_classes_and_scores_out_of_range_are_refused(label, score):
    found = [
        {"boxes": torch.zeros(1, 4), "scores": torch.tensor([score]), "labels": torch.tensor([label])},
    ]
    with pytest.raises(ValueError, match="expected 0 to"):
        BoxAveragePrecision(CLASSES).update(found, torch.full((1, 1, 5), -1.0))


def test_overlaps_by_hand():
    # [0,0,2,2] and [1,1,3,3] share 1 of 4 + 4 - 1 = 7
    left = np.array([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    assert overlaps(left, np.array([[1.0, 1, 3, 3], [5, 5, 6, 6]])).tolist() == [[1 / 7, 0], [0, 0]]


def test_the_better_detection_takes_the_box_and_the_next_gets_none():
    truth = np.array([[0.0, 0, 10, 10]])
    boxes = np.array([[0.0, 0, 10, 8], [0.0, 0, 10, 10]])
    assert greedy_matches(boxes, truth, (0.5, 0.9)).tolist() == [[True, False], [False, True]]
