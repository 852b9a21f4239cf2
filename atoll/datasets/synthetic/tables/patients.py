"""`generated-patients`: follow-ups of patients of six hospitals, drawn from a Cox model that is known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.protocol.random_streams import stream_seed

HOSPITALS = ("city", "coast", "county", "hill", "lake", "university")
PATIENTS = 1200
STUDY_DAYS = 2000
MONTHLY_HAZARD = 0.006
EFFECTS = {"age": 0.04, "grade": 0.6, "markers": 0.8, "size": 0.02, "treated": -0.7}
"""What one more of each adds to the logarithm of the hazard; `pulse` adds nothing."""
MEANS = {"age": 60.0, "grade": 2.0, "markers": 0.0, "pulse": 70.0, "size": 25.0, "treated": 0.5}


def generated_patients(seed: int = 0) -> dict[str, pa.Table]:
    """A row a patient: columns hospital, time (days), event, age (years), grade (1 to 3), markers, pulse (a
    minute), size (mm) and treated (1 or 0).

    A patient's hazard is constant: `MONTHLY_HAZARD` times the hospital's own factor times exp of the sum of
    `EFFECTS` times what each feature differs from `MEANS` by. Who has no event is censored at the end of the
    study, which patients enter at different times, or when they move away.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-patients"))
    hospital = rng.choice(len(HOSPITALS), PATIENTS, p=(0.3, 0.1, 0.15, 0.1, 0.1, 0.25))
    older, base = rng.normal(0, 4, len(HOSPITALS)), rng.lognormal(0, 0.3, len(HOSPITALS))
    features = {
        "age": np.clip(rng.normal(60 + older[hospital], 11), 25, 95).round(1),
        "grade": rng.choice((1.0, 2.0, 3.0), PATIENTS, p=(0.25, 0.45, 0.3)),
        "markers": rng.normal(0, 1, PATIENTS).round(3),
        "pulse": rng.normal(70, 9, PATIENTS).round(0),
        "size": np.clip(rng.gamma(4.0, 6.0, PATIENTS), 2, 90).round(1),
        "treated": rng.integers(0, 2, PATIENTS).astype(np.float64),
    }
    risk = sum(effect * (features[name] - MEANS[name]) for name, effect in EFFECTS.items())
    hazard = MONTHLY_HAZARD / 30 * base[hospital] * np.exp(risk)
    event = rng.exponential(1 / hazard)
    censored = np.minimum(rng.uniform(200, STUDY_DAYS, PATIENTS), rng.exponential(4000, PATIENTS))
    return {
        "train": pa.table(
            {
                "hospital": pa.array([HOSPITALS[place] for place in hospital], pa.string()),
                "time": pa.array(np.ceil(np.minimum(event, censored))),
                "event": pa.array(event <= censored),
                **{name: pa.array(values) for name, values in features.items()},
            }
        )
    }
