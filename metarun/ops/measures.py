"""The names of what is measured, as they stand in `result.json`, in tables and in the logs of a training."""

from __future__ import annotations

ACCURACY = "acc"
BALANCED_ACCURACY = "balanced_acc"  # the mean over the classes
MACRO_F1 = "macro_f1"
AUROC = "auroc"
# What is measured of classified images, the first of all before the others.
OF_CLASSES = (ACCURACY, BALANCED_ACCURACY, MACRO_F1, AUROC)
ERROR = "mse"  # of regression
MEDIAN_ERROR = "mse_median"  # of the episodes
CI95 = "_ci95"  # ends the name of half of a 95% interval
