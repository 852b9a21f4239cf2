"""The losses of the model that clients received, as fair strategies read and check them."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import RECEIVED_LOSS, Update
from atoll.protocol.stacked_updates import StackedUpdates


def received_losses(updates: Sequence[Update]) -> dict[str, float]:
    """Each client's mean loss of the model before it trained, in the updates' order.

    Raises:
        InconsistentUpdates: an update doesn't say it.
    """
    if isinstance(updates, StackedUpdates) and RECEIVED_LOSS in updates.states:
        return dict(zip(updates.clients, updates.states[RECEIVED_LOSS].tolist(), strict=True))
    silent = [update.client for update in updates if RECEIVED_LOSS not in update.states]
    if silent:
        raise InconsistentUpdates(f"{silent[0]} sent no {RECEIVED_LOSS}, expected it from every client")
    return {update.client: float(update.states[RECEIVED_LOSS]) for update in updates}
