"""Arithmetic that one operator does, from shapes alone: the formulas behind the operator table.

A formula takes `Operands` (one node's shapes, as ints) and returns `Work(macs, extra_flops)`.
It never reads a weight. Which operator uses which formula is in `op_table`; bytes and totals,
control flow and function calls are in `ops`.

Conventions. A multiply-accumulate is one MAC. Everything else counts one flop per scalar
operation (add, multiply, compare, and also one call of exp, tanh, erf, pow or sqrt), so Sigmoid,
1/(1+exp(-x)), is 4 and Softmax (max, subtract, exp, sum, divide) is 5 per element. Copies are 0.
Formulas follow the operator definitions in the ONNX specification; padding is counted as if it
were data, which is what dense kernels and the usual counters (fvcore, ptflops) do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import onnx_ir as ir

from .graph import constant_array

SIGMOID_FLOPS = 4
SOFTMAX_FLOPS = 5
_FFT_FLOPS_PER_POINT = 5  # 5 N log2 N, the convention of the FFTW benchmarks


class Work(NamedTuple):
    """Multiply-accumulates, and the flops besides them."""

    macs: int
    extra_flops: int


class UnknownCostError(Exception):
    """Internal: the cost cannot be known; the argument says why. `ops.node_cost` catches it."""


class Operands:
    """One node's input and output shapes as ints, its attributes, and reasons where they lack."""

    __slots__ = ("_bindings", "node")

    def __init__(self, node: ir.Node, bindings: Mapping[str, int] | None) -> None:
        self.node = node
        self._bindings = bindings

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        inputs = self.node.inputs
        return index < len(inputs) and inputs[index] is not None

    def has_output(self, index: int) -> bool:
        """Whether output `index` is given."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].name)

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of input `index`; raises `UnknownCostError` when absent or not static."""
        if not self.has(index):
            raise UnknownCostError(f"input {index} is absent")
        return resolve_shape(self.node.inputs[index], self._bindings)

    def output(self, index: int = 0) -> tuple[int, ...]:
        """The shape of output `index`; raises `UnknownCostError` when absent or not static."""
        if index >= len(self.node.outputs):
            raise UnknownCostError(f"output {index} is absent")
        return resolve_shape(self.node.outputs[index], self._bindings)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value; raises `UnknownCostError` where a function's caller sets it."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref():
            raise UnknownCostError(f"attribute {name!r} is set by the function's caller")
        return found.value

    def size(self, index: int) -> int:
        """Elements of input `index`."""
        return math.prod(self.shape(index))

    def output_size(self, index: int = 0) -> int:
        """Elements of output `index`."""
        return math.prod(self.output(index))


Formula = Callable[[Operands], Work]


def resolve_shape(value: ir.Value | None, bindings: Mapping[str, int] | None) -> tuple[int, ...]:
    """A value's shape with symbols replaced; `UnknownCostError` names value and dimension."""
    if value is None:
        raise UnknownCostError("a value is absent")
    shape = value.shape
    if shape is None:
        raise UnknownCostError(f"the shape of {value.name!r} is unknown")
    dims = shape.dims
    for dim in dims:
        if type(dim) is not int:
            return tuple(_resolve_dim(d, value, axis, bindings) for axis, d in enumerate(dims))
    return dims  # type: ignore[return-value]


def _resolve_dim(
    dim: int | ir.SymbolicDim, value: ir.Value, axis: int, bindings: Mapping[str, int] | None
) -> int:
    if isinstance(dim, int):
        return dim
    name = dim.value
    if name is None:
        raise UnknownCostError(f"dimension {axis} of {value.name!r} is unknown")
    if bindings:
        if name in bindings:
            return bindings[name]
        if not name.isidentifier():
            try:
                found = dim.evaluate(bindings)
            except (ValueError, TypeError):  # a name that is no expression
                found = dim
            if isinstance(found, int):
                return found
    raise UnknownCostError(f"dimension {axis} of {value.name!r} is the symbol {name!r}")


# --- plain counts ----------------------------------------------------------------------------


def no_work(op: Operands) -> Work:
    """Copies and bookkeeping: no arithmetic."""
    return Work(0, 0)


def per_output(flops: float) -> Formula:
    """`flops` for each element of the first output."""

    def formula(op: Operands) -> Work:
        return Work(0, int(op.output_size() * flops))

    return formula


def per_input(flops: float, index: int = 0) -> Formula:
    """`flops` for each element of one input."""

    def formula(op: Operands) -> Work:
        return Work(0, int(op.size(index) * flops))

    return formula


def variadic(op: Operands) -> Work:
    """Sum, Max, Min, Mean: one flop per output element for each input after the first."""
    inputs = sum(1 for v in op.node.inputs if v is not None)
    extra = 1 if op.node.op_type == "Mean" else 0
    return Work(0, op.output_size() * (max(inputs - 1, 0) + extra))


def unknown(reason: str) -> Formula:
    """The operator is known, its arithmetic is not a function of shapes: `reason` says why."""

    def formula(op: Operands) -> Work:
        raise UnknownCostError(reason)

    return formula


# --- convolution and pooling -----------------------------------------------------------------


def convolution(weight: int = 1, bias: int | None = 2, per_element: int = 0) -> Formula:
    """Output elements x (input channels per group x kernel size): weight is (M, C/group, k...).

    `per_element` adds flops for what is fused behind it (activation, requantization).
    """

    def formula(op: Operands) -> Work:
        outputs = op.output_size()
        flops = per_element + (1 if bias is not None and op.has(bias) else 0)
        return Work(outputs * math.prod(op.shape(weight)[1:]), outputs * flops)

    return formula


def convolution_fused(op: Operands) -> Work:
    """A convolution, and a flop an element each for the activation and the summand, input 3."""
    extra = (1 if op.attr("activation") else 0) + (1 if op.has(3) else 0)
    return convolution(per_element=extra)(op)


def convolution_transposed(op: Operands) -> Work:
    """Input elements x (output channels per group x kernel size): weight is (C, M/group, k...)."""
    bias = op.output_size() if op.has(2) else 0
    return Work(op.size(0) * math.prod(op.shape(1)[1:]), bias)


def convolution_deformable(op: Operands) -> Work:
    """Convolution, plus bilinear sampling (7 flops) at each kernel point of each output."""
    output, weight, data = op.output(), op.shape(1), op.shape(0)
    samples = output[0] * data[1] * math.prod(output[2:]) * math.prod(weight[2:])
    bias = math.prod(output) if op.has(3) else 0
    mask = samples if op.has(4) else 0
    return Work(math.prod(output) * math.prod(weight[1:]), 7 * samples + bias + mask)


def convolution_causal(op: Operands) -> Work:
    """Depthwise causal convolution with state: weight is (C, 1, k)."""
    outputs = op.output_size()
    activation = op.attr("activation", "none")
    flops = (1 if op.has(2) else 0) + (SIGMOID_FLOPS + 1 if activation not in ("", "none") else 0)
    return Work(outputs * math.prod(op.shape(1)[1:]), outputs * flops)


def pooling(flops_per_tap: int = 1, channels_last: bool = False) -> Formula:
    """Output elements x kernel size x `flops_per_tap`."""

    def formula(op: Operands) -> Work:
        kernel = op.attr("kernel_shape")
        if kernel is None:
            raise UnknownCostError("kernel_shape is absent")
        return Work(0, op.output_size() * math.prod(kernel) * flops_per_tap)

    return formula


# --- matrix products -------------------------------------------------------------------------


def matmul(a: int = 0, bias: int | None = None, per_element: int = 0) -> Formula:
    """Output elements x K, where K is the last axis of A (`transA`: the one before it)."""

    def formula(op: Operands) -> Work:
        shape = op.shape(a)
        if not shape:
            raise UnknownCostError("input A is a scalar")
        axis = -2 if op.attr("transA", 0) and len(shape) > 1 else -1
        outputs = op.output_size()
        flops = per_element + (1 if bias is not None and op.has(bias) else 0)
        if op.attr("alpha", 1.0) != 1.0:  # FusedMatMul
            flops += 1
        return Work(outputs * shape[axis], outputs * flops)

    return formula


def gemm(per_element: int = 0, bias: int = 2) -> Formula:
    """M x N x K, and one flop an element each for C and for a scale that is not 1."""

    def formula(op: Operands) -> Work:
        rows, columns = op.shape(0)
        inner = rows if op.attr("transA", 0) else columns
        outputs = op.output_size()
        flops = per_element
        if op.attr("alpha", 1.0) != 1.0:
            flops += 1
        if op.has(bias):
            flops += 1 + (op.attr("beta", 1.0) != 1.0)
        return Work(outputs * inner, outputs * flops)

    return formula


def matmul_blockwise(op: Operands) -> Work:
    """Activations x K, after dequantizing the K x N weight (subtract and multiply)."""
    inner, columns = op.attr("K"), op.attr("N")
    if inner is None or columns is None:
        inner, columns = op.shape(0)[-1], op.output()[-1]
    outputs = op.output_size()
    return Work(outputs * int(inner), 2 * int(inner) * int(columns))


def einsum(op: Operands) -> Work:
    """Product of the sizes of all indices, for each operand after the first.

    One operand is a transpose, diagonal or sum: its elements as flops. For more than two
    operands it is the direct evaluation, an upper bound on any contraction order.
    """
    equation = op.attr("equation", "").replace(" ", "").split("->")[0]
    sizes: dict[str, int] = {}
    for i, term in enumerate(equation.split(",")):
        shape = op.shape(i)
        letters = term.replace("...", "")
        left = term.index("...") if "..." in term else len(letters)
        hidden = len(shape) - len(letters)
        names = [*letters[:left], *(f"...{hidden - n}" for n in range(hidden)), *letters[left:]]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, size))
    operands = len(op.node.inputs)
    if operands == 1:
        return Work(0, op.size(0))
    return Work(math.prod(sizes.values()) * (operands - 1), 0)


# --- attention -------------------------------------------------------------------------------


def _attention_core(
    batch: int, heads: int, queries: int, keys: int, key_width: int, value_width: int
) -> Work:
    """Q.K and P.V products; scale, mask and softmax per score.

    The full rectangle is counted, causal or not: dense kernels compute it.
    """
    scores = batch * heads * queries * keys
    return Work(scores * (key_width + value_width), scores * (SOFTMAX_FLOPS + 2))


def _heads_split(shape: tuple[int, ...], heads: int | None) -> tuple[int, int, int, int]:
    """(batch, heads, length, width) from (B, H, L, E) or (B, L, H*E)."""
    if len(shape) == 4:
        return shape
    if len(shape) != 3 or not heads:
        raise UnknownCostError("the number of heads is unknown")
    return shape[0], int(heads), shape[1], shape[2] // int(heads)


def attention(op: Operands) -> Work:
    """ONNX Attention (opset 23): grouped-query heads share keys, products do not shrink."""
    batch, heads, queries, width = _heads_split(op.shape(0), op.attr("q_num_heads"))
    kv_heads = op.attr("kv_num_heads")
    keys = _heads_split(op.shape(1), kv_heads)[2]
    value_width = _heads_split(op.shape(2), kv_heads)[3]
    if op.has(4):
        keys += op.shape(4)[2]
    return _attention_core(batch, heads, queries, keys, width, value_width)


def attention_flex(op: Operands) -> Work:
    """FlexAttention: as Attention; what its score and probability bodies cost is not counted."""
    if op.attr("score_mod") is not None or op.attr("prob_mod") is not None:
        raise UnknownCostError("the cost of the score_mod and prob_mod bodies is not modelled")
    return attention(op)


def attention_multi_head(op: Operands) -> Work:
    """com.microsoft MultiHeadAttention: separate or packed Q, K, V, and an optional past."""
    heads = op.attr("num_heads")
    query = op.shape(0)
    if len(query) == 5:  # packed QKV: (B, L, H, 3, E)
        batch, queries, heads, _, width = query
        keys, value_width = queries, width
    else:
        batch, heads, queries, width = _heads_split(query, heads)
        keys, value_width = queries, width
        if op.has(1):
            key = op.shape(1)
            keys = key[2] if len(key) == 4 else key[1]
        if op.has(2):
            value_width = _heads_split(op.shape(2), heads)[3]
    if op.has(6):
        keys += op.shape(6)[2]
    return _attention_core(batch, heads, queries, keys, width, value_width)


def attention_grouped_query(op: Operands) -> Work:
    """com.microsoft GroupQueryAttention over the whole present cache where its shape is known."""
    heads, kv_heads = op.attr("num_heads"), op.attr("kv_num_heads")
    if not heads or not kv_heads:
        raise UnknownCostError("the number of heads is unknown")
    batch, queries, hidden = op.shape(0)
    packed = not op.has(1)
    width = hidden // (heads + 2 * kv_heads) if packed else hidden // heads
    try:
        keys = op.output(1)[2]
    except UnknownCostError:
        keys = queries + (op.shape(3)[2] if op.has(3) else 0)
    return _attention_core(batch, heads, queries, keys, width, width)


def attention_with_projection(past: int) -> Formula:
    """com.microsoft Attention and QAttention: one product makes Q, K and V, then the core."""

    def formula(op: Operands) -> Work:
        batch, queries, hidden = op.shape(0)
        heads = op.attr("num_heads")
        if not heads:
            raise UnknownCostError("the number of heads is unknown")
        total = op.shape(1)[-1]
        widths = op.attr("qkv_hidden_sizes") or (total // 3,) * 3
        keys = queries + (op.shape(past)[3] if op.has(past) else 0)
        core = _attention_core(batch, heads, queries, keys, widths[1] // heads, widths[2] // heads)
        rows = batch * queries * total
        return Work(rows * hidden + core.macs, rows + core.extra_flops)

    return formula


def attention_linear(op: Operands) -> Work:
    """ONNX LinearAttention as recurrence: per token and head two or three d_k x d_v products."""
    heads, kv_heads = op.attr("q_num_heads"), op.attr("kv_num_heads")
    if not heads or not kv_heads:
        raise UnknownCostError("the number of heads is unknown")
    batch, tokens, hidden = op.shape(0)
    key_width, value_width = hidden // heads, op.shape(2)[2] // kv_heads
    state = batch * tokens * key_width * value_width
    rule = op.attr("update_rule", "gated_delta")
    updates = kv_heads * (2 if "delta" in rule else 1)
    decay = kv_heads * state if "gated" in rule else 0
    return Work(state * (updates + heads), decay)


# --- recurrent -------------------------------------------------------------------------------

_RECURRENT_UNIT_FLOPS = {
    "LSTM": 12 + 3 * SIGMOID_FLOPS + 2 + 4,  # 3 adds in each of 4 gates, 3 sigmoid, 2 tanh, c and h
    "GRU": 9
    + 2 * SIGMOID_FLOPS
    + 1
    + 5,  # 3 adds in each of 3 gates, 2 sigmoid, tanh, r*h and blend
    "RNN": 3 + 1,  # 3 adds and the activation
}
"""Flops per hidden unit and step besides the two matrix products, with the default activations."""


def recurrent(op: Operands) -> Work:
    """Steps x batch x (elements of W + elements of R): W is (D, gates*H, I), R (D, gates*H, H)."""
    data, weight, recurrence = op.shape(0), op.shape(1), op.shape(2)
    steps = data[0] * data[1]
    units = recurrence[0] * recurrence[2]
    if op.node.op_type == "DynamicQuantizeLSTM":  # W is (D, I, 4H), R is (D, H, 4H)
        units = recurrence[0] * recurrence[1]
    per_unit = _RECURRENT_UNIT_FLOPS.get(op.node.op_type, _RECURRENT_UNIT_FLOPS["LSTM"])
    macs = steps * (math.prod(weight) + math.prod(recurrence))
    return Work(macs, steps * units * per_unit)


# --- the rest --------------------------------------------------------------------------------


def interpolation(op: Operands) -> Work:
    """Resize, Upsample: 2 flops for each of the 2^d (linear) or 4^d (cubic) taps; nearest copies.

    d is the number of axes whose size changes.
    """
    mode = op.attr("mode", "nearest")
    taps = {"linear": 2, "bilinear": 2, "cubic": 4}.get(mode)
    if taps is None:
        return Work(0, 0)
    source, result = op.shape(0), op.output()
    changed = sum(a != b for a, b in zip(source, result, strict=True))
    return Work(0, math.prod(result) * 2 * taps**changed if changed else 0)


def grid_sample(op: Operands) -> Work:
    """Like Resize, over the spatial axes, plus 2 flops an axis to denormalize the grid."""
    mode = op.attr("mode", "linear")
    rank = len(op.shape(0)) - 2
    taps = {"linear": 2, "bilinear": 2, "cubic": 4, "bicubic": 4}.get(mode, 0)
    samples = 2 * taps**rank if taps else 0
    return Work(0, op.output_size() * samples + op.size(1) * 2)


def roi_align(op: Operands) -> Work:
    """sampling_ratio^2 bilinear samples (8 flops) an output; adaptive sampling depends on data."""
    ratio = op.attr("sampling_ratio", 0)
    if ratio <= 0:
        raise UnknownCostError("sampling_ratio 0 adapts to each region's size, which is data")
    return Work(0, op.output_size() * ratio * ratio * 8)


def sort(op: Operands) -> Work:
    """n log2 n comparisons along the sorted axis (all elements where there is no axis)."""
    shape = op.shape(0)
    axis = op.attr("axis", -1)
    length = shape[axis] if shape and -len(shape) <= axis < len(shape) else math.prod(shape)
    return Work(0, math.prod(shape) * max(1, math.ceil(math.log2(max(length, 2)))))


def fourier(op: Operands) -> Work:
    """5 N log2 N per transform; N is the longer of the input's and the output's length."""
    source, result = op.shape(0), op.output()
    if op.node.op_type == "STFT":  # (batch, frames, bins, 2)
        frame = 2 * (result[2] - 1) if op.attr("onesided", 1) else result[2]
        transforms = result[0] * result[1]
        window = transforms * frame if op.has(2) else 0
    else:
        points = max(math.prod(source[:-1]), math.prod(result[:-1]))
        axis_array = constant_array(op.node.inputs[2], 1) if op.has(2) else None
        axis = int(axis_array.reshape(-1)[0]) if axis_array is not None else op.attr("axis", -2)
        frame = max(source[axis], result[axis], 1)
        transforms, window = points // frame, 0
    per_point = _FFT_FLOPS_PER_POINT * math.log2(max(frame, 2))
    return Work(0, int(transforms * frame * per_point) + window)


def determinant(op: Operands) -> Work:
    """LU factorization: 2/3 n^3 flops a matrix (Golub and Van Loan, 3.2)."""
    shape = op.shape(0)
    return Work(0, math.prod(shape[:-2]) * (2 * shape[-1] ** 3 // 3 + shape[-1]))


def inverse(op: Operands) -> Work:
    """Matrix inverse by LU: 2 n^3 flops a matrix (Golub and Van Loan, 3.4)."""
    shape = op.shape(0)
    return Work(0, math.prod(shape[:-2]) * 2 * shape[-1] ** 3)


def affine_grid(op: Operands) -> Work:
    """Each grid point is theta (d x (d+1)) times a homogeneous coordinate."""
    result = op.output()
    return Work(math.prod(result) * (result[-1] + 1), 0)


def local_response(op: Operands) -> Work:
    """LRN: square, a sum over `size` channels, scale, pow and divide."""
    return Work(0, op.size(0) * (1 + int(op.attr("size", 1)) + 4))


def scatter(op: Operands) -> Work:
    """Copies, unless a reduction combines the updates: then one flop an update."""
    return Work(0, op.size(2) if op.attr("reduction", "none") != "none" else 0)


def rotary(index: int = 0) -> Formula:
    """Two multiplies and an add for each element."""
    return per_input(3, index)


def linear_model(op: Operands) -> Work:
    """ai.onnx.ml linear models: rows x coefficients."""
    coefficients = len(op.attr("coefficients") or ())
    shape = op.shape(0)
    rows = shape[0] if len(shape) > 1 else 1
    return Work(rows * coefficients, op.output_size())


def support_vectors(op: Operands) -> Work:
    """ai.onnx.ml SVMs: rows x support vector elements, plus the kernel function and voting."""
    elements = len(op.attr("support_vectors") or ()) or len(op.attr("coefficients") or ())
    weights = len(op.attr("coefficients") or ())
    shape = op.shape(0)
    rows = shape[0] if len(shape) > 1 else 1
    return Work(rows * (elements + weights), 3 * rows * weights)


def pairwise_distance(op: Operands) -> Work:
    """com.microsoft CDist: subtract and square-accumulate for each pair, then a root."""
    (rows, width), (columns, _) = op.shape(0), op.shape(1)
    return Work(rows * columns * width, rows * columns * (width + 1))


def optimizer(flops: int) -> Formula:
    """Training update rules: `flops` for each element of each optimized tensor.

    Inputs after rate and step count come in equal groups (tensor, gradient, states).
    """

    def formula(op: Operands) -> Work:
        groups = {"Adagrad": 3, "Adam": 4, "Momentum": 3}[op.node.op_type]
        count = (len(op.node.inputs) - 2) // groups
        return Work(0, flops * sum(op.size(2 + i) for i in range(count)))

    return formula
