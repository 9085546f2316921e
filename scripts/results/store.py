"""The results that are kept: `result.json` of each run without what no table shows, in `data/`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metarun.config.shorthand import expanded
from metarun.renamed import current_choices
from metarun.runs import contents
from metarun.runs.result import (
    AFTER_INNER_STEPS,
    CHOICES,
    COMMAND,
    MADE_BY,
    OVERRIDES,
    STAGES,
    TARGET_CURVE,
    TARGET_VALUES,
    TEST_CURVES,
    UNTRAINED,
    key,
    restored,
)

# Overrides that say where or how, or that rows add.
UNSHOWN = ("outputs", "resume", "name", "seed", "hardware.processes")
DROPPED = (key(UNTRAINED, AFTER_INNER_STEPS), TEST_CURVES, MADE_BY, "peak_memory")


def load(path: Path) -> dict[str, Any] | None:
    """A stored result, with the choices of an older one under today's names; None if there is none.

    An infinite error is one again, and a list of data sets is a choice for each of them.
    """
    if not path.is_file():
        return None
    result = restored(json.loads(path.read_text(encoding="utf-8")))
    lists = {key_of(word): word.partition("=")[2] for word in expanded(words_of(result)) if word.startswith("+data@")}
    return result | {CHOICES: current_choices(result[CHOICES]) | lists}


def keep(folder: Path, path: Path, places: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Stores the result of a finished run.

    Args:
        folder: The run's folder, with `result.json`.
        path: The file to write.
        places: What is written for a path of this machine, `/home/me/data/x` -> `$METARUN_DATA/x`.

    Returns:
        What was stored.
    """
    read = (folder / contents.RESULT).read_text(encoding="utf-8")
    for place, written in (places or {}).items():
        read = read.replace(json.dumps(place)[1:-1], json.dumps(written)[1:-1])
    result = trimmed(json.loads(read))
    scores = folder / contents.SCORES
    if TARGET_CURVE in result and scores.is_file():  # [sizes, repeats], for paired differences
        with np.load(scores) as arrays:
            result[TARGET_VALUES] = [[round(float(value), 6) for value in row] for row in arrays["values"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(result), encoding="utf-8")
    return result


def trimmed(result: dict[str, Any]) -> dict[str, Any]:
    """`result.json` without what no table shows, and without this machine's paths."""
    kept = {key: value for key, value in result.items() if key not in DROPPED}
    if isinstance(kept.get(OVERRIDES), list):
        kept[OVERRIDES] = [word for word in kept[OVERRIDES] if key_of(word) not in ("outputs", "resume", "name")]
    kept[COMMAND] = " ".join(
        word for word in str(kept[COMMAND]).split() if key_of(word) not in ("outputs", "resume", "name")
    )
    for stage in kept.get(STAGES, {}).values():
        stage["folder"] = Path(stage["folder"]).name
    return kept


def text(result: dict[str, Any]) -> str:
    """JSON with a key a line, and lists of numbers on one line."""
    spread = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), spread) + "\n"


def key_of(word: str) -> str:
    """The key of an override."""
    return word.lstrip("+~").partition("=")[0]


def words_of(result: dict[str, Any]) -> list[str]:
    """The overrides of a stored result, as they were typed."""
    stored = result.get(OVERRIDES)
    return [str(word) for word in (stored if isinstance(stored, list) else shlex.split(result[COMMAND])[1:])]


def overrides(result: dict[str, Any]) -> set[str]:
    """The overrides of a stored result that say what was computed, whatever their order."""
    return {word for word in words_of(result) if key_of(word) not in UNSHOWN}


def is_of(result: dict[str, Any], words: list[str]) -> bool:
    """Whether a stored result is of the command with these words."""
    return overrides(result) == {word for word in words if key_of(word) not in UNSHOWN}
