"""Provisioning: one kit of certificates and keys for the server and for every site."""

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.errors import ConfigError
from atoll.kit.kit import Sites, is_address, read_table, server_table, site_table
from atoll.kit.roster import ALGORITHM, SIGNATURE, TABLE, RosterSite, roster_table

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """The federation's own certificate authority."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


def provision(sites_file: Path, out: Path) -> list[Path]:
    """The kits written for a SITES file: the server's first, then one per site.

    The authority's private key stays in `out/ca` and belongs on no machine that serves or joins.
    """
    sites = read_table(sites_file, Sites)
    names = [site.name for site in sites.site]
    _refuse_old_kits(out, names)
    try:
        authority = _authority()
        _write_authority(out / "ca", authority)
        public_keys = {name: _write_site(out / name, name, sites, authority) for name in names}
        _write_server(out / "server", sites, authority, public_keys)
        _write_roster([out / "server", *(out / name for name in names)], sites, authority, public_keys)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror}") from error
    return [out / "server", *(out / name for name in names)]


def _refuse_old_kits(out: Path, names: list[str]) -> None:
    for kit in (out / part for part in ("ca", "server", *names)):
        if kit.exists():
            raise ConfigError(f"{kit}: already there; give another folder, or remove the old kits first")


def _write_authority(folder: Path, authority: Authority) -> None:
    _make_private(folder)
    _write_private(folder / "ca.key", _pem(authority.key))
    (folder / "ca.crt").write_bytes(authority.pem)


def _write_site(folder: Path, name: str, sites: Sites, authority: Authority) -> bytes:
    """Write a site's kit; returns the public key that the server must know."""
    _make_private(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _write_private(folder / "node.key", openssh)
    _write_private(folder / "superexec.secret", secrets.token_hex(32).encode())
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / "kit.toml").write_text(site_table(name, sites.server), encoding="utf-8")
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _write_server(folder: Path, sites: Sites, authority: Authority, public_keys: dict[str, bytes]) -> None:
    _make_private(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _server_certificate(authority, key, sites.server.host)
    _write_private(folder / "server.key", _pem(key))
    _write_private(folder / "superexec.secret", secrets.token_hex(32).encode())
    (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "ca.crt").write_bytes(authority.pem)
    _make_private(folder / "nodes")
    for name, public_key in public_keys.items():
        (folder / "nodes" / f"{name}.pub").write_bytes(public_key)
    (folder / "kit.toml").write_text(server_table(sites.server, list(public_keys)), encoding="utf-8")


def _write_roster(
    kits: list[Path], sites: Sites, authority: Authority, public_keys: dict[str, bytes]
) -> None:
    """Write the same signed roster into every kit."""
    listed = [
        RosterSite(name=site.name, clients=site.hosted, key=public_keys[site.name].decode())
        for site in sites.site
    ]
    table = roster_table(listed).encode()
    signature = authority.key.sign(table, ALGORITHM)
    for kit in kits:
        (kit / TABLE).write_bytes(table)
        (kit / SIGNATURE).write_bytes(signature)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that was never readable by others, not even for a moment."""
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(content)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _authority() -> Authority:
    key = ec.generate_private_key(ec.SECP384R1())
    name = _common_name("Atoll federation authority")
    builder = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(key, builder.sign(key, hashes.SHA384()))


def _server_certificate(authority: Authority, key: ec.EllipticCurvePrivateKey, host: str) -> x509.Certificate:
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
    """The public host and this machine's own names: the server's parts talk over loopback."""
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
