"""Certificates, keys and secrets that are damaged, expired or mixed up: named before anything starts."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from atoll.errors import ConfigError
from atoll.kit.credentials import check_server, check_site, utc_now
from atoll.kit.kit import ServerKit, SiteKit
from atoll.server.deploy.certificates import SERVER_DAYS
from atoll.server.deploy.provision import provision
from tests.kit.test_provision import GOOD, written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    for name in ("kits", "others"):
        provision(written(folder, GOOD), folder / name)
    return folder


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy") / "kits"


def server(kits: Path) -> ServerKit:
    return ServerKit.load(kits / "server")


def site(kits: Path) -> SiteKit:
    return SiteKit.load(kits / "north")


def test_kits_as_they_are_made_have_nothing_to_remark(kits: Path) -> None:
    assert check_server(server(kits)) == check_site(site(kits)) == []


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\0" * 90]
)
@pytest.mark.parametrize(
    "file", ["ca.crt", "server.crt", "server.key", "superexec.secret", "nodes/north.pub"]
)
def test_a_damaged_file_of_the_server_is_named(kits: Path, file: str, content: bytes) -> None:
    (kits / "server" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"server/{file}: .*expected"):
        check_server(server(kits))


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\0" * 90])
@pytest.mark.parametrize("file", ["ca.crt", "node.key", "superexec.secret"])
def test_a_damaged_file_of_a_site_is_named(kits: Path, file: str, content: bytes) -> None:
    (kits / "north" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"north/{file}: .*expected"):
        check_site(site(kits))


def test_a_file_of_another_federation_is_named(made: Path, kits: Path) -> None:
    for file, said in (("server.key", "is not the key of server.crt"), ("ca.crt", "is not signed by ca.crt")):
        before = (kits / "server" / file).read_bytes()
        shutil.copy(made / "others" / "server" / file, kits / "server" / file)
        with pytest.raises(ConfigError, match=said):
            check_server(server(kits))
        (kits / "server" / file).write_bytes(before)


def test_what_expires_is_announced_thirty_days_ahead_and_refused_afterwards(kits: Path) -> None:
    end = x509.load_pem_x509_certificate(server(kits).certificate.read_bytes()).not_valid_after_utc
    assert timedelta(days=SERVER_DAYS - 1) < end - utc_now() <= timedelta(days=SERVER_DAYS)
    assert check_server(server(kits), lambda: end - timedelta(days=31)) == []
    [line] = check_server(server(kits), lambda: end - timedelta(days=29, hours=1))
    assert f"server.crt: expires on {end:%Y-%m-%d}, in 29 days" in line
    with pytest.raises(ConfigError, match=rf"server\.crt: expired on {end:%Y-%m-%d}; .*--renew"):
        check_server(server(kits), lambda: end + timedelta(seconds=1))


def test_a_clock_that_is_far_behind_is_named(kits: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.crt: valid from .* this machine's clock says 2001-01-01"):
        check_site(site(kits), lambda: utc_now().replace(year=2001, month=1, day=1))
