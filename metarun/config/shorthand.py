"""Words of the command line that stand for others: lists of data sets, `preset=paper`, and no choice of a group, `wrapper=null`.

Hydra would merge the files of a list `data=[a,b]` or `test.data=[a,b]` into one node. It is therefore written as one choice and
a node for each of its data sets, which has all settings of its file: `data=domains +data@data.sets.a=a +data@data.sets.b=b`.
`preset=paper` names a folder of presets, in which method and data choose the file: `preset=paper/${algo}_${data}`. What was
typed names the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from metarun.config.folder import CONF
from metarun.config.task_schema import SIZES
from metarun.errors import UserError, nearest

MANY = "domains"  # the choice of the group `data` that holds several data sets
PLACES = {"data": "data.sets", "test.data": "test.data"}  # the keys that take a list, and where its nodes lie
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}
IMPLIED = {"encoder.from": "encoder=run"}  # a setting that one choice of its group has, and no other
NODE = re.compile(r"\+data@(?P<place>data\.sets|test\.data)\.(?P<name>\w+)=(?P<choice>.*)")
PAPER, OF_THE_RUN = "paper", "/${algo}_${data}"  # the folder of the papers' presets, and the file in it
OWN_TASK = re.compile(rf"test\.data\.\w+\.({'|'.join(SIZES)})=.*", re.DOTALL)


def expanded(words: Iterable[str], sweep: bool = False) -> list[str]:
    """The words as Hydra has to be given them.

    Reading what was expanded before changes nothing.

    Args:
        words: Overrides. `wrapper=null` takes no choice of a group; `encoder.from=RUN` takes `encoder=run`. `data=[a,b]` names
            two choices of the group `data`; `[left:folder,right:folder]` gives names to two data sets of one choice. A list of one
            data set of its own name is that choice. Several lists, which a comma outside of brackets separates, are a sweep's, and
            left for its jobs. `preset=paper` is the preset of the method on the data set in the folder of that name.
        sweep: Whether they are a sweep's, whose jobs may have a method each, and so a paper each.

    Raises:
        UserError: A list has no data set, one twice, or a name that none can have.
    """
    found: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        named = equals and key in PLACES and (bracketed(value) or (key == "test.data" and NAME.fullmatch(value)))
        if named and value != "null":
            found += _nodes(key, value)
        elif key in GROUPS and value == "null":
            found.append(f"~{key}")  # a group without a choice, to Hydra
        elif equals and OWN_TASK.fullmatch(word):
            found.append(f"+{word}")
        elif word == f"preset={PAPER}" and not sweep:
            found.append(word + OF_THE_RUN)
        else:
            found.append(word)
    keys = {word.partition("=")[0] for word in found if not word.endswith("=null")}
    implied = [choice for key, choice in IMPLIED.items() if key in keys and choice.partition("=")[0] not in keys]
    return [*implied, *found]


def bracketed(value: str) -> bool:
    """Whether a value is one list, and not several of a sweep."""
    return value.startswith("[") and value.endswith("]") and value.count("[") == value.count("]") == 1


def _nodes(key: str, value: str) -> list[str]:
    sets: dict[str, str] = {}
    for item in filter(None, (part.strip(" '\"") for part in value.strip("[]").split(","))):
        name, _, choice = item.partition(":")
        if not NAME.fullmatch(name) or "null" in (name, choice):
            raise UserError(
                f"{key}={value}: {name} is no name; data sets are written [omniglot,cifar_fs] or [NAME:folder]"
            )
        if name in sets:
            raise UserError(
                f"{key}={value}: {name} is named twice; two of one kind are written [one:{name},other:{name}]"
            )
        sets[name] = choice or name
    if not sets:
        raise UserError(f"{key}={value}: names no data set; write {key}=[omniglot,cifar_fs], say")
    if key == "data" and len(sets) == 1 and (alone := next(iter(sets))) == sets[alone]:
        return [f"data={alone}"]
    nodes = [f"+data@{PLACES[key]}.{name}={choice}" for name, choice in sets.items()]
    return [f"data={MANY}", *nodes] if key == "data" else nodes


def folded(words: Iterable[str]) -> list[str]:
    """The inverse of `expanded`: the words as a person types them, a list where its first data set stood."""
    words = [word.replace(PAPER + OF_THE_RUN, PAPER) if word.startswith("preset=") else word for word in words]
    sets: dict[str, list[str]] = {}
    for word in words:
        if node := NODE.fullmatch(word):
            name, choice = node["name"], node["choice"]
            sets.setdefault(node["place"], []).append(name if name == choice else f"{name}:{choice}")
    found: list[str] = []
    for word in words:
        node = NODE.fullmatch(word)
        if node is None:
            if word.startswith("~") and word[1:] in GROUPS:
                found.append(f"{word[1:]}=null")
            elif word != f"data={MANY}" or PLACES["data"] not in sets:
                found.append(word[1:] if word.startswith("+") and OWN_TASK.fullmatch(word[1:]) else word)
        elif node["place"] in sets:
            key = next(key for key, place in PLACES.items() if place == node["place"])
            found.append(f"{key}=[{','.join(sets.pop(node['place']))}]")
    return found


def keys_of(words: Iterable[str]) -> set[str]:
    """The keys and groups that words override, as they are typed: `test.data` of its list, `algo@pretrain` apart from `algo`."""
    return {word.lstrip("+~").partition("=")[0] for word in folded(words)}


def folded_choices(choices: Mapping[str, str], config: DictConfig) -> dict[str, str]:
    """Hydra's choices of groups, with `data` naming each data set of a list, between commas.

    Args:
        choices: As Hydra has them.
        config: The config that they made.
    """
    place = f"data@{PLACES['data']}."
    sets = [str(name) for name in config.data.get("sets") or {} if place + str(name) in choices]
    found = {
        key: choice for key, choice in choices.items() if not key.startswith(("data@data.sets.", "data@test.data."))
    }
    return {**found, "data": ",".join(sets)} if sets and found.get("data") == MANY else found


def check_preset(words: Iterable[str], choices: Mapping[str, str]) -> None:
    """Checks that the preset that was chosen is there: Hydra passes one over that is not, since the one that applies by itself need not be.

    Args:
        words: The overrides that Hydra was given.
        choices: Hydra's choices of groups.

    Raises:
        UserError: There is no such preset, or there are no settings of the paper of this method on this data set.
    """
    chosen, alone = choices.get("preset"), OF_THE_RUN[1:]
    by_itself = alone.replace("${algo}", str(choices.get("algo"))).replace("${data}", str(choices.get("data")))
    if not isinstance(chosen, str) or chosen == by_itself:
        return
    folder, _, name = chosen.rpartition("/")
    there = GlobalHydra.instance().config_loader().get_group_options(f"preset/{folder}".rstrip("/"))
    if name in there:
        return
    if f"preset={PAPER}{OF_THE_RUN}" in words:
        raise UserError(
            f"preset={PAPER}: there is none for algo={choices['algo']} on data={choices['data']}, only for {', '.join(there)}"
        )
    raise UserError(
        f"preset={chosen}: there is no such choice{nearest(name, there, folder) or '; metarun help preset'}"
    )
