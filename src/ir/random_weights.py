"""An architecture's absent weights, filled with random numbers that keep activations finite.

Here: `fill_random_weights`, so that an architecture can be run and timed. Values do not matter for
time as long as none is denormal, infinite or NaN. Not here: random inputs (`passes.probe`).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import onnx_ir as ir

from .graph import constant_array, constant_tensor, graphs, is_absent
from .quant import INTEGER_OPS

_VARIANCE = 4
"""The input of a BatchNormalization that must be positive."""
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_MAX_ACTIVATION = 6.0
"""The range that a random scale of an 8-bit activation spans, to either side or one."""
_BRANCH = 0.3
"""How much smaller the last weight of a residual branch is: with every branch as large as what it
is added to, activations double with each block, until a softmax of them underflows to denormals."""
_WORDS = 1 << 20
"""Random numbers drawn for one weight at most; a larger one repeats them, for speed."""


def fill_random_weights(model: ir.Model) -> list[str]:
    """Draw every absent weight, each from a seed made of its name; returns the names drawn.

    Weights of two or more dimensions have the variance of He et al. 2015, smaller at the end of a
    residual branch; those of one are small, but for scales and variances, which lie around one.
    8-bit weights use their whole range. The numbers of pairs are such as calibration finds: scales
    are positive, that of a bias is the product of its node's other two (a runtime fuses no other),
    and the zero point of an activation is 0 behind what is never negative, else the middle. The
    model is changed in place; the same model gets the same numbers.
    """
    absent = [
        value
        for graph in graphs(model)
        for value in graph.initializers.values()
        if is_absent(value.const_value)
    ]
    for value in sorted(absent, key=_is_bias_scale):
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(tensor.shape.numpy())
        array = _bias_scale(value, shape) if _is_bias_scale(value) else None
        if array is None:
            original = _moved_from(value)
            generator = np.random.default_rng(zlib.crc32((original.name or "").encode()))
            array = _draw(original, shape, tensor.dtype, generator)
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
    return [value.name or "" for value in absent]


def _moved_from(value: ir.Value) -> ir.Value:
    """The number of the pair that a value was moved from by nodes that keep its range, or itself.

    A pooling or a transposition runs in integers only with the same scale on both sides.
    """
    for node, index in value.uses():
        if node.op_type != "QuantizeLinear" or index == 0 or node.inputs[0] is None:
            continue
        maker = node.inputs[0].producer()
        if maker is None or maker.op_type not in INTEGER_OPS:
            continue
        before = maker.inputs[0].producer() if maker.inputs[0] is not None else None
        keeps = INTEGER_OPS[maker.op_type].same_scale
        if keeps and before is not None and before.op_type == "DequantizeLinear":
            earlier = before.inputs[index]
            return value if earlier is None else _moved_from(earlier)
    return value


def _is_bias_scale(value: ir.Value) -> bool:
    return any(
        index == 1
        and node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.INT32
        for node, index in value.uses()
    )


def _bias_scale(value: ir.Value, shape: tuple[int, ...]) -> np.ndarray | None:
    """Scale of the data times scale of the weight of the node that the bias goes into."""
    for pair, _ in value.uses():
        for node, index in pair.outputs[0].uses():
            scales = [_scale_of(source) for source in node.inputs[:2]]
            if index == 2 and all(scale is not None for scale in scales):
                product = np.asarray(scales[0]) * np.asarray(scales[1])
                return np.broadcast_to(product, shape).astype(np.float32)
    return None


def _scale_of(source: ir.Value | None) -> np.ndarray | None:
    pair = source.producer() if source is not None else None
    if pair is None or pair.op_type != "DequantizeLinear" or pair.inputs[1] is None:
        return None
    return constant_array(pair.inputs[1])


def _draw(
    value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType, generator: np.random.Generator
) -> np.ndarray:
    kind = dtype.numpy()
    if dtype.is_integer():
        if _is_zero_point(value):
            return np.full(shape, _zero_point(value, dtype)).astype(kind)
        if dtype.bitwidth > 8 or not shape:
            return np.zeros(shape, kind)
        limits = _limits(dtype)
        return _repeated(generator.integers(*limits, _count(shape)), shape).astype(kind)
    if not dtype.is_floating_point():
        return np.zeros(shape, kind)
    array: np.ndarray
    if _is_scale(value):
        weight = value.uses() and any(_stored_as_weight(node) for node, _ in value.uses())
        step = 0.05 / 127 if weight else 2 * _MAX_ACTIVATION / 255
        array = generator.uniform(0.5 * step, step, shape)
    elif len(shape) > 1:
        deviation = math.sqrt(2 / max(1, math.prod(shape[1:])))
        if _ends_residual_branch(value):
            deviation *= _BRANCH
        array = _repeated(generator.standard_normal(_count(shape), np.float32), shape) * np.float32(
            deviation
        )
    elif _is_positive(value):
        array = generator.uniform(0.5, 1.5, shape)
    else:
        array = generator.standard_normal(shape, np.float32) * np.float32(0.05)
    return np.asarray(array).astype(kind, copy=False)


def _ends_residual_branch(value: ir.Value) -> bool:
    """Whether a weight's product is added to another activation, perhaps by way of a bias."""
    found = [node for node, index in value.uses() if index == 1 and node.op_type in _WEIGHTED]
    for node in found:
        if len(node.inputs) > _SUMMAND and node.inputs[_SUMMAND] is not None:
            return True
        for reader, _ in node.outputs[0].uses():
            if reader.op_type == "BatchNormalization" or (
                reader.op_type == "Add" and _has_constant(reader)
            ):
                found.append(reader)
            elif reader.op_type == "Add":
                return True
    return False


_WEIGHTED = ("Conv", "FusedConv", "Gemm", "MatMul")
_SUMMAND = 3
"""The input of a FusedConv that its result is added to."""


def _has_constant(node: ir.Node) -> bool:
    return any(v is not None and constant_tensor(v) is not None for v in node.inputs)


def _limits(dtype: ir.DataType) -> tuple[int, int]:
    """The least value of an integer dtype of at most 8 bits, and one past its largest."""
    signed = dtype in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2)
    span = 1 << dtype.bitwidth
    return (-span // 2, span // 2) if signed else (0, span)


def _count(shape: tuple[int, ...]) -> int:
    return min(_WORDS, math.prod(shape))


def _repeated(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.resize(values, shape)


def _is_scale(value: ir.Value) -> bool:
    return any(user.op_type in _QUANTIZED and index == 1 for user, index in value.uses()) or any(
        "scale" in (_parameter_name(user, index)) or _scales_integers(user, value)
        for user, index in value.uses()
    )


def _scales_integers(node: ir.Node, value: ir.Value) -> bool:
    """Whether a product turns integers into floats, or is of the scales of two factors."""
    if node.op_type != "Mul":
        return False
    for other in node.inputs:
        maker = other.producer() if other is not None and other is not value else None
        if maker is None:
            continue
        source = maker.inputs[0] if maker.inputs else None
        integers = source is not None and source.dtype is not None and source.dtype.is_integer()
        if maker.op_type == "DynamicQuantizeLinear" or (maker.op_type == "Cast" and integers):
            return True
    return False


def _is_zero_point(value: ir.Value) -> bool:
    return any(
        (user.op_type in _QUANTIZED and index == 2) or "zero_point" in _parameter_name(user, index)
        for user, index in value.uses()
    )


_NEVER_NEGATIVE = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Abs")


def _zero_point(value: ir.Value, dtype: ir.DataType) -> int:
    if dtype != ir.DataType.UINT8:
        return 0
    for node, _ in value.uses():
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
            maker = node.inputs[0].producer()
            if maker is not None and maker.op_type in _NEVER_NEGATIVE:
                return 0
    return 128


_PARAMETERS = {
    "MatMulInteger": ("", "", "zero_point", "zero_point"),
    "ConvInteger": ("", "", "zero_point", "zero_point"),
    "DynamicQuantizeMatMul": ("", "", "scale", "zero_point", ""),
    "MatMulNBits": ("", "", "scale", "zero_point"),
    "GatherBlockQuantized": ("", "", "scale", "zero_point"),
}
"""Operators that take the numbers of a quantized weight themselves, and what each input is."""


def _parameter_name(user: ir.Node, index: int) -> str:
    names = _PARAMETERS.get(user.op_type, ())
    return names[index] if index < len(names) else ""


def _stored_as_weight(node: ir.Node) -> bool:
    """Whether a quantization parameter belongs to a constant, not to an activation."""
    if node.op_type in _PARAMETERS or node.op_type == "Mul":
        return True
    source = node.inputs[0] if node.inputs else None
    return source is not None and source.is_initializer()


def _is_positive(value: ir.Value) -> bool:
    return any(
        index in (1, _VARIANCE) if user.op_type == "BatchNormalization" else user.op_type == "Mul"
        for user, index in value.uses()
    ) or any(
        index == 1 and user.op_type.endswith(("LayerNormalization", "InstanceNormalization"))
        for user, index in value.uses()
    )
