"""A file that other programs run: made in memory, compared with what it was made of, and only then written."""

from __future__ import annotations

import io
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from metarun.errors import UserError
from metarun.export import onnx_file
from metarun.export.folding import quiet, traced

TOLERANCE = 1e-4  # of a probability, by which a file may differ from metarun
IMAGES = 100  # on which they are compared
TIMED = 20  # runs, of which the median counts
PROGRAM = "metarun.json"  # the name of what a program of torch.export says of itself

Function = Callable[..., Tensor]
Run = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Input:
    """An input of an exported file.

    Attributes:
        name: Its name.
        rows: The name of its number of rows.
        dimension: That number, as `torch.export` takes it.
        shape: The shape of a row.
        dtype: The type of its values.
    """

    name: str
    rows: str
    dimension: Any
    shape: tuple[int, ...]
    dtype: str = "uint8"

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": [self.rows, *self.shape]}


@dataclass
class Exported:
    """The content of a file and what was measured of it.

    Attributes:
        content: The bytes.
        run: Runs it: arrays in, probabilities out.
        parameters: The numbers that it holds.
        difference: The largest difference of a probability from that of `recipe=predict`.
        seconds: For one image, in one thread.
    """

    content: bytes
    run: Run
    parameters: int
    difference: float
    seconds: float


def export(
    function: Function,
    inputs: Sequence[Input],
    asked: Sequence[np.ndarray],
    form: str,
    metadata: Mapping[str, Any],
    temperature: float = 1.0,
    others: Sequence[Sequence[np.ndarray]] = (),
    predict: Run | None = None,
) -> Exported:
    """A function as the content of a file, which was run and agrees with what metarun predicts.

    A graph takes any number of rows, but is traced with one: what a function does otherwise with another number is not in it. So they
    are compared on one image alone too, and on `others`.

    Args:
        function: Tensors to probabilities.
        inputs: What it takes; the last are the images that are classified.
        asked: A value for each, with which the function is traced, and on which the two are compared.
        form: `onnx` or `torch`.
        metadata: What the file says of itself: a JSON value for each name.
        temperature: What scores are divided by before they are probabilities; below 1 it magnifies rounding, in both alike.
        others: Values with other numbers of rows, on which they are compared too.
        predict: What `recipe=predict` says of such values, on its own way from pixels to probabilities; None for `function` itself.

    Raises:
        UserError: The function cannot be exported so, or the file does not agree with metarun.
    """
    predict = predict or computed(function)
    tensors = [torch.from_numpy(array) for array in asked]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program = traced(function, tensors, [one.dimension for one in inputs])
        metadata = {**metadata, "inputs": [one.describe() for one in inputs], "output": onnx_file.OUTPUT}
        content, run = FORMATS[form](program, inputs, metadata)
        allowed = TOLERANCE / min(1.0, temperature)
        difference = 0.0
        for values in (asked, [*asked[:-1], asked[-1][:1]], *others):
            found = compared(predict, run, values)
            if not found <= allowed:  # or not a number
                how = f"differ from those of recipe=predict by up to {found:.2g}, and {allowed:.2g} is allowed"
                how = "are not to be had" if math.isinf(found) else how
                raise UserError(f"the file's probabilities {how}{_numbers(inputs, asked, values)}")
            difference = max(difference, found)
        seconds = seconds_an_image(run, asked)
    finally:
        torch.set_num_threads(threads)
    return Exported(content, run, parameters(program), difference, seconds)


def computed(function: Function) -> Run:
    """A function of tensors as one of arrays."""

    def run(*arrays: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = function(*map(torch.from_numpy, arrays)).numpy()
        return found

    return run


def compared(predict: Run, run: Run, values: Sequence[np.ndarray]) -> float:
    """The largest difference of what a file says of some values from what metarun says of them.

    It is infinite where the file refuses such values: so many rows, say.
    """
    wanted = predict(*values)
    try:
        found = run(*values)
    except Exception:  # a guard of the graph, or an operation that meets another shape: each library raises its own
        return float("inf")
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")


def _numbers(inputs: Sequence[Input], asked: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> str:
    """For which number of rows a file is wrong, to follow how far; nothing where it is for those with which it was traced."""
    numbers = zip(inputs, asked, values, strict=True)
    for one, rows, others in ((one, len(rows), len(others)) for one, rows, others in numbers):
        if rows != others:
            fixed = "" if one is inputs[-1] else "; support=FOLDER, whose classes are then in the file, fixes it"
            return (
                f" ({others} {one.name}; it was traced with {rows}): what the method does depends on this number{fixed}"
            )
    return ""


def seconds_an_image(run: Run, asked: Sequence[np.ndarray]) -> float:
    """The median time that a run takes for one image."""
    inputs = [*asked[:-1], asked[-1][:1]]
    run(*inputs)  # the first one prepares
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parameters(program: ExportedProgram) -> int:
    """The floating-point numbers that a graph holds."""
    held = [*program.constants.values(), *program.state_dict.values()]
    return sum(value.numel() for value in held if isinstance(value, Tensor) and value.is_floating_point())


def _onnx(program: ExportedProgram, inputs: Sequence[Input], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    names, rows = ([getattr(one, field) for one in inputs] for field in ("name", "rows"))
    content = onnx_file.converted(program, names, rows, metadata)
    return content, onnx_file.Session(content)


def _torch(program: ExportedProgram, inputs: Sequence[Input], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    whole = io.BytesIO()
    with quiet():
        program = program.run_decompositions({})
        torch.export.save(program, whole, extra_files={PROGRAM: json.dumps(metadata)})
        loaded = torch.export.load(io.BytesIO(whole.getvalue())).module()
    return whole.getvalue(), computed(loaded)


FORMATS: dict[str, Callable[[ExportedProgram, Sequence[Input], Mapping[str, Any]], tuple[bytes, Run]]] = {
    "onnx": _onnx,
    "torch": _torch,
}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
