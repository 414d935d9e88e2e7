"""An architecture's absent weights, filled with random numbers that keep activations finite.

Here: `fill_random_weights`, so that an architecture can be run and timed. Values do not matter for
time as long as none is denormal, infinite or NaN. Not here: random inputs (`passes.probe`).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import onnx_ir as ir

from .graph import graphs, is_absent

_VARIANCE = 4
"""The input of a BatchNormalization that must be positive."""
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_MAX_ACTIVATION = 6.0
"""The range that a random scale of an 8-bit activation spans, to either side or one."""
_WORDS = 1 << 20
"""Random numbers drawn for one weight at most; a larger one repeats them, for speed."""


def fill_random_weights(model: ir.Model) -> list[str]:
    """Draw every absent weight, each from a seed made of its name; returns the names drawn.

    Weights of two or more dimensions have the variance of He et al. 2015; those of one are small,
    but for scales and variances, which lie around one. 8-bit weights use their whole range, scales
    of pairs are positive, zero points are 0. The model is changed in place; the same model gets the
    same numbers.
    """
    drawn = []
    for graph in graphs(model):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not is_absent(tensor):
                continue
            generator = np.random.default_rng(zlib.crc32(name.encode()))
            array = _draw(value, tuple(tensor.shape.numpy()), tensor.dtype, generator)
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=name)
            drawn.append(name)
    return drawn


def _draw(
    value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType, generator: np.random.Generator
) -> np.ndarray:
    kind = dtype.numpy()
    if dtype.is_integer():
        if _is_zero_point(value) or dtype.bitwidth > 8 or not shape:
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
        array = _repeated(generator.standard_normal(_count(shape), np.float32), shape) * np.float32(
            deviation
        )
    elif _is_positive(value):
        array = generator.uniform(0.5, 1.5, shape)
    else:
        array = generator.standard_normal(shape, np.float32) * np.float32(0.05)
    return np.asarray(array).astype(kind, copy=False)


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
        "scale" in (_parameter_name(user, index)) for user, index in value.uses()
    )


def _is_zero_point(value: ir.Value) -> bool:
    return any(
        (user.op_type in _QUANTIZED and index == 2) or "zero_point" in _parameter_name(user, index)
        for user, index in value.uses()
    )


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
    if node.op_type in _PARAMETERS:
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
