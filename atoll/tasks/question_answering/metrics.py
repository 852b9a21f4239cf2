"""Answers against reference answers, as SQuAD scores them (Rajpurkar et al. 2016).

torchmetrics' SQuAD adds up in float32 and returns percentages; these are shares, added up in float64.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from atoll.tasks.mean_metric import Mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """`answer` in lower case, without punctuation, articles, or more than one space.

    >>> normalised("The  Eiffel Tower!")
    'eiffel tower'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have; without words on one side, whether the other has none either.

    >>> token_f1("the red house", "house")  # precision 1/2, recall 1
    0.6666666666666666
    """
    found, wanted = normalised(prediction).split(), normalised(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


class _MeanScore(Mean):
    """The mean over answers of a score that looks at one answer."""

    higher_is_better = True

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Count each prediction with the one reference that belongs to it."""
        self.score += sum(self._score(p, r) for p, r in zip(predictions, references, strict=True))
        self.total += len(predictions)

    def _score(self, prediction: str, reference: str) -> float:
        raise NotImplementedError


class ExactMatch(_MeanScore):
    """The share of answers that equal their reference, once both are normalised."""

    def _score(self, prediction: str, reference: str) -> float:
        return float(normalised(prediction) == normalised(reference))


class TokenF1(_MeanScore):
    """The mean over answers of the F1 of their words."""

    def _score(self, prediction: str, reference: str) -> float:
        return token_f1(prediction, reference)
