"""The folders that the tasks' small jobs are made of: data as a user has it, and an encoder of texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from atoll.datasets.synthetic.commands import generated_commands
from atoll.datasets.synthetic.entities import generated_entities
from atoll.datasets.synthetic.pairs import generated_pairs
from atoll.datasets.synthetic.preferences import generated_preferences
from atoll.datasets.synthetic.questions import generated_choices, generated_questions
from atoll.datasets.synthetic.reviews import generated_reviews
from atoll.datasets.synthetic.shapes import generated_shapes
from atoll.datasets.synthetic.street import generated_street
from atoll.datasets.synthetic.tables.shop import generated_shop
from atoll.job.job import Job
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.federation.news import news_file
from tests.support.models import small_llama
from tests.tasks.images.test_medical import scans
from tests.tasks.sound.test_speech import folder_of

SAID = (
    "ab", "abba", "bob", "oa ob", "a bob", "baobab a", "boa", "a boa", "ba", "abo ab", "bao", "o bob", "obo",
    "ab oba", "aa bb", "ob", "bab", "oba bo",
)  # fmt: skip


def ready(job: Job, folder: Path) -> Job:
    """The job with the folders that it names as written; they are written unless they are there."""
    data, backbone = job.data, job.backbone
    if data.source == "written":
        data = data.model_copy(update={"source": str(_once(folder / "data", WRITTEN[job.task.name], job))})
    if backbone.name == "llama":
        backbone = backbone.model_copy(update={"name": str(_once(folder / "llama", _llama, job))})
    bert = folder / "bert"
    if backbone.name == "written":
        backbone = backbone.model_copy(update={"name": str(_once(bert, _bert, job))})
    if backbone.options.get("text") == "written":
        backbone = backbone.model_copy(update={"options": {"text": str(_once(bert, _bert, job))}})
    return job.model_copy(update={"data": data, "backbone": backbone})


def _once(path: Path, write: Callable[[Path, Job], object], job: Job) -> Path:
    """The folder, written unless it is there; what was written before for such a job is copied."""
    if not path.exists():
        key = job.task.model_dump_json(), job.data.model_dump_json()
        if key not in (known := _written(write)):
            folder = TemporaryDirectory(prefix="task-data-")
            write(Path(folder.name, "data"), job)
            known[key] = folder
        shutil.copytree(Path(known[key].name, "data"), path)
    return path


@cache
def _written(write: Callable[[Path, Job], object]) -> dict[tuple[str, str], TemporaryDirectory[str]]:
    """The folders that were written in this way, by the task and the data of their jobs."""
    return {}


def _bert(folder: Path, job: Job) -> None:
    tiny_bert(folder)


def _llama(folder: Path, job: Job) -> None:
    small_llama(folder)


def _chats(folder: Path, job: Job) -> None:
    """Questions of generated stories, asked and answered in turns."""
    rows = generated_questions(0, 48)["train"].to_pylist()
    folder.mkdir()
    lines = (
        [{"role": "user", "content": r["question"][:20]}, {"role": "assistant", "content": r["answer"]}]
        for r in rows
    )
    text = "".join(json.dumps({"messages": line}) + "\n" for line in lines)
    (folder / "chats.jsonl").write_text(text)


def _generated(make: Callable[[], dict[str, pa.Table]]) -> Callable[[Path, Job], None]:
    """Writes the training split of a generated source as the task writes shards."""

    def write(folder: Path, job: Job) -> None:
        task = task_named(job.task.name)
        task.write(task.from_builtin({"train": make()["train"]}, job).train, folder, job.data)

    return write


def _news(folder: Path, job: Job) -> None:
    folder.mkdir()
    news_file(folder / "news.csv", 60)


def _opinions(folder: Path, job: Job) -> None:
    """Texts with a number, or with labels, that follow from their words."""
    folder.mkdir()
    words = ("good", "cheap", "bad", "goal", "film", "team")
    numbers = job.task.name == "text-regression"
    with (folder / "opinions.jsonl").open("w") as out:
        for number in range(60):
            said = [words[(number + step * step) % len(words)] for step in range(number % 5 + 1)]
            labels = [name for name in ("good", "cheap") if name in said]
            target = {"number": float(len(said))} if numbers else {"labels": labels}
            out.write(json.dumps({"text": f"{' '.join(said)} {number}"} | target) + "\n")


def _purchases(count: int) -> dict[str, pa.Table]:
    return {"train": generated_shop()["train"].slice(0, count)}


WRITTEN: dict[str, Callable[[Path, Job], object]] = {
    "text-classification": _news,
    "text-labels": _opinions,
    "text-regression": _opinions,
    "image-classification": _generated(lambda: generated_street(0, 60)),
    "medical-imaging": lambda folder, job: scans(folder, patients=24, each=2),
    "image-text": _generated(lambda: generated_reviews(0, 72)),
    "object-detection": _generated(lambda: generated_shapes(0, 20)),
    "segmentation": _generated(lambda: generated_shapes(0, 30)),
    "question-answering": _generated(lambda: generated_questions(0, 100)),
    "text-to-text": _generated(lambda: generated_pairs(0, 100)),
    "token-classification": _generated(lambda: generated_entities(0, 120)),
    "language-modeling": _chats,
    "preference": _generated(lambda: generated_preferences(0, 40)),
    "multiple-choice": _generated(lambda: generated_choices(0, 40)),
    "recommendation": _generated(lambda: _purchases(1200)),
    "intent": _generated(lambda: generated_commands(0, 240)),
    "speech-recognition": lambda folder, job: folder_of(folder, *SAID),
}
