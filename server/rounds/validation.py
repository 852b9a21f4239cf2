"""Look at every update before it is merged; a bad one is set aside with its client's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from atoll.job.job import Job
from atoll.job.privacy import charges_clients
from atoll.protocol.messages import (
    CHARGED_ROUNDS,
    CLUSTER,
    LOCAL_STEPS,
    RECEIVED_LOSS,
    Failure,
    Measurement,
    Reply,
    SecureMessage,
    Update,
)
from atoll.protocol.stacked_updates import StackedUpdates, clients_of
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import sent_numbers
from atoll.strategies.options import clusters_of, trusted_client

STATES = {"train_loss.sum", "train_loss.count"}
SOMETIMES = {CHARGED_ROUNDS, CLUSTER, LOCAL_STEPS, RECEIVED_LOSS}
"""States that updates have only where a promise of privacy or the strategy requires them."""
NUMBERS = {torch.float64, torch.float32, torch.int64}
"""The valid dtypes of a state: of others, such as complex numbers, not everything here can be asked."""
RANGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    CHARGED_ROUNDS: (
        "a whole number from 1 to 1000000",
        lambda value: (value >= 1) & (value <= MAX_CHARGED) & (value == value.floor()),
    ),
    CLUSTER: ("a whole number of at least 0", lambda value: (value >= 0) & (value == value.floor())),
    LOCAL_STEPS: ("more than 0", lambda value: value > 0),
    RECEIVED_LOSS: ("at least 0", lambda value: value >= 0),
}
"""The valid values of a state: a description for messages, and a test of a tensor's values."""
NOTHING_SENT: Tensors = {}
MAX_EXAMPLES = 1_000_000_000
MAX_CHARGED = 1_000_000
"""The largest valid number of a run's rounds in a client's ledger."""
MAX_LOSS = 1e30
"""The largest valid mean training loss, where clients are chosen by their losses."""
MAX_NORM = 1e6
"""The largest valid L2 norm of a delta."""


@dataclass(frozen=True)
class ValidatedUpdates:
    """A round's usable updates in the order of client names, and the reason why each other was set aside.

    A single update may stand for `num_clients` clients, as after a secure sum. In a closed-form round,
    `by_client` holds each client's statistics and `statistics` their sum. `charged_rounds` is the largest
    number of the run's rounds in any client's ledger.
    """

    updates: Sequence[Update]
    set_aside: dict[str, str]
    num_clients: int | None = None
    statistics: Tensors = field(default_factory=dict)
    by_client: Mapping[str, Tensors] = field(default_factory=dict)
    charged_rounds: int = 0
    staleness: Sequence[int] = ()
    """For each update, how many merges happened since its client started; empty in synchronous rounds."""
    assigned_steps: Mapping[str, int] = field(default_factory=dict)
    """By client, how many local steps the server gave it; empty where the job says how many."""

    @property
    def num_valid(self) -> int:
        """How many clients the updates come from."""
        return len(self.updates) if self.num_clients is None else self.num_clients

    def without_tensors(self) -> Self:
        """The same without the updates' tensors, which are large and not needed after the merge."""
        if isinstance(self.updates, StackedUpdates):
            return self
        return replace(self, updates=[replace(one, delta={}, strategy_tensors={}) for one in self.updates])

    def without(self, faults: Mapping[str, str]) -> Self:
        """The same with further updates set aside: `faults` maps each client's name to the reason."""
        if not faults:
            return self
        usable = tuple(update for update in self.updates if update.client not in faults)
        return replace(self, updates=usable, set_aside=dict(sorted({**self.set_aside, **faults}.items())))

    @property
    def num_diverged(self) -> int:
        """How many clients sent values that aren't finite; from the same model and seed they would again."""
        return sum(why.endswith(DIVERGED) for why in self.set_aside.values())


DIVERGED = ("is not finite", "are not finite", "is not one finite number")
"""Endings of the reasons for setting aside an update with values that aren't finite."""


@dataclass(frozen=True)
class Validation:
    """Sorts a round's replies into usable updates and updates that are set aside with a reason.

    With client-level privacy no value is inspected, since the decision would depend on private data. Under
    example-level privacy the updates carry their noise already, so their values may be inspected.
    """

    inspects_values: bool
    needed: frozenset[str] = frozenset()
    """Names of states without which an update can't be merged, or what it cost can't be told."""
    clusters: int = 0
    """The number of cluster models that clients choose from; 0 where there are no clusters."""
    root: str | None = None
    """The client whose update the strategy compares all others with; None where there is no such client."""
    needs_losses: bool = False
    """Whether later cohorts are chosen by clients' training losses, which must then be finite."""

    @classmethod
    def of(cls, job: Job) -> Self:
        """The validation that a job's updates need."""
        steps = {LOCAL_STEPS} if job.strategy.name == "fednova" else set()
        losses = {RECEIVED_LOSS} if job.strategy.sends_losses else set()
        chosen = {CLUSTER} if job.strategy.makes_clusters else set()
        charged = {CHARGED_ROUNDS} if charges_clients(job) else set()
        return cls(
            "client" not in job.privacy.units,
            frozenset(steps | losses | chosen | charged),
            clusters_of(job),
            trusted_client(job),
            job.federation.chooses_by_losses,
        )

    def __call__(
        self,
        replies: Iterable[Reply],
        names: Sequence[str],
        model: Tensors,
        round: int,
        sent: Tensors = NOTHING_SENT,
    ) -> ValidatedUpdates:
        """The validated replies of the clients `names`; a client that sent none is set aside.

        `model` holds the tensors that the request sent to the clients, `sent` the strategy's further tensors.
        """
        validated = self._validated(replies, names, model, round, sent)
        validated = validated if self.root is None else _judged_by(validated, self.root)
        return _with_losses(validated) if self.needs_losses else validated

    def _validated(
        self, replies: Iterable[Reply], names: Sequence[str], model: Tensors, round: int, sent: Tensors
    ) -> ValidatedUpdates:
        blind = not self.inspects_values
        if isinstance(replies, StackedUpdates) and self.needed <= replies.states.keys():
            return validate_stacked(replies, names, model, round, sent, blind=blind)
        validated = validate_updates(replies, names, model, round, sent, blind=blind)
        return self._with_what_is_needed(validated) if self.needed else validated

    def _with_what_is_needed(self, validated: ValidatedUpdates) -> ValidatedUpdates:
        return validated.without(
            {u.client: fault for u in validated.updates if (fault := self._lack(u.states))}
        )

    def _lack(self, states: Tensors) -> str | None:
        for name in sorted(self.needed - states.keys()):
            return f"metric state {name} is missing"
        if self.clusters and int(states[CLUSTER]) >= self.clusters:
            return f"metric state {CLUSTER}: expected 0 to {self.clusters - 1}, found {int(states[CLUSTER])}"
        return None


def _judged_by(validated: ValidatedUpdates, root: str) -> ValidatedUpdates:
    """The same updates, or none where the update of `root` is missing, which the others are compared with."""
    if root in clients_of(validated.updates):
        return validated
    why = f"nothing to compare it with: no usable update of {root}"
    return validated.without(dict.fromkeys(clients_of(validated.updates), why))


def _with_losses(validated: ValidatedUpdates) -> ValidatedUpdates:
    """The updates whose mean training loss is valid; the others are set aside."""
    sums, counts = (_sent(validated.updates, f"train_loss.{part}") for part in ("sum", "count"))
    return validated.without(
        {name: fault for name in sums if (fault := _loss_fault(sums[name], counts[name]))}
    )


def _sent(updates: Sequence[Update], name: str) -> dict[str, float]:
    return sent_numbers(updates, name) if updates else {}


def _loss_fault(total: float, count: float) -> str | None:
    if not count > 0:
        return f"metric state train_loss.count: expected more than 0, found {count:g}"
    if not abs(total / count) <= MAX_LOSS:
        return f"the mean training loss is {total / count:g}, expected at most {MAX_LOSS:.0g}"
    return None


def validate_stacked(
    updates: StackedUpdates,
    cohort: Sequence[str],
    model: Tensors,
    round: int,
    sent: Tensors = NOTHING_SENT,
    *,
    blind: bool = False,
) -> ValidatedUpdates:
    """As `validate_updates`, for stacked updates: all clients' norms are computed together.

    If any update looks wrong, the whole cohort is validated client by client.
    """
    order = sorted(range(len(updates)), key=updates.clients.__getitem__)
    whole = updates.take(order)
    as_expected = (
        whole.clients == tuple(sorted(cohort))
        and whole.round == round
        and _are_stacks_of(whole.delta, model)
        and _are_stacks_of(whole.strategy_tensors, sent)
        and all(_fewest(blind) <= n <= MAX_EXAMPLES for n in whole.num_examples)
        and all(state.dtype in NUMBERS for state in whole.states.values())
    )
    if as_expected and (blind or _values_are_sound(whole)):
        return ValidatedUpdates(whole, {})
    return validate_updates(updates, cohort, model, round, sent, blind=blind)


def _are_stacks_of(stacks: Tensors, tensors: Tensors) -> bool:
    form = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    return {name: (t.shape[1:], t.dtype) for name, t in stacks.items()} == form


def _fewest(blind: bool) -> int:
    """The least valid `num_examples` of an update; 0 under a promise, where the number is not used."""
    return 0 if blind else 1


def _values_are_sound(whole: StackedUpdates) -> bool:
    sets = [whole.delta, whole.strategy_tensors] if whole.strategy_tensors else [whole.delta]
    small = all(bool((_norms(tensors) <= MAX_NORM).all()) for tensors in sets)
    return small and _states_are_sound(whole.states)


def _norms(delta: Tensors) -> torch.Tensor:
    """L2 norm of each client's delta, [clients]; not finite where a value isn't."""
    each = [torch.linalg.vector_norm(t.flatten(1), dim=1) for t in delta.values()]
    norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(each).to(torch.float64), dim=0)
    return norms


def _states_are_sound(states: Tensors) -> bool:
    """Whether all stacked states have valid values; client-by-client validation finds out whose don't."""
    finite = all(bool(torch.isfinite(t).all()) for t in states.values())
    in_range = all(bool(fits(states[name]).all()) for name, (_, fits) in RANGES.items() if name in states)
    return set(states) - SOMETIMES == STATES and finite and in_range


def validate_updates(
    replies: Iterable[Reply],
    cohort: Sequence[str],
    model: Tensors,
    round: int,
    sent: Tensors = NOTHING_SENT,
    *,
    blind: bool = False,
) -> ValidatedUpdates:
    """Sort a round's replies into usable and set aside; clients that didn't reply are set aside too.

    With `blind`, nothing that depends on a client's data is inspected: no value and no norm.
    """
    good: dict[str, Update] = {}
    aside: dict[str, str] = {}
    for reply in replies:
        fault = _fault(reply, cohort, model, round, blind=blind)
        if fault is None and isinstance(reply, Update):
            fault = _answer_fault(reply.strategy_tensors, sent, blind=blind)
        if fault is None and reply.client in good:
            aside[f"{reply.client} (again)"] = "duplicate reply; the first one counts"
        elif fault is None and isinstance(reply, Update):
            good[reply.client] = reply
        else:
            aside[reply.client] = fault or f"unexpected {type(reply).__name__}"
    for name in cohort:
        if name not in good and name not in aside:
            aside[name] = "no reply before the deadline"
    return ValidatedUpdates(tuple(good[name] for name in sorted(good)), dict(sorted(aside.items())))


def _fault(reply: Reply, cohort: Sequence[str], model: Tensors, round: int, *, blind: bool) -> str | None:
    if reply.client not in cohort:
        return "not in this round's cohort"
    match reply:
        case Failure():
            return reply.reason
        case Measurement():
            return "sent a measurement, expected an update"
        case SecureMessage():
            return "sent a part of a secure sum, expected an update"
    if reply.round != round:
        return f"reply to round {reply.round}, expected round {round}"
    n = reply.num_examples
    least = _fewest(blind)
    if not isinstance(n, int) or isinstance(n, bool) or not least <= n <= MAX_EXAMPLES:
        return f"num_examples: expected an integer from {least} to {MAX_EXAMPLES}, found {n!r}"
    fault = _shape_fault(reply.delta, model) or _states_fault(reply.states, blind=blind)
    return fault or (None if blind else _value_fault(reply.delta))


def _answer_fault(answer: Tensors, sent: Tensors, *, blind: bool) -> str | None:
    """What is wrong with an update's answer to the strategy's tensors; None if nothing is."""
    fault = _shape_fault(answer, sent) or (None if blind else _value_fault(answer))
    return None if fault is None else f"answer to the strategy: {fault}"


def _states_fault(states: Tensors, *, blind: bool) -> str | None:
    if set(states) - SOMETIMES != STATES:
        return f"metric states: expected train_loss.sum and train_loss.count, found {sorted(states)[:5]}"
    faults = (state_fault(name, value, blind=blind) for name, value in states.items())
    return next((fault for fault in faults if fault is not None), None)


def state_fault(name: str, value: torch.Tensor, *, blind: bool = False) -> str | None:
    """What is wrong with a metric state of that name; None if nothing is."""
    if value.dtype not in NUMBERS or value.shape != () or not (blind or torch.isfinite(value)):
        return f"metric state {name} is not one finite number"
    expected, fits = RANGES.get(name, ("", None))
    if fits is not None and not fits(value):
        return f"metric state {name}: expected {expected}, found {float(value):g}"
    return None


def measurement_fault(
    measurement: Measurement, round: int, form: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> str | None:
    """Why a measurement can't be used; None if it can. `form` has the metric states' shapes and dtypes."""
    n, states = measurement.num_examples, measurement.states
    if measurement.round != round:
        return f"measurement of round {measurement.round}, expected round {round}"
    if not 0 <= n <= MAX_EXAMPLES:
        return f"num_examples: expected an integer from 0 to {MAX_EXAMPLES}, found {n!r}"
    if n == 0 and not states:
        return None
    if states.keys() != form.keys():
        odd = sorted(states.keys() ^ form.keys())[0]
        return f"metric state {odd[:100]} is {'unexpected' if odd in states else 'missing'}"
    for name, (shape, dtype) in form.items():
        if states[name].shape != shape or states[name].dtype != dtype:
            return f"metric state {name} has another shape or type"
        if not torch.isfinite(states[name]).all():
            return f"metric state {name} is not finite"
    return None


def _shape_fault(delta: Tensors, model: Tensors) -> str | None:
    if set(delta) != set(model):
        odd = sorted(set(delta) ^ set(model))[0]
        return f"tensor {odd} is {'unexpected' if odd in delta else 'missing'}"
    for name, expected in model.items():
        tensor = delta[name]
        if tensor.shape != expected.shape:
            return f"tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
        if tensor.dtype != expected.dtype:
            return f"tensor {name} is {tensor.dtype}, expected {expected.dtype}"
    return None


def _value_fault(delta: Tensors) -> str | None:
    norms = []
    for name, values in sorted(delta.items()):
        norms.append(_norm(values))
        # The norm of float32 values cannot overflow in float64: look closer only where it did.
        if not math.isfinite(norms[-1]) and not torch.isfinite(values).all():
            return f"tensor {name} has values that are not finite"
    if math.hypot(*norms) > MAX_NORM:
        return f"the update's norm is {math.hypot(*norms):.3g}, expected at most {MAX_NORM:.0g}"
    return None


def _norm(values: torch.Tensor) -> float:
    """L2 norm: of float32 values in float32 unless that overflows, else in float64."""
    flat = values.reshape(-1)
    square = float(torch.dot(flat, flat)) if flat.dtype == torch.float32 else math.inf
    if math.isfinite(square):
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64))
