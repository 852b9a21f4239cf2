"""Backbones, augmentations and columns of other people's code that take recordings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from atoll import plugins
from atoll.backbones.augmentation import masked_spectrum
from atoll.backbones.brought.names import brought_augmentations
from atoll.backbones.encoder import Variation
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.dp.example_draws import example_numbers, example_variation
from atoll.data.audio import log_mel, spectrogram
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import stream
from atoll.tasks import task_named
from tests.client.dp.test_private_training import by_hand, private
from tests.plugins.test_extend import FILES, result_of, say, without_extensions
from tests.support.models import small_wav2vec2

RATE = 16_000


@pytest.fixture(autouse=True)
def no_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What extensions a test brings is gone after it."""
    without_extensions(monkeypatch)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], None]:
    """Writes a plugin file and loads it."""

    def load(text: str) -> None:
        file = tmp_path / "mine.py"
        file.write_text(text)
        plugins.load_file(file)

    return load


def wav(seconds: float, number: int, rate: int = RATE) -> bytes:
    """A file of noise."""
    samples = np.random.default_rng(number).uniform(-0.5, 0.5, int(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def job(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "x", "seed": 1, "task": {"name": "intent", "options": {"input": "audio", "max_seconds": 0.5}},
        "data": {"source": "hums"}, "backbone": {"name": "plugin:bands", "weights": "random"},
        "tune": {"method": "full"},
    }  # fmt: skip
    return Job.parse(table | tables, origin="test")


def learner(one: Job) -> Learner:
    return Learner.of(one, task_named(one.task.name), {"intents": ["a", "b"], "tags": ["O"]})


def shard_of(sounds: Sequence[bytes]) -> Shard:
    targets = torch.tensor([[number % 2] for number in range(len(sounds))])
    return Shard(list(sounds), targets, tuple(bytes([number]) * 32 for number in range(len(sounds))))


def test_a_module_is_given_samples_and_gives_features(load: Callable[[str], None]) -> None:
    load(
        """
import torch
from atoll import plugins
from atoll.backbones import SoundBackbone

@plugins.backbone("bands")
class Mine(SoundBackbone):
    width = 3

    def prepare(self, samples, max_seconds):
        padded = torch.nn.functional.pad(samples, (0, int(16_000 * max_seconds) - len(samples)))
        return {"wave": padded, "length": torch.tensor(len(samples))}

    def forward(self, wave, length):
        return torch.stack([wave.sum(1), wave.square().sum(1), length.float()], dim=1)
"""
    )
    encoder = learner(job()).encoder
    sounds = [wav(0.25, 1), wav(0.5, 2), wav(0.25, 3, rate=8_000)]
    features = encoder(encoder.preprocess_and_collate(sounds))
    samples = [soundfile.read(io.BytesIO(sound), dtype="float32")[0] for sound in sounds]
    for row, heard in zip(features[:2], samples, strict=False):
        expected = [heard.sum(), np.square(heard).sum(), len(heard)]
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert features[2, 2] == 4_000  # of 2,000 at half the rate


def test_what_is_shorter_than_the_longest_has_silence_behind_its_spectrum(
    load: Callable[[str], None],
) -> None:
    load(FILES["hums.py"])
    encoder = learner(job()).encoder
    (short,), (long,) = (encoder.preprocess([wav(seconds, 1)]) for seconds in (0.1, 0.5))
    samples = soundfile.read(io.BytesIO(wav(0.1, 1)), dtype="float32")[0]
    own = spectrogram(samples)
    assert short["input"].shape == long["input"].shape == (51, 40) and own.shape == (11, 40)
    assert torch.equal(short["input"][:11], own) and not short["input"][11:].any()


MISTAKES: dict[str, tuple[str, str]] = {
    "mixes": (
        "self.layers(bands.transpose(1, 2)).mean(2) - bands.var(0).mean()",
        "features to depend on it alone",
    ),
    "frames": ("self.layers(bands.transpose(1, 2))", r"expected features \[4, 32\] of input \[4, 51, 40\]"),
    "raises": ("self.layers(bands).mean(2)", r"raised RuntimeError: .* given input \[4, 51, 40\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_module_that_is_no_backbone_of_sounds_is_refused(load: Callable[[str], None], name: str) -> None:
    body, message = MISTAKES[name]
    load(FILES["hums.py"].replace("self.layers(bands.transpose(1, 2)).mean(2)", body))
    with pytest.raises(ConfigError, match=message) as caught:
        _ = learner(job()).encoder
    assert str(caught.value).startswith("backbone.name: plugin:bands (") and "\n" not in str(caught.value)


def test_a_backbone_hears_only_where_one_vector_a_recording_will_do(load: Callable[[str], None]) -> None:
    load(FILES["hums.py"])
    for task in ({"name": "speech-recognition"}, {"name": "intent"}):
        with pytest.raises(
            ConfigError, match=f"{task['name']} takes no encoder of an extension, which makes"
        ):
            learner(job(task=task))
    images = job(task={"name": "image-classification"}, data={"source": "digits"})
    with pytest.raises(WeightsError, match="plugin:bands reads sounds, expected a backbone that reads image"):
        _ = Learner.of(images, task_named("image-classification"), {"classes": ["a", "b"]}).encoder


def test_the_private_update_is_that_of_recordings_taken_one_by_one(load: Callable[[str], None]) -> None:
    load(FILES["hums.py"])
    promise = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5}
    given = job(privacy=promise, data={"source": "hums", "classes": ["a", "b"]})
    one, shard, how = learner(given), shard_of([wav(0.1 + 0.05 * n, n) for n in range(6)]), private(0.05)
    start = one.initial()
    ours = train_privately(one, start, shard, how, client="c", round=1, plan={}).delta
    expected, norms = by_hand(one, start, shard, how)
    assert max(norms) > how.clipping_norm
    off, of = (
        torch.cat([one.flatten().double() for one in tensors]).norm()
        for tensors in ([ours[name] - delta for name, delta in expected.items()], expected.values())
    )
    assert float(of) > 0 and float(off) < 1e-3 * float(of)


def test_every_recording_has_its_own_draws_under_example_level_privacy(load: Callable[[str], None]) -> None:
    load(FILES["hums.py"])
    promise = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5}
    given = job(train={"augment": ["hiss"]}, privacy=promise, data={"source": "hums", "classes": ["a", "b"]})
    encoder, step = learner(given).encoder, (1, "north", 0)
    sounds, keys = [wav(0.5, number) for number in range(4)], [bytes([number]) * 32 for number in range(4)]

    def varied(rows: list[int]) -> torch.Tensor:
        variation = example_variation(example_numbers([keys[row] for row in rows]), given, step)
        return encoder.preprocess_and_collate([sounds[row] for row in rows], variation)["input"]

    whole = varied([0, 1, 2, 3])
    assert torch.equal(varied([3, 1])[0], whole[3]) and torch.equal(varied([3, 1])[1], whole[1])
    assert not torch.equal(whole, encoder.preprocess_and_collate(sounds)["input"])


def test_samples_vary_before_a_spectrum_is_made_of_them(load: Callable[[str], None]) -> None:
    load(FILES["hums.py"])
    given = job(backbone={"name": "atoll:small-ctc", "weights": "random"}, train={"augment": ["hiss"]})
    encoder, sound = learner(given).encoder, wav(0.3, 1)
    samples = torch.from_numpy(soundfile.read(io.BytesIO(sound), dtype="float32")[0])

    def seen(*names: str) -> torch.Tensor:
        variation = Variation(names, lambda place: stream(7, "test", place), brought_augmentations(given))
        return encoder.preprocess_and_collate([sound], variation)["sound"][0]

    draw = stream(7, "test", 0)
    loudness = 0.1 * torch.rand((), generator=draw)
    hissing = log_mel((samples + loudness * torch.randn(samples.shape, generator=draw)).numpy())
    assert torch.equal(seen("hiss"), hissing)
    assert torch.equal(seen("hiss", "spec-augment"), masked_spectrum(hissing, draw))


def test_a_network_that_hears_waves_takes_an_extensions_augmentation(
    load: Callable[[str], None], tmp_path: Path
) -> None:
    load(FILES["hums.py"])
    folder = small_wav2vec2(tmp_path / "waves")
    for name, fits in (("hiss", True), ("spec-augment", False)):
        given = job(backbone={"name": str(folder), "weights": "random"}, train={"augment": [name]})
        if not fits:
            with pytest.raises(ConfigError, match=r"wav2vec2 reads waves, .* expected an extension's"):
                _ = learner(given).encoder
            continue
        encoder = learner(given).encoder
        variation = Variation((name,), lambda place: stream(7, "test", place), brought_augmentations(given))
        wave = encoder.preprocess_and_collate([wav(0.3, 1)], variation)["sound"]
        assert wave.shape == (1, 4_800)
        assert not torch.equal(wave, encoder.preprocess_and_collate([wav(0.3, 1)])["sound"])


MISHEARD: dict[str, tuple[str, str]] = {
    "shorter": ("return samples[1:]", r"samples as many as it was given, \[4000\], found \[3999\]"),
    "of another type": ("return samples.double()", "a float32 tensor, found torch.float64"),
    "no tensor": ("return samples.numpy()", "a float32 tensor, found float32"),
    "not finite": ("return samples / 0", "samples that are finite, found others"),
    "draws from torch": ("return samples * torch.rand(())", "draws from something else"),
}


@pytest.mark.parametrize("name", MISHEARD)
def test_an_augmentation_that_breaks_the_rules_is_refused(load: Callable[[str], None], name: str) -> None:
    body, message = MISHEARD[name]
    changed = FILES["hums.py"].partition("    loudness = 0.1")[0] + f"    {body}\n"
    load(changed)
    with pytest.raises(ConfigError, match=message) as caught:
        learner(job(train={"augment": ["hiss"]}))
    assert str(caught.value).startswith("train.augment: hiss (") and "\n" not in str(caught.value)


def test_a_spectrums_augmentation_is_refused_where_an_extension_prepares(load: Callable[[str], None]) -> None:
    load(FILES["hums.py"])
    with pytest.raises(ConfigError, match=r"spec-augment hides parts of a spectrum .* plugin:bands has none"):
        learner(job(train={"augment": ["spec-augment"]}))
    with pytest.raises(ConfigError, match=r"expected 'crop', .* for image-classification, found 'hiss'"):
        learner(job(task={"name": "image-classification"}, train={"augment": ["hiss"]}))


@pytest.mark.processes
def test_the_engine_changes_no_bit_of_sounds_and_what_was_learnt_predicts(tmp_path: Path) -> None:
    for name in ("hums.py", "hums.toml"):
        (tmp_path / name).write_text(FILES[name])
    hashes = set()
    for engine in ("loop", "inline --workers 2"):
        line = f"atoll simulate hums.toml --plugin hums.py --force --out run --engine {engine}"
        code, _, errors = say(tmp_path, line)
        assert code == 0, errors
        hashes.add(result_of(tmp_path / "run")["model_sha256"])
        assert result_of(tmp_path / "run")["final"]["server"]["intent_accuracy"] > 0.9
    assert len(hashes) == 1
    (tmp_path / "hum.wav").write_bytes(wav(0.3, 1))
    code, printed, errors = say(tmp_path, "atoll predict run hum.wav --json --plugin hums.py")
    assert code == 0, errors
    assert json.loads(printed)["label"] in ("rattles", "runs well")


COLUMNS = """
import torch
from torch import nn
from atoll import plugins
from atoll.tasks import IMAGE, NAME, SOUND, ModuleTask

@plugins.task("seen-and-heard")
class SeenAndHeard(ModuleTask):
    columns = {"photo": IMAGE, "sound": SOUND, "state": NAME}
    label = "state"

    def input(self, row):
        red = torch.tensor(row["photo"].resize((1, 1)).getpixel((0, 0))) / 255
        return torch.cat([red, torch.tensor([float(row["sound"].square().mean()), len(row["sound"])])])

    def module(self, data_info):
        return nn.Linear(5, len(data_info["classes"]))
"""


def rows_in(folder: Path) -> Path:
    """A table of pictures and recordings, which lie beside it."""
    for number in range(12):
        Image.new("RGB", (4, 4), (20 * number, 0, 255)).save(folder / f"{number}.png")
        (folder / f"{number}.wav").write_bytes(wav(0.1, number, rate=8_000))
    lines = [f"{number}.png,{number}.wav,{'on' if number % 2 else 'off'}" for number in range(12)]
    table = folder / "rows.csv"
    table.write_text("photo,sound,state\n" + "\n".join(lines) + "\n")
    return table


def test_a_task_of_its_own_takes_pictures_and_recordings(load: Callable[[str], None], tmp_path: Path) -> None:
    load(COLUMNS)
    task, table = task_named("seen-and-heard"), rows_in(tmp_path)
    one = Job.parse(
        {
            "name": "x", "seed": 1, "task": {"name": "seen-and-heard"}, "data": {"source": str(table)},
            "backbone": {"name": "task:network", "weights": "random"}, "tune": {"method": "full"},
        },
        origin="test",
    )  # fmt: skip
    read = task.records({}).read(table, one.data).train
    bound = Learner.of(one, task, {"classes": ["off", "on"]})
    shard = task.shard(read, {"classes": ["off", "on"]})
    batch = bound.collate(shard, list(range(12)))
    samples, _ = soundfile.read(io.BytesIO(wav(0.1, 3, rate=8_000)), dtype="float32")
    (place,) = [row for row, values in enumerate(batch["only input"]) if round(float(values[0]) * 255) == 60]
    assert shard.targets[place] == 1 and batch["only input"][place, 4] == 1_600 == 2 * len(samples)
    row = task.parse_input(json.dumps({"photo": str(tmp_path / "3.png"), "sound": str(tmp_path / "3.wav")}))
    assert torch.equal(task.input(row), batch["only input"][place])


def test_a_file_that_is_none_is_named_with_its_row(load: Callable[[str], None], tmp_path: Path) -> None:
    load(COLUMNS)
    task, table = task_named("seen-and-heard"), rows_in(tmp_path)
    (tmp_path / "5.wav").write_bytes(b"RIFF")
    (tmp_path / "7.png").write_bytes(b"no picture")
    found = task.records({}).inspect(table, job().data)
    assert found.bad == 2 and "5.wav: not a sound that can be read" in found.problems[0]
    assert "7.png" in found.problems[1]
    with pytest.raises(DataError, match=r"5\.wav: not a sound"):
        task.parse_input(json.dumps({"sound": str(tmp_path / "5.wav")}))


def test_bytes_in_a_parquet_file_will_do(load: Callable[[str], None], tmp_path: Path) -> None:
    load(COLUMNS)
    rows_in(tmp_path)
    cells = {
        "photo": [(tmp_path / f"{number}.png").read_bytes() for number in range(12)],
        "sound": [(tmp_path / f"{number}.wav").read_bytes() for number in range(12)],
        "state": ["on", "off"] * 6,
    }
    pq.write_table(pa.table(cells), tmp_path / "rows.parquet")
    read = task_named("seen-and-heard").records({}).read(tmp_path / "rows.parquet", job().data)
    assert len(read.train) == 12
