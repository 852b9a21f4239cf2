"""Replaces the inputs in batches by the frozen prefix's states, which are computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from atoll.backbones.encoder import Batch, FixedBatch, FixedInput, Model
from atoll.backbones.extract import Progress
from atoll.learning.feature_cache import FeatureCache
from atoll.learning.prefix.fixed_states import FixedStates, input_keys
from atoll.learning.prefix.frozen_prefix import FrozenPrefix
from atoll.learning.prefix.state_cache import PIECE, StateCache, sequences_of

COLLATED = 16
"""The number of examples that are collated together to see whose states are missing."""

BatchOf = Callable[[Sequence[int]], Batch]
"""A function from rows of a shard to their batch."""


@dataclass(frozen=True)
class KeptStates:
    """The frozen prefix of one network, and the cache of its outputs."""

    prefix: FrozenPrefix
    threads: int
    progress: Progress

    def keep(self, count: int, batch_of: BatchOf) -> None:
        """Compute and cache the states of a shard's `count` examples that aren't cached yet."""
        raise NotImplementedError

    def in_place_of_inputs(self, batch: Batch) -> Batch:
        """The batch with states in its inputs' place, computed where the cache lacks them."""
        raise NotImplementedError

    def in_place_of_inputs_of(self, batches: Iterable[FixedBatch]) -> Iterator[FixedBatch]:
        """The same batches, whose preparation then ends with `in_place_of_inputs`."""
        for rows, prepare in batches:
            yield rows, partial(self._prepared, prepare)

    def _prepared(self, prepare: Callable[[], Batch]) -> Batch:
        return self.in_place_of_inputs(prepare())

    def _computing(self, total: int) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        """A function that computes the states of examples, `total` in all, and reports the progress."""
        done = 0

        def compute(part: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal done
            before = done
            done += len(part)
            return self.prefix.states_of_each(
                part, threads=self.threads, done=lambda count: self.progress(before + count, total)
            )

        return compute


@dataclass(frozen=True)
class KeptStatesOfTokens(KeptStates):
    """Of networks that read tokens: a sequence's states stand in its tokens' places."""

    cache: StateCache

    def keep(self, count: int, batch_of: BatchOf) -> None:
        sequences = []
        for rows in _parts(range(count)):
            batch = batch_of(rows)
            sequences += sequences_of(
                batch["input_ids"].flatten(0, -2), batch["attention_mask"].flatten(0, -2)
            )
        self._keep(sequences)

    def _keep(self, sequences: Sequence[torch.Tensor]) -> None:
        missing = self.cache.missing(sequences)
        self.cache.keep(missing, self._computing(len(missing)))

    def in_place_of_inputs(self, batch: Batch) -> Batch:
        """The batch with states [..., tokens, width] as its `input_ids`; unchanged if it has no token."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        flat_ids, flat_mask = ids.flatten(0, -2), mask.flatten(0, -2)
        if not flat_mask.any():
            return batch
        self._keep(sequences_of(flat_ids, flat_mask))
        states = self.cache.take(flat_ids, flat_mask)
        return batch | {"input_ids": states.view(*ids.shape, -1)}


@dataclass(frozen=True)
class KeptStatesOfFixed(KeptStates):
    """Of networks whose only input is one tensor of the same shape for every example, such as pictures."""

    states: FixedStates
    given: FixedInput

    def keep(self, count: int, batch_of: BatchOf) -> None:
        missing: dict[bytes, int] = {}
        for rows in _parts(range(count)):
            keys = input_keys(batch_of(rows)[self.given.name])
            missing |= {key: rows[place] for key, place in self.states.missing(keys).items()}
        compute, absent = self._computing(len(missing)), list(missing)
        for places in _parts(range(len(absent))):
            part = [absent[place] for place in places]
            inputs = batch_of([missing[key] for key in part])[self.given.name]
            self.states.keep(part, inputs, compute)

    def in_place_of_inputs(self, batch: Batch) -> Batch:
        """The batch with each example's states, flattened, in its input's place: [n, 1, 1, 1, numbers]."""
        inputs = batch[self.given.name]
        keys = input_keys(inputs)
        missing = self.states.missing(keys)
        if missing:
            self.states.keep(list(missing), inputs[list(missing.values())], self._computing(len(missing)))
        return batch | {self.given.name: self.prefix.placed(self.states.take(keys))}


def kept_states(
    model: Model,
    cache_at: Callable[[Sequence[str | int]], FeatureCache],
    dtype: torch.dtype,
    threads: int,
    progress: Progress,
) -> KeptStates:
    """Split a model that is ready to train; `cache_at` maps the form of its states to the cache to use.

    Raises:
        ConfigError: the network takes other inputs, or can't be split.
    """
    prefix, given = FrozenPrefix(model), model.backbone.fixed_input
    if given is None:
        cache = StateCache(cache_at([PIECE, *prefix.place]), dtype)
        return KeptStatesOfTokens(prefix, threads, progress, cache)
    states = FixedStates(cache_at([*given.shape, *prefix.place]), dtype)
    return KeptStatesOfFixed(prefix, threads, progress, states, given)


def _parts(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """The rows in groups of `COLLATED`."""
    for start in range(0, len(rows), COLLATED):
        yield rows[start : start + COLLATED]
