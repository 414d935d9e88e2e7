"""How labels pass LSTM, GRU and RNN, operators with hidden units inside."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_array, is_onnx_op, static_shape
from .flow import Flow, is_parameter, rule, where_is
from .labels import Track

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_MOVES = (
    "Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip


@rule("LSTM", "GRU", "RNN")
def _recurrent(flow: Flow, node: ir.Node) -> None:
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    data, weight, state, bias, lengths, hidden, cell, peephole = inputs[:8]
    shape = static_shape(state)
    parameters = [v for v in (weight, state, bias, peephole) if v is not None]
    known = all(is_parameter(v) for v in parameters)
    if shape is None or not known or attribute(node, "layout", 0) or lengths is not None:
        flow.block_node(node, "its weights, layout or lengths are not followed")
        return
    assert weight is not None
    assert state is not None
    gates = _GATES[node.op_type]
    directions, size = shape[0], shape[2]
    ids = flow.labels.new(directions, size)
    flow.labels.must_balance(ids)
    taken = _input_labels(flow, node, data, weight)
    parts: list[tuple[ir.Value | None, int, bool]] = [(weight, gates, False), (state, gates, True)]
    parts += [(bias, 2 * gates, False), (peephole, 3, False)]
    for value, rows, squared in parts:
        if value is None:
            continue
        dims = static_shape(value) or ()
        finer = (directions, rows, size, *dims[2:])
        tracks = [_joint(ids, 0, 2)]
        if squared:
            tracks.append(_joint(ids, 0, 3))
        elif value is weight:
            tracks.append(Track((3,), taken))
        flow.view(value, finer, tracks)
        flow.use(node, value, "state", ids)
    for value in (hidden, cell):
        if value is not None and not is_the_same_everywhere(value):
            result = flow.operand(value, 3)
            own = type(result)("the state", (directions, 1, size), (_joint(ids, 0, 2),))
            flow.merge([own, result], node)
    for output, axes in zip(node.outputs, ((1, 3), (0, 2), (0, 2)), strict=False):
        flow.put(output, [_joint(ids, *axes)])


def is_the_same_everywhere(value: ir.Value) -> bool:
    """Whether a tensor is one number repeated (a state of zeros): any part of it will do."""
    while (node := value.producer()) is not None and is_onnx_op(node, *_MOVES):
        if node.inputs[0] is None:
            return False
        value = node.inputs[0]
    if node is not None and is_onnx_op(node, "ConstantOfShape"):
        return True
    array = constant_array(value)
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())


def _joint(ids: np.ndarray, outer: int, inner: int) -> Track:
    """Directions and units in them, or units alone where there is one direction."""
    return Track((inner,), ids[0]) if ids.shape[0] == 1 else Track((outer, inner), ids)


def _input_labels(flow: Flow, node: ir.Node, data: ir.Value | None, weight: ir.Value) -> np.ndarray:
    shape = static_shape(weight) or (0, 0, 0)
    taken = flow.labels.new(shape[2])
    reason = f"{where_is(node)}: this axis is time or the batch"
    kept = [flow.labels.uniform(t, (0, 1), reason) for t in flow.of(data)]
    own = next((t.ids for t in kept if t is not None and t.axes == (2,)), None)
    if own is None:
        flow.labels.block(taken, f"{where_is(node)}: its input's channels are not followed")
    else:
        flow.labels.unite(taken, own)
        flow.use(node, weight, "in", taken)
    return taken
