"""How labels pass operators that compute: elementwise ones, products, convolutions, reductions.

Each rule sets the tracks of the node's outputs. Not here: layout (`rules_movement`), normalization
(`rules_norms`), recurrence (`rules_recurrent`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_array, dims_of, static_shape
from ...ir.ops import is_elementwise
from .flow import Flow, base, is_parameter, rule, where_is
from .labels import Track

_WIDE_GROUP = 16
"""Groups of a convolution with no more channels than this are removed whole."""


def elementwise(flow: Flow, node: ir.Node) -> None:
    """Labels at the same place are one."""
    output = node.outputs[0]
    dims = dims_of(output)
    if dims is None:
        flow.block_node(node, "its shape is not known")
        return
    if any(len(dims_of(v) or ()) > len(dims) for v in node.inputs):
        flow.block_node(node)
        return
    operands = [flow.operand(v, len(dims)) for v in node.inputs if v is not None]
    tracks = flow.merge(operands, node)
    for value in node.inputs:
        _use_vector(flow, node, value, "bias" if node.op_type == "Add" else "other")
    for out in node.outputs:
        flow.put(out, tracks if out is output else ())


def _use_vector(flow: Flow, node: ir.Node, value: ir.Value | None, role: str) -> None:
    tracks = flow.of(value) if base(value) is not None else ()
    if len(tracks) == 1 and tracks[0].ids.ndim == 1:
        flow.use(node, value, role, tracks[0].ids)


@rule("QuantizeLinear", "DequantizeLinear")
def _quantize(flow: Flow, node: ir.Node) -> None:
    data, *parameters = node.inputs
    dims = dims_of(data)
    if data is None or dims is None or attribute(node, "block_size", 0):
        flow.block_node(node, "values are scaled in blocks")
        return
    axis = attribute(node, "axis", 1)
    axis += len(dims) if axis < 0 else 0
    operands = [flow.operand(data, len(dims))]
    for value in parameters:
        size = static_shape(value)
        if value is not None and size and size != (1,):
            operands.append(flow.operand(value, len(dims), start=axis))
            _mark(flow, node, value, "other")
    flow.put(node.outputs[0], flow.merge(operands, node))


def _mark(flow: Flow, node: ir.Node, value: ir.Value | None, role: str) -> None:
    """Note the role of a vector that is a parameter."""
    track = flow.at(value, 0)
    if track is not None:
        flow.use(node, value, role, track.ids)


def unite_vector(
    flow: Flow, node: ir.Node, value: ir.Value | None, ids: np.ndarray, role: str
) -> None:
    """A parameter [channels] goes with these labels; of any other tensor they are blocked."""
    if value is None:
        return
    track = flow.at(value, 0)
    if static_shape(value) == (1,) and ids.size != 1:
        return
    if track is None or track.ids.shape != ids.shape:
        flow.labels.block(ids, f"{where_is(node)}: {value.name!r} is not followed")
        return
    flow.labels.unite(ids, track.ids)
    flow.use(node, value, role, ids)


# --- convolution -------------------------------------------------------------------------------


@rule("Conv", "ConvTranspose", "ConvInteger")
def _convolution(flow: Flow, node: ir.Node) -> None:
    data, weight, *rest = node.inputs
    shape = static_shape(weight)
    if data is None or weight is None or shape is None:
        flow.block_node(node, "its weight's shape is not known")
        return
    groups = int(attribute(node, "group", 1))
    spatial = range(2, 2 + len(shape) - 2)
    fixed = f"{where_is(node)}: the sizes of what it slides over are fixed"
    tracks = [flow.labels.uniform(t, spatial, fixed) for t in flow.of(data)]
    heads = [_beside_channels(flow, node, t) for t in tracks if t is not None and 0 in t.axes]
    tracks = [t for t in tracks if t is not None and 0 not in t.axes]
    inputs = next((t.ids for t in tracks if t is not None and t.axes == (1,)), None)
    for track in tracks:
        if track is not None and track.axes != (1,):
            flow.labels.block(track.ids, f"{where_is(node)}: sums over more than channels")
    if heads:
        # the batch is made of heads: these may go, channels in each are the same for all
        flow.put(node.outputs[0], [t for t in heads if t is not None])
        return
    if node.op_type == "ConvTranspose":
        outputs = _transposed(flow, node, weight, shape, groups, inputs)
    elif groups == 1:
        outputs = _matrix(flow, node, weight, inputs, in_axis=1, out_axis=0)
    else:
        outputs = _grouped(flow, node, weight, shape, groups, inputs)
    if outputs is None:
        flow.put(node.outputs[0], ())
        return
    bias = rest[0] if rest and node.op_type != "ConvInteger" else None
    unite_vector(flow, node, bias, outputs, "bias")
    flow.put(node.outputs[0], [Track((1,), outputs)] if outputs.size > 1 else [])


def _beside_channels(flow: Flow, node: ir.Node, track: Track) -> Track | None:
    """What is left of a track on the batch when the channels keep their number."""
    reason = f"{where_is(node)}: one weight for all of these"
    return flow.labels.uniform(track, [a for a in track.axes if a > 0], reason)


def _matrix(
    flow: Flow,
    node: ir.Node,
    weight: ir.Value,
    inputs: np.ndarray | None,
    *,
    in_axis: int,
    out_axis: int,
) -> np.ndarray | None:
    """Tie the inputs with one axis of the weight; the labels of the other."""
    source, target = flow.at(weight, in_axis), flow.at(weight, out_axis)
    if source is not None and source.ids.ndim == 1:
        if inputs is None:
            flow.labels.block(
                source.ids, f"{where_is(node)}: its input's channels are not followed"
            )
        else:
            flow.labels.unite(source.ids, inputs)
            flow.use(node, weight, "in", source.ids)
    elif inputs is not None:
        flow.labels.block(inputs, f"{where_is(node)}: its weight is not followed")
    if target is None or target.ids.ndim != 1:
        return None
    flow.use(node, weight, "out", target.ids)
    return target.ids


def _grouped(
    flow: Flow,
    node: ir.Node,
    weight: ir.Value,
    shape: tuple[int, ...],
    groups: int,
    inputs: np.ndarray | None,
) -> np.ndarray | None:
    outs, ins = shape[0] // groups, shape[1]
    if not is_parameter(weight) or inputs is None:
        flow.block(weight, f"{where_is(node)}: its input's channels are not followed")
        if inputs is not None:
            flow.labels.block(inputs, f"{where_is(node)}: its weight is not followed")
        return None
    rows = inputs.reshape(groups, ins)
    if ins == 1:
        track = flow.at(weight, 0)
        if track is None or track.ids.ndim != 1:
            return None
        flow.labels.unite(track.ids.reshape(groups, outs), rows)
        flow.use(node, weight, "depthwise", track.ids)
        return track.ids
    produced = flow.labels.new(groups, outs)
    taken = flow.labels.new(groups, ins)
    flow.labels.unite(taken, rows)
    finer = (groups, outs, ins, *shape[2:])
    flow.view(weight, finer, [Track((0, 1), produced), Track((0, 2), taken)])
    if min(ins, outs) <= _WIDE_GROUP:
        flow.labels.unite(produced, produced[:, :1])
        flow.labels.unite(taken, produced[:, :1])
    else:
        flow.labels.must_balance(taken)
        flow.labels.must_balance(produced)
    flow.use(node, weight, "in", taken)
    flow.use(node, weight, "out", produced)
    return produced.reshape(-1)


def _transposed(
    flow: Flow,
    node: ir.Node,
    weight: ir.Value,
    shape: tuple[int, ...],
    groups: int,
    inputs: np.ndarray | None,
) -> np.ndarray | None:
    if groups == 1:
        return _matrix(flow, node, weight, inputs, in_axis=0, out_axis=1)
    ins, outs = shape[0] // groups, shape[1]
    if not is_parameter(weight) or inputs is None:
        flow.block_node(node, "its input's channels are not followed")
        return None
    taken = flow.labels.new(groups, ins)
    produced = flow.labels.new(groups, outs)
    flow.labels.unite(taken, inputs.reshape(groups, ins))
    flow.labels.unite(taken, produced[:, :1])
    flow.labels.unite(produced, produced[:, :1])
    finer = (groups, ins, outs, *shape[2:])
    flow.view(weight, finer, [Track((0, 1), taken), Track((0, 2), produced)])
    flow.use(node, weight, "in", taken)
    flow.use(node, weight, "out", produced)
    return produced.reshape(-1)


# --- products ----------------------------------------------------------------------------------


@rule("MatMul", "MatMulInteger")
def _matmul(flow: Flow, node: ir.Node) -> None:
    a, b = node.inputs[:2]
    left, right = dims_of(a), dims_of(b)
    if a is None or b is None or not left or not right:
        flow.block_node(node, "its shapes are not known")
        return
    batch = [f"batch{i}" for i in range(max(len(left), len(right), 2) - 2)]
    x = [*batch[len(batch) - len(left) + 2 :], "m", "k"] if len(left) > 1 else ["k"]
    y = [*batch[len(batch) - len(right) + 2 :], "k", "n"] if len(right) > 1 else ["k"]
    out = [*batch, *(["m"] if len(left) > 1 else []), *(["n"] if len(right) > 1 else [])]
    product(flow, node, ((a, x), (b, y)), out)


@rule("Gemm")
def _gemm(flow: Flow, node: ir.Node) -> None:
    a, b, *rest = node.inputs
    if a is None or b is None:
        flow.block_node(node)
        return
    x = ["k", "m"] if attribute(node, "transA", 0) else ["m", "k"]
    y = ["n", "k"] if attribute(node, "transB", 0) else ["k", "n"]
    product(flow, node, ((a, x), (b, y)), ["m", "n"])
    if rest and rest[0] is not None:
        bias = rest[0]
        result = flow.operand(node.outputs[0], 2)
        flow.put(node.outputs[0], flow.merge([result, flow.operand(bias, 2)], node))
        _use_vector(flow, node, bias, "bias")


@rule("Einsum")
def _einsum(flow: Flow, node: ir.Node) -> None:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    sources, arrow, target = equation.partition("->")
    terms = sources.split(",")
    values = [v for v in node.inputs if v is not None]
    repeated = any(len(set(t)) < len(t) for t in terms)
    if not arrow or "." in equation or repeated or len(terms) != len(values):
        flow.block_node(node, f"the equation {equation!r} is not followed")
        return
    product(flow, node, [(v, list(t)) for v, t in zip(values, terms, strict=True)], list(target))


def product(
    flow: Flow,
    node: ir.Node,
    operands: Sequence[tuple[ir.Value, Sequence[str]]],
    result: Sequence[str],
) -> None:
    """A sum of products over named axes: those that the result lacks are summed over."""
    names = list(dict.fromkeys(name for _, own in operands for name in own))
    places = [flow.placed(v, [names.index(n) for n in own], len(names)) for v, own in operands]
    merged = flow.merge(places, node)
    summed = [i for i, name in enumerate(names) if name not in result]
    left = [flow.labels.contract(track, summed) for track in merged]
    to = {names.index(name): i for i, name in enumerate(result)}
    flow.put(node.outputs[0], [t.moved(to) for t in left if t is not None])
    for value, own in operands:
        for axis, name in enumerate(own):
            track = flow.at(value, axis)
            if base(value) is None or track is None or track.axes != (axis,):
                continue
            flow.use(node, value, "out" if name in result else "in", track.ids)


# --- reductions --------------------------------------------------------------------------------


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceProd",
    "ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum",
)  # fmt: skip
def _reduce(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    dims = dims_of(data)
    axes = reduced_axes(node, len(dims)) if dims is not None else None
    if data is None or dims is None or axes is None:
        flow.block_node(node, "the axes it reduces are not known")
        return
    keep = bool(attribute(node, "keepdims", 1))
    sums = node.op_type in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    reason = f"{where_is(node)}: takes statistics over these channels"
    found = []
    for track in flow.of(data):
        reduced = [a for a in track.axes if a in axes]
        # what is left (groups of channels) goes whole: the statistics of others stay
        counted = sums or (flow.widths and node.op_type == "ReduceMean" and _is_zero(data, reduced))
        if reduced and not counted and flow.labels.uniform(track, reduced, reason) is None:
            continue
        left = flow.labels.contract(track, axes)
        if left is not None:
            found.append(left)
    kept = [a for a in range(len(dims)) if keep or a not in axes]
    flow.put(node.outputs[0], [t.moved({a: kept.index(a) for a in t.axes}) for t in found])


def _is_zero(value: ir.Value | None, axes: Sequence[int]) -> bool:
    """Whether channels of zeros are still zeros here, as far as can be seen.

    Not behind the subtraction of a mean: a LayerNormalization in parts is to be fused first.
    """
    node = value.producer() if value is not None else None
    if node is None or not is_elementwise(node):
        return True
    if node.op_type in ("Add", "Sub"):
        rank = len(dims_of(value) or ())
        for operand in node.inputs:
            dims = dims_of(operand) or ()
            if any(a - rank + len(dims) < 0 or dims[a - rank + len(dims)] == 1 for a in axes):
                return False
    return all(_is_zero(v, axes) for v in node.inputs if dims_of(v) == dims_of(value))


def reduced_axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes a reduction reduces, or None when they are computed."""
    axes = attribute(node, "axes", None)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant_array(node.inputs[1])
        if array is None:
            return None
        axes = array.reshape(-1).tolist()
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return [int(a) + rank if a < 0 else int(a) for a in axes]


@rule("Softmax", "LogSoftmax", "Hardmax", "CumSum", "TopK", "ArgMax", "ArgMin", "LpNormalization")
def _along_axis(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    dims = dims_of(data)
    if data is None or dims is None:
        flow.block_node(node)
        return
    axis = attribute(node, "axis", 0 if node.op_type.startswith("Arg") else -1)
    if node.op_type == "CumSum":
        array = constant_array(node.inputs[1])
        axis = int(array.reshape(-1)[0]) if array is not None else None
    if axis is None:
        flow.block_node(node, "its axis is computed")
        return
    axis += len(dims) if axis < 0 else 0
    reason = f"{where_is(node)}: works along this axis"
    kept = []
    for track in flow.of(data):
        left = flow.labels.uniform(track, [axis], reason) if axis in track.axes else track
        if left is not None:
            kept.append(left)
    drops = node.op_type.startswith("Arg") and not attribute(node, "keepdims", 1)
    to = {a: a - (drops and a > axis) for a in range(len(dims))}
    for output in node.outputs:
        flow.put(output, [t.moved(to) for t in kept])


def pooling(flow: Flow, node: ir.Node) -> None:
    """Channels pass; whatever is along the window keeps its size."""
    data = node.inputs[0]
    rank = len(dims_of(data) or ())
    reason = f"{where_is(node)}: the sizes of what it slides over are fixed"
    tracks = [flow.labels.uniform(t, range(2, rank), reason) for t in flow.of(data)]
    for output in node.outputs:
        flow.put(output, [t for t in tracks if t is not None])


for _op in (
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "LpPool",
    "GlobalLpPool",
):
    rule(_op)(pooling)


def default(flow: Flow, node: ir.Node) -> None:
    """What an operator without a rule does: elementwise ones unite, others end the trail."""
    if is_elementwise(node):
        elementwise(flow, node)
    else:
        flow.block_node(node)
