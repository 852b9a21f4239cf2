"""Small jobs with networks of the size that people know them by, random weights, and data written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Table = dict[str, Any]
EXAMPLES = 24
SCENES = 4
"""For detectors and segmenters, which take seconds for each: they measure none."""


def written(folder: Path, task: Table, rows: Any, backbone: Table, **data: Any) -> Table:
    """The tables of a job whose data, the first rows of a generated set, is written as a client has it."""
    from atoll.job.job import Job
    from atoll.tasks import task_named

    source = str(folder / "data")
    table = {
        "task": task, "data": {"source": source, "test_fraction": 0.0} | data, "backbone": backbone
    }  # fmt: skip
    job = Job.parse(
        table | {"name": "data", "seed": 1, "federation": {"clients": 2, "rounds": 1}}, origin="benchmark"
    )
    kind = task_named(job.task.name)
    kind.write(kind.from_builtin({"train": rows}, job).train, folder / "data", job.data)
    return table


def encoder(folder: Path, config: str, **options: Any) -> str:
    """A transformers folder without weights: the class's own sizes but for `options`, a small tokenizer."""
    import transformers

    from atoll.backbones.small_tokenizer import own_tokenizer

    getattr(transformers, config)(**options).save_pretrained(folder / "network")
    own_tokenizer().save_pretrained(folder / "network")
    return str(folder / "network")


def bert_base(folder: Path) -> Table:
    """BERT-base (Devlin et al. 2018), 110 million numbers, on sentences of ten words."""
    import pyarrow as pa

    words = [("light", "dark")[number % 2] for number in range(EXAMPLES)]
    rows = [
        f"the room was {word} again today at {number} minutes to ten" for number, word in enumerate(words)
    ]
    backbone = {"name": encoder(folder, "BertConfig"), "weights": "random", "max_tokens": 16}
    classes = ("dark", "light")
    table = pa.table({"text": rows, "label": words})
    return written(folder, {"name": "text-classification"}, table, backbone, classes=classes)


def t5_small(folder: Path) -> Table:
    """T5-small (Raffel et al. 2020), 60 million numbers, on questions about sentences.

    Its random weights are saved first: a job that asks for random ones has a fresh output layer, which every
    way of tuning trains.
    """
    import transformers

    from atoll.datasets.synthetic.questions import generated_questions

    task = {"name": "question-answering", "options": {"max_answer_tokens": 4}}
    name = encoder(folder, "T5Config", decoder_start_token_id=0)
    network = transformers.T5ForConditionalGeneration(transformers.T5Config.from_pretrained(name))
    network.save_pretrained(name)
    rows = generated_questions(0, EXAMPLES * 5 // 4)["train"]
    return written(folder, task, rows, {"name": name, "max_tokens": 32})


def wav2vec2_base(folder: Path) -> Table:
    """wav2vec 2.0's base (Baevski et al. 2020), 94 million numbers, on tones of a second."""
    import soundfile
    import transformers

    rng = np.random.default_rng(0)
    lines = []
    for number in range(EXAMPLES):
        said = "".join(rng.choice(list("abo "), 4)).strip() or "a"
        pitch = {"a": 300.0, "b": 700.0, "o": 1500.0, " ": 0.0}
        time = np.arange(4000) / 16000
        heard = np.concatenate([np.sin(2 * np.pi * pitch[letter] * time) for letter in said])
        (folder / "data").mkdir(exist_ok=True)
        soundfile.write(folder / "data" / f"{number}.wav", heard.astype(np.float32), 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "transcript": said}) + "\n")
    (folder / "data" / "data.jsonl").write_text("".join(lines))
    transformers.Wav2Vec2Config().save_pretrained(folder / "network")
    return {
        "task": {"name": "speech-recognition", "options": {"max_seconds": 1.0, "letters": "abo"}},
        "data": {"source": str(folder / "data"), "test_fraction": 0.0},
        "backbone": {"name": str(folder / "network"), "weights": "random"},
    }


def pictures(name: str) -> Callable[[Path], Table]:
    """A torchvision classifier at its own size, on pictures of two brightnesses."""

    def tables(folder: Path) -> Table:
        from PIL import Image

        rng = np.random.default_rng(0)
        for number in range(EXAMPLES):
            label = ("dark", "light")[number % 2]
            pixels = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + np.uint8(100 * (number % 2))
            (folder / "data" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "data" / label / f"{number}.png")
        return {
            "task": {"name": "image-classification"},
            "data": {"source": str(folder / "data"), "classes": ["dark", "light"], "test_fraction": 0.0},
            "backbone": {"name": f"torchvision:{name}", "weights": "random"},
        }

    return tables


def shapes(task: Table, name: str, **data: Any) -> Callable[[Path], Table]:
    """A torchvision detector or segmenter at its own size, on drawn circles, squares and triangles."""

    def tables(folder: Path) -> Table:
        from atoll.datasets.synthetic.shapes import generated_shapes

        rows = generated_shapes(0, SCENES * 5 // 4)["train"]
        backbone = {"name": f"torchvision:{name}", "weights": "random"}
        return written(folder, task, rows, backbone, validation_fraction=0.0, **data)

    return tables


def clip_b32(folder: Path) -> Table:
    """CLIP with ViT-B/32 (Radford et al. 2021), 151 million numbers, on pictures with a line of text."""
    import transformers

    from atoll.datasets.synthetic.reviews import generated_reviews

    backbone = {"name": encoder(folder, "CLIPConfig"), "weights": "random", "max_tokens": 16}
    transformers.CLIPImageProcessor().save_pretrained(folder / "network")
    rows = generated_reviews(0, EXAMPLES * 5 // 4)["train"]
    classes = tuple(sorted(set(rows.column("label").to_pylist())))
    return written(folder, {"name": "image-text"}, rows, backbone, classes=classes)


def sasrec(folder: Path) -> Table:
    """SASRec (Kang and McAuley 2018) over items that a frozen BERT of MiniLM's sizes has read."""
    import transformers

    from atoll.datasets.synthetic.tables.shop import generated_shop

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    text = encoder(folder, "BertConfig", intermediate_size=1536, **sizes)
    transformers.BertModel(transformers.BertConfig.from_pretrained(text)).save_pretrained(text)
    rows = generated_shop()["train"].slice(0, 50 * EXAMPLES)
    said = {row["item"]: row["item_text"] for row in rows.to_pylist()}
    options = {"length": 50, "texts": tuple(said.values())}
    backbone = {"name": "atoll:sasrec", "weights": "random", "options": {"text": text}}
    return written(
        folder, {"name": "recommendation", "options": options}, rows, backbone, classes=tuple(said)
    )


def lstm(folder: Path) -> Table:
    """Two layers of 512 cells, on a depot's deliveries day by day."""
    return {
        "task": {"name": "forecasting", "options": {"history": 28, "horizon": 7, "stride": 60}},
        "data": {"source": "generated-deliveries"},
        "backbone": {"name": "atoll:lstm", "weights": "random", "options": {"width": 512, "layers": 2}},
    }


DRAWN = ("circle", "square", "triangle")
BOXES = {"name": "object-detection", "options": {"max_boxes": 8}}
MASKS = {"name": "segmentation", "options": {"classes": ("background", *DRAWN)}}

SUBJECTS: dict[str, Callable[[Path], Table]] = {
    "bert-base": bert_base,
    "t5-small": t5_small,
    "wav2vec2-base": wav2vec2_base,
    "resnet50": pictures("resnet50"),
    "vit_b_16": pictures("vit_b_16"),
    "fasterrcnn_resnet50_fpn": shapes(BOXES, "fasterrcnn_resnet50_fpn", classes=DRAWN),
    "deeplabv3_resnet50": shapes(MASKS, "deeplabv3_resnet50"),
    "clip-b32": clip_b32,
    "sasrec": sasrec,
    "lstm": lstm,
}
"""A job by the network's name."""
