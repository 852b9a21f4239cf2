"""Packing several examples of a batch into one row, without attention between them, to save padding.

Each example's positions begin at 0. From such positions, without a mask, transformers restricts attention to
a token's own example; whether a network really does so is tested before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from atoll.backbones.encoder import Batch
from atoll.errors import ConfigError

SAME = 1e-4
"""The largest difference between logits of packed and of single examples, relative to the largest logit."""


def shared_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The examples in each row of `most` tokens, by first fit: the longest first, each into the first row.

    >>> shared_rows([3, 5, 2, 4], most=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda example: (-lengths[example], example)):
        row = next((row for row, left in enumerate(free) if left >= lengths[example]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(most)
        rows[row].append(example)
        free[row] -= lengths[example]
    return rows


def packed(batch: Batch) -> Batch | None:
    """The batch's examples packed into fewer rows of the same width; None if that saves no row.

    `input_ids` and `position_ids` are [rows, tokens]; `places` [batch, learnt] are indices into all rows
    joined together.
    """
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    width = ids.shape[1]
    rows = shared_rows(lengths, width)
    if len(rows) == len(ids):
        return None
    tokens, positions = (torch.zeros((len(rows), width), dtype=torch.int64) for _ in range(2))
    first = torch.zeros(len(ids), dtype=torch.int64)
    ids_on_cpu = ids.cpu()
    for number, row in enumerate(rows):
        begins = accumulate((lengths[example] for example in row), initial=0)
        for example, begin in zip(row, begins, strict=False):
            within = slice(begin, begin + lengths[example])
            tokens[number, within] = ids_on_cpu[example, : lengths[example]]
            positions[number, within] = torch.arange(lengths[example])
            first[example] = number * width + begin
    places = (batch["places"] + first.to(ids.device)[:, None]).clamp_max(len(rows) * width - 1)
    return {"input_ids": tokens.to(ids.device), "position_ids": positions.to(ids.device), "places": places}


def check_packs(network: Any) -> None:
    """Test, with two short examples, that packed examples don't influence each other in this network.

    Raises:
        ConfigError: they do, or the network takes no positions.
    """
    size = network.get_input_embeddings().weight.shape[0]
    one, other = (torch.tensor([ids]) % size for ids in ([5, 3, 9, 7], [2, 8, 4]))
    try:
        with torch.inference_mode():
            alone = torch.cat([network(input_ids=ids, use_cache=False).logits[0] for ids in (one, other)])
            together = network(
                input_ids=torch.cat([one, other], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
                use_cache=False,
            ).logits[0]  # fmt: skip
    except (TypeError, ValueError):
        together = None
    if together is None or (alone - together).abs().max() > SAME * alone.abs().max():
        raise ConfigError(
            f"task.options.packing: in {type(network).__name__} examples of one row see each other, expected"
            " false"
        )
