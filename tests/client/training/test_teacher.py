"""A run as another's teacher: its loss against autograd, the same bits everywhere, promises, refusals."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import atoll
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.heads.distillation import distillation_loss, head_loss
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.compatibility import check_agreed, required_info
from atoll.learning.learner import Learner
from atoll.learning.objective.distillation import Teacher
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from atoll.trained import trained
from tests.client.training.test_imbalance import TABLE
from tests.support.task_data import ready
from tests.support.task_jobs import job_of


def digits(**tables: Any) -> Job:
    return Job.parse(TABLE | tables, origin="test")


PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    simulate(digits(tune={"hidden": 32}), out, on_event=ignore_events, report=False)
    return out


def student(teacher: Path, **train: Any) -> Job:
    return digits(train=TABLE["train"] | {"teacher": str(teacher)} | train)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.5), (7.5, 0.9)])
def test_the_closed_form_and_the_autograd_loss_are_hintons(temperature: float, weight: float) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 8, 5, generator=generator) * 3
    said = torch.randn(3, 8, 5, generator=generator) * 3
    soft = torch.softmax(said / temperature, dim=-1)
    classes = torch.randint(0, 5, (3, 8), generator=generator)
    targets = torch.cat([classes.unsqueeze(2).float(), soft], dim=2)
    closed = distillation_loss(LOSSES["softmax"], temperature, weight)
    error, numbers = closed.grad(outputs.clone(), targets)
    model = Teacher(None, {}, temperature, weight, "")  # type: ignore[arg-type]
    for client in range(3):
        own = outputs[client].clone().requires_grad_()
        # Hinton et al.: soft cross-entropy at T times T squared, less the teacher's entropy.
        logs = torch.log_softmax(own / temperature, dim=1)
        apart = (soft[client] * (soft[client].log() - logs)).sum()
        hard = nn.functional.cross_entropy(own, classes[client], reduction="sum")
        value = (1 - weight) * hard + weight * temperature**2 * apart
        (gradient,) = torch.autograd.grad(value, own)
        assert torch.allclose(error[client], gradient, atol=1e-5)
        assert float(closed.value(numbers)[client].sum()) == pytest.approx(value.item(), rel=1e-4)
        assert float(model.loss(outputs[client], targets[client])) * 8 == pytest.approx(
            value.item(), rel=1e-4
        )


def sha(job: Job, out: Path, **how: Any) -> str:
    return str(simulate(job, out, on_event=ignore_events, report=False, **how).model_sha256)


def test_heads_have_the_same_bits_in_every_engine_and_learn_otherwise_than_alone(
    teacher: Path, tmp_path: Path
) -> None:
    job = student(teacher)
    found = {
        sha(job, tmp_path / "inline"),
        sha(job, tmp_path / "loop", engine="loop"),
        sha(job, tmp_path / "threads", workers=2),
    }
    assert len(found) == 1
    assert sha(digits(), tmp_path / "alone") not in found
    told = json.loads((tmp_path / "inline" / "result.json").read_text())
    assert len(told["facts"]["teacher"]) == 64


def test_an_answer_does_not_depend_on_who_else_is_asked(teacher: Path) -> None:
    job = student(teacher)
    population = Population.of(job)
    learner = Learner.of(job, task_named(job.task.name), {"classes": [str(d) for d in range(10)]})
    whole = population.whole(learner)
    together = learner.objective.with_soft_labels(whole).table
    for rows in ([5], [700, 3], list(range(40, 99))):
        assert torch.equal(learner.objective.with_soft_labels(whole.select(rows)).table, together[rows])


@pytest.mark.slow
@pytest.mark.processes
def test_a_whole_network_learns_from_its_teacher_with_the_same_bits_and_needs_it_no_more(
    tmp_path: Path,
) -> None:
    data = {"data": {"source": "written", "classes": ("good", "bad"), "test_fraction": 0.2}}
    first = ready(job_of("text-classification", "lora", **data), tmp_path)
    simulate(first, tmp_path / "teacher", on_event=ignore_events, report=False)
    job = ready(job_of("text-classification", "full", **data), tmp_path)
    train = job.train.model_copy(update={"teacher": str(tmp_path / "teacher"), "teacher_weight": 0.9})
    job = job.model_copy(update={"train": train})
    one, two, three = (
        sha(job, tmp_path / name, **how)
        for name, how in (("a", {}), ("b", {"engine": "loop"}), ("c", {"workers": 2}))
    )
    assert one == two == three
    with pytest.raises(ConfigError, match="engine cohort"):
        sha(job, tmp_path / "d", engine="cohort")
    (tmp_path / "teacher").rename(tmp_path / "gone")
    learner, _ = trained(tmp_path / "a")
    assert learner.teacher is None
    assert atoll.Run(tmp_path / "a").predict(["good"])[0]["label"] in ("good", "bad")


def test_with_a_teacher_one_example_still_moves_a_clipped_sum_by_the_norm_at_most(teacher: Path) -> None:
    job = student(teacher)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(20, 12, generator=generator) * 30
    soft = torch.softmax(torch.randn(20, 10, generator=generator) * 9, dim=1)
    classes = torch.randint(0, 10, (20, 1), generator=generator).float()
    head = {"head.weight": torch.randn(10, 12, generator=generator), "head.bias": torch.zeros(10)}
    examples = FeatureTable.of(features, torch.cat([classes, soft], dim=1))

    def summed(rows: list[int]) -> torch.Tensor:
        import numpy as np

        private = DpSgd(0.5, 0.0, 1.0, lambda client: None, lambda client, n: [np.arange(len(n))])  # type: ignore[arg-type, return-value]
        work = ClientRows("one", np.array(rows), np.array(rows, dtype=np.uint64))
        ((_, total),) = head_sums(head, examples, [work], head_loss(job, "softmax"), private)
        return torch.cat([t.flatten() for t in total.values()])

    everybody = summed(list(range(20)))
    for left_out in range(20):
        moved = (everybody - summed([r for r in range(20) if r != left_out])).norm()
        assert 0.4 < float(moved) <= 0.5 + 1e-4


def test_a_promise_takes_no_teacher_without_one_and_counts_the_teachers(
    teacher: Path, tmp_path: Path
) -> None:
    private = {"privacy": PRIVATE | {"seeded_noise": True}}
    data = {"data": TABLE["data"]}
    taught_by = {"train": TABLE["train"] | {"teacher": str(teacher)}}
    with pytest.raises(ConfigError, match="promises nothing to the unit 'example'"):
        simulate(digits(**data, **private, **taught_by), tmp_path / "x", on_event=ignore_events, report=False)
    first = simulate(digits(**data, **private), tmp_path / "private", on_event=ignore_events, report=False)
    train = {"train": TABLE["train"] | {"teacher": str(tmp_path / "private")}}
    with pytest.raises(ConfigError, match="was seeded and protects nobody"):
        simulate(
            digits(**data, privacy=PRIVATE, **train), tmp_path / "y", on_event=ignore_events, report=False
        )
    both = simulate(digits(**data, **private, **train), tmp_path / "both", on_event=ignore_events)
    told, its = both.privacy, first.privacy
    assert told["without_teacher"]["epsilon"] == pytest.approx(its["epsilon"])
    assert told["epsilon"] == pytest.approx(2 * its["epsilon"])
    assert told["delta"] == pytest.approx(2e-5)
    assert "and the teacher's" in html.unescape((tmp_path / "both" / "report.html").read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.teacher_weight": 0.5}, "teacher_weight has no meaning without teacher"),
        ({"train.teacher": "x", "train.imbalance": "focal"}, "imbalance and teacher exclude each other"),
        ({"train.teacher": "x", "train.teacher_weight": 1.5}, r"teacher_weight.*less than or equal to 1"),
        (
            {"train.teacher": "x", "privacy.audit": True} | {f"privacy.{k}": v for k, v in PRIVATE.items()},
            "privacy.audit and train.teacher exclude each other, for such a run can't be attacked",
        ),
        ({"train.teacher": "nowhere"}, "train.teacher: expected a finished run directory, found no job.toml"),
    ],
)
def test_what_makes_no_sense_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    import tomli_w

    file.write_text(tomli_w.dumps(TABLE))
    with pytest.raises(ConfigError, match=said):
        simulate(atoll.load_job(file, changes), tmp_path / "out", on_event=ignore_events, report=False)
    assert not (tmp_path / "out").exists()


def test_another_task_other_classes_and_another_run_are_refused(teacher: Path, tmp_path: Path) -> None:
    fitting = job_of("forecasting", "head")
    asked = fitting.model_copy(update={"train": fitting.train.model_copy(update={"teacher": str(teacher)})})
    with pytest.raises(ConfigError, match="distillation is of classes, forecasting has none"):
        simulate(asked, tmp_path / "a", on_event=ignore_events, report=False)
    texts = job_of("text-classification", "head")
    asked = texts.model_copy(update={"train": texts.train.model_copy(update={"teacher": str(teacher)})})
    with pytest.raises(ConfigError, match="expected a run of text-classification, found one of image-class"):
        simulate(asked, tmp_path / "b", on_event=ignore_events, report=False)
    job = student(teacher)
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["1", "0"]})
    with pytest.raises(ConfigError, match="expected the same, in the same order"):
        _ = required_info(learner)
    learner.data_info = learner.data_info | {"teacher": "0" * 64}
    with pytest.raises(ConfigError, match="is not the run's teacher"):
        check_agreed(learner)
