"""What clients keep back: each example decides alone, in sites and simulations."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.learning.split import split_shard
from atoll.protocol.validation_split import by_fraction, expected_training_examples, validation_marks
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from atoll.tasks.forecasting.task import FORECASTING
from atoll.tasks.medical.task import MEDICAL_IMAGING
from tests.support.small import grey_png_shard, image_job

EXAMPLES = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2}


def names(count: int) -> list[bytes]:
    return [hashlib.sha256(str(n).encode()).digest() for n in range(count)]


def learner_of(**tables: Any) -> Learner:
    job = image_job("squeezenet1_1", **tables)
    return Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})


def parts_of(learner: Learner, shard: Shard) -> tuple[Shard, Shard]:
    return split_shard(learner.job, learner.task, shard)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_about_the_fraction_is_kept_back(fraction: float) -> None:
    """Of 20,000, to five deviations."""
    kept = by_fraction(validation_marks(names(20_000), 3), fraction, helped=False)
    assert abs(float(kept.mean()) - fraction) <= 5 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_seeds_keep_others_back() -> None:
    one, other = (by_fraction(validation_marks(names(500), seed), 0.5, helped=False) for seed in (1, 2))
    assert 0.3 < float((one == other).mean()) < 0.7


def shares(count: int, kind: str) -> tuple[Any, Shard]:
    """A task, and a shard of its examples with groups as the task has them."""
    plain = grey_png_shard(count, classes=3)
    if kind == "patients":
        return MEDICAL_IMAGING, Shard(
            plain.inputs, plain.targets, plain.keys, tuple(f"p{i % 9}" for i in range(count))
        )
    groups = tuple(f"2024-01-{1 + i:02}/2024-01-{3 + i:02}/s{i % 7}" for i in range(count))
    return FORECASTING, Shard(plain.inputs, plain.targets, plain.keys, groups)


@pytest.mark.parametrize("kind", ["content", "patients", "series"])
def test_under_a_promise_one_example_less_changes_no_other_ones_side(kind: str) -> None:
    task, shard = shares(28, kind)
    learner = learner_of(privacy=EXAMPLES, data={"source": "digits", "validation_fraction": 0.3})

    def validation_keys(part: Shard) -> set[bytes]:
        if kind == "content":
            return {*parts_of(learner, part)[1].keys}
        train, validation = task.split(part, 5, 0.3, helped=False)
        assert sorted([*train, *validation]) == list(range(len(part)))
        return {part.keys[row] for row in validation}

    whole = validation_keys(shard)
    assert 0 < len(whole) < len(shard)
    for row in range(len(shard)):
        less = shard.select([r for r in range(len(shard)) if r != row])
        assert validation_keys(less) == whole - {shard.keys[row]}


def test_patients_and_series_stay_together() -> None:
    for kind in ("patients", "series"):
        task, shard = shares(28, kind)
        train, kept = task.split(shard, 5, 0.3)
        whose = [group.split("/")[-1] for group in shard.groups]
        assert train and kept and not {whose[row] for row in train} & {whose[row] for row in kept}


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_without_a_promise_a_client_has_some_to_learn_from_and_some_to_measure_on(fraction: float) -> None:
    data = {"source": "digits", "validation_fraction": fraction}
    for count in (2, 3, 8):
        shard = grey_png_shard(count, classes=3)
        train, kept = parts_of(learner_of(data=data), shard)
        assert len(train) and len(kept) and sorted([*train.keys, *kept.keys]) == sorted(shard.keys)
        lonely, none = parts_of(learner_of(data=data), shard.select([0, 0]))
        assert len(lonely) == 2 and not len(none)  # equals stay together
    marks = validation_marks(names(5), 3)
    lowest = by_fraction(marks, 1e-9, helped=True)
    assert np.flatnonzero(lowest).tolist() == [int(marks.argmin())]
    assert not by_fraction(marks, 1e-9, helped=False).any()


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (3, 3), (7, 7), (8, 7), (100, 7)])
def test_a_whole_number_is_how_many_are_kept_back(count: int, kept: int) -> None:
    """Those with the lowest hashes, and never all: one of eight stays to train on."""
    data = {"source": "digits", "validation_fraction": count}
    shard = grey_png_shard(8, classes=3)
    train, back = parts_of(learner_of(data=data), shard)
    lowest = sorted(shard.keys, key=lambda key: int(validation_marks([key], 5)[0]))
    assert set(back.keys) == set(lowest[:kept]) and set(train.keys) == set(lowest[kept:])
    section = DataSection(source="digits", validation_fraction=count)
    assert expected_training_examples(np.array([8]), section).tolist() == [8 - kept]


def test_whole_patients_are_kept_back_by_a_count_and_a_lonely_series_by_its_last_windows() -> None:
    task, shard = shares(28, "patients")
    _, kept = task.split(shard, 5, 4)
    assert 4 <= len(kept) <= 7 and len({shard.groups[row] for row in kept}) <= 2
    task, shard = shares(20, "series")
    one = Shard(shard.inputs, shard.targets, shard.keys, tuple(g[:-2] + "s0" for g in shard.groups))
    assert task.split(one, 5, 2) == (list(range(16)), [18, 19])


def test_the_last_part_of_numbered_days_goes_by_their_numbers() -> None:
    """9 is before 10, though not as text."""
    shard = shares(20, "series")[1]
    days = Shard(shard.inputs, shard.targets, shard.keys, tuple(f"{n}/{n + 2}/s" for n in range(20)))
    assert FORECASTING.split(days, 5, 0.2) == (list(range(14)), [16, 17, 18, 19])


@pytest.mark.parametrize(
    ("fraction", "more", "said"),
    [
        (1.5, {}, "expected a fraction below 1, or how many examples, found 1.5"),
        (-1, {}, "validation_fraction"),
        (3, {"privacy": EXAMPLES}, "expected a fraction below 1 under example-level privacy, found 3"),
    ],
)
def test_a_count_is_whole_and_not_of_examples_that_are_promised_privacy(
    fraction: float, more: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        learner_of(data={"source": "digits", "validation_fraction": fraction}, **more)


def test_a_lonely_series_is_measured_on_in_the_last_part_of_its_time() -> None:
    task, shard = shares(20, "series")
    one = Shard(shard.inputs, shard.targets, shard.keys, tuple(g[:-2] + "s0" for g in shard.groups))
    train, kept = task.split(one, 5, 0.2)
    assert kept == [16, 17, 18, 19] and train == list(range(14))  # windows 14 and 15 reach into what is kept
    alone = task.split(one, 5, 0.2, helped=False)
    assert [] in alone


@pytest.mark.parametrize(
    ("privacy", "fraction"),
    [*itertools.product([{"unit": "none"}, EXAMPLES], [0.0, 0.1, 0.4]), ({"unit": "none"}, 3)],
)
def test_a_simulation_splits_as_a_site_does(fraction: float, privacy: Any) -> None:
    table = {
        "name": "split", "seed": 3, "task": {"name": "image-classification"},
        "data": {"source": "digits", "validation_fraction": fraction,
                 "partition": {"kind": "iid"}},
        "backbone": {"name": "raw:pixels", "image_size": 8}, "federation": {"clients": 205, "rounds": 1},
        "privacy": privacy,
    }  # fmt: skip
    job = Job.parse(table, origin="test")
    population = Population.of(job)
    learner = Learner.of(job, task_named(job.task.name), population.roster(job).data_info[0])
    index = PopulationIndex(population, learner)
    sizes = []
    for number, (train, kept) in enumerate(index.splits(range(40))):
        shard = learner.task.shard(population.dataset(job, f"client-{number:04d}"), learner.data_info)
        mine, back = parts_of(learner, shard)
        assert mine.keys == index.full_population.select(train.tolist()).keys
        assert back.keys == index.full_population.select(kept.tolist()).keys
        sizes.append(len(kept))
    # Of 7 examples at a rate of 0.1 a client keeps none back with probability 0.48.
    if privacy is not EXAMPLES:
        assert (min(sizes) > 0) == (fraction > 0)
    elif fraction == 0.1:
        assert min(sizes) == 0


def test_simulated_devices_train_as_many_as_are_expected() -> None:
    sizes = np.array([10, 25])
    assert expected_training_examples(sizes, DataSection(source="x")).tolist() == [9.0, 22.5]
    folded = DataSection(source="x", folds=4, fold=3)
    assert expected_training_examples(sizes, folded).tolist() == [7.0, 18.0]  # 10 - 3, 25 - 7


def test_a_client_of_equals_is_trained_on() -> None:
    shard = grey_png_shard(3, classes=3)
    kept = by_fraction(validation_marks([shard.keys[0]] * 4, 5), 0.999999, helped=True)
    assert not kept.any() and torch.is_tensor(shard.targets)
