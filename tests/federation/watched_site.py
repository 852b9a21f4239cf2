"""A site as `atoll join` makes it, whose secrets of secure sums can be looked for on the wire.

They go to `secrets.jsonl` in the folder $ATOLL_TEST_WATCH. While there is a file `unmasked` beside it, all
masks are zero: a bug that the search must find.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

import atoll.client.dp.secure_aggregation
import atoll.privacy.secagg
from atoll.privacy.secagg import Participant, Vector, mask_of

FOLDER = Path(os.environ["ATOLL_TEST_WATCH"])


class Watched(Participant):
    """A participant that tells its secrets to a file."""

    def advertise(self) -> bytes:
        told = {
            "name": self.name,
            "context": self.context.hex(),
            "cipher_key": self._cipher_key.private_bytes_raw().hex(),
            "mask_key": self._mask_key.private_bytes_raw().hex(),
            "seed": self._seed.hex(),
        }
        with (FOLDER / "secrets.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")
        return super().advertise()


def mask_or_zeros(seed: bytes, count: int) -> Vector:
    if (FOLDER / "unmasked").exists():
        return np.zeros(count, dtype=np.uint64)
    return mask_of(seed, count)


def main() -> None:
    """`atoll join` whose executor is watched."""
    import atoll.cli.site
    from atoll.cli.start import main as start

    vars(atoll.cli.site)["EXECUTOR"] = "tests.federation.watched_site:executor"
    start()


def executor() -> None:
    """The entry of the process that works for the site."""
    from atoll.cli.site import executor as answer

    vars(atoll.client.dp.secure_aggregation)["Participant"] = Watched
    vars(atoll.privacy.secagg)["mask_of"] = mask_or_zeros
    answer()
