"""Sites that make their keys themselves, and federations that change: who is asked, told and let in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.errors import ConfigError, JobError
from atoll.kit.credentials import check_server, check_site
from atoll.kit.enrolment import enroll, read_answer
from atoll.kit.kit import ServerKit, SiteKit
from atoll.kit.roster import FederationRoster, SiteIdentity
from atoll.server.deploy import serve
from atoll.server.deploy.provision import provision, update
from tests.kit.test_provision import GOOD, written

EAST = GOOD + '\n[[site]]\nname = "east"\nclients = ["ward-1", "ward-2"]\n'
NORTH_ALONE = GOOD[: GOOD.rindex("[[site]]")]


def enrolled(folder: Path) -> Path:
    """The kit of a site that asked, and was answered in `folder / "kits" / "east"`."""
    request = enroll(folder / "own", "east", ["ward-1", "ward-2"])
    provision(written(folder, EAST), folder / "kits", [request])
    return folder / "own"


def test_a_key_is_made_at_the_site_and_never_leaves_it(tmp_path: Path) -> None:
    kit = enrolled(tmp_path)
    private = (kit / "node.key").read_bytes(), (kit / "superexec.secret").read_bytes()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (kit / "node.key", kit / "superexec.secret"))
    elsewhere = [path.read_bytes() for path in (tmp_path / "kits").rglob("*") if path.is_file()]
    assert not any(secret in content for secret in private for content in elsewhere)
    assert not any(secret in (kit / "east.request").read_bytes() for secret in private)
    assert {path.name for path in (tmp_path / "kits" / "east").iterdir()} == {
        "ca.crt", "kit.toml", "roster.toml", "roster.sig",
    }  # fmt: skip


def test_an_answer_makes_the_folder_a_kit(tmp_path: Path) -> None:
    kit = enrolled(tmp_path)
    with pytest.raises(ConfigError, match=r"is no kit"):
        SiteKit.load(kit)
    answer = read_answer(kit, tmp_path / "kits" / "east")
    assert answer.lines[0].startswith("authority ") and "ward-1, ward-2" in answer.lines[1]
    assert {line.split()[1] for line in answer.lines[2:]} == {"north", "south_2.b", "ward-1", "ward-2"}
    assert not (kit / "ca.crt").exists()  # nothing before it is taken
    answer.take()
    assert check_site(SiteKit.load(kit)) == []
    identity = SiteIdentity.load(kit)
    assert identity is not None
    roster = FederationRoster.load(tmp_path / "kits" / "server")
    assert roster is not None and roster.has_signed("ward-2", b"words", identity.sign(b"words"))
    assert not roster.has_signed("north", b"words", identity.sign(b"words"))
    public = ServerKit.load(tmp_path / "kits" / "server").node_key("east").read_text()
    assert public == json.loads((kit / "east.request").read_text())["key"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "west"}, "is not signed by the key in it"),
        ({"clients": ["ward-1", "ward-2", "ward-3"]}, "is not signed by the key in it"),
        ({"key": "ssh-ed25519 AAAA"}, "is not signed by the key in it"),
        ({"signature": "00" * 70}, "is not signed by the key in it"),
        ({"signature": "no"}, "is not signed by the key in it"),
        ({"more": 1}, "more"),
    ],
)
def test_a_request_that_was_changed_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    request = enroll(tmp_path / "own", "east", ["ward-1", "ward-2"])
    request.write_text(json.dumps(json.loads(request.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        provision(written(tmp_path, EAST), tmp_path / "kits", [request])
    assert not (tmp_path / "kits").exists()


def test_a_request_for_other_clients_than_the_administrators_is_refused(tmp_path: Path) -> None:
    request = enroll(tmp_path / "own", "east")
    with pytest.raises(
        ConfigError, match=r"'east' has the clients \['ward-1', 'ward-2'\], and asks for \['east'\]"
    ):
        provision(written(tmp_path, EAST), tmp_path / "kits", [request])
    with pytest.raises(ConfigError, match=r"has no site 'east', which sent a request"):
        provision(written(tmp_path, GOOD), tmp_path / "kits", [request])


def test_an_answer_of_another_federation_or_site_is_refused(tmp_path: Path) -> None:
    kit = enrolled(tmp_path)
    with pytest.raises(ConfigError, match=r"site 'north' has another key"):
        read_answer(kit, tmp_path / "kits" / "north")
    read_answer(kit, tmp_path / "kits" / "east").take()
    provision(written(tmp_path, EAST), tmp_path / "others", [kit / "east.request"])
    with pytest.raises(ConfigError, match=r"is another authority than"):
        read_answer(kit, tmp_path / "others" / "east")
    roster = tmp_path / "kits" / "east" / "roster.toml"
    roster.write_text(roster.read_text().replace("ward-1", "ward-9"))
    with pytest.raises(ConfigError, match=r"is not what the federation's authority has signed"):
        read_answer(kit, tmp_path / "kits" / "east")


def test_sites_are_added_and_removed_without_touching_the_others(tmp_path: Path) -> None:
    provision(written(tmp_path, GOOD), tmp_path / "kits")
    north, server = tmp_path / "kits" / "north", tmp_path / "kits" / "server"
    before = {path.name: path.read_bytes() for path in (*north.iterdir(), *server.glob("*.*"))}
    changes = update(
        written(tmp_path, EAST), tmp_path / "kits", [enroll(tmp_path / "own", "east", ["ward-1", "ward-2"])]
    )
    assert ([kit.name for kit in changes.new], changes.unchanged, changes.removed) == (
        ["east"],
        ["north", "south_2.b"],
        [],
    )
    assert changes.has_new_roster and not changes.has_new_certificate
    after = {path.name: path.read_bytes() for path in (*north.iterdir(), *server.glob("*.*"))}
    assert {name for name in after if after[name] != before[name]} == {
        "roster.toml",
        "roster.sig",
        "kit.toml",
    }
    assert ServerKit.load(server).sites == ("north", "south_2.b", "east")

    changes = update(written(tmp_path, NORTH_ALONE), tmp_path / "kits")
    assert (changes.new, changes.unchanged, changes.removed) == ([], ["north"], ["south_2.b", "east"])
    assert ServerKit.load(server).sites == ("north",) and [p.name for p in (server / "nodes").iterdir()] == [
        "north.pub"
    ]
    assert not update(written(tmp_path, NORTH_ALONE), tmp_path / "kits").has_new_roster


def test_a_site_is_told_what_a_new_roster_changes(tmp_path: Path) -> None:
    kit = enrolled(tmp_path)
    read_answer(kit, tmp_path / "kits" / "east").take()
    assert len(read_answer(kit, tmp_path / "kits" / "east").lines) == 1  # nothing is new
    (kit / "kit.toml").write_text(
        (kit / "kit.toml").read_text() + "\n[budget]\nepsilon = 1.0\ndelta = 1e-5\n"
    )
    fewer = EAST.replace('name = "south_2.b"', 'name = "south"')
    update(written(tmp_path, fewer), tmp_path / "kits")
    answer = read_answer(kit, tmp_path / "kits" / "east")
    assert [line.split()[:2] for line in answer.lines[1:]] == [["new", "south"], ["gone", "south_2.b"]]
    answer.take()
    assert SiteKit.load(kit).budget is not None  # this site's own stays


def test_a_certificate_is_renewed_by_the_same_authority(tmp_path: Path) -> None:
    provision(written(tmp_path, GOOD), tmp_path / "kits")
    kit = ServerKit.load(tmp_path / "kits" / "server")
    before = kit.certificate.read_bytes(), kit.key.read_bytes(), kit.authority.read_bytes()
    assert update(written(tmp_path, GOOD), tmp_path / "kits", renew=True).has_new_certificate
    assert kit.certificate.read_bytes() != before[0] and kit.key.read_bytes() != before[1]
    assert kit.authority.read_bytes() == before[2] and kit.key.stat().st_mode & 0o077 == 0
    assert check_server(kit) == []


def test_kits_can_not_be_changed_without_their_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.key: No such file"):
        update(written(tmp_path, GOOD), tmp_path / "kits")


class Control:
    """Stands in for the SuperLink's control API: whom it lets in, and whether it answers."""

    def __init__(self) -> None:
        self.admitted: list[set[str]] = []
        self.answers = True

    def admit(self, keys: dict[str, Path]) -> None:
        if not self.answers:
            raise JobError("unreachable")
        self.admitted.append(set(keys))


def test_a_running_server_lets_in_who_was_added(tmp_path: Path) -> None:
    provision(written(tmp_path, NORTH_ALONE), tmp_path / "kits")
    said: list[str] = []
    server = object.__new__(serve._Server)
    server.kit, server.tell, control = ServerKit.load(tmp_path / "kits" / "server"), said.append, Control()
    server.control, server.written = control, serve._last_written(server.kit)  # type: ignore[assignment]
    server._follow_kit()
    assert control.admitted == []
    update(written(tmp_path, GOOD), tmp_path / "kits")
    control.answers = False
    server._follow_kit()
    control.answers = True
    server._follow_kit(), server._follow_kit()
    assert control.admitted == [{"north", "south_2.b"}] and said == ["south_2.b may join now"]
    update(written(tmp_path, NORTH_ALONE), tmp_path / "kits")
    server._follow_kit()
    assert control.admitted[1:] == [{"north"}] and said[1:] == ["south_2.b is let in no longer"]
    (server.kit.folder / "kit.toml").write_text("sites = 3")
    server._follow_kit()
    assert "cannot be used, its sites stay" in said[-1] and len(control.admitted) == 2
