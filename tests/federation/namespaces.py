"""Network namespaces: a machine of its own for the server and for each site, joined by real links.

A link can lose packets (nft), be narrow (tc) or be cut (ip). It takes Linux, root, iproute2 and nftables.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMESPACE = "ATOLL_TEST_NAMESPACE"
NAMES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
SERVER = "10.77.0.1"
_numbers = itertools.count()


def missing() -> str:
    """What this machine lacks for network namespaces; empty if it has everything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [program for program in ("ip", "tc", "nft") if shutil.which(program) is None]:
        return f"network namespaces need {', '.join(absent)}"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"network namespaces can't be made here: {done.stderr.strip()}" if done.returncode else ""


def run(*command: str) -> None:
    """Raises AssertionError with what the command wrote, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


@dataclass
class Network:
    """A namespace with a bridge for the server, and one for each site, linked to it."""

    sites: Sequence[str]
    label: str = field(default_factory=lambda: f"atoll-{os.getpid()}-{next(_numbers)}")

    def namespace(self, place: str) -> str:
        return f"{self.label}-{place}"

    def make(self) -> None:
        server = self.namespace("server")
        run("ip", "netns", "add", server)
        run("ip", "-n", server, "link", "set", "lo", "up")
        run("ip", "-n", server, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", server, "address", "add", f"{SERVER}/24", "dev", "bridge")
        run("ip", "-n", server, "link", "set", "bridge", "up")
        for number, site in enumerate(self.sites):
            space = self.namespace(site)
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
            end = self.link(site)
            run(
                "ip", "-n", server, "link", "add", end, "type", "veth", "peer", "name", "wire", "netns", space
            )
            run("ip", "-n", server, "link", "set", end, "master", "bridge", "up")
            run("ip", "-n", space, "address", "add", f"10.77.0.{number + 2}/24", "dev", "wire")
            run("ip", "-n", space, "link", "set", "wire", "up")

    def unmake(self) -> None:
        for path in NAMES.glob(f"{self.label}-*"):
            run("ip", "netns", "delete", path.name)

    def link(self, site: str) -> str:
        """The server's end of a site's link."""
        return f"link{self.sites.index(site)}"

    def lose(self, site: str, percent: int) -> None:
        """From now on the link loses so many packets of a hundred, drawn by chance, each way."""
        self._filter(site, f"meta l4proto tcp numgen random mod 100 < {percent} drop")

    def reset(self, site: str) -> None:
        """From now on all that the site sends is answered by a reset."""
        self._filter(site, "meta l4proto tcp reject with tcp reset")

    def silence(self, site: str, hook: str) -> None:
        """From now on nothing gets through one way: `input` to the site, `output` from it."""
        self._filter(site, "meta l4proto tcp drop", (hook,))

    def _filter(self, site: str, rule: str, hooks: Sequence[str] = ("input", "output")) -> None:
        sides = {"input": "iifname", "output": "oifname"}
        chains = "; ".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {sides[hook]} wire {rule}; }}"
            for hook in hooks
        )
        run("ip", "netns", "exec", self.namespace(site), "nft", f"table inet faults {{ {chains}; }}")

    def narrow(self, site: str, rate: str) -> None:
        """From now on no more goes over the link each way, such as `1mbit` a second."""
        limit = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        run("tc", "-n", self.namespace(site), "qdisc", "replace", "dev", "wire", *limit)
        run("tc", "-n", self.namespace("server"), "qdisc", "replace", "dev", self.link(site), *limit)

    def cut(self, site: str) -> None:
        """Take the link down, at the server's end: the site isn't told."""
        run("ip", "-n", self.namespace("server"), "link", "set", self.link(site), "down")

    def mend(self, site: str) -> None:
        """Undo what was cut or filtered."""
        run("ip", "-n", self.namespace("server"), "link", "set", self.link(site), "up")
        run("ip", "netns", "exec", self.namespace(site), "nft", "flush ruleset")

    def options(self, place: str) -> dict[str, Any]:
        """How a verb is started there, for `tests.support.processes.atoll`."""
        return {
            "main": "tests.federation.namespaces:main",
            "env": {NAMESPACE: self.namespace(place)},
        }


@contextmanager
def network_of(*sites: str) -> Iterator[Network]:
    """Namespaces for a server and these sites, for the time of the block."""
    network = Network(sites)
    try:
        network.make()
        yield network
    finally:
        network.unmake()


def main() -> None:
    """A verb in the namespace that the environment names."""
    _enter()
    from atoll.cli.start import main as start

    start()


def program() -> None:
    """A program that a process in a namespace has started: the entry is the first argument."""
    _enter()
    entry = sys.argv.pop(1)
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)()


def _enter() -> None:
    """Move this process, and all that it starts, into the namespace.

    Processes come from a fork server that lies outside, and so each has to move by itself.
    """
    import atoll.server.deploy.executor
    import atoll.system.child_process
    from atoll.system.fork_server import start_program

    def start_inside(entry: str, arguments: tuple[str, ...], **options: Any) -> Any:
        return start_program("tests.federation.namespaces:program", (entry, *arguments), **options)

    place = os.open(NAMES / os.environ[NAMESPACE], os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(place, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.environ[NAMESPACE])
    finally:
        os.close(place)
    for module in (atoll.server.deploy.executor, atoll.system.child_process):
        vars(module)["start_program"] = start_inside
