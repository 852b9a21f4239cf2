"""Kits: the folders that bind a server and its sites, and the SITES file they are made from."""

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from atoll.errors import ConfigError
from atoll.job.error_text import explain
from atoll.job.toml import read_toml

RESERVED = ("server", "ca")


def _site_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(
            f"{name!r} may have letters, digits, '-', '_' and '.', 64 at most, and not start with '.'"
        )
    if name.lower() in RESERVED:
        raise ValueError(f"{name!r} is reserved for the {name.lower()}'s own kit")
    return name


def _unique(names: list[str]) -> list[str]:
    """Names must differ in more than case: each is a folder, and some file systems fold case."""
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise ValueError(f"{name!r} is there twice")
        seen.add(name.lower())
    return names


def is_address(host: str) -> bool:
    """Whether the host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host(host: str) -> str:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    looks_like_address = re.fullmatch(r"[0-9.]+", host) is not None
    if is_address(host) or (re.fullmatch(rf"{label}(\.{label})*", host) and not looks_like_address):
        return host
    raise ValueError(f"{host!r} is neither a host name nor an IP address")


SiteName = Annotated[str, AfterValidator(_site_name)]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]


class KitTable(BaseModel):
    """A table of a file in a kit: keys that it doesn't know are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Address(KitTable):
    """Where the sites find the server."""

    host: Host
    port: Port

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Site(KitTable):
    """One `[[site]]` of a SITES file; it answers for the `clients`, or for one of its own name."""

    name: SiteName
    clients: Annotated[list[SiteName], Field(min_length=1)] | None = None

    @property
    def hosted(self) -> list[str]:
        """The clients that it answers for."""
        return self.clients or [self.name]


def _differ(sites: list[Site]) -> list[Site]:
    _unique([site.name for site in sites])
    _unique([client for site in sites for client in site.hosted])
    return sites


class Sites(KitTable):
    """A SITES file: the server's address and every site that may join."""

    server: Address
    site: Annotated[list[Site], Field(min_length=1), AfterValidator(_differ)]


class _ServerTable(KitTable):
    server: Address
    sites: Annotated[list[SiteName], Field(min_length=1), AfterValidator(_unique)]


class Budget(KitTable):
    """What all jobs together may spend on one client's data at this site, ever."""

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class SiteTable(KitTable):
    """The kit.toml of a site."""

    name: SiteName
    server: Address
    budget: Budget | None = None


@dataclass(frozen=True)
class _Kit:
    """What every kit's folder has."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def secret(self) -> Path:
        return self.folder / "superexec.secret"

    @property
    def state(self) -> Path:
        """What the running program writes: database, lock, its own FLWR_HOME."""
        return self.folder / "state"


@dataclass(frozen=True)
class ServerKit(_Kit):
    """A server's folder: who it is, whom it lets in, and where its own state lives."""

    address: Address
    sites: tuple[str, ...]

    @property
    def certificate(self) -> Path:
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    def node_key(self, site: str) -> Path:
        return self.folder / "nodes" / f"{site}.pub"

    @classmethod
    def load(cls, folder: Path) -> "ServerKit":
        table = _kit_table(folder, _ServerTable)
        kit = cls(folder.resolve(), table.server, tuple(table.sites))
        _require(kit.authority, kit.certificate, kit.key, kit.secret, *(kit.node_key(s) for s in kit.sites))
        return kit


@dataclass(frozen=True)
class SiteKit(_Kit):
    """A site's folder: its name, its key, and the server it trusts."""

    name: str
    address: Address
    budget: Budget | None = None

    @property
    def key(self) -> Path:
        return self.folder / "node.key"

    @property
    def ledgers(self) -> Path:
        """What this site's clients have spent of their privacy, a file each."""
        return self.state / "ledgers"

    @property
    def memory(self) -> Path:
        """What this site's clients keep from one round of a run to the next."""
        return self.state / "memory"

    @staticmethod
    def table(folder: Path) -> "SiteTable":
        """What a folder's kit.toml says; the rest of the kit need not be there."""
        return _kit_table(folder, SiteTable)

    @classmethod
    def load(cls, folder: Path) -> "SiteKit":
        table = cls.table(folder)
        kit = cls(folder.resolve(), table.name, table.server, table.budget)
        _require(kit.authority, kit.key, kit.secret)
        return kit


def server_table(address: Address, sites: list[str]) -> str:
    """The text of a server's kit.toml; JSON strings of ASCII names are TOML strings too."""
    return f"sites = {json.dumps(sites)}\n\n{_address_table(address)}"


def site_table(name: str, address: Address) -> str:
    """The text of a site's kit.toml."""
    return f"name = {json.dumps(name)}\n\n{_address_table(address)}"


def _address_table(address: Address) -> str:
    return f"[server]\nhost = {json.dumps(address.host)}\nport = {address.port}\n"


TableT = TypeVar("TableT", bound=BaseModel)


def _kit_table(folder: Path, model: type[TableT]) -> TableT:
    if not (folder / "kit.toml").is_file():
        raise ConfigError(
            f"{folder}: is no kit (it has no kit.toml); atoll provision makes kits, and after atoll enroll"
            " atoll accept does"
        )
    kinds = {"sites": "the server's kit", "name": "a site's kit"}
    others = [key for key in kinds if key in read_toml(folder / "kit.toml") and key not in model.model_fields]
    if others:
        wanted = next(kind for key, kind in kinds.items() if key in model.model_fields)
        raise ConfigError(f"{folder}: {kinds[others[0]]}, expected {wanted}")
    return read_table(folder / "kit.toml", model)


def read_table(path: Path, model: type[TableT]) -> TableT:
    """A TOML file as its model; every way it can be wrong is one line that names file and key."""
    table = read_toml(path)
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(explain(error, model, str(path))) from None


def _require(*paths: Path) -> None:
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: missing from the kit")
