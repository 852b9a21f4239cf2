"""The roster of a federation: its sites, their keys and their clients, signed by the federation's authority.

Provisioning writes it into every kit, so that a site knows whom the others' keys belong to without asking
the server: one that invents clients, or tells sites different stories, can't sign for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from pydantic import Field

from atoll.errors import ConfigError
from atoll.kit.kit import KitTable, SiteName, read_table

TABLE, SIGNATURE = "roster.toml", "roster.sig"
SIGNATURE_BYTES = 96
"""Of a signature by a key as provisioning makes it, on P-384."""
ALGORITHM = ec.ECDSA(SHA384())


class RosterSite(KitTable):
    """One `[[site]]` of a roster: its key as OpenSSH writes it, and the clients that it answers for."""

    name: SiteName
    clients: Annotated[list[SiteName], Field(min_length=1)]
    key: str


class _RosterTable(KitTable):
    site: Annotated[list[RosterSite], Field(min_length=1)]


@dataclass(frozen=True)
class FederationRoster:
    """Each client's site and that site's key, by the client's name."""

    sites: Mapping[str, str]
    keys: Mapping[str, ec.EllipticCurvePublicKey]

    @classmethod
    def load(cls, kit: Path) -> FederationRoster | None:
        """The roster in a kit's folder; None where the kit was made before there were rosters.

        Raises:
            ConfigError: it isn't what the federation's authority has signed.
        """
        table, signature = kit / TABLE, kit / SIGNATURE
        if not table.is_file():
            return None
        authority = x509.load_pem_x509_certificate((kit / "ca.crt").read_bytes())
        signed = signature.read_bytes() if signature.is_file() else b""
        try:
            key = cast(ec.EllipticCurvePublicKey, authority.public_key())
            key.verify(signed, table.read_bytes(), ALGORITHM)
        except InvalidSignature:
            raise ConfigError(
                f"{table}: is not what the federation's authority has signed ({SIGNATURE});"
                " expected the file of the kit as it was handed out"
            ) from None
        return cls.of(read_table(table, _RosterTable).site)

    @classmethod
    def of(cls, listed: list[RosterSite]) -> FederationRoster:
        """The roster of these sites."""
        keys = {site.name: load_ssh_public_key(site.key.encode()) for site in listed}
        sites = {client: site.name for site in listed for client in site.clients}
        return cls(
            sites, {client: cast(ec.EllipticCurvePublicKey, keys[name]) for client, name in sites.items()}
        )

    def has_signed(self, client: str, content: bytes, signature: bytes) -> bool:
        """Whether the signature is that of the site which the client belongs to."""
        key = self.keys.get(client)
        return key is not None and is_signature(key, content, signature)

    def key_of_site(self, name: str) -> ec.EllipticCurvePublicKey | None:
        """The key of a site, by the site's name."""
        return next((self.keys[client] for client, site in self.sites.items() if site == name), None)


@dataclass(frozen=True)
class SiteIdentity:
    """A site's key, and the roster by which it knows the others."""

    key: ec.EllipticCurvePrivateKey
    roster: FederationRoster

    @classmethod
    def load(cls, kit: Path) -> SiteIdentity | None:
        """That of a site's kit; None where the kit has no roster.

        Raises:
            ConfigError: as `FederationRoster.load`.
        """
        roster = FederationRoster.load(kit)
        key = load_ssh_private_key((kit / "node.key").read_bytes(), None)
        return None if roster is None else cls(cast(ec.EllipticCurvePrivateKey, key), roster)

    def knows(self, client: str) -> bool:
        """Whether the roster has a client of that name."""
        return client in self.roster.keys

    def sign(self, content: bytes) -> bytes:
        """This site's signature, as `signature_of` makes it."""
        return signature_of(self.key, content)

    def has_signed(self, client: str, content: bytes, signature: bytes) -> bool:
        """As `FederationRoster.has_signed`."""
        return self.roster.has_signed(client, content, signature)


def signature_of(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """The signature (ECDSA with SHA-384, r and s) by a site's key: 96 bytes where the key is on P-384."""
    size = _number_bytes(key.curve)
    numbers = decode_dss_signature(key.sign(content, ALGORITHM))
    return b"".join(number.to_bytes(size, "big") for number in numbers)


def is_signature(key: ec.EllipticCurvePublicKey, content: bytes, signature: bytes) -> bool:
    """Whether `signature_of` made it, with the private key to this one."""
    size = _number_bytes(key.curve)
    if len(signature) != 2 * size:
        return False
    r, s = (int.from_bytes(part, "big") for part in (signature[:size], signature[size:]))
    try:
        key.verify(encode_dss_signature(r, s), content, ALGORITHM)
    except InvalidSignature:
        return False
    return True


def _number_bytes(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + 7) // 8


def roster_table(listed: list[RosterSite]) -> str:
    """The text of a roster; JSON strings of ASCII are TOML strings too."""
    return "\n".join(
        f"[[site]]\nname = {json.dumps(site.name)}\nclients = {json.dumps(site.clients)}\n"
        f"key = {json.dumps(site.key)}\n"
        for site in listed
    )
