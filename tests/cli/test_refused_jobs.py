"""A wrong job on the command line, a case for each row of docs/faults.md: exit code 2, one line, nothing touched."""

# ruff: noqa: E501  (a case a line, so that the rows can be compared)

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from atoll.cli.main import run as command_line
from tests.data.test_bad_data import snapshot

JOB: dict[str, Any] = {
    "name": "digits", "seed": 11,
    "task": {"name": "image-classification"}, "data": {"source": "digits"},
    "backbone": {"name": "raw:pixels", "image_size": 8}, "federation": {"clients": 4, "rounds": 1},
}  # fmt: skip
GOOD = tomli_w.dumps(JOB)
CLIENT = 'privacy={unit="client", delta=1e-3, '
FILES: dict[str, tuple[int, bytes | None, str]] = {
    "job.toml": (1, None, "job.toml: no such file"),
    "folder": (2, None, "folder: found a folder, expected a TOML file"),
    "empty.toml": (3, b"", "empty.toml: the file is empty"),
    "latin.toml": (4, b"name = '\xff'", "latin.toml: byte 8 is not UTF-8"),
    "syntax.toml": (6, b"name = \nseed = 1", "syntax.toml: not valid TOML: .*line 1, column 8"),
    "twice.toml": (7, b"seed = 1\nseed = 2\nname = 3\n", "twice.toml: not valid TOML: .*line 2"),
    "tag.yaml": (21, b"a: !!python/object:os.system x", "tag.yaml: not valid YAML"),
    "bomb.yaml": (
        21,
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "bomb.yaml: .*anchors and aliases are not read",
    ),
}
"""A job's file, the row that it is of, what it holds, and what is said of it."""
KEYS: list[tuple[int, str, str]] = [
    (8, "train.lrr=1", "train.lrr: unknown key, did you mean 'lr'"),
    (9, 'train.epochs="10"', "train.epochs: expected integer, found '10'"),
    (10, "federation.rounds=true", "federation.rounds: expected integer, found True"),
    (11, "federation.rounds=0", "federation.rounds: expected greater than or equal to 1, found 0"),
    (11, "federation.rounds=-1", "federation.rounds: expected greater than or equal to 1, found -1"),
    (11, "federation.rounds=1000000000", "federation.rounds: expected less than or equal to 1000000"),
    (12, "train.lr=nan", "train.lr: expected a finite number, found nan"),
    (12, "data.test_fraction=inf", "data.test_fraction: expected .*, found inf"),
    (13, "train.lr=0", "train.lr: expected greater than 0, found 0"),
    (13, "train.lr=-0.1", r"train.lr: expected greater than 0, found -0\.1"),
    (14, "data.test_fraction=1.5", r"data.test_fraction: expected less than 1, found 1\.5"),
    (14, "federation.cohort_rate=0", "federation.cohort_rate: expected greater than 0, found 0"),
    (14, "federation.quorum=1.5", r"federation.quorum: expected less than or equal to 1, found 1\.5"),
    (15, "federation.cohort=5", "cohort must be at most clients = 4, found 5"),
    (
        16,
        'privacy={unit="client", noise_multiplier=1.0, delta=0.0}',
        "privacy.delta: expected greater than 0, found 0",
    ),
    (
        16,
        'privacy={unit="client", noise_multiplier=1.0, delta=1.0}',
        "privacy.delta: expected less than 1, found 1",
    ),
    (
        16,
        'privacy={unit="client", noise_multiplier=1.0, delta=0.3}',
        r"privacy.delta: expected less than 1 / federation.clients = 0\.25, found 0\.3",
    ),
    (17, f"{CLIENT}noise_multiplier=-1.0}}", "privacy.noise_multiplier: expected greater than 0, found -1"),
    (17, f"{CLIENT}noise_multiplier=0.0}}", "privacy.noise_multiplier: expected greater than 0, found 0"),
    (
        18,
        'privacy={unit="client", epsilon=1e-9, delta=1e-12}',
        "privacy.epsilon: no noise multiplier below 1e6 reaches",
    ),
    (
        19,
        f"{CLIENT}noise_multiplier=1.0, clipping_norm=0.0}}",
        "privacy.clipping_norm: expected greater than 0, found 0",
    ),
    (
        20,
        f'{CLIENT}noise_multiplier=1.0}}\nstrategy.name="flwr:FedMedian"',
        "strategy.name: expected one of fedavg.* found 'flwr:FedMedian'",
    ),
    (
        20,
        f'{CLIENT}noise_multiplier=1.0}}\nstrategy.name="krum"',
        "strategy.name: expected one of fedavg.* found 'krum'",
    ),
    (20, f'{CLIENT}noise_multiplier=1.0}}\nfederation.weights="examples"', "under a promise clients weigh"),
    (22, 'data.source="$HOME/data"', "data.source: environment variables are not expanded"),
    (22, 'data.source="./../nowhere/data"', "nowhere/data: no such file or folder"),
]
"""A row, keys of the job that are wrong, and what is said of them."""


def refused(capsys: pytest.CaptureFixture[str], pattern: str, *arguments: object) -> None:
    """One line on stderr, exit code 2."""
    capsys.readouterr()
    code = command_line([str(one) for one in arguments])
    line = capsys.readouterr().err
    assert code == 2, line
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 900, line
    assert "Traceback" not in line and re.search(pattern, line), line


@pytest.mark.parametrize("name", FILES, ids=lambda name: f"row {FILES[name][0]}: {name}")
def test_a_file_that_is_no_job_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, content, pattern = FILES[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    elif name == "folder":
        Path(name).mkdir()
    before = snapshot(tmp_path)
    refused(capsys, pattern, "simulate", name, "--out", "new/run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("row", "keys", "pattern"), KEYS, ids=lambda value: f"row {value}" if isinstance(value, int) else ""
)
def test_a_key_that_is_wrong_is_named(
    row: int,
    keys: str,
    pattern: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(GOOD)
    before = snapshot(tmp_path)
    overrides = [word for key in keys.split("\n") for word in ("--set", key)]
    refused(capsys, pattern, "simulate", "job.toml", *overrides, "--out", "new/run")
    assert snapshot(tmp_path) == before
