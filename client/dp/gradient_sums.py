"""The sum of clipped gradients over one Poisson batch: a client's contribution to distributed DP-SGD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from atoll.client.dp.dp_sgd import DpSgd, clip_factors
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import Layers, Loss, gradients
from atoll.client.heads.train import rows_per_batch, with_poisson_batches
from atoll.protocol.tensors import Tensors


def head_sums(
    head: Tensors, examples: FeatureTable, client_rows: Sequence[ClientRows], loss: Loss, private: DpSgd
) -> Iterator[tuple[str, Tensors]]:
    """(client, its batch's sum of clipped gradients), in the order of `client_rows`; zeros for no batch."""
    layers = Layers.of(head)
    device = str(examples.features.device)
    start = layers.stack(head, device)
    for work in client_rows:
        batch = with_poisson_batches(work, private).batches[0]
        size = rows_per_batch(len(batch), max(len(batch), 2))
        rows = np.full(size, work.first_row)
        rows[: len(batch)] = work.rows[batch]
        share = (torch.arange(size) < len(batch)).to(torch.float32).unsqueeze(0).to(device)
        values = layers.forward(start, examples.features[torch.from_numpy(rows)].unsqueeze(0))
        targets = examples.targets[torch.from_numpy(rows)].unsqueeze(0)
        error, _ = loss.grad(values[-1], targets)
        each = layers.output_gradients(start, values, error)
        factor = clip_factors(values, each, share, private).unsqueeze(2)
        total = [torch.empty_like(matrix) for matrix in start]
        gradients(values, [e.mul_(factor) for e in each], out=total)
        yield work.client, {name: t[0] for name, t in layers.unstack(total).items()}
