"""`recipe=inspect`: a data set looked at before it is used, on the terminal and as a page."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from metarun import files
from metarun.config import Node, check, construct, nodes_of, task_of
from metarun.config.overrides import key_of, make_literal
from metarun.config.task_schema import SIZES
from metarun.core import TaskShape
from metarun.data.source import Split
from metarun.encoders.building import encoded
from metarun.engine.hardware import check_device
from metarun.errors import Incomplete, UserError
from metarun.inspection import facts, page, terminal, timing
from metarun.progress import progress_bar
from metarun.runs import contents
from metarun.runs.folder import create
from metarun.runs.logger import start_logging
from metarun.text import shell_path

Role = Literal["source", "target", "test"]


def run(config: DictConfig, overrides: list[str], choices: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Looks at the data sets of `data=`, of `target=` and of `test.data=`; leaves `index.html` and `inspection.json`.

    Returns:
        What was found, and under `folder` where it lies.

    Raises:
        UserError: The config is wrong.
        Incomplete: A data set cannot be used; what could be told of it was.
    """
    check(config)
    make_literal(config)
    check_device(config.hardware.device)
    start_logging()
    train, test = task_of(config, "train"), task_of(config, "test")
    tasks: dict[Split, TaskShape] = {"train": train, "val": test, "test": test}
    found = []
    with ExitStack() as stack:

        def progress(what: str, total: int) -> Callable[[int], None]:
            return stack.enter_context(progress_bar(what, total)) if total else lambda done: None

        source = _source_is_meant(config, overrides)
        for name, node, role in _nodes(config, choices, source):
            asked = tasks if role == "source" else {}
            found.append(facts.inspect(name, node, asked, progress, as_target=role == "target"))
    time = _time(config, found) if source else {"problem": "no data= is named beside the target"}
    folder = Path(config.outputs) / "inspect" / _folder_name(config, choices, source)
    create(folder)
    told = {"data_sets": [{key: value for key, value in one.items() if key != "source"} for one in found], "time": time}
    text = page.page(found, time, tasks, shlex.join(["metarun", *command[3:]]))
    files.save_bytes(folder / "inspection.json", json.dumps(told, indent=1).encode())
    files.save_bytes(folder / contents.PAGE, text.encode("utf-8", "replace"))
    terminal.show(found, time, tasks)
    print(f"page     {shell_path(folder / contents.PAGE)}")
    problems = [f"{one['name']}: {one['problem']}" for one in found if one["problem"]]
    if problems:
        raise Incomplete("; ".join(problems), {**told, "folder": str(folder)})
    return {**told, "folder": str(folder)}


def _source_is_meant(config: DictConfig, overrides: list[str]) -> bool:
    """Whether the usual data set is meant too: not where a target alone is named."""
    named = {re.split(r"[.@]", key_of(word))[0] for word in overrides}
    return not config.target.data or not named.isdisjoint(("data", "experiment"))


def _nodes(config: DictConfig, choices: dict[str, str], source: bool) -> list[tuple[str, Node, Role]]:
    """The data sets that the config names: what each is called, its node, and what it is for; of the source tasks are drawn."""
    found: list[tuple[str, Node, Role]] = []
    if source:
        sets = config.data.get("sets")
        inside = nodes_of(sets, "data.sets") if sets else {choices.get("data", "data"): Node(config.data, "data")}
        found += [(name, node, "source") for name, node in inside.items()]
    if config.target.data:
        found.append((f"{choices.get('target', 'target')} (target)", Node(config.target.data, "target.data"), "target"))
    tests = nodes_of(config.test.data, "test.data", SIZES) if config.test.data else {}
    return [*found, *((f"{name} (test)", node, "test") for name, node in tests.items())]


def _time(config: DictConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    if any(one["problem"] for one in found):
        return {"problem": "the data cannot be used yet"}
    try:
        # A single data set has been built already; several are brought to one shape.
        data = construct(config.data, "data") if config.data.get("sets") else found[0]["source"]
        (data,) = encoded([data], config.encoder)
    except UserError as error:
        return {"problem": str(error)}
    return timing.estimate(config, data)


def _folder_name(config: DictConfig, choices: dict[str, str], source: bool) -> str:
    """What the data are called: each choice that is looked at, and of a folder its own name."""
    looked = [("data", config.data)] if source else []
    if config.target.data:
        looked.append(("target", config.target.data))
    words = [word for group, node in looked for word in (choices.get(group, group), Path(node.get("root") or "").name)]
    name = config.name or "-".join(filter(None, [*words, *(config.test.data or {})]))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "data"
