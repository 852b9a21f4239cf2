"""Preferences: what is read of a pair, its loss and rewards against a loop over tokens, the reference."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional

from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.datasets.synthetic.preferences import generated_preferences
from atoll.errors import ConfigError, DataError
from atoll.export.safetensors import make_plain
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.learning.trainable import load_values, trainable, values
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.language_modeling.data import Messages
from atoll.tasks.preference.metrics import PreferenceAccuracy, RewardMargin
from atoll.tasks.preference.model import PairModel
from atoll.tasks.preference.task import PREFERENCE, Preference
from tests.support.models import byte_tokenizer, causal_job, moved, small_llama

LORA = {"method": "lora", "rank": 2}
ROWS = [
    {"prompt": "hi", "chosen": "hello", "rejected": "no"},
    {"prompt": "what?", "chosen": "né\U0001f33b", "rejected": ""},
    {"prompt": "a b", "chosen": "he ll he ll", "rejected": "go away, I said"},
]


def talk(*turns: str) -> Messages:
    """`u:` or `a:` and what is said."""
    return [{"role": {"u": "user", "a": "assistant"}[turn[0]], "content": turn[2:]} for turn in turns]


def job_of(folder: Path, tune: dict[str, Any] = LORA, **options: Any) -> Job:
    return causal_job("preference", "generated-preferences", folder, tune, {"max_tokens": 128} | options)


def learner_of(folder: Path, tune: dict[str, Any] = LORA, **options: Any) -> Learner:
    return Learner.of(job_of(folder, tune, **options), PREFERENCE, {})


def shard_of(learner: Learner, rows: list[dict[str, Any]]) -> Shard:
    table = learner.task.from_builtin({"train": pa.Table.from_pylist(rows)}, learner.job)
    return learner.task.shard(table.train, {})


def model_of(learner: Learner) -> PairModel:
    assert isinstance(learner.model, PairModel)
    return learner.model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama"))


def by_hand(network: nn.Module, ids: torch.Tensor, places: torch.Tensor) -> float:
    """log p of the tokens behind these places, one after the other, in float64."""
    total = 0.0
    for place in places.tolist():
        scores = network(input_ids=ids[None, : place + 1]).logits[0, -1]
        total += float(functional.log_softmax(scores, 0)[ids[place + 1]])
    return total


@pytest.mark.parametrize("tune", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_loss_margin_and_accuracy_are_those_of_a_loop_over_tokens(llama: Path, tune: dict[str, Any]) -> None:
    learner = learner_of(llama, tune, beta=0.3)
    shard, tensors = shard_of(learner, ROWS), moved(learner)
    before = copy.deepcopy(learner.model.backbone.model).double().eval()
    found = learner.compute(learner.evaluate(tensors, shard))
    after = copy.deepcopy(learner.model.backbone.model).double().eval()
    margins = []
    with torch.inference_mode():
        for pair in shard.inputs:
            chosen, rejected = (
                by_hand(after, pair[f"{side}.input_ids"], pair[f"{side}.places"])
                - by_hand(before, pair[f"{side}.input_ids"], pair[f"{side}.places"])
                for side in ("chosen", "rejected")
            )
            margins.append(0.3 * (chosen - rejected))
    assert found == pytest.approx(
        {
            "accuracy": sum(margin > 0 for margin in margins) / 3,
            "reward_margin": sum(margins) / 3,
            "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 3,
        },
        rel=1e-4,
    )


def test_the_gradient_is_that_of_the_loss_by_hand(llama: Path) -> None:
    learner = learner_of(llama, {"method": "full"})
    shard, rows = shard_of(learner, ROWS[:1]), range(1)
    model, task = model_of(learner).eval(), learner.task
    load_values(model, moved(learner))
    batch, targets = learner.collate(shard, rows), shard.targets_of(rows)
    reference = model.reference(batch)
    task.loss(model(batch), targets).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    pair, log_p = shard.inputs[0], []
    for side in ("chosen", "rejected"):
        ids, places = pair[f"{side}.input_ids"], pair[f"{side}.places"]
        scores = functional.log_softmax(model.backbone.model(input_ids=ids[None]).logits[0], 1)
        log_p.append(scores[places, ids[places + 1]].sum())
    margin = 0.1 * ((log_p[0] - reference[0, 0]) - (log_p[1] - reference[0, 1]))
    (-functional.logsigmoid(margin)).backward()  # type: ignore[no-untyped-call]
    for name, p in trainable(model).items():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


def test_training_leaves_the_reference_as_it_was_and_teaches(llama: Path) -> None:
    learner = learner_of(llama)
    shard = shard_of(learner, ROWS)
    batch = learner.collate(shard, range(3))
    reference, start = model_of(learner).reference(batch), learner.initial()
    before = learner.compute(learner.evaluate(start, shard))
    assert before == pytest.approx({"accuracy": 0, "reward_margin": 0, "loss": math.log(2)})
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    tensors = {name: tensor + update.delta[name] for name, tensor in start.items()}
    after = learner.compute(learner.evaluate(tensors, shard))
    assert after["loss"] is not None and after["loss"] < math.log(2)
    torch.testing.assert_close(model_of(learner).reference(batch), reference, atol=0, rtol=0)


def test_the_tuned_values_and_modes_are_back_after_an_error_too(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(llama)
    model, batch = model_of(learner).train(), learner.collate(shard_of(learner, ROWS), range(3))
    load_values(model, moved(learner))
    kept, trained = values(model), list(trainable(model))

    def fails(batch: Any) -> None:
        assert not model.training and not trainable(model)
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "_log_likelihood", fails)
    with pytest.raises(RuntimeError, match="broken"):
        model.reference(batch)
    assert all(module.training for module in model.modules()) and list(trainable(model)) == trained
    assert all(torch.equal(tensor, kept[name]) for name, tensor in values(model).items())


def test_a_model_whose_adapters_were_merged_has_the_same_rewards(llama: Path) -> None:
    learner = learner_of(llama)
    shard, tensors = shard_of(learner, ROWS), moved(learner)
    before = learner.compute(learner.evaluate(tensors, shard))
    model = learner.filled(tensors)
    make_plain(model)
    assert learner.evaluate_model(model, shard) == pytest.approx(before, rel=1e-4)
    assert before["reward_margin"] != 0


def test_a_pair_of_equals_costs_log_2_and_has_no_margin(llama: Path) -> None:
    learner = learner_of(llama)
    shard = shard_of(learner, [{"prompt": "hi", "chosen": "same", "rejected": "same"}])
    found = learner.compute(learner.evaluate(moved(learner), shard))
    assert found == pytest.approx({"accuracy": 0, "reward_margin": 0, "loss": math.log(2)})


def test_a_prompt_that_leaves_no_room_says_nothing_and_a_cut_answer_what_is_left(llama: Path) -> None:
    learner = learner_of(llama, max_tokens=40)
    long = {"prompt": "long " * 30, "chosen": "a", "rejected": "b"}
    shard, tensors = shard_of(learner, [long]), moved(learner)
    assert learner.compute(learner.evaluate(tensors, shard)) == {
        "accuracy": None, "reward_margin": None, "loss": None,
    }  # fmt: skip
    learner.task.loss(learner.model(learner.collate(shard, range(1))), shard.targets_of(range(1))).backward()  # type: ignore[no-untyped-call]
    assert not any(p.grad.any() for p in trainable(learner.model).values() if p.grad is not None)
    cut, whole = {"prompt": "hi", "chosen": "abc" * 50, "rejected": "b"}, shard_of(learner, ROWS[:1])
    both = learner.compute(learner.evaluate(tensors, shard_of(learner, [long, *ROWS[:1]])))
    assert both == pytest.approx(learner.compute(learner.evaluate(tensors, whole)), rel=1e-5)
    assert len(shard_of(learner, [cut]).inputs[0]["chosen.input_ids"]) == 40


def test_nothing_measured_is_undefined() -> None:
    for metric in (PreferenceAccuracy(), RewardMargin()):
        metric.update(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
        assert torch.isnan(metric.compute())


# What is read


def marked(task: Preference, row: dict[str, Any]) -> list[str]:
    """Both sides of a row as text, with « and » around what is learnt."""
    table = task.schema.adopted({"train": pa.Table.from_pylist([row])}).train
    tokenizer, texts = byte_tokenizer(), []
    for side in task.pairs(table)[0]:
        text, inside = "", False
        for token, is_learnt in zip(side.ids, side.learnt, strict=True):
            text += {(False, True): "«", (True, False): "»"}.get((inside, is_learnt), "")
            text, inside = text + tokenizer.decode([token]), is_learnt
        texts.append(text + "»" * inside)
    return texts


@pytest.fixture(scope="module")
def task(llama: Path) -> Preference:
    found = learner_of(llama).task
    assert isinstance(found, Preference)
    return found


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
MORE = "<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
FORMS = {
    "texts": ({"prompt": "hi", "chosen": "he", "rejected": ""}, ASKED, ("he", "")),
    "messages": (
        {"prompt": talk("u:hi"), "chosen": talk("a:he"), "rejected": talk("a:ll")}, ASKED, ("he", "ll"),
    ),
    "without a prompt": (
        {"chosen": talk("u:hi", "a:he"), "rejected": talk("u:hi", "a:ll")}, ASKED, ("he", "ll"),
    ),
    "answers that both share": (
        {"chosen": talk("u:hi", "a:he", "u:x", "a:b"), "rejected": talk("u:hi", "a:he", "u:x", "a:c")},
        ASKED + "he" + MORE, ("b", "c"),
    ),
    "an answer in the prompt": (
        {"prompt": talk("u:hi", "a:he", "u:x"), "chosen": talk("a:b"), "rejected": talk("a:c")},
        ASKED + "he" + MORE, ("b", "c"),
    ),
    "equals": ({"chosen": talk("u:hi", "a:he"), "rejected": talk("u:hi", "a:he")}, ASKED, ("he", "he")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_of_each_form_what_tells_the_two_apart_is_learnt(task: Preference, form: str) -> None:
    row, asked, answers = FORMS[form]
    assert marked(task, row) == [f"{asked}«{answer}<|im_end|>»\n" for answer in answers]


def test_texts_without_a_template_are_joined_as_they_stand(llama: Path) -> None:
    bare = learner_of(llama, template="").task
    assert isinstance(bare, Preference)
    assert marked(bare, {"prompt": "ab", "chosen": "he", "rejected": "x"}) == [
        "ab«he<|im_end|>»", "ab«x<|im_end|>»",
    ]  # fmt: skip
    assert marked(bare, {"chosen": "abc", "rejected": "abd"})[0] == "a«bc<|im_end|>»"
    with pytest.raises(ConfigError, match=r"task\.options\.template: the data holds messages"):
        marked(bare, FORMS["messages"][0])


def test_files_hold_texts_or_messages_also_as_json_in_a_cell(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.csv"
    rows = [{"prompt": talk("u:hi"), "chosen": talk("a:he"), "rejected": talk("a:ll")}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = ['"' + json.dumps(rows[0][name]).replace('"', '""') + '"' for name in rows[0]]
    table.write_text("prompt,chosen,rejected\n" + ",".join(cells) + "\n")
    found = [PREFERENCE.read(path, DataSection(source="x"), {}).train for path in (lines, table)]
    assert PREFERENCE.keys(found[0]) == PREFERENCE.keys(found[1]) and found[0][0] == rows[0]
    (tmp_path / "c.csv").write_text("chosen,rejected\n[1] is good,no\n")
    assert PREFERENCE.read(tmp_path / "c.csv", DataSection(source="x"), {}).train["chosen"] == ["[1] is good"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "hi", "chosen": "a"}, "expected one for the rejected"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "line 1: empty, expected some text"),
        ({"chosen": talk("u:hi"), "rejected": talk("a:b")}, "line 1: no message of the assistant"),
        ({"prompt": "hi", "chosen": talk("a:a"), "rejected": talk("a:b")}, "expected a list of messages"),
    ],
)
def test_bad_rows_are_told_in_one_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=problem) as told:
        PREFERENCE.read(tmp_path / "a.jsonl", DataSection(source="x"), {})
    assert "\n" not in str(told.value)


def test_pairs_that_prefer_nothing_are_remarked(tmp_path: Path) -> None:
    same = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    for name, rows in {
        "a.jsonl": [*ROWS, {"prompt": "hi", "chosen": "a", "rejected": "a"}],
        "b.jsonl": [{"chosen": same, "rejected": same}],
    }.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = f"train: 1 of {len(rows)} pairs prefer nothing, chosen and rejected are the same"
        assert said in PREFERENCE.read(tmp_path / name, DataSection(source="x"), {}).notes


def test_check_counts_what_is_learnt_and_cut(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*ROWS, {
        "prompt": "long " * 30, "chosen": "a", "rejected": "b"})))  # fmt: skip
    backbone = learner_of(llama).backbone
    told = PREFERENCE.notes_on(tmp_path / "a.jsonl", DataSection(source="x"), {"max_tokens": 60}, backbone)
    assert told[1].startswith("1 of 4 pairs are longer") and told[1].endswith("of 1 nothing is learnt")


def test_a_beta_that_is_none_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.options: beta"):
        PREFERENCE.check(job_of(llama, beta=0.0))


def test_a_prompt_alone_is_answered_in_words(llama: Path) -> None:
    learner = learner_of(llama, max_new_tokens=3)
    answers = learner.answers(learner.initial(), [learner.task.parse_input("hi")])
    assert isinstance(answers[0]["label"], str)


@pytest.mark.slow
def test_a_run_learns_which_answers_are_preferred_the_same_in_another_engine(
    llama: Path, tmp_path: Path
) -> None:
    job = job_of(llama, max_tokens=64)
    job = job.model_copy(update={"data": job.data.model_copy(update={"source": str(tmp_path / "data")})})
    rows = PREFERENCE.schema.adopted(generated_preferences(0, 60)).train
    PREFERENCE.write(rows, tmp_path / "data", job.data)
    results = [
        simulate(job, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "loop")
    ]
    assert results[0].model_sha256 == results[1].model_sha256
    told = results[0].final["clients"].values()
    assert all(values["accuracy"] > 0.9 and values["reward_margin"] > 0 for values in told), told
