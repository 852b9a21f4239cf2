"""Look at every update before it is merged; a bad one is set aside with its client's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from atoll.job.job import Job
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
"""States that are there only where a promise or the strategy asks for them."""
RANGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    CLUSTER: ("a whole number of at least 0", lambda value: (value >= 0) & (value == value.floor())),
    LOCAL_STEPS: ("more than 0", lambda value: value > 0),
    RECEIVED_LOSS: ("at least 0", lambda value: value >= 0),
}
"""What values of a state can be: in words, and which of them are."""
NOTHING_SENT: Tensors = {}
MAX_EXAMPLES = 1_000_000_000
MAX_LOSS = 1e30
"""Mean training loss above which it is taken for an accident, where clients are chosen by it."""
MAX_NORM = 1e6
"""L2 norm of a delta above which it is taken for an accident."""


@dataclass(frozen=True)
class ValidatedUpdates:
    """Good updates in canonical order (by client name), and why the others were set aside.

    One update may stand for several clients, of which there are `num_clients`, and so may `statistics`, which
    are the sum of those `by_client`. `charged_rounds` are the most that any client's ledger holds of the run.
    """

    updates: Sequence[Update]
    set_aside: dict[str, str]
    num_clients: int | None = None
    statistics: Tensors = field(default_factory=dict)
    by_client: Mapping[str, Tensors] = field(default_factory=dict)
    charged_rounds: int = 0
    staleness: Sequence[int] = ()
    """Of each update how often the model was merged since its client started, where that can happen."""

    @property
    def num_valid(self) -> int:
        """How many clients' work there is."""
        return len(self.updates) if self.num_clients is None else self.num_clients

    def without_tensors(self) -> Self:
        """What is told of the updates once they are merged; their tensors may be large, and can go."""
        if isinstance(self.updates, StackedUpdates):
            return self
        return replace(self, updates=[replace(one, delta={}, strategy_tensors={}) for one in self.updates])

    def without(self, faults: Mapping[str, str]) -> Self:
        """The same, with those of the clients in `faults` set aside for what is said of each."""
        if not faults:
            return self
        usable = tuple(update for update in self.updates if update.client not in faults)
        return replace(self, updates=usable, set_aside=dict(sorted({**self.set_aside, **faults}.items())))

    @property
    def num_diverged(self) -> int:
        """How many clients sent values that aren't finite: they would again, from the same model and seed."""
        return sum(why.endswith(DIVERGED) for why in self.set_aside.values())


DIVERGED = ("is not finite", "are not finite", "is not one finite number")
"""How reasons end that say so."""


@dataclass(frozen=True)
class Validation:
    """A transform of replies: usable updates, and the others set aside.

    Values are no reason where clients are promised privacy. What examples are promised is in the noise of
    an update already: its values may be looked at.
    """

    inspects_values: bool
    needed: frozenset[str] = frozenset()
    """States that the strategy can't merge an update without."""
    clusters: int = 0
    """How many models there are to choose from, where each cluster of clients has its own."""
    root: str | None = None
    """A client without whose update no other's can be judged, if there is such a one."""
    needs_losses: bool = False
    """Whether later cohorts are chosen by clients' training losses, so that each must be a number."""

    @classmethod
    def of(cls, job: Job) -> Self:
        """How the updates of a job are validated."""
        steps = {LOCAL_STEPS} if job.strategy.name == "fednova" else set()
        losses = {RECEIVED_LOSS} if job.strategy.sends_losses else set()
        chosen = {CLUSTER} if job.strategy.makes_clusters else set()
        return cls(
            "client" not in job.privacy.units,
            frozenset(steps | losses | chosen),
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
        """The replies to a request with that model and what the strategy `sent` beside it."""
        found = self._validated(replies, names, model, round, sent)
        found = found if self.root is None else _judged_by(found, self.root)
        return _with_losses(found) if self.needs_losses else found

    def _validated(
        self, replies: Iterable[Reply], names: Sequence[str], model: Tensors, round: int, sent: Tensors
    ) -> ValidatedUpdates:
        blind = not self.inspects_values
        if isinstance(replies, StackedUpdates):
            return validate_stacked(replies, names, model, round, sent, blind=blind)
        found = validate_updates(replies, names, model, round, sent, blind=blind)
        return self._with_what_is_needed(found) if self.needed else found

    def _with_what_is_needed(self, found: ValidatedUpdates) -> ValidatedUpdates:
        return found.without({u.client: fault for u in found.updates if (fault := self._lack(u.states))})

    def _lack(self, states: Tensors) -> str | None:
        for name in sorted(self.needed - states.keys()):
            return f"metric state {name} is missing"
        if self.clusters and int(states[CLUSTER]) >= self.clusters:
            return f"metric state {CLUSTER}: expected 0 to {self.clusters - 1}, found {int(states[CLUSTER])}"
        return None


def _judged_by(found: ValidatedUpdates, root: str) -> ValidatedUpdates:
    """No update at all where the one that the others are compared with isn't there."""
    if root in clients_of(found.updates):
        return found
    why = f"nothing to compare it with: no usable update of {root}"
    return found.without(dict.fromkeys(clients_of(found.updates), why))


def _with_losses(found: ValidatedUpdates) -> ValidatedUpdates:
    """Without the updates whose mean training loss isn't a number that clients can be chosen by."""
    sums, counts = (_sent(found.updates, f"train_loss.{part}") for part in ("sum", "count"))
    return found.without({name: fault for name in sums if (fault := _loss_fault(sums[name], counts[name]))})


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
    """As `screen`, for a cohort that trained in this process: all its norms in one go.

    Whatever looks amiss in any of them goes the slow way, client by client.
    """
    order = sorted(range(len(updates)), key=updates.clients.__getitem__)
    whole = updates.take(order)
    as_expected = (
        whole.clients == tuple(sorted(cohort))
        and whole.round == round
        and _are_stacks_of(whole.delta, model)
        and _are_stacks_of(whole.strategy_tensors, sent)
        and all(_fewest(blind) <= n <= MAX_EXAMPLES for n in whole.num_examples)
    )
    if as_expected and (blind or _values_are_sound(whole)):
        return ValidatedUpdates(whole, {})
    return validate_updates(updates, cohort, model, round, sent, blind=blind)


def _are_stacks_of(stacks: Tensors, tensors: Tensors) -> bool:
    form = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    return {name: (t.shape[1:], t.dtype) for name, t in stacks.items()} == form


def _fewest(blind: bool) -> int:
    """Examples that an update comes from at least; under a promise none is as good as any number."""
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
    """Whether the states are sound at first sight; of what is amiss the slow way tells the client."""
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
    """Sort the replies of a round into usable and set aside; who didn't reply is set aside too.

    A `blind` look sees nothing that depends on a client's data: no value, no norm.
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
    """What is wrong with an update's answer to what the strategy sent."""
    fault = _shape_fault(answer, sent) or (None if blind else _value_fault(answer))
    return None if fault is None else f"answer to the strategy: {fault}"


def _states_fault(states: Tensors, *, blind: bool) -> str | None:
    if set(states) - SOMETIMES != STATES:
        return f"metric states: expected train_loss.sum and train_loss.count, found {sorted(states)[:5]}"
    for name, value in states.items():
        if value.shape != () or not (blind or torch.isfinite(value)):
            return f"metric state {name} is not one finite number"
        expected, fits = RANGES.get(name, ("", None))
        if fits is not None and not fits(value):
            return f"metric state {name}: expected {expected}, found {float(value):g}"
    return None


def measurement_fault(
    measurement: Measurement, round: int, form: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> str | None:
    """Why a measurement can't be used; None if it can. `form` is that of its metric states."""
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
        found = delta[name]
        if found.shape != expected.shape:
            return f"tensor {name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        if found.dtype != expected.dtype:
            return f"tensor {name} is {found.dtype}, expected {expected.dtype}"
    return None


def _value_fault(delta: Tensors) -> str | None:
    norms = []
    for name, found in sorted(delta.items()):
        norms.append(_norm(found))
        # The norm of float32 values cannot overflow in float64: look closer only where it did.
        if not math.isfinite(norms[-1]) and not torch.isfinite(found).all():
            return f"tensor {name} has values that are not finite"
    if math.hypot(*norms) > MAX_NORM:
        return f"the update's norm is {math.hypot(*norms):.3g}, expected at most {MAX_NORM:.0g}"
    return None


def _norm(values: torch.Tensor) -> float:
    """L2 norm: in the values' own precision where that is enough, as it nearly always is."""
    flat = values.reshape(-1)
    square = float(torch.dot(flat, flat)) if flat.dtype == torch.float32 else math.inf
    if math.isfinite(square):
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64))
