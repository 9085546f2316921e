"""Run folders: named by what was overridden, without a time, so that the same command finds its own run again."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun import files
from metarun.config import Config, flat, to_container
from metarun.config.overrides import key_of
from metarun.config.validation import check_name
from metarun.config.yaml_files import has_alias
from metarun.errors import MadeOtherwise, UserError
from metarun.renamed import refuse_old_words
from metarun.runs import contents
from metarun.text import printable, shell_path, shown_path
from metarun.trust import interpolations

# Say where or how, not what. With `hardware.processes=2` a run that was begun by one process goes on.
UNNAMED = (
    "outputs",
    "resume",
    "name",
    "experiment",
    "hardware.processes",
    "hardware.threads",
    "train.save_every",
    "train.save_seconds",
)
DIGEST = 8  # characters at the end of a folder's name that does not say all
LONGEST = 72  # characters of a folder's name
LONGEST_EARLIER = 120  # up to version 0.2
# An override that `key-value` is one to one with, on file systems that do not tell capitals either. A digest of eight
# characters and the number of a repeat have no hyphen, which every such part has.
EXACT = re.compile(r"[a-z][a-z0-9_.]*=[a-z0-9.-]([a-z0-9._-]*[a-z0-9])?")
# What may differ between the two sittings of one run: it changes no number beyond float order.
FREE = (
    "outputs",
    "resume",
    "runs",
    "recipe.run",
    "hardware.device",
    "hardware.channels_last",
    "hardware.processes",
    "hardware.threads",
    "hardware.vectorize",
    "hardware.record",
    "hardware.task_chunk",
    "train.save_every",
    "train.save_seconds",
)


def folder_name(overrides: Sequence[str], named: bool, source: bool = True, longest: int = LONGEST) -> str:
    """Names a run's folder: readable, one to one with what was overridden, and in need of quotes nowhere.

    `key-value` for each override, in alphabetical order, with `__` between them. Where that is cut, or says less than was
    typed (other characters, a path's last two parts for the whole), a digest of the whole comes last.

    Args:
        overrides: As `metarun.config.overrides.canonical` writes them; of two for one key the last counts.
        named: Whether the run's name lacks the data and the method, so that they belong here.
        source: Whether the recipe uses a source, whose data and method are then in the run's name.
        longest: The most characters.

    Returns:
        Letters of ASCII, digits and `._-`; `default` without any override.
    """
    kept = _naming(overrides, named, source)
    if not kept:
        return "default"
    slug = "__".join(filter(None, map(_slug, kept)))
    if len(slug) <= longest and all(EXACT.fullmatch(word) and "__" not in word for word in kept):
        return slug
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:DIGEST]
    return "__".join(filter(None, (slug[: longest - len(digest) - 2].rstrip("_.-"), digest)))


def _naming(overrides: Sequence[str], named: bool, source: bool) -> list[str]:
    """The overrides that name a folder, sorted. An experiment is in the run's name, unless that was given."""
    left_out = {*UNNAMED, *(() if named else name_parts(source))}
    if any(key_of(override) == "name" for override in overrides):
        left_out.remove("experiment")
    latest = {override.partition("=")[0]: override for override in overrides}
    # `algo@pretrain` is no `algo`, which is in the run's name.
    return sorted(word for key, word in latest.items() if key.lstrip("+~") not in left_out)


def _slug(word: str) -> str:
    """What can be read of an override in a folder's name."""
    key, _, value = word.partition("=")
    if value.startswith("/"):
        value = "_".join(Path(value).parts[1:][-2:])
    text = f"{key.lstrip('+~')}-{value}" if value else key
    return re.sub(r"__+", "_", re.sub(r"[^A-Za-z0-9._-]+", "_", text)).strip("_")


def earlier_name(overrides: Sequence[str], named: bool, source: bool = True) -> str:
    """Writes the name that version 0.1 gave to the folder of these overrides."""
    text = re.sub(r"[^\w.,=+~@-]+", "_", ",".join(_naming(overrides, named, source)).replace("'", "")) or "default"
    if len(text) > LONGEST_EARLIER:
        text = f"{text[: LONGEST_EARLIER - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def default_name(choices: Mapping[str, str], source: bool, checkpoint: str | None = None) -> str:
    """Returns the experiment's name, or `<data>-<algo>`; for a checkpoint that of the run that made it, if it has one.

    `source` tells whether the recipe uses a source.
    """
    if checkpoint:
        path = Path(checkpoint)
        stored = (path if path.is_dir() else path.parent) / contents.CONFIG
        if stored.is_file():
            return str(stored_config(stored, "give the checkpoint's run a name= of its own").get("name") or "test")
    return named_after(["experiment"] if choices.get("experiment") else name_parts(source), choices)


def name_parts(source: bool) -> list[str]:
    """The groups that a run is named after: of the source, if the recipe uses one, and of the target."""
    return [*(["data", "algo"] if source else []), "target", "transfer"]


def named_after(groups: Iterable[str], choices: Mapping[str, str]) -> str:
    """The choices of these groups, where there is one: `<data>-<algo>`, and with a target `<data>-<algo>-<target>-<transfer>`."""
    name = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", choices[group]) for group in groups if choices.get(group))
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9].rstrip('-_.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def choose_folder(config: DictConfig, overrides: list[str]) -> Path:
    """Chooses `outputs/<name>/<overrides>`; `resume=false` takes the next free `...__2`, `...__3`, and later commands go on there.

    A folder that an earlier version made of the same overrides is gone on with.
    """
    check_name(config.name)
    named = any(key_of(override) in ("name", "experiment", "checkpoint") for override in overrides)
    parent: Path = Path(config.outputs) / config.name
    source = bool(config.get("recipe", {}).get("source", True))
    name = folder_name(overrides, named, source)
    former = [word for word in overrides if key_of(word) != "experiment"]
    earlier, before = earlier_name(former, named, source), folder_name(former, named, source)
    longer = folder_name(former, named, source, LONGEST_EARLIER)

    def attempts(first: str, mark: str) -> dict[int, Path]:
        """Finds the folders that are there, by the number of the attempt."""
        numbers = {found.name[len(first) :] or f"{mark}1": found for found in parent.glob(f"{glob.escape(first)}*")}
        return {
            int(text.removeprefix(mark)): found
            for text, found in numbers.items()
            # As many digits as a digest has are one: of other overrides, which are written alike.
            if text.startswith(mark)
            and re.fullmatch(rf"\d{{1,{DIGEST - 1}}}", text.removeprefix(mark))
            and found.is_dir()
        }

    found = {
        **attempts(earlier, "~"),
        **attempts(longer, "__"),
        **attempts(before, "__"),
        **attempts(name, "__"),
    }
    last = max(found, default=0)
    if last and config.resume:
        return found[last]
    return parent / (name if not last else f"{name}__{last + 1}")


def create(folder: Path) -> None:
    """Makes a folder below `outputs`.

    Raises:
        UserError: It cannot be made, or has a pipe, say, where a run has a file, for which the run would wait without end.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if kind := files.special(path):
            raise UserError(f"{shown_path(path)}: is {kind}, where a run has its files; delete it")
    try:
        files.make_folder(folder)
    except OSError as error:
        check_writable(folder)  # which knows what is in the way, a link to nowhere, say
        raise UserError(f"outputs={folder}: cannot be written ({error.strerror}); choose another outputs=") from error


def check_writable(folder: Path) -> None:
    """Checks that a folder can be made, or written in where it is there; makes nothing.

    Raises:
        UserError: It, or the nearest above it that is there, is no folder, or lets this user make nothing in it.
    """
    there = next(above for above in (folder, *folder.absolute().parents) if os.path.lexists(above))
    if not there.is_dir():
        raise UserError(
            f"{shown_path(folder)}: cannot be written, for {shown_path(there)} is no folder; choose another outputs="
        )
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{shown_path(there)}: nothing can be written there by this user; choose another outputs=")


def stored_config(path: Path, advice: str) -> DictConfig:
    """Reads the `config.yaml` of a run.

    Args:
        path: The file.
        advice: What to do where it is damaged, to follow a semicolon.

    Raises:
        UserError: It cannot be read, is no mapping of keys, has an alias, or has what is looked up where it is read, which could
            be a secret of the reader's; it names the file, what is wrong, and `advice`.
    """
    try:
        text = path.read_text(encoding="utf-8")  # once: what is looked at is what is taken
        if has_alias(text):
            raise UserError(f"{shown_path(path)}: is damaged (it has an alias (*), which no run stores); {advice}")
        found = OmegaConf.load(io.StringIO(text))
        # It was written whole, and so ends its last line.
        if isinstance(found, DictConfig) and found and text.endswith("\n"):
            looked_up = next(interpolations(found), None)
            if looked_up is None:
                return found
            raise UserError(
                f"{shown_path(path)}: is damaged ({printable(looked_up)} is no value that a run stores); {advice}"
            )
    except OSError as error:
        raise files.unread(path, error, advice) from error
    except (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException):
        pass
    raise UserError(f"{shown_path(path)}: is damaged ({files.damage(path)}); {advice}")


def whole_config(path: Path, advice: str) -> DictConfig:
    """The `config.yaml` of a run, with the defaults of what an earlier version of metarun did not know.

    Args:
        path: The file.
        advice: As `stored_config` takes it.

    Raises:
        UserError: It cannot be read, or has what this version of metarun does not know.
    """
    older = stored_config(path, advice)
    refuse_old_words(older, path)
    try:
        found = OmegaConf.merge(OmegaConf.structured(Config), older)
    except OmegaConfBaseException as error:
        why = f"{error.full_key}: {str(error).splitlines()[0]}".removeprefix("None: ").removeprefix(": ")
        raise UserError(f"{shown_path(path)}: cannot be used ({why}); is it of another version of metarun?") from error
    assert isinstance(found, DictConfig)
    return found


def identity(config: DictConfig) -> dict[str, Any]:
    """What tells a run from those that `refuse_other_config` would not let go on with it, as JSON values by key.

    What is off is left out, as a later version of metarun may have more of it, and so is the run's name.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    values = flat(to_container(config))
    return {key: plain(value) for key, value in values.items() if value and key not in FREE and key != "name"}


def refuse_other_config(folder: Path, config: DictConfig) -> None:
    """Raises `UserError` with the keys that differ if the folder was made with another config.

    A key that only one of them knows is of another version of metarun, and makes no difference while it is off.
    """
    stored = flat(
        OmegaConf.to_container(
            stored_config(
                folder / contents.CONFIG, "delete it if the run is this one, or start over beside it with resume=false"
            )
        )
    )
    asked = flat(to_container(config))
    missing: Any = "absent"

    def differs(key: str) -> bool:
        part = key.partition(".")[0]
        if stored.get("recipe.source") is False and not any(name.startswith(f"{part}.") for name in stored):
            return False  # a part of the config that only a recipe with a source uses
        if key in stored and key in asked:
            return bool(stored[key] != asked[key])
        return bool(stored.get(key) or asked.get(key))

    differing = [
        f"{key} {stored.get(key, missing)} -> {asked.get(key, missing)}"
        for key in sorted({*stored, *asked})
        if key not in FREE and differs(key)
    ]
    if differing:
        raise MadeOtherwise(
            f"{shell_path(folder)} was made with another config ({'; '.join(differing)}); "
            "give this run a name=, or start over beside it with resume=false"
        )
