"""IFCA, whose clients choose among several models: its paper's algorithm in NumPy, engines, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from atoll.api import Run
from atoll.cli.main import app
from atoll.client.state.ifca import fitting_cluster
from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.protocol.messages import CLUSTER, Update
from atoll.protocol.random_streams import global_stream
from atoll.protocol.stacked_updates import stacked
from atoll.server.job_checks import check_named
from atoll.server.rounds.start import first_model
from atoll.server.rounds.validation import Validation
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.engines.engine import check_engine
from atoll.sim.engines.simulated_site import IndexedClients, PopulationIndex
from atoll.sim.population.population import Population
from atoll.strategies.personal.ifca import Ifca, model_of_cluster
from atoll.tasks import task_named
from atoll.trained import trained
from tests.client.state.test_client_state import Array, Clients, heads, matrix
from tests.client.state.test_personal import stopped_and_resumed
from tests.sim.test_simulation import run
from tests.strategies.test_fair_strategies import EXAMPLE, Measured
from tests.strategies.test_strategy_runs import of_pixels
from tests.support.small import few_pictures, image_job

THREE = {"name": "ifca", "options": {"clusters": 3}}


def first_heads(problem: Clients, count: int) -> list[Array]:
    """The heads that torch draws from the job's seed: that of any job, and one for each further number."""
    shape = problem.learner.initial()["head.weight"].shape
    found = []
    for number in range(count):
        with global_stream(problem.setting.seed, "init", "head", *([number] if number else [])):
            layer = torch.nn.Linear(shape[1], shape[0])
        found.append(matrix({f"head.{name}": p.detach() for name, p in layer.named_parameters()}))
    return found


def models_of(out: Path, setting: Job) -> list[Array]:
    return [matrix(trained(out, number)[1]) for number in range(3)]


def test_ifca_is_algorithm_1_of_its_paper_by_model_averaging(tmp_path: Path) -> None:
    """Ghosh et al. 2020, line by line; four of six clients take part in a round."""
    setting = heads(THREE, federation={"cohort": 4})
    result = run(setting, tmp_path)
    problem = Measured(setting)
    theta = first_heads(problem, 3)
    assert all(np.abs(theta[0] - other).max() > 0.01 for other in theta[1:])
    for line in result.rounds:
        arrived: list[list[Array]] = [[], [], []]
        for i in line["cohort"]:
            j = int(np.argmin([problem.loss(own, i) for own in theta]))
            arrived[j].append(problem.trained(theta[j], i, line["round"], 0.5))
            assert i in line["clusters"][j]
        theta = [sum(own) / len(own) if own else old for own, old in zip(arrived, theta, strict=True)]
    assert sum(bool(names) for names in result.rounds[-1]["clusters"]) > 1
    for found, expected in zip(models_of(tmp_path, setting), theta, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert any("clients of the last round: " in note for note in result.notes)
    assert result.final["server"] == {}
    index = PopulationIndex(Population.of(setting), problem.learner)
    for name in problem.names:
        j = int(np.argmin([problem.loss(own, name) for own in theta]))
        validation = IndexedClients(index, [name]).validation(name)
        features = problem.learner.features.plain(validation).double().numpy()
        scores = features @ theta[j][:, :-1].T + theta[j][:, -1]
        accuracy = float(np.mean(scores.argmax(1) == validation.targets.numpy()))
        assert result.final["clients"][name]["accuracy"] == pytest.approx(accuracy)


def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path: Path) -> None:
    setting = heads(THREE)
    whole = run(setting, tmp_path / "whole").model_sha256
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole
    assert run(setting, tmp_path / "cohort", engine="cohort").model_sha256 == whole
    assert stopped_and_resumed(setting, tmp_path / "r").model_sha256 == whole


def test_what_is_sent_can_be_compressed_and_costs_k_models_down_and_one_up(tmp_path: Path) -> None:
    setting = heads(THREE, federation={"compression": "int8", "error_feedback": False})
    plain = run(heads(THREE, federation={"rounds": 1}), tmp_path / "plain")
    # 3 clients get 3 heads of 10 x 193 numbers of 4 bytes, and send one; all 6 measure twice
    assert plain.bytes_up == 3 * 1930 * 4
    assert plain.bytes_down == (3 + 6 + 6) * 3 * 1930 * 4
    first = run(setting, tmp_path / "inline")
    assert first.rounds[-1]["set_aside"] == {}
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == first.model_sha256


def test_two_groups_that_label_otherwise_each_get_a_model_that_is_right(tmp_path: Path) -> None:
    """Clients 0 to 3 turn their labels round; one model can be right for one group alone."""
    federation = {"clients": 8, "cohort": 8, "quorum": 1.0, "rounds": 8}
    data = {"source": "digits", "partition": {"kind": "iid"}}
    attack = {"kind": "label-flip", "clients": 4}
    mean = {}
    for name in ("fedavg", "ifca"):
        setting = of_pixels(
            federation, data=data, strategy={"name": name}, attack=attack, evaluate={"every": 8}
        )
        result = run(setting, tmp_path / name)
        mean[name] = np.mean([m["accuracy"] for m in result.final["clients"].values()])
    assert sorted(len(names) for names in result.rounds[-1]["clusters"]) == [4, 4]
    assert mean["ifca"] > mean["fedavg"] + 0.3


def small_network() -> Job:
    return image_job(
        "squeezenet1_1", data=few_pictures(14, classes=2), tune={"method": "full"},
        train={"lr": 0.01, "batch_size": 4, "dropout": 0.0}, strategy={"name": "ifca"},
        federation={"clients": 2, "quorum": 1.0, "rounds": 2},
    )  # fmt: skip


def test_networks_are_chosen_by_their_mean_cross_entropy(tmp_path: Path) -> None:
    setting = small_network()
    result = run(setting, tmp_path / "inline")
    clients = Clients(setting)
    learner = clients.learner
    models = first_model(learner, learner.initial())
    same = [name for name, stack in models.items() if torch.equal(stack[0], stack[1])]
    assert same and not any(name.startswith("head.") for name in same)
    for name in clients.names:
        shard, losses = clients.train(name), []
        for number in range(2):
            trainable.load_values(learner.model, model_of_cluster(models, number))
            learner.model.eval()
            with torch.no_grad():
                outputs = learner.model(learner.collate(shard, range(len(shard)), None))
            losses.append(float(torch.nn.functional.cross_entropy(outputs, shard.targets)))
        assert name in result.rounds[0]["clusters"][int(np.argmin(losses))]
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == result.model_sha256
    with pytest.raises(ConfigError, match=r"strategy\.name: engine cohort .* ifca's have several"):
        check_engine(setting, "cohort")


def update(client: str, delta: float, cluster: float | None, examples: int = 5) -> Update:
    states = {f"train_loss.{part}": torch.tensor(1.0, dtype=torch.float64) for part in ("sum", "count")}
    if cluster is not None:
        states[CLUSTER] = torch.tensor(cluster, dtype=torch.float64)
    return Update(client, 1, {"w": torch.tensor([delta])}, examples, states)


def test_ifca_by_hand() -> None:
    # a and c chose cluster 1: 10 + (2 + 6) / 2 = 14, whatever their examples; b chose 0; 2 stays
    updates = [update("a", 2.0, 1.0), update("b", 3.0, 0.0), update("c", 6.0, 1.0, examples=50)]
    model = {"w": torch.tensor([[0.0], [10.0], [20.0]])}
    for some in (updates, stacked(updates)):
        merged, _ = Ifca().merge(model, some, {})
        assert merged["w"].flatten().tolist() == [3.0, 14.0, 20.0]
    with pytest.raises(InconsistentUpdates, match="a chose cluster 3, expected 0 to 2"):
        Ifca().merge(model, [update("a", 2.0, 3.0)], {})


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        (None, "metric state cluster is missing"),
        (2.0, "metric state cluster: expected 0 to 1, found 2"),
        (0.5, "metric state cluster: expected a whole number of at least 0, found 0.5"),
        (-1.0, "metric state cluster: expected a whole number of at least 0, found -1"),
    ],
)
def test_a_client_of_no_cluster_is_set_aside(cluster: float | None, reason: str) -> None:
    validate = Validation.of(heads({"name": "ifca"}))
    replies = [update("a", 1.0, 1.0), update("b", 1.0, cluster)]
    found = validate(replies, ["a", "b"], {"w": torch.zeros(1)}, 1)
    assert [one.client for one in found.updates] == ["a"] and found.set_aside == {"b": reason}


def test_equal_losses_and_no_examples_choose_the_first() -> None:
    problem = Clients(heads({"name": "ifca"}))
    first = problem.learner.initial()
    alike = {name: torch.stack([t, t]) for name, t in first.items()}
    shard = problem.train("client-0000")
    assert fitting_cluster(problem.learner, alike, shard) == 0
    assert fitting_cluster(problem.learner, alike, shard.select([])) == 0


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"privacy": EXAMPLE}, r"strategy\.name: ifca's clients say which model fits their examples"),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}},
         r"strategy\.name: expected one of fedavg, .*, found 'ifca'"),
        ({"federation": {"secure_aggregation": True}}, r"strategy\.name: expected one of fedavg, .*'ifca'"),
        ({"federation": {"concurrency": 4}}, r"strategy\.name: federation\.concurrency lets updates be late"),
        ({"federation": {"compression": "int8", "error_feedback": True}}, r"federation\.error_feedback: "),
        ({"federation": {"selection": "power-of-choice"}}, r"federation\.selection: .* don't compare"),
        ({"federation": {"selection": "by-size"}}, r"federation\.selection: .* ifca has a rule of its own"),
        ({"federation": {"weights": "equal"}}, r"federation\.weights: ifca has a rule of its own"),
        ({"personal": {"keep": "mixture"}}, r"personal\.keep: "),
        ({"tune": {"head_init": "ridge"}}, r"tune\.head_init: .* one head for all"),
        ({"evaluate": {"adapt": 2}}, r"evaluate\.adapt: "),
        ({"evaluate": {"contributions": "shapley"}}, r"evaluate\.contributions: "),
    ],
)  # fmt: skip
def test_what_needs_one_model_refuses_ifca_by_name(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        heads({"name": "ifca"}, **tables)


def test_a_task_without_a_head_on_features_a_wrong_number_and_an_attack_are_refused() -> None:
    texts = heads({"name": "ifca"}).model_dump(mode="json") | {"task": {"name": "segmentation"}}
    job = Job.parse(texts, origin="test")
    with pytest.raises(ConfigError, match="segmentation has no head on features"):
        Learner.of(job, task_named("segmentation"), {})
    with pytest.raises(
        ConfigError, match=r"strategy\.options\.clusters: expected greater than or equal to 2"
    ):
        check_named(heads({"name": "ifca", "options": {"clusters": 1}}))
    with pytest.raises(ConfigError, match=r"strategy\.name: a run with it can't be attacked"):
        job_to_replay(heads({"name": "ifca"}))


def test_verbs_ask_whose_model_is_meant(tmp_path: Path) -> None:
    out, picture = tmp_path / "run", tmp_path / "digit.png"
    run(heads({"name": "ifca"}), out)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture)
    told = CliRunner().invoke(app, ["predict", str(out), str(picture)])
    assert isinstance(told.exception, ConfigError)
    with pytest.raises(ConfigError, match="expected --cluster 0 to 1 with predict or export, found none"):
        trained(out)
    with pytest.raises(ConfigError, match="found 2"):
        trained(out, 2)
    answers = [
        json.loads(_shown(["predict", str(out), str(picture), "--json", "--cluster", n])) for n in "01"
    ]
    assert answers[0]["probability"] != answers[1]["probability"]
    assert Run(out).predict([picture], cluster=1)[0]["label"] == answers[1]["label"]
    run(heads({"name": "fedavg"}), tmp_path / "one")
    with pytest.raises(ConfigError, match="has one model for all, expected none, found 0"):
        trained(tmp_path / "one", 0)


def _shown(arguments: list[str]) -> str:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    return found.stdout
