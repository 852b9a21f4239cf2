"""Random draws under example-level privacy, each of which belongs to one example or to the whole step.

Guarantee: an example's draws depend on the job's seed, the purpose, round, client and step, on the example's
content and, among equal examples, on its number; neither on how many examples there are nor on its position.
Adding or removing an example therefore changes no other's dropout, augmentation, view or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.backbones.brought.names import brought_augmentations
from atoll.backbones.encoder import Variation
from atoll.client.training.batches import GOLDEN, random_numbers, uniform_numbers
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.feature_cache import key_table
from atoll.protocol.random_streams import Purpose, global_stream, stream_seed

Numbers = NDArray[np.uint64]
"""A number for each example, [n], that seeds its random draws."""

Step = tuple[int, str, int]
"""(round, client, step of the round)."""


def example_numbers(keys: Sequence[bytes]) -> Numbers:
    """A number for each of a client's examples, [n], hashed from its content and its count among equal ones.

    If another equal example is added, it gets the next count, and the others keep their numbers.
    """
    if not keys:
        return np.empty(0, dtype=np.uint64)
    table = key_table(keys)
    content = table.view(np.uint64).reshape(len(keys), -1)[:, 0]
    numbers: Numbers = random_numbers(content + GOLDEN * occurrences(table), 1)[:, 0]
    return numbers


def occurrences(table: NDArray[Any]) -> Numbers:
    """For each entry, how many equal entries precede it, [n]."""
    _, group = np.unique(table, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    place = np.arange(len(ordered)) - np.repeat(starts, np.diff([*starts, len(ordered)]))
    counts = np.empty(len(ordered), dtype=np.uint64)
    counts[order] = place
    return counts


def example_seeds(numbers: Numbers, seed: int, *purpose: Purpose) -> Numbers:
    """The seed of each example's draws for one purpose, [n]."""
    seeds: Numbers = random_numbers(numbers ^ np.uint64(stream_seed(seed, *purpose)), 1)[:, 0]
    return seeds


def seeded_coins(numbers: Numbers, steps: int, seed: int, *purpose: Purpose) -> NDArray[np.float64]:
    """Each example's uniform number in [0, 1) for every step, [steps, n]; only simulations may use them."""
    return uniform_numbers(example_seeds(numbers, seed, *purpose), steps).T


def example_views(numbers: Numbers, views: int, job: Job, step: Step) -> NDArray[np.int64]:
    """The number of the cached view that each example uses in a step, [n]."""
    round, client, number = step
    seeds = example_seeds(numbers, job.seed, "view", round, client, number)
    return (seeds % np.uint64(views)).astype(np.int64)


def example_variation(numbers: Numbers, job: Job, step: Step) -> Variation | None:
    """How a step's inputs are augmented, each by its own draws; None where the job augments nothing."""
    if not job.train.augment:
        return None
    seeds = example_seeds(numbers, job.seed, "augment", *step)
    return Variation(
        job.train.augment,
        lambda place: torch.Generator().manual_seed(int(seeds[place]) >> 1),
        brought_augmentations(job),
    )


@contextmanager
def example_draws(numbers: Numbers, seed: int, step: Step) -> Iterator[None]:
    """Within the block, a network's random draws for a batch of these examples are made example by example.

    Raises:
        ConfigError: a draw cannot be divided among examples.
    """
    with global_stream(seed, "dropout", *step), ExampleDraws(example_seeds(numbers, seed, "dropout", *step)):
        yield


class ExampleDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces torch's random draws by numbers from each example's own seed; `seeds` is [batch].

    Every draw in a pass gets a number from torch's global generator. If activations are computed again, torch
    restores that generator, so that the same draws get the same numbers.
    """

    def __init__(self, seeds: Numbers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seeds = seeds

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and saying so costs more than most operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _is_draw(func) or _drops_nothing(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        draw = DRAWS.get(func.overloadpacket.__name__)
        if draw is None:
            raise ConfigError(
                f"privacy.unit: the network draws by {func}, which can't be done for each example on its"
                " own; expected dropout, uniform or normal numbers, or no example-level privacy"
            )
        return draw(self, *args, **{name: v for name, v in (kwargs or {}).items() if name != "generator"})

    def bits(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Random whole numbers in [0, 2^32), shaped as `like`, whose first axis runs over the examples.

        Raises:
            ConfigError: the first axis of `like` has another length.
        """
        batch, shape = len(self._seeds), tuple(like.shape)
        draw = np.uint64(int(torch.empty((), dtype=torch.int64).random_()))
        if math.prod(shape) == 1:  # whether a layer is left out, for all alike
            return _hashed(np.zeros(1, np.uint64) ^ draw, (), like.device).reshape(shape)
        if not shape or shape[0] % batch:
            raise ConfigError(
                f"privacy.unit: the network draws {list(shape)} numbers by {name} for a batch of {batch}"
                " examples; expected the examples on the first axis, so that each has draws of its own"
            )
        tail = shape[1:] if shape[0] == batch else (shape[0] // batch, *shape[1:])
        return _hashed(self._seeds ^ draw, tail, like.device).reshape(shape)

    def uniform(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Uniform numbers in [0, 1), shaped as `like`."""
        return (self.bits(like, name) >> 8).to(torch.float32) * 2.0**-24

    def normal(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Standard normal numbers, shaped as `like`."""
        quantile = (self.bits(like, name).to(torch.float64) + 0.5) * 2.0**-32
        numbers: torch.Tensor = torch.special.ndtri(quantile)
        return numbers

    def below(self, like: torch.Tensor, p: float | torch.Tensor, name: str) -> torch.Tensor:
        """Booleans that are true with probability `p`, shaped as `like`."""
        if isinstance(p, torch.Tensor):
            return self.uniform(like, name) < p
        return self.bits(like, name) < int(p * 2.0**32)


_known_draws: dict[int, bool] = {}
"""Whether an operation of torch draws, by its `id`, which is faster to look up than a hash."""


def _is_draw(func: Any) -> bool:
    known = _known_draws.get(id(func))
    if known is None:
        known = _known_draws[id(func)] = torch.Tag.nondeterministic_seeded in func.tags
    return known


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation could apply dropout, as attention can, but does not."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout", "dropout_p"):
            probability = (
                args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            )
            return bool(probability == 0)
    return False


def _bernoulli_(self: ExampleDraws, like: torch.Tensor, p: float | torch.Tensor = 0.5) -> torch.Tensor:
    return like.copy_(self.below(like, p, "bernoulli_"))


def _bernoulli(self: ExampleDraws, like: torch.Tensor, p: float | None = None) -> torch.Tensor:
    return self.below(like, like if p is None else p, "bernoulli").to(like.dtype)


def _native_dropout(
    self: ExampleDraws, like: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False or p == 0:
        return like.clone(), torch.ones_like(like, dtype=torch.bool)
    mask = self.below(like, 1 - p, "native_dropout")
    return like * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def _uniform_(self: ExampleDraws, like: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return like.copy_(low + (high - low) * self.uniform(like, "uniform_"))


def _normal_(self: ExampleDraws, like: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return like.copy_(mean + std * self.normal(like, "normal_"))


def _rand(self: ExampleDraws, size: Sequence[int], **how: Any) -> torch.Tensor:
    return _uniform_(self, torch.empty(size, **how))


def _rand_like(self: ExampleDraws, like: torch.Tensor, **how: Any) -> torch.Tensor:
    return _uniform_(self, torch.empty_like(like, **how))


def _randn(self: ExampleDraws, size: Sequence[int], **how: Any) -> torch.Tensor:
    return _normal_(self, torch.empty(size, **how))


def _randn_like(self: ExampleDraws, like: torch.Tensor, **how: Any) -> torch.Tensor:
    return _normal_(self, torch.empty_like(like, **how))


DRAWS: dict[str, Callable[..., Any]] = {
    "bernoulli_": _bernoulli_, "bernoulli": _bernoulli, "native_dropout": _native_dropout,
    "uniform_": _uniform_, "rand": _rand, "rand_like": _rand_like,
    "normal_": _normal_, "randn": _randn, "randn_like": _randn_like,
}  # fmt: skip
"""The replacement of each of torch's random operations."""

M1, M2 = 0x85EBCA6B, 0xC2B2AE35
"""Of murmur3's last step (Appleby 2011), which mixes 32 bits."""


@lru_cache(maxsize=64)
def _places(tail: tuple[int, ...]) -> NDArray[np.uint32]:
    """A number for each element of an example's part of a tensor, from the element's coordinates alone.

    An element has the same number in a longer batch, so more padding behind a text changes none of its draws.
    """
    numbers = np.zeros(tail, dtype=np.uint32)
    for axis, size in enumerate(tail):
        factor = np.uint32(int(random_numbers(np.array([axis], dtype=np.uint64), 1)[0, 0]) & 0xFFFFFFFF | 1)
        along = np.arange(size, dtype=np.uint32) * factor
        numbers += along.reshape(-1, *(1,) * (len(tail) - axis - 1))
    return numbers.reshape(-1)


def _hashed(seeds: Numbers, tail: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """32 random bits for each element of each example's part, [examples, elements], as int64."""
    mixed = random_numbers(seeds, 1)[:, 0]
    first, second = (mixed & np.uint64(0xFFFFFFFF)), mixed >> np.uint64(32)
    places = _places(tail)
    if device.type == "cpu":
        keys = zip(_rows(first, len(places)), _rows(second, len(places)), strict=True)
        return torch.from_numpy(np.concatenate([_mixed(places + a, b) for a, b in keys], dtype=np.int64))
    return _hashed_there(first, second, places, device)


def _hashed_there(
    first: Numbers, second: Numbers, places: NDArray[np.uint32], device: torch.device
) -> torch.Tensor:
    """The bits of `_hashed`, computed on the device."""
    a, b, there = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (first, second, places))
    return _mixed_there(there + a[:, None], b[:, None])


NUMBERS_PER_BLOCK = 1 << 16
"""How many numbers are mixed together, so that they stay in a core's cache."""


def _rows(values: Numbers, places: int) -> list[NDArray[np.uint32]]:
    """The values in columns, in blocks of as many rows as are mixed together."""
    size = max(1, NUMBERS_PER_BLOCK // max(places, 1))
    column = values.astype(np.uint32).reshape(-1, 1)
    return [column[start : start + size] for start in range(0, len(column), size)]


def _mixed(x: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The numbers, mixed in place."""
    room = np.right_shift(x, 16)
    x ^= room
    x *= np.uint32(M1)
    x ^= key
    x ^= np.right_shift(x, 13, out=room)
    x *= np.uint32(M2)
    x ^= np.right_shift(x, 16, out=room)
    return x


def _mixed_there(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """As `_mixed`, on a GPU, in 64 bits of which the lower half counts."""
    low = 0xFFFFFFFF
    x &= low
    x ^= x >> 16
    x = (x * M1) & low
    x ^= key
    x ^= x >> 13
    x = (x * M2) & low
    x ^= x >> 16
    return x
