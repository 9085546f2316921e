"""Images in memory, as Pillow, numpy and torch have them, brought to the pixels that files are decoded to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from metarun.data.decoding import Range, UnknownRange, square, upright
from metarun.errors import InputError, first_line
from metarun.files import typed_path
from metarun.inference.image_files import TRAINED_WITH_RANGE, ImageFiles, find_images, of_paths, warn_of_values
from metarun.inference.preprocessing import Preprocessing

Images = Any  # a path, a sequence of paths or of PIL images, an array or a tensor

WANTED = (
    "images are uint8 (0 to 255) or floating-point (0 to 1), [images, height, width] or the same with 1 or 3 channels"
)


def plain(items: Any) -> Any:
    """What numpy makes of a column of a table, or of another library's array; everything else as it is."""
    known = isinstance(items, np.ndarray | torch.Tensor | Sequence | Image.Image)
    return items if known or not hasattr(items, "__array__") else np.asarray(items)


def as_files(images: Images) -> ImageFiles | None:
    """The files that `images` names; None for images in memory."""
    if isinstance(images, str | os.PathLike):
        return find_images(images)
    if isinstance(images, ImageFiles):
        return images
    if isinstance(images, np.ndarray) and images.dtype.kind in "UO" and images.ndim == 1:
        images = images.tolist()
    if isinstance(images, Sequence) and images and all(isinstance(one, str | os.PathLike) for one in images):
        return of_paths([typed_path(one) for one in images], "images")
    return None


def count(images: Images) -> int:
    """Counts the images in memory.

    Raises:
        InputError: They are no images.
    """
    images = plain(images)
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 0:
        raise InputError(f"images: the shape [] is that of a single number; {WANTED}")
    if isinstance(images, torch.Tensor) and images.layout != torch.strided:
        raise InputError("images: a sparse tensor, and sparse input is not supported; give images.to_dense()")
    if isinstance(images, Sequence | np.ndarray | torch.Tensor) and not isinstance(images, str | bytes):
        if len(images) == 0:
            raise InputError("images: there is none")
        return len(images)
    if hasattr(images, "toarray"):
        raise InputError("images: a sparse matrix, and sparse input is not supported; give an array, images.toarray()")
    if isinstance(images, Image.Image):
        raise InputError("images: this is one image; give a list of them, [image]")
    raise _no_image(images)


def _no_image(given: Any) -> InputError:
    return InputError(f"images: {type(given).__name__} is none of paths, PIL images, numpy arrays and tensors")


def batches(images: Images, how: Preprocessing, size: int) -> Iterator[np.ndarray]:
    """Pixels uint8 `[B, C, S, S]` of images in memory, at most `size` at once.

    They are brought to the size and the channels of the classifier as files are. Floating-point values are rounded to 256.

    Args:
        images: PIL images; or a tensor, or what numpy makes an array of, `[n, H, W]`, `[n, H, W, C]` or `[n, C, H, W]`; or a list of
            single ones.
        how: What they are brought to. Its range of values is of files and of whole numbers.
        size: The most that are held at once.

    Raises:
        InputError: The shape, the type, the values or the channels are not those of images.
    """
    images = plain(images)
    total = count(images)
    used: list[Range] = []
    for start in range(0, total, size):
        part = images[start : start + size]
        if isinstance(part, np.ndarray) and part.dtype.kind == "O":
            part = part.tolist()
        if isinstance(part, Sequence):
            yield np.stack([_item(image, place, how, used) for place, image in enumerate(part, start)])
        else:
            values = _range(part, how)
            yield np.stack([_squared(picture, how, values, used) for picture in _pictures(part)])
    warn_of_values(used, how.values)


def _squared(image: Image.Image, how: Preprocessing, values: Range | None, used: list[Range]) -> np.ndarray:
    """The pixels of an image; if these values are mapped, what it has of them is noted in `used`."""
    found = square(image, how.image_size, how.channels, values)
    if found.used:
        used.append(found.used)
    return found.pixels


def _item(image: Any, place: int, how: Preprocessing, used: list[Range]) -> np.ndarray:
    """The pixels of an item of a list; errors name its place."""
    try:
        return _one(image, how, used)
    except InputError as error:
        raise InputError(str(error).replace("images:", f"images: item {place}:", 1)) from error


def _range(array: np.ndarray | torch.Tensor, how: Preprocessing) -> Range | None:
    """Which values of an array become black and white; None for floating-point ones, of which 0 and 1 are."""
    floating = array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"
    return None if floating else how.values


def _one(image: Any, how: Preprocessing, used: list[Range]) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        raise InputError("images: the list has paths and images in memory; give images of one kind")
    values = how.values
    if not isinstance(image, Image.Image):
        if not hasattr(image, "__len__") or isinstance(image, bytes):
            raise _no_image(image)
        try:
            array = image if isinstance(image, torch.Tensor) else np.asarray(image)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"images: is no array, {first_line(error)}") from error
        if array.ndim not in (2, 3):
            raise InputError(f"images: has the shape {list(array.shape)}; {WANTED}")
        values = _range(array, how)
        (image,) = _pictures(array[None])
    if 0 in image.size:
        raise InputError(f"images: is {image.width} by {image.height} pixels; leave it out")
    try:
        return _squared(upright(image), how, values, used)
    except UnknownRange as error:
        raise InputError(
            f"images: {error}; give an array of values in 0 to 1, or use a run {TRAINED_WITH_RANGE}"
        ) from error
    except (
        Exception
    ) as error:  # a file that was opened is read here, and the decoders raise whatever a broken one provokes
        raise InputError(f"images: is not a whole image ({first_line(error)})") from error


def _pictures(images: np.ndarray | torch.Tensor) -> list[Image.Image]:
    """The images of an array `[n, H, W]`, `[n, H, W, C]` or `[n, C, H, W]`."""
    channels_first = isinstance(images, torch.Tensor)
    array = _array(images) if isinstance(images, torch.Tensor) else images
    shape = list(array.shape)
    if array.ndim == 2:
        raise InputError(f"images: the shape {shape} is that of one grey image, or of vectors; {WANTED}")
    if array.ndim == 3 and array.shape[-1] in (1, 3) and max(shape) > 4:
        raise InputError(f"images: the shape {shape} is that of one image; give several as one array, images[None]")
    if array.ndim not in (3, 4):
        raise InputError(f"images: the shape {shape} has {array.ndim} axes; {WANTED}")
    if 0 in shape:
        raise InputError(f"images: the shape {shape} has a length of 0, which leaves no pixels; {WANTED}")
    if array.ndim == 4:
        first, last = (array.shape[axis] in (1, 3) for axis in (1, 3))
        if not first and not last:
            raise InputError(
                f"images: the shape {shape} has neither 1 nor 3 channels, on the second axis or the last; {WANTED}"
            )
        if first and (channels_first or not last):
            array = array.transpose(0, 2, 3, 1)
        if array.shape[-1] == 1:
            array = array[..., 0]
    return [Image.fromarray(one) for one in np.ascontiguousarray(_eight_bits(array))]


def _array(images: torch.Tensor) -> np.ndarray:
    """A tensor as numpy has it, which has no floating-point type below half precision but that one."""
    if images.is_floating_point() and images.dtype != torch.float64:
        images = images.float()
    try:
        found: np.ndarray = images.detach().cpu().resolve_conj().resolve_neg().numpy()
        return found
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"images: is a tensor that numpy cannot take ({first_line(error)}); {WANTED}") from error


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind != "f":
        raise InputError(f"images: {array.dtype} values; {WANTED}")
    if not np.isfinite(array).all():
        raise InputError("images: a value is NaN or inf")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise InputError(
            f"images: floating-point values from {low:g} to {high:g}, but they must be in 0 to 1; divide by 255, or undo a "
            "normalisation: the classifier does its own"
        )
    found: np.ndarray = np.rint(array * 255).astype(np.uint8)
    return found
