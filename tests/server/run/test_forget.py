"""`atoll forget`: the model is, bit for bit, that of a federation that never had the client."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import atoll.server.run.forget
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.protocol.tensors import tensors_sha256
from atoll.server.roster import ClientRoster
from atoll.server.rounds.closed_form import statistics_size
from atoll.server.run.forget import forget, kept_clients
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from tests.sim.test_simulation import DIGITS, run

KINDS = ("prototype", "ridge", "gaussian")


def job(kind: str = "ridge", **tables: Any) -> Job:
    wanted: dict[str, Any] = {
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "tune": {"head_init": kind, "keep_sums": True},
        "federation": {"clients": 6, "rounds": 1},
    }
    return Job.parse(DIGITS | wanted | tables, origin="test")


class Without(InlineTransport):
    """A federation that some clients never joined."""

    missing: tuple[str, ...] = ()

    def discover_clients(self, job: Job) -> ClientRoster:
        return ClientRoster.of([h for h in self.site.hello(job) if h.client not in self.missing])


def model_without(setting: Job, out: Path, *missing: str) -> Mapping[str, torch.Tensor]:
    population = Population.of(setting)
    transport = Without.of(population)
    transport.missing = missing
    run_job(setting, transport, out, cached_test_set(population, None), report=False)
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_that_of_a_federation_that_never_had_the_client(tmp_path: Path, kind: str) -> None:
    setting, out = job(kind), tmp_path / "run"
    before = run(setting, out, report=True)
    record = forget(out, "client-0002")
    found = load_file(out / "model" / "model.safetensors")
    never = model_without(setting, tmp_path / "never", "client-0002")
    for name, tensor in never.items():
        assert torch.equal(found[name], tensor)
        assert not torch.equal(tensor, torch.zeros_like(tensor))
    assert tensors_sha256(dict(found)) == record["model_sha256"] != before.model_sha256
    result = json.loads((out / "result.json").read_text())
    assert result["model_sha256"] == record["model_sha256"] and result["forgotten"] == [record]
    assert record["replaced_sha256"] == before.model_sha256 and record["clients_left"] == 5
    assert result["final"] == {"server": {}, "clients": {}} and "was forgotten" in result["notes"][-1]
    assert set(kept_clients(out)) == {f"client-000{n}" for n in (0, 1, 3, 4, 5)}
    for path in (out / "checkpoints").glob("*.safetensors"):  # nor does one have the client in it
        assert torch.equal(load_file(path)["model/head.weight"], found["head.weight"])

    forget(out, "client-0000")
    twice = load_file(out / "model" / "model.safetensors")
    never = model_without(setting, tmp_path / "never two", "client-0000", "client-0002")
    assert all(torch.equal(twice[name], tensor) for name, tensor in never.items())
    assert len(json.loads((out / "forgotten.json").read_text())) == 2


def test_the_head_solves_the_others_pooled_equations(tmp_path: Path) -> None:
    """In float64, to 1e-9, by NumPy; the model has it in float32."""
    from atoll.learning.learner import sum_states
    from atoll.strategies.closed_form import ridge_head

    run(job(), tmp_path / "run")
    forget(tmp_path / "run", "client-0003")
    left = kept_clients(tmp_path / "run")
    weights, bias = ridge_head(sum_states(left.values()), 1.0)
    total = {name: sum(one[name].numpy() for one in left.values()) for name in ("counts", "sums", "gram")}
    count, sums, gram = (np.asarray(total[name]) for name in ("counts", "sums", "gram"))
    n, mean = count.sum(), sums.sum(0) / count.sum()
    covariance = gram / n - np.outer(mean, mean)
    cost = max(np.diag(covariance).clip(0).mean(), 0)
    solved = np.linalg.solve(covariance + cost * np.eye(len(mean)), (sums / n - np.outer(count / n, mean)).T)
    assert np.linalg.norm(weights.numpy() - solved.T) <= 1e-9 * np.linalg.norm(solved)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(saved["head.weight"], weights.float()) and torch.equal(
        saved["head.bias"], bias.float()
    )


def test_a_run_keeps_sums_for_its_owner_alone_and_only_where_it_is_asked_to(tmp_path: Path) -> None:
    setting = job()
    run(setting, tmp_path / "run")
    files = list((tmp_path / "run" / "sums").iterdir())
    assert len(files) == 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    size = statistics_size(setting, {"head.weight": torch.zeros(10, 192)})
    for path in files:
        assert 0 < path.stat().st_size - 8 * sum(t.numel() for t in load_file(path).values()) < 400
    assert size == 8 * (10 + 10 * 192 + 192**2)
    other = run(job(tune={"head_init": "ridge"}), tmp_path / "other")
    assert not (tmp_path / "other" / "sums").exists()
    assert other.model_sha256 == json.loads((tmp_path / "run" / "result.json").read_text())["model_sha256"]


def test_what_a_kill_leaves_can_be_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    before = run(job(), out).model_sha256

    class Killed(Exception): ...

    def kill(*given: Any) -> None:
        raise Killed

    for step in ("_replace_model", "_replace_result", "sync_folder"):
        with monkeypatch.context() as patch, pytest.raises((Killed, ConfigError)):
            patch.setattr(atoll.server.run.forget, step, kill)
            forget(out, "client-0001")
        if step != "sync_folder":
            assert "client-0001" in kept_clients(out)
    [record] = json.loads((out / "forgotten.json").read_text())
    assert record["replaced_sha256"] == before
    assert json.loads((out / "result.json").read_text())["forgotten"] == [record]


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"tune": {"head_init": "ridge"}}, "its clients' sums were not kept; expected a run with"),
        ({"tune": {}}, "its model was trained, and what a client did to it in training can't be taken out"),
        (
            {"tune": {"head_init": "ridge"}, "federation": {"clients": 6, "rounds": 2}},
            "its model was trained, and",
        ),
        (
            {
                "tune": {"head_init": "ridge", "feature_norm": 4.0},
                "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "seeded_noise": True},
            },
            "under a promise or a secure sum no client's sums are there",
        ),
    ],
)
def test_everything_else_is_refused_in_one_line(tmp_path: Path, tables: dict[str, Any], why: str) -> None:
    run(job(**tables), tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=why):
        forget(tmp_path / "run", "client-0000")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_who_is_not_there_or_damaged_is_said_and_nothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(job(federation={"clients": 2, "rounds": 1}), out)
    with pytest.raises(
        ConfigError, match="keeps no sums of 'north', expected one of client-0000, client-0001"
    ):
        forget(out, "north")
    forget(out, "client-0000")
    with pytest.raises(ConfigError, match="'client-0001' is its only client"):
        forget(out, "client-0001")
    [path] = (out / "sums").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged"):
        forget(out, "client-0001")


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"tune": {"keep_sums": True}}, "tune.keep_sums has no meaning without head_init"),
        ({"federation": {"clients": 6, "rounds": 2}}, "tune.keep_sums: expected federation.rounds = 1"),
        (
            {
                "tune": {"head_init": "ridge", "keep_sums": True, "feature_norm": 4.0},
                "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            },
            "tune.keep_sums: expected false with privacy.unit = 'client'",
        ),
    ],
)
def test_a_job_whose_sums_could_not_be_taken_away_keeps_none(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        job(**tables)


def test_the_verb_says_what_replaced_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from atoll.cli.main import run as command_line

    before = run(job(), tmp_path / "run", report=True).model_sha256
    assert command_line(["forget", str(tmp_path / "run"), "client-0004"]) == 0
    said = capsys.readouterr().out
    assert "client-0004 is forgotten" in said and before[:12] in said and "5 clients" in said
    assert "client-0004 was forgotten" in (tmp_path / "run" / "report.html").read_text()
