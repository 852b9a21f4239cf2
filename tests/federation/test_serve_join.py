"""A server and its sites as real processes, over real TLS on loopback."""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from protocol.child import free_port
from protocol.code import ROOMS
from protocol.errors import ConfigError, JobError
from protocol.kit import ServerKit
from server.provision import provision
from server.serve import runtime_path, serve
from server.submit import logs, status, stop, submit

pytestmark = [pytest.mark.federation, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SECRET = "Ann Smith"
SCRIPT = """
import logging, sys, signal
from pathlib import Path
from protocol.errors import JobError
logging.basicConfig(level=logging.INFO)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    {call}
except JobError as error:
    sys.exit(f"error: {{error}}")
"""


@dataclass
class Running:
    """One of our processes and what it wrote."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=30)


@dataclass
class Federation:
    """Kits for four sites, and whatever was started with them."""

    folder: Path
    kits: dict[str, Path]
    running: dict[str, Running] = field(default_factory=dict)
    count: int = 0

    @property
    def server(self) -> Path:
        return self.kits["server"]

    def start(self, name: str, call: str, cwd: Path = ROOT) -> Running:
        self.count += 1
        log = self.folder / f"{self.count}-{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(call=call)],
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[name] = Running(process, log)
        return self.running[name]

    def serve(self) -> Running:
        return self.start("server", f"from server.serve import serve; serve(Path({str(self.server)!r}))")

    def join(self, site: str, *, kit: Path | None = None, cwd: Path = ROOT) -> Running:
        data = self.folder / "data" / site
        data.mkdir(parents=True, exist_ok=True)
        paths = f"Path({str(kit or self.kits[site])!r}), Path({str(data)!r})"
        return self.start(site, f"from client.join import join; join({paths})", cwd)

    def online(self) -> tuple[str, ...]:
        try:
            return status(self.server).online
        except JobError:
            return ()

    def wait_online(self, *sites: str) -> None:
        wait_until(lambda: set(sites) <= set(self.online()), 60, f"{sites} to connect")

    def job(self, sites: int, rounds: int = 1, **more: Any) -> str:
        return json.dumps({"sites": sites, "rounds": rounds, **more})

    def run(self, sites: int, rounds: int = 1, **more: Any) -> list[dict[str, Any]]:
        """Submit a toy job, wait for its end, and return what its rounds brought back."""
        out = self.folder / f"out-{self.count}-{time.monotonic_ns()}"
        submit(self.job(sites, rounds, **more), self.server, out=out)
        written: list[dict[str, Any]] = json.loads((out / "rounds.json").read_text())
        return written

    def submit(self, out: Path, rounds: int, **more: Any) -> Running:
        """Submit in a process of its own."""
        arguments = f"{self.job(2, rounds, **more)!r}, Path({str(self.server)!r}), out=Path({str(out)!r})"
        return self.start("submit", f"from server.submit import submit; submit({arguments})")

    def processes(self) -> list[str]:
        """The command line of every process that was started with one of these kits."""
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in line:
                lines.append(line)
        return lines


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def provisioned(folder: Path, port: int) -> dict[str, Path]:
    names = ("north", "south", "east", "west")
    text = f'[server]\nhost = "127.0.0.1"\nport = {port}\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sites.toml").write_text(text + "".join(f'[[site]]\nname = "{name}"\n' for name in names))
    return {kit.name: kit for kit in provision(folder / "sites.toml", folder / "kits")}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with two sites, north and south."""
    folder = tmp_path_factory.mktemp("federation")
    made = Federation(folder, provisioned(folder, free_port()))
    try:
        made.serve()
        made.join("north")
        made.join("south")
        made.wait_online("north", "south")
        yield made
    finally:
        for running in made.running.values():
            if running.process.poll() is None:
                running.process.terminate()
        for running in made.running.values():
            try:
                running.process.wait(timeout=25)
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)


def test_a_job_brings_exact_arrays_back_from_every_site(federation: Federation) -> None:
    rounds = federation.run(2, rounds=3)
    assert [sorted(r["replies"]) for r in rounds] == [["north", "south"]] * 3
    for number, done in enumerate(rounds, start=1):
        for name, reply in done["replies"].items():
            assert (reply["name"], reply["exact"]) == (name, True)
            assert reply["data"] == str(federation.folder / "data" / name)
            assert reply["rounds"] == number  # the run's context lives on between rounds


def test_a_warm_round_takes_less_than_six_seconds(federation: Federation) -> None:
    seconds = [done["seconds"] for done in federation.run(2, rounds=4)][1:]
    assert sorted(seconds)[1] < 6


def test_a_new_run_starts_with_an_empty_context(federation: Federation) -> None:
    replies = federation.run(2)[0]["replies"]
    assert [reply["rounds"] for reply in replies.values()] == [1, 1]


def ask(port: int, authority: Path, path: str, method: str = "POST") -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        connection.request(method, path, body=b"", headers={"content-type": "application/protobuf"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


FORBIDDEN = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "//v1/fleet/pull-messages",
    "/v1/fleet/",
    "/docs",
    "/health",
    "/",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_the_public_port_leads_to_the_sites_calls_only(federation: Federation, path: str) -> None:
    kit = ServerKit.load(federation.server)
    for method in ("POST", "GET"):
        code, body = ask(kit.address.port, kit.authority, path, method)
        assert (code, body[:14]) == (403, b"this port is f")


def test_control_answers_on_loopback_so_the_gate_is_what_hides_it(federation: Federation) -> None:
    kit = ServerKit.load(federation.server)
    control = json.loads(runtime_path(kit).read_text())["control"]
    assert ask(int(control.split(":")[1]), kit.authority, "/v1/control/list-runs")[0] == 200
    assert ask(kit.address.port, kit.authority, "/v1/fleet/pull-messages")[0] == 401


def test_a_failing_site_costs_its_reply_only_and_tells_no_data(federation: Federation) -> None:
    replies = federation.run(2, config={"fail": "south", "secret": SECRET})[0]["replies"]
    assert replies["south"] == {"error": "ValueError; the site's log has the rest"}
    assert replies["north"]["exact"]


def test_a_run_that_fails_at_the_server_is_an_error(federation: Federation) -> None:
    with pytest.raises(JobError, match="failed: ServerApp failed with exception: the toy was asked to fail"):
        federation.run(2, fail_server=True)


def test_logs_can_be_read_again_and_an_unknown_run_is_named(federation: Federation) -> None:
    lines: list[str] = []
    federation.run(2)
    run = logs(federation.server, status(federation.server).runs[0].run_id, show=lines.append)
    assert run.completed
    assert any("round 1:" in line for line in lines)
    with pytest.raises(JobError, match="Run ID not found"):
        logs(federation.server, 12345, show=lines.append)


def test_submit_can_be_left_and_its_run_stopped(federation: Federation) -> None:
    out = federation.folder / "left"
    left = federation.submit(out, rounds=500)
    wait_until((out / "rounds.json").exists, 40, "the first round")
    left.process.send_signal(signal.SIGINT)
    assert left.process.wait(timeout=10) != 0
    assert "goes on" in left.text() and f"atoll stop {runs_id(federation)}" in left.text()
    assert not status(federation.server).runs[0].finished
    assert stop(federation.server, runs_id(federation)).outcome == "stopped"


def runs_id(federation: Federation) -> int:
    return status(federation.server).runs[0].run_id


def test_a_site_with_other_code_is_refused_and_says_which_file(federation: Federation) -> None:
    other = federation.folder / "other-code"
    for room in ROOMS:
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "client" / "app.py").open("a") as file:
        file.write("# one line more\n")
    federation.join("east", cwd=other)
    federation.wait_online("east")
    replies = federation.run(3)[0]["replies"]
    federation.running["east"].end()
    assert "different: client/app.py" in replies["east"]["error"]
    assert "different: client/app.py" in federation.running["east"].text()
    assert replies["north"]["exact"] and replies["south"]["exact"]


def test_a_site_of_another_authority_is_refused(federation: Federation) -> None:
    port = ServerKit.load(federation.server).address.port
    other = provisioned(federation.folder / "other-authority", port)
    refused = federation.join("west", kit=other["west"])
    assert refused.process.wait(timeout=30) != 0
    assert "is not the one of this kit" in refused.text()


def test_a_stranger_key_is_refused(federation: Federation) -> None:
    stranger = provisioned(federation.folder / "stranger", ServerKit.load(federation.server).address.port)
    shutil.copy(ServerKit.load(federation.server).authority, stranger["west"] / "ca.crt")
    refused = federation.join("west", kit=stranger["west"])
    wait_until(lambda: "refused by the server" in refused.text(), 40, "the refusal")
    assert "west" not in federation.online()
    assert refused.end() == 0


def test_a_killed_site_rejoins(federation: Federation) -> None:
    killed = federation.running["south"].process
    killed.kill()
    killed.wait()
    federation.join("south")
    wait_until(lambda: "south" not in federation.online(), 20, "south to be gone")
    federation.wait_online("north", "south")
    assert all(reply["exact"] for reply in federation.run(2)[0]["replies"].values())


def test_a_run_survives_a_killed_superlink(federation: Federation) -> None:
    out = federation.folder / "survivor"
    submitted = federation.submit(out, rounds=6)
    wait_until((out / "rounds.json").exists, 40, "the first round")
    os.kill(pid_of(federation, "flower_superlink"), signal.SIGKILL)
    assert submitted.process.wait(timeout=80) == 0, submitted.text()
    assert len(json.loads((out / "rounds.json").read_text())) == 6


def pid_of(federation: Federation, program: str) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        line = path.read_bytes()
        if program.encode() in line and str(federation.server).encode() in line:
            return int(path.parent.name)
    raise AssertionError(f"no {program}")


def test_a_server_can_be_restarted_under_its_sites(federation: Federation) -> None:
    assert federation.running["server"].end() == 0
    federation.serve()
    federation.wait_online("north", "south")
    assert all(reply["exact"] for reply in federation.run(2)[0]["replies"].values())


def test_a_site_that_leaves_in_the_middle_of_its_work_says_so(federation: Federation) -> None:
    working, out = federation.folder / "data" / "north" / "working", federation.folder / "leaving"
    working.unlink()
    submitted = federation.submit(out, rounds=1, config={"sleep": 5.0})
    wait_until(working.exists, 40, "north to work")
    assert federation.running["north"].end() == 0
    assert submitted.process.wait(timeout=40) == 0, submitted.text()
    replies = json.loads((out / "rounds.json").read_text())[0]["replies"]
    assert replies["north"] == {"error": "the site is leaving"}
    assert replies["south"]["exact"]
    federation.join("north")
    federation.wait_online("north")


def test_a_second_server_and_a_second_site_on_one_kit_are_refused(federation: Federation) -> None:
    pid = federation.running["server"].process.pid
    with pytest.raises(ConfigError, match=f"a server already runs on this kit, pid {pid}"):
        serve(federation.server)
    pid = federation.running["north"].process.pid
    second = federation.start("second", join_call(federation, "north"))
    assert second.process.wait(timeout=30) != 0
    assert f"a site already runs on this kit, pid {pid}" in second.text()


def join_call(federation: Federation, site: str) -> str:
    return f"from client.join import join; join(Path({str(federation.kits[site])!r}), Path('.'))"


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        kits = provisioned(tmp_path, port)
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}: Address already in use"):
            serve(kits["server"])


def test_no_server_on_the_kit_is_said(tmp_path: Path) -> None:
    kits = provisioned(tmp_path, free_port())
    with pytest.raises(ConfigError, match="no server runs on this kit"):
        status(kits["server"])


def test_sigterm_leaves_no_process_behind_and_logs_hold_no_data(federation: Federation) -> None:
    """The last of this file: it ends the federation."""
    ended = {name: running.end() for name, running in federation.running.items() if name in federation.kits}
    assert (ended["server"], ended["north"], ended["south"]) == (0, 0, 0)
    wait_until(lambda: not federation.processes(), 10, f"the end of {federation.processes()}")
    logged = "".join(path.read_text(errors="replace") for path in federation.folder.glob("*.log"))
    assert "ready on" in logged and SECRET not in logged
    assert str(federation.folder / "data") not in logged
