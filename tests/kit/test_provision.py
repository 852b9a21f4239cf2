"""Kits: what they hold, who may read them, and what a wrong SITES file is told."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from atoll.errors import ConfigError
from atoll.kit.kit import ServerKit, SiteKit
from atoll.server.deploy.provision import provision

GOOD = """
[server]
host = "fed.example.org"
port = 9092

[[site]]
name = "north"

[[site]]
name = "south_2.b"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sites.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_kit_is_written_for_the_server_and_every_site(tmp_path: Path) -> None:
    kits = provision(written(tmp_path, GOOD), tmp_path / "kits")
    assert [kit.name for kit in kits] == ["server", "north", "south_2.b"]
    server = ServerKit.load(kits[0])
    assert (server.sites, str(server.address)) == (("north", "south_2.b"), "fed.example.org:9092")
    assert SiteKit.load(kits[2]).name == "south_2.b"


def test_private_files_are_for_their_owner_only(tmp_path: Path) -> None:
    for kit in (*provision(written(tmp_path, GOOD), tmp_path / "kits"), tmp_path / "kits" / "ca"):
        assert kit.stat().st_mode & 0o777 == 0o700
        private = [path for path in kit.iterdir() if path.suffix in (".key", ".secret")]
        assert private
        assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_the_authority_key_is_in_no_kit(tmp_path: Path) -> None:
    kits = provision(written(tmp_path, GOOD), tmp_path / "kits")
    secret = (tmp_path / "kits" / "ca" / "ca.key").read_bytes()
    assert all(secret != path.read_bytes() for kit in kits for path in kit.rglob("*") if path.is_file())


def test_the_server_knows_the_public_half_of_each_sites_key(tmp_path: Path) -> None:
    provision(written(tmp_path, GOOD), tmp_path / "kits")
    private = load_ssh_private_key((tmp_path / "kits" / "north" / "node.key").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "kits" / "server" / "nodes" / "north.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public


def test_the_certificate_names_the_host_and_loopback(tmp_path: Path) -> None:
    server = ServerKit.load(provision(written(tmp_path, GOOD), tmp_path / "kits")[0])
    certificate = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    context = ssl.create_default_context(cafile=str(server.authority))
    assert context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server", "not valid TOML"),
        ("", "the file is empty"),
        (GOOD.replace('host = "fed.example.org"\n', ""), "server.host: missing"),
        (GOOD.replace("fed.example.org", "not a host"), "server.host: 'not a host' is neither"),
        (GOOD.replace("fed.example.org", "300.1.2.3"), "server.host: '300.1.2.3' is neither"),
        (GOOD.replace("9092", "0"), "server.port:"),
        (GOOD.replace("9092", "70000"), "server.port:"),
        (GOOD.replace("9092", '"9092"'), "server.port:"),
        (
            GOOD.replace("port = 9092", "port = 9092\nprot = 1"),
            "server.prot: unknown key, did you mean 'port'?",
        ),
        (GOOD.split("[[site]]")[0], "site: missing"),
        (GOOD.split("[[site]]")[0] + "site = []", "server.site: unknown key"),
        ("site = []\n" + GOOD.split("[[site]]")[0], "site: expected at least 1, found []"),
        (GOOD.replace("north", "../north"), "site.0.name: '../north' may have"),
        (GOOD.replace("north", ".."), "site.0.name: '..' may have"),
        (GOOD.replace("north", ""), "site.0.name: '' may have"),
        (GOOD.replace("north", "nörd"), "site.0.name: 'nörd' may have"),
        (GOOD.replace("north", "north\\n"), "site.0.name: 'north\\n' may have"),
        (GOOD.replace("north", "Server"), "site.0.name: 'Server' is reserved"),
        (GOOD.replace("north", "ca"), "site.0.name: 'ca' is reserved"),
        (GOOD.replace("south_2.b", "North"), "site: 'North' is there twice"),
    ],
)
def test_a_wrong_sites_file_gets_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        provision(path, tmp_path / "kits")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message
    assert "\n" not in message
    assert not (tmp_path / "kits").exists()


def test_a_missing_sites_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        provision(tmp_path / "nowhere.toml", tmp_path / "kits")


def test_old_kits_are_never_overwritten(tmp_path: Path) -> None:
    kits = provision(written(tmp_path, GOOD), tmp_path / "kits")
    key = (kits[1] / "node.key").read_bytes()
    with pytest.raises(ConfigError, match="already there"):
        provision(tmp_path / "sites.toml", tmp_path / "kits")
    assert (kits[1] / "node.key").read_bytes() == key


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "kits").write_text("a file")
    with pytest.raises(ConfigError, match="kits"):
        provision(written(tmp_path, GOOD), tmp_path / "kits")


def test_a_kit_with_a_missing_key_is_refused(tmp_path: Path) -> None:
    kits = provision(written(tmp_path, GOOD), tmp_path / "kits")
    (kits[1] / "node.key").unlink()
    with pytest.raises(ConfigError, match=r"node\.key: missing from the kit"):
        SiteKit.load(kits[1])


def test_a_kit_of_the_other_kind_is_called_what_it_is(tmp_path: Path) -> None:
    server, north, _ = provision(written(tmp_path, GOOD), tmp_path / "kits")
    with pytest.raises(ConfigError, match=r"north: a site's kit, expected the server's kit$"):
        ServerKit.load(north)
    with pytest.raises(ConfigError, match=r"server: the server's kit, expected a site's kit$"):
        SiteKit.load(server)
