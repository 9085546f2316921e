"""What an earlier run says of the weights that another run takes from it."""

from __future__ import annotations

from typing import Any

from metarun.data.origin import Origin
from metarun.engine import checkpoint
from metarun.files import typed_path
from metarun.runs import contents, result, seen


def of_run(key: str, origin: str) -> Origin:
    """Gathers what is known of the weights of an earlier run.

    Args:
        key: The setting that names the run.
        origin: Its folder, or a file of weights in it.

    Raises:
        UserError: There are no such weights, or the run's result is damaged.
    """
    known = checkpoint.load(checkpoint.weights_file(key, origin)).get(seen.KEY, {})
    return described(f"{key}={origin}", known, stored_beside(origin))


def stored_beside(origin: str) -> dict[str, Any]:
    """Reads the result of the run that a folder, or a file of weights in it, is of; empty where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = typed_path(origin)
    folder = path if path.is_dir() else path.parent
    return result.stored(folder) if (folder / contents.RESULT).is_file() else {}


def described(where: str, known: dict[str, Any], stored: dict[str, Any]) -> Origin:
    """An origin of weights.

    Args:
        where: The setting that names them.
        known: The classes whose images made them.
        stored: The result of their run; empty where there is none.
    """
    protocol = stored.get(result.PROTOCOL, {})
    told = "; then ".join(map(str, protocol.get(result.SEEN, {}).values()))
    if told and (data := stored.get(result.CHOICES, {}).get("data")):
        told = f"of data={data}: {told}"
    told = told or (f"images of {sum(map(len, known.values()))} classes" if known else "not known")
    library = {name: value for name, value in protocol.get("backbone", {}).items() if name != "saw_these_classes"}
    return Origin(where, known, told, protocol.get("labels_read") or "it was trained with labels", library)
