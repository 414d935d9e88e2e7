"""Shape computations whose results are known: replaced by what they compute, or by another that
computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    add_initializer,
    constant_tensor,
    dims_of,
    graph_tree,
    is_onnx_op,
    node_subgraphs,
)
from ...ir.shapes import ShapeReport, infer_shapes
from ..base import Context, Pass, PassResult, Stage
from .conditions import reshape_target

_SHAPE_DTYPES = (ir.DataType.INT64, ir.DataType.INT32)


@dataclasses.dataclass(frozen=True)
class FoldShapes(Pass):
    """Replaces integer tensors that shape inference knows by constants.

    A Reshape's target becomes constant where one dimension at most is neither known nor that of
    the input at the same place: -1 stands for it, 0 for a dimension that is copied. Of several
    computations of the same symbolic sizes the first stays, whatever tensors they start from.

        Reshape(x, Concat(Shape(x)[0], [-1], [64]))   ->   Reshape(x, [0, -1, 64])
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if not any(_may_fold(node) for graph in graph_tree(model.graph) for node in graph):
            return PassResult(model, False)
        report = infer_shapes(model)
        editor = Editor()
        folded = reshaped = 0
        for graph in graph_tree(model.graph):
            for node in list(graph):
                folded += _fold_known(graph, node, report, editor)
                reshaped += _fold_reshape(graph, node, report, editor)
        shared = _share_equal(model.graph, report, editor, {})
        found = (
            (folded, "folded {} shape computations"),
            (reshaped, "{} Reshape targets to constants"),
            (shared, "{} shape computations made once"),
        )
        notes = tuple(text.format(count) for count, text in found if count)
        return PassResult(model, bool(notes), notes)


def _may_fold(node: ir.Node) -> bool:
    """Whether it is worth inferring what the node computes."""
    if is_onnx_op(node, "Constant"):
        return False
    if is_onnx_op(node, "Reshape"):
        return len(node.inputs) > 1 and constant_tensor(node.inputs[1]) is None
    return len(node.outputs) == 1 and node.outputs[0].dtype in _SHAPE_DTYPES


def _fold_known(graph: ir.Graph, node: ir.Node, report: ShapeReport, editor: Editor) -> int:
    if is_onnx_op(node, "Constant") or len(node.outputs) != 1:
        return 0
    value = node.outputs[0]
    if not value.uses() or value.dtype not in _SHAPE_DTYPES:
        return 0
    array = _known_array(value, report)
    if array is None:
        return 0
    users = [(user, index) for user, index in value.uses()]
    replacement = add_initializer(graph, f"{value.name}/shape", array)
    for user, index in users:
        editor.replace_input(user, index, replacement)
    return 1


def _known_array(value: ir.Value, report: ShapeReport) -> np.ndarray | None:
    dims = report.shape_values(value)
    if dims is None or value.shape is None or value.dtype is None:
        return None
    if not all(isinstance(d, int) for d in dims) or len(value.shape) > 1:
        return None
    array = np.array(dims, value.dtype.numpy())
    return array.reshape(()) if len(value.shape) == 0 else array


def _fold_reshape(graph: ir.Graph, node: ir.Node, report: ShapeReport, editor: Editor) -> int:
    if not is_onnx_op(node, "Reshape") or len(node.inputs) < 2:
        return 0
    target = node.inputs[1]
    if target is None or constant_tensor(target) is not None:
        return 0
    if (a := node.attributes.get("allowzero")) is not None and a.as_int():
        return 0
    source, result = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    array = None if result is None or 0 in result else reshape_target(result, source)
    if array is None:
        return 0
    editor.replace_input(node, 1, add_initializer(graph, f"{target.name}/shape", array))
    return 1


def _share_equal(
    graph: ir.Graph, report: ShapeReport, editor: Editor, first: dict[Hashable, ir.Value]
) -> int:
    """Let all users of equal sizes use the value that is computed first."""
    shared = 0
    added: list[Hashable] = []
    for node in graph:
        for subgraph in node_subgraphs(node):
            shared += _share_equal(subgraph, report, editor, first)
        if len(node.outputs) != 1 or node.outputs[0].dtype not in _SHAPE_DTYPES:
            continue
        value = node.outputs[0]
        key = _symbols(value, report)
        if key is None:
            continue
        other = first.setdefault(key, value)
        if other is value:
            added.append(key)
        elif value.uses() and not value.is_graph_output():
            editor.replace_value(value, other)
            shared += 1
    for key in added:
        del first[key]
    return shared


def _symbols(value: ir.Value, report: ShapeReport) -> Hashable | None:
    """What identifies a value of at least one symbol, all of them named."""
    dims = report.shape_values(value)
    if dims is None or value.shape is None or len(value.shape) > 1:
        return None
    if all(isinstance(d, int) for d in dims):
        return None
    names = tuple(d if isinstance(d, int) else d.value for d in dims)
    if None in names:
        return None
    return value.dtype, len(value.shape), names
