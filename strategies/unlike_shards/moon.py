"""MOON (Li et al. 2021, "Model-Contrastive Federated Learning", algorithm 1).

For an input x there are three representations, which are inputs of the head: z by the model in training,
z_glob by the round's global model, and z_prev by the client's model after its last round, however long ago.
A local step minimises l_sup + mu l_con, where l_sup is the task's loss and

    l_con = -log( e^(sim(z, z_glob) / tau) / (e^(sim(z, z_glob) / tau) + e^(sim(z, z_prev) / tau)) )

the mean over the batch; sim is the cosine, mu `options.mu` and tau `options.temperature`. z_glob and z_prev
are constants in it. A client that never trained has no z_prev, and l_con is left out in its first round.
The paper adds a projection layer to its networks; here z is what the head sees. The server takes FedAvg's
mean. The client's part is in `client/state/moon.py` and `client/training/moon.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Moon(FedAvg):
    """Move by `lr` times the mean of the deltas, weighted by examples, as FedAvg does."""
