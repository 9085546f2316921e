"""Times metarun and learn2learn 0.2.0 (on vectors, easyfsl 1.5) in turn on the same work, and prints a table and writes JSON.

Each line of the table: the same model, tasks and optimiser on both sides, and the same cores; tasks a second in the median
of the rounds, the range in brackets. Ours are processes of one thread that share the tasks of a step; the peer is one
process, with one thread or one a core, whichever is faster. With --hardware cuda each is one process on the same GPU.
`machine` is the share of what the machine allows: of the tasks a second at which the convolutions alone would run. Before
the clock, both compute the loss of the same batch from the same weights, which must be the same. Needs
scripts/install_learn2learn.sh, and Omniglot for most lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metarun import files
from metarun.errors import UserError
from metarun.runs import provenance
from metarun.shell.messages import MENDABLE, one_line

from . import encoding
from .lines import LINES, MEMORY, Line
from .measure import Differ, cores, memory, of_predicting, spread, startup, throughput
from .predicting import Work, predicting

Measurement = Callable[[int, float], dict[str, Any]]  # of the rounds and the seconds of a turn
Works = Callable[[Sequence[str]], dict[str, Measurement]]  # by name, of the hardware


def on(hardware: Sequence[str], line: Line) -> Line:
    """`line` on `hardware`: its choice in the config, and keys of it as KEY=VALUE."""
    choice, *keys = hardware
    pairs = (key.partition("=") for key in keys)
    return dataclasses.replace(
        line, words=line.words | {"hardware": choice} | {f"hardware.{k}": v for k, _, v in pairs}
    )


def works(hardware: Sequence[str]) -> dict[str, Measurement]:
    """All that can be measured, by name."""
    return {
        **{line.name: partial(throughput, on(hardware, line)) for line in LINES},
        "encoding": encoding.throughput,
        "encoding_memory": encoding.memory,
        "startup": lambda rounds, seconds: startup(rounds),
        "predict": lambda rounds, seconds: predicting(Work(), rounds, seconds),
        MEMORY.name: lambda rounds, seconds: memory(min(rounds, 3), on(hardware, MEMORY)),  # it hardly varies
    }


def machine(hardware: Sequence[str]) -> dict[str, Any]:
    """What it runs on. Raises `UserError` where that is not there, or no key of the config."""
    on(hardware, MEMORY).config()
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = None
    if hardware[0] == "cuda":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            raise UserError("--hardware cuda: torch finds no CUDA device here; leave it out")
        gpu = torch.cuda.get_device_name()
    return {
        "gpu": gpu,
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def run(
    works: dict[str, Measurement], rounds: int, seconds: float, target: Path, hardware: Sequence[str]
) -> dict[str, Any]:
    """Measures `works` one after the other; `target` has all that is measured so far at any time."""
    result: dict[str, Any] = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(hardware),
        "hardware": list(hardware),
        "versions": provenance.versions() | {"peer": "learn2learn 0.2.0"},
        "git_commit": provenance.git_commit(),
        "rounds": rounds,
        "seconds_per_turn": seconds,
        "lines": {},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    for number, (name, work) in enumerate(works.items(), 1):
        print(f"{number}/{len(works)} {name}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            result["lines"][name] = work(rounds, seconds)
        except Differ as error:
            print(f"benchmark: {name}: {error}", file=sys.stderr)
            result["lines"][name] = {"error": str(error)}
        result["lines"][name]["seconds"] = time.perf_counter() - started
        files.save_json(target, result)
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """The tables of what was measured."""
    lines = result["lines"]
    rates = {name: line for name, line in lines.items() if line.get("unit") == "tasks/s"}
    if rates:
        where = result["machine"]["gpu"] or f"{result['machine']['cores']} cores"
        table = Table("work", title=f"tasks/s on {where}, median of {result['rounds']} rounds")
        for column in ("ours", "peer", "ratio", "machine"):
            table.add_column(column, justify="right")
        for line in rates.values():
            share = f"{line['machine']['fraction_ours']:.0%}" if "machine" in line else ""
            table.add_row(line["title"], spread(line["ours"]), spread(line["peer"]), f"{line['ratio']:.2f}×", share)
        console.print(table)
    if "ratio" in lines.get("encoding", {}):
        line = lines["encoding"]
        table = Table("work", "metarun", "the bare network", "ratio", title="images/s")
        table.add_row(line["title"], spread(line["ours"]), spread(line["peer"]), f"{line['ratio']:.2f}×")
        console.print(table)
    if "ratio" in lines.get("encoding_memory", {}):
        line = lines["encoding_memory"]
        console.print(f"{line['title']}: {line['ratio']:.2f} times")
    if "startup" in lines:
        table = Table("start-up", title="seconds from the start of the process")
        table.add_column("median", justify="right")
        for name, values in (lines["startup"]["ours"] | lines["startup"]["peer"]).items():
            table.add_row(name, spread(values))
        console.print(table)
    if "share" in lines.get("predict", {}):
        line = lines["predict"]
        table = Table("predict", title=f"images/s of one thread, {line['title']}")
        for column in (
            "metarun",
            "bare network",
            "share",
            f"MB for {line['images']:,} images by {line['growth_with']}",
        ):
            table.add_column(column, justify="right")
        table.add_row("", *of_predicting(line))
        console.print(table)
    if "peer" in lines.get(MEMORY.name, {}):
        line = lines[MEMORY.name]
        kinds = {
            "ours": line["ours"]["plain"],
            "ours, recompute": line["ours"]["recompute"],
            "learn2learn": line["peer"]["plain"],
        }
        table = Table("MB, by inner steps", *kinds["ours"], title=line["title"])
        for kind, by_steps in kinds.items():
            table.add_row(kind, *(spread(found, 1e6) for found in by_steps.values()))
        console.print(table)


def main(words: Sequence[str] | None = None, works: Works = works) -> int:
    """The command; its exit status: 1 where a line's sides do not compute the same, 2 for what the user can mend."""
    about, _, more = (__doc__ or "").partition("\n\n")
    names = list(works(("cpu",)))
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=about, epilog=more)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn (4); at least one step of all tasks")
    parser.add_argument("--cores", type=int, help="how many of this machine's cores both sides may use (all)")
    parser.add_argument(
        "--hardware",
        nargs="+",
        metavar="WORD",
        default=["cpu"],
        help="cpu (the default) or cuda, and keys of the config's `hardware` for our side: cuda record=true",
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark.json"), help="outputs/benchmark.json")
    given = parser.parse_args(words)
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    try:
        if given.hardware[0] not in ("cpu", "cuda"):
            raise UserError(f"--hardware {given.hardware[0]}: the first word is cpu or cuda")
        measurements = works(given.hardware)
        chosen = {name: measurements[name] for name in given.only}
        result = run(chosen, given.rounds, given.seconds, given.json, given.hardware)
    except MENDABLE as error:
        print(f"benchmark: {one_line(error)}", file=sys.stderr)
        return 2
    show(result, Console())
    print(f"written to {given.json}")
    return 1 if any("error" in line for line in result["lines"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
