"""A job with a teacher and a job with a pruned backbone, on real sites: the bits of the simulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sim.engine import simulate
from sim.population import client_names
from tests.federation.places import federation_of, unwatched
from tests.federation.test_same_bits import CLIENTS, Places, jobs

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("small")
    text = jobs(folder)["news-fedavg"]
    simulate(text, folder / "teacher", watch=unwatched, report=False)
    full = text.model_copy(update={"tune": text.tune.model_copy(update={"method": "full", "rank": None})})
    teacher = {"teacher": str(folder / "teacher"), "teacher_weight": 0.8}
    train, backbone = full.train.model_copy(update=teacher), full.backbone.model_copy(update={"prune": 0.5})
    made = {
        "taught": full.model_copy(update={"name": "taught", "train": train}),
        "pruned": full.model_copy(update={"name": "pruned", "backbone": backbone}),
    }
    with federation_of(folder, *client_names(CLIENTS)) as federation:
        yield Places(folder, made, {}, federation)


def test_real_sites_learn_from_a_teacher_and_keep_what_was_pruned_at_zero(places: Places) -> None:
    with places.sites("taught", [1, 0, 3, 2]):
        for name in ("taught", "pruned"):
            result = places.federation.run(places.jobs[name])
            assert result["model_sha256"] == places.expected(name)
            assert all(not line["set_aside"] for line in result["rounds"])
