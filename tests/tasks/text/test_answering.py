"""Question answering: what is read, what counts in the loss, what is measured, what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from atoll.backbones.encoder import TARGETS
from atoll.backbones.small_tokenizer import UNKNOWN, own_tokenizer
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.datasets.synthetic.questions import generated_questions, generated_stories
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning import trainable
from atoll.learning.learner import Learner, sum_states
from atoll.privacy.noise import seeded
from atoll.protocol.random_streams import stream_seed
from atoll.tasks.text_to_text.questions import QUESTION_ANSWERING, prompt
from atoll.tasks.text_to_text.sequence_task import IGNORE_INDEX
from tests.support.models import small_bart, small_t5

ROWS = [
    {"question": "where is Anna?", "context": "Anna is in the garden.", "answer": "the garden"},
    {"question": "where is Ben?", "context": "Ben is in the office.", "answer": "the office"},
    {"question": "what is 2 plus 3?", "context": "", "answer": "5"},
    {"question": "who has more pens?", "context": "Ida has 3 pens and Leo has 9 pens.", "answer": "Leo"},
]


def job_of(tune: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "answers",
        "seed": 4,
        "task": {"name": "question-answering", "options": {"max_answer_tokens": 5}},
        "data": {"source": "generated-questions"},
        "backbone": {"name": "atoll:small-t5", "weights": "random", "max_tokens": 32},
        "tune": tune or {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.003, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def learner_of(tune: dict[str, Any] | None = None, **tables: Any) -> Learner:
    return Learner.of(job_of(tune, **tables), QUESTION_ANSWERING, {})


def shard_of(learner: Learner, rows: list[dict[str, str]]) -> Shard:
    table = learner.task.from_builtin({"train": pa.Table.from_pylist(rows)}, learner.job)
    return learner.task.shard(table.train, {})


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_context_may_be_missing_and_an_answer_may_be_a_number(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", {"question": "2 + 3?", "answer": 5})
    table = QUESTION_ANSWERING.read(path, DataSection(source=str(path)), {})
    assert table.train[0] == {"question": "2 + 3?", "answer": "5"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "", "answer": "a"}, "empty, expected some text"),
        ({"question": "q", "answer": None}, "the text is missing"),
        ({"question": 3, "answer": "a"}, "3, expected text"),
        ({"question": "q"}, "answer"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = written(tmp_path / "data.jsonl", row)
    with pytest.raises(DataError, match=problem) as told:
        QUESTION_ANSWERING.read(path, DataSection(source=str(path)), {})
    assert "\n" not in str(told.value)


def test_what_is_written_is_read_again_with_the_same_keys(tmp_path: Path) -> None:
    data = DataSection(source="x", columns={"question": "asked"})
    table = QUESTION_ANSWERING.from_builtin({"train": pa.Table.from_pylist(ROWS)}, job_of())
    QUESTION_ANSWERING.write(table.train, tmp_path / "out", data)
    again = QUESTION_ANSWERING.read(tmp_path / "out", data, {})
    assert QUESTION_ANSWERING.keys(again.train) == QUESTION_ANSWERING.keys(table.train)


def test_a_long_context_is_cut_and_the_question_is_kept() -> None:
    learner = learner_of()
    batch = learner.encoder.preprocess_and_collate([prompt("where is Anna?", "the garden " * 50)])
    text = own_tokenizer().decode(batch["input_ids"][0])
    assert batch["input_ids"].shape == (1, 32)
    assert text.startswith("question: where is Anna? context: the garden")


def test_the_built_in_tokenizer_knows_every_word_of_the_generated_questions() -> None:
    tokenizer = own_tokenizer()
    for row in generated_questions(1, 300)["train"].to_pylist():
        for column in ("question", "context", "answer"):
            ids = tokenizer(row[column], add_special_tokens=False)["input_ids"]
            assert UNKNOWN not in ids
            inner = {piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece.startswith("##")}
            assert inner <= {"##?", "##."}
            assert row[column] == tokenizer.decode(ids)
    assert tokenizer.decode(tokenizer("Zebra")["input_ids"], skip_special_tokens=True) == "Zebra"


def test_no_question_to_pretrain_on_is_asked_again() -> None:
    def asked(splits: dict[str, pa.Table]) -> set[tuple[str, str]]:
        rows = pa.concat_tables(splits.values()).to_pylist()
        return {(row["context"], row["question"]) for row in rows}

    stories = generated_stories(0, 600)
    assert not asked(stories) & asked(generated_questions(0))
    assert not asked({"a": stories["train"]}) & asked({"a": stories["test"]})


def test_padding_of_an_answer_does_not_count_in_the_loss() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(2, 4, 7)
    targets = torch.full((2, 6), IGNORE_INDEX)
    targets[0, :2], targets[1, :3] = torch.tensor([3, 1]), torch.tensor([2, 5, 1])
    surprise = -torch.log_softmax(outputs, dim=2)
    # The mean over each answer's own tokens, then over answers.
    first = (surprise[0, 0, 3] + surprise[0, 1, 1]) / 2
    second = (surprise[1, 0, 2] + surprise[1, 1, 5] + surprise[1, 2, 1]) / 3
    assert QUESTION_ANSWERING.loss(outputs, targets) == pytest.approx(float((first + second) / 2))
    changed = outputs.clone()
    changed[0, 2:] = 9.0
    assert QUESTION_ANSWERING.loss(changed, targets) == QUESTION_ANSWERING.loss(outputs, targets)


def test_an_answer_is_measured_by_its_whole_text_whatever_its_tokens() -> None:
    learner = learner_of()
    answers = ["the very long answer of seven words", "café"]
    targets = learner.task.targets(answers)  # type: ignore[attr-defined]
    assert learner.task.metric_inputs(answers, targets)[1] == answers


def test_metrics_of_clients_add_up_to_those_of_all_data() -> None:
    learner = learner_of()
    rows = generated_questions(2, 40)["train"].to_pylist()
    parts = [shard_of(learner, rows[:7]), shard_of(learner, rows[7:])]
    whole = shard_of(learner, rows)
    tensors = learner.initial()
    together = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    alone = learner.compute(learner.evaluate(tensors, whole))
    assert together == pytest.approx(alone, rel=1e-6)


def test_teacher_forcing_never_shows_the_token_that_is_asked_for() -> None:
    learner = learner_of()
    shard = shard_of(learner, ROWS)
    model = learner.model.eval()
    batch = learner.collate(shard, [0])
    other = {name: t.clone() for name, t in batch.items()}
    other[TARGETS][:, 1] = 40
    with torch.no_grad():
        before, after = model(batch), model(other)
    assert torch.allclose(before[:, :2], after[:, :2], atol=1e-5)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-5)


TUNED = [{"method": "head"}, {"method": "last-k", "layers": 1}, {"method": "lora", "rank": 2}]


@pytest.mark.parametrize("tune", [*TUNED, {"method": "full"}], ids=lambda tune: tune["method"])
def test_every_way_of_tuning_takes_a_step(tune: dict[str, Any]) -> None:
    learner = learner_of(tune)
    shard = shard_of(learner, ROWS)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert update.delta.keys() == start.keys()
    assert any(bool(t.any()) for t in update.delta.values())
    heads = [name for name in start if "lm_head" in name]
    assert heads == ([] if tune["method"] == "full" else ["backbone.model.lm_head.weight"]), "tied in full"
    if tune["method"] == "head":
        assert list(start) == heads
    if tune["method"] == "last-k":
        assert {name.split(".")[2] for name in start} == {"decoder", "lm_head"}
        assert not any("block.0" in name for name in start)


@pytest.mark.parametrize(
    ("weights", "head", "travels"),
    [
        ("pretrained", None, set()),
        ("pretrained", "frozen", set()),
        ("pretrained", "trained", {"weight"}),
        ("pretrained", "lora", {"lora_A.default.weight", "lora_B.default.weight"}),
        ("random", None, {"weight"}),
        ("random", "frozen", set()),
    ],
)
def test_a_pretrained_vocabulary_layer_stays_frozen_under_lora_unless_asked_for(
    tmp_path: Path, weights: str, head: str | None, travels: set[str]
) -> None:
    backbone = {"name": str(small_t5(tmp_path / "m")), "weights": weights, "max_tokens": 32}
    learner = learner_of({"method": "lora", "head": head}, backbone=backbone)
    before, shard = learner.initial(), shard_of(learner, ROWS)
    found = {name.partition("lm_head.")[2] for name in before if "lm_head" in name}
    assert found == travels and any("lora_A" in name for name in before if "lm_head" not in name)
    update = train_model(learner, before, shard, learner.job, client="a", round=1, plan={})
    moved = {
        name.partition("lm_head.")[2] for name, t in update.delta.items() if "lm_head" in name and t.any()
    }
    assert moved == travels - {"lora_A.default.weight"}, "B is zero at first, so that A stands still"


@pytest.mark.parametrize("make", [small_t5, small_bart])
def test_any_folder_of_a_sequence_to_sequence_model_trains(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    learner = learner_of({"method": "head"}, backbone={"name": str(folder), "max_tokens": 32})
    network: Any = learner.model.backbone.model
    inputs = network.get_input_embeddings().weight.detach().clone()
    shard = shard_of(learner, ROWS)
    update = train_model(learner, learner.initial(), shard, learner.job, client="a", round=1, plan={})
    assert any(bool(t.any()) for t in update.delta.values())
    assert torch.equal(inputs, network.get_input_embeddings().weight), "embeddings are tied no more"
    assert len(learner.predictions(learner.initial(), [prompt("where is Anna?", "")])) == 1


def test_blocks_of_encoder_and_decoder_stand_in_a_row(tmp_path: Path) -> None:
    for make, kind in ((small_t5, "T5Block"), (small_bart, "BartEncoderLayer")):
        folder = make(tmp_path / kind)
        learner = learner_of(backbone={"name": str(folder), "max_tokens": 32})
        found = trainable.blocks(learner.model.backbone.model, learner.model.head)
        names = [type(block).__name__ for block in found]
        assert names.count(kind) == (4 if kind == "T5Block" else 2)
        assert "Linear" not in names


def test_a_folder_that_is_no_sequence_to_sequence_model_is_refused(tmp_path: Path) -> None:
    from tests.backbones.test_backbones import tiny_bert

    folder = tiny_bert(tmp_path / "bert")
    with pytest.raises(WeightsError, match="its tokenizer has no pad or no end token"):
        learner_of(backbone={"name": str(folder)}).model  # noqa: B018
    own_tokenizer().save_pretrained(folder)
    with pytest.raises(WeightsError, match="transformers cannot load it"):
        learner_of(backbone={"name": str(folder)}).model  # noqa: B018
    with pytest.raises(WeightsError, match="does not write texts"):
        shard_of(learner_of(backbone={"name": "raw:pixels"}), ROWS)


@pytest.mark.parametrize("key", ["decoder_start_token_id", "pad_token_id"])
def test_a_network_that_does_not_say_where_answers_begin_is_refused(tmp_path: Path, key: str) -> None:
    about = small_t5(tmp_path / "t5") / "config.json"
    config = json.loads(about.read_text())
    about.write_text(json.dumps({**config, key: None}))
    with pytest.raises(WeightsError, match=f"config.json: {key} is missing, expected a token's number"):
        learner_of(backbone={"name": str(tmp_path / "t5")}).model  # noqa: B018
    del config[key]
    about.write_text(json.dumps(config))
    if key == "decoder_start_token_id":
        with pytest.raises(WeightsError, match=f"config.json: {key} is missing, expected a token's number"):
            learner_of(backbone={"name": str(tmp_path / "t5")}).model  # noqa: B018


def test_options_and_augmentations_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_answer_tokens"):
        learner_of(task={"name": "question-answering", "options": {"max_answer_tokens": 0}})
    with pytest.raises(ConfigError, match="no augmentations"):
        learner_of(train={"augment": ["hide"]})


@pytest.mark.parametrize("tune", [{"method": "head"}, {"method": "full"}], ids=lambda tune: tune["method"])
def test_private_training_clips_each_questions_own_gradient(tune: dict[str, Any]) -> None:
    learner = learner_of(tune, train={"lr": 0.5, "batch_size": 4})
    shard = shard_of(learner, ROWS)
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


def test_a_run_starts_from_what_another_run_trained(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    learner = learner_of()
    tensors = {name: t + 0.01 for name, t in learner.initial().items()}
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_file(tensors, tmp_path / "run" / "model" / "model.safetensors")
    (tmp_path / "run" / "model" / "model.json").write_text("{}")
    backbone = {"name": "atoll:small-t5", "weights": str(tmp_path / "run"), "max_tokens": 32}
    tuned = learner_of(backbone=backbone).initial()
    assert tuned.keys() == tensors.keys()
    assert all(torch.equal(tuned[name], t) for name, t in tensors.items())


def test_learning_beats_not_learning() -> None:
    learner = learner_of(train={"optimizer": "adamw", "lr": 0.003, "batch_size": 4, "epochs": 40})
    shard = shard_of(learner, ROWS)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    trained = {name: t + update.delta[name] for name, t in start.items()}
    before, after = (learner.compute(learner.evaluate(t, shard)) for t in (start, trained))
    assert before["exact_match"] < 0.5 and after["exact_match"] == 1.0
    assert after["loss"] < before["loss"]
    prompts = [prompt(row["question"], row["context"]) for row in ROWS]
    said = learner.predictions(trained, prompts)
    assert said == [row["answer"] for row in ROWS]
    assert said == [learner.predictions(trained, [one])[0] for one in prompts]
