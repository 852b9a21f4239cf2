"""LoRA's factors over clients: every merge against dense matrices in NumPy, every run with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_sgd import train_model
from atoll.errors import ConfigError
from atoll.export.huggingface import write_folder
from atoll.export.lora_adapter import adapter_of
from atoll.job.job import Job
from atoll.learning import lora_base
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import Request, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.server.rounds.central_dp import run_key
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from atoll.strategies.fedavg import FedAvg
from atoll.strategies.lora.factors import BASE, BASIS, CORE, A, B
from atoll.strategies.lora.fedsb import singular_factors
from atoll.strategies.lora.flexlora import starts_by_rank
from atoll.strategies.lora.merge import ERROR, RELATIVE, LoraMerge, trained_in_round
from atoll.tasks import task_named
from atoll.trained import trained
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

EXACT = ("ffa", "rolora", "fedex", "flora", "fedsb")
ALL = (None, "average", *EXACT, "flexlora")
SHAPES = {"linear": ((7, 0), (0, 5)), "conv": ((6, 0, 1, 1), (0, 4, 3, 3)), "wide": ((3, 0), (0, 40))}
"""By layer: the shapes of B and A, with 0 for the rank."""


def drawn(rng: np.random.Generator, rank: int, method: str | None) -> Tensors:
    """A model's tensors: factors, a head that is saved whole, and what was added to frozen weights."""
    found: Tensors = {"head.weight": torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32)}
    for layer, (b, a) in SHAPES.items():
        for end, shape in ((B, b), (A, a)):
            size = [rank if n == 0 else n for n in shape]
            found[layer + end] = torch.tensor(rng.normal(size=size), dtype=torch.float32)
        if method == "fedsb":
            found[layer + BASIS] = found.pop(layer + B)
            core = rng.normal(size=(rank, rank, *b[2:]))
            found[layer + CORE] = torch.tensor(core, dtype=torch.float32)
        if method in ("fedex", "flora"):
            out, columns = b[0], int(np.prod(a[1:]))
            found[layer + BASE] = torch.tensor(rng.normal(size=(out, columns)), dtype=torch.float32)
        if method == "flora":
            found[layer + B] = torch.zeros_like(found[layer + B])
    return found


def dense(tensors: Tensors, layer: str, scaling: float) -> Any:
    """What a layer's frozen weight has had added, as NumPy has it in float64, [out, in]."""
    ends = (BASIS, CORE, A) if layer + CORE in tensors else (B, A)
    factors = [tensors[layer + end].numpy().astype(np.float64) for end in ends]
    product = scaling * np.linalg.multi_dot([factor.reshape(len(factor), -1) for factor in factors])
    return product + (tensors[layer + BASE].numpy().astype(np.float64) if layer + BASE in tensors else 0.0)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("rank", "scaling"), [(1, 2.0), (3, 16 / 3), (4, 16 / 4**0.5)])
@pytest.mark.parametrize("round", [1, 2])
def test_merged_products_are_those_of_dense_matrices(
    method: str | None, rank: int, scaling: float, round: int
) -> None:
    rng = np.random.default_rng([rank, round])
    model = drawn(rng, rank, method)
    rests = {"ffa": (A,), "fedsb": (A, BASIS)}.get(method or "", ())
    frozen = {n: model.pop(n) for n in list(model) if n.endswith(rests)}
    sent = trained_in_round(model, method, round)
    counts = [3, 1, 7, 5]
    updates = [
        Update(f"c{i}", round, {n: torch.tensor(rng.normal(size=t.shape), dtype=torch.float32)
                                for n, t in sent.items()}, count)
        for i, count in enumerate(counts)
    ]  # fmt: skip
    weights = np.array(counts) / sum(counts)
    merge = LoraMerge(FedAvg(), method, 0, dict.fromkeys(SHAPES, scaling), frozen)
    found, state = merge.merge(model, updates, merge.begin(model))
    assert found.keys() == model.keys() and all(found[n].dtype == model[n].dtype for n in model)
    head = sum(w * u.delta["head.weight"].double() for w, u in zip(weights, updates, strict=True))
    assert torch.allclose(found["head.weight"].double(), model["head.weight"].double() + head, atol=1e-6)
    for layer in SHAPES:
        clients = [
            frozen | {n: t.double() + u.delta[n].double() if n in u.delta else t for n, t in model.items()}
            for u in updates
        ]
        meant = sum(w * dense(own, layer, scaling) for w, own in zip(weights, clients, strict=True))
        apart = np.linalg.norm(meant - dense(frozen | found, layer, scaling))
        assert state[ERROR + layer] == pytest.approx(apart, rel=1e-6, abs=1e-12 * np.linalg.norm(meant))
        assert state[RELATIVE + layer] == pytest.approx(state[ERROR + layer] / np.linalg.norm(meant))
        if method in EXACT:
            assert apart <= 1e-6 * np.linalg.norm(meant)
        elif method == "flexlora":
            rest = np.linalg.svd(meant, compute_uv=False)[rank:]
            assert apart == pytest.approx(np.linalg.norm(rest), rel=1e-5, abs=1e-6 * np.linalg.norm(meant))
        else:
            assert apart > 1e-3 * np.linalg.norm(meant)


def a_job(folder: Path, method: str | None, **tables: Any) -> Job:
    tune = {"method": "lora", "rank": 2} | ({} if method is None else {"lora_merge": method})
    table = {
        "data": {"source": "written", "classes": ("good", "bad"), "test_fraction": 0.2},
        "tune": tune | tables.pop("tune", {}),
        "federation": {"clients": 3, "rounds": 3} | tables.pop("federation", {}),
        "train": {"lr": 0.02, "batch_size": 8, "optimizer": "adam"} | tables.pop("train", {}),
    }
    return ready(job_of("text-classification", "lora", **table, **tables), folder)


def run(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, report=False, **options)


def hashes(result: RunResult) -> list[str]:
    return [line["model_sha256"] for line in result.rounds]


class Stopped(Exception): ...


class Stops(InlineTransport):
    """Breaks off in round 3, when clients have trained and the server has not merged yet."""

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Any:
        replies = list(super().send_and_receive(request, names, timeout))
        if isinstance(request, TrainRequest) and request.round == 3:
            raise Stopped
        return replies


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by every way of merging, one client after the other."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ALL[1:]:
        run(a_job(folder, method), folder / str(method), engine="loop")
    return folder


def result(runs: Path, method: str) -> RunResult:
    return RunResult.read(runs / method)


@pytest.mark.parametrize("method", ["rolora", "flora", "fedsb"])
def test_a_run_that_was_stopped_has_the_same_bits(method: str, runs: Path, tmp_path: Path) -> None:
    job, out = a_job(runs, method), tmp_path / "stopped"
    population = Population.of(job)
    stops = Stops.of(population, memory=ClientStateStore(out / "memory", of_one_run=True))
    with pytest.raises(Stopped):
        run_job(job, stops, out, cached_test_set(population, None), report=False)
    assert hashes(run(job, out, resume=True)) == hashes(result(runs, method))


@pytest.mark.slow
@pytest.mark.processes
def test_worker_processes_give_the_same_bits(runs: Path, tmp_path: Path) -> None:
    """Which factor is trained doesn't depend on what a process trained before."""
    pooled = run(a_job(runs, "rolora"), tmp_path / "pool", workers=2)
    assert hashes(pooled) == hashes(result(runs, "rolora"))


@pytest.mark.parametrize("method", ALL[1:])
def test_every_round_says_how_far_each_layers_merge_is_from_the_mean_product(method: str, runs: Path) -> None:
    lines = [line["aggregation_error"]["layers"] for line in result(runs, method).rounds]
    assert all(len(layers) == len(lines[0]) > 1 for layers in lines)
    relative = max(layer["relative"] for layers in lines for layer in layers.values())
    assert relative <= 1e-6 if method in EXACT else relative > 1e-4


def test_clients_send_the_factors_that_they_train_and_no_more(runs: Path) -> None:
    sent = {method: result(runs, str(method)).bytes_up for method in ALL[1:]}
    down = {method: result(runs, str(method)).bytes_down for method in ALL[1:]}
    assert sent["fedsb"] < sent["ffa"] / 8 and down["fedsb"] < down["ffa"] / 8
    assert sent["ffa"] < sent["average"] == sent["fedex"] == sent["flora"] == sent["flexlora"]
    assert sent["rolora"] < sent["average"] and down["rolora"] == down["average"] < down["fedex"]


@pytest.mark.parametrize("method", ["rolora", "fedex", "flora", "flexlora", "fedsb"])
def test_transformers_and_peft_read_what_was_merged(method: str, runs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    learner, tensors = trained(runs / method)
    model = learner.filled(tensors)
    batch = model.backbone.preprocess_and_collate(["good a b", "bad bad c d"])
    with torch.inference_mode():
        expected = model.backbone.model(**batch).last_hidden_state.clone()
    (tmp_path / "out").mkdir()
    write_folder(model, learner.job, tmp_path / "out")
    base = AutoModel.from_pretrained(learner.job.backbone.name).eval()
    with torch.inference_mode():
        before = base(**batch).last_hidden_state.clone()
        merged = AutoModel.from_pretrained(tmp_path / "out").eval()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        for network in (merged, adapted):
            assert torch.allclose(network(**batch).last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_factors_of_a_convolution_and_of_gpt2s_layer_have_the_sum_of_both(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    network = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 5, 3), "gpt": Conv1D(6, 4)})
    pretrained = {name: layer.weight.detach().clone() for name, layer in network.items()}
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv", "gpt"]), network)
    lora_base.hold(network)
    sent = {name: torch.randn(zeros.shape) for name, zeros in lora_base.nothing_added(network).items()}
    with torch.no_grad():
        lora_base.load(network, sent | {f"{name}{B}": torch.randn(network.get_parameter(f"{name}{B}").shape)
                                        for name in pretrained})  # fmt: skip
    for name, layer in lora_base.lora_layers(network):
        whole = layer.get_base_layer().weight + layer.get_delta_weight("default") - pretrained[name]
        b, a = adapter_of(layer)
        product = b.flatten(1) @ a.flatten(1)
        assert torch.allclose(product.T if name == "gpt" else product.view_as(whole), whole, atol=1e-5)


def test_singular_factors_are_numpys_with_signs_that_do_not_depend_on_the_machine() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    factors = singular_factors(weight, 3)
    assert factors is not None
    np.testing.assert_allclose((factors.b * torch.tensor(s[:3])) @ factors.a, (u[:, :3] * s[:3]) @ v[:3])
    np.testing.assert_allclose(factors.b.T @ factors.b, np.eye(3), atol=1e-12)
    assert all(column[column.abs().argmax()] > 0 for column in factors.b.T)
    negative = singular_factors(-weight, 3)
    assert negative is not None and torch.equal(negative.b, factors.b) and torch.equal(negative.a, -factors.a)
    one = singular_factors(weight[:, :1] @ weight[:1], 3)  # of one direction: the others do nothing
    assert one is not None and one.b.shape == (7, 3) and one.a.shape == (3, 5)
    assert one.b[:, 0].any() and not one.b[:, 1:].any() and not one.a[1:].any()


def test_a_layer_with_a_core_gives_what_its_merged_weight_gives() -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"line": torch.nn.Linear(4, 6), "conv": torch.nn.Conv2d(3, 5, 3), "gpt": Conv1D(6, 4)}
    )
    inputs = {"line": torch.randn(2, 4), "conv": torch.randn(2, 3, 5, 5), "gpt": torch.randn(2, 4)}
    before = {name: layer(inputs[name]) for name, layer in network.items()}
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(network)), network)
    lora_base.fix_factors(network)
    for name, layer in lora_base.lora_layers(network):
        assert torch.equal(layer(inputs[name]), before[name])  # the core is zero
        core = layer.get_parameter(CORE[1:])
        with torch.no_grad():
            core.copy_(torch.randn(core.shape))
        b, a = (factor.double().flatten(1).numpy() for factor in adapter_of(layer))
        r = core.detach().double().flatten(1).numpy()
        basis = layer.get_parameter(BASIS[1:]).detach().double().flatten(1).numpy()
        np.testing.assert_allclose(b @ a, basis @ r @ a, atol=1e-6)
        expected = layer(inputs[name])
        layer.merge()
        assert not torch.allclose(expected, before[name], atol=1e-2)
        assert torch.allclose(layer(inputs[name]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 3), torch.eye(4, 3), torch.diag(torch.tensor([2.0, 1, 1]))]
)
def test_a_weight_whose_singular_vectors_are_not_determined_is_refused(weight: torch.Tensor) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    network = torch.nn.ModuleDict({"out": torch.nn.Linear(3, len(weight))})
    network["out"].weight = torch.nn.Parameter(weight)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["out"]), network)
    with pytest.raises(ConfigError, match="the weight of out, which is zero or has equal singular"):
        lora_base.fix_factors(network)


def test_a_weight_that_two_layers_share_is_none_that_a_server_adds_to() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    network = torch.nn.ModuleDict({"table": torch.nn.Embedding(4, 3), "out": torch.nn.Linear(3, 4)})
    network["out"].weight = network["table"].weight
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["out"]), network)
    with pytest.raises(ConfigError, match="out shares with another layer"):
        lora_base.hold(network)


def test_a_client_of_a_lower_rank_trains_its_part_of_the_factors_alone(runs: Path) -> None:
    job = a_job(runs, "flexlora", tune={"lora_ranks": {"client-1": 1}})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["good", "bad"]})
    rng = torch.Generator().manual_seed(0)
    sent = {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in learner.initial().items()}
    start = starts_by_rank(sent, {"client-1": 1}, ["client-0", "client-1"])
    assert list(start) == ["client-1"]
    shard = Population.of(job).whole(learner)
    update = train_model(
        learner, sent, shard, job, client="client-1", round=1, plan={}, begin=start["client-1"]
    )
    for name, tensor in sent.items():
        arrived = tensor + update.delta[name]
        if name.endswith((A, B)):
            row = arrived if name.endswith(A) else arrived.T
            assert not row[1:].any() and row[0].any()
        else:
            assert not torch.equal(arrived, tensor)


@pytest.mark.parametrize("method", ["rolora", "fedsb"])
def test_what_is_exact_adds_up_securely_to_what_it_adds_up_to_in_the_open(
    method: str, runs: Path, tmp_path: Path
) -> None:
    job = a_job(runs, method, federation={"secure_aggregation": True, "rounds": 2})
    run(job, tmp_path / "secure")
    run(a_job(runs, method, federation={"rounds": 2}), tmp_path / "open")
    (_, secure), (_, plain) = trained(tmp_path / "secure"), trained(tmp_path / "open")
    assert all(torch.allclose(secure[name], plain[name], atol=1e-4) for name in plain)
    assert "aggregation_error" not in (tmp_path / "secure" / "metrics.jsonl").read_text()


CLIENT = {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3, "seeded_noise": True}
EXAMPLE = {"unit": "example", "noise_multiplier": 0.5, "delta": 1e-5, "sampling_rate": 0.5}


@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsb"])
def test_clients_are_promised_privacy_with_exact_merges(method: str, runs: Path, tmp_path: Path) -> None:
    job = a_job(runs, method, privacy=CLIENT, federation={"rounds": 2})
    found = run(job, tmp_path / "private")
    assert found.privacy and all("aggregation_error" not in line for line in found.rounds)
    assert len(set(hashes(found))) == 2


@pytest.mark.parametrize(
    ("method", "tables", "line"),
    [
        ("fedex", {"federation": {"secure_aggregation": True}}, "needs each client's product"),
        ("flora", {"privacy": CLIENT}, "needs each client's product"),
        ("flexlora", {"privacy": EXAMPLE | {"where": "distributed"}}, "needs each client's product"),
        ("fedex", {"strategy": {"name": "fedadam"}}, "strategy.name"),
        ("rolora", {"strategy": {"lr": 0.5}}, "strategy.name"),
        ("flora", {"federation": {"compression": "int8"}}, "federation.error_feedback"),
        ("fedex", {"personal": {"keep": "mixture"}}, "personal.keep"),
        ("fedex", {"personal": {"keep": "lora-b"}}, "personal.keep"),
        ("ffa", {"personal": {"keep": "lora-b"}}, "personal.keep"),
        ("fedsb", {"personal": {"keep": "lora-b"}}, "personal.keep"),
        ("fedsb", {"tune": {"freeze_a": True}}, "tune.freeze_a"),
        ("fedex", {"tune": {"freeze_a": True}}, "tune.freeze_a"),
        ("fedex", {"tune": {"method": "full", "rank": None}}, "tune.lora_merge"),
        ("average", {"tune": {"lora_ranks": {"client-0": 1}}}, "tune.lora_ranks"),
        ("flexlora", {"tune": {"lora_ranks": {"client-0": 3}}}, "client-0 has 3"),
        ("flexlora", {"tune": {"lora_ranks": {"client-0": 1}}, "privacy": EXAMPLE}, "tune.lora_ranks"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    method: str, tables: dict[str, Any], line: str, runs: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        a_job(runs, method, **tables)


@pytest.mark.parametrize("method", ["fedex", "fedsb"])
@pytest.mark.parametrize(
    "tables",
    [
        {"privacy": EXAMPLE | {"seeded_noise": True}, "federation": {"rounds": 1}},
        {"federation": {"rounds": 1, "compression": "fp16", "error_feedback": False}},
    ],
)
def test_products_of_noised_and_of_compressed_updates_merge_exactly(
    tables: dict[str, Any], method: str, runs: Path, tmp_path: Path
) -> None:
    [line] = run(a_job(runs, method, **tables), tmp_path / "run").rounds
    assert all(layer["relative"] < 1e-6 for layer in line["aggregation_error"]["layers"].values())


def test_with_own_b_clients_send_a_and_each_keeps_another_b(runs: Path, tmp_path: Path) -> None:
    job = a_job(runs, None, personal={"keep": "lora-b"})
    out = tmp_path / "run"
    found = run(job, out)
    assert not [name for name in found.trainable if name.endswith(B)]
    assert [name for name in found.trainable if name.endswith(A)]
    memory = ClientStateStore(out / "memory", of_one_run=True)
    population, run_name = Population.of(job), run_key(job, out)
    own = [memory.load_before(run_name, client, 9) for client in population.names(job)]
    assert all(any(b.any() for name, b in kept.items() if name.endswith(B)) for kept in own)
    assert not [name for kept in own for name in kept if not name.endswith(B)]
