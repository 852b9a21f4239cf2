"""Tensors that were read begin where torch's own do: MKL's sums have other bits elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from atoll.backbones.resolve import resolve
from atoll.backbones.text import load_text_encoder
from atoll.client.state.store import ClientStateStore
from atoll.job.job import BackboneSection, Job
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
from tests.backbones.test_backbones import tiny_bert
from tests.client.state.test_personal import stopped_and_resumed
from tests.repository.golden import jobs
from tests.sim.test_simulation import run
from tests.strategies.test_moon import network
from tests.support.alignment import WatchesProducts, lies_elsewhere

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


def test_a_network_that_transformers_maps_from_a_file_computes_as_its_copy(tmp_path: Path) -> None:
    section = BackboneSection(name=str(tiny_bert(tmp_path / "bert")), max_tokens=16)
    with safe_open(tmp_path / "bert" / "model.safetensors", "pt") as file:
        mapped = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert any(map(lies_elsewhere, mapped)), "the file would show nothing"
    network = load_text_encoder(resolve(section, 1), section, 1).model
    tensors = [*network.parameters(), *network.buffers()]
    assert not [t.shape for t in tensors if t.data_ptr() % ALIGNMENT]
    saved = load_file(tmp_path / "bert" / "model.safetensors")
    assert all(torch.equal(t, saved[n]) for n, t in network.state_dict().items() if n in saved)


def test_the_watch_sees_a_product_of_memory_from_elsewhere() -> None:
    buffer = bytearray(4 * 70)
    begin = (8 - torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()) % ALIGNMENT
    values = torch.frombuffer(buffer, dtype=torch.float32, count=32, offset=begin)
    own = torch.ones(33)[1:]
    with WatchesProducts() as watch:
        torch.dot(own, own)
        torch.dot(own, values)
    assert (watch.products, watch.found) == (2, [("dot", 1, (32,))])


def test_a_resumed_run_of_moon_computes_with_no_memory_from_elsewhere(tmp_path: Path) -> None:
    """Its clients' last models come from their files; on one processor its bits were others for that."""
    with WatchesProducts() as watch:
        stopped_and_resumed(network(), tmp_path / "run")
    assert watch.products > 100 and watch.found == []


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "make", "options"), [pytest.param(*job, id=job[0]) for job in jobs()])
def test_no_job_computes_with_memory_from_elsewhere(
    name: str, make: Callable[[Path], Job], options: dict[str, Any], tmp_path: Path
) -> None:
    with WatchesProducts() as watch:
        run(make(tmp_path), tmp_path / "run", **options)
    assert watch.products and watch.found == []
