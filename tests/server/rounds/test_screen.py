"""Updates are checked before they are merged (catalogue rows 70-78)."""

import pytest
import torch

from atoll.protocol.messages import CHARGED_ROUNDS, LOCAL_STEPS, RECEIVED_LOSS, Failure, Measurement, Update
from atoll.protocol.stacked_updates import stacked
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.validation import Validation, validate_updates
from tests.support.small import image_job

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-5, "clipping_norm": 1.0}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5}
EXAMPLE_OF_BOTH = {key: value for key, value in EXAMPLE.items() if key != "unit"}
CLIENT_OF_BOTH = {key: value for key, value in CLIENT.items() if key != "unit"}
BOTH = {"unit": "both", "example": EXAMPLE_OF_BOTH, "client": CLIENT_OF_BOTH}
MODEL = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
STATES = {"train_loss.sum": torch.tensor(1.0).double(), "train_loss.count": torch.tensor(2.0).double()}


def update(
    client: str = "a", round: int = 4, n: object = 5, states: Tensors = STATES, **delta: torch.Tensor
) -> Update:
    return Update(client, round, {**{k: torch.ones_like(v) for k, v in MODEL.items()}, **delta}, n, states)  # type: ignore[arg-type]


BAD = {
    "nan": (update(w=torch.full((2, 3), torch.nan)), "not finite"),  # row 70
    "inf": (update(b=torch.tensor([0.0, torch.inf, 0.0])), "not finite"),
    "huge": (update(w=torch.full((2, 3), 1e30)), "norm is"),  # row 71
    "broadcastable": (update(b=torch.ones(1)), r"shape \(1,\), expected \(3,\)"),  # row 72
    "scalar": (update(b=torch.tensor(1.0)), r"shape \(\), expected"),
    "transposed": (update(w=torch.ones(3, 2)), "shape"),
    "int64": (update(b=torch.ones(3, dtype=torch.int64)), r"torch\.int64, expected torch\.float32"),  # row 73
    "complex": (update(b=torch.ones(3, dtype=torch.complex64)), "complex64"),
    "half": (update(b=torch.ones(3, dtype=torch.float16)), "float16"),
    "extra": (update(x=torch.ones(1)), "tensor x is unexpected"),  # row 74
    "missing": (Update("a", 4, {"w": torch.ones(2, 3)}, 5, STATES), "tensor b is missing"),
    "no examples": (update(n=0), "num_examples"),  # row 75
    "negative": (update(n=-100), "num_examples"),
    "too many": (update(n=10**12), "num_examples"),
    "text": (update(n="12"), "num_examples"),
    "bool": (update(n=True), "num_examples"),
    "fraction": (update(n=1.5), "num_examples"),
    "stale": (update(round=3), "reply to round 3, expected round 4"),  # row 76
    "future": (update(round=5), "reply to round 5"),
    "stranger": (update(client="z"), "not in this round's cohort"),  # row 77
    "million states": (
        update(states={f"s{i}": torch.tensor(0.0) for i in range(10**4)}),
        "metric states",
    ),  # row 78
    "nan state": (update(states={**STATES, "train_loss.sum": torch.tensor(torch.nan)}), "not one finite"),
    "big state": (update(states={**STATES, "train_loss.sum": torch.ones(10**6)}), "not one finite"),
    "no steps": (update(states={**STATES, LOCAL_STEPS: torch.tensor(0.0)}), "expected more than 0"),
    "charged nothing": (update(states={**STATES, CHARGED_ROUNDS: torch.tensor(0.0)}), "from 1 to 1000000"),
    "charged a half": (update(states={**STATES, CHARGED_ROUNDS: torch.tensor(1.5)}), "found 1.5"),
    "charged for ever": (update(states={**STATES, CHARGED_ROUNDS: torch.tensor(2e6)}), "found 2e"),
    "loss below 0": (
        update(states={**STATES, RECEIVED_LOSS: torch.tensor(-1.0)}),
        "expected at least 0, found -1",
    ),
    "complex state": (
        update(states={**STATES, "train_loss.sum": torch.tensor(1j)}),
        "train_loss.sum is not one finite number",
    ),
    "complex steps": (update(states={**STATES, LOCAL_STEPS: torch.tensor(1 + 0j)}), "not one finite number"),
    "bool rounds": (update(states={**STATES, CHARGED_ROUNDS: torch.tensor(True)}), "not one finite number"),
    "tiny floats": (
        update(states={**STATES, RECEIVED_LOSS: torch.tensor(1.0).to(torch.float8_e4m3fn)}),
        "not one finite number",
    ),
    "failure": (Failure("a", "disk full"), "disk full"),
    "measurement": (Measurement("a", 4, 3, {}), "sent a measurement"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_is_set_aside_with_its_reason_and_the_others_stay(name: str) -> None:
    import re

    bad, pattern = BAD[name]
    found = validate_updates([bad, update("b")], ["a", "b"], MODEL, 4)
    assert [u.client for u in found.updates] == ["b"]
    assert re.search(pattern, found.set_aside[bad.client])
    assert set(found.set_aside) <= {"a", "z"}


def test_good_updates_come_in_canonical_order_whatever_the_arrival() -> None:
    names = ["c", "a", "b"]
    found = validate_updates([update(n) for n in names], names, MODEL, 4)
    assert [u.client for u in found.updates] == ["a", "b", "c"]
    assert found.set_aside == {}


def test_a_duplicate_counts_once() -> None:  # row 76
    found = validate_updates([update(n=5), update(n=7)], ["a"], MODEL, 4)
    assert [u.num_examples for u in found.updates] == [5]
    assert "duplicate" in found.set_aside["a (again)"]


def test_silence_is_noted_by_name() -> None:
    assert validate_updates([], ["a"], MODEL, 4).set_aside == {"a": "no reply before the deadline"}


@pytest.mark.parametrize(
    ("strategy", "state"), [("fednova", LOCAL_STEPS), ("qffl", RECEIVED_LOSS), ("afl", RECEIVED_LOSS)]
)
def test_who_keeps_back_what_the_strategy_needs_is_set_aside_and_ends_no_run(
    strategy: str, state: str
) -> None:
    validation = Validation.of(image_job("raw:pixels", strategy={"name": strategy}))
    told = {**STATES, state: torch.tensor(2.0).double()}
    found = validation([update("a"), update("b", states=told)], ["a", "b"], MODEL, 4)
    assert [u.client for u in found.updates] == ["b"]
    assert found.set_aside == {"a": f"metric state {state} is missing"}


@pytest.mark.parametrize("privacy", [EXAMPLE, BOTH])
@pytest.mark.parametrize("together", [False, True])
def test_an_update_under_a_promise_tells_how_often_its_client_was_charged(
    privacy: dict[str, object], together: bool
) -> None:
    """Without it the run's epsilon would be a number of others' charges, or none."""
    validation = Validation.of(image_job("raw:pixels", privacy=privacy))
    told = {**STATES, CHARGED_ROUNDS: torch.tensor(2.0).double()}
    silent = [update("a"), update("b")]
    replies = stacked(silent) if together else [*silent[:1], update("b", states=told)]
    found = validation(replies, ["a", "b"], MODEL, 4)
    assert [u.client for u in found.updates] == ([] if together else ["b"])
    assert found.set_aside["a"] == f"metric state {CHARGED_ROUNDS} is missing"
    assert not Validation.of(image_job("raw:pixels", privacy=CLIENT)).needed  # its noise is the server's
