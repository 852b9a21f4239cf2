"""Sequential recommendation: ranks all items by how likely they are a user's next one.

Histories never leave their client. Clients and server exchange the items' vectors and the network's weights,
and before training the names of the items. The network has no parameters of single users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atoll.backbones.encoder import Model
from atoll.backbones.options import options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Findings, Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.lazy import LazyRows
from atoll.data.schema import whole
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import class_fields, pinned_names
from atoll.tasks.data_info import InfoField
from atoll.tasks.losses import surprise
from atoll.tasks.recommendation.data import HISTORIES, RecommendOptions, events, histories_of
from atoll.tasks.recommendation.sasrec import load_recommender
from atoll.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

IGNORE_INDEX = -100
"""The target at padding in front of a short history."""

MOST_ITEMS = 200_000
TEXTS = InfoField(
    "texts",
    "example",
    "task.options.texts",
    "the items' texts in the order of data.classes",
    "texts",
    MOST_ITEMS,
)
UNREAD_TEXTS = InfoField("texts", "public", holds="texts", at_most=MOST_ITEMS)
"""The field of texts that the network doesn't read; with silent greetings they are empty or the job's."""

UNKNOWN = -1
"""The target for an item that isn't in the run's list: it can't be recommended, and counts as missed."""


@dataclass(frozen=True)
class Recommendation(Task):
    """Recommendation; targets are [n, length], the item after each position; the last isn't trained on."""

    name: str = "recommendation"
    summary: str = "what a user takes next; SASRec, with items' texts where there are; HR@10, NDCG@10"
    uses_pooled_features: bool = False
    has_own_split: bool = True
    reads_times: bool = True
    primary_metric: str = "ndcg"
    options: RecommendOptions = field(default_factory=RecommendOptions)

    def configured(self, job: Job, backbone: Backbone) -> Recommendation:
        return replace(self, options=options_of(job.task.options, RecommendOptions))

    def check(self, job: Job) -> None:
        options = options_of(job.task.options, RecommendOptions)
        refuse_augment(job)
        if options.texts is not None and len(options.texts) != len(job.data.classes or ()):
            raise ConfigError(
                f"task.options.texts: {len(options.texts)} texts for {len(job.data.classes or ())} items of"
                " data.classes, expected one for each"
            )

    def info_fields_for(self, job: Job) -> Sequence[InfoField]:
        """The fields of items and of their texts, which are public if the network doesn't read them."""
        read = "text" in job.backbone.options
        return (*class_fields("items", "items", MOST_ITEMS), TEXTS if read else UNREAD_TEXTS)

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        diagnostics = Diagnostics()
        return HISTORIES.table_of(source, self._gathered(source, data, options, diagnostics), diagnostics)

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        diagnostics = Diagnostics()
        return HISTORIES.findings_of(source, self._gathered(source, data, options, diagnostics), diagnostics)

    def _gathered(
        self, source: Path, data: DataSection, table: Options, diagnostics: Diagnostics
    ) -> dict[str, pa.Table]:
        """The tables of histories at a path: as they are stored there, or built from interactions."""
        length = options_of(table, RecommendOptions).length
        if HISTORIES.has(source, "user", "items"):
            return HISTORIES.gather(source, data, diagnostics)
        rows = events(data.time_format).gather(source, data, diagnostics)
        if diagnostics.problems:
            return {}
        if "test" in rows:
            raise DataError(
                f"{shown(source)}: train and test, expected one table: the last items are the test"
            )
        hold_out = data.test_fraction > 0
        return histories_of(rows["train"], length, shown(source), diagnostics, hold_out=hold_out)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        length = options_of(job.task.options, RecommendOptions).length
        hold_out = job.data.test_fraction > 0
        rows = whole(splits)
        diagnostics = Diagnostics(rows_read=rows.num_rows)
        made = histories_of(rows, length, job.data.source, diagnostics, hold_out=hold_out)
        return HISTORIES.adopted(made, diagnostics.counts_of(0))

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        HISTORIES.write(dataset, folder, DataSection(source=data.source))

    def keys(self, dataset: Dataset) -> list[bytes]:
        return HISTORIES.keys(dataset)

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The items and their texts: those of the job in its order, else those of the data, sorted."""
        rows = dataset[:]
        texts: dict[str, str] = {}
        for items, item_texts in zip(rows["items"], rows.get("texts") or [()] * len(dataset), strict=True):
            for place, item in enumerate(items):
                texts.setdefault(item, item_texts[place] if item_texts else "")
        if data.classes is None:
            names = sorted(texts)
            return {"items": names, "texts": [texts[name] for name in names]}
        pinned, texts_given = pinned_names(data), options_of(options, RecommendOptions).texts
        known = [texts.get(name, "") for name in pinned] if texts_given is None else list(texts_given)
        return {"items": pinned, "texts": known, "pinned": True}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The job's items, else the sorted union of the clients'; an item's text is the first non-empty one.

        Raises:
            ConfigError: there are fewer than two items.
        """
        texts: dict[str, str] = {}
        for one in data_info:
            for name, text in zip(one["items"], one["texts"], strict=True):
                texts[name] = texts.get(name) or text
        pinned = next((f["items"] for f in data_info if f.get("pinned")), None)
        items = list(pinned) if pinned else sorted(texts)
        if len(items) < 2:
            raise ConfigError(f"recommendation needs at least two items, found {items}")
        return {"items": items, "texts": [texts[name] for name in items]}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        histories = dataset["items"][:]
        index = {name: number for number, name in enumerate(data_info["items"])}
        length = self.options.length
        targets = torch.full((len(order), length), IGNORE_INDEX, dtype=torch.int64)
        for row, place in zip(targets, order, strict=True):
            after = [index.get(item, UNKNOWN) for item in histories[place][1:]][-length:]
            row[length - len(after) :] = torch.tensor(after)
        inputs = LazyRows(lambda place: histories[place][:-1], tuple(order))
        return Shard(inputs, targets, tuple(keys[place] for place in order))

    def split(
        self, shard: Shard, seed: int, fraction: float, *, helped: bool = True
    ) -> tuple[list[int], list[int]]:
        """All rows for training, and all for validation unless `fraction` is 0: last items are held out."""
        rows = list(range(len(shard)))
        return rows, rows if fraction else []

    def parse_input(self, text: str) -> Any:
        """The items of a history, oldest first, from a text in which they are separated by commas."""
        items = [item.strip() for item in text.split(",") if item.strip()]
        if not items:
            raise DataError(f"input {text!r}: expected items with commas between them, oldest first")
        return items

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_recommender(backbone, job, self.options, data_info["items"], data_info["texts"])

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the next item, the mean over a history's positions except the last."""
        return surprise(outputs[:, :-1], targets[:, :-1])

    def eval_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the last item."""
        return surprise(outputs[:, -1:], targets[:, -1:])

    def num_with_target(self, targets: torch.Tensor) -> int:
        """The number of last items that are in the run's list of items."""
        return int((targets[:, -1] != UNKNOWN).sum())

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.recommendation.metrics import HitRate, Ndcg

        top = self.options.top
        return MetricCollection({"hit_rate": HitRate(top), "ndcg": Ndcg(top)}, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """The rank of the true next item among all items, [n]; half of those with equal scores precede it."""
        last = targets[:, -1].to(predictions.device)
        target_scores = predictions.gather(1, last.clamp_min(0).unsqueeze(1))
        better, equal = (predictions > target_scores).sum(1), (predictions == target_scores).sum(1) - 1
        ranks = better + torch.div(equal, 2, rounding_mode="floor")
        return (torch.where(last == UNKNOWN, predictions.shape[1], ranks).cpu(),)

    def naive_baselines(self, shard: Shard, data_info: DataInfo) -> dict[str, Any]:
        """The most popular items as predictions: scores are the number of histories with the item."""
        index = {name: number for number, name in enumerate(data_info["items"])}
        counts = torch.zeros(len(index))
        known = [[index[item] for item in history if item in index] for history in shard.inputs]
        for history in known:
            counts[list(set(history))] += 1
        scores = counts.repeat(len(known), 1)
        if not self.options.repeats:
            for row, history in zip(scores, known, strict=True):
                row[history] = float("-inf")
        return {"most_popular": scores}

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The `top` items with the highest scores, and their softmax probabilities."""
        rows = []
        for scores in torch.softmax(predictions, dim=1):
            best = torch.topk(scores, min(self.options.top, len(scores)))
            names = [data_info["items"][place] for place in best.indices.tolist()]
            shares = [round(float(share), 4) for share in best.values]
            rows.append({"label": ", ".join(names), "items": dict(zip(names, shares, strict=True))})
        return rows


RECOMMENDATION = Recommendation()
