"""Networks that people name, at their own size with random weights: memory, seconds, bytes for each tuning.

Two clients, two rounds, few and short examples, so that what is held is the network, and what is kept
beside it, more than activations. Every run is a process of its own; memory is that of its whole tree, and
"times the model" is what it held at most beyond what it held before, over the network's size.

    python -m benchmarks.real_size [--only bert-base] [--ways full lora] [--workers 1] [--optimizer sgd]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "head": {"tune": {"method": "head"}},
    "last-k": {"tune": {"method": "last-k", "layers": 1}},
    "lora": {"tune": {"method": "lora"}},
    "full": {"tune": {"method": "full"}},
    "lora, private clients": {
        "tune": {"method": "lora"},
        "privacy": {
            "unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clipping_norm": 1.0,
            "seeded_noise": True,
        },
    },
}  # fmt: skip
EXAMPLES = 24
ROUNDS = 2


def text_folder(folder: Path, config: str, **options: Any) -> Path:
    """A transformers folder without weights: the class's own default sizes, a small tokenizer."""
    import transformers

    from atoll.backbones.small_tokenizer import own_tokenizer

    getattr(transformers, config)(**options).save_pretrained(folder / "network")
    own_tokenizer().save_pretrained(folder / "network")
    return folder / "network"


def bert_base(folder: Path) -> dict[str, Any]:
    """BERT-base (Devlin et al. 2018), 110 million numbers, on sentences of ten words."""
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(EXAMPLES):
            word = ("light", "dark")[number % 2]
            rows.writerow([f"the room was {word} again today at {number} minutes to ten", word])
    return {
        "task": {"name": "text-classification"},
        "data": {"source": str(folder / "texts.csv"), "classes": ["dark", "light"]},
        "backbone": {"name": str(text_folder(folder, "BertConfig")), "weights": "random", "max_tokens": 16},
    }


def pictures(name: str) -> Callable[[Path], dict[str, Any]]:
    """A torchvision classifier at its own size, on pictures of two brightnesses."""

    def tables(folder: Path) -> dict[str, Any]:
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        for number in range(EXAMPLES):
            label = ("dark", "light")[number % 2]
            pixels = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + np.uint8(100 * (number % 2))
            (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "pictures" / label / f"{number}.png")
        return {
            "task": {"name": "image-classification"},
            "data": {"source": str(folder / "pictures"), "classes": ["dark", "light"]},
            "backbone": {"name": f"torchvision:{name}", "weights": "random"},
        }

    return tables


SUBJECTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "bert-base": bert_base,
    "resnet50": pictures("resnet50"),
    "vit_b_16": pictures("vit_b_16"),
}


def run(subject: str, way: str, workers: int, optimizer: str) -> dict[str, Any]:
    """Play the job in this process, which has done nothing before."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from atoll.job.job import Job
    from atoll.server.events import ignore_events
    from atoll.sim.engines.engine import simulate
    from atoll.system.memory import tree_bytes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = {
            "name": "real-size", "seed": 1, "train": {"lr": 0.001, "batch_size": 4, "optimizer": optimizer},
            "federation": {"clients": 2, "rounds": ROUNDS},
        } | SUBJECTS[subject](folder) | WAYS[way]  # fmt: skip
        before = tree_bytes(os.getpid())
        result = simulate(
            Job.parse(table, origin="benchmark"), folder / "run", on_event=ignore_events, report=False,
            workers=workers,
        )  # fmt: skip
    return {
        "seconds": result.seconds,
        "peak_mb": result.peak_rss_mb,
        "before_mb": before / 2**20,
        "bytes_up": result.bytes_up / ROUNDS / 2,
        "loss": [line["loss"] for line in result.rounds],
        "sha256": result.model_sha256,
    }


def size_mb(subject: str) -> float:
    """Of the network's weights in float32."""
    from atoll.backbones.resolve import resolve
    from atoll.job.job import Job
    from atoll.learning.learner import Learner
    from atoll.tasks import task_named

    with tempfile.TemporaryDirectory() as name:
        table = {"name": "size", "seed": 1, "federation": {"clients": 2, "rounds": 1}}
        job = Job.parse(table | SUBJECTS[subject](Path(name)), origin="benchmark")
        learner = Learner(job, task_named(job.task.name), {"classes": ["a", "b"]}, resolve(job.backbone, 1))
        return sum(p.numel() for p in learner.encoder.parameters()) * 4 / 2**20


def main() -> None:
    """Each network with each way of tuning, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        subject, way = given.one
        sys.stdout.write(json.dumps(run(subject, way, given.workers, given.optimizer)) + "\n")
        return
    sys.stdout.write("| network | MB | tuned | sent by a client | memory | times the model | seconds |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for subject in given.only:
        whole = size_mb(subject)
        for way in given.ways:
            command = [sys.executable, "-m", "benchmarks.real_size", "--one", subject, way]
            command += ["--workers", str(given.workers), "--optimizer", given.optimizer]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.stdout.write(f"{subject}, {way}: failed: {ended.stderr.strip().splitlines()[-1]}\n")
            else:
                found = json.loads(ended.stdout.splitlines()[-1])
                sys.stdout.write(row(subject, whole, way, found))
            sys.stdout.flush()


def row(subject: str, whole: float, way: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    times = (found["peak_mb"] - found["before_mb"]) / whole
    sent = found["bytes_up"] / 2**20
    return (
        f"| {subject} | {whole:.0f} | {way} | {sent:.2f} MB | {found['peak_mb']:.0f} MB | {times:.1f}"
        f" | {found['seconds']:.0f} |\n"
    )


if __name__ == "__main__":
    main()
