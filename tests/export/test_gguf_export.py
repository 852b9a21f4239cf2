"""Language models as GGUF: transformers' own reader has the run's logits and the tokenizer's ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from atoll.backbones.converted.gguf_folder import write_folder
from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.export.gguf import check_gguf, read_gguf, write_gguf
from atoll.export.gguf_vocabulary import LLAMA3, check_vocabulary
from atoll.export.safetensors import make_plain
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.language_modeling.task import LANGUAGE_MODELING
from atoll.trained import trained
from tests.support.models import CHATML, byte_tokenizer, causal_job, moved, small_llama

TEXTS = (
    "hello the hell", "  né \U0001f33b\n\n he", "12 345 6789, it's ThE", "<|im_start|>user\nhe<|im_end|>", "",
)  # fmt: skip
GIVEN = torch.tensor([[4, 60, 7, 33, 99, 100, 12, 258, 9]])


def tokenizer_that(splits: Any, *, begins: bool = False, whole_words: bool = False) -> Any:
    """Pairs of bytes behind a way of splitting, with a token for every purpose."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("\u0120", "he"), ("\u010a", "\u010a"), ("1", "2")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*special, *letters, *(one + other for one, other in merges)]
    pieces = Tokenizer(
        models.BPE({token: n for n, token in enumerate(known)}, merges, ignore_merges=whole_words)
    )
    pieces.pre_tokenizer = pre_tokenizers.Sequence(splits)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens(special)
    if begins:
        pieces.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
        )
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=pieces, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip


LLAMA3_SPLITS = [
    pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
SMOLLM_SPLITS = [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
]


def learner_of(folder: Path, tune: dict[str, Any] | None = None) -> Learner:
    job = causal_job("language-modeling", "chats", folder, tune or {"method": "full"}, {"max_tokens": 64})
    return Learner.of(job, LANGUAGE_MODELING, {})


def logits_of(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = network.eval()(GIVEN).logits
    return found


def as_transformers_reads(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tune", [{"method": "full"}, {"method": "lora", "rank": 2}, {"method": "head"}])
def test_transformers_reads_the_same_logits_and_the_same_ids(
    tmp_path: Path, tied: bool, tune: dict[str, Any]
) -> None:
    learner = learner_of(small_llama(tmp_path / "llama", tied=tied), tune)
    model = learner.filled(moved(learner))
    make_plain(model)
    expected = logits_of(model.backbone.model)
    (tmp_path / "out").mkdir()
    write_gguf(model, learner, tmp_path / "out")
    found = as_transformers_reads(tmp_path / "out")
    assert torch.allclose(logits_of(found), expected, atol=1e-5)
    assert found.config.tie_word_embeddings == (tied and tune["method"] != "head")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ours = byte_tokenizer()
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]
    assert tokenizer.chat_template == ours.chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
    for parameter in model.backbone.model.parameters():
        parameter.data.zero_()
    read_gguf(model, tmp_path / "out")
    assert torch.equal(logits_of(model.backbone.model), expected)


def test_what_is_bfloat16_already_is_written_so_and_nothing_else(tmp_path: Path) -> None:
    learner = learner_of(small_llama(tmp_path / "llama"))
    model = learner.filled({n: t.to(torch.bfloat16).float() for n, t in moved(learner).items()})
    sizes = []
    for name in ("exact", "not exact"):
        (tmp_path / name).mkdir()
        write_gguf(model, learner, tmp_path / name)
        kinds = {
            (len(t.shape) > 1, t.tensor_type) for t in GGUFReader(tmp_path / name / "model.gguf").tensors
        }
        matrices = Kind.BF16 if name == "exact" else Kind.F32
        assert kinds == {(True, matrices), (False, Kind.F32)}
        found, expected = logits_of(as_transformers_reads(tmp_path / name)), logits_of(model.backbone.model)
        assert torch.allclose(found, expected, atol=1e-5)
        sizes.append((tmp_path / name / "model.gguf").stat().st_size)
        model.backbone.model.model.norm.weight.data[0] = 1 / 3  # one number is enough
    assert sizes[0] < sizes[1]


def test_llama_3s_way_of_splitting_and_what_begins_a_text_are_kept(tmp_path: Path) -> None:
    ours = tokenizer_that(LLAMA3_SPLITS, begins=True, whole_words=True)
    learner = learner_of(small_llama(tmp_path / "llama", tokenizer=ours))
    write_gguf(learner.model, learner, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert ours("he")["input_ids"][0] == 1
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]


def test_smollms_way_of_splitting_is_said_and_read_back_here(tmp_path: Path) -> None:
    ours = tokenizer_that(SMOLLM_SPLITS)
    learner = learner_of(small_llama(tmp_path / "llama", tokenizer=ours))
    write_gguf(learner.model, learner, tmp_path)
    (tmp_path / "folder").mkdir()
    write_folder(tmp_path / "model.gguf", tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits_of(network), logits_of(learner.model.backbone.model))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (tokenizer_that([pre_tokenizers.Whitespace()]), "splits texts in a way of its own"),
        (tokenizer_that(LLAMA3_SPLITS), "merges in another way"),
        (tokenizer_that(SMOLLM_SPLITS, whole_words=True), "merges in another way"),
    ],
)
def test_a_tokenizer_without_a_name_is_refused(tokenizer: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        check_vocabulary(tokenizer)
    assert "\n" not in str(error.value)


def test_networks_that_gguf_has_no_words_for_are_refused_by_name(tmp_path: Path) -> None:
    from tests.tasks.text.test_multiple_choice import small_gpt2

    with pytest.raises(ConfigError, match=r"is of the architecture 'gpt2', expected llama; try huggingface"):
        check_gguf(learner_of(small_gpt2(tmp_path / "gpt2")))
    folder = small_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match=r"hidden_act = 'gelu', expected 'silu'"):
        check_gguf(learner_of(folder))


@pytest.mark.slow
def test_a_run_is_exported_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"the {word} is {n} long"} for n, word in enumerate(["hall", "hill", "well", "sea"] * 8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = causal_job(
        "language-modeling", str(tmp_path / "texts.jsonl"), small_llama(tmp_path / "llama"),
        {"method": "lora", "rank": 2}, {"max_tokens": 64, "samples": 0},
    )  # fmt: skip
    job = job.model_copy(update={"data": job.data.model_copy(update={"test_fraction": 0.2})})
    simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    assert command_line(["export", str(tmp_path / "run"), "--format", "gguf"]) == 0
    out = tmp_path / "run" / "exports" / "gguf"
    told = json.loads((out / "export.json").read_text())
    assert told["before"]["metrics"] == pytest.approx(told["after"]["metrics"], rel=1e-5)
    assert told["after"]["megabytes"] == pytest.approx((out / "model.gguf").stat().st_size / 1e6)
    card = (out / "README.md").read_text("utf-8")
    _, fields, text = card.split("---\n", 2)
    assert yaml.safe_load(fields) == {
        "base_model": "llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "language-modeling", "lora"],
    }
    facts = told["facts"]
    for part in (
        "2 clients, 1 round of fedavg", "this run made no privacy claim", f"template `{facts['template']}`",
        f"tokenizer `{facts['tokenizer']}`", "`messages`, `prompt`, `completion`, `text`",
        f"| byte_perplexity | {told['after']['metrics']['byte_perplexity']:.4f} |",
    ):  # fmt: skip
        assert part in text, part
    assert str(tmp_path) not in card
    learner, tensors = trained(tmp_path / "run")
    expected = logits_of(learner.filled(tensors).backbone.model)
    assert torch.allclose(logits_of(as_transformers_reads(out)), expected, atol=1e-5)
    assert re.search(r"gguf +│", capsys.readouterr().out)
