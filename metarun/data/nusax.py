"""NusaX, the sentiment of the same thousand texts in twelve languages (Winata et al. 2023): a task is a language.

Winata et al., "NusaX: Multilingual Parallel Sentiment Dataset for 10 Indonesian Local Languages", EACL 2023,
https://arxiv.org/abs/2205.15960.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from metarun.config.types import FilePath, Len
from metarun.data.splits import SPLITS
from metarun.data.text import TextSource
from metarun.data.text_archives import check_counts, published_files
from metarun.data.text_files import LabelledText, labelled_texts
from metarun.errors import UserError, nearest

LANGUAGES = (
    "acehnese", "balinese", "banjarese", "buginese", "english", "indonesian",
    "javanese", "madurese", "minangkabau", "ngaju", "sundanese", "toba_batak",
)  # fmt: skip
ADAPTED_TO = ("balinese", "buginese", "madurese", "toba_batak")  # our choice, there being none in the literature
SENTIMENTS = ("negative", "neutral", "positive")
ADDRESS = "https://raw.githubusercontent.com/IndoNLP/nusax/75b0be5d982348332509f296e10d9bf9cb66d60f/datasets/sentiment/"
COUNTS = {"train": 500, "val": 100, "test": 400}
FILES = {"train": "train.csv", "val": "valid.csv", "test": "test.csv"}


class NusaX(TextSource):
    """NusaX: tasks of three sentiments of one language, of some languages in training and of others in the test.

    The texts of the languages are translations of one another. So that no test text was seen in another language, training tasks are of
    the official training texts of the languages `train_languages`, validation tasks of their validation texts, and test tasks of the
    test texts of `test_languages`. The literature has no division of the languages; this one is ours. Raises `UserError` for
    files that are missing or are others, and for languages that are unknown or on both sides.

    Args:
        root: The folder with a folder for each language; null is <METARUN_DATA>/text/nusax, or <METARUN_DATA>/nusax.
        download: Whether files are downloaded if they are not there.
        train_languages: The languages of training and validation; null is all that are not tested on.
        test_languages: The languages of the test; null is Balinese, Buginese, Madurese and Toba Batak.
    """

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        download: bool = True,
        train_languages: Annotated[list[str], Len(1)] | None = None,
        test_languages: Annotated[list[str], Len(1)] | None = None,
    ) -> None:
        for key, chosen in (("train", train_languages), ("test", test_languages)):
            _check(chosen or (), f"data.{key}_languages")
        tested = list(test_languages or (one for one in ADAPTED_TO if one not in (train_languages or ())))
        training = list(train_languages or (one for one in LANGUAGES if one not in tested))
        if both := sorted({*training} & {*tested}):
            raise UserError(f"data.test_languages: {both[0]} is trained on too; a language must be on one side")
        if not training or not tested:
            raise UserError(f"data.{'test' if training else 'train'}_languages: there is no language left; name one")
        rows: list[LabelledText] = []
        splits: dict[str, list[str]] = {}
        for split, languages in (("train", training), ("val", training), ("test", tested)):
            marked = {language: f"{language} ({split})" for language in sorted(languages)}
            for language, group in marked.items():
                rows += [
                    row._replace(label=f"{group}/{row.label}", group=group, part="")
                    for row in read_nusax(root, language, download, (split,))
                ]
            splits[split] = [f"{group}/{sentiment}" for group in marked.values() for sentiment in SENTIMENTS]
        super().__init__(
            rows,
            {split: splits[split] for split in SPLITS},
            within_group=True,
            key="data nusax",
            metadata={"languages": {"train": sorted(training), "val": sorted(training), "test": sorted(tested)}},
        )


class NusaXLanguage(TextSource):
    """NusaX of one language: 500 texts to train on, 100 for validation and 400 to test on, three sentiments. A target.

    Args:
        language: The language.
        root: The folder with a folder for each language; null is <METARUN_DATA>/text/nusax, or <METARUN_DATA>/nusax.
        download: Whether files are downloaded if they are not there.
    """

    as_target = "target=nusax"

    def __init__(self, *, language: str = "balinese", root: FilePath | None = None, download: bool = True) -> None:
        _check([language], "data.language")
        rows = sorted(read_nusax(root, language, download, SPLITS), key=lambda row: row.label)
        super().__init__(
            rows,
            dict.fromkeys(SPLITS, SENTIMENTS),
            ordinary=True,
            key=f"data nusax, {language}",
            metadata={"language": language},
        )


def _check(languages: Iterable[str], key: str) -> None:
    for language in languages:
        if language not in LANGUAGES:
            raise UserError(
                f"{key}: NusaX has no language {language}{nearest(language, LANGUAGES)}; it has {', '.join(LANGUAGES)}"
            )


def read_nusax(root: str | None, language: str, may_download: bool, parts: Iterable[str]) -> list[LabelledText]:
    """The texts of parts of a language.

    Raises:
        UserError: A file is missing, or is another one.
    """
    checksums = dict(
        line.split() for line in Path(__file__).with_name("nusax_files.txt").read_text(encoding="utf-8").splitlines()
    )
    wanted = {part: f"{language}/{FILES[part]}" for part in parts}
    paths = published_files(
        "nusax", root, {file: checksums[file] for file in wanted.values()}, ADDRESS, may_download=may_download
    )
    rows: list[LabelledText] = []
    for part, file in wanted.items():
        found = [row._replace(part=part) for row in labelled_texts(paths[file], key="data nusax").rows]
        check_counts("nusax", paths[file], "texts", len(found), COUNTS[part])
        if strange := sorted({row.label for row in found} ^ set(SENTIMENTS)):
            raise UserError(f"data nusax: {paths[file]} is not the published file; the sentiment {strange[0]} differs")
        rows += found
    return rows
