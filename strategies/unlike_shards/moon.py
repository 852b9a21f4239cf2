"""MOON (Li et al. 2021, "Model-Contrastive Federated Learning", algorithm 1).

Of an input x a client has three representations, what the network hands to its head: z by the model that is
being trained, z_glob by the round's model as it came, and z_prev by the model that the client's own last
round left, however long ago. A local step goes down the gradient of l_sup + mu l_con, l_sup being the
task's loss and

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
