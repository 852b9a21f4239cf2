"""IFCA (Ghosh et al. 2020, "An Efficient Framework for Clustered Federated Learning"), model averaging.

There are k models theta_1 ... theta_k, one for each cluster of clients, and F_i is client i's loss on its
training examples. In algorithm 1 a round's clients M get all k models, and each chooses one,

    j_i = the j with the least F_i(theta_j),    the first of equal ones

and takes its local steps from that one, to theta'_i. The server averages by option II, evenly:

    theta_j <- the mean of theta'_i over the i of M with j_i = j;    where there is none, theta_j stays

k is `options.clusters`. The models are one dict of tensors, [k, ...] each; a client sends what its one model
moved by, and the number of its cluster, from 0. The client's part is in `client/state/ifca.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import CLUSTER, Update
from atoll.protocol.stacked_updates import taken
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import even_mean, moved, sent_numbers
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class Ifca:
    """Move each cluster's model by the unweighted mean of the deltas of the clients that chose it."""

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`; the model's tensors are [clusters, …], a delta's tensors are one cluster's.

        Raises:
            InconsistentUpdates: an update names no cluster, or one that does not exist.
        """
        models = [model_of_cluster(model, number) for number in range(clusters_in(model))]
        chosen = sent_numbers(updates, CLUSTER)
        for client, number in chosen.items():
            if number not in range(len(models)):
                raise InconsistentUpdates(
                    f"{client} chose cluster {number:g}, expected 0 to {len(models) - 1}"
                )
        for number, before in enumerate(models):
            members = [place for place, cluster in enumerate(chosen.values()) if cluster == number]
            if members:
                models[number] = moved(before, even_mean(taken(updates, members)))
        return stacked_models(models), state


def clusters_in(model: Tensors) -> int:
    """The number of cluster models in a stack."""
    return len(next(iter(model.values())))


def model_of_cluster(model: Tensors, number: int) -> Tensors:
    """The stacked model with this number, from 0."""
    return {name: stack[number].contiguous() for name, stack in model.items()}


def stacked_models(models: Sequence[Tensors]) -> Tensors:
    """Models of the same names and shapes as one dict of tensors [clusters, ...]."""
    return {name: torch.stack([model[name] for model in models]) for name in models[0]}
