"""A small job for every task: a real network with random weights, on data that fits into seconds."""

from __future__ import annotations

from typing import Any

from atoll.job.job import Job

COMMON: dict[str, Any] = {
    "seed": 11,
    "federation": {"clients": 2, "rounds": 2},
    "train": {"lr": 0.01, "batch_size": 16, "optimizer": "adam"},
}
SQUEEZENET: dict[str, Any] = {"name": "torchvision:squeezenet1_1", "weights": "random", "image_size": 32}

ENTITY_TAGS = ("O", *(f"{mark}-{name}" for name in ("PER", "LOC", "ORG") for mark in "BI"))

TABLES: dict[str, dict[str, Any]] = {
    "text-classification": {
        "task": {"name": "text-classification"},
        "data": {"source": "written", "classes": ("good", "bad")},
        "backbone": {"name": "written", "max_tokens": 16},
    },
    "text-labels": {
        "task": {"name": "text-labels"},
        "data": {"source": "written", "classes": ("good", "cheap")},
        "backbone": {"name": "written", "max_tokens": 16},
    },
    "text-regression": {
        "task": {"name": "text-regression", "options": {"mean": 3.0, "deviation": 1.5}},
        "data": {"source": "written"},
        "backbone": {"name": "written", "max_tokens": 16},
        "train": {"lr": 0.001, "batch_size": 16, "optimizer": "adam"},
    },
    "image-classification": {
        "task": {"name": "image-classification"},
        "data": {"source": "written", "classes": ("day", "night", "rain")},
        "backbone": SQUEEZENET,
        "train": {"lr": 0.001, "batch_size": 4, "optimizer": "adam"},
    },
    "image-text": {
        "task": {"name": "image-text"},
        "data": {"source": "generated-reviews", "test_fraction": 0.0},
        "backbone": SQUEEZENET | {"max_tokens": 16, "options": {"text": "written"}},
        "train": {"lr": 0.0003, "batch_size": 64, "optimizer": "adam"},
    },
    "medical-imaging": {
        "task": {"name": "medical-imaging"},
        "data": {"source": "written", "classes": ("no", "yes")},
        "backbone": SQUEEZENET,
        "train": {"lr": 0.001, "batch_size": 8, "optimizer": "adam"},
    },
    "object-detection": {
        "task": {"name": "object-detection"},
        "data": {"source": "written"},
        "backbone": {
            "name": "torchvision:ssdlite320_mobilenet_v3_large",
            "weights": "random",
            "image_size": 64,
        },
        "train": {"lr": 0.0003, "batch_size": 4, "optimizer": "adam"},
    },
    "segmentation": {
        "task": {
            "name": "segmentation",
            "options": {"classes": ("background", "circle", "square", "triangle")},
        },
        "data": {"source": "written"},
        "backbone": {"name": "torchvision:lraspp_mobilenet_v3_large", "weights": "random", "image_size": 64},
        "train": {"lr": 0.0002, "batch_size": 2, "optimizer": "adam"},
    },
    "forecasting": {
        "task": {
            "name": "forecasting",
            "options": {
                "history": 14,
                "horizon": 3,
                "stride": 60,
                "known": ("rain",),
                "observed": ("traffic",),
            },
        },
        "data": {"source": "generated-deliveries"},
        "backbone": {"name": "atoll:gru", "weights": "random", "options": {"width": 8, "layers": 2}},
    },
    "survival": {
        "task": {
            "name": "survival",
            "options": {
                "features": ("age", "grade", "markers", "size", "treated"),
                "means": (60.0, 0.0, 0.0, 25.0, 0.0),
                "deviations": (11.0, 1.0, 1.0, 12.0, 1.0),
            },
        },
        "data": {"source": "generated-patients"},
        "backbone": {"name": "atoll:mlp", "weights": "random", "options": {"width": 8}},
    },
    "recommendation": {
        "task": {"name": "recommendation", "options": {"length": 8}},
        "data": {"source": "generated-shop"},
        "backbone": {"name": "atoll:sasrec", "weights": "random", "options": {"width": 8, "heads": 2}},
        "train": {"lr": 0.01, "batch_size": 128, "optimizer": "adam"},
    },
    "question-answering": {
        "task": {"name": "question-answering", "options": {"max_answer_tokens": 3}},
        "data": {"source": "written"},
        "backbone": {
            "name": "atoll:small-t5",
            "weights": "random",
            "max_tokens": 24,
            "options": {"width": 16, "layers": 1, "heads": 2},
        },
    },
    "text-to-text": {
        "task": {"name": "text-to-text", "options": {"max_target_tokens": 4, "metrics": ("rouge_l",)}},
        "data": {"source": "written"},
        "backbone": {
            "name": "atoll:small-t5",
            "weights": "random",
            "max_tokens": 16,
            "options": {"width": 16, "layers": 1, "heads": 2},
        },
    },
    "language-modeling": {
        "task": {"name": "language-modeling", "options": {"max_tokens": 48, "max_new_tokens": 4}},
        "data": {"source": "written"},
        "backbone": {"name": "llama"},
        "train": {"lr": 0.003, "batch_size": 8, "optimizer": "adam"},
    },
    "preference": {
        "task": {"name": "preference", "options": {"max_tokens": 64, "max_new_tokens": 4}},
        "data": {"source": "written"},
        "backbone": {"name": "llama"},
        "train": {"lr": 0.003, "batch_size": 8, "optimizer": "adam"},
    },
    "multiple-choice": {
        "task": {"name": "multiple-choice", "options": {"max_tokens": 128, "max_new_tokens": 4}},
        "data": {"source": "written"},
        "backbone": {"name": "llama"},
        "train": {"lr": 0.003, "batch_size": 8, "optimizer": "adam"},
    },
    "speech-recognition": {
        "task": {"name": "speech-recognition", "options": {"max_seconds": 2.0}},
        "data": {"source": "written"},
        "backbone": {"name": "atoll:small-ctc", "weights": "random", "options": {"width": 16}},
        "train": {"lr": 0.003, "batch_size": 4, "optimizer": "adam"},
    },
    "token-classification": {
        "task": {"name": "token-classification"},
        "data": {"source": "written", "classes": ENTITY_TAGS},
        "backbone": {
            "name": "atoll:small-text",
            "weights": "random",
            "max_tokens": 24,
            "options": {"width": 16, "layers": 1, "heads": 2},
        },
        "train": {"lr": 0.01, "batch_size": 32, "optimizer": "adam"},
    },
    "intent": {
        "task": {"name": "intent"},
        "data": {"source": "generated-commands"},
        "backbone": {
            "name": "atoll:small-text",
            "weights": "random",
            "max_tokens": 24,
            "options": {"width": 16, "layers": 1, "heads": 2},
        },
        "train": {"lr": 0.01, "batch_size": 128, "optimizer": "adam"},
    },
}
"""By task; `tests.support.task_data.ready` writes the folders that are called "written"."""

DRAWING: dict[str, Any] = {
    "name": "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "weights": "random",
    "image_size": 64,
}
"""A detector that draws which of its proposals it learns from."""


def job_of(task: str, method: str, **more: Any) -> Job:
    """The small job of a task with one way of tuning."""
    tune: dict[str, Any] = {"method": method} | ({"layers": 1} if method == "last-k" else {})
    tune |= {"rank": 2} if method == "lora" else {}
    table = COMMON | TABLES[task] | {"name": f"{task}-{method}", "tune": tune}
    return Job.parse(table | more, origin="test")
