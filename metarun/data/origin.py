"""Where weights come from that a run did not train itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NO_LABELS = "none of the training images; none selects the weights"  # says which labels a training read


@dataclass(frozen=True)
class Origin:
    """What a run begins with: the weights of an earlier run, or those of a library.

    Attributes:
        where: The setting that names them, such as `backbone.from=outputs/RUN`.
        seen: The classes whose images made them, as `metarun.runs.seen` has it; empty where that is not known.
        told: What their trainings saw, in words; empty where nothing of it is known.
        labels_read: Which labels made them, in words.
        library: Of a backbone that a library's weights were trained from, the `name` of the network and what they `saw` before, as
            `protocol.backbone` of `result.json` has them; empty of any other weights.
    """

    where: str
    seen: Mapping[str, Any] = field(default_factory=dict)
    told: str = ""
    labels_read: str = "pretrained weights, which labels may have made"
    library: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of the setting, without its value."""
        return self.where.partition("=")[0]
