"""Which classes are for training, validation and testing, where the data themselves do not say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from metarun.data.sampler import uniforms
from metarun.data.source import Split
from metarun.errors import UserError, nearest
from metarun.text import composed, counted, printable

RATIOS = (0.64, 0.16, 0.2)  # of classes for training, validation and testing, as in mini-ImageNet
SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")
Shares = tuple[float, float, float]
Lists = tuple[list[str] | None, list[str] | None, list[str] | None]  # names of classes for each split


def check_ratios(ratios: list[float] | None, default: Shares = RATIOS) -> Shares:
    """Checks that the shares sum to 1.

    Args:
        ratios: Three positive numbers; None for the default.
        default: What stands in for None.

    Returns:
        The shares of training, validation and test.

    Raises:
        UserError: The sum is another.
    """
    if ratios is None:
        return default
    if abs(sum(ratios) - 1) > 1e-6:
        raise UserError(f"data.ratios={list(ratios)}: must sum to 1, but the sum is {sum(ratios):g}")
    train, val, test = ratios
    return train, val, test


def same_in_all(parts: Mapping[Split, Collection[str]], where: str, *, kind: str) -> bool:
    """Whether the parts of a data set divide the items of the same classes (a rare one may lack in some); else each class is in one.

    Args:
        parts: The classes in each part that there is.
        where: What errors begin with.
        kind: What an item is.

    Raises:
        UserError: It is neither.
    """
    first = set(parts["train"] if "train" in parts else next(iter(parts.values())))
    if len(parts) == 1 or all(first.issuperset(own) for own in parts.values()):
        return True
    homes: dict[str, str] = {}
    for part, own in parts.items():
        for name in sorted(own):
            if name in homes:
                # What is in two parts without train is either in no part of train, or beside a class that is not.
                other = next(each for each in parts if not first.issuperset(parts[each]))
                lone = min(set(parts[other]) - first)
                raise UserError(
                    f"{where}: class {printable(name)} is in both {homes[name]} and {part}, but {printable(lone)} in {other} "
                    f"without train; splits of classes must not overlap, and parts of {kind}s must have the classes of train"
                )
            homes[name] = part
    return False


def divide_or_keep(
    names: Sequence[str],
    parts: dict[Split, list[int]],
    lists: Lists,
    shares: Shares,
    seed: int,
    *,
    key: str,
    where: str,
    by: str,
    kind: str = "class",
) -> dict[Split, Sequence[int]]:
    """Finds the indices of `names` in each split: as the data are divided, or else as `divide` does it.

    Of fewer than three classes without lists every split has all: they serve a target, which needs no other classes.

    Args:
        names: The names of the classes, or of the groups that hold them.
        parts: The indices in each part of the data; empty where the data divide no classes.
        lists: The names in each split; None draws them.
        shares: The shares of the splits.
        seed: Of the draw.
        key: The setting that brought these classes, for the message of an error.
        where: Where they lie, for that too.
        by: What divides them, for that too.
        kind: What a class is there, for that too.

    Raises:
        UserError: There are too few classes, or the lists do not fit.
    """
    given = any(wanted is not None for wanted in lists)
    if parts and given:
        raise UserError(f"data.train_classes, val_classes, test_classes: {where} is divided by {by} already")
    if parts:
        return with_validation(parts, shares, seed, key=key, where=where)
    if len(names) < len(SPLITS) and not given:
        return {split: range(len(names)) for split in SPLITS}
    return divide(names, lists, shares, seed, key=key, where=where, kind=kind)


def divide(
    names: Sequence[str], lists: Lists, shares: Shares, seed: int, *, key: str, where: str, kind: str = "class"
) -> dict[Split, Sequence[int]]:
    """Divides `names`: their indices in each split, by the lists if there are any, and otherwise drawn by `seed`, sorted.

    Each split has at least one class.

    Args:
        names: The names of the classes.
        lists: The names in each split; None draws them.
        shares: The shares of the splits.
        seed: Of the draw.
        key: The setting that brought these classes, for the message of an error.
        where: Where they lie, for that too.
        kind: What a class is there, for that too.

    Raises:
        UserError: There are too few classes, or the lists do not fit.
    """
    if any(wanted is not None for wanted in lists):
        return with_validation(_listed(names, lists, where, kind), shares, seed, key=key, where=where)
    counts = _apportion(len(names), shares, f"{key}: {where} holds")
    drawn = _shuffled(list(range(len(names))), seed)
    stops = np.cumsum(counts)
    return {split: sorted(drawn[stop - count : stop]) for split, count, stop in zip(SPLITS, counts, stops, strict=True)}


def with_validation(
    splits: dict[Split, list[int]], shares: Shares, seed: int, *, key: str, where: str
) -> dict[Split, Sequence[int]]:
    """`splits`, with a share of the training classes drawn for validation where there are no classes for it.

    Args:
        splits: The indices in each split.
        shares: The shares of training, validation and test.
        seed: Of the draw.
        key: The setting that brought these classes, for the message of an error.
        where: Where they lie, for that too.

    Raises:
        UserError: The training classes are too few to share.
    """
    if splits["val"]:
        return dict(splits)
    train, val = shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1])
    subject = f"{key}: {where} gives no validation classes, and for training"
    count, _ = _apportion(len(splits["train"]), (train, val), subject)
    drawn = _shuffled(splits["train"], seed)
    return {"train": sorted(drawn[:count]), "val": sorted(drawn[count:]), "test": splits["test"]}


def _listed(names: Sequence[str], lists: Lists, where: str, kind: str) -> dict[Split, list[int]]:
    index = {composed(name): number for number, name in enumerate(names)}
    splits: dict[Split, list[int]] = {}
    homes: dict[str, str] = {}
    for split, wanted in zip(SPLITS, lists, strict=True):
        for name in (composed(str(each)) for each in wanted or []):
            if name not in index:
                raise UserError(f"data.{split}_classes: {where} has no {kind} {name}{nearest(name, index)}")
            if name in homes:
                raise UserError(f"data.{split}_classes: class {name} is in data.{homes[name]}_classes already")
            homes[name] = split
        if not wanted and split != "val":
            raise UserError(
                f"data.{split}_classes: names no class, but class lists need both train_classes and test_classes"
            )
        splits[split] = [index[composed(str(name))] for name in wanted or []]
    return splits


def _apportion(total: int, shares: Sequence[float], subject: str) -> list[int]:
    """`total` classes among splits by their shares, at least one each; sums to `total`."""
    if total < len(shares):
        raise UserError(
            f"{subject} {counted(total, 'class', 'classes')}; at least {len(shares)} are needed, one for each split"
        )
    counts = [1] * len(shares)
    for _ in range(total - len(shares)):
        lacking = [share * total - count for share, count in zip(shares, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return counts


def _shuffled(classes: list[int], seed: int) -> list[int]:
    order = uniforms(seed, "folder", 0, len(classes), 1)[:, 0].argsort(kind="stable")
    return [classes[place] for place in order]
