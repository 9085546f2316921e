"""A side in processes of its own, warm and asleep between its turns; and its handle, which asks it over pipes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from metarun.errors import UserError

from .lines import Line

ROOT = Path(__file__).parents[len(__package__.split("."))]


def environment() -> dict[str, str]:
    """That of a process that finds metarun and this package."""
    found = [str(ROOT), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(found))}


class Worker:
    """A side that waits for what it is asked; `side` is `ours` or `peer`. Ends with the `with` block."""

    def __init__(self, side: str, line: Line, threads: int) -> None:
        self.side = side
        command = [sys.executable, "-m", f"{__package__}.worker", side, json.dumps(dataclasses.asdict(line))]
        # Asleep, not spinning, while the other side has its turn.
        variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command,
            env=environment() | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer of the side's method `do`. Raises `UserError` where the side has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if "answer" not in answer:
            raise UserError(answer.get("error") or f"the {self.side} side ended early; its message stands above")
        return answer["answer"]

    def seconds(self, do: str, steps: int, **arguments: Any) -> float:
        """What the side's method `do` needs for so many steps."""
        return float(self.ask(do, steps=steps, **arguments))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()  # which closes its input, and so ends it


def main() -> None:
    """The process itself: answers go to what was its output, and whatever else is printed to its errors."""
    reply = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    side, line = sys.argv[1], Line(**json.loads(sys.argv[2]))
    try:
        if side == "peer":
            serve_peer(line, reply)
        else:
            serve_ours(line, reply)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=reply)
        sys.exit(2)


def serve_ours(line: Line, reply: IO[str]) -> None:
    """All ranks do what rank 0 is asked."""
    from metarun.engine import distributed

    kind = importlib.import_module(f".{'features' if line.features else 'ours'}", __package__).Ours
    world = distributed.place(line.processes or 1)
    with distributed.process_group(world, [sys.executable, "-m", f"{__package__}.worker", *sys.argv[1:]]) as world:
        ours = kind(line, world)
        while request := world.broadcast(sys.stdin.readline() if world.main else ""):
            answer = carry_out(ours, request)
            if world.main:
                print(json.dumps({"answer": answer}), file=reply)


def serve_peer(line: Line, reply: IO[str]) -> None:
    """Serves turns of the peer until the input ends."""
    peer = importlib.import_module(f".{'features' if line.features else 'peer'}", __package__).Peer(line)
    for request in sys.stdin:
        print(json.dumps({"answer": carry_out(peer, request)}), file=reply)


def carry_out(side: Any, request: str) -> Any:
    """What the method named by `request` returns, a JSON value."""
    arguments = json.loads(request)
    return getattr(side, arguments.pop("do"))(**arguments)


if __name__ == "__main__":
    main()
