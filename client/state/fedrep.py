"""FedRep (Collins et al. 2021, "Exploiting Shared Representations for Personalized Federated Learning").

phi is the shared representation, h_i client i's personal head and F_i its loss. In round t a client takes the
paper's two steps one after the other:

    h_i   <- some epochs of gradient steps on F_i(h_i, phi) in h_i alone, from its value after its last round
    phi_i <- the round's epochs of gradient steps on F_i(h_i, phi_i) in phi_i alone, from the round's phi

The first are `personal.head_epochs`, the second `train.epochs`; phi_i is sent and merged, h_i stays. Both go
through the examples in the same order. FedPer, without `head_epochs`, moves both at each step.
"""

from __future__ import annotations

from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainingRequest
from atoll.protocol.tensors import Tensors


def train_fedrep(
    learner: Learner, request: TrainingRequest, start: Tensors, client: str, shard: Shard
) -> Update:
    """The client's update of head and representation, relative to its model `start`; losses are phi's."""
    job, head = learner.job, learner.client_tensors.keys()
    longer = job.train.model_copy(update={"epochs": job.personal.head_epochs, "steps": None})
    first = train_model(
        learner, start, shard, job.model_copy(update={"train": longer}),
        client=client, round=request.round, plan=request.plan, only=head,
    )  # fmt: skip
    return train_model(
        learner, start, shard, job,
        client=client, round=request.round, plan=request.plan,
        begin={name: start[name] + delta for name, delta in first.delta.items()},
        only=start.keys() - head,
    )  # fmt: skip
