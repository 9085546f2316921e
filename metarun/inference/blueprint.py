"""What a learner is built from, as plain values that can lie in a file which runs no code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun.config import construct
from metarun.core import Algorithm, Backbone, Spec
from metarun.target.base import Bare, SourceImages, TargetMethod
from metarun.trust import check_classes

OWN = {"_target_": "metarun.target.base.Own"}  # for a learner that is used by its own method
# What each part is, and what it is built with besides its settings.
PARTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "algo": (Algorithm, ("backbone", "spec")),
    "backbone": (Backbone, ("input_shape",)),
    "transfer": (TargetMethod, ("learner", "source")),
}


@dataclass(frozen=True)
class Blueprint:
    """The parts of a config that a learner and its way with labelled examples are built from.

    Attributes:
        algo: The method; empty for a backbone without one.
        backbone: The backbone. Its weights are those of a file, so it names none.
        transfer: The way with labelled examples.
        spec: What the method knew of its data.
        augment: The random changes of the images that `transfer` learns from; None for none.
    """

    algo: dict[str, Any]
    backbone: dict[str, Any]
    transfer: dict[str, Any]
    spec: Spec
    augment: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: DictConfig, key: str | None, algorithm: Algorithm) -> Blueprint:
        """That of a built learner.

        Args:
            config: The run's config.
            key: The key of the method in it; None for a backbone without a method.
            algorithm: The learner.
        """
        node = OmegaConf.select(config, key) if key else None
        algo: Any = OmegaConf.to_container(node, resolve=True) if node else {}
        backbone: Any = OmegaConf.to_container(config.backbone, resolve=True)
        transfer: Any = OmegaConf.to_container(config.transfer, resolve=True) if config.transfer else OWN
        augment: Any = (
            OmegaConf.to_container(config.augment, resolve=True) if config.transfer and config.augment else None
        )
        backbone.pop("from", None)
        if "weights" in backbone:  # a library's network, whose weights decide what images it expects
            backbone |= {name: None for name in ("weights", "checksum") if name in backbone}
            backbone |= {
                name: getattr(algorithm.backbone, name, backbone[name])
                for name in ("image_size", "images_of")
                if name in backbone
            }
        return cls(algo, backbone, transfer, algorithm.spec, augment)

    @classmethod
    def stored(cls, values: dict[str, Any], origin: Path) -> Blueprint:
        """The blueprint that `describe` described.

        Raises:
            TypeError: A part is no mapping; a text would be read as YAML when it is built, behind the back of what looks at classes. Or
                it is of a class for something else, or has what is no setting of it.
            UserError: It names a class that is not to be trusted.
        """
        nodes = {name: values[name] for name in ("algo", "backbone", "transfer")}
        if values.get("augment") is not None:  # there is none in what earlier versions described
            nodes["augment"] = values["augment"]
        if wrong := [name for name, node in nodes.items() if not isinstance(node, dict)]:
            raise TypeError(f"its {wrong[0]} is no mapping of keys to values")
        spec = {**values["spec"], "input_shape": tuple(values["spec"]["input_shape"])}
        found = cls(**nodes, spec=Spec(**spec))
        check_classes(OmegaConf.create(nodes), origin, OmegaConf.create({}))
        for name, (kind, handed) in PARTS.items():
            node = nodes[name]
            if others := [key for key in node if key in handed or (str(key).startswith("_") and key != "_target_")]:
                raise TypeError(f"its {name} has {others[0]}, which is no setting")
            if node and not issubclass(get_class(node["_target_"]), kind):
                raise TypeError(f"its {name} is {node['_target_']}, which is none")
        return found

    @property
    def uses_method(self) -> bool:
        """Whether the way with labelled examples is the method's own."""
        return bool(getattr(get_class(self.transfer["_target_"]), "uses_method", False))

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        spec = asdict(self.spec)
        return {
            "algo": self.algo,
            "backbone": self.backbone,
            "transfer": self.transfer,
            "spec": {**spec, "input_shape": list(self.spec.input_shape)},
            **({} if self.augment is None else {"augment": self.augment}),
        }

    def learner(self) -> Algorithm:
        """Builds the learner, its weights yet to be loaded; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            node = OmegaConf.create(self.backbone)
            backbone: Backbone = construct(node, "backbone", input_shape=self.spec.input_shape)
            if not self.algo:
                return Bare(backbone, self.spec)
            built: Algorithm = construct(OmegaConf.create(self.algo), "algo", backbone=backbone, spec=self.spec)
            return built

    def method(self, learner: Algorithm, source: SourceImages | None = None) -> TargetMethod:
        """The way with labelled examples of a learner."""
        built: TargetMethod = construct(OmegaConf.create(self.transfer), "transfer", learner=learner, source=source)
        if self.augment is not None:
            built.augment = construct(OmegaConf.create(self.augment), "augment")
        return built
