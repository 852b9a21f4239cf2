"""What the benchmark scripts are made of: the workload's file, turns, environments."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cached_pictures, craft_messages, environments, head_tuning
from benchmarks.cached_states import LocalTraining
from benchmarks.environments import NotInstalled, environment_of
from benchmarks.turns import Row, System, chosen, report, take_turns
from benchmarks.workload import Workload, seconds_between


def small(rounds: int = 3) -> Workload:
    inputs = np.arange(12, dtype=np.float32).reshape(6, 2)
    targets = np.array([0, 1, 0, 1, 0, 1])
    return Workload("linear", inputs, targets, np.array([1, 3, 2]), inputs, targets, 2, 2, 0.1, rounds)


def system(key: str, accuracy: float = 0.9, **options: bool) -> System:
    return System(key, key, lambda: ([9.0, 0.5, 0.5], accuracy), **options)


def test_a_workload_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    made = small()
    made.save(tmp_path / "w.safetensors")
    read = Workload.load(tmp_path / "w.safetensors")
    assert (read.clients, read.classes, read.cohort, read.rounds) == (3, 2, 2, 3)
    assert np.array_equal(read.client(1)[0], made.inputs[1:4])
    assert np.array_equal(read.client(2)[1], [0, 1])


def test_uneven_clients_have_between_5_and_200_examples() -> None:
    sizes = head_tuning.made(1, uneven=True).sizes
    assert len(sizes) == 1000
    assert 5 <= sizes.min() < 10
    assert 150 < sizes.max() <= 200


def test_rounds_are_timed_from_end_to_end() -> None:
    assert seconds_between([1.0, 3.0, 3.5]) == [2.0, 0.5]


def test_every_round_of_atolls_is_timed() -> None:
    seconds, accuracy = head_tuning.atoll(small(rounds=3), 1)
    assert len(seconds) == 3 and min(seconds) > 0 and 0 <= accuracy <= 1


def test_a_family_of_systems_or_one_of_it_can_be_chosen() -> None:
    systems = [system("atoll-1"), system("atoll-2"), system("pfl-1")]
    assert [s.key for s in chosen(systems, "atoll")] == ["atoll-1", "atoll-2"]
    assert [s.key for s in chosen(systems, "pfl-1,atoll-2")] == ["atoll-2", "pfl-1"]
    with pytest.raises(SystemExit, match=r"no system 'flour', expected some of atoll, atoll-1"):
        chosen(systems, "flour")


def test_a_table_has_a_line_for_every_system_and_the_first_round_is_a_warm_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent() -> tuple[list[float], float]:
        raise NotInstalled("not installed: no such version")

    rows = take_turns([system("atoll-1"), System("fluke", "fluke", absent)], 2)
    assert report(rows, small(), 2, tolerance=0.02) == 0
    said = capsys.readouterr().out
    assert "500.00" in said  # ms: the median of .5 and .5, not of 9
    assert "fluke                         not installed: no such version" in said


def test_a_system_that_learns_something_else_is_named_and_fails_the_script(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [Row(system(f"loop-{i}")) for i in range(3)]
    rows += [Row(system("fedlab", 0.5)), Row(system("bare", float("nan"), limit=True))]
    for row in rows:
        row.take_turn()
    assert report(rows, small(), 1, tolerance=0.02) == 1
    assert "fedlab: accuracy 0.500, the others' 0.900" in capsys.readouterr().out


def test_an_environment_is_made_anew_when_its_pins_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(peer: str, folder: Path, pins: Path) -> None:
        made.append(pins.read_text())
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "FOLDER", tmp_path / "environments")
    monkeypatch.setattr(environments, "PINS", tmp_path)
    monkeypatch.setattr(environments, "_make", make)
    (tmp_path / "peer.txt").write_text("thing==1  # why\n")
    assert environment_of("peer").versions == environment_of("peer").versions == "thing==1"
    (tmp_path / "peer.txt").write_text("thing==2\n")
    assert environment_of("peer").versions == "thing==2"
    assert made == ["thing==1  # why\n", "thing==2\n"]


@pytest.mark.processes
def test_a_failed_installation_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    with pytest.raises(NotInstalled, match=r"^not installed: \S.*$"):
        environments._do("peer", [environments.sys.executable, "-m", "pip", "install", "./nothing-here"])


def test_a_row_of_messages_has_the_differences_of_the_same_seeds_and_the_ratio_of_bytes() -> None:
    plain = [craft_messages.Measured(0.80, 4000.0), craft_messages.Measured(0.90, 4000.0)]
    runs = [craft_messages.Measured(0.79, 1000.0), craft_messages.Measured(0.87, 1000.0)]
    said = craft_messages.line("int8", runs, plain).split()
    # means .83 and -.02; Student's 12.706 with one degree of freedom times deviation / sqrt(2)
    assert said == ["int8", "0.830", "±", "0.508", "-0.020", "±", "0.127", "1,000", "4.0x"]
    assert craft_messages.line("none", plain, plain).split() == [
        "none",
        "0.850",
        "±",
        "0.635",
        "4,000",
        "1.0x",
    ]


def test_a_way_to_compress_is_measured_on_the_job_as_its_file_is(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(
        """
        name = "small"
        seed = 1
        task = { name = "image-classification" }
        data = { source = "digits" }
        backbone = { name = "raw:pixels", image_size = 8 }
        federation = { clients = 3, rounds = 2 }
        """
    )
    found = [
        craft_messages.measured(file, craft_messages.WAYS[name], 2, None, tmp_path / name)
        for name in ("none", "int8")
    ]
    assert found[0].bytes_up == 4 * 1930 and found[1].bytes_up == 1930 + 4 * 8
    assert all(0 < one.accuracy <= 1 for one in found)


def test_cached_pictures_times_systems_that_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, so that the order of pictures doesn't matter."""
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path))
    work = cached_pictures.Workload(
        "torchvision:shufflenet_v2_x0_5", examples=3, layers=1, visits=2, threads=1
    )
    ways: dict[str | None, bool] = {None: False, "fp32": True, "bf16": False}
    ours = [
        LocalTraining(*cached_pictures.learner_and_shard(work, states), cold=is_cold)
        for states, is_cold in ways.items()
    ]
    plain = cached_pictures.Plain(work)
    assert plain.seconds() > 0
    for system in ours:
        assert system.seconds() > 0
        assert all(not torch.equal(tensor, system.start[name]) for name, tensor in system.learnt.items())
        is_exact = system.learner.job.train.cached_states != "bf16"
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if is_exact else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(system.learnt, plain.learnt, **tolerance)
