"""ONNX files: made of a traced graph, with what they say of themselves, in eight bits, and run by onnxruntime."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from metarun.errors import UserError, not_imported
from metarun.export.folding import first_line, quiet

OUTPUT = "probabilities"
ITERATIONS = 60  # enough for condition numbers up to 1e8: their logarithm to base 2, twice, and a few more
EXTRA = "metarun[export]"
SOLVE = torch.ops.aten.linalg_solve.default


def library(name: str) -> ModuleType:
    """A library of the extra `export`.

    Raises:
        UserError: It is not installed, or broken.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"format=onnx: {not_imported(name, error)}; pip install '{EXTRA}'") from error


def converted(
    program: ExportedProgram, inputs: Sequence[str], rows: Sequence[str], metadata: Mapping[str, Any]
) -> bytes:
    """A traced graph as the content of an ONNX file.

    Args:
        program: The graph, of one output.
        inputs: The names of its inputs.
        rows: The names of their numbers of rows.
        metadata: What the file says of itself: a JSON value for each name.

    Raises:
        UserError: ONNX has no operation for a part of the graph.
    """
    library("onnxscript")
    onnx = library("onnx")
    try:
        with quiet():
            if solves(program):  # the converter decomposes everything else, and to do it twice takes as long again
                program = program.run_decompositions({SOLVE: solved_by_products})
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=[OUTPUT],
                optimize=True,
            )
    except Exception as error:  # the converter raises whatever an operation that it does not know provokes
        cause = error.__cause__ or error
        raise UserError(f"ONNX cannot hold it ({type(cause).__name__}: {first_line(cause)})") from error
    assert made is not None
    model = made.model_proto
    # The converter numbers the dimensions: people read their names.
    named = {
        value.type.tensor_type.shape.dim[0].dim_param: name for value, name in zip(model.graph.input, rows, strict=True)
    }
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in named:
                dimension.dim_param = named[dimension.dim_param]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    content: bytes = model.SerializeToString()
    return content


def solves(program: ExportedProgram) -> bool:
    """Whether a graph, or one inside it, solves a linear system."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    return any(node.target is SOLVE for graph in graphs for node in graph.nodes)


def solved_by_products(matrix: Tensor, right: Tensor, *, left: bool = True) -> Tensor:
    """`torch.linalg.solve` by matrix products, since ONNX has no operation that solves a linear system.

    The Newton-Schulz iteration V <- V (2 I - A V) from V = A^T / (|A|_1 |A|_inf), which converges for every regular A, and
    quadratically in the end.

    Args:
        matrix: A, `[..., S, S]`.
        right: The right sides as columns, `[..., S, N]`; as rows where `left` is false.
        left: Whether A stands on the left.

    Source:
        Schulz (1933); Pan and Schreiber (1991), section 2, for the start.
    """
    twice = 2 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    lengths = matrix.abs()
    inverse = matrix.mT / (lengths.sum(-2).amax(-1) * lengths.sum(-1).amax(-1))[..., None, None]
    for _ in range(ITERATIONS):
        inverse = inverse @ (twice - matrix @ inverse)
    return inverse @ right if left else right @ inverse


def quantized(content: bytes) -> bytes:
    """The same ONNX file with the weights of its products and convolutions in eight bits (dynamic quantisation)."""
    library("onnx")
    quantization = library("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, quiet():
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(content)
        # The kernels of onnxruntime for convolutions of eight bits take weights without a sign.
        quantization.quantize_dynamic(before, after, weight_type=quantization.QuantType.QUInt8)
        return after.read_bytes()


class Session:
    """An ONNX file at hand in onnxruntime, which computes in one thread."""

    def __init__(self, content: bytes) -> None:
        onnxruntime = library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """The output of the file's graph for these inputs, in the order in which it names them."""
        found: np.ndarray = self.session.run(None, dict(zip(self.names, inputs, strict=True)))[0]
        return found
