"""Tensors that were read begin where torch's own do: MKL's sums have other bits elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.trainable import trainable
from atoll.protocol.tensors import (
    ALIGNMENT,
    Tensors,
    aligned,
    from_bytes,
    mapped_file_parts,
    tensors_sha256,
    to_bytes,
)
from atoll.protocol.updates_on_disk import taken, written
from atoll.server.run.checkpoint import Checkpoint, latest, save
from atoll.strategies.fedavg import FedAvg
from atoll.strategies.strategy import State
from atoll.tasks import task_named
from tests.client.state.test_personal import stopped_and_resumed
from tests.repository.golden import jobs
from tests.sim.test_simulation import run
from tests.strategies.test_moon import network
from tests.support.alignment import WatchesProducts, mapped_file
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

SIZES = (1, 3, 16, 17, 33)


def of_odd_sizes() -> Tensors:
    """Of several types and sizes, so that one after the other few begin at a multiple of 64 bytes."""
    kinds = (torch.float32, torch.float64, torch.uint8, torch.bfloat16)
    return {
        f"{size}.{number}": torch.arange(size * 3).reshape(size, 3).to(kind)
        for size in SIZES
        for number, kind in enumerate(kinds)
    } | {"empty": torch.empty(0, 4)}


def as_message(tensors: Tensors, folder: Path) -> Tensors:
    return from_bytes(to_bytes(tensors))


def as_mapped_file(tensors: Tensors, folder: Path) -> Tensors:
    return taken(written(tensors, folder))


def as_state(tensors: Tensors, folder: Path) -> Tensors:
    ClientStateStore(folder).save("run", 1, {"client": tensors})
    return ClientStateStore(folder).load_before("run", "client", 2)


def as_checkpoint(tensors: Tensors, folder: Path) -> Tensors:
    folder.mkdir(exist_ok=True)
    save(folder, Checkpoint(1, "job", tensors, {}, 0, 0, {}))
    found = latest(folder, "job")
    assert found is not None
    return found.tensors


@pytest.mark.parametrize("read", [as_message, as_mapped_file, as_state, as_checkpoint])
def test_what_is_read_is_what_was_written_and_begins_where_torchs_own_tensors_do(
    tmp_path: Path, read: Callable[[Tensors, Path], Tensors]
) -> None:
    tensors = of_odd_sizes()
    found = read(tensors, tmp_path / "folder")
    assert tensors_sha256(found) == tensors_sha256(tensors)
    assert {name: tensor.data_ptr() % ALIGNMENT for name, tensor in found.items()} == dict.fromkeys(found, 0)


def test_a_state_in_memory_lies_where_it_would_after_a_restart() -> None:
    """It may be a part of what clients had together."""
    store, part = ClientStateStore(), torch.arange(40.0)[3:]
    store.save("run", 1, {"client": {"a": part}})
    found = store.load_before("run", "client", 2)
    assert torch.equal(found["a"], part) and found["a"].data_ptr() % ALIGNMENT == 0


def test_a_strategys_state_lies_where_it_would_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    merge = FedAvg.merge

    def with_a_part(self: FedAvg, model: Tensors, updates: Any, state: State) -> tuple[Tensors, State]:
        found.append(state.get("part"))
        after, _ = merge(self, model, updates, state)
        return after, {"part": torch.arange(40.0)[3:]}

    monkeypatch.setattr(FedAvg, "merge", with_a_part)
    run(network({"name": "fedavg"}), tmp_path / "run")
    assert found[0] is None and len(found) == 3
    assert all(torch.equal(part, torch.arange(3.0, 40.0)) for part in found[1:])
    assert [part.data_ptr() % ALIGNMENT for part in found[1:]] == [0, 0]


def test_a_mapped_file_is_safetensors_with_bytes_between_the_tensors() -> None:
    tensors = of_odd_sizes()
    blob = b"".join(mapped_file_parts(tensors))
    found = load(blob)
    assert tensors_sha256({name: found[name] for name in tensors}) == tensors_sha256(tensors)
    assert {name for name in found if name not in tensors} <= {f"after {name}" for name in tensors}
    assert len(blob) % ALIGNMENT == 0


def test_only_what_begins_elsewhere_is_copied() -> None:
    whole = torch.arange(40.0)
    assert aligned(whole) is whole
    part = whole[3:]
    found = aligned(part)
    assert torch.equal(found, part) and found.data_ptr() % ALIGNMENT == 0
    assert whole[3:].data_ptr() == part.data_ptr()
    on_meta = torch.empty(3, device="meta")
    assert aligned(on_meta) is on_meta


@pytest.mark.parametrize("method", ["last-k", "full", "lora"])
def test_what_is_tuned_of_a_mapped_network_lies_as_its_copies_do_and_the_rest_stays_mapped(
    tmp_path: Path, method: str
) -> None:
    """One copy of what is frozen, for all processes of a machine."""
    tuned = ready(job_of("text-classification", method), tmp_path / "data")
    model = Learner.of(tuned, task_named("text-classification"), {"classes": ["good", "bad"]}).model
    mapped = {n: p for n, p in model.named_parameters() if mapped_file(p) is not None}
    assert not [name for name, p in trainable(model).items() if p.data_ptr() % ALIGNMENT]
    assert mapped.keys() == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert any(p.data_ptr() % ALIGNMENT for p in mapped.values()) == (method != "full")


def test_the_watch_sees_a_product_of_memory_from_elsewhere(tmp_path: Path) -> None:
    buffer = bytearray(4 * 70)
    begin = (8 - torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()) % ALIGNMENT
    values = torch.frombuffer(buffer, dtype=torch.float32, count=32, offset=begin)
    own = torch.ones(33)[1:]
    with WatchesProducts(tmp_path) as watch:
        torch.dot(own, own)
        torch.dot(own, values)
    assert (watch.products, watch.found) == (2, [("dot", 1, (32,))])
    save_file({"a": torch.ones(1), "values": torch.ones(32)}, tmp_path / "a file")
    with safe_open(tmp_path / "a file", "pt") as file:
        values = file.get_tensor("values")
    for folder, places in ((tmp_path, [1]), (tmp_path / "run", [])):
        with WatchesProducts(folder) as watch:
            torch.dot(own, torch.ones(32)) + torch.dot(own, values)
        assert [place for _, place, _ in watch.found] == places


def test_a_resumed_run_of_moon_computes_with_no_memory_from_elsewhere(tmp_path: Path) -> None:
    """Its clients' last models come from their files; on one processor its bits were others for that."""
    with WatchesProducts(tmp_path / "run") as watch:
        stopped_and_resumed(network(), tmp_path / "run")
    assert watch.products > 100 and watch.found == []


QUICK = ("digits-strategy-flwr:FedYogi", "digits-personal-mixture")
"""A strategy of another library's arrays, and clients' states."""


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [pytest.param(*job, id=job[0], marks=[] if job[0] in QUICK else pytest.mark.matrix) for job in jobs()],
)
def test_no_job_computes_with_memory_from_elsewhere(
    name: str, make: Callable[[Path], Job], options: dict[str, Any], tmp_path: Path
) -> None:
    with WatchesProducts(tmp_path / "run") as watch:
        run(make(tmp_path), tmp_path / "run", **options)
    assert watch.products and watch.found == []
