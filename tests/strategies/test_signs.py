"""Signs in a bit each: EF-signSGD and majority votes in NumPy, closed forms, whole runs, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.client.state import error_feedback
from atoll.client.state.store import ClientStateStore
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.compression import COLUMNS, Compression, compress, decompress, in_bits, mean_sizes
from atoll.protocol.messages import Update, encode_reply
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import Request, TrainRequest
from atoll.protocol.stacked_updates import stacked
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.decompression import decompressed
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import books_in
from atoll.sim.population.population import Population
from atoll.strategies.few_bytes.signsgd import SignSgd
from tests.client.state.test_client_state import Array, final
from tests.server.rounds.test_asynchronous import Trained
from tests.sim.test_simulation import Breaks, run
from tests.strategies.test_strategy_runs import EXAMPLE, of_eight

MODEL: Tensors = {"b": torch.zeros(3), "a": torch.zeros(2, 5)}
SIGNS = {"compression": "sign", "error_feedback": False}


def voting(federation: dict[str, Any] | None = None, lr: float = 0.01, **tables: Any) -> Job:
    section = {"strategy": {"name": "signsgd", "lr": lr}} | tables
    return of_eight("signsgd", federation=SIGNS | (federation or {}), **section)


def feeding_back(*, feedback: bool = True) -> Job:
    return of_eight("fedavg", federation={"compression": "sign", "error_feedback": feedback})


def arrived(
    deltas: Sequence[Tensors], setting: Job, round: int, memory: ClientStateStore, model: Tensors
) -> list[Tensors]:
    """What the server has of clients' deltas in a round."""
    request = TrainRequest(setting.canonical, setting.hash, round, {}, model, run="r")
    updates = [Update(f"c{i}", round, delta, 1) for i, delta in enumerate(deltas)]
    sent = error_feedback.compressed(iter(updates), request, setting, memory)
    return [update.delta for update in decompressed(sent, setting, model) if isinstance(update, Update)]


def test_with_feedback_it_is_ef_signsgd_with_a_scale_for_each_tensor() -> None:
    """Karimireddy et al. 2019, algorithm 1, on three clients' quadratics in NumPy, float64."""
    setting, memory, draw = feeding_back(), ClientStateStore(), np.random.default_rng(4)
    centres = [{n: draw.normal(size=t.shape) for n, t in MODEL.items()} for _ in range(3)]
    x = {n: np.zeros(t.shape) for n, t in MODEL.items()}
    errors = [{n: np.zeros(t.shape) for n, t in MODEL.items()} for _ in range(3)]
    model, gamma = dict(MODEL), 0.2
    for round in range(1, 31):
        deltas = [{n: gamma * (torch.tensor(c[n]).float() - model[n]) for n in model} for c in centres]
        sent = arrived(deltas, setting, round, memory, model)
        means = {n: torch.stack([delta[n] for delta in sent]).mean(0) for n in model}
        steps = {n: np.zeros_like(x[n]) for n in x}
        for centre, e in zip(centres, errors, strict=True):
            for n in x:
                p = gamma * (centre[n] - x[n]) + e[n]
                c = np.abs(p).sum() / p.size * np.where(p >= 0, 1.0, -1.0)
                e[n], steps[n] = p - c, steps[n] + c / 3
        for n in x:
            model[n], x[n] = model[n] + means[n], x[n] + steps[n]
    for n in x:
        np.testing.assert_allclose(model[n].numpy(), x[n], atol=1e-5)


@pytest.mark.parametrize("feedback", [True, False])
def test_feedback_leads_where_signs_alone_never_go(feedback: bool) -> None:
    """f(x) = |x1 + x2| / 2 + |x1 - x2|, whose gradients' signs never leave the line x1 + x2 = 2.

    Karimireddy et al. 2019, counterexample 2.
    """
    setting, memory, model = feeding_back(feedback=feedback), ClientStateStore(), {"x": torch.ones(2)}
    for round in range(1, 400):
        x1, x2 = model["x"].tolist()
        along, across = (1 if x1 + x2 > 0 else -1), (1 if x1 - x2 > 0 else -1)
        gradient = torch.tensor([0.5 * along + across, 0.5 * along - across])
        [delta] = arrived([{"x": -0.01 * gradient}], setting, round, memory, model)
        model = {"x": model["x"] + delta["x"]}
    assert float(model["x"].sum()) == pytest.approx(0.0 if feedback else 2.0, abs=0.1)


def test_a_message_has_a_bit_for_each_number_and_a_scale_for_each_tensor() -> None:
    model = {"w": torch.zeros(100, 37), "b": torch.zeros(100), "one": torch.zeros(1)}
    how = Compression.of(feeding_back(), model)
    assert how is not None
    [row] = torch.randn(1, 3801, generator=torch.Generator().manual_seed(1))
    delta = {name: tensor[0] for name, tensor in compress(row.unsqueeze(0), how).items()}
    head, body = encode_reply(Update("a", 1, delta, 5))
    table = 8 + int.from_bytes(body[:8], "little")  # safetensors' names and places
    assert len(body) - table == how.bytes == 476 + 3 * 4  # 3801 / 8 = 475.1
    assert len(head) + table < 1000
    signs = [int(value >= 0) for value in row.tolist()] + [0] * 7
    expected = [sum(signs[8 * k + i] << i for i in range(8)) for k in range(476)]
    assert delta["values"].tolist() == expected
    scales = [row[:100].abs().mean(), row[100], row[101:].abs().mean()]
    torch.testing.assert_close(delta["scales"], torch.stack([abs(scale) for scale in scales]))


def test_what_arrives_by_hand() -> None:
    how = Compression("sign", 5, sizes=(2, 3))
    packed = compress(torch.tensor([[1.0, -3.0, 0.0, 0.5, -1.0]]), how)
    assert packed["values"].tolist() == [[0b01101]]
    assert decompress(packed, how).tolist() == [[2.0, -2.0, 0.5, 0.5, -0.5]]


@pytest.mark.parametrize("numbers", [1, 7, 300, COLUMNS + 1, 3 * COLUMNS - 5])
def test_scales_are_numpys_means_and_the_same_whoever_stands_beside(numbers: int) -> None:
    x = torch.randn(3, numbers, generator=torch.Generator().manual_seed(numbers))
    found = mean_sizes(x, [numbers])
    np.testing.assert_allclose(found[:, 0].numpy(), np.abs(x.double().numpy()).mean(1), rtol=1e-7)
    assert torch.equal(mean_sizes(x[1:2], [numbers])[0], found[1])


def test_a_zero_gets_a_coin_where_nothing_is_fed_back() -> None:
    """So that what moves at no client doesn't drift to one side."""
    how, zeros = Compression("sign", 4000), torch.zeros(1, 4000)
    coins = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(compress(zeros, how, coins)["values"], in_bits(coins < 0.5))
    assert torch.equal(compress(zeros, how)["values"], torch.full((1, 500), 255, dtype=torch.uint8))
    others = torch.full((1, 4000), -1e-9)
    assert torch.equal(compress(others, how, coins)["values"], torch.zeros(1, 500, dtype=torch.uint8))


def updates_of(rows: Sequence[Sequence[float]]) -> list[Update]:
    return [Update(f"c{i}", 1, {"w": torch.tensor(row)}, i + 1) for i, row in enumerate(rows)]


VOTES = st.integers(1, 5).flatmap(
    lambda numbers: st.lists(
        st.lists(st.sampled_from([-2.0, -0.1, 0.0, 3.0]), min_size=numbers, max_size=numbers),
        min_size=1,
        max_size=7,
    )
)


@given(VOTES)
def test_the_step_is_the_majoritys_counted_one_by_one(rows: list[list[float]]) -> None:
    expected = []
    for column in zip(*rows, strict=True):
        up, down = sum(value > 0 for value in column), sum(value < 0 for value in column)
        expected.append(1.0 + 0.25 * ((up > down) - (down > up)))
    for form in (list, stacked):
        updates: Any = form(updates_of(rows))
        found, state = SignSgd(0.25).merge({"w": torch.ones(len(rows[0]))}, updates, {})
        assert found["w"].tolist() == expected and state == {}


@given(VOTES, st.integers(0, 10_000))
def test_fewer_than_half_of_the_clients_change_nothing_that_the_others_agree_on(
    rows: list[list[float]], seed: int
) -> None:
    draw, honest = np.random.default_rng(seed), [1.0 if value >= 0 else -1.0 for value in rows[0]]
    whole = [list(honest) for _ in range(len(rows) + 1)]
    hostile = draw.choice([-1e9, 0.0, 1e9], size=(len(rows), len(honest))).tolist()
    model = {"w": torch.zeros(len(honest))}
    alone, _ = SignSgd().merge(model, updates_of(whole), {})
    among, _ = SignSgd().merge(model, updates_of(whole + hostile), {})
    assert torch.equal(alone["w"], among["w"]) and bool((alone["w"] != 0).all())


def test_votes_on_quadratics_lead_to_the_median_of_their_minima() -> None:
    """Of f_m(x) = |x - a_m|² / 2 most gradients point to the median of the a_m, in every number."""
    centres = torch.randn(5, 40, generator=torch.Generator().manual_seed(8))
    model, memory, setting = {"w": torch.zeros(40)}, ClientStateStore(), voting()
    for round in range(1, 121):
        deltas = [{"w": 0.1 * (centre - model["w"])} for centre in centres]
        sent = arrived(deltas, setting, round, memory, model)
        model, _ = SignSgd(0.02).merge(model, [Update("c", round, delta, 1) for delta in sent], {})
    assert float((model["w"] - centres.median(0).values).abs().max()) <= 0.0201


def test_a_run_is_algorithm_1_of_its_paper(tmp_path: Path) -> None:
    """In NumPy, float64: heads on digits' pixels, of which some are dark in all pictures of a client."""
    setting = voting({"rounds": 3}, train={"lr": 0.5, "batch_size": 16})
    result = run(setting, tmp_path)
    problem = Trained(setting)
    x = problem.start
    for line in result.rounds:
        votes = np.zeros_like(x)
        for client in line["cohort"]:
            delta = problem.trained(x, client, line["round"], 0.5) - x
            generator = stream(setting.seed, "rounding", line["round"], client)
            coins = torch.rand(x.size, generator=generator, dtype=torch.float64).numpy()
            by_class = np.hstack([coins[10:].reshape(10, -1), coins[:10, None]])  # names: bias, weight
            votes += np.where(delta == 0, np.where(by_class < 0.5, 1, -1), np.sign(delta))
        x = x + 0.01 * np.sign(votes)
        assert line["set_aside"] == {}
    np.testing.assert_allclose(final(tmp_path, "model/"), x, rtol=0, atol=1e-6)
    assert result.bytes_up == 3 * 7 * (242 + 2 * 4)  # 1930 numbers of two tensors


def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path: Path) -> None:
    setting = voting(strategy={"name": "signsgd", "lr": 0.01, "lr_schedule": "cosine"})
    whole = run(setting, tmp_path / "whole").model_sha256
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole
    population, (_, memory) = Population.of(setting), books_in(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        run_job(
            setting, Breaks.of(population, memory=memory), tmp_path / "r", cached_test_set(population, None)
        )
    assert run(setting, tmp_path / "r", resume=True).model_sha256 == whole


class Flips(InlineTransport):
    """Three clients turn every bit of their message round."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            hostile = isinstance(reply, Update) and reply.client in (
                "client-0001",
                "client-0004",
                "client-0006",
            )
            yield replace(reply, delta=turned_round(reply.delta)) if hostile else reply


def turned_round(delta: Tensors) -> Tensors:
    last = torch.full_like(delta["values"], 255)
    last[-1] = 0b11  # 1930 numbers
    return delta | {"values": delta["values"] ^ last}


def test_a_vote_learns_where_three_of_eight_turn_their_signs_round(tmp_path: Path) -> None:
    data = {"source": "digits", "partition": {"kind": "iid"}}
    setting = voting({"cohort": 8, "rounds": 14}, lr=0.05, data=data, evaluate={"every": 14})

    def accuracy(kind: Callable[..., Any], name: str) -> float:
        population = Population.of(setting)
        out, test = tmp_path / name, cached_test_set(population, None)
        result = run_job(setting, kind(population), out, test, report=False)
        return float(result.rounds[-1]["metrics"]["accuracy"])

    honest, attacked = accuracy(InlineTransport.of, "honest"), accuracy(Flips.of, "attacked")
    assert honest > 0.8 and attacked > 0.65  # by chance 0.1


@pytest.mark.parametrize(
    "tables",
    [
        {"privacy": EXAMPLE | {"seeded_noise": True}},
        {"strategy": {"name": "trimmed-mean"}, "federation": {"compression": "sign"}},
        {"strategy": {"name": "fedavg"}, "federation": {"compression": "sign"}, "privacy": {
            "unit": "client", "noise_multiplier": 0.5, "delta": 1e-3, "seeded_noise": True,
        }},
    ],
    ids=["votes of noised updates", "a robust rule", "a client's promise"],
)  # fmt: skip
def test_signs_go_with_noise_and_with_robust_rules(tmp_path: Path, tables: dict[str, Any]) -> None:
    table: dict[str, Any] = {"federation": SIGNS, "strategy": {"name": "signsgd"}} | tables
    table["federation"] = table["federation"] | {"rounds": 1}
    [line] = run(of_eight("signsgd", **table), tmp_path).rounds
    assert line["set_aside"] == {}


CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
NETWORK = {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32}


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        (
            {"federation": {}},
            r"federation\.compression: signsgd counts signs, .* expected 'sign', found None",
        ),
        ({"federation": {"compression": "int8"}}, r"federation\.compression: .* found 'int8'"),
        (
            {"federation": {"compression": "sign"}},
            r"federation\.error_feedback: .* expected false, found true",
        ),
        ({"privacy": CLIENT}, r"strategy\.name: expected one of fedavg, .* found 'signsgd'"),
        ({"federation": SIGNS | {"secure_aggregation": True}}, r"federation\.compression: a secure sum adds"),
        ({"federation": SIGNS | {"weights": "equal"}}, r"federation\.weights: signsgd has a rule of its own"),
        ({"federation": SIGNS | {"selection": "by-size"}}, r"federation\.selection: 'by-size' weighs"),
        ({"federation": SIGNS | {"concurrency": 7}}, r"strategy\.name: federation\.concurrency"),
        ({"tune": {"method": "seeds"}, "backbone": NETWORK}, r"strategy\.name: .* would vote by a coin"),
        ({"attack": {"kind": "sign-flip"}}, r"attack\.kind: .* federation\.compression"),
    ],
)
def test_what_a_vote_has_no_meaning_with_is_refused_by_name(tables: dict[str, Any], line: str) -> None:
    table = {"federation": SIGNS} | tables
    with pytest.raises(ConfigError, match=line) as caught:
        of_eight("signsgd", **table)
    assert "\n" not in str(caught.value)


ROWS: Array = np.array([[1.0, -1.0], [1.0, 1.0]])


def test_a_tensor_that_did_not_move_does_not_vote() -> None:
    still, setting, model = {"w": torch.zeros(2)}, voting(), {"w": torch.zeros(2)}
    moved = [{"w": torch.tensor(row).float()} for row in ROWS]
    sent = arrived([still, still, still, *moved], setting, 1, ClientStateStore(), model)
    merged, _ = SignSgd(0.5).merge(model, [Update(str(i), 1, d, 1) for i, d in enumerate(sent)], {})
    assert merged["w"].tolist() == [0.5, 0.0]
