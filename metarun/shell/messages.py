"""What Hydra, OmegaConf and the system say of a command, in one line and in the words of the command line."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from metarun.config.folder import CONF
from metarun.config.overrides import hint_of, is_free, key_of
from metarun.config.schema import Config
from metarun.config.validation import chosen_by, given_to, settings
from metarun.config.values import flat
from metarun.errors import ELSEWHERE, JobRefused, UserError, first_line, nearest
from metarun.renamed import renamed_choice, renamed_key
from metarun.text import listed

OF_CHECKPOINTS = {  # what a checkpoint brings, in words, and how it is named
    "algo": ("method", "algo=maml"),
    "data": ("data", "data=omniglot"),
    "encoder": ("encoder", "encoder=minilm"),
    "unsupervised": ("pseudo-labelled tasks", "unsupervised=cactus"),
    "wrapper": ("wrapper", "wrapper=self_training"),
}
MENDABLE = (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


def one_line(error: BaseException, typed: Sequence[str] | None = None) -> str:
    """What went wrong, and the nearest right name where a name is wrong.

    Args:
        error: What was raised.
        typed: The words of the command; None for those of this process.
    """
    words = sys.argv[1:] if typed is None else typed
    if isinstance(error, JobRefused):
        return error.message(lambda inner: one_line(inner, words))
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    found = re.match(r"In '([^']+)'", text)
    where = f"{found[1]}: " if found and found[1] not in ("config", "hydra/config") else ""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return where + unknown_choice(str(error.missing_cfg_file), list(error.options or []))
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        why = (
            "metarun --help shows how a command is written" if word.isalnum() else "brackets and commas may need quotes"
        )
        hint = meant(word) or f"; {why}"
        return f"{error.override}: cannot be read as key=value or group=choice{hint}"
    if isinstance(error, ConfigCompositionException) and "${algo}_${data}" in text:
        return "algo and data need one choice each; several make a sweep: -m algo=a,b"
    inner = error.__cause__ or error.__context__
    for cause in (error, inner):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if isinstance(cause, ConfigKeyError | ConfigAttributeError):
                return where + _unknown_key(cause.full_key, cause.parent_node, words)
            inside = is_dataclass(hint_of(cause.full_key, lambda path: None)) or is_free(f"{cause.full_key}.any")
            return where + _wrong_value(cause.full_key, first_line(cause), inside)
    if found := re.search(r"Could not override '([^']+)'", text):
        return where + _unknown_group(found[1], any(word.partition("=")[0] == found[1] for word in words))
    if found := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        search = " hydra/sweeper=optuna" if "interval(" in found[1] else ""
        return f"{found[1]}: is for a {'search' if search else 'sweep'}; add -m{search}"
    if found := re.match(r"Ambiguous value for argument '(.+)'", text):
        key, _, value = found[1].partition("=")
        keys = [known for known, _ in settings(Config)]
        if key.isidentifier() and key not in [*keys, *_groups()]:
            return f"{key}: there is no such key{nearest(key, keys)}"
        if re.fullmatch(r"0,0\d+|[1-9]\d{0,2}(,\d{3})+", value):
            number = value.replace(",", "." if value.startswith("0,") else "")
            return (
                f"{found[1]}: a comma separates the values of a sweep, which needs -m; one number is written {number}"
            )
        return f"{found[1]}: several values make a sweep, which needs -m; a list is written [a,b]"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, AssertionError):  # of Hydra's own code, which looks at its own keys so
        return "a setting of hydra.* is of another type than Hydra takes; metarun --hydra-help"
    if "integer string conversion" in text:
        return "a number has more digits than any setting takes"
    if "Config group override" in text:
        no_name = re.compile(r".*=(null|true|false|[-+.\d].*|\{.*)", re.IGNORECASE)
        given = next((word for word in words if key_of(word) in _groups() and no_name.fullmatch(word)), "algo")
        return f"{given}: was given no name of a choice; ~{key_of(given)} leaves the group out"
    return where + first_line(inner if where and inner else error)


def raised_by_hydra(error: BaseException) -> bool:
    """Whether an error comes out of Hydra's own code."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).is_relative_to(Path(hydra.__file__).parent)


# Types as OmegaConf calls them, and as people do.
KINDS = {
    "Integer": "whole number",
    "Float": "number",
    "Boolean": "truth value (true, false)",
}


# What OmegaConf says of a value that is none, where a node has keys of its own.
NO_NODE = (r"^Cannot assign.*Dict", r"is not a subclass of", r"^Cannot merge DictConfig")


def _wrong_value(key: str, message: str, node_below: bool) -> str:
    """What OmegaConf says of a key's value, in words; `node_below` says whether the key has keys of its own."""
    if (found := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message)) and found[2] in KINDS:
        whole = re.fullmatch(r"(-?\d+)\.0", found[1])
        written = f"; write {whole[1]}" if whole and found[2] == "Integer" else _in_seconds(key, found[1])
        written = written or _as_a_sweep(key, found[1])
        return f"{key}={found[1]}: is no {KINDS[found[2]]}{written}"
    if found := re.match(r"Value '(.*)' is not a valid bool", message):
        return f"{key}={found[1]}: is no {KINDS['Boolean']}"
    if found := re.match(r"Interpolation key '(.*)' not found", message):
        return f"{key}: ${{{found[1]}}} stands for the value of a key {found[1]}, and there is none; no path or text can have ${{ in it"
    if found := re.match(r"Invalid value assigned: \w+ is not a ListConfig", message):
        return f"{key}: must be a list; write [a,b], or [a] for one value"
    if "is not Optional" in message and not node_below:
        return f"{key}=null: must have a value; leave the word out for the usual one"
    if any(re.search(of, message) for of in NO_NODE) or "is not Optional" in message:
        group = _chooses(key)
        advice = f"{group}=NAME chooses one" if group else f"metarun help {key} lists them"
        return f"{key}: has settings of its own, and is no single value; {advice}"
    return f"{key}: {message}"


def _in_seconds(key: str, value: str) -> str:
    """A time with a unit in seconds, for a key that takes these; an empty string for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|d)", value)
    if not found or not key.endswith("seconds"):
        return ""
    seconds = float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[found[2]]
    return f"; it is in seconds: {seconds:.10g}"


def _as_a_sweep(key: str, value: str) -> str:
    """How several values are given, where a person wrote them for one key in another way; an empty string where nobody did."""
    if found := re.fullmatch(r"(-?\d+)(?:-|\.\.+|:)(\d+)", value):
        return f"; several are a sweep: -m '{key}=range({found[1]},{int(found[2]) + 1})'"
    if found := re.fullmatch(r"\[(.+)\]", value):
        return f"; several are a sweep: -m {key}={found[1].replace(' ', '')}"
    return ""


def _chooses(key: str) -> str | None:
    """The group that chooses the node `key`, `target` of `target.data`; None where none does."""
    from metarun.config.reference import Reference

    above, home = key.partition(".")[0], Reference([CONF]).group_of(key)
    return home[0] if home and home[1] == key else above if above in _groups() else None


def _node_of(group: str) -> str | None:
    """The node that a group fills below another, `train.optimizer` of `optimizer`; None where there is none."""
    from metarun.config.reference import Reference

    choices = Reference([CONF]).groups.get(group, {}).values()
    return next((place for one in choices for place, _, _ in one.nodes if place.endswith(f".{group}")), None)


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def unknown_choice(name: str, choices: list[str]) -> str:
    """`algo/mmal` is no file of that group, nor `algo/peer/mmal` one of a folder in it."""
    group, _, choice = name.rpartition("/")
    if old := renamed_choice(group, choice):
        return old
    if not group.startswith("hydra/"):
        group, _, choice = name.partition("/")
        folders = (CONF / group).glob("*/*.yaml")
        choices = [*choices, *sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in folders)]
    there_are = f"; there are {listed(choices)} (metarun help {group})" if choices else ""
    own = next((one for one in choices if _plain(one) == _plain(choice)), None)
    near = f"; did you mean {own}?" if own else _of_ones_own(group, choice)
    if choice in ("all", "*"):
        near = f"; all of them are a sweep: -m '{group}=glob(*)'"
    near = near or (_of_a_library(choice) if group == "data" else "")
    near = near or nearest(choice, choices)
    if not near and choice.isidentifier() and (others := sorted(CONF.glob(f"*/{choice}.yaml"))):
        near = f"; did you mean {' or '.join(f'{path.parent.name}={choice}' for path in others[:3])}?"
    return f"{group}={choice}: there is no such choice{near or there_are}"


def _plain(name: str) -> str:
    """A name in small letters and digits alone."""
    return re.sub(r"[\W_]", "", name).lower()


def _of_ones_own(group: str, value: str) -> str:
    """How files of one's own are given, where their path stands in place of a choice; an empty string for what is no path."""
    if group not in ("data", "target", "encoder") or not (re.search(r"[/\\~.]", value) or Path(value).exists()):
        return ""
    if group == "encoder":
        return f"; the backbone of a run is encoder.from={value}"
    root = f"{group}.root" if group == "data" else f"{group}.data.root"
    return f"; images of your own are {group}=folder {root}={value}, and texts {group}=text {root}={value}"


def _of_a_library(name: str) -> str:
    """How a data set that a library has, under this name in other letters, is asked for; an empty string where none has it."""
    from metarun.data.library_catalog import RELEASES

    found = [
        f"data={library} data.dataset={one}"
        for library, sets in RELEASES.items()
        for one in sets
        if one.lower() == _plain(name)
    ]
    return f"; {' or '.join(found)} is that of a library" if found else ""


def _of_other_choices(key: str) -> str:
    """Where other choices than the config's have a key, which they are; for a word alone the keys that end so."""
    from metarun.config.reference import Reference

    reference = Reference([CONF])
    if "." not in key:
        return nearest(key, reference.words)
    found = [f"{choice.group}={choice.name}" for choice, _ in reference.explained(key)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; it is a key of {', '.join(found[:3])}{more} (metarun help {key})" if found else ""


def _unknown_group(name: str, typed: bool) -> str:
    """A group of which the config has no choice; `typed` says whether a word names it, so that it is a folder at least."""
    group, _, place = name.partition("@")
    folder, _, inside = name.partition("/")
    if old := renamed_key(group):
        return old
    if typed and inside:
        return f"{name}: is a folder of the group {folder}; write {folder}={inside}/NAME"
    if typed and name == group:
        return f"{name}: is a group of your own, of which nothing else has a choice; write +{name}=NAME"
    if typed and f"{place}.{group}" in dict(settings(Config)):
        return f"{name}: this recipe has none; {chosen_by(f'{place}.{group}')}"
    return f"{name}: there is no such group{nearest(group, _groups())}"


# Groups that are no part of the config, whose files say where their keys lie.
OF_OTHER_PACKAGES = ("approach", "debug", "experiment", "optimizer", "preset", "schedule")


def _unknown_key(key: str, parent: Any, words: Sequence[str]) -> str:
    """A key that the config does not have, wherever it was written; `parent` is the node that lacks it, `words` are the command's."""
    typed = next((word for word in map(key_of, words) if word.startswith(f"{key}.")), "")
    if typed and key in _groups():  # whose files set keys that lie elsewhere
        home = _node_of(key)
        near = (
            f"did you mean {home}{typed.removeprefix(key)}?"
            if home
            else f"{key}=NAME chooses one, and has no keys below"
        )
        return f"{typed}: there is no such key; {near}"
    if key in OF_OTHER_PACKAGES:  # the file's keys went below its group
        return (
            f"{key}: there is no such key; the file must begin with the line '# @package {_node_of(key) or '_global_'}'"
        )
    if old := renamed_key(key):
        return old
    if key.startswith("usual.schedule."):  # as it is seen from `train.schedule`, where no schedule was chosen
        typed = key.replace("usual", "train", 1)
        hint = _of_other_choices(typed) or "; schedule=NAME chooses one, and metarun help schedule tells what each has"
        return f"{typed}: there is no such key{hint}"
    above, _, tail = key.rpartition(".")
    beside = [name for name in map(str, parent) if name != "hydra" and not name.startswith("_")]
    known = [name for name in flat(OmegaConf.to_container(parent._get_root())) if not name.startswith("hydra.")]
    if key in known:  # with its dots, in a file
        return f"{key}: a file says this without a dot: {tail} stands further in, below {above}"
    nodes = {name.rpartition(".")[0] for name in known} - {""}
    near = _addition(key, parent) or (nearest(tail, beside, above) if above else "")
    if not above and key not in ELSEWHERE and not any(name.endswith(f".{key}") for name in (*known, *nodes)):
        near = _as_ends(key)
    if not key.startswith("hydra."):  # to which no key of a run comes near
        near = near or nearest(tail, {*(() if above else beside), *known, *nodes, *_groups()} - {key})
    if not near:
        near = (f"; {above} has {listed(beside)}" if above and beside else "") + _of_other_choices(key)
    if above == "encoder" and "_target_" not in parent:
        near = "; no encoder is chosen: add encoder=efficientnet_lite0, say"
    if above in OF_CHECKPOINTS and any(word.startswith("checkpoint=") for word in words):
        what, example = OF_CHECKPOINTS[above]
        near = f"; to override a setting of the checkpoint's {what}, name the {what} too ({example}, say)"
        if not _continues_config(parent._get_root()):
            near = f"; the checkpoint brings its own {what}, and this recipe changes no setting of it"
    return f"{key}: there is no such key{near}"


def _as_ends(word: str) -> str:
    """The keys of other choices that end in a word; an empty string where none does."""
    from metarun.config.reference import Reference

    found = sorted(known for known in Reference([CONF]).words if known.endswith(f".{word}") and "=" not in known)
    return f"; did you mean {', '.join(found[:3])}?" if found else ""


def _continues_config(config: Any) -> bool:
    """Whether the recipe of a config goes on with the config of its checkpoint's run, which can then be overridden."""
    from metarun.runs.building import build_stages  # here: it has torch imported

    try:
        return any(stage.continues_config for stage in build_stages(config))
    except UserError:  # of a recipe that is wrong itself, which is told after this key is right
        return True


def _addition(key: str, parent: Any) -> str:
    """How a setting is given that the class of a node has and its file leaves out; an empty string where it has none of this name."""
    above, _, name = key.rpartition(".")
    target = parent.get("_target_") if isinstance(parent, DictConfig) else None
    if not isinstance(target, str) or not is_free(key):
        return ""
    try:
        takes = name in inspect.signature(get_class(target)).parameters
    except Exception:  # of a class that cannot be imported, or does not say what it takes, nothing is known
        return ""
    given = next((mark.names for node, hint in settings(Config) if node == above and (mark := given_to(hint))), ())
    return f"; its file leaves this setting of {target} out; +{key}=... gives it" if takes and name not in given else ""


# Words that stand first in commands of other programs, and what they are here.
VERBS = {
    "list": "metarun help lists what can be chosen, metarun runs the runs so far",
    "resume": "the same command, given again, goes on",
    "run": "no verb is needed: metarun algo=maml data=omniglot, say, is a run",
    "start": "no verb is needed: metarun algo=maml data=omniglot, say, is a run",
    "sweep": "a sweep is written metarun -m algo=maml,protonet",
    "version": "metarun --version tells it",
}


def meant(word: str) -> str:
    """What was meant by words that Hydra cannot read, `; did you mean recipe=report?` say; an empty string where nobody knows.

    Args:
        word: The words as they were typed: `report`, `algo:maml`, `algo maml`, or what follows the hyphens of `--algo=maml`.
    """
    if word in VERBS:
        return f"; {VERBS[word]}"
    if re.fullmatch(r"[\w./@+~-]+=\S*(\s+[\w./@+~-]+=\S*)+", word):
        return "; these are several words, around which no quotes stand"
    if word.endswith(",") and "=" in word:
        return "; words stand apart by spaces alone, without commas"
    if "=" not in word and (os.sep in word or Path(word).exists()):
        return "; a path is the value of a key: runs=[PATH,PATH], checkpoint=PATH, images=PATH or data.root=PATH, say"
    found = re.fullmatch(r"([\w./]+)[ :=]+([\w./~-]+)", word)
    of_group = found and found[1] != "recipe" and (CONF / found[1]).is_dir()
    if found and (of_group or (":" in word and "=" not in word)):
        right = f"{found[1]}={found[2]}"
        return f"; did you mean {right}?" if right != word else _of_ones_own(found[1], found[2])
    keys = [key for key, _ in settings(Config)]
    if found and "=" not in word.partition(found[1])[2][1:]:  # an option of another program
        right = f"{found[1]}={found[2]}"
        known = found[1] in keys
        return nearest(found[1], keys) if not known else f"; did you mean {right}?" if right != word else ""
    if (CONF / word).is_dir() and word.isidentifier():
        return f"; a choice of this group is written {word}=NAME, and metarun help {word} lists them"
    if word in keys:
        return f"; a key has a value, {word}=VALUE, and metarun help {word} says more"
    chosen = sorted(CONF.glob(f"*/{word}.yaml")) if word.isidentifier() else []
    words = [f"{path.parent.name}={word}" for path in chosen]
    return f"; did you mean {' or '.join(words[:3])}?" if words else ""
