"""The images below a folder, found by what a table of labels calls them."""

from __future__ import annotations

import functools
import os
import posixpath
from pathlib import Path, PurePosixPath

from metarun import files
from metarun.data.file_names import may_be_image, part_of, visible
from metarun.errors import UserError, nearest
from metarun.text import composed


class ImageIndex:
    """All files below a folder, by what a table may call them: a path or a name, with or without its extension."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"data.root: there is no folder {root}")
        self.root = root
        self.base = composed(os.path.abspath(root))
        self.folders: set[str] = set()
        self.folder_names: set[str] = set()
        # The images in each folder that a table names and that is not below the root.
        self._outside: dict[str, frozenset[str]] = {}
        self.paths: dict[str, list[PurePosixPath]] = {}
        self.names: dict[str, list[PurePosixPath]] = {}
        for folder, names in files.walk(root, visible):
            self.folders.add(composed(folder.relative_to(root).as_posix()))
            self.folder_names |= {composed(folder.name)} if folder != root else set()
            for name in names:
                path = PurePosixPath((folder / name).relative_to(root).as_posix())
                if may_be_image(name):
                    for key in {path, path.with_suffix("")}:  # a path keeps the bytes that open it
                        self.paths.setdefault(composed(str(key)), []).append(path)
                        self.names.setdefault(composed(key.name), []).append(path)
        self.parts = set(map(part_of, self.folder_names)) - {""}

    def find(self, file: str, table: Path, where: str) -> Path:
        """The one image that a table calls `file`; raises `UserError` where there is none, or several.

        It is looked for beside the table, in the folder that is called like the table and in the root; then there also
        without the folders that the path begins with elsewhere; then by its name alone, but for `train.csv` in no `test_images`
        where there are `train_images`. Where the folder that the path names is there, or one that is called like the image's own, it
        is looked for in no other: an image of the same name may be another one, of another class. For that reason an image that is
        where the path says, but outside the root, is refused.
        """
        written = file.replace("\\", "/")
        beside = table.parent.relative_to(self.root) if table.is_relative_to(self.root) else Path()
        homes = [os.path.join(self.base, home) for home in dict.fromkeys((beside, beside / table.stem, Path()))]
        named = [place for home in homes if (place := self._below(os.path.join(home, written)))]
        for name in named:
            if found := self.paths.get(name):
                return self._one(found, name, file, where)
        last = composed(PurePosixPath(written).name)
        if found := self._linked(written, table, file, where):
            return self._one(found, last, file, where)
        wanted = [part for part in PurePosixPath(posixpath.normpath(written)).parts if part not in ("/", "..")]
        named += [place for home in homes if (place := self._below(os.path.join(home, *wanted)))]
        elsewhere = len(wanted) < 2 or self.folders.isdisjoint({posixpath.dirname(name) for name in named} - {""})
        own = composed(wanted[-2]) if len(wanted) > 1 and composed(wanted[-2]) in self.folder_names else ""
        for start in range(len(wanted) - bool(own) if elsewhere else 1):
            for home in homes:
                name = self._below(os.path.join(home, *wanted[start:]))
                if found := self.paths.get(name):
                    return self._one(found, name, file, where)
        alike = [path for path in self.names.get(last, []) if not own or composed(path.parent.name) == own]
        if (part := part_of(table.stem)) in self.parts:
            alike = [path for path in alike if _parts_of(path) <= {part}]
        if elsewhere and alike:
            return self._one(alike, last, file, where)
        near = nearest(last, self.names) if len(self.names) < 10_000 else ""
        if found := self.names.get(last, []):
            more = f", and {len(found) - 1} more of that name" if len(found) > 1 else ""
            near = f", only {found[0]}{more}"
        raise UserError(f"{where}: there is no image {file} in {self.root}{near}")

    def _below(self, path: str) -> str:
        """A path as it is from the root, empty where it is not below that."""
        whole = composed(os.path.normpath(path))
        return whole[len(self.base.rstrip(os.sep)) + 1 :].replace(os.sep, "/") if _is_below(whole, self.base) else ""

    def _linked(self, written: str, table: Path, file: str, where: str) -> list[PurePosixPath]:
        """What is outside the root where the path says: the same files, if a link below the root leads there; none if nothing is.

        Raises:
            UserError: No such link leads there.
        """
        places = [os.path.join(os.path.abspath(table.parent), written)]
        if "/" in written:
            places.append(os.path.join(os.path.dirname(self.base), written))
        for place in map(os.path.normpath, places):
            folder, name = os.path.split(place)
            if _is_below(place, self.base):
                continue
            if folder not in self._outside:
                self._outside[folder] = _images_in(folder)
            if name not in self._outside[folder]:
                continue
            home, real = self._real.get(os.path.realpath(folder)), os.path.realpath(place)
            if found := self.paths.get(composed(posixpath.normpath(posixpath.join(home, name)))) if home else None:
                return found
            if found := [
                path for path in self.names.get(composed(name), []) if os.path.realpath(self.root / path) == real
            ]:
                return found
            raise UserError(f"{where}: {file} lies outside {self.root}, below which all images of a table must be")
        return []

    @functools.cached_property
    def _real(self) -> dict[str, str]:
        """The folders below the root, and the root, by where they are without links."""
        return {
            os.path.realpath(folder): folder.relative_to(self.root).as_posix()
            for folder, _ in files.walk(self.root, visible)
        }

    def _one(self, found: list[PurePosixPath], name: str, file: str, where: str) -> Path:
        """The only one found, or the only one whose extension is that of `name`, too, or that is written in the same bytes."""
        for alike in (
            lambda path: composed(str(path)).endswith(name),
            lambda path: path.name == PurePosixPath(file.replace("\\", "/")).name,
        ):
            if len(found) > 1:
                found = [path for path in found if alike(path)] or found
        if len(found) > 1 and composed(str(found[0])) == composed(str(found[1])):
            raise UserError(
                f"{where}: {file} may be either of two files of {self.root} whose names look the same ({str(found[0])!a} and "
                f"{str(found[1])!a}); rename one"
            )
        if len(found) > 1:
            raise UserError(
                f"{where}: {file} may be {found[0]} or {found[1]} of {self.root}; write the path from there"
            )
        return self.root / found[0]


def _parts_of(path: PurePosixPath) -> set[str]:
    """The parts of a data set that the folders of a path name."""
    return set(map(part_of, path.parts[:-1])) - {""}


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _images_in(folder: str) -> frozenset[str]:
    """The names of the files in a folder that may be images, with and without their extensions; none where it cannot be looked into."""
    try:
        names = [name for name in os.listdir(folder) if visible(name) and may_be_image(name)]
    except OSError:
        return frozenset()
    return frozenset([*names, *(Path(name).stem for name in names)])
