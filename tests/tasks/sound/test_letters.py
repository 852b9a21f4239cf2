"""The letters that speech recognition writes with: a network's own, the job's, or those of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.backbones.ctc_vocabulary import (
    ENGLISH_LETTERS,
    from_code_points,
    has_letters,
    normalize_transcript,
)
from atoll.client.local_data import FolderShards
from atoll.client.site import Site
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.tasks.data_info import check_info_stated
from atoll.tasks.info_checks import check_info
from atoll.tasks.speech.task import SPEECH_RECOGNITION, SpeechRecognition
from atoll.trained import trained
from tests.support.models import small_wav2vec2, small_whisper
from tests.tasks.sound.test_speech import folder_of, job_of

GERMAN = ("Größe", "über Öl", "Straße", "ja")
GREEK = ("Γεια σου", "καλημέρα", "ναι", "όχι")  # noqa: RUF001
DIGITS = ("call 112", "room 7", "0 or 9", "no")
CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2, "clipping_norm": 0.5}


def job_on(source: Path, **tables: Any) -> Job:
    federation = {"federation": {"clients": 2, "rounds": 1} | tables.pop("federation", {})}
    return job_of(**{"data": {"source": str(source), "test_fraction": 0.0}} | federation | tables)


def written(learner: Learner, shard: Shard) -> list[str]:
    """What the letters that the loss learns of each target spell."""
    task = learner.task
    assert isinstance(task, SpeechRecognition)
    symbol = {number: letter for letter, number in task._letters.numbers.items()}
    texts = from_code_points(shard.targets_of(range(len(shard))))
    return ["".join(symbol[number] for number in task._letters.coded(text)) for text in texts]


@pytest.mark.parametrize("texts", [GERMAN, GREEK, DIGITS], ids=["german", "greek", "digits"])
def test_a_run_learns_whatever_letters_its_transcripts_have(
    tmp_path: Path, texts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    job = job_on(folder_of(tmp_path / "data", *texts))
    result = simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    learner, tensors = trained(tmp_path / "run")
    compared = [normalize_transcript(text) for text in texts]
    population = Population.of(job)
    assert sorted(written(learner, population.whole(learner))) == sorted(compared)
    others = sorted(set("".join(compared)) - set("abcdefghijklmnopqrstuvwxyz '"))
    assert result.facts["letters"] == others != []
    assert len(tensors["backbone.model.out.bias"]) == ENGLISH_LETTERS.size + len(others)
    assert "can't be written" not in caplog.text


def test_english_transcripts_change_nothing(tmp_path: Path) -> None:
    """Neither what is agreed on, by which a run of before is gone on with, nor the network."""
    job = job_on(folder_of(tmp_path / "data", "It's on!", "Off", "a b"))
    [told] = Population.of(job).roster(job).data_info
    assert told == SPEECH_RECOGNITION.merge_info([told, told]) == {}
    learner = Learner.of(job, SPEECH_RECOGNITION, {})
    assert isinstance(learner.task, SpeechRecognition)
    assert learner.task._letters == ENGLISH_LETTERS


def test_sites_with_different_letters_share_one_vocabulary_and_it_is_the_simulations(tmp_path: Path) -> None:
    german, greek = folder_of(tmp_path / "german", *GERMAN), folder_of(tmp_path / "greek", *GREEK)
    both = folder_of(tmp_path / "both", *GERMAN, *GREEK)
    job = job_on(both)
    site = Site(FolderShards.of("site", [german, greek]), discreet=True)
    hellos = site.hello(job)
    assert [hello.refusal for hello in hellos] == ["", ""]
    for hello in hellos:
        check_info(SPEECH_RECOGNITION, job, hello.data_info)
    assert not set(hellos[0].data_info["letters"]) & set(hellos[1].data_info["letters"])
    agreed = SPEECH_RECOGNITION.merge_info([hello.data_info for hello in hellos])
    [simulated] = Population.of(job).roster(job).data_info
    assert agreed == SPEECH_RECOGNITION.merge_info([simulated])
    assert agreed == SPEECH_RECOGNITION.merge_info([hello.data_info for hello in reversed(hellos)])
    learner = site.learner(job, agreed)
    shards = [learner.task.shard(site.shards.dataset(job, name), agreed) for name in ("german", "greek")]
    assert sorted(written(learner, shards[0])) == sorted(map(normalize_transcript, GERMAN))
    assert sorted(written(learner, shards[1])) == sorted(map(normalize_transcript, GREEK))


@pytest.mark.parametrize(
    "promise",
    [
        {"privacy": CLIENT, "federation": {"cohort_rate": 0.5}},
        {"federation": {"secure_aggregation": True, "clients": 3}},
    ],
    ids=["client", "secure sum"],
)
def test_where_privacy_is_promised_the_job_names_the_letters(tmp_path: Path, promise: dict[str, Any]) -> None:
    source = folder_of(tmp_path / "data", *GERMAN)
    job = job_on(source, **promise)
    with pytest.raises(
        ConfigError, match=r"^task\.options\.letters: missing, expected the letters of"
    ) as told:
        check_info_stated(job, SPEECH_RECOGNITION)
    assert "\n" not in str(told.value)
    with pytest.raises(ConfigError, match=r"^task\.options\.letters: missing"):
        simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    options = {
        "task": {"name": "speech-recognition", "options": {"letters": "abcdefghijklmnopqrstuvwxyzäöüß"}}
    }
    given = job_on(source, **promise, **options)
    check_info_stated(given, SPEECH_RECOGNITION)
    assert SPEECH_RECOGNITION.local_info(Population.of(given).train, given.data, given.task.options) == {}


def test_a_network_that_brings_its_letters_needs_none_under_a_promise(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", *GERMAN)
    promise = {"privacy": CLIENT, "federation": {"cohort_rate": 0.5}, "tune": {"method": "head"}}
    own, bare = small_wav2vec2(tmp_path / "own"), small_wav2vec2(tmp_path / "bare", letters=False)
    whisper = small_whisper(tmp_path / "whisper")
    check_info_stated(job_on(source, **promise, backbone={"name": str(own)}), SPEECH_RECOGNITION)
    for folder in (bare, whisper):
        with pytest.raises(ConfigError, match=r"^task\.options\.letters: missing"):
            check_info_stated(job_on(source, **promise, backbone={"name": str(folder)}), SPEECH_RECOGNITION)
    assert has_letters(job_of(backbone={"name": "hf:nobody/has-this-one"}).backbone)
    folder = {"name": str(own)}
    learner = Learner.of(job_of(backbone=folder), SPEECH_RECOGNITION, {"letters": ["ß", "ä"]})
    assert isinstance(learner.task, SpeechRecognition)
    assert not {"ß", "ä"} & learner.task._letters.numbers.keys()


def test_a_network_from_a_run_keeps_the_letters_of_that_run(tmp_path: Path) -> None:
    first = job_on(folder_of(tmp_path / "first", *GERMAN))
    simulate(first, tmp_path / "run", on_event=ignore_events, report=False)
    backbone = {"name": "atoll:small-ctc", "weights": str(tmp_path / "run"), "options": {"width": 24}}
    second = job_on(folder_of(tmp_path / "second", "grün é", "zwei 2"), backbone=backbone)
    assert has_letters(second.backbone) and not has_letters(first.backbone)
    [told] = Population.of(second).roster(second).data_info
    learner = Learner.of(second, SPEECH_RECOGNITION, SPEECH_RECOGNITION.merge_info([told]))
    assert sorted(written(learner, Population.of(second).whole(learner))) == ["grün ", "zwei "]
    assert len(learner.model.head.bias) == ENGLISH_LETTERS.size + len("äößü") - len("ä")
    about = tmp_path / "run" / "model" / "model.json"
    about.write_text("{}")
    with pytest.raises(WeightsError, match=r"model\.json: damaged"):
        has_letters(second.backbone)


@pytest.mark.parametrize(
    ("letters", "problem"),
    [
        (["ab"], "wrong form"),
        ([""], "wrong form"),
        (["a", "a"], "expected a list of at most 20000 names"),
        ("abc", "expected a list of at most 20000 names, found str"),
    ],
)
def test_a_greeting_with_letters_of_another_form_is_refused(letters: Any, problem: str) -> None:
    job = job_of(data={"source": "./elsewhere"})
    with pytest.raises(DataError, match=problem):
        check_info(SPEECH_RECOGNITION, job, {"letters": letters})


def test_a_check_names_the_letters_that_a_promise_would_lose(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", *GERMAN)
    data = DataSection(source=str(source))
    learner = Learner.of(job_of(), SPEECH_RECOGNITION, {})
    [note] = SPEECH_RECOGNITION.notes_on(source, data, {}, learner.backbone)
    assert note.startswith("letters besides the English ones: 'ßöü'; learnt where no privacy is promised")
    [note] = SPEECH_RECOGNITION.notes_on(source, data, {"letters": "abcdefgh"}, learner.backbone)
    assert "can't be written and aren't learnt: 'jlrstßöü'" in note
    own = Learner.of(job_of(backbone={"name": str(small_wav2vec2(tmp_path / "own"))}), SPEECH_RECOGNITION, {})
    [note] = SPEECH_RECOGNITION.notes_on(source, data, {}, own.backbone)
    assert "can't be written and aren't learnt: 'ßöü'" in note
    english = folder_of(tmp_path / "english", "yes", "no")
    assert SPEECH_RECOGNITION.notes_on(english, data, {}, learner.backbone) == ()
