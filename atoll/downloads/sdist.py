"""Source distributions, found and downloaded where pip would look, with nothing of them run.

pip runs an sdist's build script even to download it, to learn its metadata. unearth, which is pip's own
finder as a library, asks the same indexes and builds nothing.
"""

from __future__ import annotations

import ast
import logging
import re
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx2
from unearth import PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.errors import UnpackError
from unearth.fetchers.sync import PyPIClient

_PATIENCE_SECONDS = 60
_SCOPES = ("global", "download", ":env:")
"""Parts of pip's configuration, the one that counts most last."""


class NotFetchedError(Exception):
    """Why an sdist could not be had, in one line."""


def download_sdist(project: str, version: str, folder: Path) -> Path:
    """The file, in `folder` or where pip's `find-links` has it; whoever opens it checks its hash first.

    Of pip's configuration these count: index-url, extra-index-url, no-index, find-links, trusted-host,
    proxy, cert and client-cert. Without an index-url the index is the one that pip takes, too.

    Raises:
        NotFetchedError: there is none, or no way to it.
    """
    # That one of several indexes lacks a project is no news.
    logging.getLogger("unearth").setLevel(logging.ERROR)
    settings = pip_settings()
    try:
        with _client(settings) as client:
            finder = _finder(settings, client)
            for candidate in finder.find_matches(f"{project}=={version}"):
                return _whole(finder.download(candidate.link, folder, hashes={}))
    except (httpx2.HTTPError, httpx2.InvalidURL, UnpackError, OSError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise NotFetchedError(f"its sdist could not be downloaded: {why}") from None
    raise NotFetchedError("no sdist of that version was found where pip is configured to look")


def _whole(path: Path) -> Path:
    if not path.is_file():
        raise NotFetchedError(f"{path} is no file, expected an sdist")
    return path


def pip_settings() -> dict[str, str]:
    """pip's options as its configuration files and `PIP_…` variables set them, by their long names."""
    command = [sys.executable, "-m", "pip", "config", "list", "--no-input"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        why = f"pip took more than {_PATIENCE_SECONDS} seconds to tell its configuration"
        raise NotFetchedError(why) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise NotFetchedError(f"pip could not tell its configuration: {last}")
    lines = re.findall(r"^(global|download|:env:)\.([\w-]+)=(['\"].*)$", done.stdout, re.MULTILINE)
    lines.sort(key=lambda line: _SCOPES.index(line[0]))
    return {option: ast.literal_eval(value) for _, option, value in lines}


def _client(settings: Mapping[str, str]) -> PyPIClient:
    verify: ssl.SSLContext | bool = True
    if settings.keys() & {"cert", "client-cert"}:
        verify = ssl.create_default_context(cafile=settings.get("cert"))
        if "client-cert" in settings:
            verify.load_cert_chain(settings["client-cert"])
    indexes = f"{settings.get('index-url', '')} {settings.get('extra-index-url', '')}".split()
    return PyPIClient(
        trusted_hosts=settings.get("trusted-host", "").split(),
        verify=verify,
        proxy=settings.get("proxy"),
        auth=MultiDomainBasicAuth(prompting=False, index_urls=indexes),
        timeout=_PATIENCE_SECONDS,
        follow_redirects=True,
    )


def _finder(settings: Mapping[str, str], client: PyPIClient) -> PackageFinder:
    # Without an index it takes the public one, as pip does.
    finder = PackageFinder(
        client,  # type: ignore[arg-type]  # unearth's own client is not quite what it declares
        index_urls=settings.get("index-url", "").split(),
        trusted_hosts=settings.get("trusted-host", "").split(),
        no_binary=[":all:"],
        ignore_compatibility=True,
    )
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on", "t", "y"):
        finder.sources.clear()
    else:
        for url in settings.get("extra-index-url", "").split():
            finder.add_index_url(url)
    for place in settings.get("find-links", "").split():
        if "://" in place or Path(place).exists():
            finder.add_find_links(place)
    return finder
