"""Matrices in the blocks that ONNX Runtime's kernels read as they multiply and look up.

Here: the layout of com.microsoft MatMulNBits (2, 4 and 8 bits), and nodes that read it: products
and, where the outputs are the rows of a table (tied embeddings), GatherBlockQuantized. Not here:
choosing codes (`grids` and others), widths without kernels (`packed`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import CONTRIB_DOMAIN, attribute, fresh_name
from .folded_chain import pack_bits
from .grids import Codes, Grid
from .qdq import absent

WIDTHS = (2, 4, 8)
"""Bits that ONNX Runtime 1.32 has CPU kernels for: it refuses others when it loads a model."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stored matrix of `depth` inputs and `columns` outputs.

    `codes` uint8 [columns, blocks, bytes], low bits first; `scale` float32 [columns, blocks];
    `zero` uint8 [columns, bytes] or None where it is the middle.
    """

    grid: Grid
    depth: int
    columns: int
    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None


def store_blocks(
    editor: Editor,
    reader: ir.Node,
    name: str,
    grid: Grid,
    shape: tuple[int, int],
    codes: Codes | None,
) -> Blocks:
    """Initializers beside `reader` for a matrix of `shape` [in, out]; absent without codes."""
    depth, columns = shape
    blocks, size = grid.blocks(depth), grid.block
    layout = (columns, blocks, size * grid.bits // 8)
    row = -(-blocks * grid.bits // 8)
    data: np.ndarray | ir.TensorProtocol = absent(ir.DataType.UINT8, layout)
    scale: np.ndarray | ir.TensorProtocol = absent(ir.DataType.FLOAT, (columns, blocks))
    zero: np.ndarray | ir.TensorProtocol = absent(ir.DataType.UINT8, (columns, row))
    if codes is not None:
        whole = np.full((columns, blocks * size), grid.middle, np.uint8)
        whole[:, :depth] = codes.codes.T
        data = _packed(whole, grid.bits).reshape(layout)
        scale = np.ascontiguousarray(codes.scale.T)
        each = 8 // grid.bits
        points = np.full((columns, -(-blocks // each) * each), grid.middle, np.uint8)
        points[:, :blocks] = codes.zero.T
        zero = _packed(points, grid.bits).reshape(columns, row)
    return Blocks(
        grid,
        depth,
        columns,
        editor.initializer(reader, f"{name}/int{grid.bits}", data),
        editor.initializer(reader, f"{name}/scale", scale),
        None if grid.symmetric else editor.initializer(reader, f"{name}/zero_point", zero),
    )


def multiply(editor: Editor, node: ir.Node, stored: Blocks, accuracy: int) -> None:
    """Put a MatMulNBits in place of a MatMul or Gemm; a Gemm's bias goes along."""
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    inputs = [node.inputs[0], stored.codes, stored.scale, stored.zero]
    if bias is not None:
        inputs += [None, bias]
    elif stored.zero is None:
        inputs.pop()
    attributes = {
        "K": stored.depth,
        "N": stored.columns,
        "bits": stored.grid.bits,
        "block_size": stored.grid.block,
        "accuracy_level": accuracy,
    }
    _instead(editor, node, "MatMulNBits", inputs, attributes)


def look_up(editor: Editor, node: ir.Node, stored: Blocks, rows: ir.Value) -> None:
    """Put a GatherBlockQuantized in place of a Gather of rows; `rows` is of `row_view`."""
    inputs = [rows, node.inputs[1], stored.scale]
    if stored.zero is not None:
        inputs.append(stored.zero)
    attributes = {
        "bits": stored.grid.bits,
        "block_size": stored.grid.block,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    _instead(editor, node, "GatherBlockQuantized", inputs, attributes)


def fits_rows(grid: Grid, depth: int) -> bool:
    """Whether the blocks of each output are its row of a table, without padding."""
    return grid.bits in WIDTHS and depth % grid.block == 0


def bias_fits(node: ir.Node, columns: int) -> bool:
    """Whether a Gemm has no bias, or one that a MatMulNBits can take along."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (bias.shape is not None and tuple(bias.shape.dims) == (columns,))


def is_plain(node: ir.Node) -> bool:
    """Whether a product has no factors and does not transpose its data."""
    if node.op_type != "Gemm":
        return True
    return not attribute(node, "transA", 0) and (
        attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )


def _instead(
    editor: Editor,
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int],
) -> None:
    graph, result = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    made = ir.Node(
        CONTRIB_DOMAIN,
        op_type,
        inputs,
        ir.convenience.convert_attributes(attributes),
        num_outputs=1,
        name=node.name,
    )
    made.outputs[0].type, made.outputs[0].shape = result.type, result.shape
    made.outputs[0].name = fresh_name(graph, f"{result.name}/nbits")
    editor.insert_before(node, made)
    editor.replace_node(node, made.outputs[0])


def _packed(rows: np.ndarray, bits: int) -> np.ndarray:
    return rows if bits == 8 else pack_bits(rows, bits)
