"""The signatures under what leaves a site: each update, measurement and greeting is signed by the site's key.

A signature binds the content to one request of one run's round and to one client, so a message that is
forged, changed, sent again, late, or given out for another site's client is told from the answer that is
awaited before anything of it is read. Where no transport is between server and clients, nothing is signed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from atoll.kit.roster import FederationRoster, is_signature, signature_of
from atoll.protocol.messages import Seal, as_bytes, cleaned, content_sha256

PURPOSE = b"atoll: what a site sends, 1"
"""Stands before all that is signed here: nothing else that a site signs can be taken for it."""
NONCE_BYTES = 16
GREETING_ROUND = 0
"""Greetings come before the rounds, which count from 1."""

Contents = Mapping[str, tuple[str, bytes]]
"""Head and body of each client's message."""


@dataclass(frozen=True)
class Exchange:
    """The request that a message answers: of which run and round, and a number that no other request has.

    A run is called as ledgers call it; greetings, which come before it, have the job's hash in its place.
    """

    run: str
    round: int
    nonce: str

    @classmethod
    def new(cls, run: str, round: int) -> Exchange:
        """That of a request which is about to be sent."""
        return cls(run, round, secrets.token_hex(NONCE_BYTES))


def signed_content(exchange: Exchange, client: str, digest: bytes) -> bytes:
    """What a signature is of: each part with its length before it, so that none can be moved into another."""
    bound = (exchange.run, str(exchange.round), client, exchange.nonce)
    parts = (PURPOSE, *map(as_bytes, bound), digest)
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


@dataclass(frozen=True)
class ReplySigner:
    """A site's key, which signs what leaves the site."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, kit: Path) -> ReplySigner:
        """That of a site's kit."""
        key = load_ssh_private_key((kit / "node.key").read_bytes(), None)
        return cls(cast(ec.EllipticCurvePrivateKey, key))

    def seal(self, exchange: Exchange, contents: Contents) -> Seal:
        """A signature for each client's message in the answer to one request."""
        signatures = {
            client: signature_of(self.key, signed_content(exchange, client, content_sha256(head, body)))
            for client, (head, body) in contents.items()
        }
        return Seal(exchange.run, exchange.round, exchange.nonce, signatures)


@dataclass(frozen=True)
class SignatureCheck:
    """Whether messages are a site's answers to one request; each client answers it once.

    A client that the roster names belongs to the site that it says, any other one to the site that answers.
    `site` is the name under which provisioning knows who answers.
    """

    roster: FederationRoster
    site: str
    expected: Exchange
    accepted: set[str] = field(default_factory=set)

    def fault(self, seal: Seal | None, client: str, sha256: bytes) -> str:
        """Why a message with that `content_sha256` isn't that client's answer to this request.

        Nothing if it is.
        """
        if seal is None or client not in seal.signatures:
            return "its message has no signature of its site"
        fault = self._claim_fault(seal, client) or self._signature_fault(seal, client, sha256)
        if not fault:
            self.accepted.add(client)
        return fault

    def _claim_fault(self, seal: Seal, client: str) -> str:
        """What is wrong with what the message itself says."""
        home = self.roster.sites.get(client, self.site)
        if home != self.site:
            return f"it is a client of site {home}, and its message came from site {cleaned(self.site, 100)}"
        if seal.run != self.expected.run:
            return "its message answers a request of another run"
        if seal.round != self.expected.round:
            return f"its message answers a request of round {seal.round}, expected {self.expected.round}"
        if seal.nonce != self.expected.nonce:
            return "its message answers another request of this round"
        if client in self.accepted:
            return "its message came twice for one request"
        return ""

    def _signature_fault(self, seal: Seal, client: str, sha256: bytes) -> str:
        key = self.roster.keys.get(client) or self.roster.key_of_site(self.site)
        if key is None:
            return f"site {cleaned(self.site, 100)} is not in the federation's roster"
        content = signed_content(self.expected, client, sha256)
        if not is_signature(key, content, seal.signatures[client]):
            return "its message is not what its site has signed"
        return ""
