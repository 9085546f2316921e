"""TF-IDF: how often the words of a text occur in it, against in how many texts they do; the baseline for texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from metarun.config.types import Len, PositiveInt
from metarun.encoders.base import Encoder
from metarun.errors import UserError


class TfIdf(Encoder):
    """Texts to vectors of TF-IDF, `[n, features]` of length 1, by scikit-learn.

    It is fitted to training texts alone, without their labels: they give the vocabulary, its `max_features` most frequent terms, and in
    how many texts each occurs (Sparck Jones 1972; smoothed, as scikit-learn does). A text without any known term is the zero vector.

    Args:
        max_features: The terms of the vocabulary at most, the most frequent ones; vectors have as many numbers.
        ngrams: The shortest and the longest run of words (or characters) that is a term.
        analyzer: Whether terms are of words, or of characters within words (char_wb).
        sublinear: Whether 1 + log(count) takes the place of a term's count.
    """

    item = "text"
    fitted = True

    def __init__(
        self,
        *,
        max_features: PositiveInt = 4096,
        ngrams: Annotated[list[PositiveInt], Len(2, 2)] | None = None,
        analyzer: Literal["word", "char_wb"] = "word",
        sublinear: bool = False,
    ) -> None:
        low, high = ngrams or [1, 1]
        if low > high:
            raise UserError(f"encoder.ngrams={[low, high]}: the shortest run is longer than the longest")
        self.max_features, self.ngrams = max_features, (low, high)
        self.analyzer, self.sublinear = analyzer, sublinear
        self.model: Any = None

    def _blank(self, **given: Any) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            max_features=None if given else self.max_features,
            ngram_range=self.ngrams,
            analyzer=self.analyzer,
            sublinear_tf=self.sublinear,
            dtype=np.float64,
            **given,
        )

    def fit(self, items: Iterable[Sequence[str]]) -> None:
        model = self._blank()
        try:
            model.fit(chain.from_iterable(items))
        except ValueError as error:
            raise UserError(f"encoder: no training text holds a word that could be counted ({error})") from error
        self.model, self.features = model, len(model.vocabulary_)

    def learned(self) -> dict[str, Any]:
        terms: dict[str, int] = self.model.vocabulary_
        return {"terms": sorted(terms, key=lambda term: terms[term]), "idf": np.asarray(self.model.idf_).tolist()}

    def identity(self) -> dict[str, Any]:
        told = json.dumps(self.learned())
        return {
            "fitted_to": hashlib.sha256(told.encode()).hexdigest(),
            "features": self.features,
            "ngrams": list(self.ngrams),
            "analyzer": self.analyzer,
            "sublinear": self.sublinear,
        }

    def restore(self, learned: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        model = self._blank(vocabulary=list(learned["terms"]))
        model.idf_ = np.array(learned["idf"])
        self.model, self.features = model, len(learned["terms"])

    def encode(self, items: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.model.transform(items).toarray().astype(np.float32))
