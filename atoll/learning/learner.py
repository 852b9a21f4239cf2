"""The learner of a job in one process: it builds models and measures them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from atoll.backbones.encoder import TARGETS, Batch, Encoder, Model, Variation
from atoll.backbones.extract import BATCH, Progress, compute_batches, extract, less_padded
from atoll.backbones.resolve import Backbone, resolve
from atoll.data.lazy import take_many
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning import lora_base, trainable
from atoll.learning.compatibility import check_fits
from atoll.learning.features import Features, dtype_of_states, state_cache
from atoll.learning.input_cache import ReadyInputs
from atoll.learning.local_parameters import own_part
from atoll.learning.objective.local_objective import LocalObjective
from atoll.learning.prefix.kept_states import KeptStates, kept_states
from atoll.learning.pruning import fingerprinted, pruned
from atoll.protocol.messages import DataInfo
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.merge import trained_in_round
from atoll.strategies.personal.ifca import model_of_cluster
from atoll.tasks import with_brought_metrics
from atoll.tasks.metric_values import MetricValues, computed, defined
from atoll.tasks.task import Sample, Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from atoll.learning.objective.distillation import Teacher

BATCH_WITHOUT_NEIGHBOURS = 64
"""The fixed batch size where no row's bits may depend on other rows."""

WHOLE_BATCH = 16
"""The batch size for evaluating whole models, some of which need much memory per example."""


@dataclass
class Learner:
    """Builds a job's model, prepares its inputs and measures it; training itself is done by clients.

    `task` is set up for the job (`Task.configured`), `data_info` is what all clients agreed on, and
    `backbone` has its weights located. `progress` is called with (done, total) while features are computed.
    """

    job: Job
    task: Task
    data_info: DataInfo
    backbone: Backbone
    progress: Progress | None = None
    teacher: Teacher | None = None
    _ready: ReadyInputs = field(default_factory=ReadyInputs)

    @classmethod
    def of(cls, job: Job, task: Task, data_info: DataInfo, progress: Progress | None = None) -> Learner:
        """The learner of a job, after its weights are located and its device is checked.

        Raises:
            WeightsError: the backbone's weights are missing or damaged.
            ConfigError: the device is not available, or the task does not fit the job.
        """
        from atoll.learning.objective.distillation import teacher_of  # a teacher has a learner itself

        check_fits(job, task)
        backbone = fingerprinted(resolve(job.backbone, job.seed), job.backbone)
        task = task.configured(job, backbone).with_data_info(data_info)
        return cls(job, task, data_info, backbone, progress, teacher_of(job))

    @property
    def uses_features(self) -> bool:
        """Whether the whole backbone is frozen, so that an example's features never change."""
        return self.task.uses_pooled_features and self.job.tune.method == "head"

    @property
    def trains_on_features(self) -> bool:
        """Whether training uses cached features only, of plain examples or of cached augmented views."""
        return self.task.uses_pooled_features and self.job.backbone_is_frozen

    @cached_property
    def encoder(self) -> Encoder:
        """The backbone, loaded at the first use."""
        if not self.task.uses_pooled_features:
            return self.model.backbone
        encoder = self.task.encoder(self.backbone, self.job.backbone, self.job.seed)
        return pruned(encoder, self.job.backbone)

    @cached_property
    def model(self) -> Model:
        """Backbone and head on the job's device; gradients are on for exactly what the job trains."""
        if self.task.uses_pooled_features:
            model = Model(self.encoder, self._fresh_head(self.encoder.width))
        else:
            model = self.task.network(self.backbone, self.job, self.data_info)
            pruned(model.backbone, self.job.backbone, model.head)
        trainable.prepare(model, self.job)
        return model.to(self.job.train.device)

    @cached_property
    def kept_states(self) -> KeptStates | None:
        """The cache of the frozen blocks' outputs; None where the job caches none."""
        train = self.job.train
        if train.cached_states is None or self.trains_on_features:
            return None
        cache_at = partial(state_cache, self.job, self.backbone)
        return kept_states(self.model, cache_at, dtype_of_states(self.job), train.threads, self._tell)

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)

    @cached_property
    def features(self) -> Features:
        """The frozen backbone's features of examples, and their cache."""
        return Features(self.job, self.backbone, lambda: self.encoder, self._tell)

    @property
    def objective(self) -> LocalObjective:
        """What clients minimise in training."""
        return LocalObjective(self.job, self.task, self.data_info, self.teacher)

    def initial(self) -> Tensors:
        """The trainable tensors before the first round, by name, on the CPU; ask before any is trained."""
        if self.uses_features:
            head = self._fresh_head(self._width)
            return {f"head.{name}": p.detach().clone() for name, p in head.named_parameters()}
        _ = self.kept_states  # A network that can't be cut is refused before the first round.
        self.begin_round(0)
        tensors = trainable.values(self.model) | lora_base.nothing_added(self.model)
        return {name: t.cpu() for name, t in tensors.items()}

    def with_another_head(self, tensors: Tensors, number: int) -> Tensors:
        """The trainable tensors with a different initial head, drawn from the job's seed and `number`."""
        drawn = self._fresh_head(self._width, number).named_parameters()
        head = {f"head.{name}": p.detach().clone() for name, p in drawn}
        return {name: head.get(name, tensor) for name, tensor in tensors.items()}

    def begin_round(self, round: int) -> None:
        """Select the parameters that a round trains, if LoRA's factors alternate; all of them in round 0."""
        if self.job.tune.lora_merge == "rolora":
            lora_base.alternate(self.model, round)

    def trained_in_round(self, tensors: Tensors, round: int) -> Tensors:
        """The tensors, of those given, that clients train and send in a round; one model's, with clusters."""
        if self.job.strategy.makes_clusters:
            return model_of_cluster(tensors, 0)
        return trained_in_round(tensors, self.job.tune.lora_merge, round)

    @cached_property
    def client_tensors(self) -> Tensors:
        """Initial values of the tensors that clients keep; they must be read before anything is trained."""
        return own_part(self.model, self.job) if self.job.personal.splits else {}

    def collate(self, shard: Shard, rows: Sequence[int], variation: Variation | None = None) -> Batch:
        """Some rows of a shard as a batch for the backbone; decoded inputs are cached unless augmented."""
        if variation is not None:
            batch = self.encoder.preprocess_and_collate(take_many(shard.inputs, rows), variation)
        else:
            batch = self.encoder.collate(self._ready.of(self.encoder, shard, rows))
        if self.task.sees_targets:
            batch[TARGETS] = shard.targets_of(rows)
        return batch

    def batch(self, shard: Shard, rows: Sequence[int], variation: Variation | None = None) -> Batch:
        """As `collate`, for this learner's model, which takes cached states in place of inputs."""
        batch = self.collate(shard, rows, variation)
        return batch if self.kept_states is None else self.kept_states.in_place_of_inputs(batch)

    def keep_states(self, shard: Shard) -> None:
        """Compute and cache the shard's missing states on disk, if the job caches any."""
        if self.kept_states is not None:
            self.kept_states.keep(len(shard), partial(self.collate, shard))

    def predictions(self, tensors: Tensors, inputs: Sequence[Any]) -> Any:
        """The model's predictions for raw inputs, one each, without any cache."""
        shard = Shard(inputs, torch.zeros(len(inputs), dtype=torch.int64), (bytes(32),) * len(inputs))
        if not self.task.uses_pooled_features:
            model = self.filled(tensors)
            with torch.inference_mode():
                return model.predict(self.on_device(self.encoder.preprocess_and_collate(inputs)))
        return self._fresh_outputs(tensors, shard)

    def answers(self, tensors: Tensors, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The model's answers to raw inputs, one table each, as `atoll predict` prints them."""
        if self.task.uses_pooled_features:
            return self.task.format_predictions(self.predictions(tensors, inputs), self.data_info)
        model = self.filled(tensors)
        with torch.inference_mode():
            batch = self.on_device(self.encoder.preprocess_and_collate(inputs))
            return self.task.answers(model, batch, inputs, self.data_info)

    def _fresh_outputs(self, tensors: Tensors, shard: Shard) -> torch.Tensor:
        if not self.uses_features:
            return self._through_model(tensors, shard, None)
        train = self.job.train
        features = extract(self.features.encoder, shard.inputs, threads=train.threads, device=train.device)
        return self._through_head(tensors, features)

    def outputs(self, tensors: Tensors, shard: Shard) -> torch.Tensor:
        """The outputs [n, outputs] for a shard with these tensors; their bits depend on the shard alone."""
        if self.uses_features:
            return self._through_head(tensors, self.features.plain(shard))
        return self._through_model(tensors, shard, self.kept_states)

    def _through_model(
        self, tensors: Tensors, shard: Shard, states: KeptStates | None, size: int | None = None
    ) -> torch.Tensor:
        """Outputs [n, outputs] of the whole model; with `size`, in batches padded to exactly that size."""
        batches, model = self.model.backbone.fixed_batches(shard.inputs, size or BATCH), self.filled(tensors)
        batches = batches if size is not None else less_padded(batches)
        if states is not None:
            batches = states.in_place_of_inputs_of(batches)
        train = self.job.train
        # A network that begins with states is changed while it runs, so it takes one batch after the other.
        parts = compute_batches(
            batches, model, threads=train.threads, device=train.device, at_once=states is None
        )
        ordered = {row: line for rows, output in parts for row, line in zip(rows, output, strict=True)}
        return torch.stack([ordered[row] for row in range(len(shard))])

    def samples(self, tensors: Tensors, shard: Shard) -> list[Sample]:
        """Texts that the model with these tensors writes for a few examples; empty for most tasks."""
        if type(self.task).samples is Task.samples:
            return []
        with torch.inference_mode():
            return self.task.samples(self.filled(tensors), shard)

    def metrics(self) -> MetricCollection:
        """The task's metrics and those that the job adds, freshly reset."""
        return with_brought_metrics(self.task.metrics(self.data_info), self.job, self.data_info)

    def evaluate(self, tensors: Tensors, shard: Shard) -> Tensors:
        """The metric states of the model with these tensors on a shard, by name; they sum over shards."""
        metrics = self.metrics()
        self.keep_states(shard)
        if self.task.uses_pooled_features:
            outputs = self.outputs(tensors, shard)
            metrics.update(*self.task.metric_inputs(outputs, shard.table))
            loss, count = self.task.loss(outputs.to(torch.float64), shard.table) * len(shard), len(shard)
        else:
            loss, count = self._measure(self.filled(tensors), shard, metrics, self.batch)
        return states_of(metrics, loss, count)

    def form_of_states(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """(shape, dtype) of each tensor that `evaluate` returns, by name."""
        number = torch.zeros((), dtype=torch.float64)
        states = states_of(self.metrics(), number, 0)
        return {name: (state.shape, state.dtype) for name, state in states.items()}

    def outputs_by_row(self, tensors: Tensors, shard: Shard) -> torch.Tensor:
        """As `outputs`, but no row's bits depend on other rows of the shard."""
        if not self.uses_features:
            return self._through_model(tensors, shard, None, BATCH_WITHOUT_NEIGHBOURS)
        features = self.features.plain(shard)
        # Twice, since the library computes the product of a single row in another way.
        rows = [self._through_head(tensors, row.expand(2, -1).contiguous())[0] for row in features]
        return torch.stack(rows)

    def evaluate_model(self, model: Model, shard: Shard) -> MetricValues:
        """Metrics and loss of any model of this kind on a shard, without cached features and states."""
        metrics = self.metrics()
        total, count = self._measure(model, shard, metrics, self.collate)
        return computed(metrics) | {"loss": defined(total / count)}

    def naive_baselines(self, shard: Shard) -> dict[str, MetricValues]:
        """Metrics of the task's predictions that need no training, by their names."""
        by_name = {}
        for name, predictions in self.task.naive_baselines(shard, self.data_info).items():
            metrics = self.metrics()
            targets = shard.targets_of(range(len(shard)))
            metrics.update(*self.task.metric_inputs(predictions, targets))
            by_name[name] = computed(metrics)
        return by_name

    def _measure(
        self,
        model: Model,
        shard: Shard,
        metrics: MetricCollection,
        batch_of: Callable[[Shard, Sequence[int]], Batch],
    ) -> tuple[torch.Tensor, int]:
        """Update the metrics with a shard's predictions; returns (sum of the losses, number of terms)."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        size = max(len(shard), 1) if self.task.compares_examples else WHOLE_BATCH
        with torch.inference_mode():
            for start in range(0, len(shard), size):
                rows = range(start, min(start + size, len(shard)))
                batch, targets = self.on_device(batch_of(shard, rows)), shard.targets_of(rows)
                predictions, outputs = model.measure(batch)
                metrics.update(*self.task.metric_inputs(predictions, targets))
                loss = self.task.eval_loss(outputs, targets.to(self.job.train.device))
                total += loss.cpu().to(torch.float64) * len(rows)
                count += self.task.num_with_target(targets)
        return total, count

    def filled(self, tensors: Tensors) -> Model:
        """The model with these tensors loaded, in eval mode."""
        model = self.model.eval()
        trainable.load_values(model, tensors)
        return model

    def on_device(self, batch: Batch) -> Batch:
        """The batch, moved to the job's device."""
        return {name: t.to(self.job.train.device) for name, t in batch.items()}

    def compute(self, states: Tensors) -> MetricValues:
        """Metrics by name from summed states; None where a metric is undefined."""
        metrics = self.metrics()
        for name, metric in metrics.items():
            for state in metric._defaults:
                setattr(metric, state, states[f"{name}.{state}"])
            metric._update_count = 1
        return computed(metrics) | {"loss": defined(states["loss.sum"] / states["loss.count"])}

    @property
    def _width(self) -> int:
        """The width of what the head reads; features in the cache tell it without the backbone."""
        return self.features.width if self.uses_features else self.encoder.width

    def _fresh_head(self, width: int, *purpose: int) -> nn.Module:
        """A new head of the task, with the job's hidden layer if any; `purpose` varies the random draw."""
        hidden = self.job.tune.hidden
        with global_stream(self.job.seed, "init", "head", *purpose):
            if hidden is None:
                return self.task.head(width, self.data_info)
            return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), self.task.head(hidden, self.data_info))

    @cached_property
    def _head(self) -> nn.Module:
        return self._fresh_head(self._width)

    def _through_head(self, tensors: Tensors, features: torch.Tensor) -> torch.Tensor:
        head_tensors = {name.removeprefix("head."): t for name, t in tensors.items()}
        with torch.inference_mode():
            outputs: torch.Tensor = functional_call(self._head, head_tensors, features)
        return outputs


def ranked(keys: Sequence[bytes], seed: int, purpose: str) -> list[int]:
    """Rows in a random order that depends on seed, purpose and the keys, not on the rows' positions."""
    prefix = f"{seed}/{purpose}/".encode()
    marks = [hashlib.sha256(prefix + key).digest() for key in keys]
    return sorted(range(len(keys)), key=marks.__getitem__)


def states_of(metrics: MetricCollection, loss: torch.Tensor, count: int) -> Tensors:
    """The metrics' states by name, with the sum of losses and the number of its terms."""
    states = {
        f"{name}.{state}": getattr(metric, state).clone()
        for name, metric in metrics.items()
        for state in metric._defaults
    }
    return states | {"loss.sum": loss, "loss.count": torch.tensor(count, dtype=torch.float64)}


def sum_states(states: Iterable[Tensors]) -> Tensors:
    """Metric states summed in the order given."""
    total: Tensors = {}
    for state in states:
        for name, value in state.items():
            total[name] = total[name] + value if name in total else value
    return total
