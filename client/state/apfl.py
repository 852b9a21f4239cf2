"""APFL (Deng et al. 2020, "Adaptive Personalized Federated Learning", algorithm 1), with a fixed alpha.

w is the model that all share, f_i client i's loss, w_i its copy of w in the round and v_i a model of its own,
first w. It uses their mixture alpha v_i + (1 - alpha) w. In a round both take local steps on the same
batches, w_i as ever and v_i, from where its last round left it, down the mixture's loss as a function of v_i:

    w_i <- w_i - eta grad f_i(w_i)
    v_i <- v_i - eta alpha grad f_i(alpha v_i + (1 - alpha) w_i),    with w_i before its step

alpha is `personal.mixing`; the paper's rule that moves alpha by a gradient is not there. The w_i here is one
more copy that takes the plain steps of `[train]` without noise, and goes when v_i is in the client's memory:
what leaves is the round's own update, which no v_i changes. `client/training/apfl.py` has a network's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from atoll.client.state.personalization import keep_own, own_starts
from atoll.client.state.store import ClientStateStore
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainingRequest
from atoll.protocol.tensors import Tensors

Train = Callable[[TrainingRequest, Mapping[str, Tensors]], Iterable[Update]]
"""(request, each client's v_i): how far each v_i leads from the request's tensors."""


def train_apfl(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> None:
    """Train each client's own model v_i, which is in its memory after."""
    starts = own_starts(learner, request, clients, memory)
    keep_own(request, train(replace(request, plan={}), starts), memory)
