"""Whether a kit's certificates, keys and secret can be used: looked at before anything is started.

A damaged file would otherwise show itself as a connection that never comes about.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from atoll.errors import ConfigError
from atoll.kit.kit import ServerKit, SiteKit

WARN_DAYS = 30
"""A certificate that expires sooner is announced."""
SECRET_CHARACTERS = 64

Key = TypeVar("Key")
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The time of this machine's clock."""
    return datetime.now(UTC)


def check_server(kit: ServerKit, clock: Clock = utc_now) -> list[str]:
    """What a server's operator should know of its certificates: those that expire soon, a line each.

    Raises:
        ConfigError: one of the kit's files is damaged, expired, or doesn't belong to the others.
    """
    authority, certificate = _certificate(kit.authority), _certificate(kit.certificate)
    key = _read(kit.key, lambda content: load_pem_private_key(content, None), "a private key in PEM")
    if _is_other(key, certificate.public_key()):
        raise ConfigError(f"{kit.key}: is not the key of {kit.certificate.name}; expected the kit's own")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"{kit.certificate}: is not signed by {kit.authority.name}; expected the kit's own"
        ) from None
    for site in kit.sites:
        _read(kit.node_key(site), load_ssh_public_key, "a public key as OpenSSH writes it")
    _check_secret(kit.secret)
    return _expiring(kit.certificate, certificate, clock) + _expiring(kit.authority, authority, clock)


def check_site(kit: SiteKit, clock: Clock = utc_now) -> list[str]:
    """As `check_server`, of a site's kit."""
    authority = _certificate(kit.authority)
    _read(kit.key, lambda content: load_ssh_private_key(content, None), "a private key as OpenSSH writes it")
    _check_secret(kit.secret)
    return _expiring(kit.authority, authority, clock)


def _read(path: Path, parse: Callable[[bytes], Key], expected: str) -> Key:
    try:
        return parse(path.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path}: cannot be read, expected {expected}; it is damaged or another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _certificate(path: Path) -> x509.Certificate:
    return _read(path, x509.load_pem_x509_certificate, "a certificate in PEM")


def _is_other(key: object, public: object) -> bool:
    """Whether a private key belongs to another public one."""
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(public, ec.EllipticCurvePublicKey):
        return True
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(*form) != public.public_bytes(*form)


def _check_secret(path: Path) -> None:
    secret = path.read_bytes().strip()
    if len(secret) != SECRET_CHARACTERS or not set(secret) <= set(b"0123456789abcdef"):
        raise ConfigError(
            f"{path}: {len(secret)} bytes, expected the {SECRET_CHARACTERS} hexadecimal digits of the kit"
        )


def _expiring(path: Path, certificate: x509.Certificate, clock: Clock) -> list[str]:
    """A line if it expires soon.

    Raises:
        ConfigError: it has expired, or isn't valid yet.
    """
    now, first, last = clock(), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < first:
        raise ConfigError(
            f"{path}: valid from {first:%Y-%m-%d}, and this machine's clock says {now:%Y-%m-%d %H:%M};"
            " expected a clock that is right"
        )
    if now > last:
        raise ConfigError(
            f"{path}: expired on {last:%Y-%m-%d}; expected a new one, from atoll provision --renew"
        )
    if last - now > timedelta(days=WARN_DAYS):
        return []
    return [
        f"{path}: expires on {last:%Y-%m-%d}, in {(last - now).days} days; atoll provision --renew makes one"
    ]
