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


@dataclass(frozen=True)
class Blueprint:
    """The parts of a config that a learner and its way with labelled examples are built from.

    Attributes:
        algo: The method; empty for a backbone without one.
        backbone: The backbone. Its weights are those of a file, so it names none.
        transfer: The way with labelled examples.
        spec: What the method knew of its data.
    """

    algo: dict[str, Any]
    backbone: dict[str, Any]
    transfer: dict[str, Any]
    spec: Spec

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
        backbone.pop("from", None)
        if "weights" in backbone:  # a library's network, whose weights decide what images it expects
            backbone |= {name: None for name in ("weights", "checksum") if name in backbone}
            backbone |= {
                name: getattr(algorithm.backbone, name, backbone[name])
                for name in ("image_size", "images_of")
                if name in backbone
            }
        return cls(algo, backbone, transfer, algorithm.spec)

    @classmethod
    def stored(cls, values: dict[str, Any], origin: Path) -> Blueprint:
        """The blueprint that `describe` described.

        Raises:
            TypeError: A part is no mapping; a text would be read as YAML when it is built, behind the back of what looks at classes.
            UserError: It names a class that is not to be trusted.
        """
        nodes = {name: values[name] for name in ("algo", "backbone", "transfer")}
        if wrong := [name for name, node in nodes.items() if not isinstance(node, dict)]:
            raise TypeError(f"its {wrong[0]} is no mapping of keys to values")
        spec = {**values["spec"], "input_shape": tuple(values["spec"]["input_shape"])}
        found = cls(**nodes, spec=Spec(**spec))
        check_classes(OmegaConf.create(nodes), origin, OmegaConf.create({}))
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
        return built
