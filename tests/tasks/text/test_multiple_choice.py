"""Multiple choice: which tokens are learnt and scored, what is measured, and runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from atoll.cli.main import run as command_line
from atoll.client.training.local_sgd import train_model
from atoll.datasets.synthetic.questions import generated_choices
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.language_modeling.task import LANGUAGE_MODELING
from atoll.tasks.multiple_choice.metrics import (
    ByteLikelihoodAccuracy,
    GeneratedAccuracy,
    LikelihoodAccuracy,
    UnparsableRate,
)
from atoll.tasks.multiple_choice.model import Choice
from atoll.tasks.multiple_choice.parsing import parsed
from atoll.tasks.multiple_choice.task import MULTIPLE_CHOICE, MultipleChoice
from tests.support.models import byte_tokenizer, causal_job, moved, small_llama

LORA = {"method": "lora", "rank": 2}
ROWS: list[dict[str, Any]] = [
    {"question": "hi?", "choices": ["hello", "he"], "answer": 1},
    {"question": "", "choices": ["né\U0001f33b", "n", "ne", "x y"], "answer": 0},
    {"question": "a b", "choices": ["B", "A", "go away"], "answer": 2},
    {"question": "which?", "choices": ["ll", "hell", "llll", "he he", "o"], "answer": 3},
]


def job_of(folder: Path, tune: dict[str, Any] = LORA, **options: Any) -> Job:
    return causal_job(
        "multiple-choice",
        "generated-choices",
        folder,
        tune,
        {"max_tokens": 160, "max_new_tokens": 6} | options,
    )


def learner_of(folder: Path, tune: dict[str, Any] = LORA, **options: Any) -> Learner:
    return Learner.of(job_of(folder, tune, **options), MULTIPLE_CHOICE, {})


def table_of(rows: list[dict[str, Any]]) -> Any:
    return MULTIPLE_CHOICE.schema.adopted({"train": pa.Table.from_pylist(rows)}).train


def small_gpt2(folder: Path) -> Path:
    """A GPT-2 of two blocks, whose tokenizer has no template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer(template=None)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=0,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"llama": small_llama(place / "llama"), "gpt2": small_gpt2(place / "gpt2")}


# What is measured


def log_p(network: Any, before: list[int], behind: list[int]) -> float:
    """log p of the tokens behind the others, one after the other, in float64."""
    ids, total = list(before), 0.0
    for token in behind:
        scores = network(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(functional.log_softmax(scores, 0)[token])
        ids.append(token)
    return total


def asked_of(name: str, row: dict[str, Any]) -> str:
    """The prompt by hand: as ChatML, or as it stands."""
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDE", row["choices"], strict=False)]
    said = "\n".join(([row["question"]] if row["question"] else []) + lines)
    if name == "gpt2":
        return said + "\nAnswer:"
    return f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_likelihoods_and_what_is_written_are_those_of_plain_transformers(
    folders: dict[str, Path], name: str
) -> None:
    learner, tokenizer = learner_of(folders[name], {"method": "full"}), byte_tokenizer()
    tensors, task = moved(learner), learner.task
    shard = task.shard(table_of(ROWS), {}, keys=[bytes([n]) * 32 for n in range(len(ROWS))])
    found = learner.predictions(tensors, shard.inputs)
    network: Any = copy.deepcopy(learner.model.backbone.model).double().eval()
    told = {"accuracy": 0, "accuracy_per_byte": 0, "accuracy_generated": 0, "unparsable_rate": 0}
    for row, answer in zip(ROWS, found, strict=True):
        asked = tokenizer(asked_of(name, row), add_special_tokens=False)["input_ids"]
        blank = "" if name == "llama" else " "
        wanted = [
            log_p(network, asked, tokenizer(blank + text, add_special_tokens=False)["input_ids"])
            for text in row["choices"]
        ]
        by_byte = [value / len(text.encode()) for value, text in zip(wanted, row["choices"], strict=True)]
        in_order = dict(zip(answer["order"], answer["likelihood"].tolist(), strict=True))
        assert [in_order[place] for place in range(len(wanted))] == pytest.approx(wanted, rel=1e-4)
        with torch.inference_mode():
            written = learner.model.backbone.model.generate(
                input_ids=torch.tensor([asked]), max_new_tokens=6, do_sample=False, eos_token_id=2,
                pad_token_id=2,
            )  # fmt: skip
        assert (
            answer["written"] == tokenizer.decode(written[0, len(asked) :], skip_special_tokens=True).strip()
        )
        said = parsed(answer["written"], row["choices"], by_letter=True)
        told["accuracy"] += wanted[row["answer"]] == max(wanted)
        told["accuracy_per_byte"] += by_byte[row["answer"]] == max(by_byte)
        told["accuracy_generated"] += said == row["answer"]
        told["unparsable_rate"] += said is None
    measured = learner.compute(learner.evaluate(tensors, shard))
    assert {key: measured[key] for key in told} == {key: value / len(ROWS) for key, value in told.items()}


def test_the_loss_is_that_of_a_language_model_on_prompts_and_right_choices(folders: dict[str, Path]) -> None:
    ours = learner_of(folders["llama"], {"method": "full"})
    tensors, shard = moved(ours), ours.task.shard(table_of(ROWS), {})
    prompts = [MultipleChoice.prompt(ours.task, row["question"], row["choices"]) for row in ROWS]  # type: ignore[arg-type]
    pairs = [
        {"prompt": prompt, "completion": row["choices"][row["answer"]]}
        for prompt, row in zip(prompts, ROWS, strict=True)
    ]
    job = ours.job.model_copy(
        update={
            "task": ours.job.task.model_copy(
                update={"name": "language-modeling", "options": {"max_tokens": 160}}
            )
        }
    )
    theirs = Learner.of(job, LANGUAGE_MODELING, {})
    table = theirs.task.from_builtin({"train": pa.Table.from_pylist(pairs)}, job).train
    whole = theirs.task.shard(table, {}, keys=ours.task.keys(table_of(ROWS)))
    assert torch.equal(whole.table, shard.table)
    one, other = (
        learner.compute(learner.evaluate(tensors, part)) for learner, part in ((ours, shard), (theirs, whole))
    )
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    rows = range(len(ROWS))
    losses = [
        float(learner.task.loss(learner.filled(tensors)(learner.collate(part, rows)), part.targets_of(rows)))
        for learner, part in ((ours, shard), (theirs, whole))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_question_that_does_not_fit_is_wrong_by_each_measure(folders: dict[str, Path]) -> None:
    learner = learner_of(folders["llama"], max_tokens=70)
    rows = [
        {"question": "a", "choices": ["b", "c"], "answer": 0},
        {"question": "long " * 30, "choices": ["b", "c"], "answer": 0},
        {"question": "a", "choices": ["b", "c" * 60], "answer": 0},
    ]
    shard = learner.task.shard(table_of(rows), {})
    told = learner.predictions(moved(learner), shard.inputs)
    assert sorted(bool(one["fits"]) for one in told) == [False, False, True]
    unfit = shard.select([row for row, one in enumerate(told) if not one["fits"]])
    found = learner.compute(learner.evaluate(moved(learner), unfit))
    assert [found[name] for name in ("accuracy", "accuracy_per_byte", "accuracy_generated")] == [0, 0, 0]
    assert found["unparsable_rate"] == 1


def test_the_metrics_by_hand() -> None:
    none = -torch.inf
    likelihood = torch.tensor(
        # The first is right: likelier; likelier for each byte alone; as likely as another; likelier.
        [[-1.0, -2.0, none], [-4.0, -3.0, none], [-2.0, -2.0, -5.0], [-2.0, -9.0, none]],
        dtype=torch.float64,
    )
    size = torch.tensor([[1, 4, 1], [4, 2, 1], [1, 1, 1], [1, 9, 1]])
    said, fits = torch.tensor([0, -1, 1, 0]), torch.tensor([True, True, True, False])
    # By byte -1 < -.5; -1 > -1.5; -2 = -2; the fourth doesn't fit.
    expected = [(LikelihoodAccuracy(), 1), (ByteLikelihoodAccuracy(), 1), (GeneratedAccuracy(), 1),
                (UnparsableRate(), 2)]  # fmt: skip
    for metric, count in expected:
        metric.update(likelihood, size, said, fits)
        assert float(metric.compute()) == count / 4, metric


def test_without_generation_only_likelihoods_are_measured(folders: dict[str, Path]) -> None:
    learner = learner_of(folders["llama"], generated=False)
    shard = learner.task.shard(table_of(ROWS), {})
    found = learner.compute(learner.evaluate(learner.initial(), shard))
    assert found.keys() == {"accuracy", "accuracy_per_byte", "loss"}
    assert "written" not in learner.predictions(learner.initial(), shard.inputs)[0]


@pytest.mark.parametrize(
    ("said", "choices", "by_letter", "place"),
    [
        ("Paris", ["Rome", "Paris"], False, 1),
        (" paris. ", ["Rome", "Paris"], False, 1),
        ("Paris\nor so", ["Rome", "Paris"], False, 1),
        ("It is Paris", ["Rome", "Paris"], True, None),
        ("B", ["Rome", "Paris"], False, None),
        ("B", ["Rome", "Paris"], True, 1),
        ("(B)", ["Rome", "Paris"], True, 1),
        ("B) paris", ["Rome", "Paris"], True, 1),
        ("B: Rome", ["Rome", "Paris"], True, None),
        ("C", ["Rome", "Paris"], True, None),
        ("A man", ["Rome", "Paris"], True, None),
        ("B", ["B", "A"], True, 0),
        ("b", ["B", "b"], True, 1),
        ("B.", ["B", "b", "c"], True, 1),
        ("", ["Rome", "Paris"], True, None),
        ("NÉ", ["né", "ne"], True, 0),
    ],
)
def test_a_text_stands_for_a_choice_or_for_none(
    said: str, choices: list[str], by_letter: bool, place: int | None
) -> None:
    assert parsed(said, choices, by_letter=by_letter) == place


# Which tokens are learnt and scored


def marked(choice: Choice) -> str:
    """The text with « and » around what is learnt, and in it [ and ] around what is scored."""
    tokenizer, text, state = byte_tokenizer(), "", (False, False)
    for token, is_learnt, is_scored in zip(
        choice.tokens.ids, choice.tokens.learnt, choice.scored, strict=True
    ):
        now = (is_learnt, is_scored)
        text += "]" * (state[1] > now[1]) + "»" * (state[0] > now[0])
        text += "«" * (now[0] > state[0]) + "[" * (now[1] > state[1])
        text, state = text + tokenizer.decode([token]), now
    return text + "]" * state[1] + "»" * state[0]


def task_of(folder: Path, **options: Any) -> MultipleChoice:
    task = learner_of(folder, **options).task
    assert isinstance(task, MultipleChoice)
    return task


USER, TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
AWKWARD: dict[str, tuple[str, list[str], dict[str, Any], list[str]]] = {
    "a choice begins as another": (
        "Hm?", ["he", "hell"], {"listed": False},
        [f"{USER}Hm?{TURN}«[he]<|im_end|>»\n", f"{USER}Hm?{TURN}«[hell]<|im_end|>»\n"],
    ),
    "no question": (
        "", ["x", "y"], {},
        [f"{USER}A. x\nB. y{TURN}«[{c}]<|im_end|>»\n" for c in "xy"],
    ),
    "a choice is the letter of another": (
        "Q", ["B", "A"], {}, [f"{USER}Q\nA. B\nB. A{TURN}«[{c}]<|im_end|>»\n" for c in "BA"],
    ),
    "a choice is in the question": (
        "x or y", ["x", "y"], {"listed": False}, [f"{USER}x or y{TURN}«[{c}]<|im_end|>»\n" for c in "xy"],
    ),
    "a choice holds the template's markers": (
        "Q", ["x<|im_end|>", "y"], {"listed": False},
        [f"{USER}Q{TURN}«[x<|im_end|>]<|im_end|>»\n", f"{USER}Q{TURN}«[y]<|im_end|>»\n"],
    ),
    "no template": (
        "Hm?", ["he", "x"], {"template": ""},
        [f"Hm?\nA. he\nB. x\nAnswer:«[ {c}]<|im_end|>»" for c in ("he", "x")],
    ),
    "no template, not listed": (
        "Hm?", ["he", "x"], {"template": "", "listed": False},
        [f"Hm?«[ {c}]<|im_end|>»" for c in ("he", "x")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AWKWARD)
def test_the_choices_text_is_scored_and_with_what_ends_it_learnt(folders: dict[str, Path], case: str) -> None:
    question, choices, options, wanted = AWKWARD[case]
    task = task_of(folders["llama"], **options)
    rows = table_of([{"question": question, "choices": choices, "answer": 0}])
    (found,) = task.questions(rows)
    assert [marked(choice) for choice in found.choices] == wanted
    assert found.fits
    assert byte_tokenizer().decode(found.prompt) == wanted[0].partition("«")[0]


def test_letters_of_several_bytes_are_scored_byte_by_byte(folders: dict[str, Path]) -> None:
    task, tokenizer = task_of(folders["llama"], listed=False), byte_tokenizer()
    (found,) = task.questions(table_of([{"question": "é", "choices": ["né\U0001f33b", "n"], "answer": 0}]))
    choice = found.choices[0]
    scored = [token for token, is_scored in zip(choice.tokens.ids, choice.scored, strict=True) if is_scored]
    assert scored == tokenizer("né\U0001f33b", add_special_tokens=False)["input_ids"] and len(scored) == 7


def test_without_anything_before_a_choice_the_question_does_not_fit(folders: dict[str, Path]) -> None:
    task = task_of(folders["gpt2"], listed=False)
    (found,) = task.questions(table_of([{"question": "", "choices": ["he", "x"], "answer": 0}]))
    assert [choice.tokens.learnt[0] for choice in found.choices] == [False, False]
    assert not found.fits


def test_a_template_that_rewrites_choices_is_refused(folders: dict[str, Path]) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'].upper() + '\n' }}{% endfor %}"
    task = task_of(folders["llama"], template=template)
    with pytest.raises(DataError, match="question 1: the chat template writes a choice in another way"):
        task.questions(table_of(ROWS[:1]))


def test_check_counts_what_is_learnt_and_does_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "long " * 60, "choices": ["a", "b"], "answer": 0}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = learner_of(folders["llama"]).backbone
    told = MULTIPLE_CHOICE.notes_on(
        tmp_path / "a.jsonl", DataSection(source="x"), {"max_tokens": 160}, backbone
    )
    # he, né🌻 (7 bytes), "go away", "he he" in 3 tokens (one for a blank with he), and an end of each.
    assert told[0].endswith(f"of which {1 + 7 + 7 + 2 + 4} are learnt")
    assert told[1].startswith("1 of 5 questions don't fit")


def test_a_temperature_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"task\.options: temperature"):
        MULTIPLE_CHOICE.check(job_of(folders["llama"], temperature=0.5))


# Inputs, and runs


def test_a_question_alone_is_answered_in_words_and_one_with_choices_by_likelihood(
    folders: dict[str, Path],
) -> None:
    learner = learner_of(folders["llama"])
    tensors, row = moved(learner), {"question": "which?", "choices": ["ll", "hell", "o"]}
    given = [learner.task.parse_input(text) for text in ("which?", json.dumps(row))]
    alone, among = learner.answers(tensors, given)
    assert isinstance(alone["label"], str) and alone.keys() == {"label"}
    values = among["log_likelihood"]
    assert list(values) == row["choices"] and values[among["label"]] == max(values.values())
    assert among["said"] in (None, *row["choices"])
    for text, problem in (("{", "no JSON"), ('{"question": "a"}', "expected question and choices"),
                          ('{"question": "a", "choices": ["b"]}', "1 choices")):  # fmt: skip
        with pytest.raises(DataError, match=problem):
            learner.task.parse_input(text)


def test_generated_choices_are_sound_and_none_is_there_twice() -> None:
    whole = generated_choices()
    assert {split: table.num_rows for split, table in whole.items()} == {"train": 540, "test": 60}
    rows = [row for table in whole.values() for row in table.to_pylist()]
    assert len({(row["question"], *row["choices"]) for row in rows}) == 600
    assert {len(row["choices"]) for row in rows} == {3, 4, 5}
    assert all(0 <= row["answer"] < len(row["choices"]) == len(set(row["choices"])) for row in rows)
    assert generated_choices()["train"].equals(whole["train"])
    assert not generated_choices(1)["train"].equals(whole["train"])


@pytest.mark.slow
def test_training_makes_the_right_choices_likelier(folders: dict[str, Path]) -> None:
    learner = learner_of(folders["llama"], {"method": "full"})
    rows = [{"question": q, "choices": ["he", "x", "ll"], "answer": n} for n, q in enumerate(("a", "b", "c"))]
    shard, start = learner.task.shard(table_of(rows), {}), learner.initial()
    job = learner.job.model_copy(update={"train": learner.job.train.model_copy(update={"epochs": 60})})
    update = train_model(learner, start, shard, job, client="a", round=1, plan={})
    found = learner.compute(learner.evaluate({n: t + update.delta[n] for n, t in start.items()}, shard))
    assert found["accuracy"] == found["accuracy_generated"] == 1 and found["unparsable_rate"] == 0


def of_few(job: Job, folder: Path) -> Job:
    """The job on 27 of the questions, written to a folder."""
    rows = MULTIPLE_CHOICE.schema.adopted({"train": generated_choices(0, 30)["train"]}).train
    MULTIPLE_CHOICE.write(rows, folder, job.data)
    return job.model_copy(update={"data": job.data.model_copy(update={"source": str(folder)})})


@pytest.mark.slow
def test_a_run_with_kept_states_has_the_same_bits_with_a_cold_cache_a_warm_one_and_in_another_engine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    job = of_few(
        job_of(folders["llama"], LORA | {"layers": 1}, max_tokens=200, max_new_tokens=2), tmp_path / "data"
    )
    job = job.model_copy(update={"train": job.train.model_copy(update={"cached_states": "fp32"})})
    results = [
        simulate(job, tmp_path / name, engine=engine, on_event=ignore_events, report=False)
        for name, engine in (("cold", "inline"), ("warm", "inline"), ("loop", "loop"))
    ]
    assert len({result.model_sha256 for result in results}) == 1
    assert results[0].final == results[1].final == results[2].final
    bare = simulate(
        job.model_copy(update={"train": job.train.model_copy(update={"cached_states": None})}),
        tmp_path / "bare", on_event=ignore_events, report=False,
    )  # fmt: skip
    for name, values in bare.final["clients"].items():
        assert values["loss"] == pytest.approx(results[0].final["clients"][name]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_run_predicts_on_the_command_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = of_few(job_of(folders["llama"], max_new_tokens=2), tmp_path / "data")
    simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    capsys.readouterr()
    asked = json.dumps({"question": "Which of these is a fruit?", "choices": ["plum", "horse"]})
    assert command_line(["predict", str(tmp_path / "run"), asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["label"] in ("plum", "horse") and set(found["log_likelihood"]) == {"plum", "horse"}
