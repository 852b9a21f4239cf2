"""SCAFFOLD (Karimireddy et al. 2020, algorithm 1): the client's part. `strategies/scaffold.py` has symbols.

With momentum a local gradient counts again in every later step. K is then the sum of these weights
(`accumulated_steps`), so that option II's (x - y_i) / (K eta_l) stays a mean of gradients; for plain SGD, the
paper's case, it is the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.client.training.local_steps import accumulated_steps
from atoll.job.train import TrainSection, lr_of_round
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class ScaffoldClient:
    """A client's control variate c_i, renewed by option 1 or 2; the strategy sends c."""

    train: TrainSection
    option: int
    rounds: int = 1

    @property
    def takes_full_gradients(self) -> bool:
        return self.option == 1

    def correction(self, client_state: Tensors, sent: Tensors) -> Tensors:
        """The paper's c - c_i."""
        return {name: c - client_state[name] for name, c in sent.items()}

    def after(
        self, update: Update, client_state: Tensors, sent: Tensors, gradient: Tensors
    ) -> tuple[Tensors, Tensors]:
        """(c_i+, c_i+ - c_i); a client that took no step keeps its c_i."""
        if not update.num_examples:
            return client_state, {name: c - c for name, c in client_state.items()}
        renewed = gradient
        if self.option == 2:
            lr = lr_of_round(self.train, update.round, self.rounds)
            moved_by = accumulated_steps(update.num_examples, self.train) * lr
            renewed = {n: (client_state[n] - c) - update.delta[n] / moved_by for n, c in sent.items()}
        return renewed, {name: c - client_state[name] for name, c in renewed.items()}
