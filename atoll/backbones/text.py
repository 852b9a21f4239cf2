"""Any transformers text encoder as features: the last hidden states, pooled over the tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.backbones.augmentation import hidden_tokens
from atoll.backbones.brought.augmentations import augmented_text
from atoll.backbones.brought.names import TEXT_AUGMENTATIONS
from atoll.backbones.checkpoint import first_line, load_transformer
from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Variation
from atoll.backbones.resolve import Backbone
from atoll.errors import WeightsError
from atoll.job.job import BackboneSection

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Token counts that inputs are padded to when features are computed."""


RARE = "\U0002a6d6"
"""A character that vocabularies lack: the last of the Chinese ones in Unicode's extension B of 2001."""

logger = logging.getLogger(__name__)


class TextEncoder(Encoder):
    """Texts to pooled features [batch, width]."""

    reads_tokens = True

    def __init__(self, model: nn.Module, tokenizer: Any, section: BackboneSection) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._tokenizer = tokenizer
        self._max_tokens = min(section.max_tokens, longest(tokenizer, model))
        self._pool = section.pool

    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean of the tokens' states (or the first one), [batch, width]."""
        states: torch.Tensor = self.model(**batch).last_hidden_state
        if self._pool == "first":
            return states[:, 0]
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def preprocess(self, inputs: Sequence[str]) -> list[torch.Tensor]:
        return [torch.tensor(ids, dtype=torch.int64) for ids in self._token_ids(inputs, None)]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        return self._padded(ready, None)

    def preprocess_and_collate(self, inputs: Sequence[str], variation: Variation | None = None) -> Batch:
        return self._padded(self._token_ids(inputs, variation), None)

    def fixed_batches(
        self, inputs: Sequence[str], size: int, variation: Variation | None = None
    ) -> Iterator[FixedBatch]:
        """The longest first, so that no worker is left with a long batch when the others have done."""
        ids = self._token_ids(inputs, variation)
        lengths = [_bucket(len(i), self._max_tokens) for i in ids]
        for length in sorted(set(lengths), reverse=True):
            members = [row for row, bucket in enumerate(lengths) if bucket == length]
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                filled = rows + [rows[-1]] * (size - len(rows))
                yield rows, partial(self._padded, [ids[r] for r in filled], length)

    def _token_ids(self, inputs: Sequence[str], variation: Variation | None) -> list[list[int]]:
        draws = [] if variation is None else [variation.stream(place) for place in range(len(inputs))]
        if variation is not None:
            pairs = zip(inputs, draws, strict=True)
            inputs = [augmented_text(text, variation.brought, draw) for text, draw in pairs]
        coded = self._tokenizer(
            list(inputs),
            truncation=True,
            max_length=self._max_tokens,
            padding=False,
            return_special_tokens_mask=variation is not None,
        )
        ids: list[list[int]] = coded["input_ids"]
        if variation is None or not set(TEXT_AUGMENTATIONS) & set(variation.names):
            return ids
        mask, special = self._tokenizer.mask_token_id, coded["special_tokens_mask"]
        return [hidden_tokens(i, s, mask, d) for i, s, d in zip(ids, special, draws, strict=True)]

    def _padded(self, ids: Sequence[Sequence[int] | torch.Tensor], length: int | None) -> Batch:
        return padded(ids, self._tokenizer.pad_token_id or 0, length)


def padded(ids: Sequence[Sequence[int] | torch.Tensor], pad: int, length: int | None = None) -> Batch:
    """Rows of token ids as one table of that length (or the longest row's), and which of them are real."""
    length = length or max(len(i) for i in ids)
    tokens = torch.full((len(ids), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(ids), length), dtype=torch.int64)
    for row, tokens_of_row in enumerate(ids):
        tokens[row, : len(tokens_of_row)] = torch.as_tensor(tokens_of_row, dtype=torch.int64)
        mask[row, : len(tokens_of_row)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def load_text_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
    """Build the network in eval mode with the resolved weights.

    Raises:
        WeightsError: it isn't a transformers encoder, or its files are damaged.
    """
    if backbone.kind == "plugin":
        from atoll.backbones.brought.encoders import brought_text_encoder  # which not every job needs

        return brought_text_encoder(backbone, section, seed)
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(f"backbone.name: {section.name} does not read text, expected hf:NAME or a folder")
    tokenizer = load_tokenizer(backbone.folder)
    network = load_transformer(backbone, seed)
    network = getattr(network, "encoder", network) if network.config.is_encoder_decoder else network
    return TextEncoder(without_pooler(network), tokenizer, section)


def without_pooler(network: Any) -> Any:
    """The network without the layer behind its states that only its own pretraining takes.

    What nobody takes must not count as its last block, or travel.
    """
    if isinstance(getattr(network, "pooler", None), nn.Module):
        network.pooler = nn.Identity()
    return network


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a network's folder.

    Raises:
        WeightsError: there is none.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise WeightsError(
            f"{folder}: no tokenizer that transformers can load: {first_line(error)}"
        ) from None
    # transformers makes one without a word where none of the files is there; those of bytes need none.
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in files):
        raise WeightsError(
            f"{folder}: no tokenizer's file, without which every word is unknown; expected one of"
            f" {', '.join(sorted(files))}, which save_pretrained of the tokenizer writes"
        )
    _check_unknown(tokenizer, folder)
    return tokenizer


def _check_unknown(tokenizer: Any, folder: Path) -> None:
    """See whether the tokenizer has a token for what its vocabulary lacks; one of bytes lacks nothing.

    Raises:
        WeightsError: it has none, and would stop at the first such word.
    """
    try:
        tokens = tokenizer(RARE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        raise WeightsError(
            f"{folder}: its tokenizer has no token for a word that it doesn't know ({first_line(error)});"
            " expected an unk_token that is in its vocabulary"
        ) from None
    if not tokens:
        logger.warning(
            "%s: its tokenizer drops what it doesn't know, such as %r, and has no token for it", folder, RARE
        )


def _bucket(length: int, longest: int) -> int:
    return next((b for b in LENGTHS if b >= length and b <= longest), longest)


def longest(tokenizer: Any, model: Any) -> int:
    """The most tokens that a network and its tokenizer take."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # these count positions from pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length))
