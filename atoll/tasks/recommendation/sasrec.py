"""SASRec (Kang and McAuley 2018, "Self-Attentive Sequential Recommendation"), trained with a full softmax.

The softmax is over all items at every position. An item's vector is an embedding; if the job names a text
encoder and items have texts, a projection of the text's features is added, so that rare items profit from
items with similar texts. The same vectors are used for the history and for scoring the next item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.encoder import Batch, Encoder, Model
from atoll.backbones.extract import extract
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone, resolve
from atoll.backbones.text import load_text_encoder
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.job.section import Count, Decay, Section
from atoll.protocol.random_streams import global_stream
from atoll.tasks.recommendation.data import RecommendOptions

NETWORK = "sasrec"


class SasRecOptions(Section):
    """`backbone.options` of atoll:sasrec; `text` names an encoder for the items' texts."""

    width: Count = 64
    layers: Count = 2
    heads: Count = 2
    dropout: Decay = 0.2
    text: str | None = None


class Items(nn.Module):
    """The vectors of all items, [items + 1, width]; the last one stands for padding."""

    texts: torch.Tensor | None

    def __init__(self, count: int, width: int, texts: torch.Tensor | None) -> None:
        super().__init__()
        self.own = nn.Embedding(count + 1, width)
        nn.init.normal_(self.own.weight, std=0.02)
        self.register_buffer("texts", texts, persistent=False)
        self.of_text = None if texts is None else nn.Linear(texts.shape[1], width, bias=False)

    def forward(self) -> torch.Tensor:
        """All vectors, [items + 1, width]."""
        if self.of_text is None:
            return self.own.weight
        vectors: torch.Tensor = self.own.weight + self.of_text(self.texts)
        return vectors


class Block(nn.Module):
    """A transformer block: causal self-attention, then a feed-forward layer, both residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width)
        self.told = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self._heads = heads

    def forward(self, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """States [batch, length, width]; `seen` [batch, 1, length, length] is the attention mask."""
        batch, length, width = states.shape
        parts = self.asked(self.before(states)).reshape(batch, length, 3, self._heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        states = states + self.dropout(self.told(attended.transpose(1, 2).reshape(batch, length, width)))
        inner = nn.functional.gelu(self.inner(self.between(states)))
        changed: torch.Tensor = states + self.dropout(self.outer(inner))
        return changed


class SasRec(nn.Module):
    """Maps histories to a state at each position, [batch, length, width]."""

    def __init__(self, items: Items, length: int, known: SasRecOptions) -> None:
        super().__init__()
        self.items = items
        width = known.width
        self.places = nn.Embedding(length, width)
        nn.init.normal_(self.places.weight, std=0.02)
        self.layers = nn.ModuleList(Block(width, known.heads, known.dropout) for _ in range(known.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, history: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The states of `history` [batch, length], items' numbers padded in front with the highest number."""
        length, none = history.shape[1], len(vectors) - 1
        states = vectors[history] + self.places.weight[-length:]
        earlier = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        # Padding attends to itself, because a softmax over no positions would be NaN.
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        seen = earlier & ((history != none).unsqueeze(1) | itself)
        for layer in self.layers:
            states = layer(states, seen.unsqueeze(1))
        normed: torch.Tensor = self.norm(states)
        return normed


class HistoryEncoder(Encoder):
    """Encodes histories of items' names as rows of item numbers, padded in front."""

    def __init__(self, model: SasRec, length: int, items: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.width = model.norm.normalized_shape[0]
        self._length = length
        self._numbers = {item: number for number, item in enumerate(items)}

    def preprocess(self, inputs: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """The numbers of each history's last items; items that aren't in the run's list are left out."""
        known = [[self._numbers[item] for item in history if item in self._numbers] for history in inputs]
        return [torch.tensor(numbers[-self._length :], dtype=torch.int64) for numbers in known]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        table = torch.full((len(ready), self._length), len(self._numbers), dtype=torch.int64)
        for row, history in zip(table, ready, strict=True):
            row[self._length - len(history) :] = history
        return {"history": table}


class Recommender(Model):
    """Predicts scores of all items as the next item, after each position of a history."""

    def __init__(self, backbone: HistoryEncoder, head: nn.Module, *, repeats: bool) -> None:
        super().__init__(backbone, head)
        self._repeats = repeats

    def forward(self, batch: Batch) -> torch.Tensor:
        """Scores [batch, length, items]; those at the last position are for the item after the history."""
        network = self.backbone.model
        assert isinstance(network, SasRec)
        vectors = network.items()
        scores: torch.Tensor = network(batch["history"], vectors) @ vectors[:-1].T
        return scores

    def predict(self, batch: Batch) -> torch.Tensor:
        """Scores of the next item, [batch, items]; -inf for items of the history unless `repeats` is set."""
        scores = self.forward(batch)[:, -1]
        if self._repeats:
            return scores
        seen = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, batch["history"], value=True)
        return scores.masked_fill(seen[:, :-1], float("-inf"))


def load_recommender(
    backbone: Backbone, job: Job, options: RecommendOptions, items: Sequence[str], texts: Sequence[str]
) -> Recommender:
    """The network for these items, with its resolved weights.

    Raises:
        WeightsError, ConfigError: the backbone doesn't read histories, or its options or weights don't fit.
    """
    if (backbone.kind, backbone.name) != ("atoll", NETWORK):
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not read histories, expected atoll:{NETWORK}"
        )
    known = options_of(job.backbone.options, SasRecOptions, "backbone.options")
    if known.width % known.heads:
        raise ConfigError(
            f"backbone.options.heads: expected a divisor of width = {known.width}, found {known.heads}"
        )
    features = None
    if known.text is not None:
        features = _text_features(known.text, job, texts)
    with global_stream(job.seed, "init", "backbone"):
        network = SasRec(Items(len(items), known.width, features), options.length, known)
    if backbone.weights is not None:
        load_state_dict_strict(network, load_weights(backbone.weights), backbone.weights)
    return Recommender(HistoryEncoder(network, options.length, items), network.items, repeats=options.repeats)


def _text_features(name: str, job: Job, texts: Sequence[str]) -> torch.Tensor:
    """Frozen features of the items' texts, normalised to length 1, and a row of zeros for padding."""
    if not any(texts):
        raise ConfigError("backbone.options.text: the items have no texts, expected a column item_text")
    section = BackboneSection(name=name, offline=job.backbone.offline, max_tokens=32)
    encoder = load_text_encoder(resolve(section, job.seed), section, job.seed)
    # An empty text has no tokens, so it is replaced by a dot.
    features = extract(encoder, [text or "." for text in texts], threads=job.train.threads, device="cpu")
    return torch.cat([nn.functional.normalize(features, dim=1), torch.zeros(1, features.shape[1])])
