"""HTML pages from templates, in the one style that all pages of metarun have."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

STYLE = Path(__file__).parent / "report"  # where the style lies


def template(folder: Path, name: str) -> Template:
    """A template, which escapes what is put into it and refuses a value that is not given.

    Args:
        folder: Where it lies.
        name: Its file.
    """
    loader = FileSystemLoader([folder, STYLE])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(name)
