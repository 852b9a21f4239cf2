"""A certificate that is renewed while a server runs: real handshakes in memory, and a real proxy."""

from __future__ import annotations

import shutil
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from uvicorn import config as uvicorn_config

from atoll.kit.kit import ServerKit
from atoll.server.deploy import serve
from atoll.server.deploy.provision import provision, update
from atoll.server.deploy.renewal import follow_certificates, following
from atoll.server.deploy.reverse_proxy import ReverseProxy, listen

SITES = """
[server]
host = "localhost"
port = {port}

[[site]]
name = "north"
"""


@pytest.fixture
def kit(tmp_path: Path) -> ServerKit:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "sites.toml").write_text(SITES.format(port=port))
    provision(tmp_path / "sites.toml", tmp_path / "kits")
    return ServerKit.load(tmp_path / "kits" / "server")


def renew(kit: ServerKit) -> int:
    """Make a new certificate; returns its number."""
    kits = kit.folder.parent
    update(kits.parent / "sites.toml", kits, renew=True)
    return number_in(kit.certificate)


def number_in(file: Path) -> int:
    return x509.load_pem_x509_certificate(file.read_bytes()).serial_number


def plain(kit: ServerKit) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.certificate, kit.key)
    return context


def shown(server: ssl.SSLContext, kit: ServerKit, name: str | None = "localhost") -> int:
    """The number of the certificate in a handshake, of a client that trusts the kit's authority."""
    client = ssl.create_default_context(cafile=str(kit.authority))
    client.check_hostname = name is not None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [one, other]
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                continue
    return number_of(one.getpeercert(binary_form=True))


def number_of(certificate: bytes | None) -> int:
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


@pytest.mark.parametrize("name", ["localhost", None])
def test_every_handshake_has_the_certificate_of_then(kit: ServerKit, name: str | None) -> None:
    told: list[str] = []
    first = number_in(kit.certificate)
    context = following(lambda: plain(kit), (kit.certificate, kit.key), told.append)
    assert shown(context, kit, name) == shown(context, kit, name) == first and told == []
    for _ in range(2):
        before, renewed = shown(context, kit, name), renew(kit)
        assert shown(context, kit, name) == renewed != before
    assert len(told) == 2 and "server.crt is a new certificate" in told[0]


def test_half_a_pair_changes_nothing_and_is_told_once(kit: ServerKit, tmp_path: Path) -> None:
    told: list[str] = []
    context = following(lambda: plain(kit), (kit.certificate, kit.key), told.append)
    first = number_in(kit.certificate)
    shutil.copytree(kit.folder, tmp_path / "next" / "server")
    shutil.copytree(kit.folder.parent / "ca", tmp_path / "next" / "ca")
    shutil.copytree(kit.folder.parent / "north", tmp_path / "next" / "north")
    update(tmp_path / "sites.toml", tmp_path / "next", renew=True)
    other = ServerKit.load(tmp_path / "next" / "server")
    shutil.copy(other.key, kit.key)
    assert shown(context, kit) == shown(context, kit) == first
    assert len(told) == 1 and "cannot be used, the one before stays" in told[0]
    kit.certificate.unlink()
    assert shown(context, kit) == first
    shutil.copy(other.certificate, kit.certificate)
    assert shown(context, kit) == number_in(other.certificate) != first
    assert "is a new certificate" in told[-1]


def test_the_public_port_shows_it_without_being_started_again(kit: ServerKit) -> None:
    told: list[str] = []
    proxy = ReverseProxy(kit, listen(kit.address), "127.0.0.1:1", tell=told.append)
    proxy.start()
    client = ssl.create_default_context(cafile=str(kit.authority))

    def at_the_port() -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", kit.address.port))
        return client.wrap_socket(raw, server_hostname="localhost")

    try:
        before = at_the_port()
        first, second = number_of(before.getpeercert(binary_form=True)), renew(kit)
        with at_the_port() as after:
            assert number_of(after.getpeercert(binary_form=True)) == second != first
        before.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")  # what was connected stays
        assert before.recv(64).startswith(b"HTTP/1.1 403")
        before.close()
    finally:
        proxy.stop()
    assert len(told) == 1 and "server.crt is a new certificate" in told[0]


def test_servers_that_flower_starts_follow_it_too(kit: ServerKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_config, "create_ssl_context", uvicorn_config.create_ssl_context)
    follow_certificates()
    started = uvicorn_config.Config(
        "app", ssl_certfile=str(kit.certificate), ssl_keyfile=str(kit.key), log_config=None, interface="asgi3"
    )
    started.app = shown
    started.load()
    assert started.ssl is not None
    first, second = shown(started.ssl, kit), renew(kit)
    assert shown(started.ssl, kit) == second != first


def test_a_server_that_runs_tells_every_day_what_expires(
    kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    clock = SimpleNamespace(now=0.0)
    server: Any = SimpleNamespace(
        kit=kit, tell=told.append, clock=lambda: clock.now, looked_at_certificates=0.0
    )
    monkeypatch.setattr(serve, "check_server", lambda _: ["server.crt: expires in 12 days"])
    for clock.now in (1.0, 86_000.0, 86_500.0, 100_000.0, 173_000.0):
        serve._Server._look_at_certificates(server)
    assert told == ["server.crt: expires in 12 days"] * 2
    monkeypatch.undo()
    kit.certificate.write_text("nothing")
    clock.now = 500_000.0
    serve._Server._look_at_certificates(server)
    assert "server.crt: cannot be read" in told[-1]
