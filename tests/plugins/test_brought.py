"""Data sources, backbones and augmentations of other people's code: their bits, caches and mistakes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from atoll import plugins
from atoll.backbones.brought import augmentations
from atoll.backbones.brought.names import AUGMENTATIONS, brought_augmentations
from atoll.backbones.resolve import resolve
from atoll.client.dp.example_draws import example_numbers, example_variation
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, InputError
from atoll.job.job import Job
from atoll.kit.extensions import extension_hashes
from atoll.learning.learner import Learner
from atoll.plugins import plugin_files, registry
from atoll.server.job_checks import check_simulated
from atoll.server.run.test_set import read_source
from atoll.tasks import task_named
from tests.plugins.test_extend import FILES, result_of, say, without_extensions
from tests.support.processes import python


@pytest.fixture(autouse=True)
def no_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What extensions a test brings is gone after it."""
    without_extensions(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's files."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a plugin file and loads it; what the one before brought is forgotten."""

    def load(text: str) -> Path:
        registry._brought.update({kind: {} for kind in plugins.GROUPS})
        plugin_files._files.clear()
        file = tmp_path / "mine.py"
        file.write_text(text)
        plugins.load_file(file)
        return file

    return load


def job(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "x", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "plugin:mine", "weights": "random"},
    }  # fmt: skip
    return Job.parse(table | tables, origin="test")


def learner(one: Job) -> Learner:
    task = task_named(one.task.name)
    return Learner.of(one, task, {"classes": ["a", "b"]})


COLOURS = """
import torch
from atoll import plugins
from atoll.backbones import ImageBackbone

@plugins.backbone("mine")
class Mine(ImageBackbone):
    image_size, width = 16, 3

    def forward(self, pixels):
        return FACTOR * pixels.mean(dim=(2, 3))
"""
"""Each colour's mean, times a factor."""


def pictures(count: int) -> tuple[list[bytes], np.ndarray]:
    """(PNG files of 16 x 16, their pixels [count, 16, 16, 3])."""
    pixels = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    found = []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        found.append(file.getvalue())
    return found, pixels


def shard_of(inputs: list[Any]) -> Shard:
    keys = tuple(bytes([number]) * 32 for number in range(len(inputs)))
    return Shard(inputs, torch.zeros(len(inputs), dtype=torch.int64), keys)


# Backbones


def test_changed_code_never_gets_features_that_older_code_made(load: Callable[[str], Path]) -> None:
    inputs, pixels = pictures(5)
    shard, means = shard_of(inputs), pixels.astype(np.float64).mean(axis=(1, 2)) / 255
    for factor in (1, 3, 1):  # the last time from the cache
        load(COLOURS.replace("FACTOR", str(factor)))
        found = learner(job()).features.plain(shard).numpy()
        np.testing.assert_allclose(found, factor * means, rtol=1e-5)


def test_a_changed_file_beside_the_backbones_own_changes_what_features_are_kept_under(
    load: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs, pixels = pictures(3)
    shard, means = shard_of(inputs), pixels.astype(np.float64).mean(axis=(1, 2)) / 255
    for factor in (2, 5):
        (tmp_path / "beside_mine.py").write_text(
            f"def scale(x):\n    return {factor} * x\n# {'-' * factor}\n"
        )
        sys.modules.pop("beside_mine", None)
        text = COLOURS.replace("FACTOR * pixels.mean(dim=(2, 3))", "scale(pixels.mean(dim=(2, 3)))")
        load("from beside_mine import scale\n" + text)
        found = learner(job()).features.plain(shard).numpy()
        np.testing.assert_allclose(found, factor * means, rtol=1e-5)
    sys.modules.pop("beside_mine", None)


WITH_WEIGHTS = """
import torch
from pathlib import Path
from pydantic import BaseModel
from atoll import plugins
from atoll.backbones import ImageBackbone

@plugins.backbone("mine")
class Mine(ImageBackbone):
    image_size, width = 16, 4
    pretrained = PRETRAINED

    class Options(BaseModel):
        slope: float = 0.1

    def __init__(self, options):
        super().__init__()
        self.slope = options.slope
        self.layer = torch.nn.Linear(3, 4)
        if self.pretrained is True:
            self.load_state_dict(torch.load(Path(__file__).parent / "own.pt", weights_only=True))

    def forward(self, pixels):
        return torch.nn.functional.leaky_relu(self.layer(pixels.mean(dim=(2, 3))), self.slope)
"""


def test_a_backbone_is_identified_by_code_options_and_tensors(
    load: Callable[[str], Path], tmp_path: Path
) -> None:
    def fingerprint(weights: str = "random", seed: int = 1, **options: float) -> str:
        section = {"name": "plugin:mine", "weights": weights, "options": options}
        return resolve(job(backbone=section).backbone, seed).fingerprint

    def write(file: str, value: float) -> None:
        torch.save({"layer.weight": torch.full((4, 3), value), "layer.bias": torch.zeros(4)}, tmp_path / file)

    load(WITH_WEIGHTS.replace("PRETRAINED", "'own.pt'"))
    write("own.pt", 1.0)
    seen = [fingerprint(), fingerprint(seed=2), fingerprint(slope=0.2), fingerprint("pretrained")]
    assert fingerprint() == seen[0] and len(set(seen)) == 4
    write("own.pt", 2.0)
    assert fingerprint("pretrained") not in seen
    write("other.pt", 2.0)
    assert fingerprint(str(tmp_path / "other.pt")) == fingerprint("pretrained")  # the same tensors
    load(WITH_WEIGHTS.replace("PRETRAINED", "True"))
    loaded = fingerprint("pretrained")
    write("own.pt", 3.0)
    assert fingerprint("pretrained") != loaded


TEXTS = """
import torch
from atoll import plugins
from atoll.backbones import TextBackbone

@plugins.backbone("mine")
class Mine(TextBackbone):
    width = 256

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(256))

    def prepare(self, text):
        counts = torch.bincount(torch.tensor(list(text.encode())), minlength=256)
        return {"counts": counts.float(), "length": torch.tensor(len(text))}

    def forward(self, counts, length):
        return self.scale * counts / length[:, None]

@plugins.augmentation("shout", of="texts")
def shout(text, generator):
    return text.upper() if torch.rand((), generator=generator) < 0.5 else text

@plugins.source("sentences")
def sentences(offline):
    texts = [f"{'yes ' * (n % 7 + 1)} {n}" if n % 2 else f"{'no ' * (n % 5 + 1)} {n}" for n in range(120)]
    return {"train": {"text": texts, "label": ["even" if n % 2 == 0 else "odd" for n in range(120)]}}
"""


def test_texts_go_through_a_modules_own_preparation(load: Callable[[str], Path]) -> None:
    load(TEXTS)
    given = job(task={"name": "text-classification"}, data={"source": "sentences"})
    texts = ["a first text", "Zwei", "x" * 50]
    found = learner(given).features.plain(shard_of(texts)).numpy()
    counts = [np.bincount(list(text.encode()), minlength=256) / len(text) for text in texts]
    np.testing.assert_allclose(found, np.array(counts), rtol=1e-6)


@pytest.mark.processes
@pytest.mark.parametrize("method", ["head", "full"])
def test_texts_are_learnt_with_an_own_backbone_source_and_augmentation(tmp_path: Path, method: str) -> None:
    (tmp_path / "texts.py").write_text(TEXTS)
    (tmp_path / "job.toml").write_text(
        'name = "x"\nseed = 1\ntask = { name = "text-classification" }\ndata = { source = "sentences" }\n'
        'backbone = { name = "plugin:mine", weights = "random" }\nfederation = { clients = 4, rounds = 3 }\n'
        f'tune = {{ method = "{method}" }}\ntrain = {{ augment = ["shout"], lr = 1.0, epochs = 5 }}\n'
    )
    hashes = set()
    for engine in ("loop", "inline --workers 2"):
        line = f"atoll simulate job.toml --plugin texts.py --force --out run --engine {engine}"
        code, _, errors = say(tmp_path, line)
        assert code == 0, errors
        result = result_of(tmp_path / "run")
        hashes.add(result["model_sha256"])
        assert result["final"]["server"]["accuracy"] > 0.8
    assert len(hashes) == 1
    if method != "head":
        return
    (tmp_path / "public.txt").write_text("".join(f"{'yes ' * (n % 7)}no {n}\n" for n in range(40)))
    for line in (
        "atoll audit run --plugin texts.py --planted 0",
        "atoll advise job.toml --plugin texts.py --backbones plugin:mine",
        "atoll distil run --student plugin:mine --data public.txt --plugin texts.py"
        " --set backbone.weights=random --set train.augment=[] --set federation.rounds=1",
    ):
        code, printed, errors = say(tmp_path, line)
        assert code == 0, errors
        assert re.search("plugin:mine|run-student|audit.json", printed)


def test_both_sides_of_a_pair_may_be_an_extensions(load: Callable[[str], Path]) -> None:
    text = COLOURS.replace("FACTOR", "1").replace('"mine"', '"colours"').replace("Mine", "Colours")
    load(TEXTS + text)
    section = {"name": "plugin:colours", "weights": "random", "options": {"text": "plugin:mine"}}
    given = job(task={"name": "image-text"}, data={"source": "generated-reviews"}, backbone=section)
    inputs, _ = pictures(2)
    features = learner(given).features.plain(shard_of(list(zip(inputs, ["one", "two words"], strict=True))))
    assert features.shape == (2, 3 + 256) and torch.isfinite(features).all()
    batch = learner(given).collate(shard_of(list(zip(inputs, ["one", "two words"], strict=True))), [0, 1])
    assert batch.keys() == {"pixel_values", "counts", "length"}


@pytest.mark.processes
def test_the_engine_changes_no_bit_of_what_others_bring(folder: Path) -> None:
    for tune in ('tune.method="head"', 'tune={method="last-k", layers=1}', 'tune={method="lora", rank=2}'):
        hashes = set()
        for engine in ("loop", "inline --workers 2"):
            line = (
                "atoll simulate digits.toml --plugin stripes.py --plugin ridges.py --plugin shift.py --force"
                f" --out run --engine {engine} --set data.source=stripes --set 'train.augment=[\"shift\"]'"
                ' --set \'backbone={name="plugin:ridges", weights="random"}\' --set federation.rounds=2'
                f" --set '{tune}'"
            )
            code, _, errors = say(folder, line)
            assert code == 0, errors
            hashes.add(result_of(folder / "run")["model_sha256"])
        assert len(hashes) == 1, tune


def mistaken(**changes: str) -> str:
    text = COLOURS.replace("FACTOR", "1")
    for before, after in changes.items():
        text = text.replace(WHERE[before], after)
    return text


WHERE = {"returned": "1 * pixels.mean(dim=(2, 3))", "width": "width = 16, 3", "base": "(ImageBackbone)"}

BACKBONES: dict[str, tuple[str, str]] = {
    "too narrow": (mistaken(returned="pixels.mean(dim=(2, 3))[:, :2]"),
                   r"expected features \[4, 3\] of pixel_values \[4, 3, 16, 16\], found \[4, 2\]"),
    "doubles": (mistaken(returned="pixels.mean(dim=(2, 3)).double()"), "in float32, found float64"),
    "not finite": (mistaken(returned="pixels.mean(dim=(2, 3)) / 0"), "expected features that are finite"),
    "raises": (mistaken(returned="pixels.mean(dim=(2, 9))"), "raised IndexError: .*, given pixel_values"),
    "mixes": (mistaken(returned="pixels.mean(dim=(2, 3)) - pixels.mean(dim=(0, 2, 3))"),
              "expected an example's features to depend on it alone"),
    "draws": (mistaken(returned="pixels.mean(dim=(2, 3)) + torch.rand(len(pixels), 1)"),
              "expected an example's features to depend on it alone"),
    "no width": (mistaken(width="other = 16, 3"), "expected `width`, a whole number of 1 or more, found"),
    "no backbone": (mistaken(base="(torch.nn.Module)"),
                    "expected an ImageBackbone, a TextBackbone or a SoundBackbone"),
    "half": (mistaken() + "\n    def __init__(self):\n        super().__init__()\n"
             "        self.x = torch.nn.Linear(2, 2).half()\n",
             "expected parameters in float32, found x.weight in float16"),
    "in __init__": (mistaken() + "\n    def __init__(self):\n        1 / 0\n",
                    "raised ZeroDivisionError: division by zero"),
    "texts": (TEXTS, "plugin:mine reads texts, expected a backbone that reads images"),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_that_is_none_is_refused_in_one_line(load: Callable[[str], Path], name: str) -> None:
    text, message = BACKBONES[name]
    load(text)
    with pytest.raises(InputError, match=message) as caught:
        _ = learner(job()).encoder
    assert str(caught.value).startswith("backbone.name: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("counts.float()", "counts.float()[:len(text)]", "tensors of one shape and type for all texts"),
        ('{"counts"', '[] and {"counts"', "expected a tensor or a dictionary of tensors, found list"),
        ("list(text.encode())", "text", r"plugin:mine.prepare raised \w+Error"),
    ],
)
def test_a_text_that_is_prepared_wrongly_is_refused(
    load: Callable[[str], Path], before: str, after: str, message: str
) -> None:
    load(TEXTS.replace(before, after))
    with pytest.raises(ConfigError, match=message):
        _ = learner(job(task={"name": "text-classification"}, data={"source": "sentences"})).encoder


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"backbone": {"name": "plugin:mein"}}, r"backbone 'plugin:mein', did you mean 'plugin:mine'\?"),
        ({"backbone": {"name": "mine"}}, r"no folder mine, did you mean 'plugin:mine'\?"),
        ({"backbone": {"name": "plugin:mine"}}, r"backbone\.weights: plugin:mine .* brings no weights"),
        ({"backbone": {"name": "plugin:mine", "weights": "random", "options": {"a": 1}}},
         r"backbone\.options\.a: mine has no options"),
        ({"task": {"name": "segmentation"}}, "segmentation takes no encoder of an extension"),
    ],
)  # fmt: skip
def test_a_job_that_names_a_backbone_wrongly_is_refused(
    load: Callable[[str], Path], tables: Mapping[str, Any], message: str
) -> None:
    load(mistaken())
    with pytest.raises(InputError, match=message):
        _ = learner(job(**tables)).encoder


def test_a_backbone_of_a_cell_is_refused() -> None:
    made = type("Mine", (), {"__module__": "no_file"})
    plugins.backbone("mine")(made)
    with pytest.raises(ConfigError, match="is in no file whose hash could tell it from its next version"):
        learner(job())


def test_options_of_a_text_backbone_that_cuts_itself_are_refused(load: Callable[[str], Path]) -> None:
    load(TEXTS)
    section = {"name": "plugin:mine", "weights": "random", "max_tokens": 32}
    given = job(task={"name": "text-classification"}, data={"source": "sentences"}, backbone=section)
    with pytest.raises(ConfigError, match=r"backbone\.max_tokens: plugin:mine prepares texts itself"):
        _ = learner(given).encoder


# Augmentations


def test_every_example_has_its_own_draws_under_example_level_privacy(load: Callable[[str], Path]) -> None:
    load(FILES["shift.py"] + "\n" + COLOURS.replace("FACTOR", "1"))
    promise = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5}
    data = {"source": "digits", "classes": ["a", "b"]}
    given = job(train={"augment": ["shift"]}, privacy=promise, data=data, tune={"method": "full"})
    encoder, step = learner(given).encoder, (1, "north", 0)
    inputs, pixels = pictures(6)
    keys = [bytes([number]) * 32 for number in range(6)]

    def varied(rows: list[int]) -> torch.Tensor:
        variation = example_variation(example_numbers([keys[row] for row in rows]), given, step)
        return encoder.preprocess_and_collate([inputs[row] for row in rows], variation)["pixel_values"]

    whole = varied([0, 1, 2, 3, 4, 5])
    assert torch.equal(varied([4, 1])[0], whole[4]) and torch.equal(varied([4, 1])[1], whole[1])
    for row in range(6):  # what the page's function does, by hand: rolled by up to two pixels
        moved = (
            np.roll(pixels[row], (down, across), (0, 1)) for down in range(-2, 3) for across in range(-2, 3)
        )
        shown = (whole[row] * 255).round().numpy().transpose(1, 2, 0)
        assert any(np.array_equal(shown, one) for one in moved)


AUGMENTATION = """
import random
import torch
from atoll import plugins
from atoll.backbones import ImageBackbone

seen = []

@plugins.augmentation("mine", of="KIND")
def mine(example, generator):
    BODY
"""

WRONG: dict[str, tuple[str, str]] = {
    "draws from elsewhere": ("return example.rotate(random.random() * 90)", "draws from something else"),
    "draws from torch": ("return example.rotate(float(torch.rand(())) * 90)", "draws from something else"),
    "remembers": ("seen.append(example)\n    return seen[-2] if len(seen) > 1 else example", "or remembers"),
    "another size": ("return example.resize((5, 6))", r"RGB, 32 x 32, found RGB, 5 x 6"),
    "another mode": ("return example.convert('L')", r"RGB, 32 x 32, found L, 32 x 32"),
    "no picture": ("return 3", "expected a PIL image, found int"),
    "raises": ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_augmentation_that_breaks_the_rules_is_refused(load: Callable[[str], Path], name: str) -> None:
    body, message = WRONG[name]
    load(AUGMENTATION.replace("KIND", "images").replace("BODY", body))
    with pytest.raises(ConfigError, match=message) as caught:
        learner(job(train={"augment": ["mine"]}, backbone={"name": "raw:pixels"}))
    assert str(caught.value).startswith("train.augment: mine (") and "\n" not in str(caught.value)


def test_an_augmentation_of_another_kind_of_input_is_refused(load: Callable[[str], Path]) -> None:
    load(AUGMENTATION.replace("KIND", "texts").replace("BODY", "return example"))
    with pytest.raises(ConfigError, match=r"expected 'crop', .* for image-classification, found 'mine'$"):
        learner(job(train={"augment": ["mine"]}, backbone={"name": "raw:pixels"}))
    with pytest.raises(ConfigError, match="of: expected 'images', 'texts' or 'sounds', found 'smells'"):
        load(AUGMENTATION.replace("KIND", "smells").replace("BODY", "return example"))


def test_a_tokenizers_augmentation_is_refused_where_there_is_none(load: Callable[[str], Path]) -> None:
    load(TEXTS)
    given = job(
        task={"name": "text-classification"},
        data={"source": "sentences"},
        train={"augment": ["token-dropout"]},
    )
    with pytest.raises(ConfigError, match="token-dropout hides a tokenizer's tokens, and plugin:mine has no"):
        learner(given)


def test_kept_views_are_told_apart_by_the_augmentations_code(load: Callable[[str], Path]) -> None:
    inputs, _ = pictures(4)
    seen = []
    for value in (10, 200):
        body = f"return Image.new('RGB', example.size, ({value},) * 3)"
        text = AUGMENTATION.replace("KIND", "images").replace("BODY", body) + COLOURS.replace("FACTOR", "1")
        load("from PIL import Image\n" + text)
        given = job(train={"augment": ["mine"], "cached_views": 2})
        seen.append(learner(given).features.for_training(shard_of(inputs)))
        torch.testing.assert_close(seen[-1], torch.full((2, 4, 3), value / 255))


def test_atolls_own_augmentations_come_first(load: Callable[[str], Path]) -> None:
    load(AUGMENTATION.replace("KIND", "images").replace("BODY", "return example"))
    assert [one.name for one in brought_augmentations(job(train={"augment": ["mine", "flip"]}))] == ["mine"]
    assert AUGMENTATIONS.origin("flip") == "atoll"
    assert augmentations.TRIES >= 2


# Sources


SOURCE = """
from atoll import plugins
from atoll.errors import DataError

@plugins.source("mine")
def mine(offline):
    RETURNED
"""


def from_source(returned: str, load: Callable[[str], Path], **tables: Any) -> Any:
    load(SOURCE.replace("RETURNED", returned))
    return read_source(job(**{"task": {"name": "text-classification"}, "data": {"source": "mine"}} | tables))


def test_a_sources_tables_are_read_as_a_file_is(load: Callable[[str], Path], tmp_path: Path) -> None:
    columns = {"review": ["good", "bad", "fine"], "stars": ["5", "1", "4"]}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    data = {"text": "review", "label": "stars"}
    task = {"name": "text-classification"}
    file = read_source(job(task=task, data=data | {"source": str(tmp_path / "data.parquet")}))
    for returned in (columns, f"Path({str(tmp_path / 'data.parquet')!r})"):
        text = f"{{'train': {returned}}}" if isinstance(returned, dict) else returned
        found = from_source(
            f"from pathlib import Path\n    return {text}", load, data=data | {"source": "mine"}
        )
        assert found.train["text"][:] == file.train["text"][:] == columns["review"]
        assert found.train["label"][:] == columns["stars"] and found.test is None


def test_a_source_is_asked_anew_and_never_read_from_an_older_copy(
    load: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.json"
    returned = (
        f"import json\n    t = json.load(open({str(texts)!r}))\n    return {{'train': dict(text=t, label=t)}}"
    )
    for content in (["a", "b"], ["a", "c"]):
        texts.write_text(json.dumps(content))
        assert from_source(returned, load).train["text"][:] == content


def test_a_source_hears_whether_it_may_download(load: Callable[[str], Path]) -> None:
    returned = (
        "if offline:\n        raise DataError('nothing here')\n"
        "    t = dict(text=['a', 'b'], label=['a', 'b'])\n    return {'train': t, 'test': t}"
    )
    assert len(from_source(returned, load).test) == 2
    with pytest.raises(DataError, match=r"^data.source mine \(.*mine\.py\): nothing here$"):
        from_source(returned, load, backbone={"name": "raw:pixels", "offline": True})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("return 3", "returned int, expected a path, or"),
        ("return {'test': {}}", r"returned keys \['test'\], expected a path, or"),
        ("return {'train': dict(text=['a'], label=['b']), 'valid': 1}", "returned a part 'valid'"),
        ("return {'train': 3}", "train is int, expected a pyarrow.Table or a dictionary of columns"),
        ("return {'train': dict(text=['a'], label=['b', 'c'])}", "train is no table: "),
        ("return {'train': dict(text=[], label=[])}", "train has no rows"),
        ("return {'train': dict(words=[['a']], label=['b'])}", r"data\.source mine \(.*mine\.py\)/train"),
        ("return '/nowhere'", "returned /nowhere, where nothing is"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_source_that_returns_no_data_is_refused(
    load: Callable[[str], Path], returned: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_source(returned, load)
    assert "data.source mine (" in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_source_holds_is_private_where_a_promise_is_made(load: Callable[[str], Path]) -> None:
    load(SOURCE.replace("RETURNED", "return {'train': dict(text=['a'], label=['b'])}") + COLOURS)
    promise = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.5}
    with pytest.raises(ConfigError, match=r"data\.classes: missing, expected .* with privacy.unit"):
        learner(job(data={"source": "mine"}, backbone={"name": "raw:pixels"}, privacy=promise))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "main"}, r"data\.source 'main': did you mean 'mine'\?"),
        ({"source": "mine", "options": {"a": 1}}, r"data\.options\.a: mine has no options"),
        ({"source": "digits", "options": {"a": 1}}, r"data\.options\.a: digits has no options"),
    ],
)
def test_a_job_that_names_a_source_wrongly_is_refused(
    load: Callable[[str], Path], data: Mapping[str, Any], message: str
) -> None:
    load(SOURCE.replace("RETURNED", "return 3"))
    with pytest.raises(ConfigError, match=message):
        check_simulated(job(data=data, backbone={"name": "raw:pixels"}))


# Packages


def installed(folder: Path) -> Path:
    """A package with one of each, as pip leaves it."""
    folder.mkdir(exist_ok=True)
    groups = ""
    for kind, module, thing in (
        ("sources", "stripes", "stripes"),
        ("backbones", "ridges", "Ridges"),
        ("augmentations", "shift", "shift"),
    ):
        (folder / f"{module}.py").write_text(FILES[f"{module}.py"])
        groups += f"[atoll.{kind}]\n{module} = {module}:{thing}\n"
    about = folder / "fedmine-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedmine\nVersion: 1.2\nSummary: Mine\n")
    (about / "entry_points.txt").write_text(groups)
    (about / "RECORD").write_text("stripes.py,,\nridges.py,,\nshift.py,,\n")
    return folder


BROUGHT = {
    "data": {"source": "stripes"}, "train": {"augment": ["shift", "flip"]},
    "backbone": {"name": "plugin:ridges", "weights": "random"},
}  # fmt: skip


def test_sites_compare_the_packages_of_backbones_and_augmentations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed(tmp_path / "site")
    monkeypatch.syspath_prepend(str(site))
    files = {f"fedmine 1.2: {name}.py" for name in ("ridges", "shift", "stripes")}
    assert extension_hashes(job(**BROUGHT)).keys() == files
    only = BROUGHT | {"backbone": {"name": "raw:pixels"}}
    assert extension_hashes(job(**only)).keys() == files
    assert extension_hashes(job(**BROUGHT | {"backbone": {"name": "raw:pixels"}, "train": {}})) == {}
    pair = {"name": "hf:x", "options": {"text": "plugin:ridges"}}
    assert extension_hashes(job(backbone=pair)).keys() == files
    before = resolve(job(**BROUGHT).backbone, 1).fingerprint
    (site / "shift.py").write_text(FILES["shift.py"] + "# changed\n")
    assert resolve(job(**BROUGHT).backbone, 1).fingerprint != before
    for module in ("stripes", "ridges", "shift"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("name", "kind"), [("ridges", "backbone"), ("shift", "augmentation")])
def test_no_site_can_have_what_a_plugin_file_brings(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / f"{name}.py").write_text(FILES[f"{name}.py"])
    plugins.load_file(tmp_path / f"{name}.py")
    tables = {"backbone": {"name": "raw:pixels"}} | {
        key: value for key, value in BROUGHT.items() if name in str(value)
    }
    with pytest.raises(ConfigError, match=f"{kind} '{name}' comes from .* which sites can't have"):
        extension_hashes(job(**tables))


@pytest.mark.processes
def test_an_installed_package_is_listed_and_used_without_an_option(folder: Path, tmp_path: Path) -> None:
    site = installed(tmp_path / "site")
    for module in ("stripes", "ridges", "shift"):
        (folder / f"{module}.py").unlink()
    start = f"import sys; sys.path.insert(0, {str(site)!r}); from atoll.cli.main import run; "
    done = python(
        start + "[run(['list', one]) for one in ('backbones', 'sources', 'augmentations')];"
        " print({'stripes', 'ridges', 'shift'} & set(sys.modules))",
        cwd=folder,
    )
    output, errors = done.communicate()
    for name in ("plugin:ridges", "stripes", "shift"):
        assert re.search(rf"^{name} +fedmine 1\.2 ", output, re.MULTILINE), errors
    assert output.splitlines()[-1] == "set()"  # a list doesn't import the package
    sets = [
        "data.source=stripes",
        'train.augment=["shift"]',
        'backbone={name="plugin:ridges",weights="random"}',
    ]
    flags = [word for one in sets for word in ("--set", one)]
    done = python(start + f"sys.exit(run(['simulate', 'digits.toml', *{flags!r}]))", cwd=folder)
    _, errors = done.communicate()
    assert done.wait() == 0, errors
    assert "plugins" not in result_of(folder / "runs" / "digits")


SHIFTED = "--plugin shift.py --set 'train.augment=[\"shift\"]' --set 'train.augment_options={"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('--plugin ridges.py --set backbone.name=plugin:ridge', "did you mean 'plugin:ridges'"),
        ('--plugin shift.py --set \'train.augment=["shft"]\'', "did you mean 'shift'"),
        (f"{SHIFTED}shift={{by=0}}}}'", r"train\.augment_options\.shift\.by: expected .* 1, found 0"),
        (f"{SHIFTED}shift={{to=1}}}}'", r"train\.augment_options\.shift\.to: unknown key"),
        (f"{SHIFTED}flip={{by=1}}}}'", r"train\.augment_options\.flip: flip is not in train\.augment"),
        ("--plugin stripes.py --set data.source=stripe", "did you mean 'stripes'"),
        ("--plugin stripes.py --set data.source=stripes --set data.options.pictures=3",
         r"data\.options\.pictures: expected greater than or equal to 10, found 3"),
        ('--plugin ridges.py --set \'backbone={name="plugin:ridges",weights="random",options={channels=5}}\'',
         r"backbone\.options\.channels: expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, line: str, message: str) -> None:
    code, _, errors = say(folder, f"atoll simulate digits.toml {line}")
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert re.search(message, errors), errors


MIXING = """
import torch
from atoll import plugins
from atoll.backbones import ImageBackbone

@plugins.backbone("mixing")
class Mixing(ImageBackbone):
    image_size, width = 16, 4

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)

    def forward(self, pixels):
        found = self.layer(pixels.mean(dim=(2, 3)))
        return found - found.mean(dim=0) if self.training else found
"""


@pytest.mark.processes
def test_a_backbone_that_mixes_examples_in_training_is_refused_under_a_promise(folder: Path) -> None:
    (folder / "mixing.py").write_text(MIXING)
    sets = (
        "tune.method=full", "privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5",
        "privacy.sampling_rate=0.2", 'backbone={name="plugin:mixing",weights="random"}',
        f"data.classes={json.dumps([str(digit) for digit in range(10)])}",
    )  # fmt: skip
    flags = " ".join(f"--set '{one}'" for one in sets)
    code, _, errors = say(folder, f"atoll simulate digits.toml --plugin mixing.py {flags}")
    assert code == 2 and errors.count("\n") == 1, errors
    assert re.search("backbone mixing: .* so that no example has a gradient of its own", errors), errors


@pytest.mark.processes
def test_what_was_trained_on_an_own_backbone_is_exported_and_predicts(folder: Path) -> None:
    line = "atoll simulate digits.toml --plugin ridges.py --set federation.rounds=1 --out run"
    code, _, errors = say(folder, f'{line} --set \'backbone={{name="plugin:ridges", weights="random"}}\'')
    assert code == 0, errors
    Image.new("RGB", (28, 28)).save(folder / "black.png")
    for line in ("predict run black.png", "export run --format safetensors"):
        code, _, errors = say(folder, f"atoll {line}")
        assert code == 2 and "unknown backbone 'plugin:ridges', and no extension brings one" in errors
        code, _, errors = say(folder, f"atoll {line} --plugin ridges.py")
        assert code == 0, errors


def test_a_plugin_file_has_the_future_that_it_asks_for(tmp_path: Path) -> None:
    """Not that of the module which executes it: annotations are values unless the file says otherwise."""
    for name, head, expected in (
        ("plain", "", int),
        ("postponed", "from __future__ import annotations\n", "int"),
    ):
        file = tmp_path / f"{name}.py"
        file.write_text(head + "def f(x: int) -> None: ...\n")
        digest = plugins.load_file(file).sha256
        module = sys.modules[f"atoll_plugin_{name}_{digest[:8]}"]
        assert module.f.__annotations__["x"] == expected and module.__file__ == str(file)
