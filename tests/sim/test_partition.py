"""Dealing a source to clients: every example once, the rule that was asked for, files' order no matter."""

import csv
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
)

from atoll.data.classification import example_keys
from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.learning.learner import ranked
from atoll.protocol.random_streams import stream_seed
from atoll.sim.population.assignment import FixedAssignment, SampledAssignment, dirichlet
from atoll.sim.population.partition import check_all_dealt
from atoll.sim.population.population import Population, client_names, number_of
from atoll.sim.population.skew import dirichlet_partition


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
    return Population.of(job_of(texts(tmp_path / f"{order}.csv", order), partition, clients, **data))


def job_of(source: Path, partition: dict[str, Any], clients: int, **data: Any) -> Job:
    table = {
        "name": "p",
        "seed": 3,
        "task": {"name": "text-classification"},
        "data": {"source": str(source), "partition": partition, **data},
        "backbone": {"name": "hf:x"},
        "federation": {"clients": clients},
    }
    return Job.parse(table, origin="test")


def rows_by_client(found: Population) -> list[list[int]]:
    """The rows of every client."""
    return [rows.tolist() for rows in found.assignment.rows(range(len(found.assignment.sizes)))]


SEED = stream_seed(3, "partition")
"""What the job's partition draws from."""

RULES: list[dict[str, Any]] = [
    {"kind": "iid"},
    {"kind": "dirichlet", "alpha": 0.5},
    {"kind": "pathological", "classes_per_client": 2},
    {"kind": "natural", "by": "hospital"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["kind"])
def test_every_training_example_goes_to_exactly_one_client(tmp_path: Path, rule: dict[str, Any]) -> None:
    found = population(tmp_path, rule)
    assert sorted(row for rows in rows_by_client(found) for row in rows) == list(range(len(found.train)))
    assert len(found.train) + len(found.test) == 300


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["kind"])
def test_the_order_of_rows_in_the_file_changes_no_shard(tmp_path: Path, rule: dict[str, Any]) -> None:
    a, b = (population(tmp_path, rule, order=order) for order in (0, 1))
    for rows_a, rows_b in zip(rows_by_client(a), rows_by_client(b), strict=True):
        assert sorted(a.keys[r] for r in rows_a) == sorted(b.keys[r] for r in rows_b)
    assert sorted(example_keys(a.test)) == sorted(example_keys(b.test))


def test_equal_examples_are_never_on_both_sides_of_the_test_split(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "iid"})
    assert not set(found.keys) & set(example_keys(found.test))
    assert abs(len(found.test) - 60) <= 2


def test_iid_clients_are_of_one_size_and_mixed(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "iid"})
    labels = found.train["label"]
    sizes = [len(rows) for rows in rows_by_client(found)]
    assert max(sizes) - min(sizes) <= 1
    assert all(min(Counter(labels[r] for r in rows).values()) >= 4 for rows in rows_by_client(found))


def test_a_pathological_client_has_its_number_of_classes(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "pathological", "classes_per_client": 1})
    labels = found.train["label"]
    assert all(len({labels[r] for r in rows}) == 1 for rows in rows_by_client(found))


def test_a_natural_client_is_one_value_of_the_column(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "natural", "by": "hospital"})
    hospitals = found.train["hospital"]
    assert [{hospitals[r] for r in rows} for rows in rows_by_client(found)] == [{f"h{i}"} for i in range(6)]


def test_a_smaller_alpha_skews_labels_more(tmp_path: Path) -> None:
    def skew(alpha: float) -> float:
        found = population(tmp_path, {"kind": "dirichlet", "alpha": alpha, "min_examples": 1})
        labels = found.train["label"]
        most = [max(Counter(labels[r] for r in rows).values()) / len(rows) for rows in rows_by_client(found)]
        return sum(most) / len(most)

    assert skew(0.1) > skew(100.0) + 0.2


@pytest.mark.parametrize(
    ("rule", "clients", "pattern"),
    [
        ({"kind": "natural", "by": "hospital"}, 5, "column 'hospital' has 6 values, found clients = 5"),
        ({"kind": "resampled", "examples": 500}, 6, "expected at most the 2[0-9][0-9] training examples"),
        ({"kind": "iid"}, 400, "400 clients cannot share 2[0-9][0-9] training examples, set fewer"),
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


@pytest.mark.parametrize(
    ("rule", "clients", "theirs"),
    [
        ({"kind": "iid"}, 7, IidPartitioner(7)),
        ({"kind": "natural", "by": "hospital"}, 6, NaturalIdPartitioner("hospital")),
        (
            {"kind": "dirichlet", "alpha": 0.5},
            6,
            DirichletPartitioner(6, "label", 0.5, min_partition_size=2, seed=SEED),
        ),
        (
            {"kind": "dirichlet", "alpha": 1.0, "min_examples": 16, "by": "hospital"},
            9,
            DirichletPartitioner(9, "hospital", 1.0, min_partition_size=16, seed=SEED),
        ),
        (
            {"kind": "pathological", "classes_per_client": 2},
            6,
            PathologicalPartitioner(6, "label", 2, seed=SEED),
        ),
    ],
    ids=["iid", "natural", "dirichlet", "dirichlet-again-and-again", "pathological"],
)
@pytest.mark.filterwarnings("ignore:The specified min_partition_size")  # they say so of every new attempt
def test_clients_hold_what_flwr_datasets_gives_them(
    tmp_path: Path, rule: dict[str, Any], clients: int, theirs: Any
) -> None:
    found = population(tmp_path, rule, clients)
    order = ranked(found.keys, 3, "partition")
    theirs.dataset = datasets.Dataset.from_dict({**found.train.select(order)[:], "row": order})
    assert rows_by_client(found) == [theirs.load_partition(i)["row"][:] for i in range(clients)]


def test_a_natural_column_with_gaps_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "0.csv").open("w", newline="") as file:
        rows = [(f"text {i}", "ab"[i % 2], "" if i == 3 else f"h{i % 2}") for i in range(20)]
        csv.writer(file).writerows([("text", "label", "hospital"), *rows])
    table = {
        "name": "p", "seed": 3, "task": {"name": "text-classification"}, "backbone": {"name": "hf:x"},
        "data": {"source": str(tmp_path / "0.csv"), "partition": {"kind": "natural", "by": "hospital"},
                 "test_fraction": 0.0},
        "federation": {"clients": 2},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="column 'hospital'"):
        Population.of(Job.parse(table, origin="test"))


def drawn(
    clients: int, examples: int, alpha: float | None, counts: list[int], seed: int = 1
) -> SampledAssignment:
    return SampledAssignment(np.arange(sum(counts)), np.array(counts), clients, examples, alpha, seed)


def test_a_drawn_client_is_the_same_whoever_it_is_asked_for_with() -> None:
    for alpha in (None, 0.3):
        assignment = drawn(1_000_000, 20, alpha, [500, 300, 200])
        together = assignment.rows(range(990, 1300))
        for i in (990, 1299):
            assert assignment.rows([i])[0].tolist() == together[i - 990].tolist()


@pytest.mark.parametrize("alpha", [None, 0.05, 10.0])
def test_a_drawn_client_holds_different_rows_and_as_many_as_asked(alpha: float | None) -> None:
    for rows in drawn(400, 20, alpha, [500, 300, 200]).rows(range(400)):
        assert len(set(rows.tolist())) == len(rows) == 20


def test_a_client_with_one_small_class_holds_what_there_is_of_it() -> None:
    sizes = [len(rows) for rows in drawn(300, 20, 1e-3, [5, 5]).rows(range(300))]
    assert min(sizes) >= 4 and max(sizes) <= 10


def test_without_alpha_every_row_is_drawn_as_often_as_another() -> None:
    assignment = drawn(20_000, 5, None, [7, 13])
    times = np.bincount(np.concatenate(assignment.rows(range(20_000))), minlength=20)
    # 100,000 draws over 20 rows: 5,000 each; a count's deviation is below sqrt(5,000) = 71.
    assert abs(times - 5_000).max() < 4 * 71


@pytest.mark.parametrize("alpha", [0.02, 0.3, 5.0])
def test_drawn_class_shares_have_the_moments_of_a_dirichlet(alpha: float) -> None:
    uniform = np.random.default_rng(0).random((40_000, 8))
    shares = dirichlet(uniform, alpha)
    # Mean 1 / 4; variance (1/4)(3/4) / (4 alpha + 1).
    variance = 0.1875 / (4 * alpha + 1)
    assert np.allclose(shares.sum(axis=1), 1.0)
    assert np.allclose(shares.mean(axis=0), 0.25, atol=4 * (variance / 40_000) ** 0.5)
    assert np.allclose(shares.var(axis=0), variance, rtol=0.05)


def test_many_clients_names_are_made_when_they_are_asked_for() -> None:
    names = client_names(1_000_000)
    assert (names[7], names[999_999], len(names)) == ("client-000007", "client-999999", 1_000_000)
    assert number_of(names[7]) == 7
    assert list(client_names(3)) == ["client-0000", "client-0001", "client-0002"]


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "natural", "by": "hospital"},
        {"kind": "dirichlet", "alpha": 1.0, "by": "hospital"},
        {"kind": "pathological", "classes_per_client": 2, "by": "hospital"},
        {"kind": "resampled", "examples": 4, "alpha": 1.0, "by": "hospital"},
    ],
    ids=lambda rule: str(rule["kind"]),
)
@pytest.mark.parametrize("missing", [None, math.nan, "", "  ", "nan"])
def test_a_row_without_a_key_is_refused_by_every_partition(
    tmp_path: Path, partition: dict[str, Any], missing: object
) -> None:
    hospitals = [float(i % 3) if isinstance(missing, float) else f"h{i % 3}" for i in range(60)]
    rows = [missing if i % 10 == 4 else name for i, name in enumerate(hospitals)]
    table = pa.table(
        {
            "text": [f"text {i}" for i in range(60)],
            "label": ["ab"[i % 2] for i in range(60)],
            "hospital": pa.array(rows, from_pandas=False),
        }
    )
    pq.write_table(table, tmp_path / "0.parquet")
    job = job_of(tmp_path / "0.parquet", partition, 3)
    with pytest.raises(ConfigError) as refused:
        Population.of(job)
    assert str(refused.value) == (
        "data.partition.by: column 'hospital' is empty in 6 of 60 rows (the first is row 5),"
        " expected a value in each"
    )


def test_a_value_is_one_client_however_it_is_written(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2], ("True", "true", "False", "false")[i % 4]) for i in range(40)]
    with (tmp_path / "0.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "urban"), *rows])
    found = Population.of(job_of(tmp_path / "0.csv", {"kind": "natural", "by": "urban"}, 2, test_fraction=0))
    assert found.assignment.sizes.tolist() == [20, 20]


def test_a_row_that_is_lost_in_dealing_stops_the_run() -> None:
    row_order = np.arange(10)
    check_all_dealt(FixedAssignment.of([row_order[:4], row_order[4:]]), row_order)
    for rows_by_client in ([row_order[:4], row_order[5:]], [row_order[:5], row_order[4:]]):
        with pytest.raises(JobError, match="expected each of the 10 once"):
            check_all_dealt(FixedAssignment.of(rows_by_client), row_order)


def test_examples_of_classes_that_nobody_holds_are_told(tmp_path: Path) -> None:
    found = population(tmp_path, {"kind": "pathological", "classes_per_client": 1}, 1)
    assert "dealt to no client" in found.source_counts[-1].left_out


def test_a_dirichlet_that_cannot_be_met_says_what_would_do() -> None:
    """The alpha that it names can be met, and half of it can't; too few examples are told as such."""
    labels = [n % 3 for n in range(60)]
    with pytest.raises(
        ConfigError, match=r"^data\.partition\.alpha: with 0\.01 .* ([\d.]+) would do"
    ) as said:
        dirichlet_partition(labels, 5, 0.01, least=5, seed=SEED)
    named = float(str(said.value).split("draws; ")[1].split(" would")[0])
    assert sorted(
        place for rows in dirichlet_partition(labels, 5, named, least=5, seed=SEED) for place in rows
    ) == [*range(60)]
    with pytest.raises(ConfigError):
        dirichlet_partition(labels, 5, named / 2, least=5, seed=SEED)
    with pytest.raises(ConfigError, match=r"federation\.clients = 6 would do at best, or .*min_examples = 8"):
        dirichlet_partition(labels, 7, 1.0, least=10, seed=SEED)
