"""The command's entry point, which is there before anything that takes long to import."""

from __future__ import annotations

import gc

COLLECT_AFTER = 200_000
"""New objects after which Python looks for garbage in cycles. Its own 700 (2,000 from 3.13 on) make the
imports of torch and its like a fifth slower, for hardly anything of theirs is ever garbage."""


def main() -> None:
    """Run the command line."""
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    from atoll.cli.main import main as command_line

    command_line()
