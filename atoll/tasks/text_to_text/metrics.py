"""Metrics that compare written texts with references; all values are from 0 to 1.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016); torchmetrics' version isn't used because it sums
in float32 and returns percentages. BLEU is torchmetrics', over all texts together.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore

from atoll.tasks.mean_metric import Mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")
CHARACTERS = 6
"""The longest n-grams of chrF."""

RECALL_WEIGHT = 2**2
"""beta^2 in chrF's F-score, with beta = 2."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """`answer` in lower case, without punctuation, articles and repeated spaces (SQuAD's normalisation).

    >>> normalised("The  Eiffel Tower!")
    'eiffel tower'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of prediction and reference; if one has no words, 1 if neither has any, else 0.

    >>> token_f1("the red house", "house")  # precision 1/2, recall 1
    0.6666666666666666
    """
    predicted, wanted = normalised(prediction).split(), normalised(reference).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    return 2 * (Counter(predicted) & Counter(wanted)).total() / (len(predicted) + len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), in lower case without stemming.

    Words are runs of letters and digits. If one text has no words, 1 if neither has any, else 0.

    >>> rouge_l("the cat sat", "the black cat sat down")  # 3 words of 3, and of 5
    0.75
    """
    predicted, wanted = _WORD.findall(prediction.lower()), _WORD.findall(reference.lower())
    if not predicted or not wanted:
        return float(predicted == wanted)
    return 2 * _longest_common(predicted, wanted) / (len(predicted) + len(wanted))


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, by rows of the table of Wagner and Fischer (1974)."""
    row = [0] * (len(other) + 1)
    for word in one:
        above_left = 0
        for place, theirs in enumerate(other, start=1):
            above = row[place]
            row[place] = above_left + 1 if word == theirs else max(above, row[place - 1])
            above_left = above
    return row[-1]


class _MeanScore(Mean):
    """The mean over answers of a score of a single answer."""

    higher_is_better = True

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add the score of each prediction against its single reference."""
        self.score += sum(self._score(p, r) for p, r in zip(predictions, references, strict=True))
        self.total += len(predictions)

    def _score(self, prediction: str, reference: str) -> float:
        raise NotImplementedError


class ExactMatch(_MeanScore):
    """The share of answers that equal their reference after both are normalised."""

    def _score(self, prediction: str, reference: str) -> float:
        return float(normalised(prediction) == normalised(reference))


class TokenF1(_MeanScore):
    """The mean token F1 over answers."""

    def _score(self, prediction: str, reference: str) -> float:
        return token_f1(prediction, reference)


class RougeL(_MeanScore):
    """The mean ROUGE-L over texts."""

    def _score(self, prediction: str, reference: str) -> float:
        return rouge_l(prediction, reference)


class Bleu(SacreBLEUScore):
    """Corpus BLEU with mteval-v13a's tokenization, without smoothing (Post 2018).

    Undefined (NaN) if the references have no word.
    """

    def update(  # type: ignore[override]
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> None:
        """Count the n-grams of each prediction and its single reference."""
        super().update(list(predictions), [[one] for one in references])

    def compute(self) -> torch.Tensor:
        return torch.full((), torch.nan) if self.target_len == 0 else super().compute()


class ChrF(Metric):
    """Corpus chrF2: n-grams of up to 6 characters, with recall weighted twice (Popović 2015).

    As sacrebleu's default: spaces are ignored; precision and recall are means over the lengths for which
    predictions and references both have n-grams. Undefined (NaN) if the references have no character.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, CHARACTERS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Count the n-grams of each prediction, of its single reference, and the common ones."""
        for pair in zip(predictions, references, strict=True):
            for length in range(1, CHARACTERS + 1):
                ours, theirs = (_ngrams("".join(text.split()), length) for text in pair)
                count = ours.total() if theirs else 0  # as sacrebleu, for references that are too short
                counts = torch.tensor([count, theirs.total(), (ours & theirs).total()])
                self.counts[:, length - 1] += counts.to(self.counts)

    def compute(self) -> torch.Tensor:
        ours, theirs, both = self.counts.to(torch.float64)
        if not theirs[0]:
            return torch.full((), torch.nan)
        real = (ours > 0) & (theirs > 0)
        if not both.any():
            return torch.zeros((), dtype=torch.float64)
        precision, recall = (both[real] / ours[real]).mean(), (both[real] / theirs[real]).mean()
        score: torch.Tensor = (1 + RECALL_WEIGHT) * precision * recall / (RECALL_WEIGHT * precision + recall)
        return score


def _ngrams(text: str, length: int) -> Counter[str]:
    return Counter(text[start : start + length] for start in range(len(text) - length + 1))


MEASURES: dict[str, Callable[[], Metric]] = {
    "exact_match": ExactMatch,
    "token_f1": TokenF1,
    "rouge_l": RougeL,
    "bleu": Bleu,
}
"""The metrics that a job can select, besides chrF."""
