"""What the planner of static int8 asks about one node or value.

Here: which nodes have an integer form, what saturation replaces, shapes and counts. Reads no
weight. Not here: the plan (`plan`).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ...ir.graph import attribute, constant_scalar, constant_tensor, is_onnx_op, static_shape
from ...ir.ops import weight_channel_axis
from ...ir.quant import is_dequantize

GATES = ("Sigmoid", "HardSigmoid")
"""Functions with results from 0 to 1: that is their range, whatever calibration saw."""


def why_not(node: ir.Node, attention: bool) -> str:
    """Why a node of a weighted operator can't run in integers; '' when it can."""
    if not all(is_float(v) for v in (*node.inputs, *node.outputs) if v is not None):
        return "its tensors are not float32"
    value, weight = node.inputs[0], node.inputs[1]
    if any(is_dequantize(v.producer()) for v in (value, weight) if v is not None):
        return "already quantized"
    if constant_tensor(value) is not None:
        return "its first input is constant"
    if constant_tensor(weight) is None:
        if node.op_type != "MatMul":
            return "its weight is not constant"
        return "" if attention else "both inputs are activations"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        if constant_tensor(bias) is None:
            return "its bias is not constant"
        if node.op_type == "Gemm" and not _is_row(static_shape(bias), static_shape(weight), node):
            return "its bias is not one row"
    if node.op_type == "Gemm" and (
        attribute(node, "transA", 0)
        or attribute(node, "alpha", 1.0) != 1.0
        or attribute(node, "beta", 1.0) != 1.0
    ):
        return "Gemm with transA, alpha or beta has no integer kernel"
    return ""


def _is_row(bias: tuple[int, ...] | None, weight: tuple[int, ...] | None, node: ir.Node) -> bool:
    if bias is None or weight is None:
        return False
    channels = weight[0 if attribute(node, "transB", 0) else 1]
    return bias in ((channels,), (1, channels))


def saturates(node: ir.Node) -> bool:
    """Whether a node is a Relu, or a Clip between constants that enclose zero."""
    bounds = saturation(node)
    return bounds is not None and bounds[0] <= 0.0 <= bounds[1]


def saturation(node: ir.Node) -> tuple[float, float] | None:
    """The least and greatest result of a Relu, or of a Clip between constants."""
    if is_onnx_op(node, "Relu"):
        return 0.0, math.inf
    if not is_onnx_op(node, "Clip"):
        return None
    bounds: list[float] = []
    for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        found = attribute(node, name, default) if value is None else constant_scalar(value)
        if found is None:
            return None
        bounds.append(float(found))
    return bounds[0], bounds[1]


def is_convex_resize(node: ir.Node) -> bool:
    """Whether a Resize gives nothing outside its input's range, and in 8 bits."""
    mode = attribute(node, "mode", "nearest")
    outside = attribute(node, "coordinate_transformation_mode", "half_pixel")
    antialias = attribute(node, "antialias", 0)
    return mode in ("nearest", "linear") and outside != "tf_crop_and_resize" and not antialias


def is_spatial_mean(node: ir.Node) -> bool:
    """Whether a ReduceMean is a global average pooling: over all axes behind the channels."""
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    if rank not in (4, 5) or not attribute(node, "keepdims", 1):
        return False
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = constant_tensor(given)
    axes = (
        attribute(node, "axes", ()) if given is None else () if tensor is None else tensor.numpy()
    )
    return sorted(int(a) % rank for a in axes) == list(range(2, rank))


def is_gate_result(value: ir.Value) -> bool:
    """Whether a Sigmoid or HardSigmoid made the value."""
    node = value.producer()
    return node is not None and is_onnx_op(node, *GATES)


def products_a_compare(node: ir.Node, pool: ir.Node) -> float:
    """Products of a node with weights over comparisons of the MaxPool that it reads.

    Both per channel and position of what lies between them.
    """
    shape = static_shape(node.inputs[1])
    compares = math.prod(int(k) for k in attribute(pool, "kernel_shape", (1,)))
    if shape is None:
        return 0.0
    if not is_onnx_op(node, "Conv"):
        return shape[weight_channel_axis(node, 1) or 0] / compares
    steps = math.prod(int(s) for s in attribute(node, "strides", (1,)))
    products = shape[0] * math.prod(shape[2:]) / int(attribute(node, "group", 1))
    return products / (steps * compares)


def is_gate(value: ir.Value, result: int | None) -> bool:
    """Whether a float operand is so small beside the result that a Q for it costs nothing."""
    size = count_of(value)
    if size is not None and result is not None:
        return size * 8 <= result
    shape = value.shape
    return shape is not None and len(shape) > 2 and all(d == 1 for d in shape.dims[2:])


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is there and float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def count_of(value: ir.Value | None) -> int | None:
    """How many elements a value has; None where its shape is not static."""
    shape = static_shape(value)
    return None if shape is None else math.prod(shape)
