"""The names of what is measured, as they stand in `result.json`, in tables and in the logs of a training."""

from __future__ import annotations

ACCURACY = "acc"
BALANCED_ACCURACY = "balanced_acc"  # the mean over the classes
MACRO_F1 = "macro_f1"
AUROC = "auroc"
# What is measured of classified images, the first of all before the others.
OF_CLASSES = (ACCURACY, BALANCED_ACCURACY, MACRO_F1, AUROC)
CONFUSION = "confusion"  # [i][j] counts images of class i that were taken for j
UNDEFINED = "undefined"  # how many tasks or images have a prediction that is no number; absent where none has
ERROR = "mse"  # of regression
MEDIAN_ERROR = "mse_median"  # of the episodes
CI95 = "_ci95"  # ends the name of half of a 95% interval


def overlap_of(tested: int, images: int) -> float:
    """Computes how far repeats test the same images: the test images of a repeat, over the others of those that they are drawn from.

    Repeats that draw from the same images are not independent. The variance of the mean of n of them is not s^2 / n, with s their
    sample deviation, but s^2 (1 / n + overlap): Nadeau and Bengio 2003, section 3, https://doi.org/10.1023/A:1024068626366.

    Args:
        tested: The test images of a repeat.
        images: Those that each repeat draws them from.

    Returns:
        At least 0; 0 where all are tested in each repeat, of which the interval then says that the test images are the same.
    """
    return tested / (images - tested) if tested < images else 0.0
