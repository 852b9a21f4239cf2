"""Text to text: what is read, what is cut and told, what is measured, and that a language is learnt."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torchmetrics.text import BLEUScore

from atoll.backbones.resolve import Backbone
from atoll.client.training.local_sgd import train_model
from atoll.datasets.synthetic.pairs import generated_pairs
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.tasks.text_to_text.metrics import Bleu, ChrF, rouge_l
from atoll.tasks.text_to_text.questions import QUESTION_ANSWERING
from atoll.tasks.text_to_text.task import TEXT_TO_TEXT

ROWS = [{"source": "Anna has the red book", "target": "An li ro su"}]
SMALL = Backbone("atoll", "small-t5", "", None, None, "")


def job_of(options: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "pairs",
        "seed": 4,
        "task": {"name": "text-to-text", "options": {"max_target_tokens": 12} | (options or {})},
        "data": {"source": "generated-pairs"},
        "backbone": {"name": "atoll:small-t5", "weights": "random", "max_tokens": 16},
        "tune": {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.005, "batch_size": 4, "epochs": 25},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def texts(seed: int, count: int) -> tuple[list[str], list[str]]:
    """Predictions and references of a few words each, which have much in common; some are empty."""
    draw = random.Random(seed)
    words = ("ab", "abc", "b", "ca", "Ünï", "4")
    made = [" ".join(draw.choice(words) for _ in range(draw.randrange(0, 9))) for _ in range(2 * count)]
    return made[:count], made[count:]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"source": "", "target": "a"}, "line 1: empty, expected some text"),
        ({"source": "a", "target": None}, "line 1: the text is missing"),
        ({"source": "a"}, "expected one for the target"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=problem) as told:
        TEXT_TO_TEXT.read(path, DataSection(source=str(path)), {})
    assert "\n" not in str(told.value)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("document,summary,other\nlong text,short,1\n")
    found = TEXT_TO_TEXT.read(path, DataSection(source="x"), {}).train
    assert (found["source"], found["target"]) == (["long text"], ["short"])
    named = DataSection(source="x", columns={"source": "summary", "target": "document"})
    assert TEXT_TO_TEXT.read(path, named, {}).train["source"] == ["short"]


def test_the_prefix_stands_before_what_is_read_and_asked() -> None:
    job = job_of({"prefix": "translate: "})
    task = TEXT_TO_TEXT.configured(job, SMALL)
    rows = TEXT_TO_TEXT.from_builtin({"train": pa.Table.from_pylist(ROWS)}, job).train
    assert list(task.shard(rows, {}).inputs) == ["translate: Anna has the red book"]
    assert task.parse_input("Ben") == "translate: Ben"


def test_questions_are_sources_too() -> None:
    row = {"question": "where?", "context": "here.", "answer": "there"}
    table = TEXT_TO_TEXT.from_builtin({"train": pa.Table.from_pylist([row])}, job_of()).train
    assert table[0] == {"source": "question: where? context: here.", "target": "there"}
    asked = QUESTION_ANSWERING.from_builtin({"train": pa.Table.from_pylist([row])}, job_of()).train
    assert QUESTION_ANSWERING.prompts(asked)(0) == table["source"][0]


def test_check_tells_what_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"source": "the " * 300, "target": "the"}, {"source": "a", "target": "the " * 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = TEXT_TO_TEXT.notes_on(path, DataSection(source="x"), {"max_target_tokens": 4}, SMALL)
    assert told[0].startswith("1 of 2 inputs are longer than 128 tokens")
    assert told[1].startswith("1 of 2 targets are longer than 4 tokens")


def test_rouge_l_is_the_longest_common_subsequence_of_words() -> None:
    for one, other in zip(*texts(1, 200), strict=True):
        ours, theirs = one.lower().split(), other.lower().split()
        common = max(
            (
                size
                for size in range(len(ours) + 1)
                for chosen in combinations(ours, size)
                if _is_within(chosen, theirs)
            ),
            default=0,
        )
        expected = 2 * common / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs)
        assert rouge_l(one, other) == pytest.approx(expected)
    assert rouge_l("The cat, sat!", "the cat sat") == 1


def _is_within(chosen: tuple[str, ...], words: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in chosen)


def test_chrf_is_that_of_counted_pieces_of_all_texts() -> None:
    said, true = texts(2, 40)
    precisions, recalls = [], []
    for length in range(1, 7):
        found = expected = both = 0
        for pair in zip(said, true, strict=True):
            plain = [text.replace(" ", "") for text in pair]
            ours, theirs = ([t[i : i + length] for i in range(len(t) - length + 1)] for t in plain)
            found, expected = found + len(ours) * bool(theirs), expected + len(theirs)
            for piece in ours:
                if piece in theirs:
                    theirs.remove(piece)
                    both += 1
        precisions.append(both / found)
        recalls.append(both / expected)
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    metric = ChrF()
    for start in range(0, 40, 10):
        metric.update(said[start : start + 10], true[start : start + 10])
    assert float(metric.compute()) == pytest.approx(5 * precision * recall / (4 * precision + recall))


def test_bleu_is_that_of_all_texts() -> None:
    said, true = texts(3, 60)
    plain, ours = BLEUScore(), Bleu()
    plain.update(said, [[text] for text in true])
    ours.update(said, true)
    assert float(ours.compute()) == pytest.approx(float(plain.compute()), rel=1e-6)


def test_scores_without_a_reference_are_undefined_and_of_nothing_said_are_none() -> None:
    for metric in (ChrF(), Bleu()):
        metric.update([], [])
        assert torch.isnan(metric.compute())
        metric.reset()
        metric.update([""], ["abc def"])
        assert float(metric.compute()) == 0


def test_a_job_chooses_what_is_measured() -> None:
    chosen = TEXT_TO_TEXT.with_options({"metrics": ["rouge_l"]}).metrics({})
    assert set(chosen.keys()) == {"chrf", "rouge_l"}
    assert set(TEXT_TO_TEXT.metrics({}).keys()) == {"chrf", "exact_match", "token_f1", "rouge_l", "bleu"}
    with pytest.raises(ConfigError, match=r"task\.options: metrics\.0"):
        TEXT_TO_TEXT.check(job_of({"metrics": ["meteor"]}))


def test_training_teaches_the_targets() -> None:
    rows = generated_pairs(0, 10)["train"]
    job = job_of()
    learner = Learner.of(job, TEXT_TO_TEXT, {})
    shard = learner.task.shard(TEXT_TO_TEXT.from_builtin({"train": rows}, job).train, {})
    start = learner.initial()
    before = learner.compute(learner.evaluate(start, shard))
    update = train_model(learner, start, shard, job, client="a", round=1, plan={})
    tensors = {name: tensor + update.delta[name] for name, tensor in start.items()}
    after = learner.compute(learner.evaluate(tensors, shard))
    assert before["chrf"] is not None and after["chrf"] is not None
    assert after["loss"] < before["loss"] / 4 and after["chrf"] > before["chrf"] + 0.3
