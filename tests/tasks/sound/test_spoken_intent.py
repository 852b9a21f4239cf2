"""Intent straight from recordings: what is read, what padding may not change, what a recogniser brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.datasets.synthetic.commands import generated_commands
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner, sum_states
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.data_info import check_info_stated
from atoll.tasks.intent.task import INTENT
from tests.support.models import small_wav2vec2, small_whisper
from tests.tasks.sound.test_speech import learner_of as recogniser_of
from tests.tasks.sound.test_speech import sound, tones

SAID = ("ab", "abba", "aab", "obo", "oob o", "oobb")
"""Those that begin with one tone mean one thing, and those with another mean another."""


def job_of(tune: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "heard",
        "seed": 4,
        "task": {"name": "intent", "options": {"input": "audio"}},
        "data": {"source": "./here"},
        "backbone": {"name": "atoll:small-ctc", "weights": "random", "options": {"width": 24}},
        "tune": tune or {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.005, "batch_size": 3},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def folder_of(root: Path) -> Path:
    """Recordings, what they mean, and words that don't belong to them."""
    root.mkdir()
    for number, text in enumerate(SAID):
        (root / f"{number}.wav").write_bytes(sound(tones(text)))
    rows = [
        {"audio": f"{number}.wav", "intent": "play" if text[0] == "a" else "stop", "said": text}
        | {"text": "no words", "slots": "O"}
        for number, text in enumerate(SAID)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def learner_and_shard(root: Path, tune: dict[str, Any] | None = None, **tables: Any) -> tuple[Learner, Shard]:
    job = job_of(tune, **tables)
    table = INTENT.read(folder_of(root), DataSection(source="x"), job.task.options)
    data_info = INTENT.merge_info([INTENT.local_info(table.train, job.data, job.task.options)])
    learner = Learner.of(job, INTENT, data_info)
    return learner, learner.task.shard(table.train, data_info)


def test_recordings_and_intents_are_read_and_words_beside_them_are_left_out(tmp_path: Path) -> None:
    learner, shard = learner_and_shard(tmp_path / "d")
    assert learner.data_info == {"intents": ["play", "stop"], "tags": ["O"]}
    assert shard.targets_of(range(6)).shape == (6, 1)
    by_sound = {sound(tones(text)): float(text[0] != "a") for text in SAID}
    assert [by_sound[data] for data in shard.inputs] == shard.targets_of(range(6)).flatten().tolist()


def test_what_is_written_is_read_again_with_the_same_keys(tmp_path: Path) -> None:
    data, options = DataSection(source="x", columns={"intent": "meant"}), {"input": "audio"}
    table = INTENT.read(folder_of(tmp_path / "d"), DataSection(source="x"), options)
    INTENT.write(table.train, tmp_path / "out", data)
    again = INTENT.read(tmp_path / "out", data, options)
    assert INTENT.keys(again.train) == INTENT.keys(table.train)


def test_a_source_of_both_is_learnt_from_as_the_job_says() -> None:
    said = generated_commands(3, 10)["train"]
    clips = [{"bytes": sound(tones("ab" * n)), "path": None} for n in range(1, len(said) + 1)]
    names = ["transcript" if name == "text" else name for name in said.column_names]
    both = said.rename_columns(names).append_column("audio", pa.array(clips))
    heard = INTENT.from_builtin({"train": both}, job_of()).train
    read = INTENT.from_builtin({"train": both}, job_of(task={"name": "intent"})).train
    assert "audio" in heard.column_names and not {"text", "slots"} & set(heard.column_names)
    assert "text" in read.column_names and "audio" not in read.column_names
    # Words are the same examples, whether they were recorded or not.
    plain = INTENT.from_builtin({"train": said}, job_of(task={"name": "intent"})).train
    assert INTENT.keys(read) == INTENT.keys(plain)
    assert not set(INTENT.keys(heard)) & set(INTENT.keys(read))


def test_a_long_recording_is_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "d")
    with pytest.raises(DataError, match=r"4\.wav: 0\.60 seconds, expected 0\.05 to 0\.5 .*max_seconds"):
        INTENT.read(folder, DataSection(source="x"), {"input": "audio", "max_seconds": 0.5})


def networks(root: Path) -> dict[str, dict[str, Any]]:
    return {
        "small": {"name": "atoll:small-ctc", "weights": "random", "options": {"width": 24}},
        "group": {"name": str(small_wav2vec2(root / "group", norm="group"))},
        "hubert": {"name": str(small_wav2vec2(root / "hubert", kind="Hubert", letters=False))},
        "whisper": {"name": str(small_whisper(root / "whisper"))},
    }


@pytest.mark.parametrize("name", ["small", "group", "hubert", "whisper"])
def test_the_mean_is_over_the_recordings_own_frames(tmp_path: Path, name: str) -> None:
    learner, _ = learner_and_shard(tmp_path / "d", backbone=networks(tmp_path)[name])
    model, encoder = learner.model.eval(), learner.encoder
    short, long = sound(tones("ab")), sound(tones("baobab bob"))
    with torch.no_grad():
        alone, together = (
            model(encoder.preprocess_and_collate([short])),
            model(encoder.preprocess_and_collate([short, long])),
        )
        states, count = encoder(encoder.preprocess_and_collate([short, long]))
        first = model.head(states[0, : int(count[0])].mean(0))
    assert int(count[0]) < states.shape[1]
    assert torch.allclose(together[0, 0], first, atol=1e-5)
    assert torch.allclose(alone[0], together[0], atol=1e-5)


TUNED = [
    {"method": "head"}, {"method": "last-k", "layers": 1}, {"method": "lora", "rank": 2}, {"method": "full"},
]  # fmt: skip


@pytest.mark.parametrize("tune", TUNED, ids=lambda tune: tune["method"])
@pytest.mark.parametrize("name", ["small", "group", "hubert", "whisper"])
def test_every_way_of_tuning_takes_a_step(tmp_path: Path, name: str, tune: dict[str, Any]) -> None:
    learner, shard = learner_and_shard(tmp_path / "d", tune, backbone=networks(tmp_path)[name])
    if (name, tune["method"]) == ("small", "lora"):
        with pytest.raises(ConfigError, match="no layer for LoRA"):
            learner.initial()
        return
    start = learner.initial()
    assert {n for n in start if n.startswith("head.")} == {"head.weight", "head.bias"}
    # A recogniser's letters aren't there to be trained or sent.
    assert not any("lm_head" in n or ".out." in n for n in start)
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert bool(update.delta["head.weight"].any())
    assert any(bool(t.any()) for n, t in update.delta.items() if "head" not in n) == (len(start) > 2)


def as_run(root: Path, tensors: dict[str, torch.Tensor]) -> str:
    (root / "model").mkdir(parents=True)
    save_file(tensors, root / "model" / "model.safetensors")
    (root / "model" / "model.json").write_text("{}")
    return str(root)


@pytest.mark.parametrize("name", ["small", "group"])
def test_it_goes_on_from_a_recogniser_and_from_itself(tmp_path: Path, name: str) -> None:
    backbone = networks(tmp_path)[name] | {"weights": "random"}
    recogniser = recogniser_of(seed=9, backbone=backbone).initial()
    run = as_run(tmp_path / "run", recogniser)
    learner, _ = learner_and_shard(tmp_path / "d", backbone=backbone | {"weights": run})
    start = learner.initial()
    inside = {n.replace("wav2vec2.", ""): t for n, t in recogniser.items()}
    shared = {n for n in start if not n.startswith("head.")}
    assert len(shared) > 5 and all(torch.equal(start[n], inside[n]) for n in shared)
    own = as_run(tmp_path / "own", start)
    again, _ = learner_and_shard(tmp_path / "e", seed=5, backbone=backbone | {"weights": own})
    assert all(torch.equal(again.initial()[n], start[n]) for n in shared)


def test_metrics_of_clients_add_up_to_those_of_all_data(tmp_path: Path) -> None:
    learner, whole = learner_and_shard(tmp_path / "d")
    tensors = learner.initial()
    parts = [whole.select([0, 1]), whole.select([2, 3, 4, 5])]
    together = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    assert set(together) == {"intent_accuracy", "loss"}
    assert together == pytest.approx(learner.compute(learner.evaluate(tensors, whole)), rel=1e-5)


def test_learning_beats_not_learning_and_a_file_is_answered_with_an_intent_alone(tmp_path: Path) -> None:
    many = {"optimizer": "adamw", "lr": 0.01, "batch_size": 3, "epochs": 25}
    learner, shard = learner_and_shard(tmp_path / "d", train=many)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    trained = {name: t + update.delta[name] for name, t in start.items()}
    before, after = (learner.compute(learner.evaluate(t, shard)) for t in (start, trained))
    assert after["intent_accuracy"] == 1.0 > before["intent_accuracy"]
    given = learner.task.parse_input(str(tmp_path / "d" / "3.wav"))
    said = learner.task.format_predictions(learner.predictions(trained, [given]), learner.data_info)
    assert said[0]["label"] == "stop" and set(said[0]) == {"label", "probability"}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [("intent", "small"), ("speech-recognition", "whisper")])
@pytest.mark.processes
def test_the_bits_are_the_same_in_one_process_and_in_two(tmp_path: Path, task: str, name: str) -> None:
    heard = {"input": "audio"} if task == "intent" else {}
    columns = {} if heard else {"transcript": "said"}
    table: dict[str, Any] = {
        "task": {"name": task, "options": {"max_seconds": 3} | heard},
        "data": {"source": str(folder_of(tmp_path / "d")), "test_fraction": 0.0, "columns": columns},
        "backbone": networks(tmp_path)[name],
        "train": {"optimizer": "adamw", "lr": 0.003, "batch_size": 2},
        "federation": {"clients": 2, "rounds": 2},
    }
    one = simulate(job_of(**table), tmp_path / "one", on_event=ignore_events, report=False)
    two = simulate(job_of(**table), tmp_path / "two", workers=2, on_event=ignore_events, report=False)
    assert one.model_sha256 == two.model_sha256
    losses = [line["loss"] for line in one.rounds]
    assert losses[-1] < losses[0]


def test_inputs_and_networks_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="atoll:small-ctc does not read words"):
        words = Learner.of(job_of(task={"name": "intent"}), INTENT, {"intents": ["a", "b"], "tags": ["O"]})
        _ = words.model
    with pytest.raises(WeightsError, match="atoll:small-text does not hear"):
        learner_and_shard(tmp_path / "d", backbone={"name": "atoll:small-text", "weights": "random"})[0].model  # noqa: B018
    with pytest.raises(ConfigError, match="input: expected 'text' or 'audio', found 'sound'"):
        INTENT.check(job_of(task={"name": "intent", "options": {"input": "sound"}}))


def test_intents_must_be_named_under_a_promise_to_clients_and_examples_get_none() -> None:
    promise: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "clipping_norm": 1.0}
    client = {"unit": "client"} | promise
    rate = {"clients": 4, "rounds": 1, "cohort_rate": 0.5}
    with pytest.raises(ConfigError, match=r"data\.classes: missing, expected the list of intents"):
        check_info_stated(job_of(privacy=client, federation=rate), INTENT)
    check_info_stated(
        job_of(privacy=client, federation=rate, data={"source": "./x", "classes": ["a", "b"]}), INTENT
    )
    example = {"unit": "example", "sampling_rate": 0.5, "steps": 1} | promise
    with pytest.raises(ConfigError, match=r"privacy\.unit = 'example'.*from recordings"):
        INTENT.check(job_of(privacy=example, data={"source": "./x", "classes": ["a", "b"]}))
