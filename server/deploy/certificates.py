"""Certificates of a federation: its own certificate authority, and the server certificate that it signs."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.errors import ConfigError
from atoll.kit.kit import is_address

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """The federation's own certificate authority."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read the authority from the folder `ca` that provisioning wrote.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        key, certificate = folder / "ca.key", folder / "ca.crt"
        try:
            loaded = load_pem_private_key(key.read_bytes(), None)
            return cls(
                cast(ec.EllipticCurvePrivateKey, loaded),
                x509.load_pem_x509_certificate(certificate.read_bytes()),
            )
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; expected the authority's folder"
            ) from None
        except (ValueError, TypeError):
            raise ConfigError(
                f"{folder}: ca.key or ca.crt cannot be read; expected the authority's own"
            ) from None

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_authority() -> Authority:
    """A new certificate authority with a P-384 key, valid for ten years."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _common_name("Atoll federation authority")
    builder = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(key, builder.sign(key, hashes.SHA384()))


def server_certificate(authority: Authority, key: ec.EllipticCurvePrivateKey, host: str) -> x509.Certificate:
    """A TLS server certificate for `key`, signed by the authority, for `host` and this machine's loopback."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(_common_name("Atoll server"), authority.certificate.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
    )
    return builder.sign(authority.key, hashes.SHA384())


def _names(host: str) -> list[x509.GeneralName]:
    """The public host and the loopback names, over which the server's own processes connect."""
    return [
        x509.IPAddress(ipaddress.ip_address(name)) if is_address(name) else x509.DNSName(name)
        for name in dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])
    ]


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=public_key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - CLOCK_SKEW,
        not_valid_after=now + timedelta(days=days),
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
