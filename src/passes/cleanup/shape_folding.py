"""Shape computations whose results are known: replaced by what they compute."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import add_initializer, constant_tensor, graph_tree, is_onnx_op
from ...ir.shapes import ShapeReport, infer_shapes
from ..base import Context, Pass, PassResult, Stage

_SHAPE_DTYPES = (ir.DataType.INT64, ir.DataType.INT32)


@dataclasses.dataclass(frozen=True)
class FoldShapes(Pass):
    """Replaces integer tensors that shape inference knows by constants.

    Where one dimension of a Reshape's target is symbolic, it becomes -1.

        Reshape(x, Concat(Shape(x)[0], [-1], [64]))   ->   Reshape(x, [1, -1, 64])   for batch 1
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
        found = (
            (folded, "folded {} shape computations"),
            (reshaped, "{} Reshape targets to constants"),
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
    dims = report.shape_values(target)
    if dims is None or any(isinstance(d, int) and d <= 0 for d in dims):
        return 0
    symbols = [i for i, d in enumerate(dims) if not isinstance(d, int)]
    if len(symbols) != 1:
        return 0
    array = np.array([d if isinstance(d, int) else -1 for d in dims], np.int64)
    editor.replace_input(node, 1, add_initializer(graph, f"{target.name}/shape", array))
    return 1
