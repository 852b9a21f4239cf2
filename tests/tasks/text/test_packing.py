"""Examples that share rows: the loss and the gradients are those of examples in rows of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.client.training.local_sgd import train_model
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.sim.engines.engine import check_engine
from atoll.tasks import task_named
from atoll.tasks.language_modeling.packing import check_packs, packed, shared_rows
from tests.support.models import byte_tokenizer, causal_job, moved, small_llama
from tests.tasks.text.test_multiple_choice import ROWS, small_gpt2

TEXTS = [
    "he",
    "the hill",
    "a hall that is long, and then longer",
    "x",
    "né \U0001f33b",
    "ll he ll he ll",
    "b c",
]
OPTIONS = {"max_tokens": 64, "samples": 0}


def small_mistral(folder: Path) -> Path:
    """A Mistral of two blocks, each token of which sees four before it at most."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = byte_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, sliding_window=4,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MODELS = {"llama": small_llama, "gpt2": small_gpt2, "mistral": small_mistral}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: make(place / name) for name, make in MODELS.items()}


def learner_of(folder: Path, *, packing: bool, task: str = "language-modeling", **tables: Any) -> Learner:
    plain = causal_job(task, "chats", folder, {"method": "full"}, OPTIONS | {"packing": packing})
    train = plain.train.model_copy(update={"optimizer": "sgd", "lr": 0.1, "batch_size": 4})
    job = plain.model_copy(update={"train": train, **tables})
    return Learner.of(job, task_named(task), {})


def shard_of(learner: Learner, rows: list[dict[str, Any]] | None = None) -> Any:
    table = pa.Table.from_pylist(rows or [{"text": text} for text in TEXTS])
    return learner.task.shard(learner.task.schema.adopted({"train": table}).train, {})  # type: ignore[attr-defined]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_every_example_lies_in_one_row_that_is_long_enough(lengths: list[int]) -> None:
    rows = shared_rows(lengths, 40)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= 40 for row in rows)
    # First fit leaves no two rows that would fit into one.
    full = [sum(lengths[example] for example in row) for row in rows]
    assert all(one + other > 40 for n, one in enumerate(full) for other in full[:n] if one and other)


def test_rows_hold_the_tokens_of_each_example_at_positions_of_its_own(folders: dict[str, Path]) -> None:
    learner = learner_of(folders["llama"], packing=True)
    shard = shard_of(learner)
    batch = learner.collate(shard, range(len(shard)))
    found = packed(batch)
    assert found is not None and len(found["input_ids"]) < len(shard)
    assert found["input_ids"].shape == found["position_ids"].shape
    flat, positions = found["input_ids"].flatten(), found["position_ids"].flatten()
    for row, one in enumerate(shard.inputs):
        places = found["places"][row, : len(one["places"])]
        assert torch.equal(flat[places], one["input_ids"][one["places"]])
        assert torch.equal(positions[places], one["places"])
    single = learner.collate(shard, [2])
    assert packed(single) is None


@pytest.mark.parametrize(
    ("name", "attention"),
    # Without packing transformers' eager attention has no number for padding that a window leaves nothing to.
    [(name, way) for name in MODELS for way in ("sdpa", "eager") if (name, way) != ("mistral", "eager")],
)
def test_loss_and_gradients_are_those_of_single_rows_in_float64(
    folders: dict[str, Path], name: str, attention: str
) -> None:
    found = []
    for packing in (False, True):
        learner = learner_of(folders[name], packing=packing)
        model = learner.filled(moved(learner)).double()
        network: Any = model.backbone.model
        network.set_attn_implementation(attention)
        shard = shard_of(learner)
        seen: list[tuple[int, ...]] = []
        hook = network.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(tuple(given["input_ids"].shape)),
            with_kwargs=True,
        )
        rows = range(len(shard))
        loss = learner.task.loss(model(learner.collate(shard, rows)), shard.targets_of(rows))
        loss.backward()
        hook.remove()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, seen))
    (loss, gradients, [alone]), (other, others, [together]) = found
    assert together[0] < alone[0] and together[1] == alone[1]
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    for part, gradient in gradients.items():
        assert (others[part] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, part


def test_no_example_sees_another_of_its_row(folders: dict[str, Path]) -> None:
    learner = learner_of(folders["llama"], packing=True)
    shard = shard_of(learner)
    batch = learner.collate(shard, range(len(shard)))
    model = learner.filled(moved(learner))
    with torch.inference_mode():
        before = model(batch)
        changed = copy.deepcopy(batch)
        changed["input_ids"][3] = (changed["input_ids"][3] + 1) % 200
        after = model(changed)
    others = [row for row in range(len(shard)) if row != 3]
    assert torch.equal(before[others], after[others])


def test_training_and_measuring_are_those_without_packing(folders: dict[str, Path]) -> None:
    updates, measured = [], []
    for packing in (False, True):
        learner = learner_of(folders["llama"], packing=packing)
        shard, start = shard_of(learner), moved(learner)
        update = train_model(learner, start, shard, learner.job, client="client-0000", round=1, plan={})
        updates.append(update)
        measured.append(learner.compute(learner.evaluate(start, shard)))
    for name, delta in updates[0].delta.items():
        assert (updates[1].delta[name] - delta).norm() <= 1e-4 * delta.norm() + 1e-7, name
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)


def test_questions_and_pairs_may_share_rows_too(folders: dict[str, Path]) -> None:
    pairs = [{"prompt": "a", "chosen": text, "rejected": "he " + text} for text in TEXTS]
    for task, rows in (("multiple-choice", ROWS), ("preference", pairs)):
        losses = []
        for packing in (False, True):
            learner = learner_of(folders["llama"], packing=packing, task=task)
            shard, start = shard_of(learner, rows), learner.initial()
            learner.filled(start)
            losses.append(learner.compute(learner.evaluate(moved(learner), shard)))
        assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6), task


class SeesAll(torch.nn.Module):
    """A network whose tokens see all before them, wherever their positions begin."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = torch.nn.Embedding(16, 16)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = False) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.table(input_ids).cumsum(1))


def test_where_rows_can_not_be_shared_it_is_refused_by_name(folders: dict[str, Path]) -> None:
    from atoll.job.privacy import PrivacySection

    with pytest.raises(ConfigError, match=r"task.options.packing: in SeesAll examples of one row see each"):
        check_packs(SeesAll())
    private = PrivacySection(unit="example", noise_multiplier=1.0, delta=1e-3, sampling_rate=0.5)
    with pytest.raises(ConfigError, match=r"task.options.packing: under example-level privacy"):
        learner_of(folders["llama"], packing=True, privacy=private)
    job: Job = learner_of(folders["llama"], packing=True).job
    with pytest.raises(ConfigError, match=r"task.options.packing: engine cohort"):
        check_engine(job, "cohort")
    kept = job.model_copy(update={"train": job.train.model_copy(update={"cached_states": "fp32"})})
    with pytest.raises(ConfigError, match=r"task.options.packing: train.cached_states"):
        Learner.of(kept, task_named("language-modeling"), {})
