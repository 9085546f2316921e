"""The config of a command that goes on with the weights of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun import stages
from metarun.config import Config, check
from metarun.config.overrides import key_of, refuse_unused, wholes_of_training
from metarun.engine import checkpoint
from metarun.errors import MadeOtherwise, UserError
from metarun.runs import contents, result
from metarun.runs.building import build_stages, no_meta_test
from metarun.runs.folder import default_name, whole_config
from metarun.runs.recording import unused
from metarun.stages.base import TRAINING, Stage, check_order
from metarun.text import shown_path
from metarun.trust import check_classes

SECTIONS = {"continual"}  # keys that hold others, which stages name among what they read
CHOSEN_IN = {"optimizer": "train.optimizer", "schedule": "train.schedule"}  # where the choice of such a group stands
COMPARED = ("approach", "experiment")  # groups whose choices are compared, each with the same other words
SUBSETS = ("target.train_images", "target.test_images")  # of a stage that learns labelled subsets of the target
OF_EPISODES = ("data", "views", "unknown_ways")  # keys of `test`, of a stage that tests on episodes
READ_BY_ALL = ("name", "seed", "resume", "checkpoint", "outputs")  # of the keys that stand in no group


def complete(config: DictConfig, overrides: list[str], choices: dict[str, str]) -> DictConfig:
    """Completes the config by its name, and puts it on top of the checkpoint's run's where a stage loads a checkpoint.

    Args:
        config: The config of the command line.
        overrides: The words of the command line.
        choices: Of groups.

    Raises:
        UserError: The stages are in a wrong order, a word is read by none of them, or the checkpoint is missing or not used.
    """
    built = build_stages(config)
    loads = any(stage.needs_checkpoint for stage in built)
    if loads != bool(config.checkpoint):
        raise UserError(
            f"recipe={choices.get('recipe', 'test')}: needs the run to test; add checkpoint=outputs/RUN"
            if loads and any(stage.continues_config for stage in built)
            else f"recipe={choices.get('recipe')}: needs what was learned; add checkpoint=outputs/RUN, or a classifier.pt"
            if loads
            else f"checkpoint={config.checkpoint}: is for testing a finished run; add recipe=test"
        )
    refuse_unread(overrides, built, bool(config.target.data))
    check_order(built)
    refuse_untrained(config, overrides, built, compares(overrides))
    if not compares(overrides):
        refuse_untested(overrides, built)
    if config.checkpoint and any(stage.continues_config for stage in built):
        config = with_checkpoint(config, overrides)
        refuse_unchanged(config, overrides, built)
        try:
            check(config)
        except UserError as error:
            if any(re.split("[:=]", str(error))[0] == key_of(word) for word in overrides):
                raise
            raise UserError(f"checkpoint={shown_path(config.checkpoint)}: its {error}") from error
    elif config.checkpoint:
        # Here too `task.*` means the test tasks.
        keys = [key for key in map(key_of, overrides) if key.startswith(("task.", "test.task."))]
        typed = {f"test.{key.removeprefix('test.')}": OmegaConf.select(config, key) for key in keys}
        for goal, value in typed.items():
            OmegaConf.update(config, goal, value, merge=False)
    else:
        typed_keys = {*map(key_of, overrides)}
        # What a preset or a data set says of test tasks alone does not stand before a word that was typed for all tasks.
        for goal in (f"test.{key}" for key in typed_keys if key.startswith("task.")):
            if goal not in typed_keys and OmegaConf.select(config, goal) is not None:
                OmegaConf.update(config, goal, None, merge=False)
    OmegaConf.update(config, "name", config.name or default_name(choices, config.recipe.source))
    return config


def refuse_unread(overrides: Sequence[str], built: Sequence[Stage], target: bool) -> None:
    """Refuses keys of the command line that none of the stages reads, so that `support=` without `recipe=predict` trains nothing.

    Args:
        overrides: The words of the command line.
        built: The stages.
        target: Whether the config has a target.

    Raises:
        UserError: One of them is not read.
    """
    single = {field.name for field in fields(Config) if field.default is not MISSING}
    read = {*READ_BY_ALL, *(key for stage in built for key in stage.reads)}
    for word in overrides:
        key, section = key_of(word), key_of(word).partition(".")[0]
        if section == "target" and not target and key != "target":
            raise UserError(f"{word}: there is no target; add recipe=transfer target=pneumoniamnist, say")
        whole = any(stage.needs_target for stage in built) and not any(stage.uses_transfer for stage in built)
        if whole and key in SUBSETS and not word.endswith("=null"):
            raise UserError(
                f"{word}: this recipe has no use for it; it takes all images of the target, and recipe=transfer subsets of them"
            )
        if (key in single - read and not word.endswith("=null")) or section in SECTIONS - read:
            readers = [name.lower() for name in stages.__all__ if section in getattr(stages, name).reads]
            advice = (
                f"it is for recipe={' and recipe='.join(readers)}" if readers else f"metarun help {key} says what has"
            )
            raise UserError(f"{word}: this recipe has no use for it; {advice}")


def compares(overrides: Sequence[str]) -> bool:
    """Whether words choose among ways that are compared, of which the other words need not concern each."""
    return any(key_of(word) in COMPARED for word in overrides)


def refuse_untrained(
    config: DictConfig, overrides: Sequence[str], built: Sequence[Stage], compared: bool = False
) -> None:
    """Refuses words for a training or a source that the recipe does not have.

    Args:
        config: The config of the command line.
        overrides: Its words.
        built: The stages.
        compared: Whether the command is one of several that are compared: it may then have words that concern the others alone.

    Raises:
        UserError: There is one.
    """
    keys = {key for stage in built for key in stage.trains_by()}
    read = {key for stage in built for key in stage.reads} | {key.partition(".")[0] for key in keys}
    if not any(stage.continues_config or stage.needs_data for stage in built):
        parts = {*unused(config), *wholes_of_training(overrides)}
        refuse_unused(overrides, parts, "what checkpoint= names is used as it was trained", read)
    elif any(stage.needs_checkpoint for stage in built):
        why = "it takes the weights of checkpoint= as they are, and none of its stages reads it"
        refuse_unused(overrides, TRAINING, why, read)
    elif not compared and could_be(config, built, keys):
        why = "none of its stages pretrains; recipe=pretrain_meta has one that does"
        refuse_unused(overrides, ["pretrain"], why, read)
        why = "it trains on no source; how the target is learned is for transfer=all and transfer.*, say"
        refuse_unused(overrides, TRAINING, why, read)
        if config.recipe.source or not keys:  # else the stage that trains says that it needs a source
            refuse_unused(overrides, unused(config), "it uses the target alone", read)


def refuse_untested(overrides: Sequence[str], built: Sequence[Stage]) -> None:
    """Refuses words for a test on episodes where no stage has one.

    Args:
        overrides: The words of the command line.
        built: The stages.

    Raises:
        UserError: There is one.
    """
    if any(stage.takes_episodes for stage in built):
        return
    for word in overrides:
        # A data set of several is chosen as data@test.data.NAME=NAME.
        key = word.partition("=")[0].rpartition("@")[2].lstrip("+~")
        section, _, name = key.partition(".")
        if section == "test" and name.partition(".")[0] in OF_EPISODES and not word.endswith("=null"):
            raise no_meta_test(name.partition(".")[0])


def could_be(config: DictConfig, built: Sequence[Stage], keys: Collection[str]) -> bool:
    """Whether the stages have their target, and what they train by is there; what is lacking they tell themselves."""
    there = all(OmegaConf.select(config, key) is not None for key in keys if key.partition(".")[0] in config)
    return there and all(config.target.data or not stage.needs_target for stage in built)


def unread(config: DictConfig, words: Sequence[str]) -> set[str]:
    """The words of a command line that its recipe has no use for.

    Args:
        config: The config that they make.
        words: All of them.

    Raises:
        UserError: The recipe names a stage that cannot be built.
    """
    built, found = build_stages(config), set[str]()
    for word in words:
        try:
            refuse_unread([word], built, bool(config.target.data))
            refuse_untrained(config, [word], built, compares(words))
            if not compares(words):
                refuse_untested([word], built)
        except UserError:
            found.add(word)
    return found


def with_checkpoint(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Takes the config of the checkpoint's run, with this command line's overrides on it.

    `task.*` here means the test tasks: what the method was trained with is a fact of the checkpoint. `algo=` may name
    the checkpoint's own method, whose keys (`algo.test_inner_steps`, say) can then be overridden.

    Args:
        config: The config of the command line.
        overrides: Its words.

    Raises:
        UserError: There is no such run, it is of another version, or a word chooses what the checkpoint brings.
    """
    weights = checkpoint.weights_file("checkpoint", config.checkpoint)
    folder = Path(config.checkpoint)
    stored_file = (folder if folder.is_dir() else weights.parent) / contents.CONFIG
    if not stored_file.is_file():
        raise UserError(
            f"checkpoint={shown_path(config.checkpoint)}: no config.yaml lies beside it; give the run folder that metarun made"
        )
    own = whole_config(stored_file, "test another run, or its weights in another folder")
    for key in ("recipe", "target", "transfer"):  # what is done with the weights is this command line's
        OmegaConf.update(own, key, config[key], merge=False)
    check_classes(own, stored_file, config)
    for word in overrides:
        key = key_of(word)
        if key == "algo" and len({node.algo._target_ for node in (config, own)}) == 1:
            continue
        # A group of whole commands: debug=, approach=, experiment=.
        of_the_whole = not re.search(r"[./]", key) and key not in config and (key not in CHOSEN_IN or "@" in word)
        if of_the_whole or key in ("preset", "algo"):
            raise UserError(
                f"{key}=: a checkpoint brings its own; override single keys instead (test.episodes=50, say)"
            )
        if key == "unsupervised" and config.unsupervised.get("_target_") not in (
            None,
            own.unsupervised.get("_target_"),
        ):
            raise UserError(
                f"{word}: a checkpoint brings how its training tasks were made; leave it out, or take unsupervised=null for "
                "validation tasks with labels"
            )
        target = CHOSEN_IN.get(key, key)
        goal = f"test.{target}" if target.startswith("task.") else target
        OmegaConf.update(own, goal, OmegaConf.select(config, target), merge=False, force_add=True)
    for key in ("checkpoint", "outputs", "resume"):
        OmegaConf.update(own, key, config[key], merge=False)
    own.name = config.name or own.name
    return own


def refuse_unchanged(config: DictConfig, overrides: Sequence[str], built: Sequence[Stage]) -> None:
    """Refuses words for what changes training alone, which would stand in the result of a test beside weights that know nothing of it.

    Args:
        config: That of the checkpoint's run, with the overrides on it.
        overrides: The words of the command line.
        built: The stages.

    Raises:
        UserError: There is one.
    """
    read = {key for stage in built for key in stage.reads}
    why = "it takes the weights of checkpoint= as they are"
    if config.wrapper and not getattr(get_class(config.wrapper._target_), "prepares", False):
        refuse_unused(overrides, ["wrapper"], f"{why}, and this wrapper changes training alone", read)
    averages = config.test.views > 1 and any(stage.takes_episodes for stage in built)
    if not averages and not any(stage.uses_transfer for stage in built):
        refuse_unused(
            overrides,
            ["augment"],
            f"{why}, and changes images in a test on episodes alone, with test.views=3, say",
            read,
        )


def refuse_other_weights(folder: Path, weights: Path) -> None:
    """Raises `UserError` if the stored result is of other weights than `weights` has by now."""
    if result.stored(folder).get(result.CHECKPOINT_DIGEST) != checkpoint.digest(weights):
        raise MadeOtherwise(
            f"{folder}: tested other weights than {weights} has now; test these beside it with resume=false"
        )
