"""FedDyn (Acar et al. 2021, algorithm 1): the client's part; `strategies/feddyn.py` has the symbols.

Its two terms are a correction of the gradient, -g_k, and a proximal term of strength alpha, which
travels in the strategy's plan as FedProx's does.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class FedDynClient:
    """FedDyn's client, whose state is g_k, the gradient of its loss where its last round ended."""

    alpha: float

    @property
    def takes_full_gradients(self) -> bool:
        return False

    def correction(self, client_state: Tensors, sent: Tensors) -> Tensors:
        """The paper's -g_k."""
        return {name: -g for name, g in client_state.items()}

    def after(
        self, update: Update, client_state: Tensors, sent: Tensors, gradient: Tensors
    ) -> tuple[Tensors, Tensors]:
        """(g_k - alpha (theta_k - theta), nothing for the server, which follows the deltas)."""
        return {name: g - update.delta[name] * self.alpha for name, g in client_state.items()}, {}
