"""Which examples a client keeps back to measure on: each example decides for itself, by a hash.

Guarantee: whether an example is kept back depends on the job's seed and on its own content (or on the name
of its patient or series), and on no other example. One example more or less therefore moves no other from
one side to the other, which is what example-level privacy needs. Only where examples are promised nothing
is a client helped that would have nothing to measure on, or nothing to learn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.job.job import DataSection, Job

Marks = NDArray[np.uint64]
"""A number for each example, drawn evenly by its hash; those that stay together have the same one."""


def validation_marks(names: Sequence[bytes], seed: int) -> Marks:
    """The number that decides for each example, [n]: a hash of its key, or of its group's name."""
    prefix = f"{seed}/validation/".encode()
    drawn = {name: hashlib.sha256(prefix + name).digest()[:8] for name in set(names)}
    return np.frombuffer(b"".join(drawn[name] for name in names), dtype=">u8").astype(np.uint64)


def helps_clients(job: Job) -> bool:
    """Whether a client may be given examples to measure on by looking at all that it has."""
    return "example" not in job.privacy.units


def kept_back(marks: Marks, data: DataSection, *, helped: bool) -> NDArray[np.bool_]:
    """Whether each of a client's examples is measured on, [n]: by the fraction, or in the job's fold."""
    if data.folds is None:
        return by_fraction(marks, data.validation_fraction, helped=helped)
    measured = np.zeros(len(marks), dtype=bool)
    measured[np.argsort(marks, kind="stable")[fold_of(len(marks), data)]] = True
    return measured


def by_fraction(marks: Marks, fraction: float, *, helped: bool) -> NDArray[np.bool_]:
    """Whether each example's number is below the fraction, [n].

    A client that is `helped` has at least one mark on each side, the lowest and the highest; where all
    examples have one mark they are trained on. From 1 on `fraction` is a count: so many examples have the
    lowest numbers, and whoever has one of these numbers too. Only a client that is `helped` may count.
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
    """Which places of so many examples, in the order of their marks, are the job's fold.

    A single example is in no fold: it is trained on.
    """
    assert data.folds is not None
    if examples == 1:
        return slice(0, 0)
    return slice(examples * data.fold // data.folds, examples * (data.fold + 1) // data.folds)


def expected_training_examples(sizes: NDArray[np.int64], data: DataSection) -> NDArray[np.float64]:
    """How many examples clients of these sizes train on: exactly in folds, else as many as are expected."""
    whole = sizes.astype(np.float64)
    if data.folds is None and data.validation_fraction >= 1:
        least: NDArray[np.float64] = np.maximum(whole - data.validation_fraction, np.minimum(whole, 1))
        return least
    if data.folds is None:
        return whole * (1 - data.validation_fraction)
    folds = (fold_of(size, data) for size in sizes.tolist())
    return whole - np.array([fold.stop - fold.start for fold in folds], dtype=np.float64)
