"""Shape rules of the com.microsoft operators that quantizers and transformer optimizers write.

There are no ONNX definitions of these to check types against, so each rule sets the element type
of its outputs too. The signatures are those of ONNX Runtime's ContribOperators.
"""

from __future__ import annotations

import onnx_ir as ir

from . import dims as dim_math
from .graph import CONTRIB_DOMAIN, Dim
from .shape_rules import RULES, Call, Dims, Rule, Undecided, rule
from .shape_rules_compute import (
    matmul_shape,
    put_conv,
    put_gemm,
    put_recurrent,
    window_sizes,
)
from .shape_rules_elementwise import put_broadcast

_MS = CONTRIB_DOMAIN


def _same_type(inner: Rule) -> Rule:
    """A standard rule under a contrib name: outputs have input 0's element type."""

    def apply(call: Call) -> None:
        call.put(0, dtype=call.dtype(0))
        inner(call)

    return apply


for _name in ("QuantizeLinear", "DequantizeLinear"):
    RULES[_MS, _name] = RULES["", _name]
for _name in (
    "Pad",
    "Trilu",
    "GatherND",
    "Range",
    "GridSample",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
):
    RULES[_MS, _name] = _same_type(RULES["", _name])


@rule(
    "Gelu FastGelu QuickGelu BiasGelu BiasAdd BiasSoftmax QLinearSigmoid QLinearLeakyRelu "
    "QLinearSoftmax GroupNorm RotaryEmbedding ComplexMul ComplexMulConj",
    domain=_MS,
)
def same_shape(call: Call) -> None:
    """Output 0 is like input 0."""
    call.put(0, call.dims(0), dtype=call.dtype(0))


@rule("SkipLayerNormalization SkipSimplifiedLayerNormalization", domain=_MS)
def skip_layer_normalization(call: Call) -> None:
    """The sum's shape; mean and deviation keep all axes but the last; output 3 is the sum."""
    dims, dtype = call.known(0), call.dtype(0)
    call.put(0, dims, dtype=dtype)
    for output in (1, 2):
        call.put(output, (*dims[:-1], 1), dtype=ir.DataType.FLOAT)
    call.put(3, dims, dtype=dtype)
    for index in (2, 3, 4) if call.node.op_type == "SkipLayerNormalization" else (2, 3):
        given = call.dims(index)
        if given is not None and len(given) == 1:
            call.require_same(
                dims[-1], given[0], f"input {index} has {given[0]} entries for width {dims[-1]}"
            )


@rule("EmbedLayerNormalization", domain=_MS)
def embed_layer_normalization(call: Call) -> None:
    """(B, L) ids and a (V, D) table -> (B, L, D), a (B) mask index, and the sum before it."""
    ids, table = call.rank(0, 2), call.dims(2)
    width: Dim = table[1] if table is not None and len(table) == 2 else call.fresh(0, 2)
    for output in (0, 2):
        call.put(output, (*ids, width), dtype=call.dtype(2))
    call.put(1, (ids[0],), dtype=ir.DataType.INT32)


# --- convolution, pooling --------------------------------------------------------------------


@rule("FusedConv", domain=_MS)
def conv_fused(call: Call) -> None:
    """Conv with an activation."""
    call.put(0, dtype=call.dtype(0))
    put_conv(call, 0, 1, 2)


@rule("NhwcConv NhwcFusedConv", domain=_MS)
def conv_channels_last(call: Call) -> None:
    """(N, spatial..., C); the weight is (M, kernel..., C/group)."""
    source, weight = call.rank(0, at_least=3), call.known(1)
    call.put(0, dtype=call.dtype(0))
    kernel = call.attr("kernel_shape") or weight[1:-1]
    call.put(0, (source[0], *window_sizes(call, source[1:-1], kernel), weight[0]))


@rule("QLinearConv", domain=_MS)
def conv_quantized(call: Call) -> None:
    """As the standard operator, or channels last."""
    call.put(0, dtype=call.dtype(7))
    if not call.attr("channels_last", 0):
        put_conv(call, 0, 3, 8)
        return
    source, weight = call.rank(0, at_least=3), call.known(3)
    kernel = call.attr("kernel_shape") or weight[2:]
    call.put(0, (source[0], *window_sizes(call, source[1:-1], kernel), weight[0]))


@rule("NhwcMaxPool", domain=_MS)
def pool_channels_last(call: Call) -> None:
    """(N, spatial..., C)."""
    source = call.rank(0, at_least=3)
    spatial = window_sizes(call, source[1:-1], call.attr("kernel_shape"))
    call.put(0, (source[0], *spatial, source[-1]), dtype=call.dtype(0))


@rule("QLinearAveragePool QLinearGlobalAveragePool", domain=_MS)
def pool_quantized(call: Call) -> None:
    """A pool, channels first or last."""
    call.put(0, dtype=call.dtype(0))
    source = call.rank(0, at_least=3)
    last = call.attr("channels_last", 0)
    sizes = source[1:-1] if last else source[2:]
    if call.node.op_type == "QLinearGlobalAveragePool":
        spatial: list[Dim] = [1] * len(sizes)
    else:
        spatial = window_sizes(call, sizes, call.attr("kernel_shape"))
    if last:
        call.put(0, (source[0], *spatial, source[-1]))
    else:
        call.put(0, (*source[:2], *spatial))


# --- matrix products -------------------------------------------------------------------------


@rule("FusedMatMul TransposeMatMul FusedMatMulActivation", domain=_MS)
def matmul_fused(call: Call) -> None:
    """A @ B with either transposed, over the batch axes too where transBatch says so."""
    call.put(0, dtype=call.dtype(0))
    a = _transposed(call.known(0), call.attr("transA", 0), call.attr("transBatchA", 0))
    b = _transposed(call.known(1), call.attr("transB", 0), call.attr("transBatchB", 0))
    call.put(0, matmul_shape(call, a, b))


def _transposed(dims: Dims, matrix: int, batch: int) -> Dims:
    if len(dims) < 2:
        return dims
    if batch:  # the first axis moves in front of the last one, then the matrix may be transposed
        dims = (*dims[1:-1], dims[0], dims[-1])
    return (*dims[:-2], dims[-1], dims[-2]) if matrix else dims


@rule("FusedGemm", domain=_MS)
def gemm_fused(call: Call) -> None:
    """Gemm with an activation."""
    call.put(0, dtype=call.dtype(0))
    put_gemm(call, 0, 1, 2)


@rule("GemmFastGelu", domain=_MS)
def gemm_gelu(call: Call) -> None:
    """FastGelu(X @ W + bias)."""
    call.put(0, matmul_shape(call, call.known(0), call.known(1)), dtype=call.dtype(0))


@rule("QGemm", domain=_MS)
def gemm_quantized(call: Call) -> None:
    """Gemm of quantized tensors; float out when there is no output scale."""
    call.put(0, dtype=call.dtype(0) if call.has(7) else ir.DataType.FLOAT)
    put_gemm(call, 0, 3, 6)


@rule("DynamicQuantizeMatMul MatMulIntegerToFloat MatMulInteger16", domain=_MS)
def matmul_integer(call: Call) -> None:
    """A @ B with scales; float out (MatMulInteger16: int32)."""
    integer = call.node.op_type == "MatMulInteger16"
    scale = 3 if call.node.op_type == "MatMulIntegerToFloat" else 2
    dtype = ir.DataType.INT32 if integer else (call.dtype(scale) or ir.DataType.FLOAT)
    call.put(0, dtype=dtype)
    call.put(0, matmul_shape(call, call.known(0), call.known(1)))


@rule("MatMulNBits MatMulBnb4", domain=_MS)
def matmul_blockwise(call: Call) -> None:
    """(..., K) -> (..., N): the packed weight's shape is in the attributes."""
    call.put(0, dtype=call.dtype(0))
    dims, inner, columns = call.rank(0, at_least=1), call.attr("K"), call.attr("N")
    if inner is None or columns is None:
        call.fail("attributes K and N are required")
    call.require_same(dims[-1], inner, f"A {dim_math.text(dims)} does not end in K = {inner}")
    call.put(0, (*dims[:-1], columns))


@rule("GatherBlockQuantized", domain=_MS)
def gather_blockwise(call: Call) -> None:
    """Rows of a packed table: sub-byte data packed in uint8 unpacks along the last axis."""
    data, indices = call.known(0), call.known(1)
    call.put(0, dtype=call.dtype(2))
    axis = call.axis(call.attr("gather_axis", 0), len(data))
    width = data[-1]
    if call.dtype(0) == ir.DataType.UINT8:
        width = dim_math.mul(width, 8 // call.attr("bits", 4))
    data = (*data[:-1], width)
    call.put(0, (*data[:axis], *indices, *data[axis + 1 :]))


@rule("DynamicQuantizeLSTM", domain=_MS)
def recurrent_quantized(call: Call) -> None:
    """LSTM with weights (D, I, 4H)."""
    for output in range(3):
        call.put(output, dtype=call.dtype(0))
    hidden = call.attr("hidden_size")
    if hidden is None:
        raise Undecided
    directions = 2 if call.attr("direction", "forward") == "bidirectional" else 1
    put_recurrent(call, call.rank(0, 3), hidden, directions)


# --- attention -------------------------------------------------------------------------------


@rule("Attention QAttention", domain=_MS)
def attention(call: Call) -> None:
    """(B, L, D) and weights (D, Q + K + V) -> (B, L, V), and the present (2, B, H, T, E)."""
    quantized = call.node.op_type == "QAttention"
    dtype = call.dtype(3) if quantized else call.dtype(0)
    call.put(0, dtype=dtype)
    call.put(1, dtype=dtype)
    source, weight = call.rank(0, 3), call.rank(1, 2)
    call.require_same(
        source[2], weight[0], f"the input is {source[2]} wide, the weight takes {weight[0]}"
    )
    widths = call.attr("qkv_hidden_sizes")
    value: Dim = widths[2] if widths else dim_math.floordiv(weight[1], 3)
    call.put(0, (*source[:2], value))
    heads, past = call.attr("num_heads"), call.dims(8 if quantized else 4)
    if not heads:
        return
    length = source[1]
    if past is not None and len(past) == 5:
        shared = call.attr("past_present_share_buffer", 0)
        length = past[3] if shared else dim_math.add(past[3], length)
    call.put(1, (2, source[0], heads, length, dim_math.floordiv(value, heads)))


@rule("MultiHeadAttention", domain=_MS)
def attention_multi_head(call: Call) -> None:
    """(B, L, V) and present key and value (B, H, T, E)."""
    for output in range(3):
        call.put(output, dtype=call.dtype(0))
    query, key, value = call.rank(0, 3, 5), call.dims(1), call.dims(2)
    heads = call.attr("num_heads")
    if len(query) == 5:  # packed: (B, L, H, 3, E)
        batch, length, count, _, size = query
        call.put(0, (batch, length, dim_math.mul(count, size)))
        return
    batch, length, width = query
    total = length
    if key is not None:
        total = key[2] if len(key) == 4 else key[1]
    if value is not None:
        width = value[2] if len(value) == 3 else dim_math.mul(value[1], value[3])
    call.put(0, (batch, length, width))
    past = call.dims(6)
    if past is not None and len(past) == 4:
        total = dim_math.add(past[2], total)
    if heads:
        call.put(1, (batch, heads, total, dim_math.floordiv(query[2], heads)))
        call.put(2, (batch, heads, total, dim_math.floordiv(width, heads)))


@rule("GroupQueryAttention", domain=_MS)
def attention_grouped_query(call: Call) -> None:
    """(B, L, H E) and present key and value (B, H_kv, T, E)."""
    for output in range(3):
        call.put(output, dtype=call.dtype(0))
    batch, length, width = call.rank(0, 3)
    heads, kv_heads = call.attr("num_heads"), call.attr("kv_num_heads")
    if not heads or not kv_heads:
        call.fail("attributes num_heads and kv_num_heads are required")
    packed = not call.has(1)
    size = dim_math.floordiv(width, heads + 2 * kv_heads if packed else heads)
    call.put(0, (batch, length, dim_math.mul(size, heads)))
    past, total = call.dims(3), call.data(6)
    present: Dim = call.fresh(1, 2)
    if total and not isinstance(total[0], float):  # a shared buffer may be longer than the total
        held = past[2] if past is not None and len(past) == 4 else 0
        present = dim_math.maximum(held, total[0])
    elif past is None and not call.has(3):
        present = length
    for output in (1, 2):
        call.put(output, (batch, kv_heads, present, size))


# --- quantized arithmetic --------------------------------------------------------------------


@rule("QLinearAdd QLinearMul", domain=_MS)
def arithmetic_quantized(call: Call) -> None:
    """A and B broadcast; each is followed by scale and zero point."""
    call.put(0, dtype=call.dtype(0))
    put_broadcast(call, (0, 3))


@rule("QLinearWhere", domain=_MS)
def where_quantized(call: Call) -> None:
    """Condition, X and Y broadcast."""
    call.put(0, dtype=call.dtype(1))
    put_broadcast(call, (0, 1, 4))


@rule("QLinearConcat", domain=_MS)
def concat_quantized(call: Call) -> None:
    """Inputs come in threes after the output's scale and zero point."""
    call.put(0, dtype=call.dtype(1))
    shapes = [call.known(i) for i in range(2, len(call.node.inputs), 3)]
    axis = call.axis(call.attr("axis", 0), len(shapes[0]))
    total: Dim = 0
    for shape in shapes:
        total = dim_math.add(total, shape[axis])
    call.put(0, (*shapes[0][:axis], total, *shapes[0][axis + 1 :]))


@rule("ExpandDims", domain=_MS)
def expand_dims(call: Call) -> None:
    """One more axis of 1."""
    call.put(0, dtype=call.dtype(0))
    dims, axis = call.known(0), call.ints(1)
    if axis is None:
        raise Undecided
    at = call.axis(axis[0], len(dims) + 1)
    call.put(0, (*dims[:at], 1, *dims[at:]))


@rule("MulInteger ReduceSumInteger", domain=_MS)
def integer_result(call: Call) -> None:
    """int32 results of int8 operands: elementwise with broadcast, or a sum over axes."""
    call.put(0, dtype=ir.DataType.INT32)
    if call.node.op_type == "MulInteger":
        put_broadcast(call, (0, 2))
        return
    dims, axes = call.known(0), call.attr("axes") or ()
    reduced = {call.axis(a, len(dims)) for a in axes}
    if call.attr("keepdims", 1):
        call.put(0, [1 if i in reduced else d for i, d in enumerate(dims)])
    else:
        call.put(0, [d for i, d in enumerate(dims) if i not in reduced])


@rule("QLinearReduceMean", domain=_MS)
def mean_quantized(call: Call) -> None:
    """A mean over the axes named."""
    call.put(0, dtype=call.dtype(0))
    dims = call.known(0)
    reduced = {call.axis(a, len(dims)) for a in call.attr("axes") or range(len(dims))}
    if call.attr("keepdims", 1):
        call.put(0, [1 if i in reduced else d for i, d in enumerate(dims)])
    else:
        call.put(0, [d for i, d in enumerate(dims) if i not in reduced])


@rule("BiasSplitGelu", domain=_MS)
def bias_split_gelu(call: Call) -> None:
    """Half the width: one half gates the other."""
    call.put(0, dtype=call.dtype(0))
    dims = call.rank(0, at_least=1)
    call.put(0, (*dims[:-1], dim_math.floordiv(dims[-1], 2)))


@rule("CDist", domain=_MS)
def pairwise_distance(call: Call) -> None:
    """(M, K) and (N, K) -> (M, N)."""
    call.put(0, dtype=call.dtype(0))
    left, right = call.rank(0, 2), call.rank(1, 2)
    call.require_same(left[1], right[1], f"rows of {left[1]} and of {right[1]} entries")
    call.put(0, (left[0], right[0]))


@rule("Inverse", domain=_MS)
def inverse(call: Call) -> None:
    """Square matrices."""
    dims = call.rank(0, at_least=2)
    call.require_same(dims[-1], dims[-2], f"{dim_math.text(dims)} is not square")
    call.put(0, dims, dtype=call.dtype(0))
