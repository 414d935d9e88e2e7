"""Channels that are constants: what a unit still gives once the weights that compute it are zero.

Here: `known_values`, which follows constants through the graph channel by channel. A unit whose
weights are zero is the constant f(0) behind its activation: zero for ReLU, but one half for a
Sigmoid (the gates of squeeze-excite). Not here: what is done with them (`absorb`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import EdgepassError
from ...ir.graph import attribute, constant_array, constant_tensor, dims_of, is_absent
from ...ir.ops import is_elementwise
from ..quantize.layers import linear_layer
from .labels import factor
from .rules import reduced_axes
from .rules_movement import pads_of, slice_parts

Known = dict[ir.Value, np.ndarray]
"""What is known of values: arrays of their rank, of size 1 along axes where all is alike, NaN where
nothing is known. A value of which nothing is known is not there."""


def known_values(graph: ir.Graph, gone: Mapping[ir.Value, np.ndarray]) -> Known:
    """The constants among the channels that go.

    `gone` is a mask over the channels of the results of linear layers: others are not looked at.
    """
    known: Known = {}
    for node in graph:
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        mask = gone.get(node.outputs[0])
        if mask is not None and linear_layer(node) is not None:
            found = _linear(node, known, mask)
        elif mask is not None and node.op_type == "ConvTranspose":
            found = _transposed(node, known, mask)
        elif not any(v in known for v in node.inputs):
            continue
        elif rule is not None:
            found = rule(node, known)
        elif is_elementwise(node) and len(node.outputs) == 1:
            found = _elementwise(node, known)
        else:
            continue
        if found is not None and np.isfinite(found).any():
            known[node.outputs[0]] = found
    return known


def get(known: Known, value: ir.Value | None) -> np.ndarray | None:
    """What is known of a value, or None; all of a constant."""
    if value is None:
        return None
    if value in known:
        return known[value]
    tensor = constant_tensor(value)
    if tensor is None or is_absent(tensor) or not tensor.dtype.is_floating_point():
        return None
    array = constant_array(value)
    return None if array is None else array.astype(np.float64)


def channel_values(known: Known, value: ir.Value, axis: int) -> np.ndarray | None:
    """What is known of each position along an axis, where it is alike along all others."""
    array, dims = known.get(value), dims_of(value)
    if array is None or dims is None or array.size != array.shape[axis]:
        return None
    size = dims[axis]
    assert isinstance(size, int)
    return np.broadcast_to(array.reshape(-1), (size,))


# --- layers --------------------------------------------------------------------------------------


def _linear(node: ir.Node, known: Known, gone: np.ndarray) -> np.ndarray | None:
    """Outputs all of whose inputs are known, or weighted by zero."""
    layer = linear_layer(node)
    weight = constant_array(layer.weight) if layer is not None else None
    if layer is None or weight is None or is_absent(constant_tensor(layer.weight)):
        return None
    groups, inputs, outputs = layer.shape
    taps = math.prod(weight.shape[2:])
    rank = len(dims_of(layer.data) or ())
    values = channel_values(known, layer.data, layer.channel_axis % rank)
    if values is None:
        values = np.full(groups * inputs // taps, np.nan)
    settled = np.isfinite(values) & ((values == 0) | (not _is_padded(node)))
    rows = settled.repeat(taps).reshape(groups, inputs, 1)
    matrix = layer.matrix(weight).astype(np.float64)
    unknown = ((matrix != 0) & ~rows).any(axis=1)
    sums = (matrix * np.where(settled, values, 0).repeat(taps).reshape(rows.shape)).sum(axis=1)
    result = np.where(unknown, np.nan, sums).reshape(groups * outputs)
    return _with_bias(node, np.where(gone, result, np.nan), layer.bias, layer.channel_axis)


def _with_bias(
    node: ir.Node, result: np.ndarray, bias: ir.Value | None, axis: int
) -> np.ndarray | None:
    added = np.zeros(1) if bias is None else constant_array(bias)
    if added is None or added.size not in (1, result.size):
        return None
    shape = [1] * len(dims_of(node.outputs[0]) or ())
    shape[axis] = result.size
    return (result + added.reshape(-1).astype(np.float64)).reshape(shape)


def _transposed(node: ir.Node, known: Known, gone: np.ndarray) -> np.ndarray | None:
    """Outputs of a ConvTranspose all of whose inputs are zero, or weighted by zero."""
    data, weight = node.inputs[0], constant_array(node.inputs[1])
    if weight is None or is_absent(constant_tensor(node.inputs[1])) or data is None:
        return None
    groups = int(attribute(node, "group", 1))
    values = channel_values(known, data, 1)
    zero = np.zeros(weight.shape[0], bool) if values is None else values == 0
    heard = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=2) & ~zero[:, None]
    unknown = heard.reshape(groups, -1, weight.shape[1]).any(axis=1).reshape(-1)
    result = np.where(unknown | ~gone, np.nan, 0.0)
    return _with_bias(node, result, node.inputs[2] if len(node.inputs) > 2 else None, 1)


def _is_padded(node: ir.Node) -> bool:
    return node.op_type == "Conv" and (
        any(attribute(node, "pads", None) or ())
        or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    )


def _product(node: ir.Node, known: Known) -> np.ndarray | None:
    """Two computed matrices: columns of zeros stay; what Softmax averages over is constant."""
    right = get(known, node.inputs[1])
    if right is None or right.ndim < 2 or right.shape[-2] != 1:
        return None
    left = node.inputs[0]
    source = left.producer() if left is not None else None
    rank = len(dims_of(left) or ())
    averages = (
        source is not None
        and source.op_type == "Softmax"
        and attribute(source, "axis", -1) in (-1, rank - 1)
    )
    return right if averages else np.where(right == 0, right, np.nan)


# --- elementwise ---------------------------------------------------------------------------------


def _elementwise(node: ir.Node, known: Known) -> np.ndarray | None:
    arrays = {v: get(known, v) for v in node.inputs if v is not None}
    if node.op_type in ("Mul", "Div"):
        return _times(node, [arrays[v] for v in node.inputs if v is not None])
    given = {v: a for v, a in arrays.items() if a is not None}
    return _run(node, given) if len(given) == len(arrays) else None


def _times(node: ir.Node, arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Zero times anything is zero."""
    dims = dims_of(node.outputs[0])
    a, b = (np.full((), np.nan) if x is None else x for x in arrays)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = a * b if node.op_type == "Mul" else a / b
    zero = (a == 0) | (b == 0) if node.op_type == "Mul" else (a == 0) & (b != 0)
    result = np.where(zero, 0.0, result)
    return result.reshape([1] * (len(dims or ()) - result.ndim) + list(result.shape))


def _run(node: ir.Node, arrays: Mapping[ir.Value, np.ndarray]) -> np.ndarray | None:
    """The node on arrays of these sizes, by the runtime."""
    from ...targets.onnxruntime import OrtRunner

    graph = node.graph
    if graph is None or not all(v.dtype and v.dtype.is_floating_point() for v in arrays):
        return None
    copies = {
        v: ir.Value(name=f"x{i}", shape=ir.Shape(a.shape), type=v.type)
        for i, (v, a) in enumerate(arrays.items())
    }
    output = ir.Value(name="y", type=node.outputs[0].type)
    attributes = [ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()]
    inputs = [None if v is None else copies[v] for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[output], name="node")
    opsets = dict(graph.opset_imports)
    scratch = ir.Graph(
        list(copies.values()), [output], nodes=[copy], opset_imports=opsets, name="constants"
    )
    feed = {
        copies[v].name or "": np.nan_to_num(a, nan=0.0).astype(v.dtype.numpy())  # type: ignore[union-attr]
        for v, a in arrays.items()
    }
    try:
        with OrtRunner(ir.Model(scratch, ir_version=10), optimize=False) as runner:
            result = runner.run(feed)["y"].astype(np.float64)
    except EdgepassError:
        return None
    unknown = np.zeros((), bool)
    for array in arrays.values():
        unknown = unknown | np.isnan(array)
    return np.where(unknown, np.nan, result)


# --- normalizations ------------------------------------------------------------------------------


def _batch_norm(node: ir.Node, known: Known) -> np.ndarray | None:
    data = node.inputs[0]
    values = channel_values(known, data, 1) if data is not None else None
    parameters = [get(known, v) for v in node.inputs[1:5]]
    if values is None or any(p is None for p in parameters):
        return None
    scale, shift, mean, variance = (p for p in parameters if p is not None)
    epsilon = float(attribute(node, "epsilon", 1e-5))
    result = (values - mean) / np.sqrt(variance + epsilon) * scale + shift
    return _on_channels(node, np.where(scale == 0, shift, result))


def _instance_norm(node: ir.Node, known: Known) -> np.ndarray | None:
    data = node.inputs[0]
    values = channel_values(known, data, 1) if data is not None else None
    scale, shift = get(known, node.inputs[1]), get(known, node.inputs[2])
    if values is None or scale is None or shift is None:
        return None
    return _on_channels(node, np.where(np.isfinite(values) | (scale == 0), shift, np.nan))


def _on_channels(node: ir.Node, values: np.ndarray) -> np.ndarray:
    rank = len(dims_of(node.outputs[0]) or ())
    return values.reshape(1, -1, *[1] * (rank - 2))


def _rms_norm(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    return None if array is None else np.where(array == 0, 0.0, np.nan)


# --- layout --------------------------------------------------------------------------------------


def _reshape(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    pieces = factor(before, after) if before is not None and after is not None else None
    if array is None or pieces is None or before is None or after is None:
        return None
    full: list[int] = []
    shape: list[int] = []
    for ins, outs in pieces:
        if all(array.shape[a] == 1 for a in ins):
            full += [1] * len(ins)
            shape += [1] * len(outs)
            continue
        sizes = [before[a] for a in ins] + [after[a] for a in outs]
        if not all(isinstance(d, int) for d in sizes) and (len(sizes) > 2 or not outs):
            return None
        if len(ins) == 1 == len(outs):
            full.append(array.shape[ins[0]])
            shape.append(array.shape[ins[0]])
            continue
        full += [int(before[a]) for a in ins]  # type: ignore[arg-type]
        shape += [int(after[a]) for a in outs]  # type: ignore[arg-type]
    return np.broadcast_to(array, full).reshape(shape)


def _transpose(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    return None if array is None else array.transpose(attribute(node, "perm", None))


def _concat(node: ir.Node, known: Known) -> np.ndarray | None:
    axis = int(attribute(node, "axis", 0))
    rank = len(dims_of(node.outputs[0]) or ())
    parts = []
    for value in node.inputs:
        size = (dims_of(value) or (None,) * rank)[axis]
        if not isinstance(size, int):
            return None
        array = get(known, value)
        parts.append((np.full([1] * rank, np.nan) if array is None else array, size))
    shape = list(np.broadcast_shapes(*[_without(p.shape, axis) for p, _ in parts]))
    full = []
    for part, size in parts:
        shape[axis] = size
        full.append(np.broadcast_to(part, shape))
    return np.concatenate(full, axis)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = 1
    return tuple(sizes)


def _slice(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    if array is None:
        return None
    parts = slice_parts(node, array.ndim)
    for axis in range(array.ndim):
        if array.shape[axis] == 1:
            continue
        if parts is None:
            return None
        if axis in parts:
            start, end, step = parts[axis]
            size = array.shape[axis]
            stop = None if step < 0 and end < -size else end
            array = array.take(np.arange(size)[start:stop:step], axis)
    return array


def _split(node: ir.Node, known: Known) -> np.ndarray | None:
    """The tracks of all outputs but the first are set in passing."""
    array = get(known, node.inputs[0])
    if array is None:
        return None
    axis = int(attribute(node, "axis", 0)) % array.ndim
    start = 0
    for output in node.outputs:
        size = (dims_of(output) or (None,) * array.ndim)[axis]
        if not isinstance(size, int):
            return None
        alike = array.shape[axis] == 1
        known[output] = array if alike else array.take(range(start, start + size), axis)
        start += size
    return known[node.outputs[0]]


def _gather(node: ir.Node, known: Known) -> np.ndarray | None:
    array, indices = get(known, node.inputs[0]), constant_array(node.inputs[1])
    picked = dims_of(node.inputs[1])
    if array is None or picked is None:
        return None
    axis = int(attribute(node, "axis", 0)) % array.ndim
    if array.shape[axis] == 1:
        return array.reshape(*array.shape[:axis], *[1] * len(picked), *array.shape[axis + 1 :])
    return None if indices is None else np.asarray(array.take(indices, axis))


def _pad(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    pads = pads_of(node, array.ndim) if array is not None else None
    if array is None or pads is None or attribute(node, "mode", "constant") != "constant":
        return None
    filled = node.inputs[2] if len(node.inputs) > 2 else None
    value = constant_array(filled) if filled is not None else np.zeros(())
    if value is None:
        return None
    for axis, sides in enumerate(pads):
        if sides != (0, 0) and array.shape[axis] == 1:
            array = np.where(array == float(value.reshape(-1)[0]), array, np.nan)
    widths = [p if array.shape[a] > 1 else (0, 0) for a, p in enumerate(pads)]
    return np.pad(array, widths, constant_values=float(value.reshape(-1)[0]))


def _expand(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    rank = len(dims_of(node.outputs[0]) or ())
    return None if array is None else array.reshape([1] * (rank - array.ndim) + list(array.shape))


# --- pooling -------------------------------------------------------------------------------------


def _pool(node: ir.Node, known: Known) -> np.ndarray | None:
    """A constant is its own maximum and mean; not where zeros are averaged in at the border."""
    array = get(known, node.inputs[0])
    if array is None or any(d != 1 for d in array.shape[2:]):
        return None
    if node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0):
        return np.where(array == 0, array, np.nan)
    return array


def _reduce(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    axes = reduced_axes(node, array.ndim) if array is not None else None
    if array is None or axes is None or any(array.shape[a] != 1 for a in axes):
        return None
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        array = np.where(array == 0, array, np.nan)
    return (
        array
        if attribute(node, "keepdims", 1)
        else array.reshape([d for a, d in enumerate(array.shape) if a not in axes])
    )


def _resize(node: ir.Node, known: Known) -> np.ndarray | None:
    array = get(known, node.inputs[0])
    changed = [
        a
        for a, (x, y) in enumerate(
            zip(dims_of(node.inputs[0]) or (), dims_of(node.outputs[0]) or (), strict=True)
        )
        if str(x) != str(y)
    ]
    smooth = attribute(node, "mode", "nearest") in ("nearest", "linear")
    if array is None or not smooth or any(array.shape[a] != 1 for a in changed):
        return None
    return array


_RULES: dict[str, Callable[[ir.Node, Known], np.ndarray | None]] = {
    "MatMul": _product,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "RMSNormalization": _rms_norm,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _pool,
    "ReduceMean": _reduce,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "Resize": _resize,
}
