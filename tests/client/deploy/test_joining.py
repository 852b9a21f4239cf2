"""What is between a site and its server: told each time it changes, and waited for where that can help."""

from __future__ import annotations

import email.utils
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from atoll.client.deploy.join import LONGEST_PAUSE, _Site
from atoll.errors import JobError
from atoll.kit.kit import SiteKit
from atoll.server.deploy import certificates
from atoll.server.deploy.certificates import Authority, private_pem, server_certificate
from tests.federation.places import provisioned, unused_port


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Path]:
    return provisioned(tmp_path, ("north",), unused_port())


@contextmanager
def answering(kit: Path, *, ahead: float = 0.0) -> Iterator[None]:
    """A server with that kit's certificate, whose clock is so many seconds ahead."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return email.utils.formatdate(time.time() + ahead, usegmt=True)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    with HTTPServer(("127.0.0.1", port_of(kit)), Answer) as server:
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def port_of(kit: Path) -> int:
    return SiteKit.load(kit.parent / "north").address.port


def site(kits: dict[str, Path], tell: Callable[[str], None] = print) -> _Site:
    return _Site(SiteKit.load(kits["north"]), [], tell, threading.Event())


def test_a_server_that_answers_is_no_obstacle_and_one_that_is_away_is(kits: dict[str, Path]) -> None:
    with answering(kits["server"]):
        assert site(kits)._obstacle() is None
    assert "refused" in str(site(kits)._obstacle())


@pytest.mark.parametrize("ahead", [-3600.0, 400.0])
def test_a_clock_that_is_off_is_named_with_its_seconds(kits: dict[str, Path], ahead: float) -> None:
    with answering(kits["server"], ahead=ahead):
        said = str(site(kits)._obstacle())
    seconds = float(said.removeprefix("this machine's clock is ").partition(" s off the server's")[0])
    assert abs(seconds + ahead) < 60


def certified(kits: dict[str, Path], days: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the server a certificate of its own authority that ends so many days from now."""
    monkeypatch.setattr(certificates, "SERVER_DAYS", days)
    key = ec.generate_private_key(ec.SECP384R1())
    made = server_certificate(Authority.load(kits["server"].parent / "ca"), key, "127.0.0.1")
    (kits["server"] / "server.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (kits["server"] / "server.key").write_bytes(private_pem(key))


def test_an_expired_certificate_is_waited_for_until_another_is_there(
    kits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    certified(kits, -timedelta(hours=12) / timedelta(days=1), monkeypatch)
    with answering(kits["server"]):
        assert "certificate has expired; its operator makes another" in str(site(kits)._obstacle())
    certified(kits, 30, monkeypatch)
    with answering(kits["server"]):
        assert site(kits)._obstacle() is None


def test_a_server_of_another_authority_is_not_waited_for(kits: dict[str, Path], tmp_path: Path) -> None:
    other = provisioned(tmp_path / "other", ("north",), port_of(kits["server"]))
    with answering(other["server"]), pytest.raises(JobError, match="is not the one of this kit"):
        site(kits)._obstacle()


def test_what_is_in_the_way_is_told_when_it_changes_and_asked_for_ever_less_often(
    kits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    pauses: list[float] = []
    waiting = site(kits, told.append)
    found = iter(["refused", "refused", "off by 400 s", *["refused"] * 9, None])
    monkeypatch.setattr(waiting, "_obstacle", lambda: next(found))
    monkeypatch.setattr(waiting.stop, "wait", pauses.append)
    for child in (waiting.supernode, waiting.executor):
        monkeypatch.setattr(child, "start", lambda: None)
    waiting._connect()
    assert [line.rpartition(": ")[2] for line in told] == ["refused", "off by 400 s", "refused"]
    assert pauses[:4] == [1, 2, 4, 8] and pauses[-1] == LONGEST_PAUSE and len(pauses) == 12
