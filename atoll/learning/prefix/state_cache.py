"""A cache on disk for the states of token sequences, in pieces of a few tokens, by the sequence's hash.

Equal sequences of tokens share an entry, whatever task, split or batch they are in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from atoll.learning.feature_cache import FeatureCache

PIECE = 8
"""Tokens per piece; the last piece of a sequence is filled up with zeros."""

TOKENS_AT_ONCE = 1 << 14
"""The number of tokens after which states are written to disk: a kill loses at most these."""

Compute = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""A function from sequences [tokens] to each one's states, float32, [tokens, width]."""


@dataclass(frozen=True)
class StateCache:
    """States in float32, or rounded to bfloat16, by the tokens of their sequence."""

    cache: FeatureCache
    dtype: torch.dtype = torch.float32

    def keep(self, sequences: Sequence[torch.Tensor], compute: Compute) -> None:
        """Compute and store the states of those sequences [tokens] that aren't stored yet, each once."""
        for part in _parts(self.missing(sequences)):
            pieces = torch.cat([self._pieces(states) for states in compute(part)])
            keys = [key for sequence in part for key in piece_keys(sequence)]
            # Two bfloat16 numbers are stored as one float32.
            self.cache.put(keys, pieces.view(torch.float32))

    def missing(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sequences whose states aren't all stored, in the order given, without duplicates."""
        keys = [piece_keys(sequence) for sequence in sequences]
        distinct = {
            piece_keys_of[0]: place
            for place, piece_keys_of in reversed(list(enumerate(keys)))
            if piece_keys_of
        }
        places = sorted(distinct.values())
        flat = [key for place in places for key in keys[place]]
        absent = {flat[place] for place in self.cache.missing(flat)} if flat else set()
        return [sequences[place] for place in places if absent.intersection(keys[place])]

    def take(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The states of sequences [n, tokens], zeros at padding: float32, [n, tokens, width].

        `mask` [n, tokens] is 1 at tokens and 0 at padding.

        Raises:
            KeyError: the states of a sequence aren't stored.
        """
        count, length = ids.shape
        rows = -(-length // PIECE)
        keys = [piece_keys(row[is_real.bool()]) for row, is_real in zip(ids, mask, strict=True)]
        pieces = self.cache.take([key for row_keys in keys for key in row_keys]).view(self.dtype)
        places = [n * rows + piece for n, row_keys in enumerate(keys) for piece in range(len(row_keys))]
        table = torch.zeros((count * rows, pieces.shape[1]), dtype=torch.float32)
        table[torch.tensor(places)] = pieces.to(torch.float32)
        return table.view(count, rows * PIECE, -1)[:, :length].contiguous()

    def _pieces(self, states: torch.Tensor) -> torch.Tensor:
        """States [tokens, width] as pieces in the cache's dtype, [pieces, PIECE * width]."""
        filled = states.new_zeros((-(-len(states) // PIECE) * PIECE, states.shape[1]), dtype=self.dtype)
        filled[: len(states)] = states
        return filled.view(-1, PIECE * states.shape[1])


def piece_keys(sequence: torch.Tensor) -> list[bytes]:
    """The key of each piece of a sequence: a SHA-256 of the whole sequence and the piece's number."""
    whole = hashlib.sha256(sequence.to(torch.int64).contiguous().cpu().numpy().tobytes())
    keys = []
    for number in range(-(-len(sequence) // PIECE)):
        digest = whole.copy()
        digest.update(b"/" + number.to_bytes(4, "big"))
        keys.append(digest.digest())
    return keys


def sequences_of(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The rows of tokens [n, tokens] without their padding, by a mask that is 1 at tokens."""
    return [row[is_real.bool()] for row, is_real in zip(ids, mask, strict=True)]


def _parts(sequences: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The sequences in groups of about `TOKENS_AT_ONCE` tokens."""
    part: list[torch.Tensor] = []
    for sequence in sequences:
        part.append(sequence)
        if sum(map(len, part)) >= TOKENS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part
