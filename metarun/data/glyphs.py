"""Characters of many scripts, drawn on first use from the fonts that matplotlib ships: no download.

Over 1,000 characters with 20 renderings each, made in the spirit of Omniglot (Lake et al. 2015): every rendering takes one
of the faces that have the character, moves the outline of its strokes in or out, and warps it by an affine map and a
smooth random displacement (Simard et al. 2003). The classes of training, validation and test come from different scripts.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from metarun.config.types import Ge
from metarun.data.image_source import ImageSource
from metarun.data.source import Split
from metarun.data.table import ClassImages, cached
from metarun.errors import UserError

VERSION = 1  # of the drawing below; raise it with every change that alters a pixel
SEED = 20_240_501
RENDERINGS = 20
SAME = 0.86  # correlation above which two characters count as one

# The first face that has a character draws its reference, so the plain ones come first.
FACES = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "DejaVuSans-Oblique", "DejaVuSerif-Italic",
    "DejaVuSansMono-Oblique", "STIXGeneralItalic", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold",
    "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique", "STIXGeneralBol", "STIXGeneralBolIta",
)  # fmt: skip

SCRIPTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Latin", "Greek", "Cyrillic", "Canadian Syllabics", "Mathematical Operators", "Miscellaneous Symbols",
    ),
    "val": ("Coptic", "Hebrew", "Lao", "Old Italic", "Ogham", "Arrows"),
    "test": ("Georgian", "Armenian", "Arabic", "Tifinagh", "N'Ko", "Miscellaneous Technical"),
}  # fmt: skip

# Scripts of letters by the first word of their characters' Unicode names, the others by their blocks.
_WORDS = {
    "LATIN": "Latin", "GREEK": "Greek", "CYRILLIC": "Cyrillic", "CANADIAN": "Canadian Syllabics", "COPTIC": "Coptic",
    "HEBREW": "Hebrew", "LAO": "Lao", "OLD": "Old Italic", "OGHAM": "Ogham", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian",
    "ARABIC": "Arabic", "TIFINAGH": "Tifinagh", "NKO": "N'Ko",
}  # fmt: skip
_BLOCKS = (
    (0x2190, 0x21FF, "Arrows"),
    (0x2200, 0x22FF, "Mathematical Operators"),
    (0x2300, 0x23FF, "Miscellaneous Technical"),
    (0x2600, 0x26FF, "Miscellaneous Symbols"),
    (0x2A00, 0x2AFF, "Mathematical Operators"),
)

_CANVAS = 64  # pixels of the square that a character is drawn into before it is warped
_BOX = 44  # of its longer side there
_REACH = 6  # pixels to which distances are measured
# Turn, slant, width and height (see `_grid`) that do not make another character. One sign is enough: with every pair
# compared both ways, turning the one to the left is turning the other to the right.
_VARIANTS = (
    (0.0, 0.0, 1.0, 1.0), (0.2, 0.0, 1.0, 1.0), (0.0, 0.25, 1.0, 1.0), (0.0, 0.0, 1.2, 1.0), (0.0, 0.0, 1.4, 1.0),
    (0.0, 0.0, 1.0, 1.2), (0.0, 0.0, 1.0, 1.4),
)  # fmt: skip
_UNIT = 2048  # length of a picture's vector of whole numbers


def script(code: int) -> str | None:
    """The script of a code point, or None for one that is left out.

    Left out are marks, controls, punctuation, and all that Unicode defines as another character with an accent or in
    another style.
    """
    character = chr(code)
    category = unicodedata.category(character)
    if category[0] not in "LNS" or category in ("Lm", "Sk") or unicodedata.decomposition(character):
        return None
    if category[0] == "S":
        return next((name for first, last, name in _BLOCKS if first <= code <= last), None)
    return _WORDS.get(unicodedata.name(character, "").split(" ")[0])


class Glyphs(ImageSource):
    """Characters of 18 scripts, 20 renderings each, `[1, image_size, image_size]`, light on dark; group = script.

    `rotations` counts each character turned by 90, 180 and 270 degrees as further classes (some of which are other
    characters: Canadian syllables are told apart by how they are turned); `within_script` draws all ways
    of an episode from one script. Raises `UserError` if `image_size` is below 8 or the fonts are missing.

    Args:
        image_size: The side of an image in pixels.
        rotations: Whether each character turned by 90, 180 and 270 degrees counts as further classes.
        within_script: Whether all ways of an episode come from one script.
    """

    classes_in = ()

    def __init__(
        self, *, image_size: Annotated[int, Ge(8)] = 28, rotations: bool = False, within_script: bool = False
    ) -> None:
        fonts = font_files()
        table = cached("glyphs", cache_key(fonts, image_size), lambda metadata: build(fonts, image_size))
        splits: dict[Split, Sequence[int]] = {
            split: [c for c, group in enumerate(table.groups) if group in scripts] for split, scripts in SCRIPTS.items()
        }
        super().__init__(table, splits, rotations=rotations, within_group=within_script)


def font_files() -> list[Path]:
    """The font files, in the order of `FACES`.

    Raises:
        UserError: matplotlib's installation lacks one.
    """
    import matplotlib

    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf") for face in FACES]
    for file in files:
        if not file.is_file():
            raise UserError(f"data glyphs: the font {file} of matplotlib is missing; reinstall matplotlib")
    return files


def cache_key(fonts: Sequence[Path], image_size: int) -> dict[str, Any]:
    """All that the pixels depend on, as JSON values."""
    from PIL import __version__, features

    return {
        "image_size": image_size,
        "version": VERSION,
        "fonts": hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in fonts)).hexdigest(),
        "pillow": __version__,
        "freetype": features.version("freetype2"),
        "unicode": unicodedata.unidata_version,
    }


def build(fonts: Sequence[Path], image_size: int, only: Collection[int] | None = None) -> Iterator[ClassImages]:
    """The classes in the order of `SCRIPTS` and then of their code points; `only` restricts the code points considered."""
    drawings = draw_characters(fonts, only)
    for code, faces in distinct_characters(drawings).items():
        group = script(code) or ""
        yield ClassImages(f"{group}/U+{code:04X}", group, render(code, drawings[code][faces], image_size))


def draw_characters(fonts: Sequence[Path], only: Collection[int] | None = None) -> dict[int, np.ndarray]:
    """The ink of every character in each face that has it, bool `[faces, canvas, canvas]`, by code point.

    Characters are centred and scaled to the same longer side: size and position tell nothing.
    """
    from matplotlib.ft2font import FT2Font  # Pillow does not tell which characters a font has
    from PIL import Image, ImageFont

    rank = {name: place for place, name in enumerate(name for names in SCRIPTS.values() for name in names)}
    found: dict[int, list[np.ndarray]] = {}
    for file in fonts:
        font = ImageFont.truetype(str(file), 2 * _BOX, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(FT2Font(str(file)).get_charmap()):
            if script(code) not in rank or (only is not None and code not in only):
                continue
            mask = font.getmask(chr(code), mode="L")
            if not (mask.size[0] and mask.size[1] and mask.getbbox()):
                continue
            ink = Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())
            scale = _BOX / max(ink.size)
            shape = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
            ink = ink.resize(shape, Image.Resampling.BOX)
            canvas = Image.new("L", (_CANVAS, _CANVAS))
            canvas.paste(ink, ((_CANVAS - ink.width) // 2, (_CANVAS - ink.height) // 2))
            found.setdefault(code, []).append(np.asarray(canvas) >= 112)
    order = sorted(found, key=lambda code: (rank[script(code) or ""], code))
    return {code: np.stack(found[code]) for code in order}


def distinct_characters(drawings: dict[int, np.ndarray]) -> dict[int, list[int]]:
    """The characters that look like none before them, and which of their faces to use.

    A character is left out if it, or a small turn, slant or stretch of it, correlates above `SAME` with one that is kept
    (Greek capital alpha after A, o after O). A face is left out where it draws the character (a cursive form, say) such
    that the plain form of another character is nearer than its own.
    """
    codes = list(drawings)
    first = _distances(np.stack([ink[0] for ink in drawings.values()]))
    plain = _picture(first)
    alike = np.zeros((len(codes), len(codes)), dtype=bool)
    for variant in _VARIANTS:
        alike |= _picture(first, *variant) @ plain.T > SAME * _UNIT**2
    alike |= alike.T
    kept: list[int] = []
    for row in range(len(codes)):
        if not alike[row, kept].any():
            kept.append(row)
    chosen = {}
    for place, row in enumerate(kept):
        scores = _picture(_distances(drawings[codes[row]])) @ plain[kept].T
        chosen[codes[row]] = np.flatnonzero(scores.argmax(axis=1) == place).tolist()  # the first face is always there
    return chosen


def render(code: int, ink: np.ndarray, size: int) -> np.ndarray:
    """`RENDERINGS` of one character, uint8 `[RENDERINGS, 1, size, size]`; a function of the arguments alone.

    `ink` is bool `[faces, canvas, canvas]`.
    """
    rng = np.random.default_rng([SEED, code])
    n = RENDERINGS
    distance = _distances(ink)
    half_width, half_gap = _widths(ink)
    face = rng.permutation(np.arange(n) % len(ink))

    # The pen: half its width in canvas pixels, met as far as thin strokes survive and gaps stay open.
    pen = rng.uniform(1.3, 3.4, n)
    half = half_width[face]
    outline = np.clip(pen - half, -0.3 * half, 0.35 * half_gap[face])

    turn, slant = rng.normal(0, 0.13, n), rng.normal(0, 0.22, n)
    scale, stretch = rng.uniform(0.78, 1.1, n), np.exp(rng.normal(0, 0.065, n))
    shift = rng.uniform(-0.07, 0.07, (2, n, 1, 1))
    wobble = sum(_smooth(rng.normal(0, sd, (2, n, knots, knots)), size) for knots, sd in ((3, 0.045), (5, 0.028)))
    x, y = _grid(turn, slant, scale * stretch, scale / stretch, size)
    x, y = np.stack([x, y]) + wobble - shift
    depth = _sample(distance, face, x, y) + outline[:, None, None]
    # One output pixel of ramp is what a pen on a grey scanner gives.
    value = np.clip(0.5 + depth * (scale * size / _CANVAS)[:, None, None], 0, 1)
    return np.round(value * 255).astype(np.uint8)[:, None]


def _distances(ink: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in canvas pixels, positive in the ink, float32 `[n, canvas, canvas]`."""
    return _depth(ink) - _depth(~ink) - np.where(ink, np.float32(0.5), np.float32(-0.5))


def _widths(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half the mean width of the strokes and of what lies between them in canvas pixels, float64 `[n]` each."""
    edge = (_depth(ink) == 1).sum((1, 2))  # both sides of a stroke of length L have L such pixels
    area = ink.sum((1, 2))
    box = ink.any(1).sum(1) * ink.any(2).sum(1)
    return area / edge, (box - area) / edge


def _depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each true pixel to the nearest false one, at most `_REACH` + 1, float32."""
    far = (_REACH + 1) ** 2
    squares = np.where(mask, far, 0).astype(np.uint8)
    for axis in (1, 2):
        margins = [(0, 0)] * 3
        margins[axis] = (_REACH, _REACH)
        padded = np.pad(squares, margins, constant_values=far)
        squares = np.full_like(squares, far)
        for step in range(-_REACH, _REACH + 1):
            window = [slice(None)] * 3
            window[axis] = slice(_REACH + step, _REACH + step + _CANVAS)
            squares = np.minimum(squares, padded[tuple(window)] + np.uint8(step * step))
    return np.sqrt(np.arange(far + 1, dtype=np.float32))[np.minimum(squares, far)]


def _grid(
    turn: np.ndarray, slant: np.ndarray, width: np.ndarray, height: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where on the canvas (x and y from -0.5 to 0.5) each pixel of n images looks, float64 `[n, size, size]` each.

    The image is the canvas stretched to `width` and `height`, slanted by `slant` (x per y), and turned by `turn` radians.
    """
    turn, slant, width, height = (values[:, None, None] for values in (turn, slant, width, height))
    line = (np.arange(size) + 0.5) / size - 0.5
    x, y = line[None, None, :], line[None, :, None]
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    return (x + slant * y) / width, y / height


def _smooth(knots: np.ndarray, size: int) -> np.ndarray:
    """A smooth field `[..., size, size]` through a grid of values `[..., k, k]` (normalised Gaussian weights)."""
    k = knots.shape[-1]
    offsets = (np.arange(size) + 0.5)[:, None] / size * (k - 1) - np.arange(k)
    weights = np.exp(-0.5 * (offsets / 0.5) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ knots @ weights.T


def _sample(canvas: np.ndarray, face: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of canvas `face[i]` at `x[i], y[i]`, float64 `[n, size, size]`; beyond the border the border's value."""
    x, y = (np.clip((a + 0.5) * _CANVAS - 0.5, 0, _CANVAS - 1.001) for a in (x, y))
    left, top = x.astype(np.intp), y.astype(np.intp)
    x, y = x - left, y - top
    flat = canvas.reshape(-1)
    corner = (face[:, None, None] * _CANVAS + top) * _CANVAS + left
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + _CANVAS] * (1 - x) + flat[corner + _CANVAS + 1] * x
    return upper * (1 - y) + lower * y


def _picture(
    distance: np.ndarray, turn: float = 0.0, slant: float = 0.0, width: float = 1.0, height: float = 1.0
) -> np.ndarray:
    """Blurred pictures whose scalar products are their correlations times `_UNIT` squared, float32 `[n, 24 * 24]`.

    The values are whole, so that the products are exact in float32, the same in whatever order they are summed.
    """
    x, y = _grid(np.full(1, turn), np.full(1, slant), np.full(1, width), np.full(1, height), 24)
    pictures = np.empty((len(distance), 24 * 24), np.float32)
    for start in range(0, len(distance), 256):
        part = distance[start : start + 256]
        depth = _sample(part, np.arange(len(part)), x, y).reshape(len(part), -1)
        value = np.clip(0.5 + depth / 5, 0, 1)
        value -= value.mean(axis=1, keepdims=True)
        pictures[start : start + 256] = np.round(value * (_UNIT / np.linalg.norm(value, axis=1, keepdims=True)))
    return pictures
