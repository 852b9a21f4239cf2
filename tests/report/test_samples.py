"""What a language model's run shows of held-out prompts: before, after, and the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import atoll
from atoll.job.job import Job
from atoll.report.page import SHOWN_OF_A_TEXT, report_of, write_report
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.support.models import small_llama

NEW = 8
Rows = list[dict[str, Any]]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, Rows] = {
    "language-modeling": [
        {"messages": [turn("user", f"<b>{n}</b>"), turn("assistant", f"he {n}"), turn("user", "x"),
                      turn("assistant", "y")]}
        for n in range(20)
    ],
    "preference": [{"prompt": f"hi {n}", "chosen": f"he {n}", "rejected": "x"} for n in range(20)],
    "multiple-choice": [{"question": f"hi {n}", "choices": ["x", f"he {n}"], "answer": 1} for n in range(20)],
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama"))


def run_of(folder: Path, llama: Path, task: str, rows: Rows, **options: Any) -> tuple[Path, RunResult]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table: dict[str, Any] = {
        "name": "shown",
        "seed": 3,
        "task": {"name": task, "options": {"max_tokens": 128, "max_new_tokens": NEW} | options},
        "data": {"source": str(folder / "rows.jsonl"), "test_fraction": 0.4},
        "backbone": {"name": str(llama)},
        "tune": {"method": "full"},
        "train": {"optimizer": "adam", "lr": 0.02, "batch_size": 4, "epochs": 3},
        "federation": {"clients": 2, "rounds": 1},
    }
    result = simulate(Job.parse(table, origin="test"), folder / "run", on_event=ignore_events, report=False)
    return folder / "run", result


def asked(task: str, prompt: str) -> list[dict[str, str]]:
    """The conversation whose text, without the template's markers, is that prompt."""
    return [turn("user", prompt.removeprefix("user\n").removesuffix("\nassistant"))]


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_prompts_are_answered_as_plain_transformers_do_before_and_the_run_after(
    llama: Path, tmp_path: Path, task: str
) -> None:
    run, result = run_of(tmp_path, llama, task, ROWS[task])
    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama).eval(),
        AutoTokenizer.from_pretrained(llama),
    )
    assert len(result.samples) == 3 and result == RunResult.read(run)
    for sample in result.samples:
        messages = asked(task, sample["prompt"])
        number = sample["reference"].removeprefix("he ")
        assert sample["reference"] == f"he {number}" and number in messages[0]["content"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            written = network.generate(**prompt, max_new_tokens=NEW, do_sample=False)
        before = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["before"] == before.strip()
        assert sample["after"] == atoll.Run(run).chat(messages)
    assert any(sample["before"] != sample["after"] for sample in result.samples)


@pytest.mark.slow
def test_the_page_shows_them_as_text_and_no_more_than_its_part(llama: Path, tmp_path: Path) -> None:
    run, result = run_of(tmp_path, llama, "language-modeling", ROWS["language-modeling"], samples=2)
    assert len(result.samples) == 2
    result.samples[0]["prompt"] = "a" * 600 + "<i>end</i>"
    result.samples[0]["after"] = "begin" + "b" * 600
    write_report(run, result)
    page = (run / "report.html").read_text()
    assert "Before and after" in page and "&lt;i&gt;end&lt;/i&gt;" in page and "<i>end" not in page
    first, second = report_of(run, result).samples
    assert first.prompt == "…" + ("a" * 600 + "<i>end</i>")[-SHOWN_OF_A_TEXT:]
    assert first.after == "begin" + "b" * (SHOWN_OF_A_TEXT - 5) + "…"
    assert second.reference == result.samples[1]["reference"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["none are asked for", "texts have no prompt"])
def test_where_there_are_none_nothing_is_said(llama: Path, tmp_path: Path, case: str) -> None:
    texts = [{"text": f"he is {n}"} for n in range(20)]
    rows, options = (texts, {}) if "texts" in case else (ROWS["language-modeling"], {"samples": 0})
    run, result = run_of(tmp_path, llama, "language-modeling", rows, **options)
    assert result.samples is None
    write_report(run, result)
    assert "Before and after" not in (run / "report.html").read_text()
