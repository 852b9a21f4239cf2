"""The cache of features: what is put is found again, whoever shares, kills or damages the folder."""

import hashlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.backbones.resolve import resolve
from atoll.errors import InputError
from atoll.learning import feature_cache
from atoll.learning.feature_cache import MAX_SMALL_PARTS, FeatureCache
from atoll.learning.features import plain_view, processor
from tests.support.processes import python
from tests.support.small import image_job

WIDTH = 5


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def features(*numbers: int) -> torch.Tensor:
    """A row a number that tells which number it is of."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None] + torch.arange(WIDTH) / 8


def fill(cache: FeatureCache, *numbers: int) -> None:
    cache.put([key(n) for n in numbers], features(*numbers))


def parts(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if not file.name.startswith(".")]


def cached(folder: Path, *numbers: int) -> torch.Tensor:
    """What a new process would find."""
    cache = FeatureCache(folder)
    assert cache.missing([key(n) for n in numbers]) == []
    return cache.take([key(n) for n in numbers])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sets(st.integers(0, 30), max_size=20))
def test_the_first_of_equal_keys_is_missing_unless_it_is_there(asked: list[int], known: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder))
        if known:
            fill(cache, *sorted(known))
        expected = [p for p, n in enumerate(asked) if n not in known and n not in asked[:p]]
        assert cache.missing([key(n) for n in asked]) == expected
        rest = [asked[place] for place in expected]
        if rest:
            fill(cache, *rest)
        assert torch.equal(cache.take([key(n) for n in asked]), features(*asked))
        assert torch.equal(cached(Path(folder), *asked), features(*asked))


def test_keys_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    keys = [b"\1" + bytes(31), b"\1" + bytes(30) + b"\1", bytes(32), b"\1\1" + bytes(30)]
    cache = FeatureCache(tmp_path)
    cache.put(keys[:2], features(0, 1))
    assert cache.missing(keys) == [2, 3]
    cache.put(keys[2:], features(2, 3))
    assert torch.equal(cache.take(keys), features(0, 1, 2, 3))


def test_a_key_that_is_not_there_is_no_row_of_another(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    fill(cache, 1, 2, 3)
    with pytest.raises(KeyError, match=key(4).hex()):
        cache.take([key(2), key(4)])


def test_what_another_process_adds_is_found(tmp_path: Path) -> None:
    one, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    fill(one, 1, 2)
    assert other.missing([key(2), key(3)]) == [1]
    fill(other, 3)
    assert one.missing([key(1), key(2), key(3)]) == []
    assert torch.equal(one.take([key(3), key(1)]), features(3, 1))


@pytest.mark.processes
def test_a_cache_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    rows = 20_000
    cache = FeatureCache(tmp_path)
    cache.put([key(n) for n in range(rows)], torch.zeros(rows, 1000))  # 80 MB
    script = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from atoll.learning.feature_cache import FeatureCache\n"
        "def held(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "cache, key = FeatureCache(Path(sys.argv[1])), hashlib.sha256(b'77').digest()\n"
        "before = held()\n"
        "assert cache.missing([key]) == [] and len(cache.take([key])) == 1\n"
        "print(held() - before)\n"
    )
    # A Python of its own, for one that was forked gets pages of its parent's as it touches them.
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=True)
    assert int(done.stdout) < 20e6


def test_many_small_parts_become_few_and_nothing_is_lost(tmp_path: Path) -> None:
    cache, reader = FeatureCache(tmp_path), FeatureCache(tmp_path)
    for number in range(MAX_SMALL_PARTS):
        fill(cache, number, number + 1000)
    assert reader.missing([key(0)]) == []
    assert len(parts(tmp_path)) == MAX_SMALL_PARTS
    fill(cache, 5000)
    assert len(parts(tmp_path)) == 1
    numbers = [*range(MAX_SMALL_PARTS), *range(1000, 1000 + MAX_SMALL_PARTS), 5000]
    for each in (cache, FeatureCache(tmp_path)):
        assert each.missing([key(n) for n in numbers]) == []
        assert torch.equal(each.take([key(n) for n in numbers]), features(*numbers))
    assert torch.equal(reader.take([key(0)]), features(0)), "what was mapped stays readable"
    assert reader.missing([key(n) for n in numbers]) == []


def test_a_large_part_is_left_alone_when_small_ones_are_merged(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    fill(cache, *range(10_000, 11_000))
    (large,) = parts(tmp_path)
    for number in range(3 * MAX_SMALL_PARTS):
        fill(cache, number)
    assert large in parts(tmp_path)
    assert len(parts(tmp_path)) <= MAX_SMALL_PARTS + 1
    everything = [*range(3 * MAX_SMALL_PARTS), *range(10_000, 11_000)]
    assert torch.equal(cached(tmp_path, *everything), features(*everything))


def test_a_merge_writes_parts_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SMALL_PART_BYTES", 10 * WIDTH * 4)
    cache = FeatureCache(tmp_path)
    for number in range(MAX_SMALL_PARTS + 1):
        fill(cache, number)
    assert len(parts(tmp_path)) == 4  # 33 rows, 10 a part
    assert torch.equal(cached(tmp_path, *range(MAX_SMALL_PARTS + 1)), features(*range(MAX_SMALL_PARTS + 1)))


def test_a_merge_that_was_killed_before_it_removed_anything_is_done_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for number in range(MAX_SMALL_PARTS):
        fill(cache, number)
    left_over = {file: file.read_bytes() for file in parts(tmp_path)}
    fill(cache, MAX_SMALL_PARTS)
    for file, content in left_over.items():
        file.write_bytes(content)
    assert torch.equal(cached(tmp_path, *range(MAX_SMALL_PARTS + 1)), features(*range(MAX_SMALL_PARTS + 1)))
    assert len(parts(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other tensors", "zeros"])
def test_a_damaged_part_is_removed_with_a_warning_and_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path)
    fill(cache, 1)
    fill(cache, 2, 3)
    file = parts(tmp_path)[0]
    whole = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(whole[:-7])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("no features here, but more than eight bytes")
        case "other tensors":
            file.unlink()
            save_file({"keys": torch.zeros(3, 32), "features": torch.zeros(2, WIDTH)}, file)
        case "zeros":
            file.write_bytes(bytes(len(whole)))
    again = FeatureCache(tmp_path)
    missing = again.missing([key(1), key(2), key(3)])
    assert missing in ([0], [1, 2])
    assert not file.exists()
    assert [r.message.split(": ")[:2] for r in caplog.records] == [
        [str(file), "damaged, its features are computed again"]
    ]
    fill(again, *[(1, 2, 3)[place] for place in missing])
    assert torch.equal(cached(tmp_path, 1, 2, 3), features(1, 2, 3))


def test_a_file_that_vanishes_between_listing_and_opening_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(FeatureCache(tmp_path), 1)
    fill(FeatureCache(tmp_path), 2)
    reader, merged = FeatureCache(tmp_path), []
    opened = feature_cache.Part.open

    def merge_meanwhile(file: Path, name: str) -> feature_cache.Part:
        if not merged:
            merged.append(name)
            fill(FeatureCache(tmp_path), 1, 2)
            file.unlink()
        return opened(file, name)

    monkeypatch.setattr(feature_cache.Part, "open", merge_meanwhile)
    assert reader.missing([key(1), key(2)]) == []
    assert torch.equal(reader.take([key(1), key(2)]), features(1, 2))


def test_a_folder_that_cannot_be_written_is_answered_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"features cannot be kept: .*expected room in a writable") as caught:
        fill(FeatureCache(tmp_path / "file" / "cache"), 1)
    assert "\n" not in str(caught.value)


WRITER = """
import hashlib, sys
from pathlib import Path
import torch
from atoll.learning.feature_cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 10**6):
    row = torch.full((1, 5), float(number)) + torch.arange(5) / 8
    cache.put([hashlib.sha256(str(number).encode()).digest()], row)
    print(number, flush=True)
"""


@pytest.mark.processes
def test_writers_killed_at_any_instant_lose_nothing_that_they_had_put(tmp_path: Path) -> None:
    writers = [python(WRITER, tmp_path, start) for start in (0, 100_000, 200_000)]
    put = []
    for writer, count in zip(writers, (90, 150, 201), strict=True):
        assert writer.stdout is not None
        put += [int(writer.stdout.readline()) for _ in range(count)]
        os.kill(writer.pid, signal.SIGKILL)
    for writer in writers:
        writer.wait()
        assert writer.stdout is not None
        put += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.stdout.close()
    assert torch.equal(cached(tmp_path, *put), features(*put))
    assert len(parts(tmp_path)) <= MAX_SMALL_PARTS


def test_features_of_another_device_are_kept_apart() -> None:
    job = image_job("squeezenet1_1")
    elsewhere = job.model_copy(update={"train": job.train.model_copy(update={"device": "meta"})})
    backbone = resolve(job.backbone, job.seed)
    here, there = (plain_view(each, backbone).cache.folder for each in (job, elsewhere))
    assert here != there
    assert processor("cpu") == [platform.machine(), torch.backends.cpu.get_cpu_capability()]
