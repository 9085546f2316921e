"""HTML pages from templates, in the one style that all pages of metarun have."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from metarun.text import printable

if TYPE_CHECKING:
    from PIL import Image

STYLE = Path(__file__).parent / "report"  # where the style lies


def template(folder: Path, name: str) -> Template:
    """A template, which escapes what is put into it, control characters too, and refuses a value that is not given.

    Args:
        folder: Where it lies.
        name: Its file.
    """
    loader = FileSystemLoader([folder, STYLE])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_printable
    )
    return environment.get_template(name)


def _printable(value: Any) -> Any:
    """A value as a page has it: what is HTML already stays as it is."""
    return printable(str(value)) if isinstance(value, str | Path) and not hasattr(value, "__html__") else value


def embedded(image: Image.Image) -> str:
    """A small image as an address that holds it, as JPEG."""
    whole = io.BytesIO()
    image.save(whole, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(whole.getvalue()).decode()}"
