"""Image files as arrays of eight bits: every depth that Pillow reads, brought to one size and one number of channels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from metarun.errors import UserError
from metarun.files import special

GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}  # Pillow's modes without colour
THREADS = 4
# By the orientation in EXIF data. Pillow's own `exif_transpose` writes all of these data anew, and fails where one of them is odd.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PHOTOMETRIC, WHITE_IS_ZERO = 262, "white is zero"  # the tag of a TIFF file, and where an image notes what it says
SIXTEEN_BITS = (0.0, 65535.0)  # what becomes 0 and 255 of an image of more than eight bits, where no range is given
SMALL_PART = 0.25  # images that use less than this share of the range keep at most 64 of 256 grey levels

Range = tuple[float, float]  # the values that become 0 and 255


class Decoded(NamedTuple):
    """An image, and the values that it had where they were of more than eight bits, or where a range was given for them."""

    pixels: np.ndarray  # uint8 [channels, size, size]
    used: Range | None  # the smallest and the largest
    further_pages: bool = False  # whether its file has pages that are not read


def check_range(values: Sequence[float] | str | None) -> Range | str | None:
    """Checks the setting `data.value_range`.

    Args:
        values: Two numbers, `auto`, or None.

    Returns:
        The same, numbers as a pair of floats.

    Raises:
        UserError: It is none of these.
    """
    if values is None or values == "auto":
        return values
    numbers = [] if isinstance(values, str) else list(values)
    right = len(numbers) == 2 and all(isinstance(value, int | float) and np.isfinite(value) for value in numbers)
    if not right or numbers[0] >= numbers[1]:
        shown = f"[{','.join(f'{value:g}' for value in numbers)}]" if right else values
        raise UserError(
            f"data.value_range={shown}: is not auto, nor two numbers [low,high] of which the second is larger"
        )
    return float(numbers[0]), float(numbers[1])


def too_small_a_part(used: Range) -> bool:
    """Whether images of 16 bits make little of the values that they could have, or have values beyond these."""
    return used[0] < SIXTEEN_BITS[0] or used[1] > SIXTEEN_BITS[1] or little_left(used, SIXTEEN_BITS)


def little_left(used: Range, mapped: Range) -> bool:
    """Whether images have few levels of grey between the values that become black and white, or none at all.

    A range may well cut off most of what they have, as the window of a CT does.

    Args:
        used: The smallest and the largest value of the images.
        mapped: The values that become 0 and 255.
    """
    return min(used[1], mapped[1]) - max(used[0], mapped[0]) < SMALL_PART * (mapped[1] - mapped[0])


def all_grey(paths: Sequence[Path]) -> bool:
    """Whether no image has colour, by the files' headers; files that cannot be opened are left to `decode`."""
    for path in paths:
        try:
            with opened(path) as image:
                if image.mode not in GREY:
                    return False
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return True


class UnreadableImage(ValueError):
    """A file that is no whole image; the message is the reason."""


class UnknownRange(UnreadableImage):
    """An image of floating-point pixels, of which nobody said which values are black and white."""

    def __init__(self) -> None:
        super().__init__("floating-point pixels, whose range is unknown")


def unknown_format(path: Path) -> str:
    """Says why Pillow does not know what a file holds."""
    return "no image that Pillow knows" if path.stat().st_size else "the file is empty"


def opened(path: Path) -> Image.Image:
    """Opens an image file, and nothing but a file, since a pipe would be waited for and a device read without end.

    Raises:
        UnreadableImage: It is a pipe, a socket or a device.
        OSError: The file cannot be read, or is no image that Pillow knows.
    """
    if kind := special(path):
        raise UnreadableImage(f"it is {kind}, and no file")
    return Image.open(path)


def read(path: Path, size: int, channels: int, values: Range | None = None) -> Decoded:
    """Reads one image file, turned as its EXIF data say.

    Args:
        path: The file.
        size: Pixels of a side.
        channels: 1 or 3.
        values: The values that become 0 and 255; None for those of the depth.

    Raises:
        UnreadableImage: The file is no whole image; `UnknownRange` for one of floating-point pixels where no `values` are given.
        OSError: The disk cannot be read.
    """
    try:
        with opened(path) as file:
            halved = not _deep(file) and file_bits(file) is not None
            if halved and values:
                raise ValueError(
                    f"{file_bits(file)} bits a colour, of which Pillow reads the upper 8; data.value_range needs grey or 8 bits"
                )
            further = _further_pages(file)
            image = upright(file)
            found = square(image, size, channels, values)
            return Decoded(found.pixels, _of_upper_bits(image) if halved else found.used, further)
    except UnknownRange:
        raise
    except Exception as error:  # the decoders raise whatever a broken file provokes
        if isinstance(error, OSError) and error.errno is not None and path.exists():
            raise  # of the disk, not of the image
        if isinstance(error, UnidentifiedImageError):
            raise UnreadableImage(unknown_format(path)) from error
        missing = isinstance(error, FileNotFoundError)
        raise UnreadableImage("there is no such file" if missing else str(error)) from error


def decode(
    path: Path, size: int, channels: int, *, values: Range | None = None, skip_bad: bool = False
) -> Decoded | None:
    """Reads one image file of a data set.

    Args:
        path: The file.
        size: Pixels of a side.
        channels: 1 or 3.
        values: The values that become 0 and 255; None for those of the depth.
        skip_bad: Whether a file that is no whole image is skipped.

    Returns:
        The image, turned as its EXIF data say; None for one that is skipped.

    Raises:
        UserError: The file is no whole image, or is of floating-point pixels and no `values` are given.
        OSError: The disk cannot be read.
    """
    try:
        return read(path, size, channels, values)
    except UnreadableImage as error:
        if skip_bad:
            return None
        if isinstance(error, UnknownRange):
            raise UserError(
                f"data.root: {path} has {error}; data.value_range=[low,high] names the values of black and white"
            ) from error
        raise UserError(
            f"data.root: {path} is not a whole image ({error}); remove it, or leave such files out with data.skip_bad=true"
        ) from error


def value_range(path: Path) -> Range | None:
    """Finds the smallest and the largest value of an image of any depth; None for a file that is no whole image."""
    try:
        with opened(path) as image:
            pixels = _numbers(_plain(image))
            return float(pixels.min()), float(pixels.max())
    except Exception as error:  # the decoders raise whatever a broken file provokes; `decode` says what is wrong
        if isinstance(error, OSError) and error.errno is not None and path.exists():
            raise
        return None


def square(image: Image.Image, size: int, channels: int, values: Range | None = None) -> Decoded:
    """Cuts the middle out of an image and resizes it.

    Args:
        image: An image of any mode. What is transparent becomes white.
        size: Pixels of a side (Lanczos).
        channels: 1 or 3.
        values: The values that become 0 and 255, those between in proportion and those beyond cut off; None leaves
            eight bits as they are and takes 0 and 65535 for deeper ones.

    Raises:
        UnknownRange: Its pixels are floating-point numbers, and no `values` are given.
    """
    plain, used = _eight_bits(image, values)
    fitted = ImageOps.fit(_in_mode(plain, "L" if channels == 1 else "RGB"), (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    return Decoded(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), used)


def upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF data say, and notes of a deep one whether its file has white where others have black.

    A TIFF file may say that 0 is white. Pillow turns such values round in eight bits, and leaves deeper ones as they are.

    Args:
        image: What `opened` opened, or any other.
    """
    image.load()
    turn = None
    with contextlib.suppress(Exception):  # whatever Pillow raises: data that nobody can read turn nothing
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    found = image.copy() if turn is None else image.transpose(turn)
    if _deep(image) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        found.info[WHITE_IS_ZERO] = True
    return found


def _deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def file_bits(file: Image.Image) -> int | None:
    """Reads the bits of a channel of a file not yet read, where they are from 9 to 16: of colours Pillow reads the upper 8.

    Args:
        file: What `opened` opened.

    Returns:
        The bits; None for a file of 8 or fewer, or of more, and for one whose format does not tell.
    """
    if not isinstance(file, ImageFile):
        return None
    for decoder, _, _, how in file.tile:
        if decoder == "SGI16" or ";16" in str(how):
            return 16
        if decoder.startswith("ppm") and isinstance(how, tuple) and how[1] > 255:  # the largest value
            return int(how[1]).bit_length()
        if decoder == "jpeg2k" and (bits := _jpeg2000_bits(file)) > 8:
            return bits
    return None


def _jpeg2000_bits(file: ImageFile) -> int:
    """The bits of the first channel, which stand 42 bytes after the mark that begins the pixels; 8 where there is no such mark."""
    stream = file.fp
    assert stream is not None  # as long as the pixels are not read
    place = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(place)
    found = content.find(b"\xff\x4f\xff\x51") + 42
    return (content[found] & 0x7F) + 1 if 42 <= found < len(content) else 8


def _further_pages(file: Image.Image) -> bool:
    """Whether a TIFF file, not yet read, has several pages; of animations the first frame stands for all."""
    return file.format == "TIFF" and bool(getattr(file, "is_animated", False))


def _of_upper_bits(image: Image.Image) -> Range:
    """The values, in 16 bits, of an image of which Pillow read the upper 8."""
    pixels = np.asarray(image)
    return float(pixels.min()) * 257, float(pixels.max()) * 257


def _plain(image: Image.Image) -> Image.Image:
    """The image with its values in one or three channels: no palette, no transparency, no single bits."""
    if _deep(image):
        return image
    whole = image.convert("RGBA") if image.has_transparency_data else image
    return _in_mode(whole, "L" if image.mode in GREY else "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode of Pillow's; itself where it is in it, of which `convert` would make a copy, 400 MB of 100 megapixels."""
    return image if image.mode == mode else image.convert(mode)


def _numbers(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("a value that is not finite")
    return pixels


def _eight_bits(image: Image.Image, values: Range | None) -> tuple[Image.Image, Range | None]:
    """Eight bits a channel, on white where transparent, and the values that they were made of; grey stays grey."""
    if image.mode == "F" and values is None:
        raise UnknownRange
    plain, used = _plain(image), None
    if values is not None or _deep(image):
        low, high = values or SIXTEEN_BITS
        numbers = _numbers(plain)
        used = float(numbers.min()), float(numbers.max())
        mapped = np.rint((numbers - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
        plain = Image.fromarray(255 - mapped if image.info.get(WHITE_IS_ZERO) else mapped)
    if image.has_transparency_data:
        layer = plain.convert("RGBA")
        layer.putalpha(image.convert("RGBA").getchannel("A"))
        composed = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
        return composed.convert(plain.mode), used
    return plain, used
