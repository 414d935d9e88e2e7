"""Biases of linear layers, wherever the graph keeps them.

Here: `with_bias`, a layer's result including its bias, `set_bias`, which makes a place for a bias
where there is none, and `add_to_bias`. Not here: what the bias is to be (`repair`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.graph import add_initializer, constant_array, fresh_name, is_onnx_op
from ..quantize.layers import LinearLayer
from ..quantize.qdq import drop_unused_constant, home_of
from .views import GateLayer, StateLayer


def with_bias(layer: LinearLayer) -> ir.Value:
    """The result of the layer: of the Add behind a MatMul, where that adds a bias."""
    found = _add_behind(layer)
    return first_result(layer.node) if found is None else found[0].outputs[0]


def first_result(node: ir.Node) -> ir.Value:
    """The first result of a node that has a name: optional ones may have none."""
    return next((value for value in node.outputs if value.name), node.outputs[0])


def set_bias(layer: LinearLayer, bias: np.ndarray) -> None:
    """Give the layer that bias [outputs], in place of the one it has."""
    if isinstance(layer, GateLayer):
        _set_gates_bias(layer, bias)
        return
    behind = _add_behind(layer)
    if behind is not None:
        node, index = behind
    elif is_onnx_op(layer.node, "MatMul"):
        node, index = _new_add(layer), 1
    else:
        node, index = layer.node, 2
        if len(node.inputs) < 3:
            node.resize_inputs(3)
    old = node.inputs[index]
    base = f"{layer.weight.name}/bias" if old is None else f"{old.name}/repaired"
    node.replace_input_with(index, add_initializer(home_of(layer.weight, node), base, bias))
    if old is not None:
        drop_unused_constant(old)


def _set_gates_bias(layer: GateLayer, bias: np.ndarray) -> None:
    """Of a recurrent layer, the half of the bias that goes with its inputs, or with its state."""
    directions, _, rows = layer.shape
    node = layer.node
    old = node.inputs[3] if len(node.inputs) > 3 else None
    array = constant_array(old) if old is not None else None
    both = np.zeros((directions, 2 * rows), bias.dtype) if array is None else array.copy()
    start = rows if isinstance(layer, StateLayer) else 0
    both[:, start : start + rows] = bias.reshape(directions, rows)
    if len(node.inputs) < 4:
        node.resize_inputs(4)
    base = f"{layer.weight.name}/bias" if old is None else f"{old.name}/repaired"
    node.replace_input_with(3, add_initializer(home_of(layer.weight, node), base, both))
    if old is not None:
        drop_unused_constant(old)


def add_to_bias(layer: LinearLayer, change: np.ndarray) -> tuple[ir.Value, ir.Value] | None:
    """Change the layer's bias; the bias and the result with it. None where it is not a constant."""
    behind = _add_behind(layer)
    old = layer.bias if behind is None else behind[0].inputs[behind[1]]
    bias = np.zeros(1) if old is None else constant_array(old)
    if bias is None or bias.size not in (1, change.size):
        return None
    dtype = layer.weight.dtype
    assert dtype is not None
    set_bias(layer, (bias.reshape(-1) + change).astype(dtype.numpy()))
    behind = _add_behind(layer)
    node, index = behind if behind is not None else (layer.node, 2)
    made = node.inputs[index]
    assert made is not None
    return made, node.outputs[0]


def _add_behind(layer: LinearLayer) -> tuple[ir.Node, int] | None:
    """The Add of a constant vector that a MatMul's result goes into, and which input that is."""
    result = layer.node.outputs[0]
    users = list(result.uses())
    if not is_onnx_op(layer.node, "MatMul") or len(users) != 1 or result.is_graph_output():
        return None
    user, index = users[0].node, 1 - users[0].idx
    constant = constant_array(user.inputs[index]) if is_onnx_op(user, "Add") else None
    width = layer.shape[2]
    if constant is None or not constant.ndim or not constant.size == constant.shape[-1] == width:
        return None
    return user, index


def _new_add(layer: LinearLayer) -> ir.Node:
    """An Add behind a MatMul whose second input is to be set; it takes over the result's name."""
    node = layer.node
    graph, old = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    users = list(old.uses())
    total = ir.Value(name=old.name, type=old.type, shape=old.shape)
    add = ir.Node("", "Add", [old, None], outputs=[total], name=f"{node.name}/bias")
    old.name = fresh_name(graph, f"{old.name}/product")
    graph.insert_after(node, add)
    for user, index in users:
        user.replace_input_with(index, total)
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = total
    return add
