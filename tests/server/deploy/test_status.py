"""`atoll status`: what the server answers on its kit's socket, and how little asking needs."""

from __future__ import annotations

import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError, JobError
from atoll.server.deploy.flower_control import _one_line
from atoll.server.deploy.status import Federation, Run, answering, no_server, short_path, status
from atoll.server.deploy.submit import control_address
from atoll.system.child_process import free_port
from atoll.system.lock import hold
from tests.federation.places import provisioned

ROOT = Path(__file__).parents[3]
STANDS = Federation(
    online=("north",),
    offline=("south", "west"),
    runs=(
        Run(12, "running", "", "", "2026-01-02T03:04:05+00:00"),
        Run(11, "finished", "failed", "round 2: 1 of 3 [usable] updates", ""),
    ),
    going_on=frozenset({12}),
    trouble="",
    health="127.0.0.1:50051",
)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    made = provisioned(tmp_path, ("north", "south", "west"), free_port())["server"]
    (made / "state").mkdir()
    return made


def test_what_the_server_says_arrives_whole(kit: Path) -> None:
    with answering(kit / "state", lambda: STANDS):
        assert status(kit) == status(kit) == STANDS


def test_an_answer_is_made_when_it_is_asked_for_however_long_it_is(kit: Path) -> None:
    asked: list[Federation] = []

    def answer() -> Federation:
        run = Run(len(asked), "running", "", "x" * 1_000_000, "")
        asked.append(Federation((), (), (run,), frozenset(), "", "here"))
        return asked[-1]

    with answering(kit / "state", answer):
        assert not asked
        assert [status(kit).runs[0].run_id for _ in range(3)] == [0, 1, 2]
    assert status_fails(kit)


def test_the_socket_is_its_owners_alone_and_its_path_may_be_long(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    made = provisioned(folder, ("north",), free_port())["server"]
    (made / "state").mkdir()
    assert len(str(made)) > 160
    with answering(made / "state", lambda: STANDS):
        mode = (made / "state" / "status.sock").stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
        assert status(made) == STANDS


def status_fails(kit: Path) -> bool:
    with pytest.raises(ConfigError, match=f"no server runs on this kit; start one with: atoll serve {kit}"):
        status(kit)
    return True


def test_a_server_that_was_killed_is_none_and_its_socket_is_no_hindrance(kit: Path) -> None:
    assert status_fails(kit)
    with socket.socket(socket.AF_UNIX) as left, short_path(kit / "state") as path:
        left.bind(f"{path}/status.sock")
    assert status_fails(kit)
    with answering(kit / "state", lambda: STANDS):
        assert status(kit) == STANDS


def test_a_command_that_is_proposed_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "my kit"
    said = str(no_server(folder))
    assert shlex.split(said.partition("start one with: ")[2]) == ["atoll", "serve", str(folder)]


def test_a_server_that_is_starting_is_told_and_waited_for(kit: Path) -> None:
    told: list[str] = []
    with hold(kit / "state" / "serve.lock") as lock:
        with pytest.raises(JobError, match="the server on this kit is starting"):
            status(kit)

        def tell(line: str) -> None:
            told.append(line)
            (kit / "state" / "serve.json").write_text('{"control": "127.0.0.1:4711", "health": ""}')

        assert control_address(kit, tell) == "127.0.0.1:4711"
        (kit / "state" / "serve.json").unlink()
        with pytest.raises(ConfigError, match="no server runs on this kit"):
            control_address(kit, lambda line: lock.close())  # it ends before it is ready
    assert told == [f"the server on {kit} is starting; waiting for it"]


@pytest.mark.parametrize(
    ("code", "kind", "said"), [(16, ConfigError, "no run of this id"), (9, JobError, "code 9")]
)
def test_a_run_that_nobody_knows_is_bad_input(code: int, kind: type[JobError], said: str) -> None:
    asked = httpx.Request("POST", "http://127.0.0.1/")
    answer = httpx.Response(404, json={"code": code, "detail": "no\nsuch thing"}, request=asked)
    with pytest.raises(JobError, match=said) as caught, _one_line("127.0.0.1"):
        answer.raise_for_status()
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_an_answer_that_cannot_be_made_costs_the_next_one_nothing(kit: Path) -> None:
    answers = iter([JobError("refused"), KeyError("a bug"), STANDS])

    def answer() -> Federation:
        made = next(answers)
        if isinstance(made, Exception):
            raise made
        return made

    with answering(kit / "state", answer):
        for _ in range(2):
            with pytest.raises(JobError, match="is ending, or of another version"):
                status(kit)
        assert status(kit) == STANDS


def status_lines(kit: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert command_line(["status", "--server", str(kit)]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_the_verb_tells_sites_health_and_runs(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(kit / "state", lambda: STANDS):
        lines = status_lines(kit, capsys)
    assert lines[:4] == [
        "online   north",
        "offline  south, west",
        "health   serving",
        "         answered on 127.0.0.1:50051 (gRPC)",
    ]
    (going_on,) = (line for line in lines if " 12 " in line)
    (ended,) = (line for line in lines if " 11 " in line)
    assert "running" in going_on and " serving" in going_on and "not serving" not in going_on
    assert "failed" in ended and "not serving" in ended and "round 2: 1 of 3 [usable] updates" in ended


def test_the_verb_says_why_no_job_can_be_submitted(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = Federation((), (), (), frozenset(), "the superlink ended", "127.0.0.1:50051", known=False)
    with answering(kit / "state", lambda: down):
        assert status_lines(kit, capsys)[:3] == [
            "online   unknown",
            "offline  unknown",
            "health   not serving: the superlink ended",
        ]


def test_where_no_server_runs_the_verb_says_so_in_one_line(
    kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["status", "--server", str(kit)]) == 2
    said = f"error: {kit}: no server runs on this kit; start one with: atoll serve {kit}\n"
    assert capsys.readouterr().err == said


HEAVY = ("torch", "transformers", "datasets", "flwr", "torchmetrics", "matplotlib")
ASK = """
import sys
from atoll.server.deploy.status import status
from pathlib import Path
print(status(Path(sys.argv[1])).online, [name for name in {heavy} if name in sys.modules])
"""
VERB = """
import sys
from atoll.cli.main import run
code = run(["status", "--server", sys.argv[1]])
print(code, [name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize(("program", "first"), [(ASK, "('north',)"), (VERB, "0")])
@pytest.mark.processes
def test_asking_imports_neither_flower_nor_torch(kit: Path, program: str, first: str) -> None:
    with answering(kit / "state", lambda: STANDS):
        done = subprocess.run(
            [sys.executable, "-c", program.format(heavy=HEAVY), str(kit)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{first} []"
