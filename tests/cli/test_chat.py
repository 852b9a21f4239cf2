"""`atoll chat` and `Run.chat`: the answers of plain transformers; what is left out, and what refused."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import atoll
from atoll.cli.main import run as command_line
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.language_modeling.data import Messages
from atoll.tasks.language_modeling.generation import Decoding, _Teller
from atoll.trained import chat_with
from tests.support.models import byte_tokenizer, small_llama

CONTEXT = 256
NEW = 12
Talk = Callable[..., tuple[int, str, str]]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def trained_run(folder: Path, backbone: Path, **options: Any) -> Path:
    """A run of two clients that moves a small network from where it began."""
    (folder / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [turn("user", f"hi {n}"), turn("assistant", "he he")]}) + "\n"
            for n in range(12)
        )
    )
    table: dict[str, Any] = {
        "name": "talks",
        "seed": 3,
        "task": {
            "name": "language-modeling",
            "options": {"max_tokens": 96, "max_new_tokens": NEW} | options,
        },
        "data": {"source": str(folder / "chats.jsonl")},
        "backbone": {"name": str(backbone)},
        "tune": {"method": "full"},
        "train": {"optimizer": "adam", "lr": 0.01, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    simulate(Job.parse(table, origin="test"), folder / "run", on_event=ignore_events, report=False)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return trained_run(folder, small_llama(folder / "llama"))


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The trained network and its tokenizer, as transformers load what the run exports."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert command_line(["export", str(run), "--format", "huggingface", "--out", str(folder)]) == 0
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def talk(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs the verb with lines as its input; (exit code, what it answered, what it said on stderr)."""

    def say(lines: str, *options: str, of: Path = run) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        code = command_line(["chat", str(of), *options])
        return code, *capsys.readouterr()

    return say


def greedy(plain: tuple[Any, Any], messages: Messages, most: int = NEW) -> tuple[str, list[int]]:
    """What transformers' own `generate` writes for a conversation: as text, and as tokens."""
    network, tokenizer = plain
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        written = network.generate(**prompt, max_new_tokens=most, do_sample=False)
    ids = written[0, prompt["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), ids


def by_turns(plain: tuple[Any, Any], *said: str, system: str | None = None) -> Iterator[str]:
    messages = [] if system is None else [turn("system", system)]
    for text in said:
        messages.append(turn("user", text))
        answer, _ = greedy(plain, messages)
        messages.append(turn("assistant", answer))
        yield answer


def test_greedy_turns_are_those_of_plain_transformers(talk: Talk, plain: tuple[Any, Any]) -> None:
    code, answered, said = talk("hi\nhow are you?\n\nné\U0001f33b\n")
    assert (code, said) == (0, "")
    assert answered == "".join(f"{text}\n" for text in by_turns(plain, "hi", "how are you?", "né\U0001f33b"))


def test_answers_are_token_for_token_those_of_transformers(
    run: Path, plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, tokens = _Teller.put, []

    def noted(self: _Teller, given: torch.Tensor) -> None:
        tokens.append(given.flatten().tolist())
        put(self, given)

    monkeypatch.setattr(_Teller, "put", noted)
    messages = [turn("system", "Be kind."), turn("user", "hi")]
    pieces: list[str] = []
    answer = chat_with(run).answer(messages, Decoding(NEW), on_text=pieces.append)
    wanted, ids = greedy(plain, messages)
    assert [token for step in tokens[1:] for token in step] == ids
    assert "".join(pieces) == answer.text == wanted
    assert atoll.Run(run).chat(messages) == wanted


def test_predict_says_what_a_chat_begins_with(run: Path) -> None:
    (predicted,) = atoll.Run(run).predict(["hi"])
    assert atoll.Run(run).chat([turn("user", "hi")]) == predicted["label"]


def test_a_chat_begins_anew_or_ends_when_it_is_asked_to(talk: Talk, plain: tuple[Any, Any]) -> None:
    (first,) = by_turns(plain, "hi", system="Be kind.")
    code, answered, said = talk("hi\n /reset \nhi\n/exit\nhi\n", "--system", "Be kind.")
    assert (code, answered, said) == (0, f"{first}\n{first}\n", "")


def test_what_is_drawn_is_the_same_for_the_same_seed(talk: Talk) -> None:
    how = ("--temperature", "1.5", "--top-p", "0.9", "--max-new-tokens", "20")
    one, again, other, jobs = (
        talk("hi\nwhat?\n", *how, *seed)[1]
        for seed in (("--seed", "5"), ("--seed", "5"), ("--seed", "6"), ())
    )
    assert one == again and len({one, other, jobs}) == 3
    assert talk("hi\nwhat?\n", *how, "--seed", "3")[1] == jobs  # the job's seed


def test_little_of_the_chance_is_the_likeliest_token(run: Path) -> None:
    talker, messages = chat_with(run), [turn("user", "hi")]
    likeliest = talker.answer(messages, Decoding(NEW)).text
    assert talker.answer(messages, Decoding(NEW, 1.0, 1e-9), seed=7).text == likeliest


def test_of_a_long_conversation_the_oldest_turns_are_left_out(
    run: Path, plain: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    talker = chat_with(run)
    long = [turn("system", "s")]
    for number in range(6):
        long += [turn("user", f"{number} " + "x" * 30), turn("assistant", "y")]
    long.append(turn("user", "end"))
    with caplog.at_level(logging.WARNING):
        answer = talker.answer(long, Decoding(NEW))
    fits = [
        [long[0], *long[begin:]]
        for begin in range(1, len(long), 2)
        if len(
            plain[1].apply_chat_template([long[0], *long[begin:]], add_generation_prompt=True)["input_ids"]
        )
        <= CONTEXT - NEW
    ]
    assert answer.seen == fits[0] and 1 < len(fits[0]) < len(long)
    assert answer.text == greedy(plain, fits[0])[0]
    left_out = len(long) - len(fits[0])
    assert [record.message for record in caplog.records] == [
        f"the conversation is longer than the model's 256 tokens: the oldest {left_out} messages are left out"
    ]


def test_the_command_goes_on_without_the_oldest_turns(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"{number} {'x' * 60}" for number in range(5)]
    code, answered, _ = talk("\n".join(lines) + "\n")
    assert code == 0 and len(answered.splitlines()) >= 5
    assert [r.message for r in caplog.records if "oldest 2 messages" in r.message]


def test_a_turn_that_alone_is_too_long_is_refused(talk: Talk, run: Path) -> None:
    code, answered, said = talk("x" * 300 + "\nhi\n")
    assert (code, answered) == (2, "")
    assert "the last one alone has" in said and said.count("\n") == 1
    with pytest.raises(DataError, match="expected at most 256 with the 12 of an answer"):
        atoll.Run(run).chat([turn("user", "x" * 300)])


class Terminal(io.StringIO):
    """Lines that somebody types, and an interrupt behind the last one."""

    def isatty(self) -> bool:
        return True

    def readline(self, *args: Any) -> str:
        line = super().readline(*args)
        if not line:
            raise KeyboardInterrupt
        return line


def test_ctrl_c_ends_a_chat_cleanly_and_a_mistake_does_not(
    talk: Talk, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    plain: tuple[Any, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", Terminal("x" * 300 + "\nhi\n"))
    capsys.readouterr()
    assert command_line(["chat", str(run)]) == 0
    answered, said = capsys.readouterr()
    assert answered == f"{next(by_turns(plain, 'hi'))}\n\n"
    assert said.startswith("error: messages: the last one alone") and said.count("\n") == 1


def test_ctrl_c_while_it_answers_ends_it_too(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: _Teller, given: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Teller, "put", interrupted)
    code, answered, said = talk("hi\n")
    assert (code, answered, said) == (0, "\n", "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--temperature", "-1"), "temperature: -1.0, expected 0 or a number above"),
        (("--temperature", "nan"), "temperature: nan, expected 0 or a number above"),
        (("--temperature", "1", "--top-p", "0"), "top_p: 0.0, expected a number above 0 and at most 1"),
        (("--top-p", "0.5"), "top_p: 0.5, but at temperature 0 nothing is drawn"),
        (("--max-new-tokens", "0"), "max_new_tokens: 0, expected at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(talk: Talk, options: tuple[str, ...], problem: str) -> None:
    code, answered, said = talk("hi\n", *options)
    assert (code, answered) == (2, "") and said.startswith(f"error: {problem}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "the last one is of nothing"),
        ([turn("assistant", "hi")], "the last one is of assistant, expected one of the user"),
        ([{"role": "user"}], "message 1: .*role.*, expected role and content"),
    ],
)
def test_what_is_no_conversation_is_refused(run: Path, messages: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        atoll.Run(run).chat(messages)


def test_runs_that_have_no_chat_are_refused(talk: Talk, tmp_path: Path) -> None:
    digits = {
        "name": "digits", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8}, "federation": {"clients": 2, "rounds": 1},
    }  # fmt: skip
    simulate(Job.parse(digits, origin="test"), tmp_path / "digits", on_event=ignore_events, report=False)
    code, _, said = talk("hi\n", of=tmp_path / "digits")
    assert code == 2 and "a run of image-classification, expected one of a language model" in said
    bare = small_llama(tmp_path / "llama", tokenizer=byte_tokenizer(template=None))
    (tmp_path / "bare").mkdir()
    folder = tmp_path / "bare"
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    made = trained_run(folder, bare, template=template)
    assert talk("hi\n", of=made)[0] == 0  # the job's own template
    (folder / "prompts").mkdir()
    rows = "".join(json.dumps({"prompt": f"hi {n}", "completion": "he"}) + "\n" for n in range(12))
    (folder / "prompts" / "data.jsonl").write_text(rows)
    job = Job.load(made / "job.toml")
    job = job.model_copy(
        update={
            "data": job.data.model_copy(update={"source": str(folder / "prompts")}),
            "task": job.task.model_copy(update={"options": {"max_tokens": 96}}),
        }
    )
    simulate(job, folder / "none", on_event=ignore_events, report=False)
    code, _, said = talk("hi\n", of=folder / "none")
    assert code == 2 and "has no chat template, and the job none as task.options.template" in said
    with pytest.raises(ConfigError, match="no chat template"):
        atoll.Run(folder / "none").chat([turn("user", "hi")])


def test_a_letter_is_told_once_all_its_bytes_are_written() -> None:
    tokenizer, told = byte_tokenizer(), []
    teller = _Teller(tokenizer, told.append)
    teller.put(torch.tensor([[1, 2]]))
    for token in tokenizer(" né he\n\U0001f33b!")["input_ids"]:
        teller.put(torch.tensor([token]))
    teller.end()
    assert "".join(told) == "né he\n\U0001f33b!" and told[:3] == ["n", "é", " he"]
