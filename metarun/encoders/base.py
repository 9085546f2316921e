"""The contract of an encoder: items of one kind in, vectors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.config.checked import Checked
from metarun.data.origin import Origin
from metarun.data.source import Item
from metarun.data.table_source import TableSource
from metarun.errors import UserError

PLURAL = {"image": "images", "text": "texts", "vector": "vectors"}


@dataclass(frozen=True)
class Encoding:
    """How a table of vectors is made and read: the keys of `encoder` that hold of every encoder, see `config/schema.py`.

    Attributes:
        dtype: The type that vectors are kept in, float16 or float32.
        views: The vectors of an item: its own, and those of so many less one changed copies, among which training draws.
        batch_size: The items that are encoded together; None for what suits the device.
        transform: What is done to vectors when they are read, after SimpleShot (Wang et al. 2019, section 2.2): nothing (`un`);
            unit length (`l2n`); the mean of the training items taken off, and unit length (`cl2n`).
        saw: What the encoder was pretrained on, by name; None where it is not known. Unless it was set, the encoder says it.
    """

    dtype: str
    views: int
    batch_size: int | None
    transform: str
    saw: str | None


class Encoder(Checked, ABC):
    """Items of one kind to vectors `[n, features]`.

    The constructor's keyword-only parameters are its settings; it reads its weights, and knows `features`, unless it is fitted.
    It must not change while it encodes, and the vector of an item must not depend on the items that it is encoded with.

    Attributes:
        item: The kind of item that it reads.
        fitted: Whether it learns from training items before it encodes any: `fit` is called then, once.
        features: D, the length of a vector.
        settings: The node of the config that it was built from; set by its builder.
        seen: For each data set the classes whose images its weights were trained on, as `metarun.runs.seen` has it; empty for
            weights that no run of metarun trained.
        origin: The run that its weights come from; None for those of no run.
        pretrained: Whether its weights were trained on more than `seen` says.
        saw: What its weights were pretrained on, by name (`metarun.runs.result.NOTHING` for drawn ones); None where it is not known.
    """

    configured_by = "encoder"

    item: ClassVar[Item]
    fitted: ClassVar[bool] = False
    features: int
    settings: Mapping[str, Any] = {}
    seen: Mapping[str, list[int]] = {}
    origin: Origin | None = None
    pretrained: bool = True
    saw: str | None = None

    @classmethod
    def check_installed(cls, settings: Mapping[str, Any]) -> None:
        """Checks that the libraries and the weights which an encoder of these settings needs are installed.

        Args:
            settings: Its node of the config.

        Raises:
            UserError: One is not; it names the extra.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that its vectors depend on: the digest of its weights (or of what it was fitted to), its preprocessing.

        Another identity is another table. `result.json` holds it under `data.encoder`.
        """

    def prepare(self, items: Any) -> Any:
        """What comes before `encode` and can go on beside it, in another thread: resizing, cutting words into tokens.

        Args:
            items: What `TableSource.items` of a source of this kind returns: images uint8 `[n, C, H, W]`, or a list of n texts.

        Returns:
            What `encode` takes; the items themselves unless a subclass says otherwise.
        """
        return items

    @abstractmethod
    def encode(self, items: Any) -> Tensor:
        """The vectors of items that were prepared.

        Args:
            items: What `prepare` returned of n items.

        Returns:
            float32 `[n, features]`, on the encoder's device. Gradients are not wanted.
        """

    def __str__(self) -> str:
        """What it is, for a line at the beginning of a run."""
        return type(self).__name__

    def __call__(self, items: Any) -> Tensor:
        """The vectors float32 `[n, features]` of items, as `prepare` takes them."""
        with torch.no_grad():
            return self.encode(self.prepare(items))

    def check(self, source: TableSource) -> None:
        """Checks that it can encode the items of a source, before anything is computed.

        Args:
            source: The data set. A subclass checks more than the kind: the channels of images, say.

        Raises:
            UserError: It reads items of another kind.
        """
        if source.item != self.item:
            raise UserError(
                f"encoder: {type(self).__name__} reads {PLURAL[self.item]}, but the items of this data set are "
                f"{PLURAL[source.item]}; choose an encoder for these, or leave encoder out"
            )

    def advice(self, source: TableSource) -> str:
        """What a setting of a data set would keep of its items that this encoder could use, in words; empty where nothing is lost.

        Args:
            source: The data set, which was checked.
        """
        return ""

    def fit(self, items: Iterable[Any]) -> None:
        """Learns from training items; only an encoder that is `fitted` is asked to. It sets `features`.

        Args:
            items: The training items in chunks, each as `prepare` takes them: of training classes alone, none of which is tested
                on.
        """

    def to(self, device: torch.device) -> None:
        """Moves it to a device; one that computes without torch stays where it is.

        Args:
            device: The device.
        """

    def changed(self, items: Any, view: int) -> Any:
        """Changed copies of items, for `encoder.views`: random crops and so on, a function of each item and of `view` alone.

        Args:
            items: As `prepare` takes them.
            view: The number of the copy, from 1.

        Raises:
            UserError: There is no such thing for this encoder.
        """
        raise UserError(f"encoder.views: {type(self).__name__} makes no changed copies of items; use encoder.views=1")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `restore` needs, on the CPU, for a classifier's file."""
        return {}

    def learned(self) -> dict[str, Any]:
        """The JSON values that `restore` needs besides tensors: what `fit` learned that is no tensor, a vocabulary say."""
        return {}

    def blueprint(self) -> dict[str, Any]:
        """The node of a config that builds it again without its weights, for `restore` to bring them."""
        return dict(self.settings)

    def restore(self, learned: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Makes an encoder that `blueprint` built what it was.

        Args:
            learned: What `learned` returned.
            tensors: What `tensors` returned.
        """
