"""Q/DQ pairs as ONNX Runtime treats them: moved past what only moves elements, then fused.

Here: `spread_pairs`, what it does to pairs while the graph is still a float graph, and
`form_integer_ops`, which makes QLinearConv, QLinearAdd, MatMulIntegerToFloat and their like. The
rules were found by saving the graphs of small nets and of whole architectures. Not here: layouts
(`ort_nhwc`), pairs that a plan would write (`ort_plan`).
"""

from __future__ import annotations

import onnx_ir as ir

from ..ir.graph import constant_scalar
from ..targets.target import Target
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_INT8_OPTION = "session.qdqisint8allowed"
_EIGHT_BITS = (ir.DataType.UINT8, ir.DataType.INT8)
_CARRIES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice"})
"""Operators that pairs are moved past; a MaxPool only forwards."""
_KEEPS_SCALE = _CARRIES | {"MaxPool", "Resize", "Gather", "Expand", "Tile", "Split", "Identity"}
_ONE = {
    "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
}
_TWO = {"Add": "QLinearAdd", "Mul": "QLinearMul"}


def is_pair(op: Op | None, half: str) -> bool:
    """Whether an operator is a QuantizeLinear ("Quantize") or DequantizeLinear ("Dequantize")."""
    return op is not None and op.type == f"{half}Linear" and op.domain in ("", CONTRIB)


def _is_q(op: Op | None) -> bool:
    return is_pair(op, "Quantize")


def _is_dq(op: Op | None) -> bool:
    return is_pair(op, "Dequantize")


# --- while pairs are pairs -------------------------------------------------------------------


def spread_pairs(graph: RuntimeGraph) -> None:
    """Give every reader a DequantizeLinear of its own, and move pairs past what moves elements."""
    _separate(graph)
    for op in graph:
        if op in graph and _is_dq(op) and not _stored(op):
            _move_down(graph, op)
    for op in reversed(list(graph)):
        if op in graph and _is_q(op):
            _move_up(graph, op)
    graph.sort()


def _stored(op: Op) -> bool:
    """Whether a DequantizeLinear unpacks a weight."""
    source = op.inputs[0]
    return source is not None and source.constant


def _drop_saturating(graph: RuntimeGraph) -> None:
    """A Relu before a QuantizeLinear whose range begins at zero does nothing."""
    for op in graph:
        if not op.is_onnx("Relu") or op not in graph:
            continue
        user = graph.only_user(op.outputs[0])
        source = op.inputs[0]
        if user is None or not _is_q(user) or source is None or not _begins_at_zero(user):
            continue
        graph.remove(op)
        graph.set_input(user, 0, source)
        maker = source.producer
        if maker is not None and graph.only_user(source) is user:
            maker.origin += op.origin
            maker.fused += (op.type,)


def _begins_at_zero(quantize: Op) -> bool:
    """Where the zero point is not known yet it is what calibration finds behind a Relu."""
    dtype = quantize.outputs[0].dtype
    point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    known = None if point is None or point.source is None else constant_scalar(point.source)
    if known is None:
        return dtype in _EIGHT_BITS and point is not None
    return known == (-128 if dtype == ir.DataType.INT8 else 0)


def _separate(graph: RuntimeGraph) -> None:
    for op in graph:
        if not _is_dq(op):
            continue
        result = op.outputs[0]
        readers = [(user, i) for user in dict.fromkeys(result.users) for i in _places(user, result)]
        for user, index in readers if result.is_output else readers[1:]:
            graph.set_input(user, index, _dequantize(graph, op, op.inputs[0], result))


def _places(user: Op, tensor: Tensor) -> list[int]:
    return [i for i, found in enumerate(user.inputs) if found is tensor]


def _dequantize(graph: RuntimeGraph, pair: Op, source: Tensor | None, like: Tensor) -> Tensor:
    """The result of a new DequantizeLinear of `source` with the numbers of `pair`."""
    result = Tensor(f"{like.name}_dq", source.shape if source else like.shape, like.dtype)
    graph.add(Op("DequantizeLinear", "", [source, *pair.inputs[1:]], [result], pair.attributes))
    return result


def _move_down(graph: RuntimeGraph, pair: Op) -> None:
    """DQ -> Reshape becomes Reshape -> DQ, one for each reader of the result."""
    reader = graph.only_user(pair.outputs[0])
    while reader is not None and _can_carry(reader, pair.outputs[0]):
        result, source = reader.outputs[0], pair.inputs[0]
        behind = graph.only_user(result)
        if source is None or (behind is not None and _is_q(behind)):
            return
        moved = result.like(f"{result.name}_int8", source.dtype)
        users = [(user, i) for user in dict.fromkeys(result.users) for i in _places(user, result)]
        graph.set_input(reader, 0, source)
        graph.set_output(reader, 0, moved)
        graph.remove(pair)
        pairs = []
        for user, index in users:
            tensor = _dequantize(graph, pair, moved, result)
            graph.set_input(user, index, tensor)
            pairs.append(tensor.producer)
        if result.is_output:
            graph.add(Op("DequantizeLinear", "", [moved, *pair.inputs[1:]], [result]))
        for other in pairs[1:]:
            if other is not None:
                _move_down(graph, other)
        if not pairs or pairs[0] is None:
            return
        pair = pairs[0]
        reader = graph.only_user(pair.outputs[0])


def _can_carry(op: Op, data: Tensor) -> bool:
    if op.domain or op.type not in _CARRIES | {"MaxPool"} or len(op.outputs) != 1:
        return False
    return op.inputs[0] is data and op.outputs[0].shape is not None


def _move_up(graph: RuntimeGraph, pair: Op) -> None:
    """Reshape -> Q becomes Q -> Reshape."""
    while True:
        before = pair.inputs[0]
        mover = before.producer if before is not None else None
        if mover is None or before is None or graph.only_user(before) is not pair:
            return
        if mover.domain or mover.type not in _CARRIES or len(mover.outputs) != 1:
            return
        source, result = mover.inputs[0], pair.outputs[0]
        if source is None or source.constant or _is_dq(source.producer):
            return
        small = source.like(f"{source.name}_int8", result.dtype)
        graph.set_input(pair, 0, source)
        graph.set_output(pair, 0, small)
        graph.set_input(mover, 0, small)
        graph.set_output(mover, 0, result)
        graph.renew(mover)


# --- integer operators -----------------------------------------------------------------------


def form_integer_ops(graph: RuntimeGraph, target: Target) -> None:
    """Fuse the pairs around an operator into it, where the runtime has an integer kernel."""
    signed = any(_INT8_OPTION in scheme.session_options for scheme in target.quantization)
    _drop_saturating(graph)
    forming = _Forming(graph, signed)
    for op in graph:
        if op in graph:
            forming.visit(op)
    _meet(graph)
    for op in graph:
        if op.is_onnx("MaxPool") and op.outputs[0].dtype in _EIGHT_BITS and len(op.outputs) == 1:
            op.type, op.domain = "NhwcMaxPool", CONTRIB  # its layout is `ort_layout`'s to change
        elif op.is_onnx("HardSwish"):
            _inline_hard_swish(graph, op)
    graph.sort()


def _inline_hard_swish(graph: RuntimeGraph, op: Op) -> None:
    """The runtime has no kernel for it, and runs the two operators that ONNX defines it by."""
    source, result = op.inputs[0], op.outputs[0]
    if source is None:
        return
    gate = result.like(f"{result.name}_gate")
    graph.add(Op("HardSigmoid", "", [source], [gate], {"alpha": 1 / 6, "beta": 0.5}, op.origin))
    op.type, op.attributes, op.origin = "Mul", {}, ()
    graph.set_input(op, 1, gate)
    graph.renew(op)


def _meet(graph: RuntimeGraph) -> None:
    """A DequantizeLinear into a QuantizeLinear with the same numbers: nothing."""
    for op in graph:
        if op not in graph or not _is_q(op):
            continue
        middle = op.inputs[0]
        maker = middle.producer if middle is not None else None
        if maker is None or not _is_dq(maker) or not _same_numbers(maker, op):
            continue
        source, result = maker.inputs[0], op.outputs[0]
        if source is None or result.is_output:
            continue
        graph.remove(op)
        graph.replace_uses(result, source)
        _drop(graph, maker)


def _same_numbers(pair: Op, other: Op) -> bool:
    """Whether two pairs have the same scale and zero point, as far as that is known."""
    for mine, theirs in zip(pair.inputs[1:3], other.inputs[1:3], strict=False):
        if mine is theirs:
            continue
        a = None if mine is None or mine.source is None else constant_scalar(mine.source)
        b = None if theirs is None or theirs.source is None else constant_scalar(theirs.source)
        if a is None or b is None or a != b:
            return False
    return True


def _keeps_scale(pair: Op, other: Op) -> bool:
    """As `_same_numbers`; numbers that are not there yet are what calibration makes: the same."""
    for mine, theirs in zip(pair.inputs[1:3], other.inputs[1:3], strict=False):
        a = None if mine is None or mine.source is None else constant_scalar(mine.source)
        b = None if theirs is None or theirs.source is None else constant_scalar(theirs.source)
        if a is not None and b is not None and a != b:
            return False
    return True


def _drop(graph: RuntimeGraph, op: Op) -> None:
    if op in graph and not any(t.users or t.is_output for t in op.outputs):
        graph.remove(op)


class _Forming:
    def __init__(self, graph: RuntimeGraph, signed: bool) -> None:
        self.graph = graph
        self.signed = signed

    def visit(self, op: Op) -> None:
        if op.domain or not op.inputs or not op.outputs:
            return
        if op.type in _KEEPS_SCALE:
            self._move(op)
        elif op.type == "Conv":
            self._conv(op)
        elif op.type == "Gemm":
            self._gemm(op)
        elif op.type == "MatMul":
            self._matmul(op)
        elif op.type in _ONE:
            self._plain(op, _ONE[op.type], 1)
        elif op.type in _TWO:
            self._plain(op, _TWO[op.type], 2)
        elif op.type == "Concat":
            self._concat(op)
        elif op.type == "Where":
            self._where(op)

    # --- what is around an operator --------------------------------------------------------------

    def _before(self, op: Op, index: int) -> Op | None:
        """The DequantizeLinear that makes an input, of 8 bits."""
        tensor = op.inputs[index] if index < len(op.inputs) else None
        maker = tensor.producer if tensor is not None else None
        if maker is None or not _is_dq(maker) or maker.inputs[0] is None:
            return None
        return maker

    def _eight(self, pair: Op | None, signed: bool | None = None) -> bool:
        if pair is None or pair.inputs[0] is None:
            return False
        dtype = pair.inputs[0].dtype
        allowed = self.signed if signed is None else signed
        return dtype == ir.DataType.UINT8 or (dtype == ir.DataType.INT8 and allowed)

    def _behind(self, op: Op, index: int = 0) -> Op | None:
        """The one QuantizeLinear that reads a result."""
        user = self.graph.only_user(op.outputs[index])
        return user if _is_q(user) else None

    # --- operators -------------------------------------------------------------------------------

    def _become(
        self, op: Op, kind: str, domain: str, inputs: list[Tensor | None], after: Op | None
    ) -> None:
        pairs = [t.producer for t in op.inputs if t is not None and t.producer is not None]
        for index in range(len(op.inputs)):
            self.graph.set_input(op, index, None)
        op.inputs.clear()
        for index, tensor in enumerate(inputs):
            self.graph.set_input(op, index, tensor)
        if after is not None:
            result = after.outputs[0]
            self.graph.remove(after)
            self.graph.set_output(op, 0, result)
        op.type, op.domain = kind, domain
        for pair in dict.fromkeys(pairs):
            if _is_dq(pair):
                _drop(self.graph, pair)
        self.graph.renew(op)

    def _conv(self, op: Op) -> None:
        data, weight, after = self._before(op, 0), self._before(op, 1), self._behind(op)
        bias = self._before(op, 2)
        if data is None or weight is None or after is None or not self._eight(data):
            return
        if len(op.inputs) > 2 and op.inputs[2] is not None and bias is None:
            return
        if not self._eight(weight, signed=True) or not _same_type(data, after):
            return
        inputs = [*_numbers(data), *_numbers(weight), *_parameters(after)]
        if bias is not None:
            inputs.append(bias.inputs[0])
        self._become(op, "QLinearConv", "", inputs, after)

    def _gemm(self, op: Op) -> None:
        data, weight = self._before(op, 0), self._before(op, 1)
        bias, after = self._before(op, 2), self._behind(op)
        if data is None or weight is None or not self._eight(data):
            return
        if not self._eight(weight, signed=True):
            return
        if len(op.inputs) > 2 and op.inputs[2] is not None and bias is None:
            return
        if after is not None and not _same_type(data, after):
            return
        inputs = [*_numbers(data), *_numbers(weight), None if bias is None else bias.inputs[0]]
        if after is not None:
            inputs += _parameters(after)
        self._become(op, "QGemm", CONTRIB, inputs, after)

    def _matmul(self, op: Op) -> None:
        left, right = self._before(op, 0), self._before(op, 1)
        if left is None or right is None or not self._eight(left):
            return
        if not self._eight(right, signed=True):
            return
        after = self._behind(op)
        if after is not None and _same_type(left, after):
            inputs = [*_numbers(left), *_numbers(right), *_parameters(after)]
            self._become(op, "QLinearMatMul", "", inputs, after)
        elif after is None:
            a, b = _numbers(left), _numbers(right)
            inputs = [a[0], b[0], a[1], b[1], a[2], b[2]]
            self._become(op, "MatMulIntegerToFloat", CONTRIB, inputs, None)

    def _plain(self, op: Op, kind: str, count: int) -> None:
        pairs = [self._before(op, i) for i in range(count)]
        after = self._behind(op)
        if after is None or not all(self._eight(pair) for pair in pairs):
            return
        if not all(pair is not None and _same_type(pair, after) for pair in pairs):
            return
        inputs = [t for pair in pairs if pair is not None for t in _numbers(pair)]
        self._become(op, kind, CONTRIB, inputs + _parameters(after), after)

    def _concat(self, op: Op) -> None:
        pairs = [self._before(op, i) for i in range(len(op.inputs))]
        after = self._behind(op)
        if after is None or not all(self._eight(pair) for pair in pairs):
            return
        if not all(pair is not None and _same_type(pair, after) for pair in pairs):
            return
        inputs = [t for pair in pairs if pair is not None for t in _numbers(pair)]
        self._become(op, "QLinearConcat", CONTRIB, _parameters(after) + inputs, after)

    def _where(self, op: Op) -> None:
        pairs = [self._before(op, 1), self._before(op, 2)]
        after = self._behind(op)
        if after is None or not all(self._eight(pair) for pair in pairs):
            return
        inputs = [op.inputs[0], *(t for pair in pairs if pair is not None for t in _numbers(pair))]
        self._become(op, "QLinearWhere", CONTRIB, inputs + _parameters(after), after)

    def _move(self, op: Op) -> None:
        """An operator that only picks and moves elements runs on the integers themselves."""
        pair = self._before(op, 0)
        if pair is None:
            return
        results = [t for t in op.outputs if t.users or t.is_output]
        behind = [self._behind(op, op.outputs.index(t)) for t in results]
        if not behind or any(q is None or not _keeps_scale(pair, q) for q in behind):
            return
        source = pair.inputs[0]
        self.graph.set_input(op, 0, source)
        for tensor, quantize in zip(results, behind, strict=True):
            assert quantize is not None
            result = quantize.outputs[0]
            self.graph.remove(quantize)
            self.graph.set_output(op, op.outputs.index(tensor), result)
        _drop(self.graph, pair)
        self.graph.renew(op)


def _numbers(pair: Op) -> list[Tensor | None]:
    """Integers, scale and zero point of a pair."""
    return [*pair.inputs[:3], None][:3]


def _parameters(pair: Op) -> list[Tensor | None]:
    return _numbers(pair)[1:]


def _same_type(pair: Op, quantize: Op) -> bool:
    return pair.inputs[0] is not None and pair.inputs[0].dtype == quantize.outputs[0].dtype
