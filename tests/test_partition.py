"""Dealing a source to clients: every example once, the rule that was asked for, files' order no matter."""

import csv
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from protocol.job import Job
from sim.population import Population
from tasks.reading import example_keys


def texts(path: Path, order: int = 0) -> Path:
    """300 texts of three classes from six hospitals, some of them twice, in a given order."""
    rows = [(f"text {i % 280}", "abc"[(i % 280) % 3], f"h{(i % 280) % 6}") for i in range(300)]
    random.Random(order).shuffle(rows)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "hospital"), *rows])
    return path


def population(
    tmp_path: Path, partition: dict[str, Any], clients: int = 6, order: int = 0, **data: Any
) -> Population:
    source = texts(tmp_path / f"{order}.csv", order)
    table = {
        "name": "p",
        "seed": 3,
        "task": {"name": "text-classification"},
        "data": {"source": str(source), "partition": partition, **data},
        "backbone": {"name": "hf:x"},
        "federation": {"clients": clients},
    }
    return Population.of(Job.parse(table, origin="test"))


RULES: list[dict[str, Any]] = [
    {"kind": "iid"},
    {"kind": "dirichlet", "alpha": 0.5},
    {"kind": "pathological", "classes_per_client": 2},
    {"kind": "natural", "by": "hospital"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["kind"])
def test_every_training_example_goes_to_exactly_one_client(tmp_path: Path, rule: dict[str, Any]) -> None:
    found = population(tmp_path, rule)
    assert sorted(row for rows in found.rows for row in rows) == list(range(len(found.train)))
    assert len(found.train) + len(found.test) == 300


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["kind"])
def test_the_order_of_rows_in_the_file_changes_no_shard(tmp_path: Path, rule: dict[str, Any]) -> None:
    a, b = (population(tmp_path, rule, order=order) for order in (0, 1))
    for rows_a, rows_b in zip(a.rows, b.rows, strict=True):
        assert sorted(a.keys[r] for r in rows_a) == sorted(b.keys[r] for r in rows_b)
    assert sorted(example_keys(a.test)) == sorted(example_keys(b.test))


def test_equal_examples_are_never_on_both_sides_of_the_test_split(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "iid"})
    assert not set(found.keys) & set(example_keys(found.test))
    assert abs(len(found.test) - 60) <= 2


def test_iid_clients_are_of_one_size_and_mixed(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "iid"})
    labels = found.train["label"]
    sizes = [len(rows) for rows in found.rows]
    assert max(sizes) - min(sizes) <= 1
    assert all(min(Counter(labels[r] for r in rows).values()) >= 4 for rows in found.rows)


def test_a_pathological_client_has_its_number_of_classes(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "pathological", "classes_per_client": 1})
    labels = found.train["label"]
    assert all(len({labels[r] for r in rows}) == 1 for rows in found.rows)


def test_a_natural_client_is_one_value_of_the_column(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "natural", "by": "hospital"})
    hospitals = found.train["hospital"]
    assert [{hospitals[r] for r in rows} for rows in found.rows] == [{f"h{i}"} for i in range(6)]


def test_a_smaller_alpha_skews_labels_more(tmp_path: Path) -> None:
    def skew(alpha: float) -> float:
        found = population(tmp_path, {"kind": "dirichlet", "alpha": alpha, "min_examples": 1})
        labels = found.train["label"]
        most = [max(Counter(labels[r] for r in rows).values()) / len(rows) for rows in found.rows]
        return sum(most) / len(most)

    assert skew(0.1) > skew(100.0) + 0.2


@pytest.mark.parametrize(
    ("rule", "clients", "pattern"),
    [
        ({"kind": "natural", "by": "hospital"}, 5, "column 'hospital' has 6 values, found clients = 5"),
        ({"kind": "natural", "by": "town"}, 6, "no column 'town', found hospital, label, text"),
        ({"kind": "pathological", "classes_per_client": 9}, 6, "data.partition"),
        ({"kind": "dirichlet", "alpha": 0.001, "min_examples": 30}, 6, "data.partition"),
    ],
)
def test_a_partition_that_cannot_be_is_answered_in_one_line(
    tmp_path: Path, rule: dict[str, Any], clients: int, pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        population(tmp_path, rule, clients)
    assert "\n" not in str(caught.value)


def test_a_test_source_of_its_own_is_held_apart(tmp_path: Path) -> None:
    other = texts(tmp_path / "other.csv", 5)
    found = population(tmp_path, {"kind": "iid"}, test=str(other))
    assert (len(found.train), len(found.test)) == (300, 300)
