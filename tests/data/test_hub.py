"""Data sets of the Hub, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import constants

from atoll.data.diagnostics import Counts
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.toml import apply_override
from atoll.server.run.test_set import read_source

COMMIT = hashlib.sha1(b"one").hexdigest()
FILES = {
    split: "".join(
        json.dumps({"text": f"{split} {n} {'good' if n % 2 else 'bad'}", "label": "np"[n % 2]}) + "\n"
        for n in range(count)
    ).encode()
    for split, count in (("train", 60), ("test", 20), ("validation", 10))
}
REPO = {f"data/{split}.jsonl": data for split, data in FILES.items()}
SEVERAL = (
    "---\nconfigs:\n"
    + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{name}.jsonl\n"
        for name in ("train", "validation")
    )
    + "---\n"
)
REPOS = {"people/reviews": REPO, "people/several": REPO | {"README.md": SEVERAL.encode()}}
JOB = """
name = "hub"
seed = 3
task = { name = "text-classification" }
data = { source = "hf:people/reviews" }
backbone = { name = "atoll:text-tiny", weights = "random" }
federation = { clients = 3, rounds = 1 }
"""


class Hub(BaseHTTPRequestHandler):
    """What the Hub's libraries ask of it, for data sets of `REPOS` at one commit."""

    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    def answer(self, status: int, data: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def handle_one(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        Hub.asked.append(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        called = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
        if not called or called[1] not in REPOS:
            return self.refuse("RepoNotFound")
        files, what, revision, rest = REPOS[called[1]], called[2], called[3], called[4] or ""
        if revision not in (None, "main", COMMIT):
            return self.refuse("RevisionNotFound")
        if what in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": called[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self.answer(200, json.dumps(about | {"downloads": 0, "gated": False}).encode())
        if what == "resolve":
            if rest not in files:
                return self.refuse("EntryNotFound")
            etag = hashlib.sha1(files[rest]).hexdigest()
            return self.answer(
                200, files[rest], "application/octet-stream", ETag=f'"{etag}"', X_Repo_Commit=COMMIT
            )
        paths = below(files, rest) if what == "tree" else parse_qs(body.decode()).get("paths", [])
        if what == "tree" and query.get("recursive") != ["true"]:
            paths = [path for path in paths if path.count("/") == (rest.count("/") + 1 if rest else 0)]
        return self.answer(200, json.dumps([entry(files, path) for path in paths if path]).encode())

    do_GET = do_HEAD = do_POST = handle_one


def below(files: dict[str, bytes], folder: str) -> list[str]:
    """All files and folders in a folder of a repository, at any depth."""
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
    return sorted(path for path in {*files, *folders} if not folder or path.startswith(f"{folder}/"))


def entry(files: dict[str, bytes], path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    if path not in files:
        return {"type": "directory", "path": path, "oid": oid}
    return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of the Hub."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{hub.server_address[1]}"
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's libraries as they are where `HF_ENDPOINT` names this server, with empty caches."""
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for room in (constants, datasets.config):
        monkeypatch.setattr(room, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", f"{server}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    )
    Hub.asked.clear()


def job(*settings: str) -> Job:
    table = tomllib.loads(JOB)
    for setting in settings:
        apply_override(table, setting)
    return Job.parse(table, origin="job.toml")


def test_a_data_set_is_fetched_once_at_one_commit_and_never_asked_for_again(hub: None) -> None:
    with pytest.raises(
        ConfigError, match=r"hf:people/reviews is not in the cache .* backbone\.offline forbids"
    ):
        read_source(job("backbone.offline=true"))
    assert not Hub.asked
    table = read_source(job())
    assert table.test is not None
    for part, split in ((table.train, "train"), (table.test, "test")):
        lines = [json.loads(line) for line in FILES[split].splitlines()]
        assert [part[name][:] for name in ("text", "label")] == [
            [line[n] for line in lines] for n in ("text", "label")
        ]
    assert table.counts[0] == Counts("examples", 90, 80, {"of other splits than train and test": 10})
    assert any(f"hf:people/reviews is that of commit {COMMIT[:12]}" in note for note in table.notes)
    Hub.asked.clear()
    again = read_source(job("backbone.offline=true"))
    assert again.train["text"][:] == table.train["text"][:] and not Hub.asked
    assert read_source(job("data.revision=main")).train["text"][:] == table.train["text"][:] and Hub.asked


def test_a_configuration_is_chosen_by_its_name(hub: None) -> None:
    table = read_source(job("data.source=hf:people/several", "data.subset=validation"))
    assert len(table.train) == 10 and table.test is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.source=hf:people/nothing"], r"data\.source: the Hub has no data set people/nothing that can"),
        (["data.revision=v2"], r"data\.revision: hf:people/reviews has no revision 'v2', expected a branch"),
        (["data.source=hf:people/several"], r"data\.subset: hf:people/several: .*'train', 'validation'"),
        (
            ["data.source=hf:people/several", "data.subset=x"],
            r"data\.subset: hf:people/several: .*validation",
        ),
        (["data.source=digits", "data.subset=x"], r"subset: is of a data set on the Hub; expected none with"),
        (["data.source=hf:a/b/c"], r"source: expected hf:OWNER/NAME, found 'hf:a/b/c'"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    hub: None, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_source(job(*settings))
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.glob("cache/hub/*") if path.is_dir()]


def test_a_hub_that_cannot_be_reached_is_one_line(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(
            ConfigError, match=r"data\.source: hf:people/reviews can't be fetched: "
        ) as caught:
            read_source(job())
    assert "\n" not in str(caught.value)
