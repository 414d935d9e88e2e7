"""Shape rules of convolution, pooling, matrix products, reductions, recurrence and attention.

Output sizes of windows follow the ONNX definitions of Conv and the pools: with explicit padding
floor or ceil of (size + padding - extent) / stride, plus 1; SAME_* is ceil(size / stride).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from . import dims as dim_math
from .graph import Dim
from .shape_rules import Call, Dims, Undecided, rule
from .shape_rules_elementwise import check_scale, put_broadcast
from .shape_rules_movement import axes_of

# --- windows ---------------------------------------------------------------------------------


def window_sizes(call: Call, sizes: Dims, kernel: Sequence[Dim]) -> list[Dim]:
    """Spatial output sizes of a convolution or pool over `sizes`."""
    rank = len(sizes)
    strides = _per_axis(call, "strides", rank, 1)
    dilations = _per_axis(call, "dilations", rank, 1)
    pads = _per_axis(call, "pads", 2 * rank, 0)
    auto_pad = call.attr("auto_pad", "NOTSET")
    ceil_mode = bool(call.attr("ceil_mode", 0))
    result = []
    for axis, size in enumerate(sizes):
        extent = dim_math.add(dim_math.mul(dilations[axis], dim_math.sub(kernel[axis], 1)), 1)
        stride = strides[axis]
        if stride <= 0:
            call.fail(f"a stride of {stride}")
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            result.append(dim_math.ceildiv(size, stride))
            continue
        before, after = (0, 0) if auto_pad == "VALID" else (pads[axis], pads[axis + rank])
        room = dim_math.sub(dim_math.add(size, before + after), extent)
        if isinstance(room, int) and room < 0:
            call.fail(
                f"a window of {extent} exceeds axis {axis}, {size} padded by {before + after}",
                "use a larger input or more padding",
            )
        result.append(_window_count(size, room, stride, before, ceil_mode))
    return result


def _window_count(size: Dim, room: Dim, stride: int, before: int, ceil_mode: bool) -> Dim:
    if not ceil_mode:
        return dim_math.floordiv(dim_math.add(room, stride), stride)
    count = dim_math.add(dim_math.ceildiv(room, stride), 1)
    if isinstance(count, int) and isinstance(size, int) and (count - 1) * stride >= size + before:
        return count - 1  # a window may not start in the padding after the data
    return count


def _per_axis(call: Call, name: str, length: int, default: int) -> tuple[int, ...]:
    found = call.attr(name)
    if found is None or (name == "pads" and call.attr("auto_pad", "NOTSET") == "VALID"):
        return (default,) * length
    if len(found) != length:
        call.fail(f"{name} has {len(found)} entries, expected {length}")
    return tuple(found)


def _check_conv(call: Call, channels: Dim, weight: Dims, group: int) -> None:
    inner = weight[1]
    if isinstance(channels, int) and isinstance(inner, int) and channels != inner * group:
        call.fail(
            f"the input has {channels} channels, the weight {dim_math.text(weight)} with group "
            f"{group} takes {inner * group}",
            "correct the weight's second axis, the group attribute, or the producer's channels",
        )
    outputs = weight[0]
    if isinstance(outputs, int) and group > 0 and outputs % group:
        call.fail(f"{outputs} output channels do not divide into {group} groups")


def _check_bias(call: Call, index: int, channels: Dim) -> None:
    bias = call.dims(index)
    if bias is not None and len(bias) == 1:
        call.require_same(
            bias[0], channels, f"the bias has {bias[0]} entries for {channels} output channels"
        )


def _kernel(call: Call, weight: Dims) -> tuple[Dim, ...]:
    kernel = weight[2:]
    given = call.attr("kernel_shape")
    if given is None:
        return kernel
    if len(given) != len(kernel):
        call.fail(f"kernel_shape {list(given)} does not fit the weight {dim_math.text(weight)}")
    for axis, size in enumerate(given):
        call.require_same(
            size,
            kernel[axis],
            f"kernel_shape is {list(given)}, the weight's is {dim_math.text(kernel)}",
        )
    return tuple(given)


def put_conv(call: Call, data: int, weight: int, bias: int | None) -> None:
    """(N, C, spatial...) * (M, C/group, kernel...) -> (N, M, spatial'...)."""
    source, kernel_dims = call.dims(data), call.dims(weight)
    if source is None:
        raise Undecided
    if len(source) < 3:
        call.fail(f"its input {dim_math.text(source)} needs batch, channel and spatial axes")
    if kernel_dims is None:
        call.put(0, (source[0], *(call.fresh(0, 1 + i) for i in range(len(source) - 1))))
        return
    if len(kernel_dims) != len(source):
        call.fail(
            f"the input {dim_math.text(source)} and the weight {dim_math.text(kernel_dims)} "
            "have different ranks"
        )
    _check_conv(call, source[1], kernel_dims, call.attr("group", 1))
    if bias is not None:
        _check_bias(call, bias, kernel_dims[0])
    spatial = window_sizes(call, source[2:], _kernel(call, kernel_dims))
    call.put(0, (source[0], kernel_dims[0], *spatial))


@rule("Conv ConvInteger")
def conv(call: Call) -> None:
    """Convolution; ConvInteger accumulates in int32."""
    put_conv(call, 0, 1, 2 if call.node.op_type == "Conv" else None)


@rule("QLinearConv")
def conv_quantized(call: Call) -> None:
    """Convolution of quantized tensors: scales and zero points between the operands."""
    call.put(0, dtype=call.dtype(7))
    weight = call.dims(3)
    if weight is not None:
        check_scale(call, weight, call.dims(4), 0, 0)
    put_conv(call, 0, 3, 8)


@rule("DeformConv")
def conv_deformable(call: Call) -> None:
    """Shaped as Conv; offsets are the third input."""
    put_conv(call, 0, 1, 3)


@rule("CausalConvWithState")
def conv_causal(call: Call) -> None:
    """Same length out; the state keeps kernel - 1 positions."""
    source = call.rank(0, 3)
    weight = call.dims(1)
    call.put(0, source)
    if weight is not None and len(weight) == 3:
        call.require_same(source[1], weight[0], f"{source[1]} channels, {weight[0]} kernels")
        call.put(1, (*source[:2], dim_math.sub(weight[2], 1)))


@rule("ConvTranspose")
def conv_transpose(call: Call) -> None:
    """stride (size - 1) + output_padding + extent - padding, or `output_shape` where given."""
    source, weight = call.rank(0, at_least=3), call.dims(1)
    if weight is None:
        raise Undecided
    if len(weight) != len(source):
        call.fail(
            f"the input {dim_math.text(source)} and the weight {dim_math.text(weight)} "
            "have different ranks"
        )
    group = call.attr("group", 1)
    call.require_same(
        source[1],
        weight[0],
        f"the input has {source[1]} channels, the weight {dim_math.text(weight)} takes {weight[0]}",
        "correct the weight's first axis or the producer's channels",
    )
    channels = dim_math.mul(weight[1], group)
    _check_bias(call, 2, channels)
    given = call.attr("output_shape")
    if given:
        spatial: list[Dim] = list(given[-(len(source) - 2) :])
    else:
        spatial = _transposed_sizes(call, source[2:], _kernel(call, weight))
    call.put(0, (source[0], channels, *spatial))


def _transposed_sizes(call: Call, sizes: Dims, kernel: Sequence[Dim]) -> list[Dim]:
    rank = len(sizes)
    strides = _per_axis(call, "strides", rank, 1)
    dilations = _per_axis(call, "dilations", rank, 1)
    pads = _per_axis(call, "pads", 2 * rank, 0)
    extra = _per_axis(call, "output_padding", rank, 0)
    if call.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return [dim_math.mul(size, strides[axis]) for axis, size in enumerate(sizes)]
    result = []
    for axis, size in enumerate(sizes):
        extent = dim_math.add(dim_math.mul(dilations[axis], dim_math.sub(kernel[axis], 1)), 1)
        full = dim_math.add(dim_math.mul(dim_math.sub(size, 1), strides[axis]), extent)
        found = dim_math.add(full, extra[axis] - pads[axis] - pads[axis + rank])
        if isinstance(found, int) and found < 0:
            call.fail(f"axis {axis} would be {found} long")
        result.append(found)
    return result


@rule("MaxPool AveragePool LpPool")
def pool(call: Call) -> None:
    """(N, C, spatial...) -> (N, C, spatial'...); MaxPool's second output is the indices."""
    source = call.rank(0, at_least=3)
    kernel = call.attr("kernel_shape")
    if kernel is None or len(kernel) != len(source) - 2:
        call.fail(f"kernel_shape {kernel} does not fit the input {dim_math.text(source)}")
    spatial = window_sizes(call, source[2:], kernel)
    for output in range(len(call.node.outputs)):
        call.put(output, (*source[:2], *spatial))


@rule("GlobalAveragePool GlobalMaxPool GlobalLpPool")
def pool_global(call: Call) -> None:
    """Spatial axes become 1."""
    source = call.rank(0, at_least=2)
    call.put(0, (*source[:2], *(1 for _ in source[2:])))


@rule("MaxRoiPool RoiAlign")
def pool_regions(call: Call) -> None:
    """(regions, C, height, width)."""
    source, regions = call.rank(0, 4), call.rank(1, 2)
    if call.node.op_type == "MaxRoiPool":
        size = call.attr("pooled_shape")
    else:
        size = (call.attr("output_height", 1), call.attr("output_width", 1))
    call.put(0, (regions[0], source[1], *size))


@rule("Col2Im")
def columns_to_image(call: Call) -> None:
    """(N, C x block, L) -> (N, C, image...)."""
    source, image, block = call.rank(0, 3), call.data(1), call.ints(2)
    if block is None or image is None:
        raise Undecided
    channels = dim_math.floordiv(source[1], math.prod(block))
    sizes = (dim_math.UNKNOWN if isinstance(e, float) else e for e in image)
    call.put(0, (source[0], channels, *sizes))


# --- resampling ------------------------------------------------------------------------------


@rule("Resize Upsample")
def resize(call: Call) -> None:
    """From `sizes`, else floor(size x scale) in single precision as runtimes compute it."""
    dims = call.known(0)
    result: list[Dim] = list(dims)
    axes = [call.axis(a, len(dims)) for a in call.attr("axes") or range(len(dims))]
    if call.node.op_type == "Upsample":
        scales = call.attr("scales") if call.opset < 9 else call.floats(1)
        sizes = None
        given = True
    else:
        scales = call.floats(1 if call.opset < 11 else 2)
        sizes = call.data(3) if call.opset >= 11 and call.has(3) else None
        given = call.opset < 11 or not call.has(3)
    if given and scales is not None and len(scales) == 0:
        scales = None
    wanted = sizes if sizes is not None else scales
    if wanted is None:
        call.put(0, [call.fresh(0, axis) if axis in axes else d for axis, d in enumerate(dims)])
        return
    if len(wanted) != len(axes):
        what = "sizes" if sizes is not None else "scales"
        call.fail(f"{len(wanted)} {what} for {len(axes)} axes")
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    for position, axis in enumerate(axes):
        if sizes is not None:
            element = sizes[position]
            result[axis] = call.fresh(0, axis) if isinstance(element, float) else element
            if dim_math.is_unknown(result[axis]):
                result[axis] = call.fresh(0, axis)
        elif scales is not None:
            result[axis] = _scaled(call, dims[axis], axis, position, len(axes), scales[position])
    if sizes is not None and policy != "stretch":
        _keep_aspect(call, dims, result, axes, policy)
    call.put(0, result)


def _scaled(call: Call, dim: Dim, axis: int, position: int, count: int, scale: float) -> Dim:
    if scale <= 0:
        call.fail(f"a scale of {scale}")
    if call.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        region = call.floats(1)
        if region is None or len(region) != 2 * count or not isinstance(dim, int):
            return call.fresh(0, axis)
        return math.floor(dim * (region[position + count] - region[position]) * scale)
    if isinstance(dim, int):
        return int(np.float32(dim) * np.float32(scale))
    found = dim_math.scale(dim, scale)
    return call.fresh(0, axis) if dim_math.is_unknown(found) else found


def _keep_aspect(call: Call, dims: Dims, result: list[Dim], axes: list[int], policy: str) -> None:
    ratios = []
    for axis in axes:
        size, target = dims[axis], result[axis]
        if not isinstance(size, int) or not isinstance(target, int) or size == 0:
            for other in axes:
                result[other] = call.fresh(0, other)
            return
        ratios.append(Fraction(target, size))
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    for axis in axes:
        size = dims[axis]
        if isinstance(size, int):
            result[axis] = math.floor(size * ratio + Fraction(1, 2))


@rule("GridSample")
def grid_sample(call: Call) -> None:
    """(N, C, spatial...) at grid (N, spatial'..., d) -> (N, C, spatial'...)."""
    source, grid = call.rank(0, at_least=3), call.known(1)
    if len(grid) != len(source):
        call.fail(f"grid {dim_math.text(grid)} does not fit the input {dim_math.text(source)}")
    call.require_same(
        grid[-1], len(source) - 2, f"the grid has {grid[-1]} coordinates for {len(source) - 2} axes"
    )
    call.put(0, (*source[:2], *grid[1:-1]))


@rule("AffineGrid")
def affine_grid(call: Call) -> None:
    """(N, spatial..., d) for the size (N, C, spatial...)."""
    size = call.data(1)
    if size is None or any(isinstance(e, float) for e in size):
        raise Undecided
    dims = [e for e in size if not isinstance(e, float)]
    call.put(0, (dims[0], *dims[2:], len(dims) - 2))


# --- matrix products -------------------------------------------------------------------------


def matmul_shape(call: Call, a: Dims, b: Dims) -> Dims:
    """numpy.matmul's shape: batch axes broadcast, vectors lose the axis they gained."""
    if not a or not b:
        call.fail("a scalar operand")
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    call.require_same(
        left[-1],
        right[-2],
        f"A {dim_math.text(a)} and B {dim_math.text(b)} differ in K: {left[-1]} and {right[-2]}",
        "the last axis of A must be the axis before the last of B",
    )
    batch = dim_math.broadcast_shapes([left[:-2], right[:-2]])
    if batch is None:
        call.fail(f"the batch axes of {dim_math.text(a)} and {dim_math.text(b)} do not broadcast")
    rows = () if len(a) == 1 else (left[-2],)
    columns = () if len(b) == 1 else (right[-1],)
    named = (call.fresh(0, i) if dim_math.is_unknown(d) else d for i, d in enumerate(batch))
    return (*named, *rows, *columns)


@rule("MatMul MatMulInteger")
def matmul(call: Call) -> None:
    """A @ B; MatMulInteger accumulates in int32."""
    call.put(0, matmul_shape(call, call.known(0), call.known(1)))


@rule("QLinearMatMul")
def matmul_quantized(call: Call) -> None:
    """A @ B of quantized tensors: each operand is followed by its scale and zero point."""
    call.put(0, dtype=call.dtype(7))
    call.put(0, matmul_shape(call, call.known(0), call.known(3)))


def put_gemm(call: Call, a: int, b: int, c: int) -> None:
    """(M, K) x (K, N) with either transposed, plus C that broadcasts to (M, N)."""
    left, right = call.rank(a, 2), call.rank(b, 2)
    rows, inner = left[::-1] if call.attr("transA", 0) else left
    depth, columns = right[::-1] if call.attr("transB", 0) else right
    call.require_same(
        inner,
        depth,
        f"A {dim_math.text(left)} and B {dim_math.text(right)} differ in K: {inner} and {depth}",
        "check transA and transB, or the weight's shape",
    )
    bias = call.dims(c)
    if bias is not None and call.opset >= 7:
        joint = dim_math.broadcast_shapes([(rows, columns), bias])
        fits = joint is not None and len(joint) == 2
        if not fits or dim_math.same((joint or ())[1], columns) is False:
            call.fail(
                f"C {dim_math.text(bias)} does not broadcast to {dim_math.text((rows, columns))}"
            )
    call.put(0, (rows, columns))


@rule("Gemm")
def gemm(call: Call) -> None:
    """alpha A B + beta C."""
    put_gemm(call, 0, 1, 2)


@rule("Einsum")
def einsum(call: Call) -> None:
    """Each letter is one size; the ellipsis broadcasts."""
    equation = call.attr("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    sizes: dict[str, Dim] = {}
    hidden: list[Dims] = []
    letters: list[str] = []
    terms = left.split(",")
    if len(terms) != len(call.node.inputs):
        call.fail(f"the equation has {len(terms)} operands, the node {len(call.node.inputs)}")
    for index, term in enumerate(terms):
        names, extra = _einsum_names(call, term, call.known(index), index)
        hidden.append(extra)
        for name, dim in names:
            letters.append(name)
            _einsum_bind(call, sizes, name, dim)
    batch = dim_math.broadcast_shapes(hidden)
    if batch is None:
        call.fail("the axes under the ellipsis do not broadcast")
    if not arrow:
        once = sorted(n for n in set(letters) if letters.count(n) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    result: list[Dim] = []
    before, dots, after = right.partition("...")
    for name in before:
        result.append(sizes[name])
    if dots:
        result.extend(batch)
    for name in after:
        result.append(sizes[name])
    call.put(0, result)


def _einsum_names(
    call: Call, term: str, dims: Dims, index: int
) -> tuple[list[tuple[str, Dim]], Dims]:
    before, dots, after = term.partition("...")
    count = len(before) + len(after)
    if count > len(dims) or (not dots and count != len(dims)):
        call.fail(f"operand {index} is {term!r}, its shape is {dim_math.text(dims)}")
    end = len(dims) - len(after)
    names = [*zip(before, dims, strict=False), *zip(after, dims[end:], strict=True)]
    return names, dims[len(before) : end]


def _einsum_bind(call: Call, sizes: dict[str, Dim], name: str, dim: Dim) -> None:
    earlier = sizes.get(name)
    if earlier is None:
        sizes[name] = dim
        return
    found = dim_math.broadcast(earlier, dim)
    if found is None:
        call.fail(f"index {name!r} is {earlier} in one operand and {dim} in another")
    if isinstance(found, int) or dim_math.is_unknown(earlier):
        sizes[name] = found


@rule("Det")
def determinant(call: Call) -> None:
    """One number a matrix."""
    dims = call.rank(0, at_least=2)
    call.require_same(dims[-1], dims[-2], f"{dim_math.text(dims)} is not square")
    call.put(0, dims[:-2])


# --- reductions ------------------------------------------------------------------------------

_AXES_AS_INPUT = {"ReduceSum": 13}
"""Since which opset a reduction's axes are its second input; 18 for the others."""


@rule(
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceSumSquare"
)
def reduce(call: Call) -> None:
    """The axes named (all by default) become 1, or go with keepdims=0."""
    dims = call.known(0)
    since = _AXES_AS_INPUT.get(call.node.op_type, 18)
    keep = call.attr("keepdims", 1)
    if call.has(1) and call.opset >= since and call.ints(1) is None:
        if keep:
            call.put(0, [call.fresh(0, axis) for axis in range(len(dims))])
        return
    axes = axes_of(call, 1, len(dims), since)
    if not axes:
        axes = [] if call.attr("noop_with_empty_axes", 0) else list(range(len(dims)))
    put_reduced(call, dims, axes, bool(keep))
    data = call.data(0)
    if (
        data is not None
        and len(dims) == 1
        and axes == [0]
        and not any(isinstance(e, float) for e in data)
    ):
        sizes = [e for e in data if not isinstance(e, float)]
        if call.node.op_type == "ReduceProd":
            call.put(0, data=(dim_math.product(sizes),))
        elif call.node.op_type in ("ReduceSum", "ReduceMax", "ReduceMin"):
            fold = {
                "ReduceSum": dim_math.add,
                "ReduceMax": dim_math.maximum,
                "ReduceMin": dim_math.minimum,
            }[call.node.op_type]
            total = sizes[0] if sizes else 0
            for size in sizes[1:]:
                total = fold(total, size)
            call.put(0, data=(total,))


def put_reduced(call: Call, dims: Dims, axes: Sequence[int], keep: bool, output: int = 0) -> None:
    """An output with `axes` reduced."""
    if keep:
        call.put(output, [1 if i in axes else d for i, d in enumerate(dims)])
    else:
        call.put(output, [d for i, d in enumerate(dims) if i not in axes])


@rule("ArgMax ArgMin")
def arg_reduce(call: Call) -> None:
    """Indices along one axis."""
    dims = call.rank(0, at_least=1)
    axis = call.axis(call.attr("axis", 0), len(dims))
    put_reduced(call, dims, [axis], bool(call.attr("keepdims", 1)))


# --- recurrence ------------------------------------------------------------------------------

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM GRU RNN")
def recurrent(call: Call) -> None:
    """Y (S, D, B, H) or (B, S, D, H); last states (D, B, H) or (B, D, H); see `layout`."""
    source, recurrence = call.rank(0, 3), call.dims(2)
    hidden = call.attr("hidden_size")
    if hidden is None:
        hidden = recurrence[2] if recurrence is not None and len(recurrence) == 3 else None
    if hidden is None:
        raise Undecided
    directions = 2 if call.attr("direction", "forward") == "bidirectional" else 1
    _check_recurrent(call, source, hidden, directions)
    put_recurrent(call, source, hidden, directions)


def put_recurrent(call: Call, source: Dims, hidden: Dim, directions: int) -> None:
    """The three outputs of a recurrent operator."""
    if call.attr("layout", 0):
        batch, steps = source[0], source[1]
        call.put(0, (batch, steps, directions, hidden))
        state: Dims = (batch, directions, hidden)
    else:
        steps, batch = source[0], source[1]
        call.put(0, (steps, directions, batch, hidden))
        state = (directions, batch, hidden)
    for output in range(1, len(call.node.outputs)):
        call.put(output, state)


def _check_recurrent(call: Call, source: Dims, hidden: Dim, directions: int) -> None:
    gates = dim_math.mul(_GATES[call.node.op_type], hidden)
    expected = {1: (directions, gates, source[2]), 2: (directions, gates, hidden)}
    for index, wanted in expected.items():
        given = call.dims(index)
        if given is None:
            continue
        fits = len(given) == 3 and all(
            dim_math.same(a, b) is not False for a, b in zip(given, wanted, strict=True)
        )
        if not fits:
            call.fail(
                f"input {index} is {dim_math.text(given)}, expected {dim_math.text(wanted)}",
                "check hidden_size, direction and the input's width",
            )


# --- attention -------------------------------------------------------------------------------


@rule("Attention")
def attention(call: Call) -> None:
    """Q (B, H, L, E) or (B, L, H E): the output has Q's form with V's width."""
    query, key, value = call.rank(0, 3, 4), call.dims(1), call.dims(2)
    heads, kv_heads = call.attr("q_num_heads"), call.attr("kv_num_heads")
    if key is None or value is None:
        raise Undecided
    if len(query) == 4:
        batch, q_heads, length = query[:3]
        width: Dim = value[-1]
        call.put(0, (batch, q_heads, length, width))
        keys, groups, key_width = key[2], key[1], key[3]
    else:
        if not heads or not kv_heads:
            call.fail("3-D inputs need q_num_heads and kv_num_heads")
        batch, length, _ = query
        q_heads, groups, keys = heads, kv_heads, key[1]
        width = dim_math.floordiv(value[2], kv_heads)
        key_width = dim_math.floordiv(key[2], kv_heads)
        call.put(0, (batch, length, dim_math.mul(width, heads)))
    past = call.dims(4)
    if past is not None and len(past) == 4:
        keys = dim_math.add(past[2], keys)
    elif call.has(4):
        keys = call.fresh(1, 2)
    call.put(1, (batch, groups, keys, key_width))
    call.put(2, (batch, groups, keys, width))
    call.put(3, (batch, q_heads, length, keys))


@rule("FlexAttention", domain="ai.onnx.preview")
def attention_flex(call: Call) -> None:
    """(B, H, L, E) with V's width."""
    query, value = call.rank(0, 4), call.rank(2, 4)
    call.put(0, (*query[:3], value[3]))


@rule("LinearAttention")
def attention_linear(call: Call) -> None:
    """(B, T, H d_v) and the state (B, H_kv, d_k, d_v)."""
    call.put(1, dtype=call.dtype(3) or call.dtype(0))
    query, value = call.rank(0, 3), call.rank(2, 3)
    heads, kv_heads = call.attr("q_num_heads"), call.attr("kv_num_heads")
    if not heads or not kv_heads:
        call.fail("q_num_heads and kv_num_heads are required")
    width = dim_math.floordiv(value[2], kv_heads)
    call.put(0, (*query[:2], dim_math.mul(width, heads)))
    call.put(1, (query[0], kv_heads, dim_math.floordiv(query[2], heads), width))


# --- detection and classification ------------------------------------------------------------


@rule("NonMaxSuppression")
def non_max_suppression(call: Call) -> None:
    """(selected, 3); how many are selected is data."""
    call.put(0, (call.fresh(0, 0), 3))


@rule("Multinomial")
def multinomial(call: Call) -> None:
    """(batch, sample_size)."""
    dims = call.rank(0, 2)
    call.put(0, (dims[0], call.attr("sample_size", 1)),
             dtype=ir.DataType(call.attr("dtype", ir.DataType.INT32)))  # fmt: skip


@rule("SoftmaxCrossEntropyLoss NegativeLogLikelihoodLoss")
def loss(call: Call) -> None:
    """The labels' shape without reduction, else a scalar; the second output is log_prob."""
    reduced = call.attr("reduction", "mean") != "none"
    call.put(0, () if reduced else call.dims(1))
    call.put(1, call.dims(0))


@rule("MaxUnpool")
def max_unpool(call: Call) -> None:
    """`output_shape` where given, else the pool's sizes inverted."""
    source = call.rank(0, at_least=3)
    given = call.data(2) if call.has(2) else None
    if given is not None:
        call.put(0, [dim_math.UNKNOWN if isinstance(e, float) else e for e in given])
    elif call.has(2):
        call.put(0, [call.fresh(0, axis) for axis in range(len(source))])
    else:
        kernel = call.attr("kernel_shape")
        call.put(0, (*source[:2], *_transposed_sizes(call, source[2:], kernel)))


@rule("BlackmanWindow HammingWindow HannWindow")
def window_function(call: Call) -> None:
    """`size` samples."""
    call.put(0, dtype=ir.DataType(call.attr("output_datatype", ir.DataType.FLOAT)))
    size = call.data(0)
    length: Dim = call.fresh(0, 0)
    if size is not None and len(size) == 1 and not isinstance(size[0], float):
        length = size[0]
    call.put(0, (length,))


@rule("STFT")
def short_time_fourier(call: Call) -> None:
    """(B, L, 1 or 2) -> (B, frames, bins, 2): only half the bins and one when onesided."""
    signal, step, given = call.rank(0, 3), call.ints(1), call.data(3)
    window = call.dims(2)
    frame: Dim = dim_math.UNKNOWN
    if given and not isinstance(given[0], float):
        frame = given[0]
    elif window is not None and not call.has(3):
        frame = window[0]
    bins = frame
    if call.attr("onesided", 1):
        bins = dim_math.add(dim_math.floordiv(frame, 2), 1)
    frames: Dim = dim_math.UNKNOWN
    if step and step[0] > 0:
        room = dim_math.sub(signal[1], frame)
        frames = dim_math.floordiv(dim_math.add(room, step[0]), step[0])
    found = (signal[0], frames, bins, 2)
    call.put(0, [call.fresh(0, i) if dim_math.is_unknown(d) else d for i, d in enumerate(found)])


@rule("StringConcat")
def string_concat(call: Call) -> None:
    """Strings broadcast like numbers."""
    put_broadcast(call, (0, 1))
