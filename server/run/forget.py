"""Exact unlearning: a client's sums are taken out of a closed-form head, as if they had never been there.

The head follows from sums over clients. If a run keeps each client's sums (`tune.keep_sums`), those of the
others are added up again, in the same order: the head gets the same bits as in a federation without the
client (and with the same classes). Nothing is subtracted, so no rounding error remains of the client.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from safetensors import SafetensorError, safe_open

from atoll.errors import ConfigError, DataError
from atoll.job.closed_form import RIDGE
from atoll.job.job import Job
from atoll.protocol.tensors import Tensors, aligned, file_parts, from_bytes, tensors_sha256
from atoll.report.run_result import Forgotten, RunResult
from atoll.server.run.checkpoint import latest, save
from atoll.server.run.directory import RunDirectory
from atoll.strategies.closed_form import head_of
from atoll.strategies.random_features import with_last_layer
from atoll.system.durable_files import replace_synced, sync_folder

SUMS, RECORD = "sums", "forgotten.json"
MODEL = Path("model") / "model.safetensors"


def keep_sums(run: Path, by_client: Mapping[str, Tensors]) -> None:
    """Write each client's sums into the run's directory, readable by its owner only.

    A file has 8 bytes a number: of ridge classes, classes times width, and width² of them.
    """
    folder = run / SUMS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for name, sums in by_client.items():
        replace_synced(_file_of(run, name), file_parts(sums, {"client": name}), 0o600)


def forget(run: Path, client: str) -> Forgotten:
    """Replace the model by that of all other clients, delete the client's sums, and return the record of it.

    If the process is killed in between, the sums remain, so that it can be repeated.

    Raises:
        ConfigError: the run has no closed-form model with kept sums, or no such client.
        DataError: a file of sums is damaged.
    """
    job = Job.load(run / "job.toml")
    check_can_forget(job, run)
    with RunDirectory.open(run, job, resume=True, force=False) as directory:
        directory.commit()
        left = kept_clients(run)
        if client not in left:
            raise ConfigError(
                f"{run}: keeps no sums of {client!r}, expected one of {', '.join(sorted(left))}"
            )
        left.pop(client)
        if not left:
            raise ConfigError(f"{run}: {client!r} is its only client; expected another one to be left")
        head = _head_of(job, left)
        before = from_bytes((run / MODEL).read_bytes())
        after = with_last_layer(before, head)
        record = _record(run, client, tensors_sha256(before), tensors_sha256(after), len(left))
        _replace_model(run, job, after)
        _replace_result(run, record)
        _file_of(run, client).unlink()
        sync_folder(run / SUMS)
    return record


def check_can_forget(job: Job, run: Path) -> None:
    """Raises ConfigError with the reason where no client can be removed from the run's model."""
    if job.federation.secure_aggregation or job.privacy.units:
        why = "under a promise or a secure sum no client's sums are there to take away"
    elif job.tune.head_init is None or job.federation.rounds != 1:
        why = "its model was trained, and what a client did to it in training can't be taken out"
    elif not job.tune.keep_sums:
        why = "its clients' sums were not kept"
    else:
        return
    raise ConfigError(
        f"{run}: {why}; expected a run with tune.head_init, tune.keep_sums = true and federation.rounds = 1"
    )


def kept_clients(run: Path) -> dict[str, Tensors]:
    """The sums that the run keeps, by client in the order of their names.

    Raises:
        DataError: a file is damaged.
    """
    by_client: dict[str, Tensors] = {}
    for path in sorted((run / SUMS).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                name = (file.metadata() or {})["client"]
                by_client[name] = {key: aligned(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except (OSError, KeyError, SafetensorError) as error:
            raise DataError(f"{path}: damaged ({error}); the model stays as it is") from None
    return {name: by_client[name] for name in sorted(by_client)}


def _head_of(job: Job, by_client: Mapping[str, Tensors]) -> Tensors:
    from atoll.learning.learner import sum_states

    assert job.tune.head_init is not None
    return head_of(job.tune.head_init, sum_states(by_client.values()), job.tune.ridge or RIDGE)


def _record(run: Path, client: str, replaced: str, model: str, left: int) -> Forgotten:
    """The record of a forgotten client and of both models' hashes, written before anything else changes."""
    path = run / RECORD
    known: list[Forgotten] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    for entry in known:
        if entry["client"] == client and entry["model_sha256"] == model:
            return entry  # a kill came between the record and the rest
    entry = Forgotten(
        client=client, replaced_sha256=replaced, model_sha256=model, clients_left=left,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    replace_synced(path, json.dumps([*known, entry], indent=2).encode())
    return entry


def _replace_model(run: Path, job: Job, tensors: Tensors) -> None:
    """Write the new model and checkpoint, and delete older checkpoints, which contain the client."""
    replace_synced(run / MODEL, file_parts(tensors))
    folder = run / "checkpoints"
    newest = latest(folder, job.hash)
    if newest is None:
        return
    save(folder, replace(newest, tensors=newest.tensors | {n: tensors[n] for n in newest.tensors}))
    for path in folder.glob("round-*.safetensors"):
        if path.name != f"round-{newest.round:06d}.safetensors":
            path.unlink()


def _replace_result(run: Path, record: Forgotten) -> None:
    """Add the record to the result, and remove the replaced model's final metrics."""
    result = RunResult.read(run)
    note = f"{record['client']} was forgotten: the model is not measured since"
    replace(
        result,
        model_sha256=record["model_sha256"],
        forgotten=json.loads((run / RECORD).read_text("utf-8")),
        final={"server": {}, "clients": {}},
        notes=[*(n for n in result.notes if n != note), note],
    ).write(run)


def _file_of(run: Path, client: str) -> Path:
    return run / SUMS / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}.safetensors"
