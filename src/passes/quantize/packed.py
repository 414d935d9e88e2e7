"""Matrices and other weights of few bits behind operators that a runtime folds at load.

Here: `store_packed`, the form for widths that no kernel reads (3 bits), for runtimes without such
kernels (TVM), and for what is no matrix. The file holds that many bits; a run is as in float. Not
here: kernels' own layouts (`nbits`), choosing codes (`grids` and others).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import constant_tensor
from ...ir.quant import PerBlock, PerChannel, QuantSpec
from .folded_chain import FoldedChain
from .grids import Codes
from .qdq import drop_unused_constant


def store_packed(
    editor: Editor,
    value: ir.Value,
    reader: ir.Node,
    spec: QuantSpec,
    codes: Codes | None,
    opset: int,
) -> ir.Value:
    """What takes the place of a constant: the floats that its codes stand for.

    before: W      after: Mul(codes less zero points, scale)

    `codes` are of `tensor_matrix(W, axis)`, None for an architecture without weights. Blocks run
    along the axis of a matrix that the spec names; a last one that is not full is stored in full.
    """
    tensor = constant_tensor(value)
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    chain = FoldedChain(editor, reader, value)
    layout, parameters, axis = _layout(spec, shape)
    arrays = None if codes is None else _arrays(codes, spec, layout, axis)
    floats = chain.codes(
        None if arrays is None else arrays[0],
        spec.width,
        layout,
        opset,
        signed=not spec.zero_points,
    )
    if spec.zero_points:
        data = None if arrays is None else arrays[2]
        zero = chain.cast(chain.parameter("zero_point", data, ir.DataType.UINT8, parameters))
        floats = chain.add("Sub", [floats, zero], layout)
    data = None if arrays is None else arrays[1]
    scale = chain.parameter("scale", data, ir.DataType.FLOAT, parameters)
    floats = chain.add("Mul", [floats, scale], layout)
    if layout == shape:
        return floats
    whole = tuple(
        math.prod(layout[i : i + 2]) if i == axis else d for i, d in _merged(layout, axis)
    )
    floats = chain.reshape(floats, whole)
    if whole == shape:
        return floats
    ends = [chain.shared(np.array([n], np.int64)) for n in (0, shape[axis], axis)]
    return chain.add("Slice", [floats, *ends], shape)


def replace_reads(value: ir.Value, reads: list[tuple[ir.Node, int]], by: ir.Value) -> None:
    """Let nodes read another value in place of a constant, which goes when nothing reads it."""
    for node, index in reads:
        node.replace_input_with(index, by)
    drop_unused_constant(value)


def tensor_matrix(array: np.ndarray, axis: int) -> np.ndarray:
    """A weight as [in, out], the channels along `axis` last."""
    matrix: np.ndarray = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return matrix


def _layout(
    spec: QuantSpec, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The shape that codes are stored in, that of scales, and the axis that blocks split."""
    match spec.granularity:
        case PerBlock(size, axis):
            blocks = -(-shape[axis] // size)
            before, after = shape[:axis], shape[axis + 1 :]
            return (*before, blocks, size, *after), (*before, blocks, 1, *after), axis
        case PerChannel(axis):
            return shape, (shape[axis], *[1] * (len(shape) - axis - 1)), axis
    raise NotImplementedError(f"{spec.granularity} is not stored this way")


def _merged(layout: tuple[int, ...], axis: int) -> list[tuple[int, int]]:
    """The axes of a layout, less the one that is joined with the one before it."""
    kept = [d for i, d in enumerate(layout) if i != axis + 1]
    return list(enumerate(kept))


def _arrays(
    codes: Codes, spec: QuantSpec, layout: tuple[int, ...], axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points in the order in which they are stored."""
    if isinstance(spec.granularity, PerBlock):
        blocks, size = layout[axis], layout[axis + 1]
        depth, out = codes.codes.shape
        padded = np.full((blocks * size, out), codes.grid.middle, np.uint8)
        padded[:depth] = codes.codes
        parts = padded.reshape(blocks, size, out), codes.scale[:, None], codes.zero[:, None]
        if axis == 1:  # blocks along the columns: outputs are the rows
            codes_, scale, zero = (np.moveaxis(part, 2, 0) for part in parts)
            return codes_, scale, zero
        return parts
    moved = [d for i, d in enumerate(layout) if i != axis]
    stored = np.moveaxis(codes.codes.reshape(*moved, layout[axis]), -1, axis)
    return stored, codes.scale[0], codes.zero[0]
