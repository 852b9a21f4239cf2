"""The LM Evaluation Harness on an exported adapter: its likelihoods and its accuracy are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atoll.cli.main import run as command_line
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.trained import trained
from tests.support.models import causal_job, small_llama

pytestmark = [pytest.mark.slow, pytest.mark.processes]

WORDS = ("he", "hello", "né", "to the hill", "ll", "who?", "sea", "a b")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: >-
  {{{{question}}}}
  {{%- for choice in choices %}}{{{{ '\\n' ~ 'ABCD'[loop.index0] ~ '. ' ~ choice }}}}{{% endfor -%}}
  {{{{ '\\nAnswer:' }}}}
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_bytes
"""
"""The questions as Atoll puts them where there is no template."""


def rows(count: int, first: int) -> list[dict[str, Any]]:
    """Questions of two to four choices; the right one's place follows from the question."""
    found = []
    for number in range(first, first + count):
        size = 2 + number % 3
        choices = [WORDS[(number * 3 + place) % len(WORDS)] for place in range(size)]
        found.append({"question": f"which is {number}?", "choices": choices, "answer": number % size})
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama`, a `run` that trained an adapter on it, its `export`, and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("lm-eval")
    for name, lines in (("train", rows(24, 0)), ("test", rows(20, 100))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"max_tokens": 160, "generated": False, "template": "", "samples": 0}
    plain = causal_job(
        "multiple-choice", str(folder / "train.jsonl"), small_llama(folder / "llama"),
        {"method": "lora", "rank": 4}, options,
    )  # fmt: skip
    train = plain.train.model_copy(update={"lr": 0.05, "epochs": 3})
    job: Job = plain.model_copy(update={"train": train})
    simulate(job, folder / "run", on_event=ignore_events, report=False)
    line = ["export", str(folder / "run"), "--format", "huggingface", "--out", str(folder / "export")]
    assert command_line([*line, "--data", str(folder / "test.jsonl")]) == 0
    return folder


def lm_eval(folder: Path, model: str) -> tuple[dict[str, float], list[list[float]]]:
    """(metrics, log-likelihoods of each question's choices) that its own command finds."""
    (folder / "task").mkdir(exist_ok=True)
    (folder / "task" / "ours.yaml").write_text(TASK.format(data=folder / "test.jsonl"), encoding="utf-8")
    out = folder / "found"
    line = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "ours",
        "--include_path", str(folder / "task"), "--device", "cpu", "--batch_size", "4",
        "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    (results,), (samples,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    asked = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    asked.sort(key=lambda one: one["doc_id"])
    likelihood = [[float(pair[0]) for (pair, *_) in one["resps"]] for one in asked]
    return json.loads(results.read_text("utf-8"))["results"]["ours"], likelihood


def test_its_command_finds_our_likelihoods_and_our_accuracy(exported: Path) -> None:
    base, adapter = exported / "llama", exported / "export" / "adapter"
    found, theirs = lm_eval(exported, f"pretrained={base},peft={adapter},dtype=float32")
    learner, tensors = trained(exported / "run")
    initial = learner.initial()
    table = learner.task.read(exported / "test.jsonl", learner.job.data, learner.job.task.options).train
    keys = [number.to_bytes(32, "big") for number in range(len(theirs))]
    shard = learner.task.shard(table, {}, keys=keys)
    for one, wanted in zip(learner.predictions(tensors, shard.inputs), theirs, strict=True):
        ours = dict(zip(one["order"], one["likelihood"].tolist(), strict=True))
        assert [ours[place] for place in sorted(ours)] == pytest.approx(wanted, abs=1e-4)
    measured = learner.compute(learner.evaluate(tensors, shard))
    assert (found["acc,none"], found["acc_bytes,none"]) == (
        measured["accuracy"],
        measured["accuracy_per_byte"],
    )
    assert 0 < found["acc,none"] < 1
    assert "library_name: peft" in (adapter / "README.md").read_text("utf-8")
    untrained = learner.predictions(initial, shard.inputs)
    moved = [
        abs(before - after)
        for one, wanted in zip(untrained, theirs, strict=True)
        for before, after in zip(sorted(one["likelihood"].tolist()), sorted(wanted), strict=True)
    ]
    assert max(moved) > 0.1
