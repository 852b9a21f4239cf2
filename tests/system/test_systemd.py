"""Units of systemd: what they run, and whether systemd reads the words back as they are."""

from __future__ import annotations

import configparser
import getpass
import shlex
from pathlib import Path

import pytest

from atoll.cli.main import run
from atoll.system.systemd import quoted, unit
from tests.federation.places import provisioned


def service(text: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return dict(parser["Service"])


def test_a_unit_runs_the_command_with_absolute_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kits = provisioned(tmp_path, ("north",), 1)
    monkeypatch.chdir(tmp_path)
    server, site = kits["server"].relative_to(tmp_path), kits["north"].relative_to(tmp_path)
    assert run(["serve", str(server), "--health", "127.0.0.1:5", "--systemd"]) == 0
    table = service(capsys.readouterr().out)
    expected = ["serve", str(kits["server"].resolve()), "--health", "127.0.0.1:5"]
    assert shlex.split(table["ExecStart"])[-4:] == expected
    assert (table["Restart"], table["RestartPreventExitStatus"]) == ("always", "2")
    assert (table["User"], table["NoNewPrivileges"]) == (getpass.getuser(), "yes")
    assert run(["join", str(site), "--data", "a", "--data", "b c", "--systemd"]) == 0
    words = shlex.split(service(capsys.readouterr().out)["ExecStart"])
    data = [word for name in ("a", "b c") for word in ("--data", str(tmp_path.resolve() / name))]
    assert words[-6:] == ["join", str(kits["north"].resolve()), *data]
    assert run(["serve", "nowhere", "--systemd"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/data/a-b_1.c", "/data/a-b_1.c"),
        ("/my data", '"/my data"'),
        ("100%", "100%%"),
        ("$HOME", "$$HOME"),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("a;b", '"a;b"'),
        ("größe", '"größe"'),
        ("", '""'),
        ("two\nlines", '"two\\nlines"'),
    ],
)
def test_words_are_quoted_as_systemd_reads_them(word: str, written: str) -> None:
    assert quoted(word) == written


def test_a_description_cannot_end_its_line() -> None:
    text = unit(["serve"], "x\nExecStart=/bin/evil")
    assert "Description=Atoll: x ExecStart=/bin/evil\n" in text
    assert text.count("\nExecStart=") == 1
