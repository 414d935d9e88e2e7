"""Shape rules of operators that keep or broadcast their inputs' shapes, normalizations included.

The arithmetic among them also carries small integer tensors (`Data`) along, which is how
`Shape -> Gather -> Mul -> Concat -> Reshape` chains are followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from . import dims as dim_math
from .graph import Dim
from .shape_rules import Call, Data, Dims, Element, rule

_INTEGERS = frozenset(
    {
        ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
        ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
        ir.DataType.BOOL,
    }
)  # fmt: skip
MAX_DATA = 1024
"""Elements up to which a tensor's contents are followed."""


# --- same shape as input 0 -------------------------------------------------------------------


@rule(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh Elu Erf Exp Gelu "
    "HardSigmoid HardSwish IsInf IsNaN LeakyRelu Log Mish Not Reciprocal Relu Round Selu Shrink "
    "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu LRN "
    "MeanVarianceNormalization ReverseSequence Bernoulli RandomNormalLike RandomUniformLike "
    "RotaryEmbedding Scatter ScatterElements ScatterND TensorScatter"
)
def same_shape(call: Call) -> None:
    """Output 0 has the shape of input 0."""
    if call.node.op_type in ("Bernoulli", "RandomNormalLike", "RandomUniformLike"):
        _set_dtype_attribute(call, call.dtype(0))
    call.put(0, call.dims(0))


@rule("Softmax LogSoftmax Hardmax LpNormalization CumSum CumProd Trilu")
def same_shape_with_axis(call: Call) -> None:
    """Output 0 has the shape of input 0, which must have the axis named."""
    dims = call.known(0)
    if call.node.op_type == "Trilu" and len(dims) < 2:
        call.fail(f"Trilu needs a matrix, its input has rank {len(dims)}")
    axis = call.attr("axis")
    if axis is not None and dims:
        call.axis(axis, len(dims))
    call.put(0, dims)


@rule("Identity")
def identity(call: Call) -> None:
    """All that is known of the input is known of the output."""
    fact = call.fact(0)
    call.put(0, fact.dims, dtype=fact.dtype, data=fact.data, kind=fact.kind, items=fact.items)


@rule("Dropout")
def dropout(call: Call) -> None:
    """The data and the mask."""
    for output in range(len(call.node.outputs)):
        call.put(output, call.dims(0))
    call.put(1, dtype=ir.DataType.BOOL if call.opset >= 10 else call.dtype(0))


@rule("Cast CastLike BitCast")
def cast(call: Call) -> None:
    """The shape stays; `to`, or the second input, gives the type."""
    if call.node.op_type == "CastLike":
        target = call.dtype(1)
    else:
        to = call.attr("to")
        target = ir.DataType(to) if to is not None else None
    source = call.dtype(0)
    if call.node.op_type == "BitCast" and source is not None and target is not None:
        if source.bitwidth != target.bitwidth:
            call.fail(f"{source.name} and {target.name} have different bit widths")
        call.put(0, call.dims(0), dtype=target)
        return
    call.put(0, call.dims(0), dtype=target, data=_cast_data(call.data(0), target))


def _cast_data(data: Data | None, target: ir.DataType | None) -> Data | None:
    if data is None or target is None:
        return None
    if target == ir.DataType.BOOL:
        if any(isinstance(e, ir.SymbolicDim) for e in data):
            return None
        return tuple(int(e != 0) for e in data)
    if target in _INTEGERS:
        if any(isinstance(e, float) and not math.isfinite(e) for e in data):
            return None
        return tuple(math.trunc(e) if isinstance(e, float) else e for e in data)
    if target in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return tuple(_as_float(e, target) for e in data)
    return None


def _as_float(element: Element, dtype: ir.DataType) -> Element:
    if isinstance(element, ir.SymbolicDim):
        return element
    return float(np.float32(element)) if dtype == ir.DataType.FLOAT else float(element)


@rule("QuantizeLinear DequantizeLinear")
def quantize(call: Call) -> None:
    """The shape stays. Per-axis scales must be as long as the axis; blocked ones divide it."""
    name = call.node.op_type
    if name == "QuantizeLinear":
        found = call.attr("output_dtype", 0)
        dtype = ir.DataType(found) if found else call.dtype(2)
        call.put(0, dtype=dtype or (None if call.has(2) else ir.DataType.UINT8))
    else:
        found = call.attr("output_dtype", 0)
        call.put(0, dtype=ir.DataType(found) if found else call.dtype(1))
    dims = call.known(0)
    check_scale(call, dims, call.dims(1), call.attr("axis", 1), call.attr("block_size", 0))
    if call.has(2):
        scale, zero = call.dims(1), call.dims(2)
        if (
            scale is not None
            and zero is not None
            and math.prod(_ints(scale)) != math.prod(_ints(zero))
        ):
            call.fail(
                f"the scale {dim_math.text(scale)} and the zero point {dim_math.text(zero)} "
                "have different shapes"
            )
    call.put(0, dims)


def _ints(dims: Dims) -> list[int]:
    return [d if isinstance(d, int) else 1 for d in dims]


def check_scale(call: Call, dims: Dims, scale: Dims | None, axis: int, block: int) -> None:
    """Fail when a per-axis scale does not fit the data."""
    if scale is None or len(scale) != 1 or block or scale == (1,):
        return
    if not dims:
        call.fail("a scalar cannot be quantized per axis")
    axis = call.axis(axis, len(dims), "quantization axis")
    call.require_same(
        dims[axis],
        scale[0],
        f"axis {axis} of {dim_math.text(dims)} has {dims[axis]} entries, the scale has {scale[0]}",
        "give one scale for each entry of the axis, or one for the whole tensor",
    )


@rule("DynamicQuantizeLinear")
def quantize_dynamic(call: Call) -> None:
    """The data, and a scalar scale and zero point."""
    call.put(1, ())
    call.put(2, ())
    call.put(0, call.dims(0))


@rule("PRelu")
def prelu(call: Call) -> None:
    """The slope broadcasts to the input, not the other way round."""
    dims, slope = call.known(0), call.dims(1)
    call.put(0, dims)
    if slope is None or call.opset < 7:
        return
    joint = dim_math.broadcast_shapes([dims, slope])
    if joint is None or len(joint) != len(dims):
        call.fail(f"the slope {dim_math.text(slope)} does not broadcast to {dim_math.text(dims)}")


@rule("SwiGLU")
def swiglu(call: Call) -> None:
    """Gate and value have one shape."""
    gate, value = call.dims(0), call.dims(1)
    if gate is not None and value is not None and len(gate) != len(value):
        call.fail(f"gate {dim_math.text(gate)} and value {dim_math.text(value)} differ")
    call.put(0, gate if gate is not None else value)


# --- normalization ---------------------------------------------------------------------------


@rule("BatchNormalization")
def batch_normalization(call: Call) -> None:
    """Scale, shift, mean and variance have one entry a channel."""
    dims = call.known(0)
    call.put(0, dims)
    if len(dims) < 1:
        call.fail("BatchNormalization needs a batch axis")
    channels: Dim = dims[1] if len(dims) > 1 else 1
    for index in (1, 2, 3, 4):
        given = call.dims(index)
        if given is not None and len(given) == 1 and call.attr("spatial", 1):
            _same_channels(call, channels, given[0], index)
        if given is not None and index >= 3 and len(given) == 1:
            for output in (1, 2, 3, 4) if call.opset < 14 else (index - 2,):
                call.put(output, given)
    if call.opset < 14:
        for output in (1, 2, 3, 4):
            call.put(output, dtype=call.dtype(0))


@rule("InstanceNormalization GroupNormalization")
def channel_normalization(call: Call) -> None:
    """Scale and shift have one entry a channel (GroupNormalization before opset 21: a group)."""
    dims = call.known(0)
    call.put(0, dims)
    groups = call.attr("num_groups")
    if len(dims) > 1 and isinstance(dims[1], int) and groups and dims[1] % groups:
        call.fail(f"{dims[1]} channels do not divide into {groups} groups")
    per_group = groups is not None and call.opset < 21
    for index in (1, 2):
        given = call.dims(index)
        if given is not None and len(given) == 1 and len(dims) > 1:
            _same_channels(call, groups if per_group else dims[1], given[0], index)


def _same_channels(call: Call, channels: Dim, given: Dim, index: int) -> None:
    call.require_same(
        channels,
        given,
        f"the input has {channels} channels, input {index} has {given} entries",
        "make its length the number of channels",
    )


@rule("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
def layer_normalization(call: Call) -> None:
    """The shape stays; mean and inverse deviation keep the axes before `axis`, then 1."""
    dims = call.known(0)
    call.put(0, dims, dtype=call.dtype(0) or call.dtype(1))
    axis = call.axis(call.attr("axis", -1), len(dims))
    scale = call.dims(1)
    if scale is not None:
        joint = dim_math.broadcast_shapes([dims, scale])
        if joint is None or len(joint) != len(dims):
            call.fail(
                f"the scale {dim_math.text(scale)} does not fit {dim_math.text(dims)}",
                f"its shape must broadcast to the axes from {axis} on",
            )
    statistics = ir.DataType(call.attr("stash_type", ir.DataType.FLOAT))
    for output in (1, 2):
        call.put(output, (*dims[:axis], *(1 for _ in dims[axis:])), dtype=statistics)


# --- broadcasting ----------------------------------------------------------------------------


@rule(
    "Add Sub Mul Div Pow Mod And Or Xor BitShift BitwiseAnd BitwiseOr BitwiseXor Equal Greater "
    "GreaterOrEqual Less LessOrEqual Max Min Mean Sum Where"
)
def broadcast(call: Call) -> None:
    """numpy's multidirectional broadcasting over all inputs; data is computed where it is known."""
    if call.opset < 7 and call.attr("broadcast") is not None:
        call.put(0, call.dims(0))  # the older form: B broadcasts to A
        return
    put_broadcast(call, range(len(call.node.inputs)))
    compute = _COMPUTE.get(call.node.op_type)
    if compute is not None:
        _put_data(call, compute)


def put_broadcast(call: Call, inputs: range | tuple[int, ...]) -> None:
    """Output 0 is the broadcast of the inputs listed."""
    shapes = [call.known(i) for i in inputs if call.has(i)]
    found = dim_math.broadcast_shapes(shapes)
    if found is None:
        texts = " and ".join(dim_math.text(s) for s in shapes)
        call.fail(
            f"the shapes {texts} do not broadcast",
            "each pair of dimensions, aligned at the right, must be equal or one of them 1",
        )
    if any(dim_math.is_unknown(d) for d in found):
        found = tuple(
            call.fresh(0, axis)
            if dim_math.is_unknown(d) and _named(shapes, axis, len(found))
            else d
            for axis, d in enumerate(found)
        )
    call.put(0, found)


def _named(shapes: list[Dims], axis: int, rank: int) -> bool:
    """Whether an undecided broadcast axis deserves a symbol: some input has one there."""
    return any(
        axis - rank + len(s) >= 0 and not dim_math.is_unknown(s[axis - rank + len(s)])
        for s in shapes
    )


def _put_data(call: Call, compute: Callable[..., Element]) -> None:
    """Apply `compute` element by element when all inputs' elements are followed."""
    if call.results[0].dims is None or len(call.results[0].dims) > 1:
        return
    found_data = [call.data(i) for i in range(len(call.node.inputs))]
    columns = [c for c in found_data if c is not None]
    if len(columns) < len(found_data) or call.attr("fmod", 0):
        return
    length = max(map(len, columns))
    if length > MAX_DATA or any(len(c) not in (1, length) for c in columns):
        return
    single = call.dtype(len(columns) - 1) == ir.DataType.FLOAT
    result: list[Element] = []
    for row in range(length):
        elements = [c[row if len(c) > 1 else 0] for c in columns]
        try:
            found = compute(*elements)
        except (ArithmeticError, ValueError):
            return
        if isinstance(found, float) and single:
            found = float(np.float32(found))
        result.append(found)
    call.put(0, data=tuple(result))


def _dim_op(
    on_dims: Callable[[Dim, Dim], Dim], on_numbers: Callable[[float, float], float]
) -> Callable[..., Element]:
    def compute(*elements: Element) -> Element:
        total = elements[0]
        for element in elements[1:]:
            if isinstance(total, float) or isinstance(element, float):
                total = _mixed(on_numbers, on_dims, total, element)
            else:
                total = on_dims(total, element)
        return total

    return compute


def _mixed(
    on_numbers: Callable[[float, float], float],
    on_dims: Callable[[Dim, Dim], Dim],
    a: Element,
    b: Element,
) -> Element:
    """Floats; a symbol with a whole float stays exact, with another it is not followed."""
    if not isinstance(a, ir.SymbolicDim) and not isinstance(b, ir.SymbolicDim):
        return on_numbers(float(a), float(b))
    left, right = _whole(a), _whole(b)
    if left is None or right is None:
        raise ValueError("a symbol and a fraction")
    return on_dims(left, right)


def _whole(element: Element) -> Dim | None:
    if isinstance(element, float):
        return int(element) if element.is_integer() else None
    return element


def _multiply(a: Element, b: Element) -> Element:
    if isinstance(a, float) and isinstance(b, ir.SymbolicDim):
        a, b = b, a
    if isinstance(a, ir.SymbolicDim) and isinstance(b, float) and not b.is_integer():
        return _rational(a, b)
    return _dim_op(dim_math.mul, lambda x, y: x * y)(a, b)


def _rational(dim: ir.SymbolicDim, factor: float) -> Element:
    """dim * p/q as an expression, for a Floor or a Cast to round later."""
    exact = Fraction(factor)
    if exact.denominator > 4096:
        raise ValueError("not a short fraction")
    return (dim * exact.numerator) / exact.denominator


def _divide(a: Element, b: Element) -> Element:
    """Integers truncate toward zero (the operator's definition), floats divide."""
    if isinstance(a, float) or isinstance(b, float):
        if isinstance(a, ir.SymbolicDim) and isinstance(b, float):
            return _rational(a, 1 / b) if b > 0 and math.frexp(b)[0] == 0.5 else _exact(a, b)
        if isinstance(a, ir.SymbolicDim) or isinstance(b, ir.SymbolicDim):
            raise ValueError("a symbol and a fraction")
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return math.trunc(Fraction(a, b))
    if dim_math.is_negative(a) is not False or dim_math.is_negative(b) is not False:
        raise ValueError("rounding depends on the sign")
    return dim_math.floordiv(a, b)


def _exact(a: ir.SymbolicDim, b: float) -> Element:
    if not b.is_integer() or b <= 0:
        raise ValueError("a symbol and a fraction")
    return a / int(b)


def _remainder(a: Element, b: Element) -> Element:
    if isinstance(a, float) or isinstance(b, float):
        raise ValueError("fmod of floats is not followed")
    return dim_math.modulo(a, b)


def _compare(decide: Callable[[Dim, Dim], bool | None]) -> Callable[..., Element]:
    def compute(a: Element, b: Element) -> Element:
        if isinstance(a, float) or isinstance(b, float):
            raise ValueError("floats are not compared")
        found = decide(a, b)
        if found is None:
            raise ValueError("undecided")
        return int(found)

    return compute


def _is_less(a: Dim, b: Dim) -> bool | None:
    return dim_math.is_negative(dim_math.sub(a, b))


def _not(found: bool | None) -> bool | None:
    return None if found is None else not found


def _equal(a: Dim, b: Dim) -> bool | None:
    """As `same`, and a size is never a negative number: Equal(shape, -1) is decided."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, int) and one < 0 and dim_math.is_negative(other) is False:
            return False
    return dim_math.same(a, b)


def _select(condition: Element, a: Element, b: Element) -> Element:
    if not isinstance(condition, int):
        raise ValueError("the condition is not known")
    return a if condition else b


_COMPUTE: dict[str, Callable[..., Element]] = {
    "Add": _dim_op(dim_math.add, lambda x, y: x + y),
    "Sub": _dim_op(dim_math.sub, lambda x, y: x - y),
    "Mul": _multiply,
    "Div": _divide,
    "Mod": _remainder,
    "Min": _dim_op(dim_math.minimum, min),
    "Max": _dim_op(dim_math.maximum, max),
    "Equal": _compare(_equal),
    "Less": _compare(_is_less),
    "Greater": _compare(lambda a, b: _is_less(b, a)),
    "LessOrEqual": _compare(lambda a, b: _not(_is_less(b, a))),
    "GreaterOrEqual": _compare(lambda a, b: _not(_is_less(a, b))),
    "And": lambda a, b: int(bool(a) and bool(b)),
    "Or": lambda a, b: int(bool(a) or bool(b)),
    "Where": _select,
}


@rule("Floor Neg")
def unary_followed(call: Call) -> None:
    """Same shape; Floor of a size expression and the negative of a size are followed."""
    call.put(0, call.dims(0))
    data = call.data(0)
    if data is None or len(data) > MAX_DATA:
        return
    if call.node.op_type == "Neg":
        call.put(0, data=tuple(-e if not isinstance(e, ir.SymbolicDim) else dim_math.sub(0, e)
                               for e in data))  # fmt: skip
    else:
        call.put(0, data=tuple(_floor(e) for e in data))


def _floor(element: Element) -> Element:
    if isinstance(element, ir.SymbolicDim):
        return dim_math.floordiv(element, 1)
    return float(math.floor(element)) if isinstance(element, float) else element


# --- generators with a type attribute --------------------------------------------------------


def _set_dtype_attribute(call: Call, default: ir.DataType | None) -> None:
    found = call.attr("dtype")
    call.put(0, dtype=ir.DataType(found) if found is not None else default)


@rule("RandomNormal RandomUniform")
def random_of_shape(call: Call) -> None:
    """`shape` and `dtype` are attributes."""
    _set_dtype_attribute(call, ir.DataType.FLOAT)
    call.put(0, call.attr("shape"))


@rule("EyeLike")
def eye_like(call: Call) -> None:
    """A matrix of the input's shape."""
    _set_dtype_attribute(call, call.dtype(0))
    call.put(0, call.rank(0, 2))
