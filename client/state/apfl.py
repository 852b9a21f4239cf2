"""APFL (Deng et al. 2020, "Adaptive Personalized Federated Learning", algorithm 1), with a fixed alpha.

w is the shared model, f_i client i's loss, w_i its copy of w in the round and v_i its personal model, which
starts as w. The client uses the mixture alpha v_i + (1 - alpha) w. In a round both take local steps on the
same batches: w_i as usual, and v_i, from its value after its last round, on the mixture's loss:

    w_i <- w_i - eta grad f_i(w_i)
    v_i <- v_i - eta alpha grad f_i(alpha v_i + (1 - alpha) w_i),    with w_i before its step

alpha is `personal.mixing`; the paper's rule that adapts alpha by a gradient is left out. The w_i here is a
further copy, which takes the plain steps of `[train]` without noise and is dropped once v_i is stored: the
client sends the round's usual update, which does not depend on v_i. `client/training/apfl.py` has the step of
whole networks.
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
"""(request, each client's v_i) to updates: each v_i after training minus the request's tensors."""


def train_apfl(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> None:
    """Train each client's personal model v_i, and store it."""
    starts = own_starts(learner, request, clients, memory)
    keep_own(request, train(replace(request, plan={}), starts), memory)
