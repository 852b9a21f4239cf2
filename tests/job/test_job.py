"""The job file: what is accepted, and the one line that answers each mistake (catalogue rows 1-22)."""

from pathlib import Path

import pytest

from atoll.errors import ConfigError, did_you_mean
from atoll.job.job import Job
from atoll.job.toml import read_toml
from atoll.server.run.directory import job_toml

GOOD = """
name = "bbc-news"
seed = 7
[task]
name = "text-classification"
[data]
source = "bbc-news"
partition = { kind = "dirichlet", alpha = 0.3 }
[backbone]
name = "hf:all-MiniLM-L6-v2"
[federation]
clients = 20
cohort = 10
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(GOOD)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Job.load(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


def test_a_missing_file_is_named(tmp_path: Path) -> None:  # row 1
    assert complaint(tmp_path / "none.toml").endswith("none.toml: no such file")
    (tmp_path / "bbc-news.toml").write_text("")
    for name in ("bbc-new.toml", "bbc-news", "bbc-news.yaml", "bbc_news.toml"):
        assert complaint(tmp_path / name).endswith(f"{name}: no such file, did you mean 'bbc-news.toml'?")
    assert complaint(tmp_path / "other" / "bbc-new.toml").endswith("bbc-new.toml: no such file")


def test_a_folder_is_no_job(tmp_path: Path) -> None:  # row 2
    assert "found a folder" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "empty"),  # row 3
        (b"name = '\xff'", "byte 8 is not UTF-8"),  # row 4
        (b"name = \nseed = 1", r"line 1, column 8"),  # row 6
        (b"seed = 1\nseed = 2\nname = 3\n", r"(?i)overwrite.*line 2"),  # row 7
        (b"- !!python/object:os.system\n- &a [*a]", "not valid TOML"),  # row 21
    ],
)
def test_a_file_that_is_no_toml_is_answered_with_the_place(
    tmp_path: Path, content: bytes, pattern: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=pattern) as caught:
        Job.load(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_welcome(tmp_path: Path) -> None:  # row 5
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert Job.load(path).name == "bbc-news"


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("train.lrr=0.1", r"train\.lrr: unknown key, did you mean 'lr'\?"),  # row 8
        ("data.partition.alpa=1", r"data\.partition\.alpa: unknown key, did you mean 'alpha'\?"),
        ("trian.lr=0.1", r"trian: unknown key, did you mean 'train'\?"),
        ('train.epochs="10"', r"train\.epochs: expected integer, found '10'"),  # row 9
        ("federation.rounds=true", r"federation\.rounds: expected integer, found True"),  # row 10
        ("federation.rounds=0", r"federation\.rounds: expected greater than or equal to 1"),  # row 11
        ("federation.rounds=-1", r"federation\.rounds: expected greater than or equal to 1"),
        ("federation.rounds=1000000000", r"federation\.rounds: expected less than or equal to 1000000"),
        ("train.lr=nan", r"train\.lr: expected a finite number, found nan"),  # row 12
        ("train.lr=inf", r"train\.lr: expected a finite number, found inf"),
        ("train.lr=0", r"train\.lr: expected greater than 0, found 0"),  # row 13
        ("train.lr=-0.1", r"train\.lr: expected greater than 0, found -0\.1"),
        ("data.test_fraction=1.5", r"data\.test_fraction: expected less than 1"),  # row 14
        ("federation.quorum=0", r"federation\.quorum: expected greater than 0"),
        ("federation.cohort=30", r"cohort must be at most clients = 20, found 30"),  # row 15
        ("federation.cohort_rate=0.5", r"federation\.cohort and cohort_rate exclude each other"),
        ('privacy.unit="patient"', r"privacy\.unit: expected 'none', .*, found 'patient'"),
        (
            'data.partition={kind="dirichlt", alpha=1}',
            r"data\.partition: kind 'dirichlt' is none of Atoll's, .*did you mean 'dirichlet'\?",
        ),
        ('data.partition={kind="mine", options={a={}}}', r"data\.partition\.options\.a.*: expected"),
        ("data.partition={alpha=1}", r"data\.partition: the key kind is missing, expected one of 'iid'"),
        ('data.partition="iid"', r"data\.partition: expected .*, found 'iid'"),
        ("tune.rank=4", r"rank has no meaning with method = 'head'"),
        ('train={optimizer="adam", momentum=0.9}', r"momentum has no meaning with optimizer = 'adam'"),
        ("train.cached_views=0", r"train\.cached_views: expected greater than or equal to 1, found 0"),
        ("train.cached_views=2", r"train\.cached_views has no meaning without augment: remove it"),
        ('train.augment="flip"', r"train\.augment: expected .*(array|tuple), found 'flip'"),
        (
            'train={augment=["flip"], cached_views=2}\ntune.method="lora"',
            r"train\.cached_views has no meaning with tune\.method = 'lora'",
        ),
        (
            "backbone.compile=true\ntune.method='full'",
            r"backbone\.compile has no meaning with tune\.method = 'full'",
        ),
        ('backbone.compile="yes"', r"backbone\.compile: expected boolean, found 'yes'"),
        ("train=3", r"train: expected an object, found 3"),
        ('name="../x"', r"name: expected a match of"),
        ('data.source="$HOME/data"', r"data\.source: environment variables are not expanded"),  # row 22
        ("seed=-1", r"seed: expected greater than or equal to 0"),
        ("train.lr", r"--set train\.lr: expected key=value"),
        ("name.x=1", r"--set name\.x=1: name is not a table"),
    ],
)
def test_a_wrong_value_is_answered_with_its_key(good: Path, override: str, pattern: str) -> None:
    import re

    assert re.search(pattern, complaint(good, *override.split("\n")))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("seed = 1")
    assert "name: missing" in complaint(path)


def test_a_path_is_relative_to_the_job_file_and_home_is_expanded(good: Path) -> None:  # row 22
    assert Job.load(good, ['data.source="./shards"']).data.source == str(good.parent / "shards")
    assert Job.load(good, ['data.source="~/shards"']).data.source == str(Path.home() / "shards")
    assert Job.load(good, ['data.source="../x/y"']).data.source == str(good.parent.parent / "x/y")
    assert Job.load(good).data.source == "bbc-news"
    assert Job.load(good, ['backbone.name="hf:org/name"']).backbone.name == "hf:org/name"


def test_the_resolved_job_replays_as_the_same_job(good: Path, tmp_path: Path) -> None:
    job = Job.load(good, ["train.lr=0.25", 'data.classes=["a","b"]'])
    replay = tmp_path / "resolved.toml"
    replay.write_text(job_toml(job))
    assert Job.load(replay).hash == job.hash
    assert Job.from_json(job.canonical).hash == job.hash


def test_the_hash_depends_on_every_value_and_not_on_the_spelling(good: Path, tmp_path: Path) -> None:
    spelt = tmp_path / "spelt.toml"
    spelt.write_text(GOOD.replace("seed = 7", "seed=0x7 # seven") + "rounds = 20\n")
    assert Job.load(spelt).hash == Job.load(good).hash
    assert Job.load(good, ["seed=8"]).hash != Job.load(good).hash


def test_the_demo_is_the_job_file_in_jobs() -> None:
    from atoll.cli.run import _demo_job

    assert Job.load(Path("jobs/bbc-news.toml")).hash == _demo_job().hash


@pytest.mark.parametrize("path", sorted(Path("jobs").glob("*.toml")), ids=str)
def test_every_job_in_jobs_is_valid(path: Path) -> None:
    assert Job.load(path).name


def test_a_job_is_frozen(good: Path) -> None:
    job = Job.load(good)
    with pytest.raises(ValueError, match="frozen"):
        job.train.lr = 1.0  # type: ignore[misc]


def test_a_changed_copy_of_a_job_has_a_hash_of_its_own(good: Path) -> None:
    job = Job.load(good)
    before = job.hash
    copy = job.model_copy(update={"seed": 8})
    assert copy.hash == Job.load(good, ["seed=8"]).hash != before == job.hash


def test_toml_of_any_kind_is_read_the_same_way(good: Path) -> None:
    assert read_toml(good)["seed"] == 7


@pytest.mark.parametrize(
    ("found", "known", "said"),
    [
        ("scheduler", ["teacher", "lr", "epochs"], "expected one of teacher, lr, epochs"),
        (
            "token-classification",
            ["text-classification", "intent"],
            "expected one of text-classification, intent",
        ),
        ("learnrate", ["teacher_temperature", "lr"], "did you mean 'lr'?"),
        ("max_grad_norm", ["clipping_norm", "quantile"], "did you mean 'clipping_norm'?"),
        ("max_grad_norm", ["quantile"], "expected one of quantile"),
        ("batchsize", ["batch_size", "lr"], "did you mean 'batch_size'?"),
        ("text-clasification", ["text-classification", "intent"], "did you mean 'text-classification'?"),
    ],
)
def test_only_what_must_be_meant_is_suggested(found: str, known: list[str], said: str) -> None:
    assert did_you_mean(found, known) == said
