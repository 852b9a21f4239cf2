"""`generated-scans`: drawn chests in grey, of which some have a bright spot in a lung; several a patient."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import SIDE, Pixels, Region, as_bytes, ellipse, image_column
from atoll.datasets.synthetic.png import grey_png
from atoll.protocol.random_streams import stream_seed

FINDINGS = ("clear", "nodule")
HOSPITALS = {
    "north": (0.85, 12, 7.0),
    "east": (1.0, 0, 4.0),
    "south": (1.1, -8, 9.0),
    "west": (0.95, 20, 5.0),
}
"""Of each: contrast, brightness and noise of its machine, in grey levels."""
_RIBS = 7
_TEST = 0.2

_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5


def generated_scans(seed: int = 0, patients: int = 240) -> dict[str, pa.Table]:
    """Two to four scans of each patient: columns image, label, patient and hospital.

    A patient's anatomy and finding are the same on all of them; no patient is in both splits.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-scans"))
    images, labels, names, hospitals, tested = [], [], [], [], []
    for number in range(patients):
        hospital = list(HOSPITALS)[rng.integers(len(HOSPITALS))]
        finding = FINDINGS[int(rng.random() < 0.4)]
        body, lungs = _chest(rng)
        spot = _spot(lungs, rng) if finding == "nodule" else np.zeros((SIDE, SIDE))
        for _ in range(rng.integers(2, 5)):
            images.append(grey_png(as_bytes(_taken(body + spot, HOSPITALS[hospital], rng))))
            labels.append(finding)
            names.append(f"patient-{number:04d}")
            hospitals.append(hospital)
            tested.append(number >= (1 - _TEST) * patients)
    columns = {"label": labels, "patient": names, "hospital": hospitals}
    table = pa.table(
        {"image": image_column(images)}
        | {name: pa.array(values, pa.string()) for name, values in columns.items()}
    )
    return {"train": table.filter(~np.array(tested)), "test": table.filter(np.array(tested))}


def _chest(rng: np.random.Generator) -> tuple[Pixels, list[Region]]:
    """(grey levels of a body with its ribs, which pixels each lung has)."""
    pixels = np.full((SIDE, SIDE), 25.0)
    middle, width = rng.uniform(44, 52), rng.uniform(78, 90)
    pixels[ellipse(middle, 52, width, 100)] = rng.uniform(120, 150)
    lungs = [
        ellipse(
            middle + side * rng.uniform(17, 20), rng.uniform(46, 52), rng.uniform(24, 29), rng.uniform(54, 64)
        )
        for side in (-1, 1)
    ]
    for lung in lungs:
        pixels[lung] = rng.uniform(60, 80)
    pixels[ellipse(middle + 6, 62, rng.uniform(20, 28), rng.uniform(22, 30))] = rng.uniform(135, 160)
    for rib in range(_RIBS):
        height = 16 + rib * 9.5 + rng.uniform(-1, 1) + ((_X - middle) / 26) ** 2 * 4
        pixels += (
            rng.uniform(10, 22) * np.exp(-(((_Y - height) / 1.6) ** 2)) * (np.abs(_X - middle) < width / 2)
        )
    return pixels, lungs


def _spot(lungs: list[Region], rng: np.random.Generator) -> Pixels:
    """A soft bright spot within a lung."""
    rows, columns = np.nonzero(lungs[rng.integers(len(lungs))])
    place = rng.integers(len(rows))
    radius = rng.uniform(2.5, 5.0)
    distance = (_Y - rows[place]) ** 2 + (_X - columns[place]) ** 2
    spot: Pixels = rng.uniform(45, 80) * np.exp(-distance / radius**2)
    return spot


def _taken(body: Pixels, machine: tuple[float, float, float], rng: np.random.Generator) -> Pixels:
    """A scan of the body: moved a little, with its machine's contrast, brightness and noise."""
    contrast, brightness, noise = machine
    moved = np.roll(body, tuple(rng.integers(-3, 4, 2)), (0, 1))
    taken: Pixels = contrast * moved + brightness + rng.normal(0, noise, body.shape)
    return taken
