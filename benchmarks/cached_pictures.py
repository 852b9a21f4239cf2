"""The last block of a picture classifier: kept states, the whole network, a plain loop of torch's.

Generated pictures at the network's own size, random weights, batches of 8, SGD. Every system sees each
picture `--visits` times and trains the last `--layers` blocks and a new head. "kept, cold" computes and
writes the states first, "kept, warm" finds them. The plain loop is torchvision's network with gradients for
those blocks alone, and pictures that were decoded before. Systems take turns, a repetition each; the table
gives medians and their ratio to the plain loop.

    python -m benchmarks.cached_pictures [--backbone torchvision:resnet50] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.data.shard import Shard
from atoll.datasets.synthetic.png import grey_png
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.tasks import task_named
from benchmarks.cached_states import LocalTraining, in_turns, show

BATCH = 8
LR = 1e-2
CLASSES = ("bright", "dark")
PLAIN = "torch's own loop"


@dataclass(frozen=True)
class Workload:
    """What all systems learn, and how."""

    backbone: str
    examples: int
    layers: int
    visits: int
    threads: int

    def job(self, states: str | None) -> Job:
        kept = {} if states is None else {"cached_states": states}
        table: dict[str, Any] = {
            "name": "pictures",
            "seed": 0,
            "task": {"name": "image-classification"},
            "data": {"source": "digits"},
            "backbone": {"name": self.backbone, "weights": "random"},
            "tune": {"method": "last-k", "layers": self.layers},
            "train": {"lr": LR, "batch_size": BATCH, "epochs": self.visits, "threads": self.threads} | kept,
        }
        return Job.parse(table, origin="benchmark")

    def shard(self) -> Shard:
        rng = np.random.default_rng(0)
        pictures = [
            grey_png(rng.integers(0, 128, (224, 224), dtype=np.uint8) + np.uint8(127 * (number % 2)))
            for number in range(self.examples)
        ]
        keys = tuple(number.to_bytes(32, "big") for number in range(self.examples))
        return Shard(pictures, torch.arange(self.examples) % 2, keys)


def learner_and_shard(work: Workload, states: str | None) -> tuple[Learner, Shard]:
    job = work.job(states)
    return Learner.of(job, task_named(job.task.name), {"classes": list(CLASSES)}), work.shard()


class Plain:
    """The same network in a loop of torch's over batches that lie in memory."""

    def __init__(self, work: Workload) -> None:
        learner, shard = learner_and_shard(work, None)
        self.work, self.model = work, learner.model
        self.pixels = learner.collate(shard, range(work.examples))["pixel_values"]
        self.targets = shard.targets_of(range(work.examples))

    def seconds(self) -> float:
        torch.set_num_threads(self.work.threads)
        begun = time.perf_counter()
        trainable.training_mode(self.model)
        optimizer = torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=LR)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.work.visits):
            for rows in torch.split(torch.randperm(len(self.pixels), generator=generator), BATCH):
                optimizer.zero_grad()
                outputs = self.model({"pixel_values": self.pixels[rows]})
                loss = torch.nn.functional.cross_entropy(outputs, self.targets[rows])
                torch.autograd.backward(loss)
                optimizer.step()
        seconds = time.perf_counter() - begun
        self.learnt = trainable.values(self.model)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="torchvision:resnet50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--visits", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = vars(parser.parse_args())
    repeats = given.pop("repeats")
    work = Workload(**given)
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        warm = LocalTraining(*learner_and_shard(work, "fp32"))
        warm.keep_in(Path(folder))
        systems: dict[str, Any] = {
            PLAIN: Plain(work),
            "whole network": LocalTraining(*learner_and_shard(work, None)),
            "kept, cold": LocalTraining(*learner_and_shard(work, "fp32"), cold=True),
            "kept, warm": warm,
        }
        warm.learner.keep_states(warm.shard)
        show(work, in_turns({name: one.seconds for name, one in systems.items()}, repeats), PLAIN)


if __name__ == "__main__":
    main()
