"""Random draws under example-level privacy: each belongs to one example, or to the step as a whole.

Guarantee: what is drawn for an example depends on the job's seed, the purpose, round, client and step, on the
example's content and on which of its equals it is; neither on how many examples there are nor on where it
stands. One example more or less therefore changes nobody else's dropout, augmentation, view or seeded coin.
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

from atoll.backbones.encoder import Variation
from atoll.client.training.batches import GOLDEN, random_numbers, uniform_numbers
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.feature_cache import key_table
from atoll.protocol.random_streams import Purpose, global_stream, stream_seed

Numbers = NDArray[np.uint64]
"""What an example's draws are made of, one for each example."""

Step = tuple[int, str, int]
"""(round, client, step of the round)."""


def example_numbers(keys: Sequence[bytes]) -> Numbers:
    """A number for each of a client's examples, [n], of its content and of which of its equals it is.

    An equal that comes as one more takes the next occurrence; those that were there keep their numbers.
    """
    if not keys:
        return np.empty(0, dtype=np.uint64)
    table = key_table(keys)
    content = table.view(np.uint64).reshape(len(keys), -1)[:, 0]
    numbers: Numbers = random_numbers(content + GOLDEN * occurrences(table), 1)[:, 0]
    return numbers


def occurrences(table: NDArray[Any]) -> Numbers:
    """How many equals stand before each entry, [n]."""
    _, group = np.unique(table, return_inverse=True)
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    place = np.arange(len(ordered)) - np.repeat(starts, np.diff([*starts, len(ordered)]))
    found = np.empty(len(ordered), dtype=np.uint64)
    found[order] = place
    return found


def example_seeds(numbers: Numbers, seed: int, *purpose: Purpose) -> Numbers:
    """The seed of each example's draws for one purpose, [n]."""
    seeds: Numbers = random_numbers(numbers ^ np.uint64(stream_seed(seed, *purpose)), 1)[:, 0]
    return seeds


def seeded_coins(numbers: Numbers, steps: int, seed: int, *purpose: Purpose) -> NDArray[np.float64]:
    """Each example's uniform number in every step, [steps, n]: for simulations, they protect nobody."""
    return uniform_numbers(example_seeds(numbers, seed, *purpose), steps).T


def example_views(numbers: Numbers, views: int, job: Job, step: Step) -> NDArray[np.int64]:
    """Which of its kept views each example shows in a step, [n]."""
    round, client, number = step
    seeds = example_seeds(numbers, job.seed, "view", round, client, number)
    return (seeds % np.uint64(views)).astype(np.int64)


def example_variation(numbers: Numbers, job: Job, step: Step) -> Variation | None:
    """How a step's inputs vary at random, each by its own draws; not at all, unless the job says so."""
    if not job.train.augment:
        return None
    seeds = example_seeds(numbers, job.seed, "augment", *step)
    return Variation(job.train.augment, lambda place: torch.Generator().manual_seed(int(seeds[place]) >> 1))


@contextmanager
def example_draws(numbers: Numbers, seed: int, step: Step) -> Iterator[None]:
    """Within, all that a network draws for a batch of these examples is drawn for each on its own.

    Raises:
        ConfigError: what is drawn can't be told apart by examples.
    """
    with global_stream(seed, "dropout", *step), ExampleDraws(example_seeds(numbers, seed, "dropout", *step)):
        yield


class ExampleDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces whatever torch draws by numbers of each example's own seed; `seeds` are the batch's, [batch].

    Every draw of a pass has a number, which comes of torch's global generator: one that is made again, for a
    block whose activations were forgotten, has the same one, for torch puts the generator back then.
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
        """Random numbers in [0, 2^32) in the shape of a tensor whose first axis runs over the examples.

        Raises:
            ConfigError: it doesn't.
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
        """Numbers in [0, 1) in the shape of a tensor."""
        return (self.bits(like, name) >> 8).to(torch.float32) * 2.0**-24

    def normal(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Standard normal numbers in the shape of a tensor."""
        quantile = (self.bits(like, name).to(torch.float64) + 0.5) * 2.0**-32
        numbers: torch.Tensor = torch.special.ndtri(quantile)
        return numbers

    def below(self, like: torch.Tensor, p: float | torch.Tensor, name: str) -> torch.Tensor:
        """Where a coin of probability `p` says yes, in the shape of a tensor."""
        if isinstance(p, torch.Tensor):
            return self.uniform(like, name) < p
        return self.bits(like, name) < int(p * 2.0**32)


_known_draws: dict[int, bool] = {}
"""By the identity of an operation of torch's, which lives as long as the process: hashing takes longer."""


def _is_draw(func: Any) -> bool:
    known = _known_draws.get(id(func))
    if known is None:
        known = _known_draws[id(func)] = torch.Tag.nondeterministic_seeded in func.tags
    return known


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether dropout is only a part of what an operation can do (attention, say), and off."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout", "dropout_p"):
            given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given == 0)
    return False


def _bernoulli_(self: ExampleDraws, given: torch.Tensor, p: float | torch.Tensor = 0.5) -> torch.Tensor:
    return given.copy_(self.below(given, p, "bernoulli_"))


def _bernoulli(self: ExampleDraws, given: torch.Tensor, p: float | None = None) -> torch.Tensor:
    return self.below(given, given if p is None else p, "bernoulli").to(given.dtype)


def _native_dropout(
    self: ExampleDraws, given: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False or p == 0:
        return given.clone(), torch.ones_like(given, dtype=torch.bool)
    kept = self.below(given, 1 - p, "native_dropout")
    return given * kept * (0.0 if p == 1 else 1 / (1 - p)), kept


def _uniform_(self: ExampleDraws, given: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return given.copy_(low + (high - low) * self.uniform(given, "uniform_"))


def _normal_(self: ExampleDraws, given: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return given.copy_(mean + std * self.normal(given, "normal_"))


def _rand(self: ExampleDraws, size: Sequence[int], **how: Any) -> torch.Tensor:
    return _uniform_(self, torch.empty(size, **how))


def _rand_like(self: ExampleDraws, given: torch.Tensor, **how: Any) -> torch.Tensor:
    return _uniform_(self, torch.empty_like(given, **how))


def _randn(self: ExampleDraws, size: Sequence[int], **how: Any) -> torch.Tensor:
    return _normal_(self, torch.empty(size, **how))


def _randn_like(self: ExampleDraws, given: torch.Tensor, **how: Any) -> torch.Tensor:
    return _normal_(self, torch.empty_like(given, **how))


DRAWS: dict[str, Callable[..., Any]] = {
    "bernoulli_": _bernoulli_, "bernoulli": _bernoulli, "native_dropout": _native_dropout,
    "uniform_": _uniform_, "rand": _rand, "rand_like": _rand_like,
    "normal_": _normal_, "randn": _randn, "randn_like": _randn_like,
}  # fmt: skip
"""How each of torch's draws is made for examples on their own."""

M1, M2 = 0x85EBCA6B, 0xC2B2AE35
"""Of murmur3's last step (Appleby 2011), which mixes 32 bits."""


@lru_cache(maxsize=64)
def _places(tail: tuple[int, ...]) -> NDArray[np.uint32]:
    """A number for each place of an example's part, by its coordinates alone.

    A place has the same one in a longer batch: more padding behind a text changes none of its draws.
    """
    found = np.zeros(tail, dtype=np.uint32)
    for axis, size in enumerate(tail):
        factor = np.uint32(int(random_numbers(np.array([axis], dtype=np.uint64), 1)[0, 0]) & 0xFFFFFFFF | 1)
        along = np.arange(size, dtype=np.uint32) * factor
        found += along.reshape(-1, *(1,) * (len(tail) - axis - 1))
    return found.reshape(-1)


def _hashed(seeds: Numbers, tail: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """32 random bits for each place of each example's part, [examples, places], as int64."""
    mixed = random_numbers(seeds, 1)[:, 0]
    first, second = (mixed & np.uint64(0xFFFFFFFF)), mixed >> np.uint64(32)
    places = _places(tail)
    if device.type == "cpu":
        keys = zip(_rows(first, len(places)), _rows(second, len(places)), strict=True)
        return torch.from_numpy(np.concatenate([_mixed(places + a, b) for a, b in keys], dtype=np.int64))
    a, b = (torch.from_numpy(part.astype(np.int64)).to(device).unsqueeze(1) for part in (first, second))
    return _mixed_there(torch.from_numpy(places.astype(np.int64)).to(device) + a, b)


NUMBERS_PER_BLOCK = 1 << 16
"""Numbers that are mixed together: they stay in a core's cache."""


def _rows(values: Numbers, places: int) -> list[NDArray[np.uint32]]:
    """The values as columns of so many rows as are mixed at once."""
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
