"""What options of training gain or cost, each against the plain job on a case made for it, over seeds.

    python -m benchmarks.craft [CASE …] [--seeds 5]        # imbalance, few, stages, speech, network

`imbalance`: digits of which one in fifty is of the last five classes, measured on even ones. `few`: 10
clients of 20 digits (MNIST, MobileNetV2's features). `stages`: the same, of which more than the head is
tuned, from the start or later. `speech`: a small recogniser from nothing, on 480 spoken sentences at 4
clients. `network`: a small vision transformer, from nothing, on 20 digits each. A seed deals the data anew
and starts the model anew. Intervals are Student's, 95 % over seeds; "gain" is the mean of the differences
to the plain run of the same seed. Seconds are of one run with what it shares with others cached: read them
as more or less, other work may run beside.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.results import Estimate
from benchmarks.metrics import defined, mean_and_half

Table = dict[str, Any]

BASE: Table = {
    "task": {"name": "image-classification"},
    "evaluate": {"every": 1_000_000},
}


@dataclass(frozen=True)
class Case:
    """A job that has a weakness, what may help (changes by the name of the row), and what is read from it.

    Without a `value` that is the metric on the test part.
    """

    metric: str
    table: Callable[[Path], Table]
    ways: Mapping[str, Table]
    value: Callable[[RunResult], float] | None = None

    def of(self, result: RunResult) -> float:
        """What a run is judged by."""
        return defined(result.final["server"][self.metric]) if self.value is None else self.value(result)


def uneven(folder: Path) -> Table:
    """Digits of 8 x 8 pixels, of which one in fifty is of the last five classes; the test part is even."""
    from atoll.datasets.registry import load_source

    source = folder / "uneven"
    if not source.exists():
        rows = load_source("digits")["train"].to_pylist()
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        kept, held = [rows[i] for i in order[:1200]], [rows[i] for i in order[1200:]]
        common = [row for row in kept if row["label"] in "01234"]
        found = [[row for row in kept if row["label"] == label] for label in "56789"]
        rare = [row for rows in zip(*found, strict=False) for row in rows][: len(common) // 50]
        parts = {"train": datasets.Dataset.from_list(common + rare), "test": datasets.Dataset.from_list(held)}
        datasets.DatasetDict(parts).save_to_disk(str(source))
    return {
        "data": {"source": str(source)},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"lr": 2.0, "batch_size": 16},
        "federation": {"clients": 4, "rounds": 30},
    }


def few(folder: Path) -> Table:
    """20 of MNIST's digits at each of 10 clients, on features of a network that knows photographs."""
    return {
        "data": {"source": "mnist-5k", "partition": {"kind": "resampled", "examples": 25}},
        "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 64},
        "train": {"lr": 0.01, "batch_size": 10, "optimizer": "adam", "epochs": 2},
        "federation": {"clients": 10, "rounds": 40},
    }


def stages(folder: Path) -> Table:
    """The same digits, fewer rounds: networks are trained through, features aren't kept."""
    return merged(few(folder), {"federation": {"rounds": 20}, "train": {"epochs": 1}})


def speech(folder: Path) -> Table:
    """Sentences that espeak-ng speaks, which a convolutional recogniser hears as log-mel spectra."""
    return {
        "task": {"name": "speech-recognition"},
        "data": {"source": "generated-speech"},
        "backbone": {"name": "atoll:small-ctc", "weights": "random", "options": {"layers": 1}},
        "tune": {"method": "full"},
        "train": {"lr": 0.003, "batch_size": 16, "optimizer": "adamw", "epochs": 3},
        "federation": {"clients": 4, "rounds": 12},
    }


def network(folder: Path) -> Table:
    """A vision transformer of 0.2 million parameters, from nothing on 20 digits at each of 10 clients."""
    where = folder / "vit"
    where.mkdir(exist_ok=True)
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 256, "image_size": 16, "patch_size": 4,
        "num_channels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    (where / "config.json").write_text(json.dumps(config))
    (where / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        )
    )
    return {
        "data": {"source": "digits", "partition": {"kind": "resampled", "examples": 25}},
        "backbone": {"name": str(where), "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 0.001, "batch_size": 10, "optimizer": "adam"},
        "federation": {"clients": 10, "rounds": 60},
    }


def train(**options: Any) -> Table:
    """Changes of `[train]`."""
    return {"train": options}


LAST: Table = {"method": "last-k", "layers": 4}

CASES = {
    "imbalance": Case(
        "macro_f1",
        uneven,
        {
            "plain": {},
            "weights": train(imbalance="weights"),
            "focal loss": train(imbalance="focal"),
            "logit adjustment": train(imbalance="logits"),
            "balanced sampling": train(imbalance="sampling"),
        },
    ),
    "few": Case(
        "accuracy",
        few,
        {
            "plain": {},
            "weight decay 0.01 (adamw)": train(optimizer="adamw", weight_decay=0.01),
            "label smoothing 0.1": train(label_smoothing=0.1),
            "crop and rotate, 8 views": train(augment=("crop", "rotate"), cached_views=8),
            "rotate, 8 views": train(augment=("rotate",), cached_views=8),
            "early stopping, patience 5": {"evaluate": {"every": 1, "patience": 5}},
        },
    ),
    "stages": Case(
        "accuracy",
        stages,
        {
            "head": {},
            "last-k": {"tune": LAST, "train": {"lr": 0.0001}},
            "head, then last-k": {"tune": {"method": "head", "then": ({**LAST, "after": 10, "lr": 0.0001},)}},
        },
    ),
    "speech": Case(
        "wer",
        speech,
        {
            "plain": {},
            "spec-augment": train(augment=("spec-augment",)),
        },
    ),
    "network": Case(
        "accuracy",
        network,
        {
            "plain": {},
            "dropout 0.1": train(dropout=0.1),
            "dropout 0.3": train(dropout=0.3),
            "label smoothing 0.1": train(label_smoothing=0.1),
            "weight decay 0.05 (adamw)": train(optimizer="adamw", weight_decay=0.05),
            "rotate": train(augment=("rotate",)),
            "crop and rotate": train(augment=("crop", "rotate")),
            "early stopping, patience 5": {"evaluate": {"every": 1, "patience": 5}},
        },
    ),
}


@dataclass(frozen=True)
class Measured:
    """One run: its metric in the end, what one client sent in a round, how many rounds, and seconds."""

    value: float
    bytes_up: float
    rounds: int
    seconds: float


def merged(*tables: Table) -> Table:
    """Tables laid over each other, one level deep."""
    whole: Table = {}
    for table in tables:
        for key, value in table.items():
            whole[key] = {**whole[key], **value} if isinstance(whole.get(key), dict) else value
    return whole


def measured(case: Case, name: str, way: str, seed: int, folder: Path) -> Measured:
    """The case's job in one way, played once."""
    table = merged(BASE, case.table(folder), case.ways[way], {"name": name, "seed": seed})
    out = folder / f"{name}-{list(case.ways).index(way)}-{seed}"
    result = simulate(Job.parse(table, origin=name), out, on_event=ignore_events, report=False)
    bytes_up = result.bytes_up / max(1, result.clients_trained)
    return Measured(case.of(result), bytes_up, len(result.rounds), result.seconds)


def line(name: str, runs: list[Measured], plain: list[Measured]) -> str:
    """One row of the table."""
    gain = Estimate.of([run.value - other.value for run, other in zip(runs, plain, strict=True)])
    bytes_up = sum(run.bytes_up for run in runs) / len(runs)
    rounds, seconds = (sum(getattr(run, of) for run in runs) / len(runs) for of in ("rounds", "seconds"))
    apart = "" if runs is plain else mean_and_half(gain, "+")
    value = mean_and_half(Estimate.of([run.value for run in runs]))
    return f"{name:<28}{value:>16}{apart:>18}{bytes_up:>12,.0f}{rounds:>8.0f}{seconds:>9.1f}"


def play(cases: Mapping[str, Case], text: str | None) -> None:
    """Run every way of every case that is asked for, with every seed, and print a table for each case."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*cases, []], metavar="CASE")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    for name in options.cases or cases:
        case = cases[name]
        print(f"{name}, seeds 1 to {options.seeds}")
        head = f"{case.metric:>16}{'gain':>18}{'bytes up':>12}{'rounds':>8}{'seconds':>9}"
        print(f"{'':<28}{head}", flush=True)
        plain: list[Measured] = []
        with tempfile.TemporaryDirectory() as folder:
            for way in case.ways:
                runs = [measured(case, name, way, s, Path(folder)) for s in range(1, options.seeds + 1)]
                plain = plain or runs
                print(line(way, runs, plain), flush=True)
        print()


if __name__ == "__main__":
    play(CASES, __doc__)
