"""A server and its sites as real processes, over real TLS on loopback: who may do what, and what is said."""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from atoll.errors import ConfigError, JobError
from atoll.kit.kit import ServerKit
from atoll.kit.roster import SIGNATURE, TABLE
from atoll.server.deploy.flower_control import _APP, _MODULE, FlowerControlClient
from atoll.server.deploy.serve import runtime_path, serve
from atoll.server.deploy.status import status
from atoll.server.deploy.submit import follow, logs, stop
from atoll.server.deploy.superlink import HEADER, token_path
from atoll.system.audit_file import FILE
from atoll.system.child_process import free_port
from tests.federation.conftest import CLIENTS, SECRET, Ring, job, weights_home
from tests.federation.places import provisioned, result_of, rounds_of
from tests.server.deploy.test_health import probe, states
from tests.support.processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def ask(port: int, authority: Path, path: str, method: str = "POST", token: str = "") -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    headers = {"content-type": "application/protobuf"} | ({HEADER: token} if token else {})
    try:
        connection.request(method, path, body=b"", headers=headers)
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
def test_the_public_port_leads_to_the_sites_calls_only(ring: Ring, path: str) -> None:
    kit = ServerKit.load(ring.federation.server)
    for method in ("POST", "GET"):
        code, body = ask(kit.address.port, kit.authority, path, method)
        assert (code, body[:14]) == (403, b"this port is f")


def test_control_answers_on_loopback_whoever_has_the_token_and_nobody_else(ring: Ring) -> None:
    """Row 1 of what a local user without a kit could do: list runs, and start one with code of their own."""
    kit = ServerKit.load(ring.federation.server)
    port = int(json.loads(runtime_path(kit).read_text())["control"].split(":")[1])
    token = token_path(kit).read_text()
    assert token_path(kit).stat().st_mode & 0o777 == 0o600
    for path in ("/v1/control/list-runs", "/v1/control/start-run", "/docs", "/openapi.json"):
        method = "POST" if path.startswith("/v1") else "GET"
        for wrong in ("", token[:-1], "0" * len(token)):
            assert ask(port, kit.authority, path, method, wrong) == (
                401,
                b"this needs the token of the server's user",
            )
    assert ask(port, kit.authority, "/v1/control/list-runs", token=token)[0] == 200
    assert ask(port, kit.authority, "/v1/fleet/../control/list-runs")[0] in (401, 404)
    assert ask(port, kit.authority, "/v1/runtime/acquire-task")[0] == 401
    assert ask(kit.address.port, kit.authority, "/v1/fleet/pull-messages")[0] == 401


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_run_executes_the_installed_server_app_whatever_its_bundle_holds(
    ring: Ring, tmp_path: Path
) -> None:
    kit, seen = ServerKit.load(ring.federation.server), tmp_path / "seen"
    files = {
        "pyproject.toml": _APP.format(version="1.0.0").encode(),
        "server_app.py": f"open({str(seen)!r}, 'w')\n{_MODULE.format(side='server')}".encode(),
        "client_app.py": _MODULE.format(side="client").encode(),
        "hashes.json": b"{}",
    }
    control = FlowerControlClient(json.loads(runtime_path(kit).read_text())["control"], kit)
    try:
        run = control.start(build_fab_from_files(files)[0], "no job", str(tmp_path / "out"))
        wait_until(lambda: control.run(run).finished, "the end of a run without a job")
        end = control.run(run)
    finally:
        control.close()
    assert (end.outcome, end.died) == ("failed", False) and "job" in end.details  # Atoll's own words
    assert not seen.exists() and not (tmp_path / "out").exists()


def test_sites_that_cannot_take_part_are_named_and_tell_neither_data_nor_paths(ring: Ring) -> None:
    federation = ring.whole()
    code, unlabelled = federation.folder / "code", federation.folder / SECRET
    shutil.copytree(ROOT / "atoll", code / "atoll", ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "atoll" / "client" / "app.py").open("a") as file:
        file.write("# one line more\n")
    unlabelled.mkdir()
    (unlabelled / "data.csv").write_text(f"image,{SECRET}\nscan.png,7\n")
    shutil.copy(next((ring.shards / "client-0000").rglob("*.png")), unlabelled / "scan.png")
    weights = weights_home(federation.folder / "other weights", seed=2)
    shard = ring.shards / "client-0000"
    others = [
        federation.join_with(code, "other-code", shard),
        federation.join("no-labels", unlabelled),
        federation.join("other-weights", shard, env={"TORCH_HOME": str(weights)}),
    ]
    for other in others:
        other.says("is connected")
    lines: list[str] = []
    result = federation.run(job(federation={"clients": 6, "rounds": 1}), show=lines.append)
    ends = [other.end() for other in others]
    said = "\n".join(lines)
    assert "other-code does not take part: site other-code: the run's code is not" in said
    assert "different: client/app.py" in said
    assert "no-labels does not take part: its data cannot be used for this job; the site's log says" in said
    ((name, reason),) = result["rounds"][0]["set_aside"].items()
    assert name == "other-weights"
    assert reason.startswith("backbone squeezenet1_1: these weights are not the run's")
    assert "(a path at the site)" in reason
    # The bits are as if they weren't there.
    assert result["model_sha256"] == ring.expected(job(federation={"rounds": 1}))
    told = said + json.dumps(result) + federation.running["server"].text()
    assert SECRET not in told and "other weights" not in told and str(ring.shards) not in told
    assert "different: client/app.py" in others[0].text()
    assert f"columns ['image', '{SECRET}'], expected one for the label" in others[1].text()
    assert str(weights) in others[2].text()
    assert ends == [0, 0, 0]


def test_a_run_outlives_its_submitter_and_the_superlink_to_the_bits_of_the_simulation(ring: Ring) -> None:
    federation, setting = ring.whole(), job(federation={"rounds": 3})
    out = federation.folder / "left"
    held = [ring.hold("digits", round) for round in (2, 3)]
    left = federation.submit(setting, out)
    left.says("round 1 ")
    left.process.send_signal(signal.SIGINT)
    assert left.ends() != 0
    run = federation.latest()
    assert f"run {run} goes on" in left.text() and f"atoll stop {run}" in left.text()
    assert f"clients   {', '.join(CLIENTS)}" in left.text() and "\x1b" not in left.text()
    assert not status(federation.server).runs[0].finished
    held[0].unlink()
    wait_until(lambda: len(rounds_of(out)) >= 2, "a second round")
    os.kill(federation.pid_of("atoll superlink"), signal.SIGKILL)
    federation.running["server"].says("the superlink ended; starting it again")
    held[1].unlink()
    followed: list[str] = []
    assert follow(federation.server, run, show=followed.append).completed
    result = result_of(out)
    assert result["model_sha256"] == ring.expected(setting)
    assert set(result["final"]["clients"]) == set(CLIENTS)
    site = federation.running["pair"].text()
    assert "round 2 of digits: train client-0001, client-0002: done in" in site and "\x1b" not in site
    again: list[str] = []
    assert logs(federation.server, run, show=again.append).completed
    assert any("round 2 " in line for line in again)
    assert any("round 2 " in line for line in followed)
    with pytest.raises(JobError, match="no run of this id is known here"):
        logs(federation.server, 12345, show=again.append)


def test_health_follows_the_superlink_and_a_run(ring: Ring) -> None:
    federation = ring.whole()
    health = status(federation.server).health
    assert f"health is answered on {health} (gRPC)" in federation.running["server"].text()
    with probe(health) as stub:
        server = states(stub, "atoll.federation")
        assert next(server) == "SERVING"
        os.kill(federation.pid_of("atoll superlink"), signal.SIGKILL)
        assert (next(server), next(server)) == ("NOT_SERVING", "SERVING")

        waiting = job("waiting", federation={"clients": 9, "wait": 600})  # more than there are
        submitted = federation.submit(waiting, federation.folder / "waiting")
        submitted.says("waiting   3 of 9 clients are here")
        stands = status(federation.server)
        run = stands.runs[0].run_id
        assert (stands.going_on, stands.trouble, stands.known) == ({run}, "", True)
        of_run = states(stub, f"atoll.run.{run}")
        assert next(of_run) == "SERVING"
        assert stop(federation.server, run).outcome == "stopped"
        assert next(of_run) == "NOT_SERVING"
        assert submitted.ends() == 1 and status(federation.server).going_on == set()


def test_a_site_of_another_authority_is_refused(ring: Ring, tmp_path: Path) -> None:
    port = ServerKit.load(ring.federation.server).address.port
    other = provisioned(tmp_path, ("west",), port)
    refused = ring.federation.join("west", ring.shards / "client-0000", kit=other["west"])
    assert refused.ends() == 1
    assert "is not the one of this kit" in refused.text()


def test_a_stranger_key_is_refused(ring: Ring, tmp_path: Path) -> None:
    kit = ServerKit.load(ring.federation.server)
    stranger = provisioned(tmp_path, ("west",), kit.address.port)
    for part in ("ca.crt", TABLE, SIGNATURE):  # all that any site of the federation has, but for its key
        shutil.copy(kit.folder / part, stranger["west"] / part)
    refused = ring.federation.join("west", ring.shards / "client-0000", kit=stranger["west"])
    refused.says("refused by the server")
    assert "west" not in ring.federation.online()
    assert refused.end() == 0


def test_a_second_server_and_a_second_site_on_one_kit_are_refused(ring: Ring) -> None:  # rows 28, 29
    ring.alone()
    pid = ring.federation.running["server"].process.pid
    with pytest.raises(ConfigError, match=f"a server already runs on this kit, pid {pid}"):
        serve(ring.federation.server)
    pid = ring.federation.running["client-0000"].process.pid
    second = ring.federation.join("second", ring.shards, kit=ring.federation.kits["client-0000"])
    assert second.ends() == 2
    assert f"a site already runs on this kit, pid {pid}" in second.text()


def test_a_copy_of_a_kit_is_refused_while_its_site_is_connected(ring: Ring) -> None:  # row 29
    ring.alone()
    copy = shutil.copytree(
        ring.federation.kits["client-0000"],
        ring.federation.folder / "copied-kit",
        ignore=shutil.ignore_patterns("state"),
    )
    second = ring.federation.join("copied", ring.shards / "client-0000", kit=copy)
    second.says("it is connected from elsewhere")
    ring.federation.running["server"].says(
        "client-0000 asked from 127.0.0.1 to connect while it is connected"
    )
    assert second.end() == 0
    refused = {"asked": "connection", "decision": "refused", "site": "client-0000"}
    logged = ring.federation.server / "state" / FILE
    wait_until(
        lambda: refused.items() <= json.loads(logged.read_text().splitlines()[-1]).items(),
        "a line in its log",
    )
    assert "client-0000" in ring.federation.online()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:  # row 30
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        kits = provisioned(tmp_path, ("west",), port)
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}: Address already in use"):
            serve(kits["server"])


def test_no_server_on_the_kit_is_said(tmp_path: Path) -> None:
    kits = provisioned(tmp_path, ("west",), free_port())
    with pytest.raises(ConfigError, match="no server runs on this kit"):
        status(kits["server"])


def test_sigterm_leaves_no_process_behind_and_the_servers_log_holds_no_data(ring: Ring) -> None:
    """The last of this file: it ends the federation."""
    federation = ring.whole()
    ended = {name: federation.running[name].end() for name in ("client-0000", "pair", "server")}
    assert ended == {"client-0000": 0, "pair": 0, "server": 0}
    wait_until(lambda: not federation.processes(), f"the end of {federation.processes()}")
    logged = "".join(path.read_text(errors="replace") for path in federation.folder.glob("*-server.log"))
    assert ("this server runs as root" in logged) == (os.geteuid() == 0)
    assert "ready on" in logged and SECRET not in logged and str(ring.shards) not in logged
