"""How good the global model is: on the server's test set, and at the clients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from functools import partial

from atoll.learning.learner import sum_states
from atoll.protocol.messages import Failure, Measurement, Reply
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import EvaluateRequest
from atoll.protocol.tensors import size_of
from atoll.report.run_result import RoundExtras
from atoll.server.rounds.cohort import some
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.validation import measurement_fault
from atoll.tasks.metric_values import MetricValues

logger = logging.getLogger(__name__)


def evaluate(run: Run) -> tuple[MetricValues, RoundExtras]:
    """(the global model's metrics, early stopping's entries for the log); both empty between evaluations."""
    state = run.state
    if state.round % run.setup.job.evaluate.every:
        return {}, {}
    metrics = evaluate_global(run)
    return metrics, state.stopping.observe(state.round, state.tensors, partial(federated_evaluation, run))


def evaluate_global(run: Run) -> MetricValues:
    """Metrics of the global model on the server's test set or, without one, over all clients' data.

    Under client-level or example-level privacy clients evaluate nothing.
    """
    test, model, learner = run.setup.test, run.full_model, run.state.learner
    if test is not None and model is not None:
        return learner.compute(learner.evaluate(model, test))
    return {} if run.is_private else federated_evaluation(run)


def federated_evaluation(run: Run) -> MetricValues:
    """Metrics of the global model over all clients' validation splits; empty where there are none."""
    states = [m.states for m in evaluate_clients(run) if m.num_examples]
    return run.state.learner.compute(sum_states(states)) if states else {}


def evaluate_clients(run: Run, *, adapt_steps: int = 0, of_shared_model: bool = False) -> list[Measurement]:
    """Each evaluation client's measurement on its validation split, by client name; none under privacy.

    Clients evaluate the model that they would use: with the tensors they keep for themselves, after
    `adapt_steps` local steps. With `of_shared_model` they evaluate the global model without their tensors.
    """
    if run.is_private:
        return []
    names = evaluation_clients(run)
    request = EvaluateRequest(
        **run.request_origin(run.state.round), tensors=run.state.tensors, adapt_steps=adapt_steps,
        of_shared_model=of_shared_model,
    )  # fmt: skip
    replies = run.send(request, names)
    run.state.bytes_down += len(names) * size_of(run.state.tensors)
    return _usable(replies, set(names), run)


def _usable(replies: Iterable[Reply], expected: Set[str], run: Run) -> list[Measurement]:
    """The valid measurements of the clients in `expected`, by client name; others are logged and left out."""
    usable: dict[str, Measurement] = {}
    form = run.state.learner.form_of_states()
    for reply in replies:
        match reply:
            case Failure():
                fault: str | None = reply.reason
            case Measurement() if reply.client in expected and reply.client not in usable:
                fault = measurement_fault(reply, run.state.round, form)
                usable |= {} if fault else {reply.client: reply}
            case _:
                fault = "sent what it was not asked for"
        if fault is not None:
            logger.warning("evaluation: set aside %s: %s", reply.client, fault)
    return [usable[name] for name in sorted(usable)]


def evaluation_clients(run: Run) -> list[str]:
    """The clients that measure the model, the same in every round: all, or `evaluate.clients` of them."""
    job = run.setup.job
    return some(run.setup.population, job.evaluate.clients, stream(job.seed, "panel"))
