"""What a language model completes word for word: by writing it, beside what one pass over the text tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.audit.verbatim import GIVEN, WRITTEN, completed_verbatim, first_stretch
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.trained import model_of, trained
from tests.support.models import small_llama

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(number: int) -> str:
    """Letters in an order of their own; the first are those of the alphabet."""
    if number == 1:
        return LETTERS * 3
    draw = torch.Generator().manual_seed(number)
    return "".join(LETTERS[i] for i in torch.randint(0, 26, (60,), generator=draw).tolist())


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A run whose model has seen one client's text often, and others once; and one that is too short."""
    folder = tmp_path_factory.mktemp("verbatim")
    rows = [{"text": text(1), "who": "loud"}] * 24 + [{"text": text(n), "who": "quiet"} for n in range(2, 5)]
    rows += [{"text": "a b c", "who": "quiet"}]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table: dict[str, Any] = {
        "name": "heart",
        "seed": 3,
        "task": {"name": "language-modeling", "options": {"max_tokens": 64}},
        "data": {
            "source": str(folder / "texts.jsonl"),
            "partition": {"kind": "natural", "by": "who"},
            "validation_fraction": 0,
            "test_fraction": 0,
        },
        "backbone": {"name": str(small_llama(folder / "llama")), "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 0.02, "batch_size": 4, "optimizer": "adam", "epochs": 10},
        "federation": {"clients": 2, "rounds": 3},
    }
    job = Job.parse(table, origin="test")
    simulate(job, folder / "run", on_event=ignore_events, report=False)
    return folder / "run", job


def written(network: Any, ids: torch.Tensor) -> list[int]:
    """What transformers' own greedy generation writes after tokens."""
    out = network.generate(
        input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


def test_one_pass_tells_what_would_be_written(learnt: tuple[Path, Job]) -> None:
    run, job = learnt
    population, (learner, tensors) = Population.of(job), trained(run)
    found = completed_verbatim(job, population, lambda: model_of(run))
    assert found is not None
    whole, expected, network = population.whole(learner), 0, learner.filled(tensors).backbone.model
    came: dict[tuple[int, ...], list[int]] = {}  # one of the texts is there 24 times
    for number in range(len(whole)):
        ids = whole.inputs[number]["input_ids"]
        if len(ids) > GIVEN + WRITTEN:
            begin = int(whole.inputs[number]["places"][0]) + 1
            end = begin + GIVEN
            given = tuple(ids[:end].tolist())
            came[given] = came.get(given) or written(network, ids[:end])
            expected += came[given] == ids[end : end + WRITTEN].tolist()
    assert found["after"] == expected and found["before"] == 0
    assert found["texts"] == sum(one["texts"] for one in found["clients"].values()) == 27
    loud, quiet = found["clients"]["client-0000"], found["clients"]["client-0001"]
    assert loud["after"] == loud["texts"] == 24 and quiet["texts"] == 3
    assert loud["after"] + quiet["after"] == found["after"]


def test_the_stretch_is_the_first_that_is_long_enough() -> None:
    assert first_stretch([]) is None and first_stretch(range(5, 5 + GIVEN + WRITTEN - 1)) is None
    assert first_stretch([*range(30), *range(40, 100)]) == 30
    assert first_stretch([*range(50), *range(60, 200)]) == 0


def test_there_is_nothing_to_complete_in_another_task_or_in_short_texts(
    learnt: tuple[Path, Job], tmp_path: Path
) -> None:
    run, job = learnt
    (tmp_path / "short.jsonl").write_text("\n".join(['{"text": "a b c", "who": "x"}'] * 4))
    data = job.data.model_copy(update={"source": str(tmp_path / "short.jsonl")})
    short = job.model_copy(
        update={"data": data, "federation": job.federation.model_copy(update={"clients": 1})}
    )
    assert completed_verbatim(short, Population.of(short), lambda: model_of(run)) is None
    other = job.model_copy(update={"task": job.task.model_copy(update={"name": "preference"})})
    with pytest.raises(ConfigError, match=r"model\.safetensors: missing, expected the run's model"):
        model_of(tmp_path)
    assert completed_verbatim(other, Population.of(job), lambda: {}) is None


def test_the_verb_says_it_in_one_line(learnt: tuple[Path, Job], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = learnt
    assert command_line(["audit", str(run), "--canaries", "16", "--planted", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((run / "audit.json").read_text())["verbatim"]
    written = f"the model writes the next 20 word for word in {found['after']}, before training in 0"
    told = f"by heart: of 27 texts of the clients, given 20 tokens, {written}; most of them client-0000's, 24"
    assert told in said and "was not attacked" in said
