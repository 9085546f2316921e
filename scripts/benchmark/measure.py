"""Both sides in turn, round by round, after a check that they compute the same."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from metarun.errors import UserError

from .lines import ALLOWED, MEMORY, MEMORY_STEPS, Line
from .worker import Worker, environment

MOST_STEPS = 10_000


class Differ(UserError):
    """The sides do not compute the same, so their times say nothing."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, and all values in the order of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def spread(values: Mapping[str, Any], unit: float = 1) -> str:
    """A summary's median, and its range in brackets, in units of `unit`: four digits, and none after the point beyond 1,000."""
    shown = (values[name] / unit for name in ("median", "min", "max"))
    return "{} ({}–{})".format(*(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in shown))


def of_predicting(line: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What tables show of the line `predict`: the rates of both sides, their share, and by how many MB memory grows."""
    share, growth = line["share"]["median"], line["growth"] / 1e6
    return spread(line["ours"]), spread(line["bare"]), f"{share:.0%}", f"{growth:.0f}"


def cores() -> int:
    """Those that this process, and all that it starts, may use."""
    return len(os.sched_getaffinity(0))


def verify(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """`found` by the peer's check, with what is allowed; raises `Differ` where the sides are further apart."""
    result: dict[str, Any] = {}
    for kind, values in found.items():
        for name, limit in ALLOWED[kind].items():
            if not values[name] <= limit:
                raise Differ(
                    f"the sides do not compute the same: {kind}, {name.replace('_', ' ')} {values[name]:.2g}, allowed {limit:g}"
                )
        result[kind] = values | {f"{name}_allowed": limit for name, limit in ALLOWED[kind].items()}
    return result


def alternate(sides: Mapping[str, Callable[[int], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Steps a second of each side in each round; a side takes a number of steps and returns its seconds.

    A turn has as many steps as fit into `seconds` by the second of two steps before the clock, at least one.
    """
    steps = {}
    for name, run in sides.items():
        run(1)
        steps[name] = min(MOST_STEPS, max(1, round(seconds / run(1))))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(steps[name] / run(steps[name]))
    return found


def throughput(line: Line, rounds: int, seconds: float) -> dict[str, Any]:
    """Tasks a second of both sides, the peer with one thread or one a core, whichever is faster; and of the machine."""
    on_cpu = line.overrides["hardware"] == "cpu"
    line = dataclasses.replace(line, processes=min(line.processes or cores(), line.tasks) if on_cpu else 1)
    threads = sorted({cores(), 1}, reverse=True) if on_cpu else [1]  # on a GPU the threads of a CPU do not matter
    with tempfile.TemporaryDirectory() as folder, Worker("ours", line, threads=1) as ours:
        path = str(Path(folder) / "check.pt")
        hardware = ours.ask("check", path=path)  # before the peer starts: it finds the data, if need be on the internet
        with Worker("peer", line, threads=max(threads)) as peer:
            checked = verify(peer.ask("check", path=path))
            works = {"ours": partial(ours.seconds, "run")}
            works |= {f"peer {n}": partial(peer.seconds, "run", threads=n) for n in threads}
            operations = ours.ask("convolutions")
            if operations:
                works["machine"] = partial(ours.seconds, "convolve")
            turns = alternate(works, rounds, seconds)
    measured = {name: summary([value * line.tasks for value in values]) for name, values in turns.items()}
    medians = {name: value["median"] for name, value in measured.items()}
    best = max((name for name in measured if name.startswith("peer")), key=medians.__getitem__)
    result = {
        "title": line.title,
        "unit": "tasks/s",
        "overrides": line.overrides,
        "draw": line.draw,
        "check": checked,
        "ours": measured["ours"] | {"hardware": hardware},
        "peer": measured[best] | {"threads": int(best.split()[1])},
        "peer_slower": {name: value for name, value in measured.items() if name.startswith("peer") and name != best},
        "ratio": medians["ours"] / medians[best],
        "ratio_by_round": [a / b for a, b in zip(turns["ours"], turns[best], strict=True)],
    }
    if operations:
        allowed = medians["machine"]
        result["machine"] = measured["machine"] | {
            "gigaflop_per_task": operations / 1e9,
            "gigaflop_per_second": operations * allowed / 1e9,
            "fraction_ours": medians["ours"] / allowed,
            "fraction_peer": medians[best] / allowed,
        }
    return result


def startup(rounds: int) -> dict[str, Any]:
    """Seconds from the start of a process to what it is started for, the caches warm."""
    works: dict[str, Callable[[], float]] = {
        "metarun --help": lambda: command_seconds("-m", "metarun", "--help"),
        "metarun --cfg job": lambda: command_seconds("-m", "metarun", "--cfg", "job"),
        "metarun: first training step": first_step_seconds,
        "import learn2learn": lambda: command_seconds("-c", "from metarun import optional; optional.learn2learn()"),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            value = work()
            if number:  # not the first, which warms the caches
                found[name].append(value)
    return {
        "title": "start-up",
        "unit": "s",
        "ours": {name: summary(values) for name, values in found.items() if name.startswith("metarun")},
        "peer": {name: summary(values) for name, values in found.items() if not name.startswith("metarun")},
    }


def command_seconds(*words: str) -> float:
    """Of a Python process from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"python {' '.join(words)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return time.perf_counter() - started


def first_step_seconds(*overrides: str) -> float:
    """Of the default run, or one with overrides, from its start until the curves on disk have its first step."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "metarun", f"outputs={folder}/outputs", "train.log_every=1", *overrides]
        started = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *words], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not any(
                "\n" in path.read_text(encoding="utf-8") for path in Path(folder).glob("outputs/*/*/metrics.jsonl")
            ):
                if run.poll() is not None:
                    raise UserError("metarun: ended before its first training step")
                time.sleep(0.005)
            return time.perf_counter() - started
        finally:
            run.kill()
            run.wait()


def memory(rounds: int, line: Line = MEMORY, steps: Sequence[int] = MEMORY_STEPS) -> dict[str, Any]:
    """Bytes by which a step raises the peak memory of a fresh process of one thread, against the inner steps."""
    recompute = {"algo.recompute": "true", "hardware.vectorize": "false"}  # it has no vectorised form
    kinds = {"ours": {}, "ours, recompute": recompute, "peer": {}}
    found: dict[str, dict[str, list[int]]] = {kind: {str(n): [] for n in steps} for kind in kinds}
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "check.pt")
        for n in steps:
            works = {
                kind: dataclasses.replace(line, words=line.words | words | {"algo.inner_steps": n})
                for kind, words in kinds.items()
            }
            with Worker("peer", works["peer"], threads=1) as peer:
                for kind in ("ours", "ours, recompute"):
                    with Worker("ours", works[kind], threads=1) as ours:
                        ours.ask("check", path=path)
                        checks[f"{kind}, {n} steps"] = verify(peer.ask("check", path=path))
            for _ in range(rounds):
                for kind, work in works.items():
                    arguments = {"path": path} if kind == "peer" else {}
                    with Worker(kind.split(",")[0], work, threads=1) as side:
                        found[kind][str(n)].append(side.ask("memory", **arguments))
    measured = {kind: {n: summary(values) for n, values in by_steps.items()} for kind, by_steps in found.items()}
    first, last = str(min(steps)), str(max(steps))
    return {
        "title": f"peak memory of a step of {line.title}",
        "unit": "bytes",
        "overrides": line.overrides,
        "check": checks,
        "ours": {"plain": measured["ours"], "recompute": measured["ours, recompute"]},
        "peer": {"plain": measured["peer"]},
        f"{last}_steps_against_{first}": {
            kind: by_steps[last]["median"] / by_steps[first]["median"] for kind, by_steps in measured.items()
        },
    }
