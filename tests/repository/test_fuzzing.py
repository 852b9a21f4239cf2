"""`make fuzz` ends well, and an error that a parser doesn't catch ends it with the case in a file."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(900)]

SPOILT = """
import tests.protocol.fuzzing as fuzzing
assert len(fuzzing.valid_cases()) == len(fuzzing.READERS)
for case in fuzzing.valid_cases():
    fuzzing.play(case)

def spoilt(head, body):
    if head[:2] == "{}":
        raise KeyError("planted")

fuzzing.READERS = (spoilt,)
fuzzing.main()
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    path = {"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, check=False)


def test_messages_that_atheris_makes_up_are_refused_or_read(tmp_path: Path) -> None:
    played = python(tmp_path, "-m", "tests.protocol.fuzzing", "--cases", "5000")
    assert played.returncode == 0, played.stderr[-2000:]
    assert "stat::number_of_executed_units: 5000" in played.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_that_no_parser_catches_is_found_and_can_be_played_again(tmp_path: Path) -> None:
    found = python(tmp_path, "-c", SPOILT, "--cases", "1000000")
    assert found.returncode not in (0, 1) and "KeyError: 'planted'" in found.stdout + found.stderr
    (case,) = tmp_path.glob("crash-*")
    again = python(tmp_path, "-c", SPOILT, str(case))
    assert again.returncode == 1 and "KeyError: 'planted'" in again.stderr
