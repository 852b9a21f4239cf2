"""COCO's average precision of boxes, from counts that add up over clients.

COCO ranks all detections by score, which no single client can do. Here scores are rounded to multiples of
1 / `bins`, and each client counts its detections at each of them. Matching is COCO's and uses unrounded
scores, since it is done for each image separately.

Lin et al. 2014, "Microsoft COCO: Common Objects in Context"; pycocotools' COCOeval is the definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
_RECALLS = np.linspace(0, 1, 101)
_MOST_DETECTIONS = 100

Floats = NDArray[np.float64]


class BoxAveragePrecision(Metric):
    """Mean over classes and IoU thresholds of the 101-point interpolated average precision.

    As in COCOeval for areas of all sizes, without crowds, and with the 100 best detections of each class in
    each image. Equal to COCOeval's value if no two detections of a class have the same rounded score.
    Otherwise never above it: detections with the same score count as one step of the curve.

    Classes without a true box are left out; undefined (NaN) if there is no true box.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    matched: torch.Tensor
    detected: torch.Tensor
    truths: torch.Tensor

    def __init__(
        self, classes: int, *, thresholds: Sequence[float] = COCO_THRESHOLDS, bins: int = 1000
    ) -> None:
        super().__init__()
        self.thresholds = tuple(thresholds)
        self.bins = bins
        shape = (len(self.thresholds), classes, bins + 1)
        self.add_state("matched", torch.zeros(shape, dtype=torch.int32), dist_reduce_fx="sum")
        self.add_state("detected", torch.zeros(shape[1:], dtype=torch.int32), dist_reduce_fx="sum")
        self.add_state("truths", torch.zeros(classes, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Mapping[str, torch.Tensor]], targets: torch.Tensor) -> None:
        """Count one prediction per image: boxes [k, 4] as x1, y1, x2, y2; scores [k] in 0..1; labels [k].

        `targets` is [images, most, 5]: x1, y1, x2, y2, class; rows of class -1 are padding.

        Raises:
            ValueError: a score is below 0 or above 1, or a class is out of range.
        """
        for prediction, rows in zip(predictions, targets, strict=True):
            scores = prediction["scores"].detach().to("cpu", torch.float64)
            if len(scores) and not (float(scores.min()) >= 0 and float(scores.max()) <= 1):
                raise ValueError(
                    f"scores from {float(scores.min())} to {float(scores.max())}, expected 0 to 1"
                )
            truth = rows[rows[:, 4] >= 0].detach().to("cpu", torch.float64).numpy()
            boxes = prediction["boxes"].detach().to("cpu", torch.float64).numpy()
            self._count(boxes, scores.numpy(), prediction["labels"].detach().cpu().numpy(), truth)

    def compute(self) -> torch.Tensor:
        matched, detected = (t.cpu().numpy().astype(np.int64) for t in (self.matched, self.detected))
        truths = self.truths.cpu().numpy()
        present = [c for c in range(len(truths)) if truths[c]]
        values = [
            average_precision(matched[threshold, c], detected[c], int(truths[c]))
            for threshold in range(len(self.thresholds))
            for c in present
        ]
        return torch.tensor(float(np.mean(values)) if values else np.nan, dtype=torch.float64)

    def _count(self, boxes: Floats, scores: Floats, labels: NDArray[np.int64], truth: Floats) -> None:
        for c in {*labels.tolist(), *truth[:, 4].astype(int).tolist()}:
            if not 0 <= c < len(self.truths):
                raise ValueError(f"class {c}, expected 0 to {len(self.truths) - 1}")
            of_class = np.flatnonzero(labels == c)
            best = of_class[np.argsort(-scores[of_class], kind="stable")][:_MOST_DETECTIONS]
            real = truth[truth[:, 4] == c, :4]
            at = torch.from_numpy(np.rint(scores[best] * self.bins).astype(np.int64)).to(self.detected.device)
            hits = torch.from_numpy(greedy_matches(boxes[best], real, self.thresholds)).to(self.matched)
            self.truths[c] += len(real)
            self.detected[c].index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
            self.matched[:, c].index_add_(1, at, hits)


def average_precision(matched: NDArray[np.int64], detected: NDArray[np.int64], truths: int) -> float:
    """The mean of the interpolated precision at 101 recalls, from counts by score in ascending order.

    `matched` and `detected` are [scores]; `truths` is the number of true boxes.

    >>> average_precision(np.array([0, 1]), np.array([1, 1]), 1)
    1.0
    """
    true_positives = np.cumsum(matched[::-1])
    shown = np.cumsum(detected[::-1])
    true_positives, shown = true_positives[shown > 0], shown[shown > 0]
    # The best precision at this recall or a higher one.
    precision = np.maximum.accumulate((true_positives / shown)[::-1])[::-1]
    place = np.searchsorted(true_positives / truths, _RECALLS, side="left")
    reached = place < len(precision)
    return float(precision[place[reached]].sum() / len(_RECALLS))


def greedy_matches(boxes: Floats, truth: Floats, thresholds: Sequence[float]) -> NDArray[np.bool_]:
    """Whether each box matches a true box that no better box has matched, [thresholds, boxes].

    `boxes` must be sorted by descending score; `truth` are the true boxes, both [k, 4].
    """
    hits = np.zeros((len(thresholds), len(boxes)), dtype=np.bool_)
    if not len(truth):
        return hits
    least = np.minimum(np.asarray(thresholds, dtype=np.float64), 1 - 1e-10)
    free = np.ones((len(thresholds), len(truth)), dtype=np.bool_)
    every = np.arange(len(thresholds))
    for column, overlap in enumerate(overlaps(boxes, truth)):
        open_to = np.where(free, overlap, -1.0)
        # Of equal overlaps COCO takes the last one.
        pick = len(truth) - 1 - np.argmax(open_to[:, ::-1], axis=1)
        hits[:, column] = open_to[every, pick] >= least
        free[every, pick] &= ~hits[:, column]
    return hits


def overlaps(left: Floats, right: Floats) -> Floats:
    """The intersection over union of each box of `left` with each of `right`; 0 if one is empty."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (left, right)]
    union = areas[0][:, None] + areas[1][None, :] - both
    shares: Floats = np.divide(both, union, out=np.zeros_like(both), where=both > 0)
    return shares
