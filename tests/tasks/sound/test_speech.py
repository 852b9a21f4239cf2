"""Speech recognition: what is read, what padding may not change, what counts, what is trained."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from atoll.backbones.audio import SmallCtcOptions
from atoll.backbones.augmentation import masked_spectrum
from atoll.backbones.ctc_vocabulary import ENGLISH_LETTERS, code_points, from_code_points
from atoll.backbones.options import RecurrentLayers, options_of
from atoll.client.training.local_sgd import train_model
from atoll.data.audio import RATE, checked_sound, log_mel
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning import trainable
from atoll.learning.learner import Learner, sum_states
from atoll.protocol.random_streams import stream
from atoll.protocol.tensors import tensors_sha256
from atoll.tasks.forecasting.models import RecurrentOptions
from atoll.tasks.speech.task import IGNORE_INDEX, SPEECH_RECOGNITION
from tests.support.models import small_wav2vec2, small_whisper

PITCHES = {"a": 300.0, "b": 700.0, "o": 1500.0, " ": 0.0}


def tones(text: str, rate: int = RATE) -> NDArray[np.float32]:
    """A tone for each letter, so that what was said can be heard."""
    time = np.arange(int(0.12 * rate)) / rate
    return np.concatenate([np.sin(2 * np.pi * PITCHES.get(letter, 300.0) * time) for letter in text]).astype(
        np.float32
    )


def sound(samples: NDArray[np.float32], rate: int = RATE, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def folder_of(root: Path, *texts: str) -> Path:
    root.mkdir()
    for number, text in enumerate(texts):
        (root / f"{number}.wav").write_bytes(sound(tones(text)))
    rows = [{"audio": f"{number}.wav", "transcript": text} for number, text in enumerate(texts)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def job_of(tune: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "speech",
        "seed": 4,
        "task": {"name": "speech-recognition"},
        "data": {"source": "generated-speech"},
        "backbone": {"name": "atoll:small-ctc", "weights": "random", "options": {"width": 24}},
        "tune": tune or {"method": "full"},
        "train": {"optimizer": "adamw", "lr": 0.005, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def learner_of(tune: dict[str, Any] | None = None, **tables: Any) -> Learner:
    return Learner.of(job_of(tune, **tables), SPEECH_RECOGNITION, {})


def shard_of(learner: Learner, root: Path, *texts: str) -> Shard:
    folder = folder_of(root, *texts)
    table = learner.task.read(folder, DataSection(source=str(folder)), {})
    return learner.task.shard(table.train, {})


TEXTS = ("ab", "abba", "bob", "oa ob", "a bob", "baobab a")


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_any_rate_and_channels_become_16_khz_mono(kind: str, rate: int) -> None:
    both = np.stack([tones("ab", rate), tones("ab", rate)], axis=1)
    found = checked_sound(sound(both, rate, kind), "x", 20)
    assert len(found) == pytest.approx(0.24 * RATE, abs=2)
    middle = slice(200, 1700)
    # Of 0.9 of a sine's values, away from the ends where the filter rings.
    assert np.abs(found[middle] - tones("ab")[middle]).max() < 0.05


@pytest.mark.parametrize(
    ("name", "content", "transcript", "problem"),
    [
        ("a.wav", b"no sound", "a", "not a sound that can be read"),
        ("a.wav", sound(tones("a"))[:30], "a", "not a sound that can be read"),
        ("a.wav", sound(np.zeros(4, np.float32)), "a", "0.00 seconds, expected 0.05 to 20"),
        ("a.wav", sound(np.zeros(21 * RATE, np.float32)), "a", r"21.00 seconds, expected .*max_seconds"),
        ("a.wav", sound(tones("a")), "?!", "expected words"),
        ("b.wav", sound(tones("a")), "a", "a.wav"),
    ],
)
def test_bad_recordings_are_told_in_one_line(
    tmp_path: Path, name: str, content: bytes, transcript: str, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "data.jsonl").write_text(json.dumps({"audio": "a.wav", "transcript": transcript}))
    with pytest.raises(DataError, match=problem) as told:
        SPEECH_RECOGNITION.read(tmp_path, DataSection(source=str(tmp_path)), {})
    assert "\n" not in str(told.value)


def test_what_is_written_is_read_again_with_the_same_keys(tmp_path: Path) -> None:
    folder, data = folder_of(tmp_path / "in", "ab", "bob"), DataSection(source="x", columns={})
    table = SPEECH_RECOGNITION.read(folder, data, {})
    SPEECH_RECOGNITION.write(table.train, tmp_path / "out", data)
    again = SPEECH_RECOGNITION.read(tmp_path / "out", data, {})
    assert SPEECH_RECOGNITION.keys(again.train) == SPEECH_RECOGNITION.keys(table.train)


@pytest.mark.parametrize("known", [SmallCtcOptions, RecurrentOptions])
def test_dropout_that_would_drop_nothing_is_refused(known: type[RecurrentLayers]) -> None:
    assert options_of({"layers": 2, "dropout": 0.2}, known).dropout == 0.2
    with pytest.raises(ConfigError, match=r"dropout: .* expected layers of 2 or more, found 1"):
        options_of({"dropout": 0.2}, known)


def networks(root: Path) -> dict[str, dict[str, Any]]:
    return {
        "small": {"name": "atoll:small-ctc", "weights": "random"},
        "layer": {"name": str(small_wav2vec2(root / "layer"))},
        "group": {"name": str(small_wav2vec2(root / "group", norm="group"))},
        "hubert": {"name": str(small_wav2vec2(root / "hubert", kind="Hubert"))},
        "whisper": {"name": str(small_whisper(root / "whisper"))},
    }


@pytest.mark.parametrize("name", ["small", "layer", "group", "hubert", "whisper"])
def test_the_padding_of_its_neighbours_changes_nothing_of_a_recording(tmp_path: Path, name: str) -> None:
    learner = learner_of(backbone=networks(tmp_path)[name])
    short, long = sound(tones("ab")), sound(tones("baobab bob"))
    model, encoder = learner.model.eval(), learner.encoder
    with torch.no_grad():
        alone, together = (
            model(encoder.preprocess_and_collate([short])),
            model(encoder.preprocess_and_collate([short, long])),
        )
    frames = alone.shape[1]
    assert together.shape[1] > frames
    assert torch.allclose(alone[0], together[0, :frames], atol=1e-4)
    targets = code_points(["ab"], IGNORE_INDEX)
    assert float(learner.task.loss(together[:1], targets)) == pytest.approx(
        float(learner.task.loss(alone, targets)), rel=1e-4
    )


def test_the_loss_is_ctc_by_the_letter_and_padding_of_targets_does_not_count() -> None:
    learner = learner_of()
    torch.manual_seed(0)
    outputs = torch.randn(2, 12, ENGLISH_LETTERS.size)
    targets = code_points(["ab", "bo a"], IGNORE_INDEX)
    assert (targets[0, 2:] == IGNORE_INDEX).all()
    wanted = []
    for row, text in enumerate(("ab", "bo a")):
        coded = torch.tensor([ENGLISH_LETTERS.coded(text)])
        each = torch.nn.functional.ctc_loss(
            outputs[row].log_softmax(1).unsqueeze(1), coded, torch.tensor([12]), torch.tensor([len(text)]),
            blank=0, reduction="sum",
        )  # fmt: skip
        wanted.append(float(each) / len(text))
    assert float(learner.task.loss(outputs, targets)) == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_a_transcript_too_long_for_its_recording_costs_nothing_beside_a_longer_one_either() -> None:
    learner = learner_of()
    short, long = sound(tones("a")), sound(tones("baobab bob"))
    model, encoder = learner.model.eval(), learner.encoder
    said = code_points(["abba oa bob oa bob", "bob"], IGNORE_INDEX)
    with torch.no_grad():
        together, alone = (
            model(encoder.preprocess_and_collate([short, long])),
            model(encoder.preprocess_and_collate([long])),
        )
    assert float(learner.task.loss(together, said)) == pytest.approx(
        float(learner.task.loss(alone, code_points(["bob"], IGNORE_INDEX))) / 2, rel=1e-4
    )


def test_what_is_heard_merges_repeats_and_skips_blanks() -> None:
    heard = [
        ENGLISH_LETTERS.numbers["a"],
        ENGLISH_LETTERS.numbers["a"],
        0,
        ENGLISH_LETTERS.numbers["a"],
        ENGLISH_LETTERS.numbers[" "],
        ENGLISH_LETTERS.numbers["b"],
        0,
    ]
    outputs = torch.nn.functional.one_hot(torch.tensor([heard]), ENGLISH_LETTERS.size).float()
    assert ENGLISH_LETTERS.texts(outputs) == ["aa b"]
    assert from_code_points(code_points(["ça va", ""], IGNORE_INDEX)) == ["ça va", ""]


def test_metrics_of_clients_add_up_to_those_of_all_data(tmp_path: Path) -> None:
    learner = learner_of()
    whole = shard_of(learner, tmp_path / "d", *TEXTS)
    tensors = learner.initial()
    parts = [whole.select([0, 1]), whole.select([2, 3, 4, 5])]
    together = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    assert together == pytest.approx(learner.compute(learner.evaluate(tensors, whole)), rel=1e-5)


GERMAN = "abcdefghijklmnopqrstuvwxyzäöüß0123456789"


@pytest.mark.parametrize(
    ("letters", "said", "learnt"),
    [
        (None, "Größe 112", "gre "),
        (GERMAN, "Gro\u0308ße, 112!", "größe 112"),
        ("ЁЖИК", "ёжик…", "ёжик"),
        ("你好", "«你好»", "你好"),
    ],
)
def test_letters_of_any_script_are_learnt_where_the_job_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, letters: str | None, said: str, learnt: str
) -> None:
    learner = learner_of(
        task={"name": "speech-recognition", "options": {"letters": letters} if letters else {}}
    )
    shard = shard_of(learner, tmp_path / "d", said)
    [text] = from_code_points(shard.targets_of([0]))
    known = learner.task._letters  # type: ignore[attr-defined]
    written = {number: letter for letter, number in known.numbers.items()}
    assert "".join(written[number] for number in known.coded(text)) == learnt
    assert learner.model.head.weight.shape[0] == known.size == len(known.numbers) + 1
    told = "1 of 1 transcripts hold letters that can't be written and aren't learnt: '12ßö'" in caplog.text
    assert told == (letters is None)


def test_a_recogniser_without_its_table_of_letters_is_refused(tmp_path: Path) -> None:
    folder = small_wav2vec2(tmp_path / "model")
    given = {"name": "speech-recognition", "options": {"letters": GERMAN}}
    with pytest.raises(ConfigError, match=r"task\.options\.letters: .*vocab\.json says the letters"):
        learner_of(task=given, backbone={"name": str(folder)}).model  # noqa: B018
    (folder / "vocab.json").unlink()
    with pytest.raises(WeightsError, match=r"model: Wav2Vec2ForCTC without vocab\.json"):
        learner_of(backbone={"name": str(folder)}).model  # noqa: B018


@pytest.mark.parametrize("tune", [{"method": "head"}, {"method": "last-k", "layers": 1}, {"method": "full"}])
def test_the_small_network_takes_a_step(tmp_path: Path, tune: dict[str, Any]) -> None:
    learner = learner_of(tune)
    shard = shard_of(learner, tmp_path / "d", *TEXTS)
    update = train_model(learner, learner.initial(), shard, learner.job, client="a", round=1, plan={})
    assert all(bool(t.any()) for name, t in update.delta.items() if "out" in name)
    if tune["method"] == "last-k":
        assert {name.split(".")[2] for name in update.delta} == {"recurrent", "out"}


def test_the_small_network_has_no_layer_for_lora() -> None:
    with pytest.raises(ConfigError, match="no layer for LoRA"):
        learner_of({"method": "lora"}).model  # noqa: B018


@pytest.mark.parametrize(
    "tune",
    [
        {"method": "head"},
        {"method": "last-k", "layers": 1},
        {"method": "lora", "rank": 2},
        {"method": "full"},
    ],
)
@pytest.mark.parametrize("letters", [True, False])
def test_a_folder_of_wav2vec_takes_a_step(tmp_path: Path, tune: dict[str, Any], letters: bool) -> None:
    folder = small_wav2vec2(tmp_path / "model", letters=letters)
    learner = learner_of(tune, backbone={"name": str(folder)})
    shard = shard_of(learner, tmp_path / "d", *TEXTS)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert any(bool(t.any()) for t in update.delta.values())
    # A layer of letters that came with the weights stays as it is under LoRA; a fresh one is trained.
    stays = tune["method"] == "lora" and letters
    assert ("backbone.model.lm_head.weight" in start) != stays
    if tune["method"] == "last-k":
        others = {name for name in start if ".encoder.layers.1." not in name}
        assert others == {"backbone.model.lm_head.weight", "backbone.model.lm_head.bias"}
    if tune["method"] == "head":
        assert len(start) == 2
    assert len(trainable.blocks(learner.model.backbone.model, learner.model.head)) >= 2


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_folder_with_ctc_says_what_transformers_says(tmp_path: Path, kind: str, norm: str) -> None:
    import transformers

    folder = small_wav2vec2(tmp_path / "model", kind=kind, norm=norm)
    samples = tones("baobab bob")
    learner = learner_of({"method": "head"}, backbone={"name": str(folder)})
    batch = learner.encoder.preprocess_and_collate([sound(samples)])
    theirs = getattr(transformers, f"{kind}ForCTC").from_pretrained(folder).eval()
    read, _ = soundfile.read(io.BytesIO(sound(samples)), dtype="float32")
    given = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(
        read, sampling_rate=RATE, return_tensors="pt"
    )
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    with torch.no_grad():
        own, logits = learner.model.eval()(batch), theirs(given.input_values).logits
    assert torch.allclose(own, logits, atol=1e-4)
    # A random network says what no letter stands for too: here it must choose among letters.
    logits[:, :, 1:4] = -1e4
    heard = learner.task.format_predictions(learner.model._letters.texts(logits), {})[0]["label"]
    said = tokenizer.batch_decode(logits.argmax(2))[0].lower()
    assert heard == " ".join(said.split()) != ""


def test_networks_that_hear_no_letters_are_refused(tmp_path: Path) -> None:
    from tests.support.models import small_t5

    with pytest.raises(WeightsError, match="does not hear"):
        learner_of(backbone={"name": "raw:pixels"}).model  # noqa: B018
    with pytest.raises(WeightsError, match="does not read waves"):
        learner_of(backbone={"name": str(small_t5(tmp_path / "t5"))}).model  # noqa: B018


def test_example_level_privacy_is_refused_by_name() -> None:
    privacy = {"unit": "example", "epsilon": 1.0, "delta": 1e-5, "clipping_norm": 1.0,
               "sampling_rate": 0.5, "steps": 1}  # fmt: skip
    with pytest.raises(ConfigError, match=r"privacy\.unit = 'example'.*speech-recognition"):
        learner_of(privacy=privacy)


def test_log_mel_features_say_which_tone_sounds() -> None:
    low, high = (log_mel(np.concatenate([tones("  "), tones(x)])) for x in "ao")
    assert low[-5:].mean(0).argmax() < high[-5:].mean(0).argmax()


def test_learning_beats_not_learning(tmp_path: Path) -> None:
    learner = learner_of(train={"optimizer": "adamw", "lr": 0.01, "batch_size": 3, "epochs": 80})
    shard = shard_of(learner, tmp_path / "d", *TEXTS)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    trained = {name: t + update.delta[name] for name, t in start.items()}
    before, after = (learner.compute(learner.evaluate(t, shard)) for t in (start, trained))
    assert before["wer"] >= 0.9 and after["wer"] < 0.3


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng isn't installed")
@pytest.mark.processes
def test_generated_speech_is_a_source_of_the_task() -> None:
    from atoll.datasets.synthetic.speech import generated_speech

    table = SPEECH_RECOGNITION.from_builtin(generated_speech(3, 16), job_of())
    learner = learner_of()
    shard = learner.task.shard(table.train, {})
    assert learner.collate(shard, [0, 1])["sound"].shape[2] == 40


def test_a_spectrum_is_masked_as_the_paper_says_and_repeats_with_its_stream() -> None:
    spectrum = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    masks = [masked_spectrum(spectrum, stream(1, "test", n)) != spectrum for n in range(400)]
    assert torch.equal(masked_spectrum(spectrum, stream(1, "test", 0)) != spectrum, masks[0])
    bands = torch.stack([m.all(0).sum() for m in masks]).float()
    frames = torch.stack([m.all(1).sum() for m in masks]).float()
    # Two masks of up to 10 of 30 bands and 10 of 50 frames, each 5 wide on average, seldom over each other.
    assert bands.max() <= 20 and frames.max() <= 20
    assert 8 < bands.mean() < 10 and 8 < frames.mean() < 10
    for mask in masks[:20]:
        whole = mask.all(0).unsqueeze(0) | mask.all(1).unsqueeze(1)
        assert torch.equal(whole, mask)  # nothing is hidden but whole bands and whole frames
    assert (masked_spectrum(spectrum, stream(1, "test", 0))[masks[0]] == spectrum.mean()).all()


def test_training_on_masked_spectra_repeats_and_measuring_sees_none(tmp_path: Path) -> None:
    found = learner_of(
        train={"optimizer": "adamw", "lr": 0.005, "batch_size": 4, "augment": ["spec-augment"]}
    )
    shard, first = shard_of(found, tmp_path / "data", *TEXTS), found.initial()
    deltas = [
        train_model(found, first, shard, found.job, client="a", round=r, plan={}).delta for r in (1, 1, 2)
    ]
    assert tensors_sha256(deltas[0]) == tensors_sha256(deltas[1]) != tensors_sha256(deltas[2])
    plain = learner_of()
    measured = [one.compute(one.evaluate(first, shard)) for one in (found, plain)]
    assert measured[0] == measured[1]


def test_what_cannot_be_masked_says_so() -> None:
    with pytest.raises(ConfigError, match=r"train\.augment: expected 'spec-augment' for speech-recognition"):
        SPEECH_RECOGNITION.check(job_of(train={"augment": ["crop"]}))
    with pytest.raises(ConfigError, match=r"train\.cached_views: speech-recognition has no features to keep"):
        head = {"method": "head"}
        learner_of(head, train={"augment": ["spec-augment"], "cached_views": 2})
