"""A transformer over a user's items, after SASRec (Kang and McAuley 2018, "Self-Attentive Sequential
Recommendation"), trained by the full softmax over items at every place.

An item's vector is its own, and, where items have texts and the job names a text encoder, also a
projection of the text's features, so that items that few clients know share what is known of others.
The same vectors read the history and rank what comes next.
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
    """Vectors of items, [items + 1, width]; the last is of no item."""

    texts: torch.Tensor | None

    def __init__(self, count: int, width: int, texts: torch.Tensor | None) -> None:
        super().__init__()
        self.own = nn.Embedding(count + 1, width)
        nn.init.normal_(self.own.weight, std=0.02)
        self.register_buffer("texts", texts, persistent=False)
        self.of_text = None if texts is None else nn.Linear(texts.shape[1], width, bias=False)

    def forward(self) -> torch.Tensor:
        """All items' vectors."""
        if self.of_text is None:
            return self.own.weight
        vectors: torch.Tensor = self.own.weight + self.of_text(self.texts)
        return vectors


class Block(nn.Module):
    """Attention to what came before, then two linear layers, each beside a way around."""

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
        """`states` [batch, length, width]; `seen` [batch, 1, length, length] says who looks at whom."""
        batch, length, width = states.shape
        parts = self.asked(self.before(states)).reshape(batch, length, 3, self._heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        states = states + self.dropout(self.told(attended.transpose(1, 2).reshape(batch, length, width)))
        inner = nn.functional.gelu(self.inner(self.between(states)))
        changed: torch.Tensor = states + self.dropout(self.outer(inner))
        return changed


class SasRec(nn.Module):
    """Histories to a state at each place, [batch, length, width]."""

    def __init__(self, items: Items, length: int, known: SasRecOptions) -> None:
        super().__init__()
        self.items = items
        width = known.width
        self.places = nn.Embedding(length, width)
        nn.init.normal_(self.places.weight, std=0.02)
        self.layers = nn.ModuleList(Block(width, known.heads, known.dropout) for _ in range(known.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, history: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """`history` [batch, length] holds items' numbers, no items (the highest number) in front."""
        length, none = history.shape[1], len(vectors) - 1
        states = vectors[history] + self.places.weight[-length:]
        earlier = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        # A place without an item sees itself alone: attention to nothing would not be a number.
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        seen = earlier & ((history != none).unsqueeze(1) | itself)
        for layer in self.layers:
            states = layer(states, seen.unsqueeze(1))
        normed: torch.Tensor = self.norm(states)
        return normed


class HistoryEncoder(Encoder):
    """Histories of items' names as rows of their numbers, padded in front."""

    def __init__(self, model: SasRec, length: int, items: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.width = model.norm.normalized_shape[0]
        self._length = length
        self._numbers = {item: number for number, item in enumerate(items)}

    def preprocess(self, inputs: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Items that nobody knew when the run began are left out."""
        known = [[self._numbers[item] for item in history if item in self._numbers] for history in inputs]
        return [torch.tensor(numbers[-self._length :], dtype=torch.int64) for numbers in known]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        table = torch.full((len(ready), self._length), len(self._numbers), dtype=torch.int64)
        for row, history in zip(table, ready, strict=True):
            row[self._length - len(history) :] = history
        return {"history": table}


class Recommender(Model):
    """Scores of all items after each place of a history."""

    def __init__(self, backbone: HistoryEncoder, head: nn.Module, *, repeats: bool) -> None:
        super().__init__(backbone, head)
        self._repeats = repeats

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch, length, items]; the last place says what comes next."""
        network = self.backbone.model
        assert isinstance(network, SasRec)
        vectors = network.items()
        scores: torch.Tensor = network(batch["history"], vectors) @ vectors[:-1].T
        return scores

    def predict(self, batch: Batch) -> torch.Tensor:
        """Scores of what comes next, [batch, items]; items that are in the history are not proposed again."""
        scores = self.forward(batch)[:, -1]
        if self._repeats:
            return scores
        seen = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, batch["history"], value=True)
        return scores.masked_fill(seen[:, :-1], float("-inf"))


def load_recommender(
    backbone: Backbone, job: Job, options: RecommendOptions, items: Sequence[str], texts: Sequence[str]
) -> Recommender:
    """Build the network over these items, with its resolved weights.

    Raises:
        WeightsError, ConfigError: the backbone isn't one for histories, or its weights don't fit.
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
    """Frozen features of the items' texts, of length 1; zeros for no item."""
    if not any(texts):
        raise ConfigError("backbone.options.text: the items have no texts, expected a column item_text")
    section = BackboneSection(name=name, offline=job.backbone.offline, max_tokens=32)
    encoder = load_text_encoder(resolve(section, job.seed), section, job.seed)
    # An empty text has no words to look at: a dot stands for it.
    features = extract(encoder, [text or "." for text in texts], threads=job.train.threads, device="cpu")
    return torch.cat([nn.functional.normalize(features, dim=1), torch.zeros(1, features.shape[1])])
