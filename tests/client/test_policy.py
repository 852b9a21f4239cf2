"""A site's policy: what it forbids isn't done, whoever asks, and the server learns which rule it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import atoll.client.policy as policy_file
from atoll.cli.main import run as command_line
from atoll.client.app import tell_operator
from atoll.client.deploy.join import join
from atoll.client.policy import POLICY, Policy
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.messages import Hello
from atoll.protocol.requests import EvaluateRequest, TrainRequest
from atoll.server.run.directory import job_toml
from tests.federation.places import provisioned
from tests.support.memory_grid import MemoryGrid


def setting(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "asked", "seed": 5,
        "task": {"name": "image-classification"},
        "data": {"source": "digits", "label": "finding"},
        "backbone": {"name": "raw:pixels", "image_size": 8, "offline": True},
        "train": {"epochs": 2, "threads": 1},
        "federation": {"clients": 6, "rounds": 20, "quorum": 0.5},
    }  # fmt: skip
    merged = {key: table.get(key, {}) | value for key, value in tables.items()}
    return Job.parse(table | merged, origin="test")


PRIVATE = {"unit": "client", "epsilon": 4.0, "delta": 1e-3}

RULES: list[tuple[str, str, dict[str, Any], str]] = [
    # a policy, its rule, what of the job breaks it, what the job has then
    ('tasks = ["image-classification"]', "tasks", {"task": {"name": "medical-imaging"}}, "medical-imaging"),
    ('backbones = ["raw:pixels"]', "backbones", {"backbone": {"name": "torchvision:resnet18"}}, "resnet18"),
    ('tuning = ["head"]', "tuning", {"tune": {"method": "full"}}, "full"),
    (
        'tuning = ["head"]', "tuning",
        {
            "tune": {"then": [{"method": "last-k", "layers": 1, "after": 1}]},
            "backbone": {"name": "torchvision:resnet18"},
        },
        "last-k",
    ),
    ('strategies = ["fedavg"]', "strategies", {"strategy": {"name": "fedadam"}}, "fedadam"),
    ('columns = ["image", "finding"]', "columns", {"data": {"label": "ssn"}}, "ssn"),
    ('columns = ["finding"]', "columns", {"data": {"columns": {"patient": "ssn"}}}, "ssn"),
    ('folders = []', "folders", {"backbone": {"weights": "/etc/shadow"}}, "/etc/shadow"),
    ('folders = ["/models"]', "folders", {"backbone": {"name": "/models/../etc"}}, "/models/../etc"),
    ("max_rounds = 20", "max_rounds", {"federation": {"rounds": 21}}, "21"),
    ("max_epochs = 2", "max_epochs", {"train": {"epochs": 3}}, "3"),
    ("max_epochs = 2", "max_epochs", {"train": {"epochs": 1, "steps": 3}}, "3"),
    ("max_threads = 2", "max_threads", {"train": {"threads": 1024}}, "1024"),
    ("max_image_size = 64", "max_image_size", {"backbone": {"image_size": 4096}}, "4096"),
    ("min_clients = 3", "min_clients", {"federation": {"quorum": 0.3}}, "2"),
    ("min_clients = 3", "min_clients", {"federation": {"cohort": 6, "selection": "by-size"}}, "by-size"),
    ("min_clients = 3", "min_clients", {"federation": {"cohort_rate": 0.9}}, "0.9"),
    ("download = false", "download", {"backbone": {"offline": False}}, "false"),
    ('[privacy]\nunits = ["client"]', "privacy.units", {}, "'none'"),
    ("[privacy]\nmax_epsilon = 4.0", "privacy.max_epsilon", {}, "'none'"),
    ("[privacy]\nmax_epsilon = 4.0", "privacy.max_epsilon", {"privacy": PRIVATE | {"epsilon": 4.5}}, "4.49"),
    ("[privacy]\nmax_delta = 1e-4", "privacy.max_delta", {"privacy": PRIVATE}, "0.001"),
    ("[privacy]\nsecure_sum = true", "privacy.secure_sum", {}, "false"),
]  # fmt: skip


def policy_of(folder: Path, text: str) -> Policy:
    (folder / POLICY).write_text(text)
    found = Policy.load(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(("text", "rule", "broken", "found"), RULES)
def test_a_rule_forbids_what_it_is_about_and_nothing_else(
    text: str, rule: str, broken: dict[str, Any], found: str, tmp_path: Path
) -> None:
    policy = policy_of(tmp_path, text)
    job = setting(**broken)
    for kind in (Hello, TrainRequest):
        line = policy.violation(job, kind)
        assert line.startswith(f"its policy: {rule}: expected ") and found in line
    assert {verdict.rule for verdict in policy.verdicts(job) if not verdict.holds} == {rule}


WITHIN: dict[str, dict[str, Any]] = {
    "a promise and a secure sum": {
        "privacy": PRIVATE | {"where": "distributed"}, "data": {"classes": ["a", "b"]},
    },
    "plain": {},
}  # fmt: skip


def test_a_job_within_all_rules_is_allowed(tmp_path: Path) -> None:
    private = setting(**WITHIN["a promise and a secure sum"])
    plain = {text for text, rule, _, _ in RULES if not rule.startswith("privacy")}
    tables = {text.removeprefix("[privacy]\n") for text, rule, _, _ in RULES if rule.startswith("privacy")}
    tables -= {"max_delta = 1e-4"}
    # One rule of each name: the first of those that there are two of.
    lines = {text.partition(" ")[0]: text for text in sorted(plain | {'columns = ["image", "finding"]'})}
    policy = policy_of(
        tmp_path, "\n".join([*lines.values(), "[privacy]", *sorted(tables), "max_delta = 1e-3"])
    )
    assert policy.violation(private, Hello) == policy.violation(private, TrainRequest) == ""
    assert "privacy.units" in policy.violation(setting(), Hello)


def test_a_site_may_send_no_metrics_and_answer_within_hours_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tmp_path, 'download = true\nmeasurements = false\nhours = "22:00-06:00"')
    for now, is_open in {
        "21:59": False,
        "22:00": True,
        "03:00": True,
        "06:00": False,
        "12:00": False,
    }.items():
        monkeypatch.setattr(policy_file.time, "strftime", lambda form, now=now: now)
        assert (policy.violation(setting(), TrainRequest) == "") == is_open, now
    assert "measurements = false" in policy.violation(setting(), EvaluateRequest)
    by_day = policy_of(tmp_path, 'hours = "8:00 - 18:00"')
    assert by_day.hours == "08:00-18:00"
    for now, is_open in {"07:59": False, "08:00": True, "17:59": True, "18:00": False}.items():
        monkeypatch.setattr(policy_file.time, "strftime", lambda form, now=now: now)
        assert by_day.is_open() == is_open, now


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_round = 5", "max_round: unknown key, did you mean 'max_rounds'?"),
        ("max_rounds = 0", "max_rounds: expected greater than or equal to 1, found 0"),
        ('max_rounds = "5"', "max_rounds: expected integer, found '5'"),
        ("tasks = []", "tasks: expected at least 1, found []"),
        ('hours = "8-18"', "hours: expected two times such as '18:00-06:00', found '8-18'"),
        ('hours = "08:00-08:00"', "expected two different times"),
        (
            '[privacy]\nunits = ["patient"]',
            "privacy.units.0: expected 'example' or 'client', found 'patient'",
        ),
        ("[privacy]\nmax_epsilon = nan", "privacy.max_epsilon: expected"),
        ("tasks = [", ""),
    ],
)
def test_a_policy_that_is_none_stops_the_site_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = provisioned(tmp_path, ("north",), 9092)["north"]
    (kit / POLICY).write_text(text)
    assert command_line(["join", str(kit), "--data", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {kit / POLICY}:") and said in line and line.count("\n") == 1
    (kit / POLICY).unlink()
    (kit / POLICY).mkdir()
    with pytest.raises(ConfigError, match=r"policy\.toml: expected a file"):
        join(kit, [tmp_path])


def test_a_policy_can_be_tried_on_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit = provisioned(tmp_path, ("north",), 9092)["north"]
    file = tmp_path / "job.toml"
    file.write_text(job_toml(setting()))
    assert command_line(["check-policy", str(kit), str(file)]) == 0
    assert "policy.toml is not there" in " ".join(capsys.readouterr().out.split())
    (kit / POLICY).write_text('max_rounds = 100\ncolumns = ["finding"]\nmeasurements = false\n')
    assert command_line(["check-policy", str(kit), str(file)]) == 0
    said = capsys.readouterr().out
    assert "max_rounds" in said and "federation.rounds" in said and said.endswith("\nallowed\n")
    assert "no metric leaves the site" in said
    assert command_line(["check-policy", str(kit), str(file), "--set", "data.label=ssn"]) == 1
    said = capsys.readouterr().out
    assert "ssn" in said and said.endswith("\nrefused by columns\n")


def test_a_site_with_a_policy_says_so_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    """What it refuses never happens there: no data is read, nothing is trained."""
    job = setting(data={"label": None}, federation={"clients": 3, "rounds": 1, "quorum": 0.5})
    grid = MemoryGrid.of(job, tmp_path)
    strict = grid.sites["client-0001"]
    strict.policy = policy_of(tmp_path, "max_rounds = 1\nmax_epochs = 1")
    result = grid.run(job, tmp_path / "run")
    assert set(result.final["clients"]) == {"client-0000", "client-0002"}
    assert not vars(strict.shards)["_read"] and not strict._learners
    lenient = policy_of(tmp_path, "max_epochs = 2\nmeasurements = false")
    strict.policy = lenient
    result = grid.run(job, tmp_path / "again")
    assert result.rounds[0]["set_aside"] == {}
    assert set(result.final["clients"]) == {"client-0000", "client-0002"}


def test_the_sites_own_log_says_why_a_client_does_not_take_part(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        tell_operator(setting(), [Hello("north", {}, 0, refusal="its policy: tasks"), Hello("south", {}, 30)])
    assert [record.getMessage() for record in caplog.records][1:] == [
        "job asked: north does not take part: its policy: tasks",
        "job asked: south has 30 examples for it",
    ]
