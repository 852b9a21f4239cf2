"""LoRA in the last blocks of a causal model: kept states beside the whole network and peft's own loop.

Prompts and completions of generated words, in batches of 8, AdamW; `--learnt` is the completions' part of the
words, 1 for texts of which all is learnt. Every system sees each example `--visits` times, with the same
adapters (rank 8 on queries and values of the last `--layers` blocks) in `--precision`. "kept, cold" computes
and writes the states first, "kept, warm" finds them. The plain loop is transformers' model, peft's
`get_peft_model` and an optimizer, with transformers' own loss, whose labels leave out the prompts. Systems
take turns, a repetition each; the table gives medians and their ratio to the plain loop.

    python -m benchmarks.cached_states [--backbone hf:SmolLM2-135M-Instruct] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from atoll.backbones.checkpoint import load_transformer
from atoll.backbones.resolve import resolve
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.prefix.kept_states import KeptStatesOfFixed, KeptStatesOfTokens
from atoll.protocol.tensors import Tensors
from atoll.tasks.language_modeling.causal import KIND
from atoll.tasks.language_modeling.task import LANGUAGE_MODELING

WORDS = ("federated", "island", "lagoon", "reef", "the", "of", "and", "measures", "tide", "every", "seven")
BATCH = 8
LR = 1e-3
PLAIN = "peft's own loop"
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Workload:
    """What all systems learn, and how."""

    backbone: str
    examples: int
    tokens: int
    layers: int
    visits: int
    learnt: float
    precision: str
    threads: int

    def job(self, states: str | None) -> Job:
        kept = {} if states is None else {"cached_states": states}
        table: dict[str, Any] = {
            "name": "states",
            "seed": 0,
            "task": {"name": "language-modeling", "options": {"max_tokens": self.tokens}},
            "data": {"source": "chats"},
            "backbone": {"name": self.backbone},
            "tune": {"method": "lora", "rank": 8, "targets": list(TARGETS), "layers": self.layers},
            "train": {
                "optimizer": "adamw", "lr": LR, "batch_size": BATCH, "epochs": self.visits,
                "precision": self.precision, "threads": self.threads,
            } | kept,
        }  # fmt: skip
        return Job.parse(table, origin="benchmark")

    def rows(self) -> pa.Table:
        """Of a quarter to three quarters of `tokens` words: some take two tokens."""
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(self.examples):
            words = rng.choice(WORDS, rng.integers(self.tokens // 4, 3 * self.tokens // 4)).tolist()
            cut = round(len(words) * (1 - self.learnt))
            rows.append({"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])})
        if self.learnt == 1:
            return pa.table({"text": [row["completion"] for row in rows]})
        return pa.Table.from_pylist(rows)


def learner_and_shard(work: Workload, states: str | None) -> tuple[Learner, Shard]:
    learner = Learner.of(work.job(states), LANGUAGE_MODELING, {})
    dataset = learner.task.from_builtin({"train": work.rows()}, learner.job).train
    return learner, learner.task.shard(dataset, {})


class LocalTraining:
    """A client's local training, as a round does it; `cold` begins each time without kept states."""

    def __init__(self, learner: Learner, shard: Shard, *, cold: bool = False) -> None:
        self.learner, self.shard, self.cold = learner, shard, cold
        self.start: Tensors = learner.initial()
        self.learnt: Tensors = {}

    def seconds(self) -> float:
        if not self.cold:
            return self._trained()
        with tempfile.TemporaryDirectory() as folder:
            self.keep_in(Path(folder))
            return self._trained()

    def keep_in(self, folder: Path) -> None:
        """From now on keep states in a folder, and forget those that were mapped."""
        kept = self.learner.kept_states
        assert isinstance(kept, KeptStatesOfTokens | KeptStatesOfFixed)
        cache = kept.cache.cache if isinstance(kept, KeptStatesOfTokens) else kept.states.cache
        cache.folder = folder
        cache._parts.clear()

    def _trained(self) -> float:
        begun = time.perf_counter()
        update = train_model(
            self.learner, self.start, self.shard, self.learner.job, client="c", round=1, plan={}
        )
        seconds = time.perf_counter() - begun
        self.learnt = {name: self.start[name] + delta for name, delta in update.delta.items()}
        return seconds


class Plain:
    """peft's model in a loop over batches, padded to the longest, with transformers' own loss."""

    def __init__(self, work: Workload) -> None:
        from peft import LoraConfig, get_peft_model

        self.work, job = work, work.job(None)
        network: Any = load_transformer(resolve(job.backbone, job.seed), job.seed, KIND)
        blocks = range(network.config.num_hidden_layers)[-work.layers :]
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=list(TARGETS), layers_to_transform=list(blocks)
        )
        self.model: Any = get_peft_model(network, config)
        _, shard = learner_and_shard(work, None)
        self.examples = [one["input_ids"] for one in shard.inputs]
        self.labels = [torch.full_like(ids, -100) for ids in self.examples]
        for own, one in zip(self.labels, shard.inputs, strict=True):
            own[one["places"] + 1] = one["input_ids"][one["places"] + 1]

    def seconds(self) -> float:
        torch.set_num_threads(self.work.threads)
        begun = time.perf_counter()
        self.model.train()
        optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=LR)
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.work.visits):
            for rows in torch.split(torch.randperm(len(self.examples), generator=generator), BATCH):
                ids = [self.examples[row] for row in rows.tolist()]
                batch = pad_sequence(ids, batch_first=True)
                labels = pad_sequence([self.labels[row] for row in rows.tolist()], True, -100)
                lengths = torch.tensor([len(one) for one in ids])
                mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=self.work.precision == "bf16"):
                    loss = self.model(input_ids=batch, attention_mask=mask, labels=labels).loss
                loss.backward()
                optimizer.step()
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="hf:SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--visits", type=int, default=10)
    parser.add_argument("--learnt", type=float, default=0.5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = vars(parser.parse_args())
    repeats = given.pop("repeats")
    work = Workload(**given)
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        systems: dict[str, Any] = {
            PLAIN: Plain(work),
            "whole network": LocalTraining(*learner_and_shard(work, None)),
            "kept, cold": LocalTraining(*learner_and_shard(work, work.precision), cold=True),
            "kept, warm": LocalTraining(*learner_and_shard(work, work.precision)),
        }
        warm = systems["kept, warm"]
        warm.keep_in(Path(folder))
        warm.learner.keep_states(warm.shard)
        show(work, in_turns({name: one.seconds for name, one in systems.items()}, repeats), PLAIN)


def in_turns(systems: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each system, a repetition each in turn; the first one isn't counted."""
    found: dict[str, list[float]] = {name: [] for name in systems}
    for repeat in range(repeats + 1):
        for name, seconds in systems.items():
            taken = seconds()
            if repeat:
                found[name].append(taken)
    return found


def show(work: object, found: dict[str, list[float]], plain: str) -> None:
    """Print a table of seconds, and how many times as fast as the plain loop each system is."""
    print(work)
    print("load average over 1, 5, 15 minutes:", *(f"{load:.1f}" for load in os.getloadavg()))
    base = statistics.median(found[plain])
    print(f"{'':<18}{'median s':>10}{'min':>8}{'max':>8}{'times as fast':>15}")
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        ratio = base / middle
        print(f"{name:<18}{middle:>10.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}{ratio:>15.2f}")


if __name__ == "__main__":
    main()
