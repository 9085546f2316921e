"""Where the files of published text data sets lie, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metarun.data.download import download, refuse_file
from metarun.data.roots import data_root
from metarun.errors import UserError
from metarun.files import typed_path


def published_files(
    name: str, root: str | None, checksums: Mapping[str, str], address: str, *, may_download: bool
) -> dict[str, Path]:
    """The files of a data set.

    Args:
        name: The data set.
        root: The folder that holds them; None for `METARUN_DATA/text/NAME`, where that is, else `METARUN_DATA/NAME`.
        checksums: The SHA-256 of each file by its path in the folder, which what is downloaded must have.
        address: Where they are published, before that path.
        may_download: Whether a file that is missing is downloaded.

    Raises:
        UserError: A file is missing and cannot be downloaded, or the folder is a file.
    """
    beside = data_root() / "text" / name
    folder = typed_path(root).absolute() if root else beside if beside.is_dir() else data_root() / name
    refuse_file(folder)
    found = {}
    for file, checksum in checksums.items():
        path = folder / file
        if not path.is_file():
            if not may_download:
                raise UserError(
                    f"data {name}: {path} is missing; put it there from {address}{file}, or set data.download=true"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            download(address + file, path, checksum=checksum)
        found[file] = path
    return found


def check_counts(name: str, path: Path, what: str, found: int, published: int) -> None:
    """Checks that a file holds as many of something as the published one.

    Args:
        name: The choice of `data`.
        path: The file.
        what: What is counted, in the plural.
        found: How many it holds.
        published: How many it should.

    Raises:
        UserError: It holds more or fewer.
    """
    if found != published:
        raise UserError(
            f"data {name}: {path} holds {found} {what}, the published file {published}; get it again, or read it with data=text"
        )
