"""Tags of words: what is read, which entities there are, what is learnt of cut sentences, what is said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from atoll.backbones.resolve import Backbone
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.learning.learner import Learner
from atoll.tasks.token_classification.metrics import (
    IGNORED,
    UNREAD,
    EntityF1,
    EntityPrecision,
    EntityRecall,
    TagAccuracy,
    spans,
)
from atoll.tasks.token_classification.task import TOKEN_CLASSIFICATION
from atoll.tasks.token_classification.words import WordPieces
from tests.backbones.test_backbones import tiny_bert

ROWS = [
    {"tokens": ["Anna", "lives", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["Ben", "met", "Ida"], "tags": ["B-PER", "O", "B-PER"]},
    {"tokens": ["nobody", "is", "in", "London"], "tags": ["O", "O", "O", "B-LOC"]},
]
CONLL = """-DOCSTART- -X- O O

# a comment
Anna NNP B-PER
lives VBZ O
# SYM O

in IN O
Paris NNP B-LOC
"""


def job_of(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "names",
        "seed": 4,
        "task": {"name": "token-classification"},
        "data": {"source": "./mine"},
        "backbone": {"name": "atoll:small-text", "weights": "random", "max_tokens": 64},
        "tune": {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.005, "batch_size": 4, "epochs": 30},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def learner_and_shard(rows: list[dict[str, Any]] = ROWS, **tables: Any) -> tuple[Learner, Shard]:
    job = job_of(**tables)
    table = TOKEN_CLASSIFICATION.from_builtin({"train": pa.Table.from_pylist(rows)}, job)
    data_info = TOKEN_CLASSIFICATION.merge_info([TOKEN_CLASSIFICATION.local_info(table.train, job.data, {})])
    learner = Learner.of(job, TOKEN_CLASSIFICATION, data_info)
    return learner, learner.task.shard(table.train, data_info)


def read(path: Path, text: str, **data: Any) -> list[dict[str, Any]]:
    path.write_text(text)
    found = TOKEN_CLASSIFICATION.read(path, DataSection(source=str(path), **data), {}).train
    return [found[row] for row in range(len(found))]


# What is read

FORMS = {
    "data.jsonl": json.dumps({"tokens": ["Anna", "Bo"], "tags": ["B-PER", "O"]}) + "\n",
    "strings.jsonl": json.dumps({"words": "Anna Bo", "ner_tags": "B-PER O"}) + "\n",
    "data.csv": "text,labels\nAnna Bo,B-PER O\n",
    "lists.csv": 'tokens,tags\n"[""Anna"", ""Bo""]","[""B-PER"", ""O""]"\n',
    "data.conll": "Anna\tB-PER\nBo\tO\n",
    "four.txt": "Anna NNP I-NP B-PER\r\nBo NNP I-NP O\r\n\r\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_example(name: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, FORMS[name]) == [{"tokens": ["Anna", "Bo"], "tags": ["B-PER", "O"]}]


def test_a_conll_file_has_documents_comments_and_a_word_that_looks_like_one(tmp_path: Path) -> None:
    found = read(tmp_path / "a.conll", CONLL)
    assert [row["tokens"] for row in found] == [["Anna", "lives", "#"], ["in", "Paris"]]
    assert found[1]["tags"] == ["O", "B-LOC"]


def test_a_folder_of_conll_files_has_parts_by_their_names(tmp_path: Path) -> None:
    for name in ("eng.train", "eng.testa", "eng.testb"):
        (tmp_path / f"{name}.txt").write_text(CONLL.replace("Anna", name))
    table = TOKEN_CLASSIFICATION.read(tmp_path, DataSection(source=str(tmp_path)), {})
    assert table.test is not None
    assert table.train["tokens"][0][0] == "eng.train" and table.test["tokens"][0][0] == "eng.testb"
    assert table.counts[0].left_out == {"of other splits than train and test": 2}


BAD = {
    "one.conll": ("Anna B-PER\nBo\n", "one.conll line 2: one column, expected a word and its tag"),
    "wide.conll": ("a b O\na O\n", "wide.conll line 2: 2 columns, expected 3"),
    "unlu.conll": ("a O\n\nb U-PER\n", "unlu.conll line 3: tag 'U-PER', expected O, or a name behind B-"),
    "long.jsonl": ('{"tokens": ["a"], "tags": ["O", "O"]}\n', "long.jsonl line 1: 2 tags for 1 words"),
    "none.jsonl": ('{"tokens": [], "tags": []}\n', "none.jsonl line 1: no word"),
    "gap.jsonl": ('{"tokens": ["a", " "], "tags": ["O", "O"]}\n', "line 1: the word ' ', expected text"),
    "ints.jsonl": (
        '{"tokens": ["a"], "tags": [3]}\n',
        "line 1: tag 3, expected names of tags",
    ),
    "kind.jsonl": ('{"tokens": 3, "tags": ["O"]}\n', "line 1: int, expected a list of words"),
    "part.jsonl": ('{"tokens": ["a"]}\n', "expected one for the tags"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_with_file_and_line(name: str, tmp_path: Path) -> None:
    text, problem = BAD[name]
    with pytest.raises(DataError, match=problem) as told:
        read(tmp_path / name, text)
    assert "\n" not in str(told.value)


def test_numbers_are_tags_where_the_data_or_the_job_says_which(tmp_path: Path) -> None:
    import datasets

    told = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"])),
        }
    )
    rows = {"tokens": [["Anna", "is"]], "ner_tags": [[1, 0]]}
    datasets.Dataset.from_dict(rows, features=told).save_to_disk(str(tmp_path / "saved"))
    saved = TOKEN_CLASSIFICATION.read(tmp_path / "saved", DataSection(source="x"), {}).train
    assert saved["tags"] == [["B-PER", "O"]]
    line = '{"tokens": ["Anna", "is"], "tags": [1, 0]}\n'
    assert read(tmp_path / "a.jsonl", line, classes=("O", "B-PER"))[0]["tags"] == ["B-PER", "O"]


def test_tags_are_the_jobs_or_those_of_the_data() -> None:
    rows = TOKEN_CLASSIFICATION.from_builtin({"train": pa.Table.from_pylist(ROWS)}, job_of()).train
    own = TOKEN_CLASSIFICATION.local_info(rows, DataSection(source="x"), {})
    assert own == {"tags": ["B-LOC", "B-PER", "I-LOC", "O"]}
    given = DataSection(source="x", classes=("O", "B-PER"))
    assert TOKEN_CLASSIFICATION.fits(rows, given, {}) == [1]
    with pytest.raises(DataError, match="tag 'B-LOC' is not in data"):
        TOKEN_CLASSIFICATION.local_info(rows, given, {})
    with pytest.raises(ConfigError, match="at least two tags"):
        TOKEN_CLASSIFICATION.merge_info([{"tags": ["O"]}])


# Which entities there are


def published(tags: list[str]) -> set[tuple[str, int, int]]:
    """seqeval's `get_entities`, by its two published tables of which neighbours end and start a chunk."""
    ends = {"E.", "S.", "BB", "BS", "BO", "IB", "IS", "IO"}
    starts = {"EE", "EI", "SE", "SI", "OE", "OI"}
    found, begin, before, name = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        other = name != kind
        if f"{before}." in ends or before + mark in ends or (before != "O" and other):
            found.add((name, begin, place - 1))
        if mark in "BS" or before + mark in starts or (mark != "O" and other):
            begin = place
        before, name = mark, kind
    return found


def test_spans_are_those_of_seqeval() -> None:
    draw = random.Random(1)
    names = ["O", *(f"{mark}-{name}" for mark in "BIES" for name in ("a", "b")), "B", "I"]
    for _ in range(3000):
        tags = [draw.choice(names) for _ in range(draw.randrange(1, 9))]
        assert set(spans(tags)) == published(tags), tags


def test_scores_are_those_of_counted_spans() -> None:
    draw = random.Random(2)
    names = ["O", "B-a", "I-a", "B-b", "I-b"]
    metrics = [EntityPrecision(names), EntityRecall(names), EntityF1(names), TagAccuracy()]
    both, ours, theirs, right, words = 0, 0, 0, 0, 0
    for _ in range(20):
        length = draw.randrange(1, 9)
        said, true = ([draw.randrange(5) for _ in range(length)] for _ in range(2))
        table = torch.tensor([[*said, 0, 0], true + [IGNORED] * 2])
        for metric in metrics:
            metric.update(table[:1], table[1:])
        one, other = (published([names[tag] for tag in tags]) for tags in (said, true))
        both, ours, theirs = both + len(one & other), ours + len(one), theirs + len(other)
        right, words = right + sum(a == b for a, b in zip(said, true, strict=True)), words + length
    precision, recall = both / ours, both / theirs
    expected = [precision, recall, 2 * precision * recall / (precision + recall), right / words]
    assert [float(metric.compute()) for metric in metrics] == pytest.approx(expected)


def test_what_nothing_is_there_to_measure_by_is_undefined() -> None:
    names = ["O", "B-a"]
    nothing, some = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0, 1]])
    for metric, said, true in (
        (EntityF1(names), nothing, nothing),
        (EntityRecall(names), some, nothing),
        (EntityPrecision(names), nothing, some),
    ):
        metric.update(said, true)
        assert torch.isnan(metric.compute())


# What is learnt and said


def test_a_word_is_tagged_by_its_first_piece() -> None:
    learner, _ = learner_and_shard()
    [coded] = learner.encoder.preprocess([["Anna", "lives", "xy", "in"]])
    ids, first = coded["ids"].tolist(), coded["first"].tolist()
    assert first == [0, 1, 6, 8]  # lives and xy are written in letters
    assert len(ids) == 10  # and a piece that ends the text


def test_words_that_the_network_does_not_read_are_told_and_are_not_learnt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner, shard = learner_and_shard(
        backbone={"name": "atoll:small-text", "weights": "random", "max_tokens": 8}
    )
    assert "4 of 12 words, in 2 of 3 sentences, lie behind the 8 pieces" in caplog.text
    model, rows = learner.model.eval(), range(3)
    targets = shard.targets_of(rows)
    outputs = model(learner.collate(shard, rows))
    unread = (outputs[:, :, -1] == 0) & (targets != IGNORED)
    assert int(unread.sum()) == 4
    other = torch.where(unread, (targets + 1) % 4, targets)
    assert torch.equal(learner.task.loss(outputs, other), learner.task.loss(outputs, targets))
    said, _ = learner.task.metric_inputs(model.predict(learner.collate(shard, rows)), targets)
    assert (said[unread] == UNREAD).all()
    [answer] = learner.answers(learner.initial(), [ROWS[0]["tokens"]])
    assert answer["label"].count(")") == len(answer["entities"])
    assert answer["tags"][-1] is None and len(answer["tags"]) == 5


def test_check_tells_what_a_network_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("word O\n" * 300)
    small = Backbone("atoll", "small-text", "", None, None, "")
    notes = TOKEN_CLASSIFICATION.notes_on(tmp_path / "a.conll", DataSection(source="x"), {}, small)
    assert len(notes) == 1 and "300 words, in 1 of 1 sentences" in notes[0]


@pytest.mark.parametrize("network", ["small", "bert"])
def test_learning_finds_the_entities_and_says_them(network: str, tmp_path: Path) -> None:
    own = {} if network == "small" else {"backbone": {"name": str(tiny_bert(tmp_path / "bert"))}}
    learner, shard = learner_and_shard(**own)
    start = learner.initial()
    assert {name for name in start if name.startswith("head.")} == {"head.weight", "head.bias"}
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    tensors = {name: tensor + update.delta[name] for name, tensor in start.items()}
    measured = learner.compute(learner.evaluate(tensors, shard))
    assert measured["loss"] < learner.compute(learner.evaluate(start, shard))["loss"] / 2
    if network == "small":
        assert measured["entity_f1"] == measured["token_accuracy"] == 1
        [said] = learner.answers(tensors, [ROWS[0]["tokens"]])
        assert said["label"] == "Anna (PER), New York (LOC)"
        assert said["entities"][1] == {"name": "LOC", "first": 3, "last": 4, "text": "New York"}


def test_a_tokenizer_of_bytes_gets_the_spaces_that_it_tells_words_by() -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["Anna met Ben in Paris"] * 9, vocab_size=320, min_frequency=1)
    made: Any = PreTrainedTokenizerFast
    tokenizer = made(tokenizer_object=trained._tokenizer, pad_token="!")
    [coded] = WordPieces(tokenizer, 64).coded([["Anna", "met", "Ben"]])
    assert coded["ids"].tolist() == tokenizer("Anna met Ben")["input_ids"]


def test_a_network_that_reads_no_words_is_refused() -> None:
    raw = Backbone("raw", "pixels", "", None, None, "")
    with pytest.raises(WeightsError, match="raw:pixels does not read words"):
        TOKEN_CLASSIFICATION.configured(job_of(backbone={"name": "raw:pixels"}), raw).unread([["a"]])


def test_what_is_asked_is_words_or_a_list_of_them() -> None:
    assert TOKEN_CLASSIFICATION.parse_input("Anna  is here") == ["Anna", "is", "here"]
    assert TOKEN_CLASSIFICATION.parse_input('["New York", "calls"]') == ["New York", "calls"]
    assert BackboneSection(name="x").max_tokens == 128
