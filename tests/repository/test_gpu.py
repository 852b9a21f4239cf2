"""The same jobs on an NVIDIA GPU: results near the processor's, repeatable runs, engines beside each other.

`python -m pytest tests/repository/test_gpu.py` on a machine that has one; elsewhere all of it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.job.job import Job
from atoll.protocol.tensors import Tensors, from_bytes
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.system.fork_server import worker_pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

TABLE: dict[str, Any] = {
    "name": "gpu",
    "seed": 11,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"lr": 0.5, "batch_size": 16},
    "federation": {"clients": 6, "cohort": 4, "rounds": 4},
}
NETWORK: dict[str, Any] = {
    "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32},
    "train": {"lr": 0.005, "batch_size": 16},
}
PRIVATE: dict[str, Any] = {
    "unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5,
    "seeded_noise": True,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "head": {},
    "hidden": {"tune": {"hidden": 16}, "train": {"optimizer": "adam", "lr": 0.01}},
    "features": {k: NETWORK[k] for k in NETWORK},
    "full": NETWORK | {"tune": {"method": "full"}},
    "lora": NETWORK | {"tune": {"method": "lora", "rank": 2}},
    "last-k": NETWORK | {"tune": {"method": "last-k", "layers": 1}},
    "private-head": {"privacy": PRIVATE},
    "private-lora": NETWORK | {"tune": {"method": "lora", "rank": 2}, "privacy": PRIVATE},
    "int8": {"federation": {"compression": "int8"}},
    "sampling": {"train": {"imbalance": "sampling"}},
    "smooth": {"train": {"label_smoothing": 0.1}},
    "schedule": NETWORK | {"tune": {"then": [{"method": "last-k", "layers": 1, "after": 2}]}},
}


def job_of(case: str, device: str, **train: Any) -> Job:
    tables = {key: dict(value) for key, value in {**TABLE, **CASES[case]}.items() if isinstance(value, dict)}
    for key in ("train", "federation"):
        if key in CASES[case]:
            tables[key] = {**TABLE[key], **CASES[case][key]}
    tables["train"] |= {"device": device} | train
    return Job.parse({"name": TABLE["name"], "seed": TABLE["seed"], **tables}, origin="test")


def run(job: Job, out: Path, **options: Any) -> tuple[RunResult, dict[str, torch.Tensor]]:
    result = simulate(job, out, on_event=ignore_events, report=False, **options)
    return result, from_bytes((out / "model" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_the_gpu_is_near_that_on_the_processor_and_repeats(
    case: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    here, cpu = run(job_of(case, "cpu"), tmp_path / "cpu")
    there, gpu = run(job_of(case, "cuda"), tmp_path / "gpu")
    again, _ = run(job_of(case, "cuda"), tmp_path / "again")
    looped, _ = run(job_of(case, "cuda"), tmp_path / "loop", engine="loop")
    same = [other.model_sha256 == there.model_sha256 for other in (again, looped)]
    for name, value in {"apart": apart(cpu, gpu), "repeats": same[0], "loop agrees": same[1]}.items():
        record_property(name, value)
    assert "cuda" in there.machine["device"] and "cuda" not in here.machine["device"]
    assert apart(cpu, gpu) < 0.05  # a random network is chaotic; heads are near 1e-7
    assert all(same)


def apart(one: Tensors, other: Tensors) -> float:
    """How far two models are from each other, as a part of the size of one, over all tensors together."""
    difference = sum(float((one[n] - other[n]).square().sum()) for n in one)
    return float((difference / sum(float(t.square().sum()) for t in one.values())) ** 0.5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_near_full_precision(precision: str, tmp_path: Path) -> None:
    _, full = run(job_of("full", "cuda"), tmp_path / "full")
    _, low = run(job_of("full", "cuda", precision=precision, accumulate=2), tmp_path / "low")
    _, kept = run(job_of("full", "cuda", precision=precision, checkpoint_activations=True), tmp_path / "kept")
    assert 0 < apart(full, low) < 0.05
    assert 0 < apart(full, kept) < 0.05


def doubled(number: float) -> float:
    """In a worker process: twice the number, computed on the GPU."""
    return float((2 * torch.tensor(number, device="cuda")).cpu())


@pytest.mark.processes
def test_a_forked_worker_uses_the_gpu_that_its_parent_uses_too() -> None:
    assert float(torch.ones(3, device="cuda").sum()) == 3
    for _ in range(2):
        with worker_pool(1, int) as pool:
            assert pool.submit(doubled, 21.0).result() == 42


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
def test_workers_on_several_gpus_end_in_the_bits_of_one(tmp_path: Path) -> None:
    one, _ = run(job_of("full", "cuda:0"), tmp_path / "one")
    shared, _ = run(job_of("full", "cuda"), tmp_path / "shared", workers=torch.cuda.device_count())
    assert shared.model_sha256 == one.model_sha256
