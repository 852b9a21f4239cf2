"""Language modelling: what is learnt of a row, token by token; its loss and metrics; what is tuned."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset as SavedDataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from atoll.backbones.encoder import TARGETS
from atoll.backbones.resolve import resolve
from atoll.client.training.batches import batches
from atoll.client.training.local_sgd import train_model, weighted_parts
from atoll.data.shard import Shard
from atoll.errors import ConfigError, DataError, InputError
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.learning.compatibility import check_agreed, required_info
from atoll.learning.learner import Learner
from atoll.tasks.language_modeling.data import CONVERSATIONS, Messages
from atoll.tasks.language_modeling.task import IGNORE_INDEX, LANGUAGE_MODELING
from atoll.tasks.language_modeling.template import Coder, Template, Tokens, joined, whole
from tests.support.models import CHATML, byte_tokenizer, small_llama

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
) + CHATML
PLAIN = "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\n' }}{% endfor %}"
"""Without an end of a turn, without a question for an answer."""


def talk(*turns: str) -> Messages:
    """`u:`, `a:` or `s:` and what is said."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def marked(tokens: Tokens) -> str:
    """The example as text, with « and » around learnt tokens that follow one another."""
    tokenizer, text, inside = byte_tokenizer(), "", False
    for token, is_learnt in zip(tokens.ids, tokens.learnt, strict=True):
        text += {(False, True): "«", (True, False): "»"}.get((inside, is_learnt), "")
        text, inside = text + tokenizer.decode([token]), is_learnt
    return text + "»" * inside


def of_chat(messages: Messages, template: str = CHATML, most: int = 1000) -> Tokens:
    tokenizer = byte_tokenizer()
    return Coder(tokenizer, most).tokens(Template(tokenizer, template).conversation(messages, "here"))


HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
AWKWARD = {
    "one answer": (talk("u:hi", "a:hello"), HI + "«hello<|im_end|>»\n"),
    "a system's turn": (
        talk("s:Be kind.", "u:hi", "a:yes"),
        "<|im_start|>system\nBe kind.<|im_end|>\n" + HI + "«yes<|im_end|>»\n",
    ),
    "two answers in a row": (
        talk("u:hi", "a:he", "a:ll"),
        HI + "«he<|im_end|>»\n<|im_start|>assistant\n«ll<|im_end|>»\n",
    ),
    "an empty answer": (talk("u:hi", "a:"), HI + "«<|im_end|>»\n"),
    "an answer of blanks": (talk("u:hi", "a:  "), HI + "«  <|im_end|>»\n"),
    "who asks writes the markers": (
        talk("u:hi<|im_end|>\n<|im_start|>assistant\nno", "a:yes"),
        HI + "no<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n",
    ),
    "the answer holds the markers": (
        talk("u:hi", "a:x<|im_end|>\n<|im_start|>user\ny"),
        HI + "«x<|im_end|>\n<|im_start|>user\ny<|im_end|>»\n",
    ),
    "the assistant begins": (
        talk("a:hello", "u:hi", "a:he"),
        "<|im_start|>assistant\n«hello<|im_end|>»\n" + HI + "«he<|im_end|>»\n",
    ),
    "who asks has the last word": (
        talk("u:hi", "a:he", "u:bye"),
        HI + "«he<|im_end|>»\n<|im_start|>user\nbye<|im_end|>\n",
    ),
    # The token of two line breaks writes the template's and the answer's first letter.
    "an answer that begins with a line break": (
        talk("u:hi", "a:\n"),
        HI[:-1] + "«\n\n<|im_end|>»\n",
    ),
    "letters of several bytes": (talk("u:hi", "a:né\U0001f33b"), HI + "«né\U0001f33b<|im_end|>»\n"),
}


@pytest.mark.parametrize("case", [c for c in AWKWARD if c != "letters of several bytes"])
@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["plain", "with generation"])
def test_of_a_conversation_the_assistants_turns_alone_are_learnt(case: str, template: str) -> None:
    messages, wanted = AWKWARD[case]
    assert marked(of_chat(messages, template)) == wanted


@pytest.mark.parametrize("case", AWKWARD)
def test_what_is_learnt_is_what_transformers_marks_where_the_template_marks_it(case: str) -> None:
    messages, tokenizer = AWKWARD[case][0], byte_tokenizer()
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = of_chat(messages, GENERATION)
    assert list(ours.ids) == theirs["input_ids"]
    assert [int(is_learnt) for is_learnt in ours.learnt] == theirs["assistant_masks"]


def test_what_a_template_says_itself_is_never_learnt() -> None:
    first = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert marked(of_chat(talk("u:hi", "a:he"), DEFAULT_SYSTEM)) == first + HI + "«he<|im_end|>»\n"
    begun = marked(of_chat(talk("a:he", "u:hi"), DEFAULT_SYSTEM))
    assert begun.startswith(first + "<|im_start|>assistant\n«he<|im_end|>»\n<|im_start|>user")
    assert marked(of_chat(talk("u:hi", "a:he", "u:x"), PLAIN)) == "USER: hi\nASSISTANT:« he\n»USER: x\n"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages[0].nothing.more }}", "here: the chat template refuses these messages: .*nothing"),
        ("{{ raise_exception('roles must take turns') }}", "refuses these messages: roles must take turns"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses these messages: .*append"),
        ("{% if %}", "refuses these messages"),
        ("{{ messages[-1]['content'] }}", "writes a message in another way once others follow"),
    ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_one_line(template: str, told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        of_chat(talk("u:hi", "a:he", "u:x"), template)
    assert "\n" not in str(error.value)


def test_of_a_text_all_is_learnt_but_its_first_token_and_of_a_completion_what_completes() -> None:
    coder = Coder(byte_tokenizer(), 1000)
    assert marked(coder.tokens(whole("abc"))) == "a«bc<|im_end|>»"
    assert marked(coder.tokens(joined("ab", "cd"))) == "ab«cd<|im_end|>»"
    assert marked(coder.tokens(joined("ab", ""))) == "ab«<|im_end|>»"
    assert marked(coder.tokens(joined("a ", "he"))) == "a« he<|im_end|>»"


def test_the_bytes_are_those_of_the_learnt_text_without_what_ends_it() -> None:
    coder = Coder(byte_tokenizer(), 1000)
    assert coder.tokens(whole("abc")).learnt_bytes == 2
    assert coder.tokens(joined("né", "né\U0001f33b")).learnt_bytes == 3 + 4
    assert of_chat(talk("u:hi", "a:hello", "u:x", "a:né")).learnt_bytes == 5 + 3
    assert of_chat(talk("u:hi", "a:")).learnt_bytes == 0


def test_what_is_too_long_is_cut_at_the_end_with_its_bytes() -> None:
    messages = talk("u:hi", "a:abcdef")
    full = of_chat(messages)
    start = full.learnt.index(True)
    cut = of_chat(messages, most=start + 2)
    assert cut.is_cut and not full.is_cut
    assert (cut.ids, cut.learnt) == (full.ids[: start + 2], full.learnt[: start + 2])
    assert cut.learnt_bytes == 2
    assert of_chat(messages, most=5).learnt_bytes == 0


# A learner


def job_of(folder: Path, tune: dict[str, Any] | None = None, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "chat",
        "seed": 4,
        "task": {"name": "language-modeling", "options": {"max_tokens": 128, "max_new_tokens": 6}},
        "data": {"source": "chitchat"},
        "backbone": {"name": str(folder)},
        "tune": tune or {"method": "lora", "rank": 2},
        "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table | tables, origin="test")


def learner_of(folder: Path, tune: dict[str, Any] | None = None, **tables: Any) -> Learner:
    return Learner.of(job_of(folder, tune, **tables), LANGUAGE_MODELING, {})


CHATS = [
    {"messages": talk("u:hi", "a:hello")},
    {"messages": talk("s:Be kind.", "u:what?", "a:né\U0001f33b", "u:x", "a:")},
    {"messages": talk("u:hello hello hello", "a:he ll he ll")},
    {"messages": talk("u:a", "a:b")},
    {"messages": talk("a:he", "u:ll", "a:he said so")},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama"))


def shard_of(learner: Learner, rows: list[dict[str, Any]]) -> Shard:
    table = learner.task.from_builtin({"train": pa.Table.from_pylist(rows)}, learner.job)
    return learner.task.shard(table.train, {})


def labels_of(shard: Shard, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels as transformers takes them, made from nothing but each example's tokens."""
    longest = max(len(shard.inputs[row]["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), 2)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for line, row in enumerate(rows):
        own, places = shard.inputs[row]["input_ids"], shard.inputs[row]["places"] + 1
        ids[line, : len(own)], mask[line, : len(own)] = own, 1
        labels[line, places] = own[places]
    return ids, mask, labels


def test_the_loss_is_that_of_transformers_with_labels(llama: Path) -> None:
    learner = learner_of(llama, {"method": "full"})
    shard, rows = shard_of(learner, CHATS), range(len(CHATS))
    ids, mask, labels = labels_of(shard, rows)
    theirs = AutoModelForCausalLM.from_pretrained(llama).eval()
    theirs.model.embed_tokens.padding_idx = None
    wanted = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    batch = learner.collate(shard, rows)
    found = learner.task.loss(learner.model.eval()(batch), shard.targets_of(rows))
    assert float(found) == pytest.approx(float(wanted), abs=1e-5)
    wanted.backward()
    found.backward()
    for name, p in theirs.named_parameters():
        own = learner.model.backbone.model.get_parameter(name)
        torch.testing.assert_close(own.grad, p.grad, atol=1e-5, rtol=1e-4)


def test_metrics_are_those_counted_token_by_token_by_hand(llama: Path) -> None:
    learner = learner_of(llama, {"method": "full"})
    shard = shard_of(learner, CHATS)
    theirs = AutoModelForCausalLM.from_pretrained(llama).eval()
    surprise, hits, tokens = 0.0, 0, 0
    for row in range(len(CHATS)):
        ids = shard.inputs[row]["input_ids"]
        scores = functional.log_softmax(theirs(ids[None]).logits[0].double(), 1)
        for place in shard.inputs[row]["places"].tolist():
            surprise -= float(scores[place, ids[place + 1]])
            hits += int(scores[place].argmax() == ids[place + 1])
            tokens += 1
    size = len("hello" + "né\U0001f33b" + "he ll he ll" + "b" + "he" + "he said so") + 4  # é and the flower
    values = learner.compute(learner.evaluate(learner.initial(), shard))
    assert values == pytest.approx(
        {
            "loss": surprise / tokens,
            "perplexity": math.exp(surprise / tokens),
            "byte_perplexity": math.exp(surprise / size),
            "bits_per_byte": surprise / size / math.log(2),
            "token_accuracy": hits / tokens,
        },
        rel=1e-5,
    )


def test_the_padding_tokens_id_decides_nothing(llama: Path, tmp_path: Path) -> None:
    """The end of a turn is learnt though it has the padding's id, and without such an id all is the same."""
    none = shutil.copytree(llama, tmp_path / "none")
    config = json.loads((none / "config.json").read_text())
    (none / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    byte_tokenizer(pad=None).save_pretrained(none)
    found, moved = [], []
    for folder in (llama, none):
        learner = learner_of(folder, {"method": "full"})
        shard, start = shard_of(learner, CHATS), learner.initial()
        found.append(learner.compute(learner.evaluate(start, shard)))
        moved.append(train_model(learner, start, shard, learner.job, client="a", round=1, plan={}).delta)
        assert (shard.table[:, :-1] == 2).sum() == 7
    assert found[0] == found[1]
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[1])


def test_lora_learns_as_peft_and_a_plain_loop_do(llama: Path) -> None:
    learner = learner_of(llama, {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]})
    shard, start = shard_of(learner, CHATS), learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    network = AutoModelForCausalLM.from_pretrained(llama).eval()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs = get_peft_model(network, config)
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    names = {name: "base_model.model." + name.removeprefix("backbone.model.") for name in start}
    assert set(names.values()) == set(own)
    with torch.no_grad():
        for name, value in start.items():
            own[names[name]].copy_(value)
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for rows in batches(len(shard), learner.job, 1, "a", None):
        ids, mask, labels = labels_of(shard.select(rows), range(len(rows)))
        optimizer.zero_grad()
        theirs(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    for name, value in start.items():
        moved = own[names[name]].detach() - value
        assert float(moved.abs().max()) > 0
        torch.testing.assert_close(update.delta[name], moved, atol=1e-5, rtol=1e-4)


def test_the_parts_of_a_batch_count_by_their_tokens(llama: Path) -> None:
    train = {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "accumulate": 2}
    learner = learner_of(llama, {"method": "full"}, train=train)
    shard, rows = shard_of(learner, CHATS), [0, 1, 2, 3]

    def gradient(parts: list[tuple[Any, float]]) -> torch.Tensor:
        learner.model.zero_grad()
        for part, share in parts:
            outputs = learner.model(learner.collate(shard, part))
            (learner.task.loss(outputs, shard.targets_of(part)) * share).backward()
        return learner.model.backbone.model.model.norm.weight.grad.clone()

    parts = list(weighted_parts(learner, shard, rows, learner.job))
    assert len(parts) == 2 and parts[0][1] != parts[1][1]
    torch.testing.assert_close(gradient(parts), gradient([(rows, 1.0)]), atol=1e-7, rtol=1e-5)


# What is tuned


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("tune", "parts"),
    [
        ({"method": "head"}, {"lm_head.weight"}),
        ({"method": "last-k", "layers": 1}, {"model.layers.1"}),
        ({"method": "lora"}, {"model.layers.0", "model.layers.1"}),
        ({"method": "lora", "layers": 1}, {"model.layers.1"}),
        ({"method": "lora", "layers": 1, "head": "trained"}, {"model.layers.1", "lm_head.weight"}),
        ({"method": "lora", "layers": 1, "head": "lora"}, {"model.layers.1", "lm_head.lora_"}),
    ],
)
def test_only_what_is_tuned_travels(
    tmp_path: Path, tied: bool, tune: dict[str, Any], parts: set[str]
) -> None:
    learner = learner_of(small_llama(tmp_path / "m", tied=tied), tune)
    names = [name.removeprefix("backbone.model.") for name in learner.initial()]
    found = {part for name in names for part in parts if name.startswith(part)}
    assert found == parts
    assert all(name.startswith((*parts, "model.norm")) for name in names), names
    if tune["method"] == "lora":
        targets = {name.split(".")[-4] for name in names if name.startswith("model.")}
        assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not learner.model.backbone.model.get_input_embeddings().weight.requires_grad
    shard = shard_of(learner, CHATS)
    update = train_model(learner, learner.initial(), shard, learner.job, client="a", round=1, plan={})
    assert all(float(t.abs().max()) > 0 for name, t in update.delta.items() if "lora_A" not in name)


def test_a_head_is_tuned_apart_from_the_embeddings_that_it_was_tied_to(llama: Path) -> None:
    learner = learner_of(llama, {"method": "head"})
    shard, start = shard_of(learner, CHATS), learner.initial()
    table = learner.model.backbone.model.get_input_embeddings().weight
    before = copy.deepcopy(table.detach())
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert torch.equal(table, before)
    assert list(update.delta) == ["backbone.model.lm_head.weight"]
    assert float(update.delta["backbone.model.lm_head.weight"].abs().max()) > 0


def test_more_blocks_than_there_are_is_one_line(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.layers: this backbone has 3 blocks, found 4"):
        _ = learner_of(llama, {"method": "lora", "layers": 4}).model


# Templates, tokenizers, facts


def test_messages_need_a_template_and_the_job_may_give_one(tmp_path: Path) -> None:
    folder = small_llama(tmp_path / "m", tokenizer=byte_tokenizer(template=None))
    with pytest.raises(ConfigError, match=r"task\.options\.template: .*no chat template") as told:
        shard_of(learner_of(folder), CHATS)
    assert "\n" not in str(told.value)
    task = {"name": "language-modeling", "options": {"max_tokens": 128, "template": CHATML}}
    given = learner_of(folder, task=task)
    own = learner_of(small_llama(tmp_path / "own"))
    assert [i["input_ids"].tolist() for i in shard_of(given, CHATS).inputs] == [
        i["input_ids"].tolist() for i in shard_of(own, CHATS).inputs
    ]
    assert required_info(given)["template"] == required_info(own)["template"]
    assert "template" not in required_info(learner_of(folder))


def test_prompts_are_asked_by_the_template_or_joined_where_there_is_none(llama: Path) -> None:
    rows = [{"prompt": "hi", "completion": "he"}]
    asked = shard_of(learner_of(llama), rows).inputs[0]["input_ids"]
    chat = shard_of(learner_of(llama), [{"messages": talk("u:hi", "a:he")}]).inputs[0]["input_ids"]
    assert torch.equal(asked, chat)
    task = {"name": "language-modeling", "options": {"template": ""}}
    plain = shard_of(learner_of(llama, task=task), rows).inputs[0]["input_ids"]
    assert byte_tokenizer().decode(plain) == "hihe<|im_end|>"


def test_server_and_sites_must_agree_on_the_template_and_the_tokenizer(llama: Path) -> None:
    learner = learner_of(llama)
    facts = required_info(learner)
    assert facts.keys() == {"backbone", "template", "tokenizer"}
    for name in ("template", "tokenizer"):
        there = replace(learner, data_info=facts | {name: "0" * 64})
        with pytest.raises(
            ConfigError, match=rf"its {name} is not the run's \(here .*, there 000000000000\)"
        ):
            check_agreed(there)
    check_agreed(replace(learner, data_info=facts))


def test_tokens_kept_for_the_backbone_section_are_refused_by_name(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.max_tokens: .*task\.options\.max_tokens"):
        learner_of(llama, backbone={"name": str(llama), "max_tokens": 64})


def test_a_network_that_foretells_nothing_is_refused_by_name() -> None:
    learner = learner_of(Path("x"), backbone={"name": "atoll:small-t5", "weights": "random"})
    with pytest.raises(InputError, match=r"backbone\.name: atoll:small-t5 foretells no text"):
        _ = required_info(learner)


# Formats


def rows_at(path: Path, **columns: str) -> list[dict[str, Any]]:
    section = DataSection(source=str(path), columns=columns)
    return list(LANGUAGE_MODELING.read(path, section, {}).train)


def test_each_form_reads_the_same_from_each_kind_of_file(tmp_path: Path) -> None:
    chats, pairs = (
        [CHATS[0], CHATS[4]],
        [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}],
    )
    for name, rows in {"chats": chats, "pairs": pairs, "texts": [{"text": "a"}, {"text": "b c"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        SavedDataset.from_list(rows).save_to_disk(str(tmp_path / name))
        for path in (f"{name}.jsonl", f"{name}.parquet", name):
            assert rows_at(tmp_path / path) == rows
    (tmp_path / "pairs.csv").write_text("prompt,completion\na,b\nc,\n")
    assert rows_at(tmp_path / "pairs.csv") == pairs
    (tmp_path / "named.csv").write_text("ask,say\na,b\nc,\n")
    assert rows_at(tmp_path / "named.csv", prompt="ask", completion="say") == pairs


def test_of_several_forms_messages_are_read_unless_the_job_names_another(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "text": "t", "user": "x"} | CHATS[0]) + "\n")
    assert rows_at(path) == [{"messages": CHATS[0]["messages"], "user": "x"}]
    assert rows_at(path, text="text") == [{"text": "t", "user": "x"}]
    findings = CONVERSATIONS.inspect(path, DataSection(source=str(path)))
    assert any("column 'text' is not read: messages are" in note for note in findings.notes)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": []}, "line 1: no message of the assistant"),
        ({"messages": talk("u:hi")}, "line 1: no message of the assistant, but of 'user'; expected"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"message 1: \['from', 'value'\], expected role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "its content is NoneType, expected text"),
        ({"messages": [{"role": "", "content": "x"}]}, "message 1: role: empty"),
        ({"messages": "hello"}, "line 1: 'hello', expected a list of messages"),
        ({"prompt": "a"}, "expected messages, or prompt and completion, or text"),
        ({"prompt": "", "completion": "b"}, "empty, expected some text"),
        ({"prompt": talk("u:a"), "completion": talk("a:b")}, "expected text"),
        ({"text": " "}, "empty, expected some text"),
    ],
)
def test_a_bad_row_is_one_line_that_says_why(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=told) as error:
        rows_at(path)
    assert "\n" not in str(error.value)


def test_check_says_how_many_examples_are_cut(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS[:3]))
    backbone = resolve(BackboneSection(name=str(llama)), 0)
    first, second = LANGUAGE_MODELING.notes_on(
        path, DataSection(source=str(path)), {"max_tokens": 60}, backbone
    )
    examples = [of_chat(row["messages"], most=60) for row in CHATS[:3]]
    learnt = sum(sum(one.learnt) for one in examples)
    assert first == f"{sum(len(one.ids) for one in examples)} tokens, of which {learnt} are learnt"
    cut = sum(len(of_chat(row["messages"]).ids) > 60 for row in CHATS[:3])
    assert 0 < cut < 3 and second.startswith(
        f"{cut} of 3 examples are longer than task.options.max_tokens = 60"
    )


def test_check_says_which_roles_the_template_does_not_write(tmp_path: Path) -> None:
    knows = (
        "{% for m in messages %}{% if m.role != 'developer' %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    backbone = resolve(
        BackboneSection(name=str(small_llama(tmp_path / "m", tokenizer=byte_tokenizer(template=knows)))), 0
    )
    asked = [{"role": "user", "content": " hi"}, {"role": "assistant", "content": "he"}]
    rows = [asked, [{"role": "developer", "content": "be brief"}, *asked]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    *_, last = LANGUAGE_MODELING.notes_on(path, DataSection(source=str(path)), {}, backbone)
    assert last.startswith("1 of 2 conversations have messages") and "those of developer: " in last


# What it writes


def test_a_prompt_is_asked_by_the_template_and_answered_as_transformers_does(llama: Path) -> None:
    learner = learner_of(llama)
    asked = learner.task.parse_input("hello")
    network = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = byte_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(asked["input_ids"], ids[0])
    written = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    wanted = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    (found,) = learner.predictions(learner.initial(), [asked])
    assert found == wanted and TARGETS not in learner.encoder.preprocess_and_collate([asked])
    (line,) = learner.task.format_predictions([found], {})
    assert line == {"label": wanted}


def test_what_is_drawn_is_drawn_from_the_jobs_seed(llama: Path) -> None:
    options = {"max_tokens": 64, "max_new_tokens": 12, "temperature": 1.5}
    task = {"name": "language-modeling", "options": options}

    def written(seed: int) -> list[str]:
        learner = learner_of(llama, task=task, seed=seed)
        asked = [learner.task.parse_input(text) for text in ("hello", "he", "ll")]
        found: list[str] = learner.predictions(learner.initial(), asked)
        alone = learner.predictions(learner.initial(), asked[1:2])
        assert alone == found[1:2]
        return found

    assert written(1) == written(1) != written(2)
