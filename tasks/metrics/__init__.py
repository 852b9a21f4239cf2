"""Metrics whose states add: summed over clients they give what all data together would give.

Every state is a tensor of fixed shape, and the sum of two states is the state of both shards. Sums that
are no counts are kept in float64, so that their order shows in the last digits only. These modules import
torchmetrics: import them where a task's metrics are made, not at the top of a task.

What torchmetrics keeps as sums itself isn't here: accuracy, F1 (Dice is the F1 of pixels), Jaccard
index, word and character error rates, and, given a number of thresholds, AUROC.
"""
