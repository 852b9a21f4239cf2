"""Intent and slots: what is read, what counts, what is measured, what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.datasets.synthetic.commands import generated_commands
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning import trainable
from atoll.learning.learner import Learner, sum_states
from atoll.privacy.noise import seeded
from atoll.protocol.random_streams import stream_seed
from atoll.tasks.data_info import check_info_stated
from atoll.tasks.intent.task import IGNORE_INDEX, INTENT
from tests.backbones.test_backbones import tiny_bert

ROWS = [
    {"text": "play jazz", "intent": "play", "slots": "O B-music"},
    {"text": "play old songs please", "intent": "play", "slots": "O B-music I-music O"},
    {"text": "drive to berlin", "intent": "navigate", "slots": "O O B-place"},
    {"text": "take me to the station", "intent": "navigate", "slots": "O O O B-place I-place"},
]


def job_of(tune: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "commands",
        "seed": 4,
        "task": {"name": "intent"},
        "data": {"source": "generated-commands"},
        "backbone": {"name": "atoll:small-text", "weights": "random", "max_tokens": 32},
        "tune": tune or {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.003, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def learner_and_shard(
    rows: list[dict[str, str]], tune: dict[str, Any] | None = None, **tables: Any
) -> tuple[Learner, Shard]:
    job = job_of(tune, **tables)
    table = INTENT.from_builtin({"train": pa.Table.from_pylist(rows)}, job)
    data_info = INTENT.merge_info([INTENT.local_info(table.train, job.data, {})])
    learner = Learner.of(job, INTENT, data_info)
    return learner, learner.task.shard(table.train, data_info)


def read(tmp_path: Path, *rows: dict[str, Any]) -> Any:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return INTENT.read(path, DataSection(source=str(path)), {})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "play jazz", "intent": "play", "slots": "O"}, "1 slot tags for 2 words"),
        ({"text": "play jazz", "intent": "play", "slots": "O music"}, "slot tag 'music', expected O"),
        ({"text": "", "intent": "play", "slots": ""}, "empty, expected some text"),
        ({"text": "play", "intent": None, "slots": "O"}, "missing"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem) as told:
        read(tmp_path, row)
    assert "\n" not in str(told.value)


def test_what_is_written_is_read_again_with_the_same_keys(tmp_path: Path) -> None:
    data = DataSection(source="x", columns={"slots": "marks"}, text="said")
    table = INTENT.from_builtin({"train": pa.Table.from_pylist(ROWS)}, job_of())
    INTENT.write(table.train, tmp_path / "out", data)
    again = INTENT.read(tmp_path / "out", data, {})
    assert INTENT.keys(again.train) == INTENT.keys(table.train)


def test_facts_are_sorted_unions_and_a_job_may_pin_the_intents() -> None:
    parts = [
        INTENT.from_builtin({"train": pa.Table.from_pylist(r)}, job_of()).train for r in (ROWS[:2], ROWS[2:])
    ]
    data = DataSection(source="x")
    assert INTENT.merge_info([INTENT.local_info(part, data, {}) for part in parts]) == {
        "intents": ["navigate", "play"],
        "tags": ["B-music", "B-place", "I-music", "I-place", "O"],
    }
    pinned = DataSection(source="x", classes=("play", "stop", "navigate"))
    assert INTENT.merge_info([INTENT.local_info(p, pinned, {}) for p in parts])["intents"] == list(
        pinned.classes or ()
    )
    with pytest.raises(DataError, match="intent 'play' is not in"):
        INTENT.local_info(parts[0], DataSection(source="x", classes=("stop", "go")), {})


def test_places_behind_a_short_sentence_count_neither_in_the_loss_nor_in_the_metric() -> None:
    learner, shard = learner_and_shard(ROWS)
    model = learner.model.eval()
    targets = shard.targets_of(range(4))
    assert targets.shape == (4, 6) and (targets == IGNORE_INDEX).any()
    with torch.no_grad():
        outputs = model(learner.collate(shard, range(4)))
        each = [
            float(learner.task.loss(model(learner.collate(shard, [row])), shard.targets_of([row])))
            for row in range(4)
        ]
    assert float(learner.task.loss(outputs, targets)) == pytest.approx(sum(each) / 4, rel=1e-4)
    changed = torch.where((targets == IGNORE_INDEX).unsqueeze(2), torch.full_like(outputs, 7.0), outputs)
    assert torch.equal(learner.task.loss(changed, targets), learner.task.loss(outputs, targets))


def test_a_sentence_has_as_many_tags_as_words_whoever_is_asked_for_beside_it() -> None:
    learner, _ = learner_and_shard(ROWS)
    asked = [row["text"].split() for row in ROWS]
    said = learner.task.format_predictions(learner.predictions(learner.initial(), asked), learner.data_info)
    assert [len(one["slots"].split()) for one in said] == [len(words) for words in asked]


def test_metrics_of_clients_add_up_to_those_of_all_data() -> None:
    rows = generated_commands(3, 40)["train"].to_pylist()
    learner, whole = learner_and_shard(rows, train={"lr": 0.003, "optimizer": "adamw", "epochs": 4})
    start = learner.initial()
    update = train_model(learner, start, whole, learner.job, client="a", round=1, plan={})
    tensors = {name: t + update.delta[name] for name, t in start.items()}
    parts = [whole.select(range(9)), whole.select(range(9, len(whole)))]
    together = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    assert together == pytest.approx(learner.compute(learner.evaluate(tensors, whole)), rel=1e-5)


TUNED = [
    {"method": "head"}, {"method": "last-k", "layers": 1}, {"method": "lora", "rank": 2}, {"method": "full"},
]  # fmt: skip


@pytest.mark.parametrize("tune", TUNED, ids=lambda tune: tune["method"])
@pytest.mark.parametrize("network", ["small", "bert"])
def test_every_way_of_tuning_takes_a_step(tmp_path: Path, network: str, tune: dict[str, Any]) -> None:
    backbone = {"name": "atoll:small-text", "weights": "random"}
    if network == "bert":
        backbone = {"name": str(tiny_bert(tmp_path / "bert"))}
    learner, shard = learner_and_shard(ROWS, tune, backbone=backbone)
    start = learner.initial()
    assert {name for name in start if name.startswith("head.")} == {
        f"head.{part}.{kind}" for part in ("intent", "tag") for kind in ("weight", "bias")
    }
    assert (len(start) == 4) == (tune["method"] == "head")
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert all(bool(update.delta[f"head.{part}.bias"].any()) for part in ("intent", "tag"))


@pytest.mark.parametrize("tune", [TUNED[0], TUNED[3]], ids=lambda tune: tune["method"])
def test_private_training_clips_each_sentences_own_gradient(tune: dict[str, Any]) -> None:
    learner, shard = learner_and_shard(ROWS, tune, train={"lr": 0.5, "batch_size": 4})
    rows = np.array([0, 2, 3])
    how = DpSgd(0.5, 1e-9, 4.0, lambda c: seeded(stream_seed(1, "noise", c)), lambda c, n: [rows])
    start = learner.initial()
    update = train_privately(learner, start, shard, how, client="c", round=1, plan={})
    model, total = learner.model, {name: torch.zeros_like(t).double() for name, t in start.items()}
    trainable.load_values(model, start)
    for row in rows.tolist():
        model.zero_grad()
        learner.task.loss(model(learner.collate(shard, [row])), shard.targets_of([row])).backward()
        own = {n: p.grad.double() for n, p in trainable.trainable(model).items() if p.grad is not None}
        norm = float(torch.stack([g.square().sum() for g in own.values()]).sum().sqrt())
        for name, g in own.items():
            total[name] += g * min(1.0, 0.5 / norm) / 4.0
    for name, delta in update.delta.items():
        assert torch.allclose(delta.double(), -0.5 * total[name], atol=1e-5), name


def test_slots_of_a_clients_own_must_not_be_told_under_a_promise() -> None:
    privacy = {"unit": "client", "epsilon": 1.0, "delta": 1e-5, "clipping_norm": 1.0}
    own = {"source": "./mine", "classes": ["a", "b"]}
    setting = job_of(privacy=privacy, data=own, federation={"cohort_rate": 0.5})
    with pytest.raises(ConfigError, match=r"task\.options\.tags: missing, expected the list of slot tags"):
        check_info_stated(setting, INTENT)
    given = {"name": "intent", "options": {"tags": ["B-place"]}}
    check_info_stated(job_of(privacy=privacy, data=own, federation={"cohort_rate": 0.5}, task=given), INTENT)


def test_a_network_that_reads_no_words_is_refused() -> None:
    with pytest.raises(WeightsError, match="does not read words"):
        learner_and_shard(ROWS, backbone={"name": "raw:pixels"})[0].model  # noqa: B018


def test_learning_beats_not_learning() -> None:
    learner, shard = learner_and_shard(
        ROWS, train={"lr": 0.005, "optimizer": "adamw", "batch_size": 4, "epochs": 30}
    )
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    trained = {name: t + update.delta[name] for name, t in start.items()}
    before, after = (learner.compute(learner.evaluate(t, shard)) for t in (start, trained))
    assert after["intent_accuracy"] == 1.0 > before["intent_accuracy"]
    assert after["slot_f1"] == 1.0 > before["slot_f1"]
    said = learner.task.format_predictions(
        learner.predictions(trained, [ROWS[2]["text"].split()]), learner.data_info
    )
    assert (said[0]["label"], said[0]["slots"]) == ("navigate", "O O B-place")
