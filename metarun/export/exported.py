"""A file that other programs run: made in memory, compared with what it was made of, and only then written."""

from __future__ import annotations

import io
import json
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
        difference: The largest difference of a probability from metarun's.
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
) -> Exported:
    """A function as the content of a file, which was run and agrees with it.

    Args:
        function: Tensors to probabilities.
        inputs: What it takes; the last are the images that are classified.
        asked: A value for each, on which file and function are compared.
        form: `onnx` or `torch`.
        metadata: What the file says of itself: a JSON value for each name.
        temperature: What scores are divided by before they are probabilities; below 1 it magnifies rounding, in both alike.

    Raises:
        UserError: The function cannot be exported so, or the file does not agree with it.
    """
    tensors = [torch.from_numpy(array) for array in asked]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program = traced(function, tensors, [one.dimension for one in inputs])
        metadata = {**metadata, "inputs": [one.describe() for one in inputs], "output": onnx_file.OUTPUT}
        content, run = FORMATS[form](program, inputs, metadata)
        with torch.no_grad():
            wanted = function(*tensors).numpy()
        found = run(*asked)
        difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
        allowed = TOLERANCE / min(1.0, temperature)
        if not difference <= allowed:  # or not a number
            raise UserError(
                f"the file's probabilities differ from metarun's by up to {difference:.2g}, and {allowed:.2g} is allowed"
            )
        seconds = seconds_an_image(run, asked)
    finally:
        torch.set_num_threads(threads)
    return Exported(content, run, parameters(program), difference, seconds)


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

    def run(*arrays: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = loaded(*(torch.from_numpy(array) for array in arrays)).numpy()
        return found

    return whole.getvalue(), run


FORMATS: dict[str, Callable[[ExportedProgram, Sequence[Input], Mapping[str, Any]], tuple[bytes, Run]]] = {
    "onnx": _onnx,
    "torch": _torch,
}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
