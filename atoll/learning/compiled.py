"""An encoder compiled by torch.compile: once for every shape of `fixed_batches`, never a fallback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Variation
from atoll.errors import ConfigError

SHAPES = 256
"""How many shapes may be compiled; torch's default, 8, is less than the number of text lengths."""


class CompiledEncoder(Encoder):
    """An encoder compiled by torch.compile: the same features by fused operations, with other bits."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder.model
        self.width = encoder.width
        self._encoder = encoder
        self._compiled = torch.compile(encoder, dynamic=False, fullgraph=True)
        self._known: set[tuple[torch.Size, ...]] = set()
        self._compiling = threading.Lock()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Features [batch, width].

        Raises:
            ConfigError: the backbone can't be compiled here.
        """
        shapes = tuple(batch[name].shape for name in sorted(batch))
        if shapes in self._known:
            return self._run(batch)
        with self._compiling:
            try:
                with torch._dynamo.config.patch(recompile_limit=SHAPES):
                    features = self._run(batch)
            except RuntimeError as error:
                why = next(line for line in str(error).splitlines() if line.strip())
                raise ConfigError(f"backbone.compile: torch.compile failed: {why[:200]}") from error
            self._known.add(shapes)
        return features

    def _run(self, batch: Batch) -> torch.Tensor:
        features: torch.Tensor = self._compiled(batch)
        return features

    def preprocess_and_collate(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        return self._encoder.preprocess_and_collate(inputs, variation)

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        return self._encoder.fixed_batches(inputs, size, variation)


def compiler() -> str:
    """The version line of the C++ compiler that torch.compile calls.

    Raises:
        ConfigError: there is none.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name)
    if path is None:
        raise ConfigError(
            f"backbone.compile: found no C++ compiler {name!r}, expected one on the path (CXX names another)"
        )
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0]
