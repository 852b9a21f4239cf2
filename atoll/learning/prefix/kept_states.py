"""Replaces the tokens in batches by the frozen prefix's states, which are computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from atoll.backbones.encoder import Batch, FixedBatch, Model
from atoll.backbones.extract import Progress
from atoll.errors import ConfigError
from atoll.learning.prefix.frozen_prefix import FrozenPrefix
from atoll.learning.prefix.state_cache import StateCache, sequences_of


@dataclass(frozen=True)
class KeptStates:
    """The frozen prefix of one network, and the cache of its outputs."""

    prefix: FrozenPrefix
    cache: StateCache
    threads: int
    progress: Progress

    @classmethod
    def of(
        cls,
        model: Model,
        cache_at: Callable[[Sequence[str]], StateCache],
        threads: int,
        progress: Progress,
    ) -> KeptStates:
        """Split a model that is ready to train; `cache_at` maps `FrozenPrefix.place` to the cache to use.

        Raises:
            ConfigError: the network doesn't read tokens, or can't be split.
        """
        if not model.backbone.reads_tokens:
            raise ConfigError(
                "train.cached_states: states are kept of networks that read tokens and nothing else (causal"
                " models, encoders of texts), expected none for this one"
            )
        prefix = FrozenPrefix(model)
        return cls(prefix, cache_at(prefix.place), threads, progress)

    def keep(self, sequences: Sequence[torch.Tensor]) -> None:
        """Compute and cache the states of those sequences [tokens] that aren't cached yet."""
        missing = self.cache.missing(sequences)
        done = 0

        def compute(part: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal done
            before = done
            done += len(part)
            return self.prefix.states_of_each(
                part, threads=self.threads, done=lambda count: self.progress(before + count, len(missing))
            )

        self.cache.keep(missing, compute)

    def in_place_of_tokens(self, batch: Batch) -> Batch:
        """The batch with states [..., tokens, width] as its `input_ids`; unchanged if it has no token."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        flat_ids, flat_mask = ids.flatten(0, -2), mask.flatten(0, -2)
        if not flat_mask.any():
            return batch
        self.keep(sequences_of(flat_ids, flat_mask))
        states = self.cache.take(flat_ids, flat_mask)
        return batch | {"input_ids": states.view(*ids.shape, -1)}

    def in_place_of_tokens_of(self, batches: Iterable[FixedBatch]) -> Iterator[FixedBatch]:
        """The same batches, whose preparation then ends with `in_place_of_tokens`."""
        for rows, prepare in batches:
            yield rows, partial(self._prepared, prepare)

    def _prepared(self, prepare: Callable[[], Batch]) -> Batch:
        return self.in_place_of_tokens(prepare())
