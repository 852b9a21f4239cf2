"""Provisioning: write the server's and every site's kit of certificates and keys, and update them later."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from atoll.errors import ConfigError
from atoll.kit.enrolment import SiteRequest, write_site_key
from atoll.kit.kit import ServerKit, Sites, read_table, server_table, site_table
from atoll.kit.roster import ALGORITHM, SIGNATURE, TABLE, RosterSite, roster_table
from atoll.server.deploy.certificates import Authority, new_authority, private_pem, server_certificate
from atoll.system.durable_files import replace_all, replace_synced, write_synced


@dataclass
class Changes:
    """What `update` changed: folders of new kits or answers, and names of unchanged and removed sites."""

    new: list[Path] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    has_new_roster: bool = False
    has_new_certificate: bool = False


def provision(sites_file: Path, out: Path, requests: Sequence[Path] = ()) -> list[Path]:
    """Write kits for the sites of a SITES file; returns their folders, the server's first, then one per site.

    A site that sent a request (`atoll enroll`) has made its own key: its folder is the answer to the request
    and holds no private key. The authority's private key stays in `out/ca` and should be on no machine that
    serves or joins.

    Raises:
        ConfigError: SITES or a request is invalid, or there are kits in `out` already.
    """
    sites, signing_requests = read_table(sites_file, Sites), _requests(requests)
    names = [site.name for site in sites.site]
    _refuse_strangers(signing_requests, sites, sites_file)
    _refuse_old_kits(out, names)
    try:
        authority = new_authority()
        _write_authority(out / "ca", authority)
        keys = {
            site: _write_site(out / site, site, sites, authority, signing_requests.get(site))
            for site in names
        }
        _write_server(out / "server", sites, authority, keys)
        _write_roster([out / "server", *(out / name for name in names)], sites, authority, keys)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror}") from error
    return [out / "server", *(out / name for name in names)]


def update(sites_file: Path, out: Path, requests: Sequence[Path] = (), *, renew: bool = False) -> Changes:
    """Update the kits in `out` to a changed SITES file, with the same authority; returns what changed.

    New sites get a kit, or the answer to their request. Sites that are no longer listed are removed from the
    server's kit, so that it refuses them; their folders stay. Kits of all other sites are unchanged. The
    server gets a new certificate if `renew` is set or its host has changed. If the roster has changed, it is
    written into every kit in `out`.

    Raises:
        ConfigError: there are no kits to update, or SITES or a request is invalid.
    """
    sites, signing_requests = read_table(sites_file, Sites), _requests(requests)
    _refuse_strangers(signing_requests, sites, sites_file)
    authority, before = Authority.load(out / "ca"), ServerKit.load(out / "server")
    names, changes = [site.name for site in sites.site], Changes()
    keys: dict[str, bytes] = {}
    try:
        for name in names:
            if name in before.sites and name not in signing_requests:
                keys[name] = before.node_key(name).read_bytes()
                changes.unchanged.append(name)
            else:
                _set_aside(out / name)
                keys[name] = _write_site(out / name, name, sites, authority, signing_requests.get(name))
                changes.new.append(out / name)
        changes.removed = [name for name in before.sites if name not in names]
        changes.has_new_certificate = renew or before.address.host != sites.server.host
        _change_server(before, sites, authority, keys, changes)
        kits = [out / "server", *(out / name for name in names if (out / name).is_dir())]
        changes.has_new_roster = _write_roster(kits, sites, authority, keys)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror}") from error
    return changes


def _requests(files: Sequence[Path]) -> dict[str, SiteRequest]:
    read = [SiteRequest.load(file) for file in files]
    return {request.name: request for request in read}


def _refuse_strangers(signing_requests: Mapping[str, SiteRequest], sites: Sites, sites_file: Path) -> None:
    listed = {site.name: site.hosted for site in sites.site}
    for name, request in signing_requests.items():
        if name not in listed:
            raise ConfigError(
                f"{sites_file}: has no site {name!r}, which sent a request; expected a [[site]] of it"
            )
        if sorted(request.clients) != sorted(listed[name]):
            raise ConfigError(
                f"{sites_file}: site {name!r} has the clients {listed[name]}, and asks for {request.clients};"
                " expected the same"
            )


def _refuse_old_kits(out: Path, names: list[str]) -> None:
    for kit in (out / part for part in ("ca", "server", *names)):
        if kit.exists():
            raise ConfigError(
                f"{kit}: already there; --update changes these kits, another folder makes others, with an"
                " authority of their own"
            )


def _set_aside(kit: Path) -> None:
    """Rename the old folder of a site that was removed before and now comes back with a new key."""
    if kit.exists():
        number = next(n for n in range(1, 10_000) if not kit.with_name(f"{kit.name}.old{n}").exists())
        shutil.move(kit, kit.with_name(f"{kit.name}.old{number}"))


def _write_authority(folder: Path, authority: Authority) -> None:
    _make_private(folder)
    write_synced(folder / "ca.key", private_pem(authority.key), 0o600)
    (folder / "ca.crt").write_bytes(authority.pem)


def _write_site(
    folder: Path, name: str, sites: Sites, authority: Authority, request: SiteRequest | None
) -> bytes:
    """Write a site's kit, or the answer to its request; returns its public key, for the server's kit."""
    _make_private(folder)
    public = write_site_key(folder) if request is None else request.key.encode()
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / "kit.toml").write_text(site_table(name, sites.server), encoding="utf-8")
    return public


def _write_server(folder: Path, sites: Sites, authority: Authority, keys: Mapping[str, bytes]) -> None:
    _make_private(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = server_certificate(authority, key, sites.server.host)
    write_synced(folder / "server.key", private_pem(key), 0o600)
    write_synced(folder / "superexec.secret", secrets.token_hex(32).encode(), 0o600)
    (folder / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "ca.crt").write_bytes(authority.pem)
    _make_private(folder / "nodes")
    for name, public_key in keys.items():
        (folder / "nodes" / f"{name}.pub").write_bytes(public_key)
    (folder / "kit.toml").write_text(server_table(sites.server, list(keys)), encoding="utf-8")


def _change_server(
    kit: ServerKit, sites: Sites, authority: Authority, keys: Mapping[str, bytes], changes: Changes
) -> None:
    """Update the server's kit: keys, then the table that names them; then delete removed sites' keys."""
    if changes.has_new_certificate:
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = server_certificate(authority, key, sites.server.host).public_bytes(Encoding.PEM)
        replace_all({kit.key: private_pem(key)}, 0o600)
        replace_synced(kit.certificate, certificate)
    for name, public_key in keys.items():
        replace_synced(kit.node_key(name), public_key)
    replace_synced(kit.folder / "kit.toml", server_table(sites.server, list(keys)).encode())
    for name in changes.removed:
        kit.node_key(name).unlink(missing_ok=True)


def _write_roster(kits: list[Path], sites: Sites, authority: Authority, keys: Mapping[str, bytes]) -> bool:
    """Write the same signed roster into every kit; returns whether the first kit had another one."""
    listed = [
        RosterSite(name=site.name, clients=site.hosted, key=keys[site.name].decode()) for site in sites.site
    ]
    table = roster_table(listed).encode()
    there = kits[0] / TABLE
    is_new = not there.is_file() or there.read_bytes() != table
    signature = authority.key.sign(table, ALGORITHM) if is_new else (kits[0] / SIGNATURE).read_bytes()
    for kit in kits:
        replace_all({kit / TABLE: table, kit / SIGNATURE: signature})
    return is_new


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
