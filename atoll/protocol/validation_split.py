"""Splits a client's examples into a training and a validation part, by a hash of each example.

Guarantee: an example's side depends on the job's seed and its own content (or the name of its patient or
series), and on no other example. Adding or removing an example therefore moves no other to the other side, as
example-level privacy requires. Only where examples are promised nothing, a client whose one side would be
empty is helped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.job.job import DataSection, Job

Marks = NDArray[np.uint64]
"""A uniform number for each example, [n], from its hash; examples of one group have the same one."""


def validation_marks(names: Sequence[bytes], seed: int) -> Marks:
    """The mark that decides each example's side, [n]: a hash of its key, or of its group's name."""
    prefix = f"{seed}/validation/".encode()
    drawn = {name: hashlib.sha256(prefix + name).digest()[:8] for name in set(names)}
    return np.frombuffer(b"".join(drawn[name] for name in names), dtype=">u8").astype(np.uint64)


def helps_clients(job: Job) -> bool:
    """Whether a client's split may depend on all of its examples, so that neither side is empty."""
    return "example" not in job.privacy.units


def kept_back(marks: Marks, data: DataSection, *, helped: bool) -> NDArray[np.bool_]:
    """Whether each example is in the validation part, [n]: by the job's fraction, or by its fold."""
    if data.folds is None:
        return by_fraction(marks, data.validation_fraction, helped=helped)
    measured = np.zeros(len(marks), dtype=bool)
    measured[np.argsort(marks, kind="stable")[fold_of(len(marks), data)]] = True
    return measured


def by_fraction(marks: Marks, fraction: float, *, helped: bool) -> NDArray[np.bool_]:
    """Whether each example is in the validation part, [n]: whether its mark is below `fraction`.

    With `helped` the lowest mark is always in the validation part and the highest in the training part; if
    all examples have one mark, all are trained on. A `fraction` from 1 on is a number of examples, those with
    the lowest marks and others with the same marks; it needs `helped`.
    """
    measured: NDArray[np.bool_]
    if fraction >= 1 and len(marks):
        assert helped, "a count depends on all examples"
        measured = marks <= np.sort(marks)[min(int(fraction), len(marks)) - 1]
    else:
        measured = marks < np.uint64(int(fraction * 2.0**64))
    if not (helped and fraction and len(marks)):
        return measured
    lowest, highest = marks.min(), marks.max()
    if lowest == highest:
        return np.zeros_like(measured)
    evened: NDArray[np.bool_] = (measured | (marks == lowest)) & (marks != highest)
    return evened


def fold_of(examples: int, data: DataSection) -> slice:
    """The job's fold, as places among `examples` examples in the order of their marks.

    A single example is in no fold and is trained on.
    """
    assert data.folds is not None
    if examples == 1:
        return slice(0, 0)
    return slice(examples * data.fold // data.folds, examples * (data.fold + 1) // data.folds)


def expected_training_examples(sizes: NDArray[np.int64], data: DataSection) -> NDArray[np.float64]:
    """How many examples clients of these sizes train on, [clients]: exact with folds, else expected."""
    whole = sizes.astype(np.float64)
    if data.folds is None and data.validation_fraction >= 1:
        least: NDArray[np.float64] = np.maximum(whole - data.validation_fraction, np.minimum(whole, 1))
        return least
    if data.folds is None:
        return whole * (1 - data.validation_fraction)
    folds = (fold_of(size, data) for size in sizes.tolist())
    return whole - np.array([fold.stop - fold.start for fold in folds], dtype=np.float64)
