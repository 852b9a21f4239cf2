"""The model of a finished run, as verbs use it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.learning.learner import Learner
    from atoll.protocol.tensors import Tensors
    from atoll.tasks.language_modeling.chat import Chat
    from atoll.tasks.language_modeling.generation import Decoding


def trained(run: Path, cluster: int | None = None) -> tuple[Learner, Tensors]:
    """(what builds and uses the run's model, its tuned tensors), of one of its clusters where it has any.

    Raises:
        ConfigError: RUN holds no model, or several and no such cluster.
        WeightsError: its backbone can't be had.
    """
    about = run / "model" / "model.json"
    check_finished(run, about)
    from atoll.job.job import Job
    from atoll.learning.compatibility import check_agreed
    from atoll.learning.learner import Learner  # torch comes with it: not before a model is there
    from atoll.strategies.options import clusters_of
    from atoll.strategies.personal.ifca import model_of_cluster
    from atoll.tasks import task_named

    try:
        saved = json.loads(about.read_text("utf-8"))
        job, data_info = Job.parse(saved["job"], origin=str(about)), dict(saved["facts"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{about}: damaged: {error}") from None
    if job.personal.keep == "head":
        raise ConfigError(
            f"{run}: its clients kept their heads, so it holds no whole model; expected a run with"
            " personal.keep = 'norms' or 'mixture', or none"
        )
    _check_cluster(run, cluster, clusters_of(job))
    # Compiling takes longer than a few inputs do, and what was taught needs its teacher no more.
    alone = {"teacher": None, "teacher_temperature": None, "teacher_weight": None}
    job = job.model_copy(
        update={
            "backbone": job.backbone.model_copy(update={"compile": False}),
            "train": job.train.model_copy(update=alone),
        }
    )
    learner = Learner.of(job, task_named(job.task.name), data_info)
    check_agreed(learner)
    tensors = model_of(run)
    return learner, tensors if cluster is None else model_of_cluster(tensors, cluster)


def model_of(run: Path) -> Tensors:
    """The tensors that a run ended with.

    Raises:
        ConfigError: they aren't there. DataError: the file is damaged.
    """
    from atoll.protocol.tensors import from_bytes  # torch comes with it: not before a model is there

    path = run / "model" / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path}: missing, expected the run's model")
    return from_bytes(path.read_bytes())


def _check_cluster(run: Path, cluster: int | None, count: int) -> None:
    if not count and cluster is not None:
        raise ConfigError(f"--cluster: {run} has one model for all, expected none, found {cluster}")
    if count and (cluster is None or not 0 <= cluster < count):
        text = "none" if cluster is None else str(cluster)
        raise ConfigError(
            f"{run}: has a model for each cluster of clients, expected --cluster 0 to {count - 1} with"
            f" predict or export, found {text}; clusters of the last round in result.json say which is whose"
        )


def chat_with(run: Path) -> Chat:
    """The run's language model, ready to answer conversations.

    Raises:
        ConfigError: RUN holds no model, or none that chats. WeightsError: its backbone can't be had.
    """
    learner, tensors = trained(run)
    from atoll.tasks.language_modeling.causal import CausalEncoder
    from atoll.tasks.language_modeling.chat import Chat
    from atoll.tasks.language_modeling.task import LanguageModeling

    task = learner.task
    if not isinstance(task, LanguageModeling):
        raise ConfigError(
            f"{run}: a run of {task.name}, expected one of a language model: language-modeling, preference or"
            " multiple-choice"
        )
    if task.template is None:
        raise ConfigError(
            f"{run}: the tokenizer of {learner.backbone.name} has no chat template, and the job none as"
            " task.options.template; expected one, or use: atoll predict"
        )
    encoder = learner.filled(tensors).backbone
    assert isinstance(encoder, CausalEncoder)
    return Chat(task, encoder.model, encoder.tokenizer, learner.job.seed)


def decoding(chat: Chat, *, temperature: float, top_p: float, max_new_tokens: int | None) -> Decoding:
    """How a chat answers: at most so many tokens as are given, or as the run's job says.

    Raises:
        ConfigError: a value is out of its range.
    """
    from atoll.tasks.language_modeling.generation import Decoding

    most = chat.task.options.max_new_tokens if max_new_tokens is None else max_new_tokens
    return Decoding(most, temperature, top_p)


def check_finished(run: Path, product: Path) -> None:
    """Raises ConfigError unless RUN is a run directory whose run has come to the `product`."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such run directory")
    if not (run / "job.toml").is_file():
        raise ConfigError(f"{run}: no run directory, expected one that atoll simulate or submit wrote")
    if not product.is_file():
        raise ConfigError(
            f"{run}: the run is not finished (no {product.relative_to(run)});"
            f" go on with: atoll simulate {shlex.quote(str(run / 'job.toml'))}"
            f" --out {shlex.quote(str(run))} --resume"
        )
