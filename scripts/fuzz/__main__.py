"""`python -m scripts.fuzz`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import __doc__ as about
from .choices import fuzz_choices
from .commands import BASE, texts_parsed_once
from .files import Scenes, fuzz_files
from .words import fuzz_words

TURN = 240.0  # seconds from one kind to the next
MEMORY = 16 * 2**30  # bytes that this process may take: a file without end must not take the machine


def main() -> None:
    """The command line of this script; its exit status is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("words", "files", "choices"), nargs="+")
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with contextlib.suppress(ImportError):
        resource: Any = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # timm asks for weights by name, and waits for an answer
    began, tried, found, turn = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ), texts_parsed_once():
        scenes = Scenes(Path(folder))
        while (left := given.seconds - (time.monotonic() - began)) > 0:
            what, seed, seconds = given.what[turn % len(given.what)], given.seed + 1000 * turn, min(left, TURN)
            if what == "choices":
                # The tables are neither those of the user nor of a scene, which may be damaged.
                os.environ["METARUN_CACHE"] = str(Path(folder, "tables"))
                counts = fuzz_choices(seconds, seed)
            elif what == "words":
                counts = fuzz_words(seconds, seed, [BASE, *scenes.all_whole()])
            else:
                counts = fuzz_files(seconds, seed, scenes)
            tried, found, turn = tried + counts[0], found + counts[1], turn + 1
            print(f"after {time.monotonic() - began:.0f} s: {tried} inputs, {found} findings", flush=True)
    sys.exit(1 if found else 0)


main()
