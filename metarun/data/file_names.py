"""What the names of files and folders say: which part of a data set they are, and whether they are data at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from metarun.text import composed

PARTS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGES = {"images", "image", "img", "imgs"}
BESIDE_PARTS = {*IMAGES, "data", "dataset", "labels", "set", "split"}  # in names of parts
KINDS = {
    **PARTS, "eval": "test", "evaluation": "test",
    "labeled": "labelled", "labelled": "labelled", "unlabeled": "unlabelled", "unlabelled": "unlabelled",
}  # fmt: skip
# Folders that are called so say nothing of classes.
NO_CLASSES = {*BESIDE_PARTS, "annotation", "annotations", "mask", "masks"}
# In names of folders that competitions publish: stage1_train, test_stg2, train-jpg, test-jpg-v2.
BESIDE_KINDS = {
    *BESIDE_PARTS, "all", "final", "full", "jpeg", "jpg", "phase", "png", "private", "public", "raw", "stage", "stg", "tif", "v",
}  # fmt: skip
KIND = re.compile(f"({'|'.join(KINDS)})({'|'.join(BESIDE_PARTS)})?")
TABLES = (".csv", ".tsv")
NO_IMAGES = {*TABLES, ".gz", ".html", ".json", ".md", ".pdf", ".py", ".tar", ".txt", ".xml", ".yaml", ".yml", ".zip"}
# Left by systems, as is whatever begins with a dot.
LITTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip


def may_be_image(name: str) -> bool:
    """Whether a file may be meant as an image: no list, text or archive by its name, as they lie beside images."""
    return Path(name).suffix.lower() not in NO_IMAGES


def part_of(name: str) -> str:
    """Which part of a data set a folder, a table or a cell names: train, val, test, or an empty string.

    Words such as images beside it change nothing: `train_images`, `Test Set`, `labels-val`.
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word and word not in BESIDE_PARTS]
    return PARTS.get(words[0], "") if len(words) == 1 else ""


def kinds_of(names: Sequence[str]) -> list[str]:
    """Which part of a data set the name of each folder may mean, more generously than `part_of`; an empty string for none.

    Numbers and words of the trade are left away: `test1`, `train2017`, `testset`, `stage1_train`; and words that all of several names
    have, as `images_test_rev1` beside `images_training_rev1`. Beside `PARTS` there are labelled and unlabelled.
    """
    words = [
        [word.lower() for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))] for name in names
    ]
    common = {word for word in set(words[0]).intersection(*words) if not KIND.fullmatch(word)} if len(words) > 1 else {}
    found = [[KIND.fullmatch(word) for word in own if word not in {*BESIDE_KINDS, *common}] for own in words]
    return [KINDS[own[0][1]] if len(own) == 1 and own[0] else "" for own in found]


def parts_alone(names: Sequence[str]) -> bool:
    """Whether folders are called as parts of a data set, and of two at least: a class alone may be called `train`."""
    kinds = kinds_of(names)
    return all(kinds) and len({*kinds}) > 1


def pieces(names: Sequence[str]) -> bool:
    """Whether folders of images are called alike but for a number, as a large one is published: `images_part_1`, `images_part_2`."""
    alike = {re.sub(r"\d+", "", name.lower()) for name in names}
    return len(alike) == 1 and not IMAGES.isdisjoint(re.findall(r"[^\W_]+", alike.pop()))


def tables_in(folder: Path) -> list[str]:
    """The names of the tables that lie in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in TABLES and path.is_file())


def tables_of_labels(folder: Path) -> list[str]:
    """The names of the tables in a folder that may say of which class images are; a form for predictions does not."""
    return [name for name in tables_in(folder) if "submission" not in name.lower()]


def visible(name: str) -> bool:
    """Whether a file or a folder is of the data: neither hidden nor put there by a system."""
    return not name.startswith(".") and name.lower() not in LITTER


def twins(names: Sequence[str]) -> str:
    """What is wrong with class folders of which two have the same name, written in two ways of Unicode; empty where none have."""
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(composed(name), name) != name:
            return f"two class folders have names that look the same ({first[composed(name)]!a} and {name!a}); make them one folder"
    return ""
