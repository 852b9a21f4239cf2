"""A whole run in process: it learns, it repeats bit for bit, it goes on after a kill."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.site import UNCACHED
from atoll.errors import ConfigError, InconsistentUpdates, InputError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import Failure, Reply, Update
from atoll.protocol.requests import Request, TrainRequest
from atoll.report.run_result import RunResult
from atoll.server.events import Event, ignore_events
from atoll.server.rounds.cohort import sample
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.events import ExecutionChosen
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population, client_names
from atoll.tasks import task_named
from tests.support.processes import python
from tests.support.small import few_pictures, grey_png_shard

DIGITS = {
    "name": "digits",
    "seed": 11,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32},
    "train": {"lr": 0.02, "batch_size": 16},
    "federation": {"clients": 6, "cohort": 4, "rounds": 4},
}


def job(**tables: Any) -> Job:
    return Job.parse(DIGITS | {k: DIGITS.get(k, {}) | v for k, v in tables.items()}, origin="test")


def run(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, **{"report": False, **options})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(job(), tmp_path_factory.mktemp("reference") / "run")


def test_a_run_learns_and_leaves_the_run_directory_of_the_contract(tmp_path: Path) -> None:
    result = run(
        job(
            backbone={"name": "torchvision:mobilenet_v2", "weights": "pretrained"},
            evaluate={"baselines": ["zero_shot", "local_only", "pooled"]},
            federation={"rounds": 10},
        ),
        tmp_path / "r",
        report=True,
    )
    names = {p.name for p in (tmp_path / "r").iterdir()} - {".lock"}
    assert names == {
        "job.toml",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "model",
        "checkpoints",
        "data_hashes.json",
    }
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.rounds
    assert len(lines) == 10
    assert {"round", "cohort", "loss", "metrics", "seconds", "set_aside"} <= set(lines[0])
    expected = {
        "job_hash", "model_sha256", "engine", "task", "strategy", "seed", "seconds", "clients_trained",
        "bytes_up", "bytes_down", "peak_rss_mb", "rounds", "final", "baselines", "privacy",
    }  # fmt: skip
    assert expected <= set(json.loads((tmp_path / "r" / "result.json").read_text()))
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = {name: m["accuracy"] for name, m in result.baselines.items()}
    assert found["zero_shot"] < found["local_only"] < found["pooled"]
    assert result.final["server"]["accuracy"] > found["zero_shot"] + 0.2
    assert set(result.final["clients"]) == set(client_names(6))
    assert result.clients_trained == 40
    # ten rounds of four clients and one evaluation of six, of 10 x 1280 weights and 10 biases of 4 bytes
    assert result.bytes_up == 40 * 4 * 12810
    assert result.bytes_down == (40 + 6) * 4 * 12810


def test_the_same_job_gives_the_same_bits(tmp_path: Path, reference: RunResult) -> None:
    again = run(job(), tmp_path / "r")
    assert again.model_sha256 == reference.model_sha256
    assert [r["model_sha256"] for r in again.rounds] == [r["model_sha256"] for r in reference.rounds]
    assert run(job().model_copy(update={"seed": 12}), tmp_path / "s").model_sha256 != again.model_sha256


@pytest.mark.parametrize("options", [{"engine": "loop"}, {"engine": "cohort"}, {"workers": 3}], ids=str)
def test_every_engine_gives_the_same_bits(
    tmp_path: Path, reference: RunResult, options: dict[str, Any]
) -> None:
    result = run(job(), tmp_path / "r", **options)
    assert [r["model_sha256"] for r in result.rounds] == [r["model_sha256"] for r in reference.rounds]
    assert result.final["clients"] == reference.final["clients"]


VARIED = {"augment": ["crop", "rotate", "flip", "color"], "epochs": 2}
KEPT = VARIED | {"cached_views": 3}


def of_few(train: dict[str, Any], **tables: Any) -> Job:
    """A job whose every view is computed, on few pictures."""
    return job(train=train, data=few_pictures(), **tables)


@pytest.fixture(scope="module")
def of_views(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(of_few(KEPT), tmp_path_factory.mktemp("views") / "run")


@pytest.mark.parametrize("options", [{"engine": "loop"}, {"engine": "cohort"}, {"workers": 3}], ids=str)
@pytest.mark.slow
def test_every_engine_that_makes_its_own_views_gives_the_same_bits(
    tmp_path: Path, of_views: RunResult, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    result = run(of_few(KEPT), tmp_path / "r", **options)
    assert [r["model_sha256"] for r in result.rounds] == [r["model_sha256"] for r in of_views.rounds]
    assert result.final["clients"] == of_views.final["clients"]


def test_a_table_of_views_that_is_too_large_is_trained_from_shards_to_the_same_bits(
    tmp_path: Path, of_views: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.sim.engines.simulated_site.TABLE_BYTES", 1000)
    result = run(of_few(KEPT), tmp_path / "r")
    assert [r["model_sha256"] for r in result.rounds] == [r["model_sha256"] for r in of_views.rounds]


def test_views_change_what_is_learnt_and_each_number_of_them_does(
    tmp_path: Path, of_views: RunResult
) -> None:
    others = [{"epochs": 2}, KEPT | {"cached_views": 2}, KEPT | {"augment": ["flip"]}]
    hashes = {run(of_few(t), tmp_path / str(i)).model_sha256 for i, t in enumerate(others)}
    assert len(hashes | {of_views.model_sha256}) == 4


def test_a_site_that_extracts_its_own_views_has_the_bits_of_the_simulators_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    setting = of_few(KEPT)
    population = Population.of(setting)
    task = task_named(setting.task.name)
    data_info = task.local_info(population.train, setting.data, {})
    whole = population.whole(Learner.of(setting, task, data_info))
    table = Learner.of(setting, task, data_info).features.for_training(whole)
    assert len(table) == 3 and not torch.equal(table[0], table[1])
    for number, name in enumerate(client_names(3)):
        monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / name))
        shard = task.shard(population.dataset(setting, name), data_info)
        places = {key: place for place, key in enumerate(whole.keys)}
        own = Learner.of(setting, task, data_info).features.for_training(shard)
        assert torch.equal(own, table[:, [places[key] for key in shard.keys]]), number


def test_what_is_measured_is_never_augmented(tmp_path: Path) -> None:
    """Without local steps worth the name, the varied job says of every example what the plain one says."""
    still = {"lr": 1e-30, "epochs": 1}
    plain = run(of_few(still), tmp_path / "plain")
    for name, train in (("kept", KEPT), ("varied", VARIED)):
        assert run(of_few(train | still), tmp_path / name).final == plain.final


@pytest.mark.slow
def test_without_kept_views_every_batch_is_augmented_anew_and_both_sides_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "atoll.client")
    said: list[str] = []

    def on_event(event: Event) -> None:
        said.extend([event.mode] if isinstance(event, ExecutionChosen) else [])

    varied = of_few(VARIED, federation={"rounds": 2})
    inline = simulate(varied, tmp_path / "inline", on_event=on_event, report=False)
    loop = run(varied, tmp_path / "loop", engine="loop")
    assert inline.model_sha256 == loop.model_sha256
    assert said == [
        "one client after the other in this process: training features are not cached,"
        " for train.augment varies inputs and there are no cached_views"
    ]
    assert caplog.messages.count(f"job digits: {UNCACHED}") == 2  # once in each run


@pytest.mark.slow
@pytest.mark.processes
def test_worker_processes_augment_as_one_process_does(tmp_path: Path) -> None:
    varied = of_few(VARIED, federation={"rounds": 2})
    assert run(varied, tmp_path / "two", workers=2).model_sha256 == run(varied, tmp_path / "one").model_sha256


def test_an_engine_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine: expected one of inline, loop, cohort, ray, found 'x'"):
        run(job(), tmp_path / "r", engine="x")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_four_workers_give_the_bits_of_one(tmp_path: Path, reference: RunResult) -> None:
    assert run(job(), tmp_path / "r", workers=4).model_sha256 == reference.model_sha256


def test_the_replayed_job_file_gives_the_same_bits(tmp_path: Path, reference: RunResult) -> None:
    run(job(federation={"rounds": 1}), tmp_path / "first")
    replay = Job.load(tmp_path / "first" / "job.toml", ["federation.rounds=4"])
    assert run(replay, tmp_path / "second").model_sha256 == reference.model_sha256


class Breaks(InlineTransport):
    """Stops the run at a given exchange, as a kill would between two rounds."""

    left = 2

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        if isinstance(request, TrainRequest):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return super().send_and_receive(request, names, timeout)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, reference: RunResult) -> None:
    population = Population.of(job())
    with pytest.raises(KeyboardInterrupt):
        run_job(job(), Breaks.of(population), tmp_path / "r", cached_test_set(population, None))
    assert not (tmp_path / "r" / "result.json").exists()
    result = run(job(), tmp_path / "r", resume=True)
    assert result.model_sha256 == reference.model_sha256
    assert [r["round"] for r in result.rounds] == [1, 2, 3, 4]
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


SCRIPT = """
import signal, sys
from pathlib import Path
from atoll.job.job import Job
from atoll.server.events import RoundEnded
from atoll.sim.engines.engine import simulate
def on_event(event):
    print(type(event).__name__, flush=True)
    if isinstance(event, RoundEnded) and event.line["round"] == int(sys.argv[4]):
        signal.pause()  # so that it is killed before its end, however late that is
simulate(
    Job.load(Path(sys.argv[1])), Path(sys.argv[2]), on_event=on_event, report=False,
    resume=sys.argv[3] == "resume",
)
"""


def kill_after(rounds: int, last: int, attempt: int, job: Path, out: Path) -> None:
    """Start a run, or go on with it, and kill it when it has made more rounds, but before `last` is over."""
    process = python(SCRIPT, job, out, "resume" if attempt else "new", last)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.strip() == "RoundEnded"
        if seen == rounds:
            time.sleep(0.002 * attempt)
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "flwr:FedYogi"])
@pytest.mark.processes
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path, strategy: str) -> None:
    from atoll.server.run.directory import job_toml

    setting = job(strategy={"name": strategy}, federation={"rounds": 40})
    expected = run(setting, tmp_path / "whole").model_sha256
    (tmp_path / "job.toml").write_text(job_toml(setting))
    for attempt, (rounds, last) in enumerate(((3, 5), (9, 16), (14, 34))):
        kill_after(rounds, last, attempt, tmp_path / "job.toml", tmp_path / "r")
    assert run(setting, tmp_path / "r", resume=True).model_sha256 == expected


def test_a_run_directory_in_use_refuses_a_second_process(tmp_path: Path) -> None:
    population = Population.of(job())

    class Second(InlineTransport):
        def discover_clients(self, job: Job) -> Any:
            with pytest.raises(ConfigError, match=f"another process runs in it .pid {os.getpid()}"):
                run(job, tmp_path / "r", resume=True)
            return super().discover_clients(job)

    run_job(
        job(federation={"rounds": 1}),
        Second.of(population),
        tmp_path / "r",
        cached_test_set(population, None),
    )


def test_an_old_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:  # row 80
    setting = job(federation={"rounds": 1})
    run(setting, tmp_path / "r")
    before = (tmp_path / "r" / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"exists and is not empty; use --resume to go on, --force"):
        run(setting, tmp_path / "r")
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    run(setting, tmp_path / "r", force=True)


def test_resuming_with_a_changed_job_names_what_changed(tmp_path: Path) -> None:
    run(job(federation={"rounds": 1}), tmp_path / "r")
    with pytest.raises(ConfigError, match=r"changed job: train\.lr"):
        run(job(federation={"rounds": 1}, train={"lr": 0.3}), tmp_path / "r", resume=True)
    with pytest.raises(ConfigError, match="nothing to resume"):
        run(job(), tmp_path / "other", resume=True)


class Hostile(InlineTransport):
    """One client sends rubbish, one fails, one is silent; the rest are honest."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            yield from self._twisted(reply)

    def _twisted(self, reply: Reply) -> Any:
        match reply:
            case Update(client="client-0000"):
                nan = {n: t * float("nan") for n, t in reply.delta.items()}
                yield Update(reply.client, reply.round, nan, reply.num_examples, reply.states)
            case Update(client="client-0001"):
                yield Failure(reply.client, "disk full")
            case Update(client="client-0002"):
                return
            case _:
                yield reply


def test_bad_clients_are_set_aside_by_name_and_the_run_goes_on(tmp_path: Path) -> None:
    population = Population.of(job(federation={"cohort": 6}))
    setting = population.job
    result = run_job(setting, Hostile.of(population), tmp_path / "r", cached_test_set(population, None))
    aside = result.rounds[0]["set_aside"]
    assert set(aside) == {"client-0000", "client-0001", "client-0002"}
    assert "not finite" in aside["client-0000"]
    assert aside["client-0001"] == "disk full"
    assert "no reply" in aside["client-0002"]
    assert result.rounds[-1]["loss"] < result.rounds[0]["loss"]


def test_a_round_below_its_quorum_is_abandoned_and_the_model_stays(tmp_path: Path) -> None:
    population = Population.of(job(federation={"cohort": 6, "quorum": 0.6}))
    with pytest.raises(InconsistentUpdates, match=r"round 1: 3 of 6 usable updates, needed 4"):
        run_job(population.job, Hostile.of(population), tmp_path / "r", cached_test_set(population, None))
    assert not (tmp_path / "r" / "checkpoints").exists()


class Diverging(InlineTransport):
    """Half of the clients send what isn't finite; how often anybody is asked to train is counted."""

    asked = 0

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            Diverging.asked += isinstance(reply, Update)
            if isinstance(reply, Update) and reply.client[-1] in "024":
                yield replace(reply, delta={n: t * float("inf") for n, t in reply.delta.items()})
            else:
                yield reply


def test_what_diverged_is_not_tried_again(tmp_path: Path) -> None:
    """From the same model and seed the same comes out."""
    population = Population.of(job(federation={"cohort": 6, "quorum": 0.6}))
    with pytest.raises(InconsistentUpdates, match=r"3 of 6 usable.*diverged: a smaller train\.lr"):
        run_job(population.job, Diverging.of(population), tmp_path / "r", cached_test_set(population, None))
    assert Diverging.asked == 6


def test_a_poisson_cohort_has_the_rate_and_may_be_empty() -> None:
    names = client_names(200)
    setting = job(federation={"clients": 200, "cohort_rate": 0.1, "cohort": None})
    sizes = [len(sample(names, setting, r)) for r in range(1, 201)]
    assert abs(sum(sizes) / 200 - 20) < 4 * (200 * 0.09) ** 0.5 / 200**0.5 * 1.0 + 0.5
    assert len(set(sizes)) > 5
    few = job(federation={"clients": 6, "cohort_rate": 0.01, "cohort": None})
    assert any(sample(client_names(6), few, r) == [] for r in range(1, 5))


def test_an_empty_cohort_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    result = run(job(federation={"cohort_rate": 1e-6, "cohort": None, "rounds": 2}), tmp_path / "r")
    assert [line["cohort"] for line in result.rounds] == [[], []]
    assert len({line["model_sha256"] for line in result.rounds}) == 1


def test_a_fixed_cohort_is_drawn_evenly() -> None:
    names, counts = client_names(10), dict.fromkeys(client_names(10), 0)
    setting = job(federation={"clients": 10, "cohort": 3})
    for round in range(1, 1001):
        cohort = sample(names, setting, round)
        assert len(set(cohort)) == 3 and cohort == sorted(cohort)
        for name in cohort:
            counts[name] += 1
    assert all(abs(n - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5 for n in counts.values())


@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"data": {"source": "digitz"}}, "digits"),
        ({"task": {"name": "image-clasification"}}, "did you mean 'image-classification'"),
        ({"federation": {"clients": 5000, "cohort": None}}, "5000 clients cannot share"),
        ({"data": {"partition": {"kind": "natural", "by": "hospital"}}}, "no column 'hospital'"),
        ({"train": {"device": "cuda"}}, "train.device: 'cuda' cannot be used"),  # row 85
        ({"train": {"device": "toaster"}}, "train.device: 'toaster' cannot be used"),
        (
            {"train": {"augment": ["flip", "blur"]}},
            r"train.augment: expected 'crop', .* for image-classification, found 'blur'",
        ),
        ({"data": {"classes": ("0", "1")}}, r"label '2' is not in data.classes"),
    ],
)
def test_a_job_that_cannot_run_here_says_so_in_one_line(tmp_path: Path, tables: Any, pattern: str) -> None:
    import torch

    if "cuda" in str(tables) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=pattern) as caught:
        run(job(**tables), tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_every_cohort_of_a_fixed_size_is_as_likely_as_another() -> None:
    counts: dict[tuple[str, ...], int] = {}
    setting = job(federation={"clients": 5, "cohort": 2})
    for round in range(1, 4001):
        pair = tuple(sample(client_names(5), setting, round))
        counts[pair] = counts.get(pair, 0) + 1
    # Ten pairs, 400 each, deviation sqrt(4000 * .1 * .9) = 19.
    assert len(counts) == 10 and all(abs(n - 400) < 4 * 19 for n in counts.values())


def test_clients_that_share_examples_train_to_the_same_bits_on_every_engine(tmp_path: Path) -> None:
    setting = job(
        data={"partition": {"kind": "resampled", "examples": 30, "alpha": 0.5}},
        federation={"clients": 300, "cohort": 5},
        evaluate={"clients": 7, "baselines": ("local_only", "pooled")},
    )
    hashes = set()
    for engine in ("inline", "loop"):
        result = simulate(setting, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        hashes.add(result.model_sha256)
        assert len(result.final["clients"]) == 7
        assert result.notes[-1] == "local_only and pooled are of 7 of 300 clients"
        assert set(result.baselines) == {"local_only", "pooled"}
    assert len(hashes) == 1


def test_features_too_many_for_one_table_are_looked_up_and_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(job(), tmp_path / "whole")
    monkeypatch.setattr("atoll.sim.engines.simulated_site.TABLE_BYTES", 0)
    assert run(job(), tmp_path / "parts").model_sha256 == whole.model_sha256


def test_a_head_with_a_hidden_layer_learns_to_the_same_bits_alone_and_in_a_cohort(tmp_path: Path) -> None:
    setting = job(tune={"hidden": 24}, federation={"rounds": 6})
    results = [run(setting, tmp_path / engine, engine=engine) for engine in ("inline", "loop")]
    assert results[0].model_sha256 == results[1].model_sha256
    assert results[0].trainable["head.0.weight"] == [24, 512]
    assert results[0].rounds[-1]["loss"] < results[0].rounds[0]["loss"]


@pytest.mark.parametrize("method", ["full", "last-k"])
def test_a_network_tuned_in_channels_last_travels_in_the_usual_layout_to_the_same_bits(
    tmp_path: Path, method: str
) -> None:
    setting = job(
        data=few_pictures(), backbone={"channels_last": True}, tune={"method": method},
        federation={"rounds": 2, "cohort": 2},
    )  # fmt: skip
    results = [run(setting, tmp_path / engine, engine=engine) for engine in ("inline", "loop")]
    assert results[0].model_sha256 == results[1].model_sha256
    task, shard, outputs = task_named(setting.task.name), grey_png_shard(5, classes=3), []
    for channels_last in (True, False):
        section = setting.backbone.model_copy(update={"channels_last": channels_last})
        learner = Learner.of(
            setting.model_copy(update={"backbone": section}), task, {"classes": ["a", "b", "c"]}
        )
        first = learner.initial()
        assert all(tensor.is_contiguous() for tensor in first.values())
        outputs.append(learner.outputs(first, shard))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
