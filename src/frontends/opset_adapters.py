"""What changed in the standard operators from opset 6 to 21, an adapter for each real change.

Here: the table of changes that only widened an operator, and the adapters that rewrite a node in
place where its meaning or signature changed. Not here: what they write with (`opset_editor`);
walking a model and deciding what to convert (`opset`).

An adapter turns *the node itself* into the last node of the new form and inserts what must
come earlier, so the node's outputs stay the same values and the model keeps its interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.graph import constant_array, constant_tensor, fresh_name, static_shape
from .opset_editor import NodeEditor, graph_of, set_inputs

NEWEST_CONVERTIBLE = 21
"""The newest opset the tables below reach."""

WIDENED: dict[str, tuple[int, ...]] = {
    # Versions that added types, allowed negative axes or made an input optional: a node of the
    # version before means the same after. Checked against `onnx.defs` by a test.
    "Abs": (13,), "Add": (13, 14), "ArgMax": (11, 12, 13), "ArgMin": (11, 12, 13),
    "AveragePool": (7, 10, 11, 19), "BatchNormalization": (15,), "Cast": (9, 13, 19, 21),
    "CastLike": (19, 21), "Ceil": (13,), "Clip": (12, 13), "Compress": (11,), "Concat": (11, 13),
    "Constant": (9, 11, 12, 13, 19, 21), "ConstantOfShape": (20, 21), "Conv": (11,),
    "ConvTranspose": (11,), "CumSum": (14,), "DepthToSpace": (11, 13),
    "DequantizeLinear": (13, 19, 21), "Div": (13, 14), "Dropout": (13,),
    "Equal": (11, 13, 19), "Erf": (13,), "Exp": (13,), "Expand": (13,), "Flatten": (9, 11, 13, 21),
    "Floor": (13,), "GRU": (14,), "Gather": (11, 13), "GatherElements": (13,),
    "GatherND": (12, 13), "Gemm": (9, 11, 13), "Greater": (9, 13), "GreaterOrEqual": (16,),
    "Hardmax": (11,), "Identity": (13, 14, 16, 19, 21), "If": (11, 13, 16, 19, 21),
    "IsInf": (20,), "IsNaN": (13, 20), "LRN": (13,), "LSTM": (14,), "LeakyRelu": (16,),
    "Less": (9, 13), "LessOrEqual": (16,), "Log": (13,), "LogSoftmax": (11,),
    "Loop": (11, 13, 16, 19, 21), "LpPool": (11, 18), "MatMul": (9, 13), "Max": (8, 12, 13),
    "MaxPool": (8, 10, 11, 12), "MaxUnpool": (11,), "Mean": (8, 13),
    "MeanVarianceNormalization": (13,), "Min": (8, 12, 13), "Mod": (13,), "Mul": (13, 14),
    "Neg": (13,), "NegativeLogLikelihoodLoss": (13,), "NonMaxSuppression": (11,),
    "NonZero": (13,),
    # 11 lets a negative index wrap, where 9 gave a row of off-values; every runtime known here
    # wraps for both.
    "OneHot": (11,),
    "OptionalGetElement": (18,), "OptionalHasElement": (18,), "PRelu": (9, 16),
    "Pad": (13, 18, 19, 21), "Pow": (12, 13, 15), "QLinearMatMul": (21,),
    "QuantizeLinear": (13, 19, 21), "RNN": (14,), "Reciprocal": (13,),
    "ReduceL1": (11, 13), "ReduceL2": (11, 13), "ReduceLogSum": (11, 13),
    "ReduceLogSumExp": (11, 13), "ReduceMax": (11, 12, 13, 20), "ReduceMean": (11, 13),
    "ReduceMin": (11, 12, 13, 20), "ReduceProd": (11, 13), "ReduceSum": (11,),
    "ReduceSumSquare": (11, 13), "Relu": (13, 14), "Reshape": (13, 14, 19, 21),
    "Resize": (18, 19), "Scan": (11, 16, 19, 21), "ScatterElements": (13, 16, 18),
    "ScatterND": (13, 16, 18), "Shape": (13, 15, 19, 21), "Sigmoid": (13,), "Sign": (13,),
    "Size": (13, 19, 21), "Slice": (11, 13), "Softmax": (11,), "SoftmaxCrossEntropyLoss": (13,),
    "SpaceToDepth": (13,), "Split": (11,), "Sqrt": (13,), "Squeeze": (11, 21), "Sub": (13, 14),
    "Sum": (8, 13), "Tanh": (13,), "Tile": (13,), "TopK": (11,), "Transpose": (13, 21),
    "Unsqueeze": (11, 21), "Where": (16,),
}  # fmt: skip


TYPE_DEPENDENT = frozenset(
    ["BatchNormalization", "Clip", "GroupNormalization", "Hardmax", "LogSoftmax", "Pad", "Softmax"]
)
"""Operators whose adapters give a simpler form when they know the input's type and shape."""


def _drop_unused_outputs(edit: NodeEditor, node: ir.Node, keep: int, what: str) -> None:
    for output in node.outputs[keep:]:
        if output.uses() or output.is_graph_output():
            edit.refuse(node, f"{what} ({output.name!r}), which is only defined while training")
    node.resize_outputs(min(keep, len(node.outputs)))


# --- attributes that became inputs -----------------------------------------------------------


def _axes_to_input(edit: NodeEditor, node: ir.Node) -> None:
    axes = edit.take(node, "axes")
    if axes:
        set_inputs(node, [node.inputs[0], edit.ints(node, f"{node.outputs[0].name}_axes", axes)])


def _clip(edit: NodeEditor, node: ir.Node) -> None:
    data, name = node.inputs[0], node.outputs[0].name
    bounds = [(side, edit.take(node, side)) for side in ("min", "max")]
    values = [
        None if number is None else edit.like(node, f"{name}_{side}", number, data)
        for side, number in bounds
    ]
    set_inputs(node, [data, *values])


def _pad(edit: NodeEditor, node: ir.Node) -> None:
    data, name = node.inputs[0], node.outputs[0].name
    pads, number = edit.take(node, "pads", ()), edit.take(node, "value", 0.0)
    value = edit.like(node, f"{name}_value", number, data) if number else None
    set_inputs(node, [data, edit.ints(node, f"{name}_pads", pads), value])


def _slice(edit: NodeEditor, node: ir.Node) -> None:
    name = node.outputs[0].name
    lists = [(part, edit.take(node, part)) for part in ("starts", "ends", "axes")]
    values = [
        None if numbers is None else edit.ints(node, f"{name}_{part}", numbers)
        for part, numbers in lists
    ]
    set_inputs(node, [node.inputs[0], *values])


def _top_k(edit: NodeEditor, node: ir.Node) -> None:
    k = edit.ints(node, f"{node.outputs[0].name}_k", [edit.take(node, "k", 1)])
    set_inputs(node, [node.inputs[0], k])


def _split(edit: NodeEditor, node: ir.Node) -> None:
    sizes = edit.take(node, "split")
    if sizes:
        value = edit.ints(node, f"{node.outputs[0].name}_split", sizes)
        set_inputs(node, [node.inputs[0], value])


def _split_num_outputs(edit: NodeEditor, node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


def _dropout(edit: NodeEditor, node: ir.Node) -> None:
    ratio = edit.take(node, "ratio", 0.5)
    value = edit.constant(node, f"{node.outputs[0].name}_ratio", np.array(ratio, np.float32))
    set_inputs(node, [node.inputs[0], value])


def _dropout_bool_mask(edit: NodeEditor, node: ir.Node) -> None:
    _drop_unused_outputs(edit, node, 1, "its mask output is used")


def _dft(edit: NodeEditor, node: ir.Node) -> None:
    axis = edit.constant(
        node, f"{node.outputs[0].name}_axis", np.array(edit.take(node, "axis", 1), np.int64)
    )
    length = node.inputs[1] if len(node.inputs) > 1 else None
    set_inputs(node, [node.inputs[0], length, axis])


# --- broadcasting before opset 7 --------------------------------------------------------------


def _explicit_broadcast(edit: NodeEditor, node: ir.Node) -> None:
    """Before opset 7 `axis` said where the second shape sits in the first one.

    Add(x[N,C,H,W], b[C], broadcast=1, axis=1)   ->   Add(x, Unsqueeze(b, [1, 2]))
    """
    broadcast, axis = edit.take(node, "broadcast", 0), edit.take(node, "axis")
    if broadcast and axis is not None:
        first, second = edit.shape(node.inputs[0]), edit.shape(node.inputs[1])
        if first is None or second is None:
            edit.refuse(node, "its `axis` needs the ranks of both inputs, which aren't known")
        axis = axis + len(first) if axis < 0 else axis
        _append_dimensions(edit, node, len(second), len(first) - axis - len(second))


def _channel_slope(edit: NodeEditor, node: ir.Node) -> None:
    data, slope = edit.shape(node.inputs[0]), edit.shape(node.inputs[1])
    if data is None or slope is None:
        edit.refuse(node, "whether its slope is per channel isn't known")
    if len(slope) == 1 and slope[0] != 1:
        _append_dimensions(edit, node, 1, len(data) - 2)


def _append_dimensions(edit: NodeEditor, node: ir.Node, rank: int, count: int) -> None:
    """Give the second input, of the given rank, `count` dimensions of 1 at its end."""
    if count > 0:
        axes = edit.ints(node, f"{node.outputs[0].name}_axes", range(rank, rank + count))
        node.replace_input_with(1, edit.before(node, "Unsqueeze", [node.inputs[1], axes]))


def _gemm_broadcast(edit: NodeEditor, node: ir.Node) -> None:
    edit.take(node, "broadcast")


def _inference_only(edit: NodeEditor, node: ir.Node) -> None:
    if not edit.take(node, "is_test", 0):
        edit.refuse(node, "it is in training mode (is_test=0)")


def _recurrent_outputs(edit: NodeEditor, node: ir.Node) -> None:
    edit.take(node, "output_sequence")  # said which outputs are given; their presence says it now


def _upsample_height_width(edit: NodeEditor, node: ir.Node) -> None:
    scales = [1.0, 1.0, edit.take(node, "height_scale", 1.0), edit.take(node, "width_scale", 1.0)]
    node.attributes.add(ir.AttrFloat32s("scales", scales))


# --- meanings that changed -------------------------------------------------------------------


def _coerced_softmax(edit: NodeEditor, node: ir.Node) -> None:
    """Softmax over all dimensions from `axis` on -> over the last of a flattened matrix.

        Softmax(axis)   ->   Shape ------------------------.
                             Flatten(axis) -> Softmax(-1) -> Reshape
    When `axis` is the last dimension both mean the same.
    """
    axis = int(edit.take(node, "axis", 1))
    data = node.inputs[0]
    shape = edit.shape(data)
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        node.attributes.add(ir.AttrInt64("axis", -1))
        return
    flat = edit.before(node, "Flatten", [data], {"axis": axis})
    soft = edit.before(node, node.op_type, [flat], {"axis": -1})
    edit.become(node, "Reshape", [soft, edit.before(node, "Shape", [data])])


def _batch_norm_spatial(edit: NodeEditor, node: ir.Node) -> None:
    """`spatial=0` normalizes each position by itself: written out with broadcasting.

    BatchNormalization(x, s, b, m, v)   ->   (x - m) / sqrt(v + e) * s + b
    """
    if edit.take(node, "spatial", 1):
        return
    _drop_unused_outputs(edit, node, 1, "a statistics output is used")
    x, scale, bias, mean, variance = node.inputs
    epsilon = edit.like(
        node, f"{node.outputs[0].name}_epsilon", edit.take(node, "epsilon", 1e-5), x
    )
    deviation = edit.before(node, "Sqrt", [edit.before(node, "Add", [variance, epsilon])])
    unit = edit.before(node, "Div", [edit.before(node, "Sub", [x, mean]), deviation])
    edit.become(node, "Add", [edit.before(node, "Mul", [unit, scale]), bias])


def _batch_norm_outputs(edit: NodeEditor, node: ir.Node) -> None:
    _drop_unused_outputs(edit, node, 1, "a statistics output is used")


def _upsample_scales(edit: NodeEditor, node: ir.Node) -> None:
    scales = np.array(edit.take(node, "scales", ()), np.float32)
    set_inputs(
        node, [node.inputs[0], edit.constant(node, f"{node.outputs[0].name}_scales", scales)]
    )


def _upsample_to_resize(edit: NodeEditor, node: ir.Node) -> None:
    if edit.take(node, "mode", "nearest") in ("linear", "bilinear"):
        node.attributes.add(ir.AttrString("mode", "linear"))
    node.op_type = "Resize"


def _resize_coordinates(edit: NodeEditor, node: ir.Node) -> None:
    """Opset 10 samples at x / scale; nearest truncates going up and takes the ceiling going down.

        Resize(x, scales)   ->   Resize(x, max(scales, 1), floor) -> Resize(min(scales, 1), ceil)
    with one of the two left out when all scales are known to lie on one side of 1.
    """
    data, scales = node.inputs[0], node.inputs[1]
    mode = edit.take(node, "mode", "nearest")
    common = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    up, down = common | {"nearest_mode": "floor"}, common | {"nearest_mode": "ceil"}
    known = constant_array(scales, 64)
    if mode != "nearest" or (known is not None and (known >= 1).all()):
        edit.become(node, "Resize", [data, None, scales], up if mode == "nearest" else common)
    elif known is not None and (known <= 1).all():
        edit.become(node, "Resize", [data, None, scales], down)
    else:
        one = edit.constant(node, f"{node.outputs[0].name}_one", np.ones(1, np.float32))
        larger = edit.before(
            node, "Resize", [data, None, edit.before(node, "Max", [scales, one])], up
        )
        edit.become(node, "Resize", [larger, None, edit.before(node, "Min", [scales, one])], down)


def _resize_optional_inputs(edit: NodeEditor, node: ir.Node) -> None:
    """Opset 11 says "not given" by an empty tensor; later ones leave the input out."""
    inputs = [None if _is_empty_constant(value) else value for value in node.inputs]
    if len(inputs) > 3 and inputs[3] is not None:
        inputs[2] = None
    transform = node.attributes.get("coordinate_transformation_mode")
    if transform is not None and transform.value == "tf_half_pixel_for_nn":
        # floor((x + .5) / s) is the half-pixel position (x + .5) / s - .5, halves rounded up
        nearest = node.attributes.get("nearest_mode")
        if nearest is None or nearest.value != "floor":
            edit.refuse(node, "tf_half_pixel_for_nn was withdrawn in opset 13")
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "half_pixel"))
        node.attributes.add(ir.AttrString("nearest_mode", "round_prefer_ceil"))
    set_inputs(node, inputs)


def _is_empty_constant(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size == 0


def _scatter(edit: NodeEditor, node: ir.Node) -> None:
    node.op_type = "ScatterElements"


def _roi_align(edit: NodeEditor, node: ir.Node) -> None:
    if "coordinate_transformation_mode" not in node.attributes:
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def _batched_scan(edit: NodeEditor, node: ir.Node) -> None:
    """Scan of opset 8 runs its body for every item of a batch: a scan over the batch of scans.

    Scan8(, states, inputs){body}   ->   Scan(states, inputs){ Scan(state, input){body} }
    """
    if node.inputs and node.inputs[0] is not None:
        edit.refuse(node, "its `sequence_lens` input has no equivalent since opset 9")
    body: ir.Graph = edit.take(node, "body")
    count = int(edit.take(node, "num_scan_inputs"))
    directions = edit.take(node, "directions")
    graph, values = graph_of(node), node.inputs[1:]
    items = [
        ir.Value(name=fresh_name(graph, f"{value.name}_item"), type=value.type)
        for value in values
        if value is not None
    ]
    inner_attributes: dict[str, Any] = {"body": body, "num_scan_inputs": count}
    if directions:
        inner_attributes["scan_input_directions"] = list(directions)
    results = [
        ir.Value(name=fresh_name(graph, f"{v.name}_item"), type=v.type) for v in node.outputs
    ]
    inner = ir.Node(
        "",
        "Scan",
        items,
        ir.convenience.convert_attributes(inner_attributes),
        outputs=results,
        name=edit.node_name(f"{node.name or 'Scan'}/item"),
        metadata_props=dict(node.metadata_props),
    )
    batch_body = ir.Graph(items, results, nodes=[inner], name=f"{body.name or 'scan'}_batch")
    edit.become(node, "Scan", values, {"body": batch_body, "num_scan_inputs": len(items)})


def _grid_sample(edit: NodeEditor, node: ir.Node) -> None:
    mode = edit.take(node, "mode", "bilinear")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    node.attributes.add(ir.AttrString("mode", renamed))


def _group_norm(edit: NodeEditor, node: ir.Node) -> None:
    """Scale and bias were per group and are per channel: each is repeated over its group."""
    groups = int(node.attributes["num_groups"].value)
    shape = edit.shape(node.inputs[0])
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if not isinstance(channels, int):
        edit.refuse(node, "its number of channels isn't known")
    inputs = [node.inputs[0]]
    for value in node.inputs[1:3]:
        if value is not None and static_shape(value) == (channels,) and channels != groups:
            edit.refuse(node, f"its scale has {channels} elements, where {groups} are expected")
        column = edit.before(
            node, "Reshape", [value, edit.ints(node, f"{node.name}_column", [-1, 1])]
        )
        spread = edit.ints(node, f"{node.name}_spread", [1, channels // groups])
        wide = edit.before(node, "Expand", [column, spread])
        inputs.append(
            edit.before(node, "Reshape", [wide, edit.ints(node, f"{node.name}_flat", [-1])])
        )
    set_inputs(node, inputs)


_BROADCASTING = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")

ADAPTERS: dict[tuple[str, int], Callable[[NodeEditor, ir.Node], None]] = {
    **{(op, 7): _explicit_broadcast for op in _BROADCASTING},
    ("BatchNormalization", 7): _inference_only,
    ("Dropout", 7): _inference_only,
    ("GRU", 7): _recurrent_outputs,
    ("Gemm", 7): _gemm_broadcast,
    ("LSTM", 7): _recurrent_outputs,
    ("PRelu", 7): _channel_slope,
    ("RNN", 7): _recurrent_outputs,
    ("Upsample", 7): _upsample_height_width,
    ("BatchNormalization", 9): _batch_norm_spatial,
    ("BatchNormalization", 14): _batch_norm_outputs,
    ("Clip", 11): _clip,
    ("DFT", 20): _dft,
    ("Dropout", 10): _dropout_bool_mask,
    ("Dropout", 12): _dropout,
    ("GridSample", 20): _grid_sample,
    ("GroupNormalization", 21): _group_norm,
    ("Hardmax", 13): _coerced_softmax,
    ("LogSoftmax", 13): _coerced_softmax,
    ("Pad", 11): _pad,
    ("ReduceSum", 13): _axes_to_input,
    ("Resize", 11): _resize_coordinates,
    ("Resize", 13): _resize_optional_inputs,
    ("RoiAlign", 16): _roi_align,
    ("Scan", 9): _batched_scan,
    ("Scatter", 11): _scatter,
    ("Slice", 10): _slice,
    ("Softmax", 13): _coerced_softmax,
    ("Split", 13): _split,
    ("Split", 18): _split_num_outputs,
    ("Squeeze", 13): _axes_to_input,
    ("TopK", 10): _top_k,
    ("Unsqueeze", 13): _axes_to_input,
    ("Upsample", 9): _upsample_scales,
    ("Upsample", 10): _upsample_to_resize,
    **{
        (f"Reduce{kind}", 18): _axes_to_input
        for kind in (
            "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"
        )
    },
}  # fmt: skip
"""(operator, the version that changed it) -> the rewrite of a node of the version before."""
