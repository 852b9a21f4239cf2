"""What each command imports: what computes nothing answers at once, and rounds wait for torch alone.

Every case says which modules it may not load, in an interpreter of its own; several command lines share
one where none of them may load any. A failure names who asked for the module first, and in which line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.backbones.test_backbones import tiny_bert
from tests.cli.test_cli import DIGITS, VERBS, some_texts, text_table

ROOT = Path(__file__).parents[2]

HEAVY = {
    "torch", "transformers", "datasets", "flwr", "flwr_datasets", "torchmetrics", "matplotlib", "torchvision",
    "peft", "scipy", "sklearn", "pandas", "ray", "jinja2",
}  # fmt: skip
"""What takes long to import."""

MORE = {"pydantic", "rich", "numpy", "pyarrow", "PIL"}
"""What takes a moment, and help doesn't need either."""

ASKED = """
import json, sys, traceback

class Asked:
    '''Notes who asks first for each of the modules.'''

    def __init__(self, names):
        self.names, self.first, self.line = set(names), {}, ''

    def find_spec(self, name, path=None, target=None):
        if name in self.names and name not in self.first:
            stack = traceback.extract_stack()[:-1]
            places = [f'{f.filename}:{f.lineno}' for f in stack if not f.filename.startswith('<frozen')]
            self.first[name] = f"{self.line}: {' < '.join(places[:-6:-1])}"

    def loaded(self):
        return {name: self.first.get(name, '?') for name in sorted(self.names & set(sys.modules))}

asked = Asked(json.loads(sys.argv[1]))
sys.meta_path.insert(0, asked)
"""

LINES = """
from atoll.cli.main import run
codes = {}
for line in json.loads(sys.argv[2]):
    asked.line = ' '.join(line)
    codes[asked.line] = run(line)
print('\\n' + json.dumps({'codes': codes, 'loaded': asked.loaded()}))
"""

NAMES = """
import atoll
at_first = 'atoll.api' in sys.modules
for name in atoll.__all__:
    asked.line = name
    getattr(atoll, name)
print(json.dumps({'at_first': at_first, 'loaded': asked.loaded()}))
"""

ROUNDS = """
from pathlib import Path
from atoll.job.job import Job
from atoll.sim.engines.engine import simulate
from atoll.protocol.requests import work_name
from atoll.sim.engines.inline import InlineTransport

steps = []
exchange = InlineTransport.send_and_receive

def watched(self, request, *others):
    steps.append([f'{work_name(request)} {request.round}', asked.loaded()])
    return exchange(self, request, *others)

InlineTransport.send_and_receive = watched

class Enough(BaseException):
    pass

def on_event(event):
    step = type(event).__name__
    asked.line = step
    steps.append([f"round {event.line['round']} is over" if step == 'RoundEnded' else step, asked.loaded()])
    if steps[-1][0] == 'round 2 is over':
        raise Enough

try:
    simulate(Job.load(Path(sys.argv[2])), Path(sys.argv[3]), on_event=on_event)
except Enough:
    print(json.dumps(steps))
"""


def in_an_interpreter_of_its_own(script: str, names: set[str], *arguments: object) -> Any:
    """What the script's last line says, as JSON."""
    command = [sys.executable, "-c", ASKED + script, json.dumps(sorted(names)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.processes
def test_help_and_the_version_import_nothing_but_what_prints_them() -> None:
    lines = [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)]
    found = in_an_interpreter_of_its_own(LINES, HEAVY | MORE, json.dumps(lines))
    assert found["loaded"] == {}
    assert set(found["codes"].values()) == {0, 2} and found["codes"][""] == 2


@pytest.mark.processes
def test_who_submits_follows_or_stops_a_run_waits_for_flower_alone() -> None:
    script = "import atoll.server.deploy.submit\nprint(json.dumps(asked.loaded()))"
    assert in_an_interpreter_of_its_own(script, HEAVY).keys() == {"flwr"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(tomli_w.dumps(DIGITS))
    return path


@pytest.mark.processes
def test_lists_import_nothing_that_takes_long() -> None:
    lines = [["list", what] for what in ("tasks", "backbones", "strategies", "partitions", "sources")]
    found = in_an_interpreter_of_its_own(LINES, HEAVY, json.dumps(lines))
    assert found["loaded"] == {} and set(found["codes"].values()) == {0}


MISTAKES = (
    "simulte JOB",
    "simulate JOB --worker 3",
    "simulate nowhere.toml",
    "simulate JOB --engine x",
    "simulate JOB --set",
    "simulate JOB --set train.lrr=1",
    "simulate JOB --set train.lr=fast",
    "simulate JOB --set task.name=image-clasification",
    "simulate JOB --set data.source=digit",
    "simulate JOB --set task.name=forecasting",
    "simulate JOB --set strategy.name=fedavgg",
    "simulate JOB --set strategy.name=flwr:FedMedain",
    "simulate JOB --set strategy.tau=1",
    "simulate JOB --set backbone.name=torchvision:resnet19",
    "simulate JOB --set backbone.name=atoll:small-txt",
    "simulate JOB --set backbone.name=hff:x",
    "simulate JOB --set backbone.name=resnet18",
    "simulate JOB --track tensorbord",
    "partition JOB --out shards --set data.source=digit",
    "sweep JOB --vary train.lrr=1,2",
    "sweep JOB --vary backbone.name=torchvision:resnet18,torchvision:resnet19",
    "tune JOB --set train.lrr=1",
    "tune JOB --range train.lr=1",
    "tune JOB --set data.source=digit",
    "advise JOB --set train.lrr=1",
    "advise JOB --set task.name=image-clasification",
    "advise JOB --set data.source=digit",
    "submit JOB --server kit --set train.lrr=1",
    "submit JOB --server kit --set strategy.name=fedavgg",
    "submit JOB --server kit --set privacy.audit=true",
    "check nowhere --task image-clasification",
    "report nowhere",
    "predict nowhere text",
    "chat nowhere",
    "export nowhere --format onnx",
    "export nowhere --format onyx",
    "audit nowhere",
    "track nowhere --to tensorboard",
    "forget nowhere client-0",
    "distil nowhere --student hf:x --data texts.txt",
    "list task",
)
"""A mistake each, in a verb, a file, a key, a value or a name."""


@pytest.mark.processes
def test_a_mistake_is_answered_without_what_takes_long_to_import(job: Path) -> None:
    lines = [line.replace("JOB", str(job)).split() for line in MISTAKES]
    found = in_an_interpreter_of_its_own(LINES, HEAVY, json.dumps(lines))
    assert found["loaded"] == {}
    assert {line for line, code in found["codes"].items() if code != 2} == set()


@pytest.mark.processes
def test_atoll_is_imported_at_once_and_its_names_come_when_they_are_used() -> None:
    found = in_an_interpreter_of_its_own(NAMES, HEAVY)
    assert found == {"at_first": False, "loaded": {}}


def text_job(folder: Path) -> dict[str, Any]:
    skewed = {"kind": "dirichlet", "alpha": 100.0, "min_examples": 1}
    table = text_table(tiny_bert(folder / "bert"), some_texts(folder / "data", count=12))
    return table | {"data": table["data"] | {"partition": skewed}}


@pytest.mark.parametrize(
    ("table", "allowed"),
    [(lambda _: DIGITS, {"torch"}), (text_job, {"torch", "pandas"})],
    ids=["a source's images on torchvision", "one's own texts on transformers"],
)
@pytest.mark.processes
def test_rounds_on_kept_features_wait_for_torch_alone(tmp_path: Path, table: Any, allowed: set[str]) -> None:
    """Nothing is measured before the last round is over: that brings torchmetrics, and what it imports.

    pyarrow imports pandas to make an array of one's own texts.
    """
    path = tmp_path / "job.toml"
    rounds = {"federation": {"clients": 2, "rounds": 2}, "evaluate": {"every": 10}}
    path.write_text(tomli_w.dumps(table(tmp_path) | rounds))
    once = Job.load(path, ["federation.rounds=1"])
    simulate(once, tmp_path / "features are computed", on_event=ignore_events, report=False)
    steps = in_an_interpreter_of_its_own(ROUNDS, HEAVY, path, tmp_path / "features are kept")
    names = [name for name, _ in steps]
    assert names.index("train 1") < names.index("round 1 is over") < names.index("round 2 is over")
    for name, loaded in steps[: names.index("round 2 is over") + 1]:
        assert loaded.keys() <= allowed, f"{name}: {loaded}"
