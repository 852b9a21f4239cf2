"""Sites that nothing is heard of are named within seconds: whose calls count, and when one is silent."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from atoll.cli.main import run as command_line
from atoll.kit.kit import ServerKit
from atoll.server.deploy.connection_limits import SAY_AGAIN_SECONDS
from atoll.server.deploy.heard import KEY_HEADER, SILENT_SECONDS, LastHeard, key_of_file
from atoll.server.deploy.serve import WATCH_SECONDS, _Server
from atoll.server.deploy.status import Federation, answering
from atoll.system.audit_file import FILE
from tests.federation.places import provisioned
from tests.support.clock import TurnedClock


@pytest.fixture
def kit(tmp_path: Path) -> ServerKit:
    made = provisioned(tmp_path, ("north", "south"), 20_000)["server"]
    (made / "state").mkdir()
    return ServerKit.load(made)


def header_of(kit: ServerKit, site: str) -> str:
    """What Flower's SuperNode puts into the header of each call."""
    key = load_ssh_public_key(kit.node_key(site).read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return b64encode(public_key_to_bytes(key)).decode("ascii")


def keys_of(kit: ServerKit) -> dict[str, bytes]:
    return {site: key_of_file(kit.node_key(site)) for site in kit.sites}


def test_flower_names_a_calls_key_so() -> None:
    assert KEY_HEADER == FLEET_HTTP_PUBLIC_KEY_HEADER


def test_a_site_is_silent_from_the_eighth_second_until_it_calls_again(kit: ServerKit) -> None:
    clock, keys = TurnedClock(), keys_of(kit)
    last = LastHeard(clock.monotonic)
    last.heard(header_of(kit, "north"))
    clock.now += SILENT_SECONDS - 0.5
    last.heard(header_of(kit, "south"))
    assert last.silent(keys, kit.sites) == {}
    clock.now += 0.5
    assert last.silent(keys, kit.sites) == {"north": SILENT_SECONDS}
    assert last.silent(keys, ["south"]) == {}
    last.heard(header_of(kit, "north"))
    assert last.silent(keys, kit.sites) == {}


def test_a_site_that_never_called_or_has_no_key_here_is_not_called_silent(kit: ServerKit) -> None:
    clock = TurnedClock()
    last = LastHeard(clock.monotonic)
    for header in (None, "", "not base64!", b64encode(b"no key").decode("ascii")):
        last.heard(header)
    clock.now += 1e6
    assert last.silent(keys_of(kit), [*kit.sites, "removed"]) == {}


def test_the_server_names_it_once_and_says_when_it_is_back(
    kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    health: Any = SimpleNamespace(serving=lambda: None, not_serving=said.append)
    monkeypatch.setattr("atoll.server.deploy.serve.import_first", lambda *modules: None)
    server = _Server(kit, 20_001, said.append, threading.Event(), health, "here")
    clock = TurnedClock()
    server.last_heard = LastHeard(clock.monotonic)
    nodes = [SimpleNamespace(name=name, online=True) for name in kit.sites]
    monkeypatch.setattr(server, "_look_at_runs", lambda: None)
    monkeypatch.setattr(server, "control", SimpleNamespace(nodes=lambda: nodes))
    for name in kit.sites:
        server.last_heard.heard(header_of(kit, name))
    server._look_around()
    del said[:]
    clock.now += SILENT_SECONDS
    server.last_heard.heard(header_of(kit, "south"))
    server._look_around(), server._look_around()
    server.last_heard.heard(header_of(kit, "north"))
    server._look_around(), server._look_around()
    assert said == ["north is silent: nothing was heard of it for 8 s", "north is heard again"]
    del said[:]
    clock.now += SILENT_SECONDS
    server.last_heard.heard(header_of(kit, "south"))
    server._look_around()
    nodes[0].online = False  # Flower has noticed too
    server._look_around()
    assert said == ["north is silent: nothing was heard of it for 8 s", "north is gone (1 of 2)"]


def test_a_site_that_is_connected_twice_is_told_and_logged_once_a_minute(
    kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("atoll.server.deploy.serve.import_first", lambda *modules: None)
    server = _Server(kit, 20_001, said.append, threading.Event(), SimpleNamespace(), "here")  # type: ignore[arg-type]
    clock = TurnedClock()
    server.clock = clock.monotonic
    last = server.last_heard
    stranger = ec.generate_private_key(ec.SECP384R1()).public_key()
    last.refused(b64encode(public_key_to_bytes(stranger)).decode("ascii"), "10.0.0.1")
    for header in (None, "not base64!", header_of(kit, "north"), header_of(kit, "north")):
        last.refused(header, "10.0.0.2")
    server._tell_refused(), server._tell_refused()
    last.refused(header_of(kit, "north"), "10.0.0.2")
    server._tell_refused()
    assert len(said) == 1 and said[0].startswith("north asked from 10.0.0.2 to connect while it is connected")
    clock.now += SAY_AGAIN_SECONDS
    last.refused(header_of(kit, "north"), "10.0.0.2")
    server._tell_refused()
    assert len(said) == 2
    lines = [json.loads(line) for line in (kit.state / FILE).read_text().splitlines()[1:]]
    assert [(line["asked"], line["decision"], line["site"], line["from"]) for line in lines] == [
        ("connection", "refused", "north", "10.0.0.2")
    ] * 2
    (kit.state / FILE).write_text("{}\n")
    last.refused(header_of(kit, "south"), "10.0.0.2")
    server._tell_refused()
    assert said[-1].startswith("not in the server's log: ")


def test_status_says_so(kit: ServerKit, capsys: pytest.CaptureFixture[str]) -> None:
    stands = Federation(("north", "south"), (), (), frozenset(), "", "127.0.0.1:1", silent={"north": 34.2})
    with answering(kit.state, lambda: stands):
        assert command_line(["status", "--server", str(kit.folder)]) == 0
    assert "online   north (silent for 34 s), south" in capsys.readouterr().out
    with answering(kit.state, lambda: replace(stands, silent={})):
        assert command_line(["status", "--server", str(kit.folder)]) == 0
    assert "silent" not in capsys.readouterr().out


def test_a_server_without_runs_asks_half_as_often_and_hears_of_silent_sites_as_soon(
    kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    going_on: set[int] = set()
    health: Any = SimpleNamespace(serving=lambda: None, not_serving=said.append, going_on=going_on)
    monkeypatch.setattr("atoll.server.deploy.serve.import_first", lambda *modules: None)
    seconds, asked, clock = iter([False] * 20 + [True]), [0], TurnedClock()

    def wait(pause: float) -> bool:
        clock.now += pause
        return next(seconds)

    def nodes() -> list[Any]:
        asked[0] += 1
        return [SimpleNamespace(name=name, online=True) for name in kit.sites]

    server = _Server(kit, 20_001, said.append, SimpleNamespace(wait=wait), health, "here")  # type: ignore[arg-type]
    server.last_heard = LastHeard(clock.monotonic)
    for name in kit.sites:
        server.last_heard.heard(header_of(kit, name))
    alive: Any = SimpleNamespace(running=True)
    monkeypatch.setattr(server, "superlink", alive)
    monkeypatch.setattr(server, "superexec", alive)
    monkeypatch.setattr(server, "_look_at_runs", lambda: None)
    monkeypatch.setattr(server, "control", SimpleNamespace(nodes=nodes))
    told_at, start = dict[str, float](), clock.now
    server.tell = lambda line: told_at.setdefault(line, clock.now - start)
    server.watch()
    assert asked[0] in (10, 11)  # the first look, and every second one
    assert told_at["north is silent: nothing was heard of it for 8 s"] <= SILENT_SECONDS + WATCH_SECONDS
    going_on.add(1)
    seconds, asked[0] = iter([False] * 20 + [True]), 0
    server.watch()
    assert asked[0] == 20
