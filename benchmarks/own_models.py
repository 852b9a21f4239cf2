"""What clients gain by models of their own: mean accuracy at the clients, each with the model it would use.

    python -m benchmarks.own_models [CASE …] [--seeds 5]        # classes, groups

`classes`: ten clients with two of MNIST's ten digits each, 30 pictures of a digit at a client, LeNet-5 from
nothing. `groups`: twelve clients with all digits (8 x 8), in four groups whose pictures are turned by 0, 90,
180 and 270 degrees, as in IFCA's paper; a linear head on pixels. Three in ten of a client's examples are kept
back, and accuracy is on these. A seed starts the model anew, and deals the data of `classes` anew. Intervals
are Student's, 95 % over seeds; "gain" is the mean of the differences to the first row's run of the same seed.
"""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from benchmarks.craft import Case, Table, play
from benchmarks.craft_personal import TWO_CLASSES, at_the_clients

CLIENTS_A_GROUP = 3
TURNS = (0, 90, 180, 270)
"""Degrees."""


def classes(folder: Path) -> Table:
    """MNIST's digits, of which a client has two classes."""
    return {
        "data": {"source": "mnist-5k", "shots": 30, **TWO_CLASSES},
        "backbone": {"name": "atoll:lenet", "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 0.05, "batch_size": 10, "epochs": 2},
        "federation": {"clients": 10, "rounds": 20},
    }


def groups(folder: Path) -> Table:
    """Digits that are turned, by as much for all of a client."""
    from atoll.datasets.registry import load_source

    source = folder / "turned"
    if not source.exists():
        clients = CLIENTS_A_GROUP * len(TURNS)
        rows = load_source("digits")["train"].to_pylist()
        turned = [
            {"image": _turned(row["image"], number % clients), "label": row["label"],
             "site": f"site-{number % clients:02}"}
            for number, row in enumerate(rows)
        ]  # fmt: skip
        _save(turned, source)
    return {
        "data": {
            "source": str(source), "classes": tuple("0123456789"), "validation_fraction": 0.3,
            "partition": {"kind": "natural", "by": "site"}, "test_fraction": 0.0,
        },
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"lr": 1.0, "batch_size": 10, "epochs": 2},
        "federation": {"clients": CLIENTS_A_GROUP * len(TURNS), "rounds": 20},
    }  # fmt: skip


def _save(pictures: list[Table], where: Path) -> None:
    """Write pictures with a label and a site as a saved dataset."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string"), "site": datasets.Value("string")}
    )
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(pictures, features=features)})
    parts.save_to_disk(str(where))


def _turned(picture: dict[str, bytes], client: int) -> dict[str, bytes]:
    """The picture, turned as all of this client's are."""
    pixels = np.rot90(np.asarray(Image.open(io.BytesIO(picture["bytes"]))), client % len(TURNS))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return {"bytes": file.getvalue()}


WAYS: dict[str, Table] = {
    "one model": {},
    "one model, 1 own step": {"evaluate": {"adapt": 1}},
    "one model, 20 own steps": {"evaluate": {"adapt": 20}},
    "reptile, 20 own steps": {"strategy": {"name": "reptile"}, "evaluate": {"adapt": 20}},
    "per-fedavg, 1 own step": {"strategy": {"name": "per-fedavg"}, "evaluate": {"adapt": 1}},
    "pfedme, 20 own steps": {"strategy": {"name": "pfedme"}, "evaluate": {"adapt": 20}},
    "ifca, 4 clusters": {"strategy": {"name": "ifca", "options": {"clusters": 4}}},
    "Ditto, pull 0.1": {"personal": {"keep": "mixture"}},
    "APFL, mixing 0.5": {"personal": {"keep": "mixture", "method": "apfl"}},
    "alone": {"personal": {"keep": "mixture", "pull": 0.0}},
}
"""Both cases have these."""
OWN_HEADS: dict[str, Table] = {
    "own head (FedPer)": {"personal": {"keep": "head"}},
    "own head (FedRep)": {"personal": {"keep": "head", "head_epochs": 2}},
}
"""For a backbone that is tuned."""

CASES = {
    "classes": Case("at clients", classes, WAYS | OWN_HEADS, at_the_clients),
    "groups": Case("at clients", groups, WAYS, at_the_clients),
}


if __name__ == "__main__":
    play(CASES, __doc__)
