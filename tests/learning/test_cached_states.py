"""States below the first tuned block: the same bits kept or not, alone or in a batch; computed once, ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from atoll.backbones.checkpoint import attention_of, force_attention_mask
from atoll.backbones.encoder import Encoder, Model
from atoll.backbones.text import without_pooler
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.datasets.synthetic.preferences import generated_preferences
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.prefix.frozen_prefix import FrozenPrefix
from atoll.learning.trainable import _last_blocks as last_blocks
from atoll.protocol.tensors import Tensors
from atoll.server.events import RoundEnded, ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from atoll.tasks.preference.task import PREFERENCE
from tests.backbones.test_backbones import tiny_bert
from tests.client.dp.test_private_training import private
from tests.support.models import small_llama, small_t5

LAST_K, LORA = {"method": "last-k", "layers": 1}, {"method": "lora", "layers": 1, "rank": 2}
TEXTS = ["good", "bad bad good", "a b c d e f g h i", "good a b", "bad", "good good good good good bad"]
CASES = ["language-modeling", "preference", "text-classification", "token-classification"]
TAGS = {"good": "B-X"}
INFO: dict[str, Any] = {"text-classification": {"classes": ["no", "yes"]}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("networks")
    return {"llama": small_llama(base / "llama"), "bert": tiny_bert(base / "bert")}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the sequences whose states are computed from now on."""
    lengths: list[int] = []
    whole = FrozenPrefix.states_of_each

    def noted(self: FrozenPrefix, sequences: Any, **how: Any) -> list[torch.Tensor]:
        lengths.extend(map(len, sequences))
        return whole(self, sequences, **how)

    monkeypatch.setattr(FrozenPrefix, "states_of_each", noted)
    return lengths


def job_of(
    folders: dict[str, Path],
    task: str = "language-modeling",
    tune: dict[str, Any] = LORA,
    states: str | None = "fp32",
    **train: Any,
) -> Job:
    is_causal = task in ("language-modeling", "preference")
    kept = {} if states is None else {"cached_states": states}
    table: dict[str, Any] = {
        "name": "kept",
        "seed": 4,
        "task": {"name": task, "options": {"max_tokens": 128, "max_new_tokens": 4}}
        if is_causal
        else {"name": task},
        "data": {"source": "generated-preferences"},
        "backbone": {"name": str(folders["llama" if is_causal else "bert"])},
        "tune": tune,
        "train": {"optimizer": "adam", "lr": 0.01, "batch_size": 4} | kept | train,
        "federation": {"clients": 2, "rounds": 2},
    }
    return Job.parse(table, origin="test")


def rows_of(task: str) -> pa.Table:
    if task == "preference":
        rows = [{"prompt": "hi", "chosen": text, "rejected": text[::-1] + "!"} for text in TEXTS]
        return pa.Table.from_pylist(rows)
    if task == "token-classification":
        rows = [{"tokens": text.split(), "tags": [TAGS.get(w, "O") for w in text.split()]} for text in TEXTS]
        return pa.Table.from_pylist(rows)
    if task == "text-classification":
        return pa.table({"text": TEXTS, "label": ["yes" if "bad" in text else "no" for text in TEXTS]})
    return pa.table({"text": TEXTS})


def at_work(job: Job) -> tuple[Learner, Shard]:
    task = task_named(job.task.name)
    table = task.from_builtin({"train": rows_of(task.name)}, job)
    info = INFO.get(task.name) or task.merge_info([task.local_info(table.train, job.data, job.task.options)])
    learner = Learner.of(job, task, info)
    return learner, learner.task.shard(table.train, info)


def trained(learner: Learner, shard: Shard) -> Tensors:
    """An update and a measurement, all in one."""
    tensors = learner.initial()
    update = train_model(learner, tensors, shard, learner.job, client="c", round=1, plan={})
    moved = {name: tensor + update.delta[name] for name, tensor in tensors.items()}
    return update.delta | update.states | learner.evaluate(moved, shard)


def without_disk(learner: Learner) -> None:
    """Let the learner compute every sequence's states whenever a batch needs them, and keep none."""
    kept = learner.kept_states
    assert kept is not None

    def alone(ids: torch.Tensor) -> torch.Tensor:
        return kept.prefix.states_of_each([ids], threads=1, done=int)[0]

    def each(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        table = torch.zeros((*ids.shape, learner.encoder.width))
        for place in torch.cartesian_prod(*(torch.arange(size) for size in ids.shape[:-1])).view(
            -1, ids.dim() - 1
        ):
            own = tuple(place.tolist())
            length = int(mask[own].sum())
            if length:
                table[own][:length] = alone(ids[own][:length])
        return batch | {"input_ids": table}

    object.__setattr__(kept, "in_place_of_inputs", each)
    object.__setattr__(kept, "keep", lambda count, batch_of: None)


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("tune", [LAST_K, LORA], ids=["last-k", "lora"])
@pytest.mark.parametrize("task", CASES)
def test_training_has_the_same_bits_with_the_cache_and_without(
    folders: dict[str, Path], task: str, tune: dict[str, Any], computed: list[int]
) -> None:
    job = job_of(folders, task, tune)
    learner, shard = at_work(job)
    without_disk(learner)
    expected = trained(learner, shard)
    computed.clear()
    assert_same_bits(trained(*at_work(job)), expected)
    assert computed, "the cache was empty"
    computed.clear()
    assert_same_bits(trained(*at_work(job)), expected)
    assert not computed, "a second run computes nothing below the cut"


@pytest.mark.parametrize("tune", [LAST_K, LORA], ids=["last-k", "lora"])
@pytest.mark.parametrize("task", CASES)
def test_training_is_that_of_the_whole_network_but_for_rounding(
    folders: dict[str, Path], task: str, tune: dict[str, Any]
) -> None:
    """With plain SGD: Adam's first step is a sign, and so as large for a rounding error as for a gradient."""
    plain = {"optimizer": "sgd", "dropout": 0.0 if task.endswith("classification") else None}
    kept, whole = (trained(*at_work(job_of(folders, task, tune, s, **plain))) for s in ("fp32", None))
    torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-6)


def test_equal_sequences_pass_the_prefix_once(folders: dict[str, Path], computed: list[int]) -> None:
    learner, shard = at_work(job_of(folders))
    learner.keep_states(shard.select([0, 0, 1, 2, 1]))
    learner.keep_states(shard)
    assert sorted(computed) == sorted(len(one["input_ids"]) for one in shard.inputs)


def test_states_do_not_depend_on_neighbours_or_padding(folders: dict[str, Path]) -> None:
    learner, shard = at_work(job_of(folders))
    together = learner.batch(shard, range(len(shard)))
    for row in range(len(shard)):
        alone = learner.batch(shard, [row])
        real = int(alone["attention_mask"].sum())
        assert torch.equal(alone["input_ids"][0, :real], together["input_ids"][row, :real])
        assert not together["input_ids"][row, real:].any()


def test_states_are_those_that_the_tuned_block_sees_in_transformers_own_pass(
    folders: dict[str, Path],
) -> None:
    learner, shard = at_work(job_of(folders))
    batch, ids = learner.batch(shard, [3]), learner.collate(shard, [3])["input_ids"]
    real = int(batch["attention_mask"].sum())
    network: Any = learner.model.backbone.model
    with torch.inference_mode():
        whole = network(input_ids=ids[:, :real], output_hidden_states=True)
    torch.testing.assert_close(batch["input_ids"][:, :real], whole.hidden_states[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_what_is_lost_or_damaged_is_computed_again(
    folders: dict[str, Path], computed: list[int], own_cache: Path, damage: Callable[[Path], Any]
) -> None:
    job = job_of(folders)
    learner, shard = at_work(job)
    learner.keep_states(shard.select([0, 1]))
    learner.keep_states(shard)
    expected = trained(learner, shard)
    files = sorted(own_cache.rglob("*.safetensors"))
    assert len(files) == 2
    damage(files[0])
    before = len(computed)
    assert_same_bits(trained(*at_work(job)), expected)
    assert 0 < len(computed) - before < len(shard)


def test_another_network_cut_or_precision_has_its_own_cache(
    folders: dict[str, Path], own_cache: Path, tmp_path: Path
) -> None:
    jobs = [
        job_of(folders),
        job_of(folders, states="bf16"),
        job_of(folders, tune=LORA | {"layers": 2}),
        job_of({"llama": small_llama(tmp_path / "untied", tied=False)}),
    ]
    for count, job in enumerate(jobs, start=1):
        learner, shard = at_work(job)
        learner.keep_states(shard)
        assert len(list((own_cache / "features").iterdir())) == count


def test_last_k_and_lora_of_as_many_blocks_share_one(folders: dict[str, Path], computed: list[int]) -> None:
    for tune in (LORA, LAST_K, LORA | {"rank": 1}):
        learner, shard = at_work(job_of(folders, tune=tune))
        learner.keep_states(shard)
    assert len(computed) == len(shard)


def test_bf16_rounds_the_states_to_nearest(folders: dict[str, Path]) -> None:
    (exact, shard), (rounded, _) = (at_work(job_of(folders, states=s)) for s in ("fp32", "bf16"))
    expected = exact.batch(shard, range(4))["input_ids"]
    found = rounded.batch(shard, range(4))["input_ids"]
    assert found.dtype == torch.float32 and torch.equal(found, expected.bfloat16().float())


def test_recomputed_activations_leave_the_bits_alone(folders: dict[str, Path]) -> None:
    job = job_of(folders, "text-classification", LAST_K)
    saving = job_of(folders, "text-classification", LAST_K, checkpoint_activations=True)
    assert_same_bits(trained(*at_work(saving)), trained(*at_work(job)))


def test_an_example_without_tokens_learns_nothing(folders: dict[str, Path]) -> None:
    learner, shard = at_work(job_of(folders))
    empty = {"input_ids": torch.zeros(0, dtype=torch.int64), "places": torch.zeros(0, dtype=torch.int64)}
    with_empty = Shard((*shard.inputs, empty), torch.cat([shard.table, -100 + 0 * shard.table[:1]]),
                       (*shard.keys, bytes(32)))  # fmt: skip
    learner.keep_states(with_empty)
    batch = learner.batch(with_empty, [0, len(shard)])
    assert batch["input_ids"].dim() == 3 and not batch["input_ids"][1].any()
    assert learner.batch(with_empty, [len(shard)])["input_ids"].dim() == 2


def test_states_that_are_not_finite_are_told(folders: dict[str, Path]) -> None:
    learner, shard = at_work(job_of(folders))
    assert learner.kept_states is not None
    with torch.no_grad():
        next(learner.kept_states.prefix.frozen[1].parameters()).fill_(torch.inf)
    with pytest.raises(DataError, match="states in the frozen blocks that are not finite"):
        learner.keep_states(shard)


def test_what_is_exported_and_asked_still_takes_tokens(folders: dict[str, Path]) -> None:
    learner, shard = at_work(job_of(folders))
    plain, _ = at_work(job_of(folders, states=None))
    tensors = learner.initial()
    learner.batch(shard, [0])
    assert not learner.collate(shard, [0])["input_ids"].is_floating_point()
    asked = [learner.task.parse_input("good")]
    assert learner.answers(tensors, asked) == plain.answers(tensors, asked)


@pytest.mark.parametrize(
    ("tune", "train", "message"),
    [
        ({"method": "full"}, {}, "no meaning with tune.method = 'full', which tunes the first block too"),
        ({"method": "lora"}, {}, "no meaning with tune.method = 'lora' without tune.layers"),
        (LAST_K, {"augment": ["token-dropout"]}, "cached_states and augment exclude each other"),
    ],
)
def test_a_job_that_can_keep_no_states_is_refused(
    folders: dict[str, Path], tune: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(folders, "text-classification", tune, **train)


def test_heads_on_features_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"train\.cached_states: a head learns from kept features"):
        at_work(job_of(folders, "text-classification", {"method": "head"}))


@pytest.mark.parametrize("task", ["language-modeling", "token-classification"])
def test_an_output_layer_that_is_tuned_alone_learns_from_the_last_states(
    folders: dict[str, Path], task: str
) -> None:
    kept, whole = (
        trained(*at_work(job_of(folders, task, tune={"method": "head"}, states=s, optimizer="sgd")))
        for s in ("fp32", None)
    )
    torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-6)


def token_reader() -> Encoder:
    encoder = Encoder()
    encoder.reads_tokens = True
    return encoder


class Skipping(nn.Module):
    """A network whose last block takes what the first one said too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        first = self.layers[0](self.table(input_ids))
        return (self.layers[2](self.layers[1](first)) + first,)


def test_a_network_that_looks_past_the_cut_is_refused() -> None:
    encoder = token_reader()
    encoder.model = Skipping()
    model = Model(encoder, nn.Linear(6, 2))
    model.requires_grad_(False)
    encoder.model.layers[2].requires_grad_(True)  # type: ignore[index, union-attr]
    with pytest.raises(ConfigError, match="take more than the states of the block below them"):
        FrozenPrefix(model)


def test_a_t5_whose_first_block_says_where_tokens_stand_is_refused(tmp_path: Path) -> None:
    """What it says of positions goes from block to block beside the states."""
    job = job_of({"bert": small_t5(tmp_path / "t5")}, "text-classification", LAST_K, dropout=0.0)
    with pytest.raises(ConfigError, match="take more than the states of the block below them"):
        at_work(job)[0].initial()


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "GPTNeoX", "Qwen2", "Phi", "Gemma", "Albert", "DistilBert"])
def test_other_architectures_begin_at_their_states_or_are_refused(kind: str) -> None:
    model = Model(token_reader(), nn.Linear(16, 2))
    model.backbone.model = other_network(kind)
    model.requires_grad_(False)
    for block in last_blocks(model.backbone.model, 1, model.head):
        block.requires_grad_(True)
    if kind == "Albert":  # Its one block is all blocks.
        model.backbone.model.embeddings.requires_grad_(False)
    prefix, ids = FrozenPrefix(model), torch.tensor([[5, 3, 7, 1, 2, 9], [4, 4, 2, 0, 0, 0]])
    mask = (ids > 0).long()
    states = torch.zeros((2, 6, 16))
    for row, length in enumerate((6, 3)):
        states[row, :length] = prefix.states_of_each([ids[row, :length]], threads=1, done=int)[0]
    network: Any = model.backbone.model.eval()
    with torch.inference_mode():
        whole, rest = (network(input_ids=given, attention_mask=mask)[0] for given in (ids, states))
    torch.testing.assert_close(whole[mask.bool()], rest[mask.bool()], rtol=1e-4, atol=1e-5)


def test_dropout_between_frozen_blocks_is_refused() -> None:
    """GPT-2 has a layer of it behind its embeddings, which works in training whatever is tuned."""
    model = Model(token_reader(), nn.Linear(16, 2))
    model.backbone.model = other_network("GPT2", dropout=0.1)
    model.requires_grad_(False)
    last_blocks(model.backbone.model, 1, model.head)[0].requires_grad_(True)
    with pytest.raises(ConfigError, match="dropout works below the first tuned block"):
        FrozenPrefix(model)


def other_network(kind: str, dropout: float = 0.0) -> nn.Module:
    import transformers

    sizes = {
        "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "embd_pdrop": dropout},
        "OPT": {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16},
        "Albert": {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24},
        "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2},
    }.get(kind, {"hidden_size": 16, "intermediate_size": 24})
    more = (
        {"num_hidden_layers": 3, "num_attention_heads": 2}
        if "n_head" not in sizes and "dim" not in sizes
        else {}
    )
    if kind in ("Qwen2", "Gemma"):
        more |= {"num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(vocab_size=12, pad_token_id=0, **sizes, **more)
    torch.manual_seed(0)
    network: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return without_pooler(network)


class Stopped(Exception):
    pass


def stop_after_a_round(event: object) -> None:
    if isinstance(event, RoundEnded):
        raise Stopped


@pytest.mark.parametrize("task", ["preference", "text-classification"])
def test_private_training_has_the_same_bits_with_the_cache_and_without(
    folders: dict[str, Path], task: str
) -> None:
    def update(learner: Learner, shard: Shard) -> Tensors:
        start = learner.initial()
        return train_privately(learner, start, shard, private(), client="c", round=1, plan={}).delta

    job = job_of(folders, task, dropout=0.0 if task == "text-classification" else None, optimizer="sgd")
    learner, shard = at_work(job)
    without_disk(learner)
    expected = update(learner, shard)
    assert_same_bits(update(*at_work(job)), expected)
    assert_same_bits(update(*at_work(job)), expected)
    train = job.train.model_copy(update={"cached_states": None})
    whole = update(*at_work(job.model_copy(update={"train": train})))
    torch.testing.assert_close(expected, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.processes
def test_engines_worker_processes_and_a_resumed_run_agree(folders: dict[str, Path], tmp_path: Path) -> None:
    job = job_of(folders, "preference")
    table = {"data": {"source": str(tmp_path / "data")}}
    rows = PREFERENCE.schema.adopted(generated_preferences(0, 8)).train
    PREFERENCE.write(rows, tmp_path / "data", job.data)
    job = Job.parse(job.model_dump(mode="json", exclude_defaults=True) | table, origin="test")
    found = {
        engine: simulate(job, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "loop")
    }
    found["workers"] = simulate(job, tmp_path / "two", workers=2, on_event=ignore_events, report=False)
    with pytest.raises(Stopped):
        simulate(job, tmp_path / "again", on_event=stop_after_a_round, report=False)
    found["resumed"] = simulate(job, tmp_path / "again", on_event=ignore_events, report=False, resume=True)
    assert len({result.model_sha256 for result in found.values()}) == 1


@pytest.mark.parametrize("task", ["language-modeling", "text-classification"])
def test_a_way_to_compute_attention_that_training_left_changes_no_state(
    folders: dict[str, Path], task: str
) -> None:
    (learner, shard), (other, _) = at_work(job_of(folders, task)), at_work(job_of(folders, task))
    ids = learner.collate(shard, [2])["input_ids"][0][:9]
    assert learner.kept_states is not None and other.kept_states is not None
    force_attention_mask(other.model)
    kept = [one.kept_states.prefix.states_of_each([ids], threads=1, done=int) for one in (learner, other)]
    assert torch.equal(kept[0][0], kept[1][0])
    assert attention_of(other.model.backbone.model) == "sdpa_whole_mask"
