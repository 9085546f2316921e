"""The image files below a folder: their sizes and depths, and those that cannot be read, with reasons."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import StubImageFile

from metarun import files
from metarun.data.decoding import GREY, THREADS, file_bits, opened, unknown_format
from metarun.data.file_names import may_be_image, visible
from metarun.errors import first_line
from metarun.system import platform

DEPTHS = {
    "1": "1 bit", "L": "8 bits, grey", "LA": "8 bits, grey, transparent", "P": "palette", "RGB": "8 bits, colour",
    "RGBA": "8 bits, colour, transparent", "CMYK": "CMYK", "F": "floating point", "I": "32 bits, grey",
}  # fmt: skip
MOST = 1000  # bad files whose reasons are kept
TOGETHER = 2048  # files that wait for threads at once


def image_files(root: Path, meant: Callable[[str], bool] = may_be_image) -> Iterator[Path]:
    """The files below a folder that are not hidden and by their names are meant to be images: no lists, texts or archives."""
    for folder, names in files.walk(root, visible):
        yield from (folder / name for name in names if meant(name))


def has_image_suffix(name: str) -> bool:
    """Whether a file ends as those of an image format do that Pillow decodes by itself.

    Beside the images of a data set with files of its own lie archives, pickles and texts without a suffix.
    """
    Image.init()
    kind = Image.OPEN.get(Image.registered_extensions().get(Path(name).suffix.lower(), ""), (None,))[0]
    return kind is not None and not (isinstance(kind, type) and issubclass(kind, StubImageFile))


def survey(
    root: Path,
    progress: Callable[[int], None] = lambda done: None,
    meant: Callable[[str], bool] = may_be_image,
    own: Sequence[Path] | None = None,
) -> dict[str, Any] | None:
    """Reads every image file below a folder, or those that a data set reads.

    Args:
        root: The folder.
        progress: Is told how many files were read.
        meant: Whether a file of a name is meant to be an image.
        own: The files that the data set reads; None for all that are meant to be images.

    Returns:
        Their number, bytes, sizes, depths and formats, and the bad ones, and how many others there are; None where there are none.
    """
    sizes, depths, formats = Counter[tuple[int, int]](), Counter[str](), Counter[str]()
    bad: list[dict[str, str]] = []
    count = broken = total = 0
    with ThreadPoolExecutor(min(THREADS, len(platform.cores()))) as pool:
        every = image_files(root, meant) if own is None else iter(dict.fromkeys(own))
        while some := list(islice(every, TOGETHER)):
            for path, (size, depth, kind, reason, length) in zip(some, pool.map(_read, some), strict=True):
                count, total = count + 1, total + length
                if reason:
                    broken += 1
                    if len(bad) < MOST:
                        bad.append({"file": os.path.relpath(path, root), "reason": reason})
                else:
                    sizes[size] += 1
                    depths[depth] += 1
                    formats[kind] += 1
            progress(count)
    if not count:
        return None
    widths, heights = ([size[axis] for size in sizes] for axis in (0, 1))
    return {
        "root": str(root),
        "count": count,
        "not_read": 0 if own is None else _others(root, meant, own),
        "bytes": total,
        "sizes": [{"size": f"{w}x{h}", "files": n} for (w, h), n in sizes.most_common(12)],
        "different_sizes": len(sizes),
        "width": [min(widths, default=0), max(widths, default=0)],
        "height": [min(heights, default=0), max(heights, default=0)],
        "depths": dict(depths.most_common()),
        "formats": dict(formats.most_common()),
        "unreadable": bad,
        "unreadable_count": broken,
    }


def _others(root: Path, meant: Callable[[str], bool], own: Sequence[Path]) -> int:
    """How many image files below a folder are none of `own`, also by no link."""
    known = set(own)
    left = [path for path in image_files(root, meant) if path not in known]
    real = {os.path.realpath(path) for path in own} if left else set()
    return sum(os.path.realpath(path) not in real for path in left)


def depth(file: Image.Image) -> str:
    """What a file not yet read has in a pixel, in words: the bits of a channel are those of the file, of which Pillow may read less."""
    if file.mode.startswith("I;16"):
        return f"16 bits ({file.mode})"
    if (bits := file_bits(file)) is None:
        return DEPTHS.get(file.mode, f"8 bits ({file.mode})")
    kind = "grey" if file.mode in GREY else "colour"
    return f"{bits} bits, {kind}" + (", transparent" if file.mode.endswith("A") else "")


def _read(path: Path) -> tuple[tuple[int, int], str, str, str, int]:
    """The size, depth and format of a file, the reason why it cannot be read (else empty), and its bytes."""
    length = 0
    try:
        length = path.stat().st_size
        with opened(path) as file:
            found = file.size, depth(file), str(file.format)
            file.load()
        return (*found, "", length)
    except UnidentifiedImageError:
        return (0, 0), "", "", unknown_format(path), length
    except Exception as error:  # the decoders raise whatever a broken file provokes
        return (0, 0), "", "", first_line(error), length
