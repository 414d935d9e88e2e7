"""What ONNX Runtime's own optimizer makes of Q/DQ pairs: integer operators, and pairs left over.

Here: `simulate`. Behind pairs that are on all its data an operator is replaced by its integer
form; operators that only move elements take integers through. The rules were found by holding
graphs that sessions saved beside ours; no weight is read. Not here: what it makes of floats
(`ort_float`), a plan that is not written yet (`planned_pairs`), channels last
(`ort_channels_last`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..ir.graph import constant_scalar
from ..ir.quant import INTEGER_OPS, is_qdq
from ..targets.target import Target
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_PROPAGATES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""Behind or before these a pair moves to their other side."""
_MOVES = (
    *_PROPAGATES,
    *("Gather", "Expand", "Flatten", "Resize", "Tile", "Split", "Identity"),
    *("DepthToSpace", "ReduceMax", "ReduceMin"),
)
"""These run on integers between a DequantizeLinear and QuantizeLinears of the same scale."""
_UNARY = ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax")
_COPY = "copy"
"""Tells copies of a DequantizeLinear apart, so that equal operators are not merged again."""
_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def spread_pairs(graph: RuntimeGraph) -> None:
    """Every reader gets a DequantizeLinear of its own; pairs move over what moves elements.

    Comes before `ort_float.simplify`.
    """
    if any(is_dequantize(op) for op in graph):
        _part(graph)
        _propagate(graph)


def simulate(graph: RuntimeGraph, target: Target) -> None:
    """Form integer operators as the target's session would.

    Comes after `ort_float.simplify` and before `ort_float.fuse`.
    """
    if not any(is_dequantize(op) for op in graph):
        return
    signed = _takes_signed(target)
    _propagate(graph)
    for op in graph:
        op.attributes.pop(_COPY, None)
        if op in graph and is_quantize(op):
            _drop_saturating(graph, op)
            _drop_double(graph, op)
            if not signed:
                _make_unsigned(graph, op)
    for op in graph:
        if op in graph:
            _form(graph, op, signed)
    graph.sort()


def is_quantize(op: Op | None) -> bool:
    """Whether it is a QuantizeLinear."""
    return op is not None and op.type == "QuantizeLinear"


def is_dequantize(op: Op | None) -> bool:
    """Whether it is a DequantizeLinear."""
    return op is not None and op.type == "DequantizeLinear"


def _takes_signed(target: Target) -> bool:
    """Whether pairs of signed activations are fused: what the session is told, or arm64's habit."""
    options = dict(target.session_options)
    for scheme in target.quantization:
        options.update(scheme.session_options)
    return options.get("session.qdqisint8allowed", "0") == "1"


# --- pairs move and multiply -----------------------------------------------------------------


def _drop_saturating(graph: RuntimeGraph, quantize: Op) -> None:
    """A Relu before a QuantizeLinear whose least integer is zero: saturation does its work."""
    before = quantize.inputs[0]
    op = before.producer if before is not None else None
    if op is None or before is None or not op.is_onnx("Relu", "Clip"):
        return
    if graph.only_user(before) is not quantize or op.inputs[0] is None:
        return
    zero_point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    dtype = quantize.outputs[0].dtype
    least = {ir.DataType.UINT8: 0, ir.DataType.INT8: -128}.get(dtype) if dtype else None
    if zero_point is None or least is None:
        return
    number = constant_scalar(zero_point.source) if zero_point.source is not None else None
    if number is None:  # not calibrated yet: as calibration finds it behind a Relu
        number = least
    if number != least or op.type == "Clip":
        return
    graph.remove(op)
    graph.set_input(quantize, 0, op.inputs[0])
    quantize.origin = op.origin + quantize.origin


def _drop_double(graph: RuntimeGraph, quantize: Op) -> None:
    """Q -> DQ -> Q -> DQ of one dtype becomes Q -> DQ."""
    floats, final = quantize.inputs[0], quantize.outputs[0]
    pair = floats.producer if floats is not None else None
    if pair is None or floats is None or not is_dequantize(pair):
        return
    stored = pair.inputs[0]
    if stored is None or not is_quantize(stored.producer) or stored.dtype != final.dtype:
        return
    if graph.only_user(floats) is not quantize or not is_dequantize(graph.only_user(final)):
        return
    if len(stored.users) > 1 and not _same_numbers(pair, quantize):
        return
    graph.remove(quantize)
    graph.remove(pair)
    graph.replace_uses(final, stored)


def _make_unsigned(graph: RuntimeGraph, quantize: Op) -> None:
    """A signed pair becomes unsigned where one QuantizeLinear meets one DequantizeLinear.

    Operators that the pair was moved over are between them.
    """
    stored = quantize.outputs[0]
    if stored.dtype != ir.DataType.INT8:
        return
    found = [stored]
    user = graph.only_user(stored)
    while user is not None and user.is_onnx(*_PROPAGATES):
        found.append(user.outputs[0])
        user = graph.only_user(user.outputs[0])
    if is_dequantize(user):
        for tensor in found:
            tensor.dtype = ir.DataType.UINT8


def _part(graph: RuntimeGraph) -> None:
    """A DequantizeLinear of its own for every reader."""
    for op in graph:
        if not is_dequantize(op):
            continue
        result = op.outputs[0]
        op.attributes = {**op.attributes, _COPY: op.index}
        readers = [(user, i) for user in dict.fromkeys(result.users) for i in _reads(user, result)]
        for user, index in readers[0 if result.is_output else 1 :]:
            graph.set_input(user, index, _copied(graph, op, op.inputs[0], result))
    graph.sort()


def _copied(graph: RuntimeGraph, pair: Op, stored: Tensor | None, like: Tensor) -> Tensor:
    """The result of one more DequantizeLinear with the numbers of `pair`."""
    result = like.like(f"{like.name}_copy")
    copy = graph.add(
        Op(pair.type, pair.domain, [stored, *pair.inputs[1:]], [result], pair.attributes)
    )
    copy.attributes = {**pair.attributes, _COPY: copy.index}
    return result


def _reads(op: Op, tensor: Tensor) -> list[int]:
    return [i for i, found in enumerate(op.inputs) if found is tensor]


def _propagate(graph: RuntimeGraph) -> None:
    """Pairs move over operators that only move elements: DQ towards the results, Q back."""
    for op in graph:
        if op in graph and op.is_onnx(*_PROPAGATES):
            _take_forward(graph, op)
    for op in reversed(list(graph)):
        if op in graph and op.is_onnx(*_PROPAGATES):
            _take_back(graph, op)
    graph.sort()


def _take_forward(graph: RuntimeGraph, op: Op) -> None:
    """DQ -> Transpose -> f becomes Transpose -> DQ -> f, where f is no Q."""
    source, result = op.inputs[0], op.outputs[0]
    pair = source.producer if source is not None else None
    if pair is None or source is None or not is_dequantize(pair) or len(op.outputs) > 1:
        return
    stored = pair.inputs[0]
    if stored is None or stored.constant or any(is_quantize(u) for u in result.users):
        return
    graph.set_input(op, 0, stored)
    graph.remove(pair)
    moved = result.like(f"{result.name}_q_to_dq", stored.dtype)
    graph.set_output(op, 0, moved)
    graph.renew(op)
    readers = [(user, i) for user in dict.fromkeys(result.users) for i in _reads(user, result)]
    graph.add(
        Op(pair.type, pair.domain, [moved, *pair.inputs[1:]], [result], dict(pair.attributes))
    )
    for user, index in readers[0 if result.is_output else 1 :]:
        graph.set_input(user, index, _copied(graph, pair, moved, result))


def _take_back(graph: RuntimeGraph, op: Op) -> None:
    """Transpose -> Q becomes Q -> Transpose."""
    source, result = op.inputs[0], op.outputs[0]
    pair = graph.only_user(result)
    if pair is None or source is None or not is_quantize(pair) or is_dequantize(source.producer):
        return
    if op.type == "Squeeze" and not op.origin:  # was a Gather then
        return
    if len(op.outputs) > 1 or source.constant or source.is_input or len(source.users) > 1:
        return
    final = pair.outputs[0]
    stored = source.like(f"{source.name}_q_to_dq", final.dtype)
    graph.remove(pair)
    graph.add(
        Op(
            pair.type,
            pair.domain,
            [source, *pair.inputs[1:]],
            [stored],
            dict(pair.attributes),
            pair.origin,
        )
    )
    graph.set_input(op, 0, stored)
    graph.set_output(op, 0, final)
    graph.renew(op)


# --- integer operators -----------------------------------------------------------------------


def _form(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    """Replace an operator between pairs by its integer form, if it has one."""
    if op.domain:
        return
    if op.type in _MOVES:
        _move(graph, op, signed)
        return
    if op.type == "ArgMax":
        _drop_before(graph, op)
    form = _FORMS.get(op.type)
    if form is not None:
        form(graph, op, signed)


def _pair_before(op: Op, index: int) -> Op | None:
    """The DequantizeLinear that makes an input and nothing but it."""
    found = op.inputs[index] if index < len(op.inputs) else None
    maker = found.producer if found is not None else None
    return maker if is_dequantize(maker) else None


def _pairs_before(op: Op, indices: Sequence[int]) -> list[Op] | None:
    pairs = []
    for index in indices:
        pair = _pair_before(op, index)
        if pair is None:
            return None
        pairs.append(pair)
    return pairs


def _pair_behind(graph: RuntimeGraph, result: Tensor) -> Op | None:
    """The QuantizeLinear that is a result's only reader."""
    user = graph.only_user(result)
    return user if is_quantize(user) else None


def _numbers(pair: Op) -> list[Tensor | None]:
    """Scale and zero point."""
    return [pair.inputs[1], pair.inputs[2] if len(pair.inputs) > 2 else None]


def _quantized(pair: Op) -> list[Tensor | None]:
    """Integers, scale and zero point."""
    return [pair.inputs[0], *_numbers(pair)]


def _stored_dtype(pair: Op) -> ir.DataType | None:
    stored = pair.outputs[0] if is_quantize(pair) else pair.inputs[0]
    return stored.dtype if stored is not None else None


def _alike(before: Sequence[Op], behind: Op | None, signed: bool) -> bool:
    """Whether activations are stored in one 8-bit dtype that the session takes."""
    dtypes = {_stored_dtype(p) for p in before}
    if behind is not None:
        dtypes.add(_stored_dtype(behind))
    allowed = _BITS if signed else (ir.DataType.UINT8,)
    return len(dtypes) == 1 and dtypes <= set(allowed)


def _replace(
    graph: RuntimeGraph,
    op: Op,
    type_: str,
    domain: str,
    inputs: Sequence[Tensor | None],
    behind: Op | None,
) -> None:
    """Let an operator read and write integers; its pairs go where nobody else reads them."""
    before = [t.producer for t in op.inputs if t is not None and is_dequantize(t.producer)]
    for index in range(len(op.inputs)):
        graph.set_input(op, index, None)
    op.inputs.clear()
    for index, tensor in enumerate(inputs):
        graph.set_input(op, index, tensor)
    if behind is not None:
        _write_integers(graph, op, 0, behind)
    for pair in before:
        if pair is not None and pair in graph and not _is_read(pair):
            graph.remove(pair)
    op.type, op.domain = type_, domain
    graph.renew(op)


def _write_integers(graph: RuntimeGraph, op: Op, index: int, quantize: Op) -> None:
    """Let an operator do the work of the QuantizeLinear behind it, and of a Relu that it did."""
    final = quantize.outputs[0]
    graph.remove(quantize)
    graph.set_output(op, index, final)
    absorbed = tuple(node for node in quantize.origin if not is_qdq(node))
    op.origin += absorbed
    op.fused += tuple(node.op_type for node in absorbed)


def _is_read(op: Op) -> bool:
    return any(t.users or t.is_output for t in op.outputs)


def _move(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    pair = _pair_before(op, 0)
    if pair is None or (op.type == "Resize" and op.attribute("mode", "nearest") != "nearest"):
        return
    behind = [_pair_behind(graph, result) for result in op.outputs]
    if not all(b is not None and _same_numbers(pair, b, op) for b in behind):
        return
    if any(b is not None and _stored_dtype(b) != _stored_dtype(pair) for b in behind):
        return
    stored = pair.inputs[0]
    assert stored is not None
    graph.set_input(op, 0, stored)
    for index, quantize in enumerate(behind):
        assert quantize is not None
        _write_integers(graph, op, index, quantize)
    if not _is_read(pair):
        graph.remove(pair)
    graph.renew(op)


def _drop_before(graph: RuntimeGraph, op: Op) -> None:
    """Integers have the order of the floats that they stand for."""
    pair = _pair_before(op, 0)
    if pair is not None and pair.inputs[0] is not None and not pair.inputs[0].constant:
        graph.set_input(op, 0, pair.inputs[0])
        graph.remove(pair)
        graph.renew(op)


def _same_numbers(before: Op, behind: Op, between: Op | None = None) -> bool:
    """Whether two pairs hold one scale and zero point.

    Where they are not calibrated yet, as calibration finds them behind the operator in `between`.
    """
    row = INTEGER_OPS.get(between.type) if between is not None else None
    shared = between is None or not between.origin or (row is not None and row.same_scale)
    for one, other in zip(_numbers(before), _numbers(behind), strict=True):
        if one is other:
            continue
        values = [
            constant_scalar(t.source) if t is not None and t.source is not None else None
            for t in (one, other)
        ]
        if None in values:
            if not shared:
                return False
        elif values[0] != values[1]:
            return False
    return True


def _conv(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    has_bias = len(op.inputs) > 2 and op.inputs[2] is not None
    pairs = _pairs_before(op, (0, 1, 2) if has_bias else (0, 1))
    behind = _pair_behind(graph, op.outputs[0])
    if pairs is None or behind is None or not _alike(pairs[:1], behind, signed):
        return
    if not _weight_fits(pairs):
        return
    inputs = [*_quantized(pairs[0]), *_quantized(pairs[1]), *_numbers(behind)]
    if has_bias:
        inputs.append(pairs[2].inputs[0])
    _replace(graph, op, "QLinearConv", "", inputs, behind)


def _weight_fits(pairs: Sequence[Op]) -> bool:
    weight = _stored_dtype(pairs[1])
    if weight not in _BITS:
        return False
    return _stored_dtype(pairs[0]) != ir.DataType.INT8 or weight == ir.DataType.INT8


def _gemm(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    has_bias = len(op.inputs) > 2 and op.inputs[2] is not None
    pairs = _pairs_before(op, (0, 1, 2) if has_bias else (0, 1))
    if pairs is None or float(op.attribute("beta", 1.0)) != 1.0:
        return
    behind = _pair_behind(graph, op.outputs[0])
    if behind is None and _stays_float(graph, op.outputs[0]):
        return
    if not _alike(pairs[:1], behind, signed=True) or not _weight_fits(pairs):
        return
    inputs = [*_quantized(pairs[0]), *_quantized(pairs[1])]
    inputs.append(pairs[2].inputs[0] if has_bias else None)
    if behind is not None:
        inputs += _numbers(behind)
    _replace(graph, op, "QGemm", CONTRIB, inputs, behind)


def _stays_float(graph: RuntimeGraph, result: Tensor) -> bool:
    """Whether floats that a product would return are read by what forbids its integer form."""
    user = graph.only_user(result)
    if user is not None and user.is_onnx("Relu", "Clip"):
        return graph.only_user(user.outputs[0]) is not None
    return any(is_quantize(u) for u in result.users)


def _matmul(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    pairs = _pairs_before(op, (0, 1))
    if pairs is None or _stored_dtype(pairs[1]) not in _BITS:
        return
    behind = _pair_behind(graph, op.outputs[0])
    if behind is None and _stays_float(graph, op.outputs[0]):
        return
    if not _alike(pairs[:1], behind, signed) or not _weight_fits(pairs):
        return
    a, b = _quantized(pairs[0]), _quantized(pairs[1])
    if behind is not None:
        _replace(graph, op, "QLinearMatMul", "", [*a, *b, *_numbers(behind)], behind)
        return
    inputs = [a[0], b[0], a[1], b[1], a[2], b[2]]
    _replace(graph, op, "MatMulIntegerToFloat", CONTRIB, inputs, None)


def _elementwise(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    pairs = _pairs_before(op, range(len(op.inputs)))
    behind = _pair_behind(graph, op.outputs[0])
    if pairs is None or behind is None or not _alike(pairs, behind, signed):
        return
    inputs = [t for pair in pairs for t in _quantized(pair)]
    _replace(graph, op, f"QLinear{op.type}", CONTRIB, [*inputs, *_numbers(behind)], behind)


def _concat(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    pairs = _pairs_before(op, range(len(op.inputs)))
    behind = _pair_behind(graph, op.outputs[0])
    if pairs is None or behind is None or not _alike(pairs, behind, signed):
        return
    inputs = [t for pair in pairs for t in _quantized(pair)]
    _replace(graph, op, "QLinearConcat", CONTRIB, [*_numbers(behind), *inputs], behind)


def _where(graph: RuntimeGraph, op: Op, signed: bool) -> None:
    pairs = _pairs_before(op, (1, 2))
    behind = _pair_behind(graph, op.outputs[0])
    if pairs is None or behind is None or not _alike(pairs, behind, signed):
        return
    inputs = [op.inputs[0], *_quantized(pairs[0]), *_quantized(pairs[1]), *_numbers(behind)]
    _replace(graph, op, "QLinearWhere", CONTRIB, inputs, behind)


_FORMS: dict[str, Callable[[RuntimeGraph, Op, bool], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _elementwise,
    "Mul": _elementwise,
    "Concat": _concat,
    "Where": _where,
    **dict.fromkeys(_UNARY, _elementwise),
}
