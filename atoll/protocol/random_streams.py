"""Named random streams: each draw has a seed for its purpose, so that no order of execution can change it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Purpose = str | int


def stream_seed(seed: int, *purpose: Purpose) -> int:
    """63 bits that depend on the job's seed and on the purpose, and on nothing else.

    >>> stream_seed(7, "cohort", 1) == stream_seed(7, "cohort", 1) != stream_seed(7, "cohort", 2)
    True
    """
    # As json.dumps writes the list, without its cost: a round asks once for every client.
    parts = (encode_basestring_ascii(part) if isinstance(part, str) else str(part) for part in purpose)
    text = f"[{','.join((str(seed), *parts))}]"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *purpose: Purpose) -> torch.Generator:
    """A fresh CPU generator for one purpose, such as `stream(7, "shuffle", round, client)`."""
    import torch  # here, for seeds are wanted where torch isn't

    return torch.Generator().manual_seed(stream_seed(seed, *purpose))


@contextmanager
def global_stream(seed: int, *purpose: Purpose) -> Iterator[None]:
    """Within the block, seed torch's global CPU and GPU generators for one purpose; restore them afterwards.

    For library code that can only draw from the global generators: weight initialisation, dropout.
    """
    import torch

    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(stream_seed(seed, *purpose))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(stream_seed(seed, *purpose))
        yield
