"""Shapes that are computed in the graph, written so that TVM sees which input dimension they are.

Here: rewriting the target of `Reshape`, `Expand` and `ConstantOfShape`, and padding that is
implied, wherever shape inference already knows the answer. Not here: inferring shapes, and
fixing dynamic dimensions (`prepare`).

Why: TVM's importer follows a shape only through `Shape`, `Slice` and `Concat`; after arithmetic,
a cast or a gather it is an opaque tensor, and everything behind it loses its shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...ir.graph import Dim, add_initializer, attribute, constant_array, dims_of, is_onnx_op


def name_shape_targets(graph: ir.Graph) -> int:
    """Rewrite computed shape operands in the main graph; returns how many.

    Before: Reshape(x, Concat(Mul(Gather(Shape(a), 0), 2), ...)), output inferred as [N, L, 384]
    After:  Reshape(x, Concat(Shape(input)[0:1], Shape(input)[1:2], [384]))

    A dimension that is an expression becomes -1 in a `Reshape`, at most once; a target with more
    of them stays as it is.
    """
    sources = dimension_sources(graph)
    pieces: dict[str, ir.Value] = {}
    changed = 0
    for node in list(graph):
        position = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}.get(node.op_type)
        if position is None or not is_onnx_op(node, node.op_type):
            continue
        dims = dims_of(node.outputs[0])
        if not dims or (
            node.op_type != "Expand" and constant_array(node.inputs[position]) is not None
        ):
            continue  # an Expand's constant may be smaller than the result; TVM wants the result
        target = _target(dims, sources, inferable=node.op_type == "Reshape")
        if target is None:
            continue
        value = _shape_value(graph, node, target, sources, pieces)
        node.replace_input_with(position, value)
        changed += 1
    return changed


def dimension_sources(graph: ir.Graph) -> dict[str, tuple[ir.Value, int]]:
    """Symbolic dimension -> the first graph input and axis that have it."""
    sources: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(dims_of(value) or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                sources.setdefault(dim.value, (value, axis))
    return sources


def _target(
    dims: tuple[Dim, ...], sources: Mapping[str, object], *, inferable: bool
) -> list[int | str] | None:
    target: list[int | str] = []
    for dim in dims:
        if isinstance(dim, int):
            target.append(dim)
        elif dim.value in sources:
            target.append(str(dim.value))
        elif inferable and -1 not in target:
            target.append(-1)
        else:
            return None
    # 0 in a Reshape target means "as before", which is not what a size of 0 says.
    return None if 0 in target else target


def _shape_value(
    graph: ir.Graph,
    before: ir.Node,
    target: list[int | str],
    sources: Mapping[str, tuple[ir.Value, int]],
    pieces: dict[str, ir.Value],
) -> ir.Value:
    if all(isinstance(dim, int) for dim in target):
        return add_initializer(graph, "shape", np.array(target, np.int64))
    parts: list[ir.Value] = []
    for dim in target:
        if isinstance(dim, int):
            parts.append(add_initializer(graph, "dim", np.array([dim], np.int64)))
            continue
        if dim not in pieces:
            pieces[dim] = _input_dimension(graph, *sources[dim])
        parts.append(pieces[dim])
    concat = ir.node("Concat", parts, attributes={"axis": 0}, name=before.name)
    graph.insert_before(before, concat)
    return concat.outputs[0]


def _input_dimension(graph: ir.Graph, value: ir.Value, axis: int) -> ir.Value:
    """`Shape(value)[axis:axis+1]`, at the head of the graph so that every user comes after."""
    bounds = [
        add_initializer(graph, "bound", np.array([bound], np.int64)) for bound in (axis, axis + 1)
    ]
    shape = ir.node("Shape", [value])
    part = ir.node("Slice", [shape.outputs[0], *bounds])
    first = graph[0]
    graph.insert_before(first, [shape, part])
    return part.outputs[0]


# --- implied padding -------------------------------------------------------------------------


def write_out_padding(graph: ir.Graph) -> int:
    """Turn `auto_pad="SAME_*"` of convolutions and pools into `pads`; returns how many.

    TVM computes that padding from static sizes only, and rounds down for SAME_LOWER. With stride
    1 it does not depend on the size; otherwise it needs the input's spatial sizes.
    Total padding per axis is max((ceil(size / stride) - 1) * stride + extent - size, 0), with
    extent = (kernel - 1) * dilation + 1 (ONNX operators Conv, MaxPool, AveragePool).
    """
    changed = 0
    for node in graph:
        if not is_onnx_op(node, "Conv", "MaxPool", "AveragePool", "LpPool"):
            continue
        mode = attribute(node, "auto_pad", "NOTSET")
        pads = _same_padding(node, mode) if mode in ("SAME_UPPER", "SAME_LOWER") else None
        if pads is None:
            continue
        del node.attributes["auto_pad"]
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        changed += 1
    return changed


def _same_padding(node: ir.Node, mode: str) -> list[int] | None:
    dims = dims_of(node.inputs[0])
    weight = dims_of(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = attribute(node, "kernel_shape") or (weight[2:] if weight else None)
    if dims is None or kernel is None or not all(isinstance(k, int) for k in kernel):
        return None
    rank = len(kernel)
    strides = attribute(node, "strides", (1,) * rank)
    dilations = attribute(node, "dilations", (1,) * rank)
    begins, ends = [], []
    for size, k, stride, dilation in zip(dims[2:], kernel, strides, dilations, strict=True):
        extent = (k - 1) * dilation + 1
        if stride == 1:
            total = extent - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        else:
            return None
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return [*begins, *ends]
