"""Large updates in files: what is mapped, the same bits of every kind of run, what is left on the disk."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.errors import JobError
from atoll.job.job import Job
from atoll.privacy import clipping
from atoll.privacy.secagg import sum_of
from atoll.protocol import updates_on_disk
from atoll.protocol.messages import Failure, SecureMessage, Update
from atoll.protocol.stacked_updates import stacked
from atoll.protocol.tensors import Tensors, file_parts, from_bytes, tensors_sha256
from atoll.protocol.updates_on_disk import MappedTensors, all_kept_on_disk, kept_on_disk
from atoll.server.rounds.validation import validate_updates
from atoll.server.run.directory import RunDirectory
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.process_pool import PooledTransport, books_in
from atoll.sim.population.population import Population
from atoll.strategies import build_strategy, mean
from atoll.strategies.strategy import State
from atoll.system import durable_files
from tests.privacy.runs.test_private_runs import CLIENT, SEEDED, distributed, job
from tests.sim.test_simulation import Breaks, run
from tests.strategies.test_strategy_runs import of_eight
from tests.support.alignment import mapped_file, mapped_files
from tests.support.small import few_pictures, image_job


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small an update is, it goes to a file."""
    monkeypatch.setattr(updates_on_disk, "LEAST_BYTES", 0)


def mappings(folder: Path) -> list[Path]:
    """The files of a folder that are in this process's memory, as the system tells it."""
    return [file for _, _, file in mapped_files() if file.is_relative_to(folder)]


def is_mapped_from(folder: Path, tensor: torch.Tensor) -> bool:
    file = mapped_file(tensor)
    return file is not None and file.is_relative_to(folder)


def test_the_parts_are_a_file_that_safetensors_reads() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 2, (3, 4), generator=generator)
    tensors = {f"of.{code}": values.to(dtype) for code, dtype in safetensors.torch._TYPES.items()}
    tensors |= {"crossed": torch.rand(5, 3).T, "number": torch.tensor(2.5), "nothing": torch.empty(0, 3)}
    blob = b"".join(file_parts(tensors))
    found = from_bytes(blob)
    assert found.keys() == tensors.keys()
    assert tensors_sha256(found) == tensors_sha256(tensors)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert len(blob) == len(safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}))


def test_words_stand_beside_the_tensors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"".join(file_parts({"a": torch.ones(2)}, {"who": "größe"})))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"who": "größe"}


def test_a_part_is_the_tensors_own_memory() -> None:
    tensor = torch.rand(10, 10)
    _, part = file_parts({"a": tensor})
    assert np.frombuffer(part, np.uint8).ctypes.data == tensor.data_ptr()


def sent(numbers: int = 3 * 2**20, client: str = "a", **tensors: torch.Tensor) -> Update:
    generator = torch.Generator().manual_seed(len(client))
    delta = {"w": torch.randn(numbers, generator=generator), **tensors}
    states = {f"train_loss.{part}": torch.ones((), dtype=torch.float64) for part in ("sum", "count")}
    return Update(client, 1, delta, 5, states)


def test_a_large_update_is_mapped_from_a_file_that_has_no_name_any_more(tmp_path: Path) -> None:
    update = sent(b=torch.ones(3, 2, dtype=torch.float64))
    kept = kept_on_disk(update, tmp_path / "updates")
    assert tensors_sha256(kept.delta) == tensors_sha256(update.delta)
    assert [*kept.delta] == [*update.delta]
    assert (kept.client, kept.num_examples, kept.states) == ("a", 5, kept.states)
    assert all(is_mapped_from(tmp_path / "updates", tensor) for tensor in kept.delta.values())
    assert not any(is_mapped_from(tmp_path / "updates", tensor) for tensor in update.delta.values())
    assert not list((tmp_path / "updates").iterdir())
    assert (tmp_path / "updates").stat().st_mode & 0o077 == 0
    del kept
    gc.collect()
    assert not mappings(tmp_path / "updates")


def test_a_small_reply_stays_as_it_is(tmp_path: Path) -> None:
    small, failed = sent(numbers=100), Failure("a", "no")
    assert kept_on_disk(small, tmp_path / "updates") is small
    assert kept_on_disk(failed, tmp_path / "updates") is failed
    assert not (tmp_path / "updates").exists()


def test_what_is_mapped_is_not_written_again(tmp_path: Path) -> None:
    once = kept_on_disk(sent(), tmp_path)
    assert kept_on_disk(once, tmp_path) is once


def test_a_vector_of_a_secure_sum_is_mapped_too(tmp_path: Path) -> None:
    vector = torch.arange(2**21)
    kept = kept_on_disk(SecureMessage("a", 1, {"vector": vector}), tmp_path)
    assert torch.equal(kept.content["vector"], vector)
    assert is_mapped_from(tmp_path, kept.content["vector"])


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("name", ["__metadata__", "../w", "a/b", "a\0b", "\ud800", "x" * 5000, ""])
def test_a_tensors_name_may_be_anything(tmp_path: Path, name: str) -> None:
    update = Update("a", 1, {name: torch.ones(2)}, 1)
    assert kept_on_disk(update, tmp_path).delta.keys() == {name}
    assert not list(tmp_path.iterdir())


def test_no_reply_is_held_while_the_next_one_is_made(tmp_path: Path) -> None:
    held: list[int] = []

    def replies() -> Iterator[Update]:
        for client in "abc":
            gc.collect()
            held.append(sum(1 for one in gc.get_objects() if _is_whole(one)))
            yield sent(client=client)

    def _is_whole(one: Any) -> bool:
        return type(one) is dict and isinstance(one.get("w"), torch.Tensor)

    model = {"w": torch.zeros(3 * 2**20)}
    found = validate_updates(all_kept_on_disk(replies(), tmp_path), "abc", {"w": model.pop("w")}, 1)
    assert len(found.updates) == 3 and not found.set_aside
    assert len(set(held)) == 1


def test_a_cohort_that_trained_at_once_stays_one_stack(tmp_path: Path) -> None:
    stack = stacked([sent(client="a"), sent(client="b")])
    assert all_kept_on_disk(stack, tmp_path) is stack


class Created(TorchDispatchMode):
    """How many bytes each new tensor has that is made in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in _tensors([args, kwargs or {}])}
        new = [t for t in _tensors([made]) if t.untyped_storage().data_ptr() not in old]
        self.sizes += [t.untyped_storage().nbytes() for t in new]
        return made


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


NUMBERS = 100_000
BLOCK = 4096


@pytest.fixture
def three_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[Update]:
    """Updates of three clients on the disk, of which a block is little; blocks are done in this thread."""
    monkeypatch.setattr(updates_on_disk, "LEAST_BYTES", 0)
    monkeypatch.setattr(mean, "BLOCK", BLOCK)
    monkeypatch.setattr(mean, "_threads", lambda: SimpleNamespace(map=map))
    monkeypatch.setattr(clipping, "NUMBERS_PER_BLOCK", BLOCK)
    return [kept_on_disk(sent(NUMBERS, client), tmp_path) for client in ("a", "bb", "ccc")]


def test_a_merge_makes_the_next_model_and_no_other_copy(three_kept: Sequence[Update]) -> None:
    model = {"w": torch.zeros(NUMBERS)}
    with Created() as created:
        after = mean.moved_by_mean(model, three_kept, 1.0)
    expected = np.mean([update.delta["w"].numpy().astype(np.float64) for update in three_kept], axis=0)
    assert np.allclose(after["w"].numpy(), expected, rtol=1e-6, atol=1e-7)
    large = [size for size in created.sizes if size > 8 * BLOCK]
    assert large == [4 * NUMBERS]


def test_looking_at_values_copies_none(three_kept: Sequence[Update]) -> None:
    names = [update.client for update in three_kept]
    model = {"w": torch.zeros(NUMBERS)}
    with Created() as created:
        found = validate_updates(three_kept, names, model, 1)
    assert not found.set_aside and max(created.sizes) <= 8


def test_clipping_makes_the_sum_and_copies_of_blocks(three_kept: Sequence[Update]) -> None:
    with Created() as created:
        total, norms = clipping.clipped_sum(three_kept, clipping_norm=10.0)
    rows = np.stack([update.delta["w"].numpy().astype(np.float64) for update in three_kept])
    expected = np.linalg.norm(rows, axis=1)
    assert np.allclose(norms.numpy(), expected, rtol=1e-12)
    assert np.allclose(total.numpy(), (rows * (10.0 / expected)[:, None]).sum(0), rtol=1e-9, atol=1e-12)
    assert [size for size in created.sizes if size > 8 * BLOCK] == [8 * NUMBERS]


def test_updates_that_lie_apart_are_clipped_to_the_bits_of_their_stack(monkeypatch: Any) -> None:
    monkeypatch.setattr(clipping, "NUMBERS_PER_BLOCK", 1000)
    updates = [sent(5000, client, c=torch.full((), float(len(client)))) for client in ("a", "bb", "ccc")]
    updates[1].delta["w"][7] = torch.nan
    (apart, own), (whole, same) = (
        clipping.clipped_sum(form, clipping_norm=30.0) for form in (updates, stacked(updates))
    )
    assert torch.equal(own, same) and float(own[1]) == 0.0
    assert torch.equal(apart, whole) and apart.shape == (5001,)
    scale = (30.0 / own).clamp_max(1.0)
    assert float(apart[0]) == pytest.approx(float(1 * scale[0] + 3 * scale[2]))


def test_a_sum_of_vectors_wraps_and_leaves_them_as_they_are() -> None:
    vectors = [np.random.default_rng(seed).integers(0, 2**64, 50, dtype=np.uint64) for seed in range(4)]
    before = [vector.copy() for vector in vectors]
    expected = [sum(map(int, column)) % 2**64 for column in zip(*vectors, strict=True)]
    assert sum_of(vectors).tolist() == expected
    assert all(np.array_equal(vector, was) for vector, was in zip(vectors, before, strict=True))


class Looks:
    """The job's own strategy, which notes at each merge whether all that it is given is mapped."""

    def __init__(self, setting: Job) -> None:
        self.inner = build_strategy(setting.strategy, setting.federation, setting.train)
        self.mapped: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        self.mapped.append(all(isinstance(update.delta, MappedTensors) for update in updates))
        return self.inner.merge(model, updates, state)


KINDS: dict[str, Job] = {
    "plain": of_eight("fedavg"),
    "compressed": job({"unit": "none"}, federation={"compression": "int8", "error_feedback": True}),
    "robust": of_eight("krum"),
    "median": of_eight("coordinate-median"),
    "two sets of tensors": of_eight("scaffold"),
    "fedbuff": of_eight("fedbuff", federation={"cohort": 3, "concurrency": 5}),
    "clipped": job(CLIENT | SEEDED),
    "secure sum": distributed("nobody"),
}
MAPPED_AT_MERGE = KINDS.keys() - {"clipped", "secure sum"}
"""The others merge a sum, which is no update."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_through_files_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    setting = KINDS[kind]
    whole = run(setting, tmp_path / "whole", engine="loop")
    monkeypatch.setattr(updates_on_disk, "LEAST_BYTES", 0)
    looks: Any = Looks(setting)
    kept = run(setting, tmp_path / "kept", engine="loop", strategy=looks)
    assert [line["model_sha256"] for line in kept.rounds] == [line["model_sha256"] for line in whole.rounds]
    assert kept.model_sha256 == whole.model_sha256
    assert looks.mapped == [kind in MAPPED_AT_MERGE] * len(looks.mapped) and looks.mapped
    gc.collect()
    assert not (tmp_path / "kept" / "updates").exists() and not mappings(tmp_path / "kept" / "updates")


@pytest.mark.usefixtures("everything_is_large")
def test_what_a_killed_run_left_goes_when_it_is_resumed(tmp_path: Path) -> None:
    setting = KINDS["plain"]
    whole = run(setting, tmp_path / "whole").model_sha256
    population, (_, memory) = Population.of(setting), books_in(tmp_path / "r")
    stopped = Breaks.of(population, memory=memory)
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, stopped, tmp_path / "r", cached_test_set(population, None))
    left = tmp_path / "r" / "updates" / "half.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"x")
    with RunDirectory.open(tmp_path / "r", setting, resume=True, force=False) as directory:
        assert left.exists()
        directory.commit()
        assert not left.parent.exists()
    assert run(setting, tmp_path / "r", engine="loop", resume=True).model_sha256 == whole


class FullForUpdates:
    """The module `os`, on a disk that has no room for updates."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, handle: int, content: memoryview) -> int:
        if "/updates/" in os.readlink(f"/proc/self/fd/{handle}"):  # noqa: PTH115
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, content)


@pytest.mark.usefixtures("everything_is_large")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_files, "os", FullForUpdates())
    with pytest.raises(JobError, match=r"/updates/\w+\.safetensors: .*\(No space left on device\).*--resume"):
        run(KINDS["plain"], tmp_path / "run", engine="loop")
    assert not (tmp_path / "run" / "updates").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_workers_write_their_updates_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = image_job(
        "squeezenet1_1",
        data=few_pictures(18),
        tune={"method": "full"},
        federation={"clients": 3, "rounds": 2},
    )
    whole = run(setting, tmp_path / "whole").model_sha256
    monkeypatch.setattr(updates_on_disk, "LEAST_BYTES", 0)
    looks: Any = Looks(setting)
    population = Population.of(setting)
    with PooledTransport(population, 2, tmp_path / "run") as carrier:
        result = run_job(setting, carrier, tmp_path / "run", population.test_shard, strategy=looks)
        assert [board.layout.slots for board in carrier._board] == [1]  # of the model alone
    assert result.model_sha256 == whole
    assert looks.mapped == [True, True] and not (tmp_path / "run" / "updates").exists()
