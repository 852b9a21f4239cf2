"""Units of systemd for what runs for months: started at boot, and again whenever it ends.

What stands in a unit, and how its words are quoted: systemd.service(5), systemd.exec(5), systemd.syntax(7).
"""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Sequence
from pathlib import Path

UNIT = """\
[Unit]
Description=Atoll: {description}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
User={user}
Restart=always
RestartSec=2
RestartPreventExitStatus=2
TimeoutStopSec=60
NoNewPrivileges=yes

[Install]
WantedBy=multi-user.target
"""
"""Exit code 2 says that a file or a key is wrong, which another start doesn't mend."""


def unit(arguments: Sequence[str | Path], description: str) -> str:
    """A unit that runs `atoll` with these arguments as the present user; paths are made absolute."""
    parts = [str(one.resolve()) if isinstance(one, Path) else one for one in arguments]
    command = " ".join(map(quoted, [*_atoll(), *parts]))
    return UNIT.format(description=_plain(description), command=command, user=getpass.getuser())


def quoted(word: str) -> str:
    """A word as systemd reads it back: quoted where it must be, `%` and `$` without their meaning."""
    word = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%$+=:,./-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")


def _atoll() -> list[str]:
    """The installed command of this Python, or the package where there is none."""
    command = Path(sys.executable).parent / "atoll"
    return [str(command)] if command.is_file() else [sys.executable, "-m", "atoll"]
