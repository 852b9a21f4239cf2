"""One peer's run, in the peer's own environment; prints one JSON line.

python -m benchmarks.peers NAME WORKLOAD.safetensors
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Run a peer with its own printing sent to the error stream; only rank 0 of several reports."""
    name, path = sys.argv[1:]
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        peer = importlib.import_module(f"benchmarks.peers.{name}_peer")
        seconds, accuracy = peer.simulate(Path(path))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": seconds, "accuracy": accuracy}), flush=True)
        print(f"{name}: {statistics.median(seconds[1:] or seconds):.4f} s a round", file=sys.stderr)


if __name__ == "__main__":
    main()
