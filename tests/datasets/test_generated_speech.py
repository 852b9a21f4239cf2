"""Generated speech is audible, at 16 kHz, and says who spoke and what."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from atoll.datasets.synthetic import dictation, speech
from atoll.datasets.synthetic.assistant import generated_assistant
from atoll.datasets.synthetic.commands import INTENTS, command_words
from atoll.datasets.synthetic.dictation import generated_dictation
from atoll.datasets.synthetic.speech import RATE, VOICES, Voice, generated_speech, wav
from atoll.errors import DataError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng isn't installed")


@pytest.fixture(scope="module")
def spoken() -> dict[str, pa.Table]:
    return generated_speech()


def rows(splits: dict[str, pa.Table]) -> list[dict]:
    return pa.concat_tables(splits.values()).to_pylist()


def samples(row: dict) -> np.ndarray:
    values, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16", always_2d=True)
    assert rate == RATE and values.shape[1] == 1
    return values[:, 0]


@needs_espeak
@pytest.mark.processes
def test_a_seed_gives_the_same_clips_and_another_gives_others():
    assert rows(generated_speech(3, 24)) == rows(generated_speech(3, 24)) != rows(generated_speech(4, 24))


@needs_espeak
def test_every_clip_is_audible_and_lasts_about_as_long_as_its_text(spoken):
    assert [table.num_rows for table in spoken.values()] == [480, 120]
    lengths = []
    for row in rows(spoken):
        clip = samples(row).astype(float)
        lengths.append(len(clip) / RATE)
        assert 0.5 < lengths[-1] < 4
        assert np.sqrt((clip**2).mean()) > 500 and abs(clip).max() < 32_767
        # Speech is above silence in a good part of its clip.
        windows = clip[: len(clip) // 320 * 320].reshape(-1, 320)
        assert (np.sqrt((windows**2).mean(axis=1)) > 300).mean() > 0.4
    letters = [len(row["transcript"]) for row in rows(spoken)]
    assert np.corrcoef(letters, lengths)[0, 1] > 0.8


@needs_espeak
def test_sentences_differ_and_speakers_are_in_both_splits(spoken):
    assert len({row["transcript"] for row in rows(spoken)}) == 600
    assert {len(set(table["speaker"].to_pylist())) for table in spoken.values()} == {len(VOICES)}
    assert {len(set(table["intent"].to_pylist())) for table in spoken.values()} == {10}
    assert all(len(row["transcript"].split()) == len(row["slots"].split()) for row in rows(spoken))


@needs_espeak
@pytest.mark.processes
def test_every_voice_is_known_to_espeak():
    # It speaks in another voice where it doesn't know one, or no variant of it.
    alike = {speech._spoken("turn on the light", Voice(voice.name, 170, 50)) for voice in VOICES}
    assert len(alike) == len(VOICES)


@pytest.mark.processes
def test_a_program_that_fails_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "espeak-ng").write_text("#!/bin/sh\necho no data >&2\nexit 1\n")
    (tmp_path / "espeak-ng").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"^espeak-ng -v .*: no data, expected a WAV file$"):
        generated_speech(0, 3)


def test_without_espeak_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get install espeak-ng"):
        generated_speech(0, 3)


def test_resampling_keeps_a_tone_where_it_is():
    # One second of 440 Hz: 440 periods in 16,000 samples.
    tone = 20_000 * np.sin(2 * np.pi * 440 * np.arange(22_050) / 22_050)
    fewer = speech._resampled(tone)
    assert len(fewer) == RATE
    assert int(np.abs(np.fft.rfft(fewer)).argmax()) == 440
    assert np.abs(fewer[100:-100]).max() == pytest.approx(0.8 * 20_000, rel=0.01)


def test_a_wav_file_holds_its_samples():
    values = np.array([0, 1, -32_768, 32_767], dtype=np.int16)
    assert samples({"audio": {"bytes": wav(values)}}).tolist() == values.tolist()


@needs_espeak
@pytest.mark.processes
def test_dictation_has_other_words_and_voices_than_what_it_pretrains_for():
    commanded = {word for text in speech._DIGITS + speech._COLOURS for word in text.split()} | command_words()
    assert len(set(dictation.WORDS)) == len(dictation.WORDS) and not set(dictation.WORDS) & commanded
    both = (*dictation.VOICES, *VOICES)
    # A voice that espeak-ng doesn't know sounds like another.
    assert len({speech._spoken("turn on the light", Voice(v.name, 170, 50)) for v in both}) == len(both)
    said = generated_dictation(3, 40)
    assert [table.num_rows for table in said.values()] == [38, 2]
    assert rows(said) == rows(generated_dictation(3, 40)) != rows(generated_dictation(4, 40))
    assert {word for row in rows(said) for word in row["transcript"].split()} <= set(dictation.WORDS)
    assert len({row["transcript"] for row in rows(said)}) == 40
    assert all(0.5 < len(samples(row)) / RATE < 4 for row in rows(said))


@needs_espeak
@pytest.mark.processes
def test_the_assistants_commands_are_tagged_and_those_of_the_test_are_others():
    said = generated_assistant(3, 60)
    assert rows(said) == rows(generated_assistant(3, 60)) != rows(generated_assistant(4, 60))
    assert len({row["transcript"] for row in rows(said)}) == 60
    assert len({row["speaker"] for row in rows(said)}) == 6
    assert {row["intent"] for row in rows(said)} == set(INTENTS)
    for row in rows(said):
        assert len(row["slots"].split()) == len(row["transcript"].split())
        assert set(row["transcript"].split()) <= command_words()
        assert 0.5 < len(samples(row)) / RATE < 6
