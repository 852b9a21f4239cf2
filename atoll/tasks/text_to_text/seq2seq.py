"""Networks that write an answer: any of transformers' sequence to sequence models (T5, BART, …).

`atoll:small-t5` is a small T5 without weights (Raffel et al. 2020) over a built-in tokenizer, for tests,
demos and generated questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from atoll.backbones.checkpoint import load_transformer
from atoll.backbones.encoder import TARGETS, Batch, Encoder, Model
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.backbones.small_tokenizer import END, PAD, own_tokenizer, vocabulary
from atoll.backbones.text import load_tokenizer, longest, padded
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.job.section import Count, Decay, Section

SMALL_T5 = "small-t5"
KIND = "AutoModelForSeq2SeqLM"
# At transformers' own scale (1.0) a narrow T5 hardly learns to copy.
_INITIAL_SCALE = 0.3


class SmallT5Options(Section):
    """`backbone.options` of atoll:small-t5; a feed-forward layer is twice as wide."""

    width: Count = 64
    layers: Count = 2
    heads: Count = 4
    dropout: Decay = 0.0


class PromptEncoder(Encoder):
    """Prompts as tokens, and the network that reads them; what is too long is cut at the end."""

    def __init__(self, model: nn.Module, tokenizer: Any, section: BackboneSection) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.config.d_model)  # type: ignore[union-attr, arg-type]
        self.tokenizer: Any = tokenizer
        self._max_tokens = min(section.max_tokens, longest(tokenizer, model))

    def preprocess(self, inputs: Sequence[str]) -> list[torch.Tensor]:
        self.tokenizer.truncation_side = "right"
        coded = self.tokenizer(list(inputs), truncation=True, max_length=self._max_tokens, padding=False)
        return [torch.tensor(ids, dtype=torch.int64) for ids in coded["input_ids"]]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        return padded(ready, self.tokenizer.pad_token_id)


class Answerer(Model):
    """Scores of each token of an answer, given those before it."""

    def __init__(
        self, backbone: PromptEncoder, head: nn.Module, most: int, *, is_pretrained: bool = False
    ) -> None:
        names = (name for name, _ in head.named_parameters())
        super().__init__(backbone, head, frozenset(names if is_pretrained else ()))
        self._most = most

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch, tokens, vocabulary]; the batch holds the answers, whose tokens come first."""
        network: Any = self.backbone.model
        config = network.config
        answer = batch[TARGETS][:, : self._most]
        tokens = torch.where(answer < 0, config.pad_token_id, answer).clamp_max(config.vocab_size - 1)
        before = torch.cat(
            [torch.full_like(tokens[:, :1], config.decoder_start_token_id), tokens[:, :-1]], dim=1
        )
        scores: torch.Tensor = network(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=before,
            use_cache=False,
        ).logits
        return scores

    def predict(self, batch: Batch) -> list[str]:
        """The answers that greedy decoding writes."""
        from transformers import GenerationConfig

        network: Any = self.backbone.model
        config = network.config
        assert isinstance(self.backbone, PromptEncoder)
        how = GenerationConfig(
            max_new_tokens=self._most,
            num_beams=1,
            do_sample=False,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        written = network.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=how
        )
        answers: list[str] = self.backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
        return answers


def answer_tokenizer(backbone: Backbone) -> Any:
    """The tokenizer that belongs to a network.

    Raises:
        WeightsError: the network doesn't write texts, or its folder has no tokenizer that can pad.
    """
    if (backbone.kind, backbone.name) == ("atoll", SMALL_T5):
        return own_tokenizer()
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(
            f"backbone.name: {backbone.kind}:{backbone.name} does not write texts, expected atoll:{SMALL_T5},"
            " hf:NAME or a folder of a sequence to sequence model such as T5"
        )
    tokenizer = load_tokenizer(backbone.folder)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise WeightsError(f"{backbone.folder}: its tokenizer has no pad or no end token, expected both")
    return tokenizer


def load_answerer(backbone: Backbone, job: Job, tokenizer: Any, most: int) -> Answerer:
    """Build the network with its resolved weights; its head is its output layer.

    Raises:
        WeightsError: it isn't a sequence to sequence model, or its weights don't fit.
    """
    config = _small_t5(job) if backbone.kind == "atoll" else None
    network = load_transformer(backbone, job.seed, KIND, config=config)
    if network.config.decoder_start_token_id is None or network.config.pad_token_id is None:
        raise WeightsError(f"{backbone.folder}/config.json: no decoder_start_token_id or no pad_token_id")
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise WeightsError(f"{backbone.folder}: a network without an output layer, expected a linear one")
    if job.tune.method not in ("full", "seeds"):
        # While it is tied to the embeddings, to tune the one would change the other.
        head.weight = nn.Parameter(head.weight.detach().clone())
    encoder = PromptEncoder(network, tokenizer, job.backbone)
    return Answerer(encoder, head, most, is_pretrained=backbone.weights is not None)


def _small_t5(job: Job) -> Any:
    from transformers import T5Config

    known = options_of(job.backbone.options, SmallT5Options, "backbone.options")
    if known.width % known.heads:
        raise ConfigError(
            f"backbone.options.heads: expected a divisor of width = {known.width}, found {known.heads}"
        )
    small: dict[str, Any] = {
        "vocab_size": len(vocabulary()),
        "d_model": known.width,
        "d_kv": known.width // known.heads,
        "d_ff": 2 * known.width,
        "num_layers": known.layers,
        "num_heads": known.heads,
        "dropout_rate": known.dropout,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": _INITIAL_SCALE,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": PAD,
    }
    return T5Config(**small)
