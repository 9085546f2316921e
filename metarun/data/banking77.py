"""BANKING77, questions of customers of a bank with 77 intents (Casanueva et al. 2020), alone and as the test of CLINC150.

Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020, https://arxiv.org/abs/2003.04807.
"""

from __future__ import annotations

from typing import Annotated

from metarun.config.types import FilePath, Len, PositiveFloat, Seed
from metarun.data.clinc150 import TRAINING, VALIDATION, intents, read_clinc150
from metarun.data.splits import RATIOS, SPLITS, check_ratios, divide
from metarun.data.text import TextSource
from metarun.data.text_archives import check_counts, published_files
from metarun.data.text_files import LabelledText, labelled_texts

CHECKSUMS = {
    "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
}
ADDRESS = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data/"
COUNTS = {"train": 10_003, "test": 3_080}
INTENTS = 77


class Banking77(TextSource):
    """BANKING77: 77 intents, 13,083 questions (10,003 for training, 3,080 for the test).

    Episodes draw from all questions of an intent; the intents are divided by `ratios` and `split_seed`, the literature having no one
    division. To train on CLINC150 and test on all 77 intents: `data=clinc150_banking77`. Ordinary training and testing take
    the official parts. Raises `UserError` for files that are missing or are others.

    Args:
        root: The folder with train.csv and test.csv; null is <METARUN_DATA>/text/banking77, or <METARUN_DATA>/banking77.
        download: Whether files are downloaded if they are not there.
        ratios: The shares of train, val and test classes, which sum to 1; null is [0.64, 0.16, 0.2].
        split_seed: The seed of the division.
    """

    as_target = "target=banking77"

    def __init__(
        self,
        *,
        root: FilePath | None = None,
        download: bool = True,
        ratios: Annotated[list[PositiveFloat], Len(3, 3)] | None = None,
        split_seed: Seed = 0,
    ) -> None:
        rows = read_banking77(root, download)
        names = sorted({row.label for row in rows})
        shares = check_ratios(ratios, RATIOS)
        drawn = divide(names, (None, None, None), shares, split_seed, key="data banking77", where="it")
        super().__init__(
            rows, {split: [names[n] for n in drawn[split]] for split in SPLITS}, ordinary=True, key="data banking77"
        )


class Clinc150Banking77(TextSource):
    """Intents of CLINC150 to train on, all of BANKING77 to test on.

    As Zhang et al. 2022 ("Fine-tuning Pre-trained Language Models for Few-shot Intent Detection", NAACL, and their code): 90 intents of
    six domains of CLINC150 for training, 30 of travel, kitchen and dining for validation, none of banking and credit cards, which
    are BANKING77's subject; the test are the 77 intents of BANKING77.

    Args:
        clinc150_root: The folder with data_full.json; null as for `data=clinc150`.
        banking77_root: The folder with train.csv and test.csv; null as for `data=banking77`.
        download: Whether files are downloaded if they are not there.
    """

    def __init__(
        self, *, clinc150_root: FilePath | None = None, banking77_root: FilePath | None = None, download: bool = True
    ) -> None:
        training, validation = (
            [f"clinc150/{intent}" for intent in intents(domains)] for domains in (TRAINING, VALIDATION)
        )
        known = {*training, *validation}
        source = [
            row._replace(label=f"clinc150/{row.label}", part="") for row in read_clinc150(clinc150_root, download)[0]
        ]
        tested = [
            row._replace(label=f"banking77/{row.label}", part="") for row in read_banking77(banking77_root, download)
        ]
        super().__init__(
            [*(row for row in source if row.label in known), *tested],
            {"train": training, "val": validation, "test": sorted({row.label for row in tested})},
            key="data clinc150_banking77",
        )


def read_banking77(root: str | None, may_download: bool) -> list[LabelledText]:
    """The questions with their intents, sorted by intent.

    Raises:
        UserError: A file is missing, or is another one.
    """
    paths = published_files("banking77", root, CHECKSUMS, ADDRESS, may_download=may_download)
    rows: list[LabelledText] = []
    for part, count in COUNTS.items():
        path = paths[f"{part}.csv"]
        found = [row._replace(part=part) for row in labelled_texts(path, key="data banking77").rows]
        check_counts("banking77", path, "questions", len(found), count)
        check_counts("banking77", path, "intents", len({row.label for row in found}), INTENTS)
        rows += found
    return sorted(rows, key=lambda row: row.label)
