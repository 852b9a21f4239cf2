"""What is left out of somebody's data is counted by its reason, and what was read adds up."""

import csv
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.client.local_data import FolderShards
from atoll.client.site import Site
from atoll.data.diagnostics import Counts, counts_from_json, total
from atoll.errors import DataError, JobError
from atoll.job.job import DataSection, Job
from atoll.server.roster import ClientRoster
from atoll.sim.population.population import Population
from atoll.tasks import task_named

FEW = "with fewer than 4 rows"


def shop(path: Path) -> Path:
    """Twelve users of three shops, three of whom have done too little to be used, one of whom very much."""
    rows = [
        (f"u{user}", f"i{(user + step) % 5}", step, user % 3)
        for user in range(12)
        for step in range(3 if user < 3 else 60 if user == 3 else 6)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "time", "shop"), *rows])
    return path


def shop_job(source: Path, **more: Any) -> Job:
    table = {
        "name": "shop",
        "seed": 1,
        "task": {"name": "recommendation"},
        "data": {"source": str(source), "partition": {"kind": "natural", "by": "shop"}},
        "backbone": {"name": "atoll:sasrec", "weights": "random"},
        "tune": {"method": "full"},
        "federation": {"clients": 3, "rounds": 1},
    }
    return Job.parse(table | more, origin="test")


USERS = Counts("users", 12, 9, {FEW: 3})
ROWS = Counts("rows", 117, 100, {f"of users {FEW}": 9, "before the last 52 of their user": 8})


def test_counts_that_do_not_add_up_are_a_fault_of_the_program() -> None:
    with pytest.raises(JobError, match="don't add up: 300 users read, 275 used; left out: 24 of few rows"):
        Counts("users", 300, 275, {"of few rows": 24})


def test_counts_of_several_clients_are_summed_by_unit_and_reason() -> None:
    assert total([USERS, ROWS, Counts("users", 2, 1, {"others": 1})]) == (
        Counts("users", 14, 10, {FEW: 3, "others": 1}),
        ROWS,
    )


def test_users_with_too_few_rows_are_counted_by_check_and_in_a_simulation(tmp_path: Path) -> None:
    source = shop(tmp_path / "shop.csv")
    said = CliRunner().invoke(app, ["check", str(source), "--task", "recommendation"])
    assert "counts      12 users read, 9 used; left out: 3 with fewer than 4 rows" in said.stdout
    population, job = Population.of(shop_job(source)), shop_job(source)
    assert population.source_counts == (ROWS, USERS)
    told = population.roster(job).used_data(job, population.source_counts)
    assert told is not None and told["counts"] == [ROWS.as_json, USERS.as_json]
    assert sum(one["examples"] for one in told["clients"].values()) == USERS.used


def test_a_greeting_tells_what_is_left_out_unless_it_is_silent(tmp_path: Path) -> None:
    site = Site(FolderShards.of("north", [shop(tmp_path / "shop.csv")]), discreet=True)
    job = shop_job(Path("elsewhere"))
    [hello] = site.hello(job)
    roster = ClientRoster.of([hello])
    told = roster.used_data(job, ())
    assert told is not None and told["counts"][1] == USERS.as_json == told["clients"]["north"]["counts"][1]
    promise = {"unit": "client", "epsilon": 4.0, "delta": 1e-3, "clipping_norm": 1.0}
    private = shop_job(Path("elsewhere"), privacy=promise)
    private = private.model_copy(
        update={"data": private.data.model_copy(update={"classes": ("i0", "i1", "i2", "i3", "i4")})}
    )
    [silent] = site.hello(private)
    assert silent.refusal == "" and silent.counts == [] and silent.num_examples == 0
    assert ClientRoster.of([silent]).used_data(private, (ROWS,)) is None


@pytest.mark.parametrize(
    "written",
    [
        [{"unit": "users", "read": 3, "used": 1, "left_out": {}}],
        [{"unit": "users", "read": -1, "used": -1, "left_out": {}}],
        [{"unit": "users\x1b", "read": 1, "used": 1, "left_out": {}}],
        [{"unit": "users", "read": 1.5, "used": 1.5, "left_out": {}}],
        [{"unit": "users", "read": 1, "used": 0, "left_out": {"x" * 101: 1}}],
        [{"unit": f"{n}", "read": 1, "used": 1, "left_out": {}} for n in range(21)],
        ["users"],
    ],
)
def test_counts_of_another_machine_are_not_believed(written: list[Any]) -> None:
    with pytest.raises(DataError, match="counts of another form"):
        counts_from_json(written)


def test_each_row_of_a_series_and_each_window_is_counted(tmp_path: Path) -> None:
    """Of 20 rows of one series windows of 4 begin at each second; the test part is the last fifth."""
    path = tmp_path / "d.csv"
    rows = [("long", n, n) for n in range(21)] + [("short", n, n) for n in range(3)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("series", "date", "value"), *rows])
    data = DataSection(source=str(path), test_fraction=0.2)
    options = {"history": 3, "horizon": 1, "season": 1, "stride": 2}
    found = task_named("forecasting").read(path, data, options)
    # Starts 0, 2, …, 16; the last step of each, 3, 5, …, 19, is before 17 or not: none reaches across it.
    assert (len(found.train), len(found.test or ())) == (7, 2)
    assert found.counts == (
        Counts("rows", 24, 20, {"in no window": 1, "of series with fewer than 4 steps": 3}),
        Counts("windows", 9, 9),
    )
    long = task_named("forecasting").read(path, data, options | {"history": 2, "horizon": 2})
    # Those to forecast are 2 and 3, 4 and 5, …, 16 and 17 (across), 18 and 19.
    assert long.counts[1] == Counts("windows", 9, 8, {"across the start of the test part": 1})


def test_a_split_that_is_not_used_and_a_test_part_in_whose_place_stands_another(tmp_path: Path) -> None:
    for name, count in (("train", 8), ("test", 3), ("validation", 2)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            lines = [(f"{name} {n}", "ab"[n % 2]) for n in range(count)]
            csv.writer(file).writerows([("text", "label"), *lines])
    task, data = task_named("text-classification"), DataSection(source=str(tmp_path))
    left_out = {"of other splits than train and test": 2}
    assert task.read(tmp_path, data, {}).counts == (Counts("examples", 13, 11, left_out),)
    job = Job.parse(
        {
            "name": "own",
            "seed": 1,
            "task": {"name": "text-classification"},
            "data": {"source": str(tmp_path), "test": str(tmp_path / "test.csv")},
            "backbone": {"name": "atoll:small-text", "weights": "random"},
            "federation": {"clients": 2, "rounds": 1},
        },
        origin="test",
    )
    unused = {"of the source's test part: data.test is measured on": 3}
    assert Population.of(job).source_counts[1] == Counts("test examples", 3, 0, unused)
