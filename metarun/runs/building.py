"""What a config names, built: the stages, the data sets and the run that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from hydra.utils import get_class, get_object
from omegaconf import DictConfig, OmegaConf

from metarun import stages
from metarun.config import construct, keyed, nodes_of
from metarun.config.overrides import reading
from metarun.config.signature import ABSENT
from metarun.config.signature import read as signature_of
from metarun.config.task_schema import SIZES
from metarun.config.types import Given
from metarun.config.validation import check_target
from metarun.core import Backbone
from metarun.data.domains import named
from metarun.data.image_source import ImageSource
from metarun.data.source import DataSource, NoData
from metarun.data.test_sets import fit_to_network
from metarun.encoders.base import Encoder
from metarun.encoders.building import encoded, encoded_as
from metarun.engine import checkpoint
from metarun.engine.distributed import World
from metarun.engine.origins import stored_beside
from metarun.errors import UserError, nearest, reason
from metarun.files import typed_path
from metarun.runs import result
from metarun.runs.logger import RunLogger
from metarun.runs.run import Run
from metarun.stages.base import Stage
from metarun.target.target import Target


def build_stages(config: DictConfig) -> list[Stage]:
    """Builds the stages of the recipe, not yet prepared.

    Each entry of `recipe.stages` is a node with a `_target_`, or the dotted path of a class without settings.

    Raises:
        UserError: An entry is no stage, or has a setting that the stage does not know.
    """
    built: list[Stage] = []
    for place, entry in enumerate(config.recipe.stages):
        node = OmegaConf.create({"_target_": entry}) if isinstance(entry, str) else entry
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        if not target:
            raise UserError(f"recipe.stages[{place}]: has no _target_ (the class of the stage)")
        if not isinstance(target, str):
            raise UserError(f"recipe.stages[{place}]._target_={target}: is no dotted path of a class, as text")
        known = [f"metarun.stages.{name}" for name in stages.__all__ if name != "Stage"]
        hint = "" if target in known else nearest(target, known) or f"; there are {', '.join(known)}"
        try:
            cls = get_class(target)
        except Exception as error:
            raise UserError(f"recipe.stages: {target} cannot be imported ({reason(error)}){hint}") from error
        if not issubclass(cls, Stage):
            raise UserError(f"recipe.stages: {target} is no stage (no subclass of metarun.stages.Stage){hint}")
        check_target(node, f"recipe.stages[{place}]", Given())
        built.append(construct(node, f"recipe.stages[{place}]"))
    return built


def prepare(config: DictConfig, folder: Path, world: World, before: Run | None = None) -> Run:
    """Builds the run and prepares its stages in this rank; writes nothing to `folder`.

    Args:
        config: The whole config.
        folder: The run's folder.
        world: The ranks.
        before: The same run, prepared for other ranks, whose data sets serve again.

    Raises:
        UserError: The config cannot be carried out.
    """
    built = build_stages(config)
    for stage in built:
        stage.check(config, world)
    if before is not None:
        data, target, tests = before.data, before.target, before.tests
    else:
        check_installed(config, built)
        data, target = build_data(config, built)
        if data.members and (origin := used_as_trained(config)):
            normalize_as_trained(data, origin, "data" if config.recipe.source else "target")
        if target is not None:
            target.fit_to(data)
        tests = build_tests(config, built, data)
    run = Run(config, built, world, folder, data, target, tests)
    for stage in built:
        stage.prepare(run)
    if not run.learners:
        raise UserError("recipe.stages: no stage trains, loads or builds a learner; add metarun.stages.Train, say")
    run.logger = RunLogger(folder if world.main else None)  # last: all is well
    return run


def used_as_trained(config: DictConfig) -> str | None:
    """The run, or its file of weights, whose network is used as it was trained; None where there is none.

    Weights of `backbone.from` are, where no source trains them further. A library's network knows by itself how pixels come.
    """
    if config.checkpoint or config.recipe.source or "standardized" in config.backbone:
        return config.checkpoint or None
    origin: str | None = config.backbone.get("from")
    return origin


def normalize_as_trained(data: DataSource, origin: str, where: str) -> None:
    """Normalises the pixels of one data set if those are that the weights of a run were trained on; other items are left alone.

    Args:
        data: The data set.
        origin: The run, or its file of weights. One without a result tells nothing.
        where: What a line about it begins with.
    """
    learner = stored_beside(origin).get(result.LEARNER) or {}
    told, images = learner.get("preprocessing", {}), data.underlying
    if isinstance(images, ImageSource) and "mean" in told and not told.get("encoder"):
        images.normalize_as((told["mean"], told["deviation"]) != ([0.0], [1.0]), where)


def check_installed(config: DictConfig, built: Sequence[Stage]) -> None:
    """Checks that libraries, runs and a user's own data are here which a config names: before a table of images is built.

    Args:
        config: The whole config.
        built: The stages.

    Raises:
        UserError: One is not; of a library it names the extra.
    """
    backbone = get_class(config.backbone._target_)
    if issubclass(backbone, Backbone):
        # The weights of a checkpoint take the place of those that it began with, which may be gone.
        backbone.check_installed(config.backbone if not config.checkpoint else {**config.backbone, "weights": None})
    if config.backbone.get("from") and not config.checkpoint:
        checkpoint.weights_file("backbone.from", str(config.backbone["from"]))
    encoder = get_object(config.encoder._target_) if config.encoder and "_target_" in config.encoder else None
    if isinstance(encoder, type) and issubclass(encoder, Encoder):
        encoder.check_installed(config.encoder)
    if config.encoder and config.encoder.get("from") and not config.checkpoint:
        checkpoint.weights_file("encoder.from", str(config.encoder["from"]))
    if config.augment:
        construct(config.augment, "augment")
    for key, node in data_nodes(config, built).items():
        check_there(key, node)


def data_nodes(config: DictConfig, built: Sequence[Stage]) -> dict[str, DictConfig]:
    """The nodes of all data sets that a run reads, by their keys: each of a list apart."""
    if not any(stage.needs_data for stage in built):
        return {}
    with_target = any(stage.needs_target for stage in built)
    nodes = {"data": config.data} if config.recipe.source or not with_target else {}
    nodes |= {"target.data": config.target.data} if with_target else {}
    lists = {f"{key}.sets": node.sets for key, node in nodes.items() if node.get("sets")}
    tested = config.test.data and any(stage.takes_episodes for stage in built)
    lists |= {"test.data": config.test.data} if tested else {}
    return nodes | {f"{key}.{name}": each for key, several in lists.items() for name, each in several.items()}


def check_there(key: str, node: DictConfig) -> None:
    """Checks that the files and folders are there that a data set cannot be without; those with a default may be downloaded.

    A class of the user's own may make them itself.

    Raises:
        UserError: One is not there.
    """
    target = str(node.get("_target_"))
    signature = signature_of(target) if target.startswith("metarun.") else None
    for one in signature.settings if signature else ():
        how = reading(one.hint)
        value = node.get(one.name)
        if one.default is ABSENT and how.path and not how.name and isinstance(value, str):
            path = typed_path(value).absolute()
            if not path.exists():
                beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
                raise UserError(f"{key}.{one.name}: there is no file or folder {path}{nearest(path.name, beside)}")


def build_data(config: DictConfig, built: list[Stage]) -> tuple[DataSource, Target | None]:
    """Builds the source and the target; a recipe without a source takes the target for it.

    Args:
        config: The whole config.
        built: The stages.

    Raises:
        UserError: A setting of a data set is wrong, or the recipe has no use for one that was given, or lacks one.
    """
    if not any(stage.needs_data for stage in built):
        return NoData(), None
    node = target_data(config, built)
    nodes = [(config.data, "data")] if node is None or config.recipe.source else []
    if node is not None:
        nodes.append((node, "target.data"))
    if config.encoder and config.augment:
        raise UserError(
            "augment: changes images in training, but the encoder has made vectors of them by then; encoder.views=5 encodes changed "
            "copies too"
        )
    alone = not any(key == "data" for _, key in nodes)
    sources = encoded([construct(one, key) for one, key in nodes], config.encoder, as_target=alone)
    if config.unsupervised and config.recipe.source:
        sources[0] = construct(config.unsupervised, "unsupervised", source=sources[0])
    if node is None:
        return sources[0], None
    with keyed("target.data", [str(name) for name in node]):
        return sources[0], Target(sources[-1], config.target)


def build_tests(config: DictConfig, built: list[Stage], data: DataSource) -> Mapping[str, DataSource]:
    """Builds what a meta-test tests on: the data sets of `test.data`, or what the source's own test classes are of.

    Raises:
        UserError: The recipe tests on none, or the network cannot be tested on one.
    """
    if not any(stage.takes_episodes for stage in built):
        asked = {
            "data": bool(config.test.data),
            "views": config.test.views > 1,
            "unknown_ways": config.test.unknown_ways > 0,
        }
        for name in (name for name, wanted in asked.items() if wanted and not config.checkpoint):
            raise no_meta_test(name)
        return data.tested if any(stage.meta_tests for stage in built) else {}
    if not config.test.data:
        return data.tested
    found = fit_to_network(nodes_of(config.test.data, "test.data", SIZES), data, encoded=bool(config.encoder))
    return {name: named(f"test.data: {name}", partial(encoded_as, items, data)) for name, items in found.items()}


def no_meta_test(name: str) -> UserError:
    """The error of a key `name` of `test` that tests on episodes read, where no stage is one."""
    return UserError(
        f"test.{name}: this recipe has no meta-test; use recipe=meta, or recipe=test checkpoint=outputs/RUN"
    )


def target_data(config: DictConfig, built: list[Stage]) -> DictConfig | None:
    """Returns the node of the target's data set, if the recipe has a use for a target.

    Args:
        config: The whole config.
        built: The stages.

    Raises:
        UserError: A target, or a way to learn it, is given and not used, or a stage needs a target and none is given.
    """
    wanted = [stage for stage in built if stage.needs_target]
    if wanted and not config.target.data:
        raise UserError(f"recipe: its stage {wanted[0]} needs a target; add target=pneumoniamnist, say")
    if config.target.data and not wanted:
        raise UserError("target: this recipe has no use for one; add recipe=transfer, say")
    if config.transfer and not any(stage.uses_transfer for stage in built):
        raise UserError(
            "transfer: this recipe learns no target, and would not use it; add recipe=transfer target=pneumoniamnist, say, or leave "
            "transfer out"
        )
    return config.target.data if wanted else None
