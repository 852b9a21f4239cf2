"""Every metric equals what something else computes, and its states add up over clients."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, mean_pinball_loss, ndcg_score, roc_auc_score, roc_curve
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex
from torchmetrics.functional.text import squad
from torchmetrics.text import CharErrorRate, WordErrorRate

from atoll.tasks.detection.metrics import BoxAveragePrecision
from atoll.tasks.forecasting.metrics import (
    DirectionAccuracy,
    MeanAbsoluteError,
    MeanAbsoluteScaledError,
    PinballLoss,
    RootMeanSquaredError,
)
from atoll.tasks.intent.metrics import IntentAccuracy
from atoll.tasks.medical.metrics import (
    BinnedAuroc,
    BinnedCalibrationError,
    BinnedMacroAuroc,
    SensitivityAtSpecificity,
)
from atoll.tasks.metric_values import direction_fault, lower_is_better
from atoll.tasks.recommendation.metrics import HitRate, Ndcg
from atoll.tasks.segmentation.metrics import MeanIoU
from atoll.tasks.text_to_text.metrics import ExactMatch, TokenF1, normalised
from atoll.tasks.token_classification.metrics import EntityF1
from tests.tasks.adding import split, value_of

RNG = np.random.default_rng(11)
WORDS = ("the", "a", "red", "Red", "house.", "of", "two", "cats", "an", "U.S.", "5", "")
QUANTILES = (0.1, 0.5, 0.9)
TAGS = ("O", "B-city", "I-city", "B-day", "I-day")


def sentences(count: int) -> list[str]:
    return [" ".join(RNG.choice(WORDS, RNG.integers(0, 6))) for _ in range(count)]


def judged(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that tell something of their targets, but not all."""
    targets = RNG.integers(0, 2, count)
    return torch.tensor(1 / (1 + np.exp(-RNG.normal(2 * targets - 1)))), torch.tensor(targets)


def of_classes(count: int = 300, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(RNG.dirichlet(np.ones(classes), count)), torch.tensor(RNG.integers(0, classes, count))


def forecast(count: int = 60, horizon: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    targets = RNG.normal(10, 3, (count, horizon + 2))
    targets[:, -1] = RNG.uniform(0.5, 2, count)
    # Some series don't move at all, and some steps end where they began.
    targets[::9, -1] = 0
    targets[::4, 2] = targets[::4, -2]
    return torch.tensor(np.sort(RNG.normal(10, 3, (count, horizon, 3)))), torch.tensor(targets)


def tagged(count: int = 80, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    targets = RNG.integers(0, len(TAGS), (count, length))
    guesses = np.where(
        RNG.random((count, length)) < 0.7, targets, RNG.integers(0, len(TAGS), (count, length))
    )
    targets[RNG.random((count, length)) < 0.2] = -100
    return torch.tensor(guesses), torch.tensor(targets)


ANSWERS = (sentences(200), sentences(200))
REFERENCES = [f"say {text}" for text in sentences(100)]
MASKS = (torch.tensor(RNG.integers(0, 3, (40, 8, 8))), torch.tensor(RNG.integers(0, 3, (40, 8, 8))))

ALL: dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]] = {
    "calibration": (BinnedCalibrationError, judged()),
    "calibration of classes": (BinnedCalibrationError, of_classes()),
    "sensitivity": (SensitivityAtSpecificity, judged()),
    "auroc": (lambda: BinnedAuroc(thresholds=1001), judged()),
    "exact match": (ExactMatch, ANSWERS),
    "token F1": (TokenF1, ANSWERS),
    "word error rate": (WordErrorRate, (sentences(100), REFERENCES)),
    "character error rate": (CharErrorRate, (sentences(100), REFERENCES)),
    "Jaccard index": (lambda: MulticlassJaccardIndex(3), MASKS),
    "Dice": (lambda: MulticlassF1Score(3, average="macro"), MASKS),
    "hit rate": (lambda: HitRate(10), (torch.tensor(RNG.integers(-1, 30, 500)),)),
    "NDCG": (lambda: Ndcg(10), (torch.tensor(RNG.integers(-1, 30, 500)),)),
    "MAE": (MeanAbsoluteError, forecast()),
    "RMSE": (RootMeanSquaredError, forecast()),
    "MASE": (MeanAbsoluteScaledError, forecast()),
    "pinball": (lambda: PinballLoss(QUANTILES), forecast()),
    "direction": (DirectionAccuracy, forecast()),
    "slot F1": (lambda: EntityF1(TAGS), tagged()),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_added_states_of_clients_give_what_all_data_together_give(name, seed):
    make, arguments = ALL[name]
    together = value_of(make, arguments)
    assert 0 < together < math.inf
    assert value_of(make, *split(arguments, seed)) == pytest.approx(together, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ALL)
def test_a_client_without_examples_changes_nothing(name):
    make, arguments = ALL[name]
    nothing = tuple(values[:0] for values in arguments)
    if name not in ("auroc", "Dice"):  # torchmetrics' own fail on it
        assert value_of(make, arguments, nothing) == value_of(make, arguments)


# Probabilities


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_the_sum_over_bins_of_their_gaps(bins):
    probabilities, targets = of_classes()
    gap = 0.0
    for i in range(bins):
        inside = [
            row
            for row, p in enumerate(probabilities.max(dim=1).values.tolist())
            if i / bins < p <= (i + 1) / bins
        ]
        if inside:
            right = np.mean([int(probabilities[r].argmax()) == int(targets[r]) for r in inside])
            stated = np.mean([float(probabilities[r].max()) for r in inside])
            gap += len(inside) / len(targets) * abs(right - stated)
    assert value_of(lambda: BinnedCalibrationError(bins), (probabilities, targets)) == pytest.approx(gap)


def test_calibration_of_two_classes_by_hand():
    # 0.9 twice, right once; 0.2 twice, right never: (2 * |1/2 - 0.9| + 2 * |0 - 0.2|) / 4 = 0.3
    stated = torch.tensor([0.9, 0.9, 0.2, 0.2], dtype=torch.float64)
    came = torch.tensor([1, 0, 0, 0])
    assert value_of(BinnedCalibrationError, (stated, came)) == pytest.approx(0.3)


def test_calibration_refuses_logits():
    with pytest.raises(ValueError, match="logits"):
        BinnedCalibrationError().update(torch.tensor([0.5, 2.0]), torch.tensor([0, 1]))


@pytest.mark.parametrize("specificity", [0.8, 0.9, 0.95])
def test_sensitivity_is_that_of_the_roc_curve(specificity):
    probabilities, targets = judged(2000)
    on_edges = (probabilities * 1000).round() / 1000
    false_rate, true_rate, _ = roc_curve(targets, on_edges, drop_intermediate=False)
    expected = true_rate[1 - false_rate >= specificity].max()
    # A threshold between two edges cuts as the upper edge does.
    between = (on_edges + 0.0004).clamp(max=1)
    found = value_of(lambda: SensitivityAtSpecificity(specificity), (between, targets))
    assert found == pytest.approx(expected, abs=1e-6)


def test_binned_auroc_is_that_of_scikit_learn_where_scores_are_on_thresholds():
    probabilities, targets = judged()
    on_edges = (probabilities * 1000).floor() / 1000
    found = value_of(lambda: BinnedAuroc(thresholds=1001), (on_edges + 0.0004, targets))
    assert found == pytest.approx(roc_auc_score(targets, on_edges), abs=1e-6)


# Texts


def test_answers_are_scored_as_torchmetrics_scores_squad():
    predictions, references = ANSWERS
    theirs = squad(
        [{"prediction_text": p, "id": str(i)} for i, p in enumerate(predictions)],
        [{"answers": {"answer_start": [0], "text": [r]}, "id": str(i)} for i, r in enumerate(references)],
    )
    assert value_of(ExactMatch, ANSWERS) == pytest.approx(float(theirs["exact_match"]) / 100, rel=1e-6)
    assert value_of(TokenF1, ANSWERS) == pytest.approx(float(theirs["f1"]) / 100, rel=1e-6)


@pytest.mark.parametrize(
    ("answer", "words"), [("The  U.S.", "us"), ("an apple, a day", "apple day"), ("Theatre!", "theatre")]
)
def test_normalising_drops_case_punctuation_and_articles(answer, words):
    assert normalised(answer) == words


def test_error_rates_are_those_of_jiwer():
    found = [text or "nothing" for text in sentences(100)]
    references = [" ".join(text.split()) for text in REFERENCES]
    found = [" ".join(text.split()) for text in found]
    assert value_of(WordErrorRate, (found, references)) == pytest.approx(
        jiwer.wer(references, found), rel=1e-6
    )
    assert value_of(CharErrorRate, (found, references)) == pytest.approx(
        jiwer.cer(references, found), rel=1e-6
    )


# Pixels


def test_jaccard_and_dice_are_those_of_scikit_learn():
    found, wanted = (mask.flatten().numpy() for mask in MASKS)
    jaccard = value_of(lambda: MulticlassJaccardIndex(3), MASKS)
    dice = value_of(lambda: MulticlassF1Score(3, average="macro"), MASKS)
    assert jaccard == pytest.approx(jaccard_score(wanted, found, average="macro"), rel=1e-6)
    assert dice == pytest.approx(f1_score(wanted, found, average="macro"), rel=1e-6)


# Ranks


def test_hit_rate_and_ndcg_are_those_of_scored_items():
    scores = RNG.permuted(np.tile(np.arange(30.0), (200, 1)), axis=1)
    truth = np.zeros((200, 30))
    truth[np.arange(200), RNG.integers(0, 30, 200)] = 1
    ranks = torch.tensor((scores > scores[truth == 1][:, None]).sum(axis=1))
    assert value_of(lambda: Ndcg(10), (ranks,)) == pytest.approx(ndcg_score(truth, scores, k=10), rel=1e-12)
    best = np.argsort(-scores, axis=1)[:, :10]
    hits = np.mean([truth[row, best[row]].sum() for row in range(200)])
    assert value_of(lambda: HitRate(10), (ranks,)) == pytest.approx(hits, rel=1e-12)


def test_users_without_a_held_out_item_do_not_count():
    # Of ranks 0, 1 and 7 two are below 2; NDCG@2 = (1 + 1 / log2(3)) / 3
    ranks = torch.tensor([0, -1, 7, 1, -1])
    assert value_of(lambda: HitRate(2), (ranks,)) == pytest.approx(2 / 3)
    assert value_of(lambda: Ndcg(2), (ranks,)) == pytest.approx((1 + 1 / math.log2(3)) / 3)


# What there is nothing to measure by


ONES, PROBABLE = torch.ones(4, dtype=torch.int64), torch.tensor([0.2, 0.9, 0.7, 0.4])


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: BinnedAuroc(thresholds=11), (PROBABLE, ONES)),
        (lambda: BinnedAuroc(thresholds=11), (PROBABLE, ONES - 1)),
        (lambda: SensitivityAtSpecificity(0.95, 11), (PROBABLE, ONES)),
        (lambda: SensitivityAtSpecificity(0.95, 11), (PROBABLE, ONES - 1)),
        (lambda: BinnedMacroAuroc(3, 11), (torch.eye(3)[:1].repeat(4, 1), ONES)),
        (lambda: HitRate(3), (torch.tensor([-1, -1]),)),
        (lambda: Ndcg(3), (torch.tensor([-1]),)),
        (lambda: MeanAbsoluteScaledError(), (torch.zeros(2, 3, 1), torch.zeros(2, 5))),
        (lambda: DirectionAccuracy(), (torch.zeros(2, 3, 1), torch.zeros(2, 5))),
        (lambda: MeanIoU(3), (ONES[:0], ONES[:0])),
        (lambda: ExactMatch(), ([], [])),
        (lambda: IntentAccuracy(), (torch.zeros(0, 2), torch.zeros(0, 2))),
        (lambda: BoxAveragePrecision(2), ([], torch.zeros(0, 1, 5))),
    ],
)
def test_a_metric_with_nothing_to_measure_by_is_undefined_and_not_zero(make, arguments):
    assert math.isnan(value_of(make, arguments))


def test_macro_averages_go_over_the_classes_that_are_there():
    # A perfect model, and one of three classes is absent: (1 + 1) / 2, not (1 + 1 + 0) / 3.
    targets = torch.tensor([0, 1, 0, 1])
    certain = torch.eye(3)[targets]
    assert value_of(lambda: BinnedMacroAuroc(3, 11), (certain, targets)) == 1.0
    assert value_of(lambda: MulticlassF1Score(3, average="macro"), (certain, targets)) == 1.0


# Forecasts


def test_forecast_errors_are_those_of_a_loop_over_steps():
    predictions, targets = forecast()
    off, squared, scaled, direction = [], [], [], []
    for example, row in zip(predictions.tolist(), targets.tolist(), strict=True):
        *values, last, scale = row
        for (_, median, _), value in zip(example, values, strict=True):
            off.append(abs(median - value))
            squared.append((median - value) ** 2)
            if scale:
                scaled.append(abs(median - value) / scale)
            if value != last:
                direction.append((median > last) == (value > last))
    measured = (predictions, targets)
    assert value_of(MeanAbsoluteError, measured) == pytest.approx(np.mean(off), rel=1e-12)
    assert value_of(RootMeanSquaredError, measured) == pytest.approx(np.sqrt(np.mean(squared)), rel=1e-12)
    assert value_of(MeanAbsoluteScaledError, measured) == pytest.approx(np.mean(scaled), rel=1e-12)
    assert value_of(DirectionAccuracy, measured) == pytest.approx(np.mean(direction), rel=1e-12)
    assert len(direction) < len(off) and len(scaled) < len(off)


def test_the_naive_forecast_of_a_walk_has_a_scaled_error_of_one():
    # Each step moves by 2, the scale is 2, and the horizon is one step.
    walk = torch.arange(0, 20, 2.0)
    targets = torch.stack([walk[1:], walk[:-1], torch.full((9,), 2.0)], dim=1)
    assert value_of(MeanAbsoluteScaledError, (walk[:-1].reshape(9, 1, 1), targets)) == 1


def test_pinball_loss_is_that_of_scikit_learn():
    predictions, targets = forecast()
    values = targets[:, :-2].numpy().ravel()
    forecasts = predictions.flatten(0, 1).numpy()
    expected = np.mean([mean_pinball_loss(values, forecasts[:, i], alpha=q) for i, q in enumerate(QUANTILES)])
    assert value_of(lambda: PinballLoss(QUANTILES), (predictions, targets)) == pytest.approx(
        expected, rel=1e-12
    )


def test_forecasts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"found \[4, 3, 1\] and \[4, 4\]"):
        MeanAbsoluteError().update(torch.zeros(4, 3, 1), torch.zeros(4, 4))


# Slots


def conll_chunks(tags: list[str]) -> Counter[tuple[str, int, int]]:
    """Every stretch of words, asked whether conlleval's rules make it a chunk."""
    chunks: Counter[tuple[str, int, int]] = Counter()
    kinds = ["" if tag == "O" else tag[2:] for tag in tags]

    def begins(i: int) -> bool:
        return kinds[i] != "" and (tags[i][0] == "B" or i == 0 or kinds[i - 1] != kinds[i])

    for first in range(len(tags)):
        for last in range(first, len(tags)):
            whole = begins(first) and all(
                kinds[i] == kinds[first] and not begins(i) for i in range(first + 1, last + 1)
            )
            over = last + 1 == len(tags) or kinds[last + 1] != kinds[first] or begins(last + 1)
            if whole and over:
                chunks[kinds[first], first, last] += 1
    return chunks


def test_slot_f1_is_that_of_conlleval_chunks():
    predictions, targets = tagged()
    matched = found = wanted = 0
    for ours, theirs in zip(predictions.tolist(), targets.tolist(), strict=True):
        places = [i for i, t in enumerate(theirs) if t != -100]
        guess = conll_chunks([TAGS[ours[i]] for i in places])
        truth = conll_chunks([TAGS[theirs[i]] for i in places])
        matched += (guess & truth).total()
        found += guess.total()
        wanted += truth.total()
    precision, recall = matched / found, matched / wanted
    expected = 2 * precision * recall / (precision + recall)
    assert value_of(lambda: EntityF1(TAGS), (predictions, targets)) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.sampled_from(TAGS), max_size=8))
def test_a_sentence_compared_with_itself_is_perfect_if_it_has_spans(tags):
    ids = torch.tensor([[TAGS.index(tag) for tag in tags]], dtype=torch.int64)
    expected = 1.0 if any(tag != "O" for tag in tags) else math.nan
    assert value_of(lambda: EntityF1(TAGS), (ids, ids)) == pytest.approx(expected, nan_ok=True)


def test_scores_of_tags_count_as_the_highest_one():
    predictions, targets = tagged()
    scores = torch.nn.functional.one_hot(predictions, len(TAGS)).to(torch.float32)
    make = ALL["slot F1"][0]
    assert value_of(make, (scores, targets)) == value_of(make, (predictions, targets))


def test_whether_less_is_better_is_known_by_the_name() -> None:
    """Each task's own metrics are held against this as its learner makes them."""
    falling = (
        "loss",
        "bits_per_byte",
        "byte_perplexity",
        "perplexity",
        "unparsable_rate",
        "calibration_error",
    )
    assert all(lower_is_better(name) for name in (*falling, "mae", "rmse", "mase", "pinball", "wer", "cer"))
    assert not any(lower_is_better(name) for name in ("accuracy", "auroc", "reward_margin", "bleu", "tercet"))
    assert direction_fault("mae", False) is direction_fault("auroc", True) is None
    assert direction_fault("deviance", None) is direction_fault("word_error", None) is None
    assert "which its name must say; expected one that has loss, error" in (
        direction_fault("odd", False) or ""
    )
    assert "its name is an error's; expected another name than" in (direction_fault("log_loss", True) or "")
