"""How a site whose key never leaves it joins: it makes a key, asks, and takes the administrator's answer.

    atoll enroll KIT NAME            at the site: a key, and KIT/NAME.request, which is sent
    atoll provision … --request F    at the administrator's: an answer, a folder without a private key
    atoll accept KIT ANSWER          at the site: the answer, after a look at whom it trusts by it

Later rosters come the same way, by `atoll accept`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from pydantic import Field, ValidationError

from atoll.errors import ConfigError
from atoll.job.error_text import explain
from atoll.kit.kit import KitTable, SiteKit, SiteName
from atoll.kit.roster import ALGORITHM, SIGNATURE, TABLE, FederationRoster
from atoll.system.durable_files import replace_all, write_synced

SUFFIX = ".request"
MOST_BYTES = 2**20
"""Of a request; a thousand clients take some 20 kB."""


class SiteRequest(KitTable):
    """What a site asks for: its name, its clients, its public key, and the key's signature of all that."""

    name: SiteName
    clients: Annotated[list[SiteName], Field(min_length=1)]
    key: str
    signature: str

    @classmethod
    def load(cls, path: Path) -> SiteRequest:
        """Read what `enroll` wrote.

        Raises:
            ConfigError: it can't be read, or whoever wrote it doesn't have the key.
        """
        try:
            content = path.read_bytes()
            if len(content) > MOST_BYTES:
                raise ConfigError(f"{path}: {len(content)} bytes, expected a request of at most {MOST_BYTES}")
            request = cls.model_validate_json(content)
            public = cast(ec.EllipticCurvePublicKey, load_ssh_public_key(request.key.encode()))
            public.verify(
                bytes.fromhex(request.signature),
                _signed(request.name, request.clients, request.key),
                ALGORITHM,
            )
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path))) from None
        except (ValueError, TypeError, UnsupportedAlgorithm, AttributeError, InvalidSignature):
            raise ConfigError(
                f"{path}: is not signed by the key in it; expected the file that atoll enroll wrote"
            ) from None
        return request


def _signed(name: str, clients: Sequence[str], key: str) -> bytes:
    return json.dumps(["atoll enrolment", name, list(clients), key]).encode()


def write_site_key(folder: Path) -> bytes:
    """Make a site's private files in its folder, for the owner alone; returns its public key for OpenSSH."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_synced(
        folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600
    )
    write_synced(folder / "superexec.secret", secrets.token_hex(32).encode(), 0o600)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def enroll(kit: Path, name: str, clients: Sequence[str] = ()) -> Path:
    """Make a site's key in a new folder; returns the request that is to be sent.

    Raises:
        ConfigError: the folder is there, or a name can't be one.
    """
    if kit.exists():
        raise ConfigError(f"{kit}: already there; expected a new folder for the kit")
    hosted = list(clients) or [name]
    try:  # before anything is written
        SiteRequest(name=name, clients=hosted, key="", signature="")
    except ValidationError as error:
        raise ConfigError(explain(error, SiteRequest, "enroll")) from None
    try:
        kit.mkdir(mode=0o700, parents=True)
        public = write_site_key(kit).decode()
        key = cast(ec.EllipticCurvePrivateKey, load_ssh_private_key((kit / "node.key").read_bytes(), None))
        signature = key.sign(_signed(name, hosted, public), ALGORITHM).hex()
        request = SiteRequest(name=name, clients=hosted, key=public, signature=signature)
        path = kit / f"{name}{SUFFIX}"
        write_synced(path, request.model_dump_json(indent=1).encode())
    except OSError as error:
        raise ConfigError(f"{error.filename or kit}: {error.strerror}") from None
    return path


@dataclass(frozen=True)
class Answer:
    """What an answer would change in a kit, a line each; `files` are what is written then."""

    kit: Path
    files: dict[Path, bytes]
    lines: tuple[str, ...]

    def take(self) -> None:
        """Write it into the kit.

        Raises:
            ConfigError: the kit's folder cannot be written.
        """
        try:
            replace_all(self.files)
        except OSError as error:
            raise ConfigError(f"{error.filename or self.kit}: {error.strerror}") from None


def read_answer(kit: Path, answer: Path) -> Answer:
    """What the administrator's folder would change in a site's kit; nothing is written.

    A kit without an authority takes the answer's; the site compares its fingerprint with the administrator's.

    Raises:
        ConfigError: the answer is another federation's or another site's, or isn't signed by its authority.
    """
    own_key = _public_key_of(kit)
    contents = {name: _content(answer / name) for name in ("ca.crt", "kit.toml", TABLE, SIGNATURE)}
    known = kit / "ca.crt"
    if known.is_file() and known.read_bytes() != contents["ca.crt"]:
        raise ConfigError(
            f"{answer / 'ca.crt'}: is another authority than {known}; expected this federation's"
        )
    roster = FederationRoster.load(answer)
    assert roster is not None  # its file was read
    table = SiteKit.table(answer)
    mine = {client for client, site in roster.sites.items() if site == table.name}
    if not mine or any(_text(roster.keys[client]) != own_key for client in mine):
        raise ConfigError(
            f"{answer / TABLE}: site {table.name!r} has another key than {kit / 'node.key'};"
            " expected the same"
        )
    lines = [f"this site is {table.name}, for {', '.join(sorted(mine))}; the server is at {table.server}"]
    if not known.is_file():
        fingerprint = hashlib.sha256(contents["ca.crt"]).hexdigest()
        lines.insert(
            0, f"authority {fingerprint}: new here; compare it with the administrator's ca.crt (sha256sum)"
        )
    lines += _changes(
        FederationRoster.load(kit) if (kit / TABLE).is_file() and known.is_file() else None, roster
    )
    if (kit / "kit.toml").is_file() and SiteKit.table(kit).server != table.server:
        lines.append(f"the server's address is another: change [server] in {kit / 'kit.toml'} yourself")
    keep = "kit.toml" if (kit / "kit.toml").is_file() else ""  # it may have this site's own budget
    files = {kit / name: content for name, content in contents.items() if name != keep}
    return Answer(kit, files, tuple(lines))


def _changes(before: FederationRoster | None, after: FederationRoster) -> list[str]:
    """What the roster adds, takes away and gives another key."""
    old = (
        {}
        if before is None
        else {client: (site, _text(before.keys[client])) for client, site in before.sites.items()}
    )
    new = {client: (site, _text(after.keys[client])) for client, site in after.sites.items()}
    lines = [f"new      {client} at {new[client][0]}" for client in sorted(new.keys() - old.keys())]
    lines += [f"gone     {client} at {old[client][0]}" for client in sorted(old.keys() - new.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [
        f"changed  {client}: its site or that site's key" for client in both if old[client] != new[client]
    ]


def _text(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _public_key_of(kit: Path) -> bytes:
    path = kit / "node.key"
    try:
        key = load_ssh_private_key(_content(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: cannot be read, expected the key that atoll enroll made") from None
    return _text(cast(ec.EllipticCurvePrivateKey, key).public_key())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
