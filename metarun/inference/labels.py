"""Labels and weights that callers give, checked; and labels as files have them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import type_of_target
from torch import Tensor

from metarun.errors import InputError, first_line


def checked_labels(labels: Any, number: int, kind: str = "images") -> np.ndarray:
    """Checks labels of so many items, `[number]`.

    Raises:
        InputError: They are not so many, or are no names of classes.
    """
    try:
        if isinstance(labels, Tensor):
            labels = labels.detach().cpu()
            labels = (labels.double() if labels.is_floating_point() else labels).numpy()  # numpy has no bfloat16
        given = np.asarray(labels)
    except ValueError as error:
        raise InputError("labels: are lists of several lengths; give one label for each item") from error
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"labels: numpy cannot take them ({first_line(error)}); give one label for each item"
        ) from error
    if given.dtype.kind == "O" and len({isinstance(value, str) for value in given.ravel()}) > 1:
        raise InputError("labels: are partly text and partly not; give labels of one kind")
    if given.shape == (number, 1):
        given = column_or_1d(given, warn=True)
    if given.shape != (number,):
        raise InputError(f"labels: have the shape {list(given.shape)}, but there are {number} {kind}; give one each")
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise InputError("labels: one of them is NaN or inf, which names no class")
    try:
        # Not `check_classification_targets`, which takes one image of each of many classes for a regression.
        kind = type_of_target(given, input_name="y")
    except (ValueError, TypeError) as error:
        raise InputError(f"labels: {str(error).splitlines()[0]}") from error
    if kind not in ("binary", "multiclass"):
        raise InputError(f"labels: Unknown label type: {kind}; labels name classes")
    return given


def checked_weights(weights: Any, number: int) -> np.ndarray:
    """Checks how much each of so many items counts, float64 `[number]`.

    Raises:
        InputError: They are not so many, or no mean can be taken by them.
    """
    try:
        given = np.asarray(weights, dtype=np.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"sample_weight: is no list of numbers ({first_line(error)})") from error
    if given.shape != (number,):
        raise InputError(f"sample_weight: has the shape {list(given.shape)}, but there are {number} labels")
    if not np.isfinite(given.sum()) or given.min() < 0 or not given.any():
        raise InputError("sample_weight: must be finite numbers of at least 0, and not all of them 0")
    return given


def is_text(labels: np.ndarray) -> bool:
    """Whether all labels are text."""
    return labels.dtype.kind == "U" or (labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels))


def label_text(label: Any) -> str:
    """Writes a label as files have it; numbers with a point, which are whole ones where they are labels, have none there."""
    return str(int(label)) if isinstance(label, float | np.floating) else str(label)


def number_text(name: str) -> str:
    """Writes the text of a label beside numbers; earlier versions wrote some whole numbers with a point."""
    return name.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", name) else name
