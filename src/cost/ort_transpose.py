"""Transposes as ONNX Runtime moves them: towards the results, until they meet and cancel.

Here: `push_transposes`. A Transpose goes behind its reader where fewer dimensions longer than one
are moved afterwards, counting the reader's other inputs, or where a later Transpose may take it up;
a Reshape that only splits dimensions it always lets pass. Found by saving the graphs of small nets.
Not here: Transposes that become part of a matrix product (`ort_float`) or of a change of layout
(`ort_nchwc`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from ..ir.graph import constant_array
from ..ir.op_table import TABLE
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

Perm = tuple[int, ...]
_AXIS_OPS = frozenset({"Softmax", "LogSoftmax", "Hardmax", "Split", "Concat", "ArgMax", "ArgMin"})
_AXES_OPS = frozenset(
    {
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
        "Squeeze",
        "Unsqueeze",
    }
)
_MORE = frozenset({"Gather", "Slice", "Pad", "Resize", "Tile"})
_NOT_MOVED = frozenset({"Dropout", "CastLike", "Einsum"})
_INTEGER_DATA = {
    "QLinearAdd": slice(0, 6, 3),
    "QLinearMul": slice(0, 6, 3),
    "QLinearConcat": slice(2, None, 3),
    "QLinearLeakyRelu": slice(0, 1),
    "QLinearSigmoid": slice(0, 1),
    "QLinearSoftmax": slice(0, 1),
    "QuickGelu": slice(0, 1),
    "QuantizeLinear": slice(0, 1),
    "DequantizeLinear": slice(0, 1),
}
"""Which inputs of operators beyond the standard are data; others are scales and zero points."""
_POOLS = frozenset({"QLinearAveragePool", "QLinearGlobalAveragePool"})
"""These can read channels last themselves."""
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def push_transposes(graph: RuntimeGraph) -> None:
    """Move every Transpose as far down as it pays."""
    if not any(op.is_onnx("Transpose") for op in graph):
        return
    graph.sort()
    leading = _leading_to_transposes(graph)
    for op in graph:
        if op in graph:
            _visit(graph, op, leading)
    graph.sort()


def _visit(graph: RuntimeGraph, op: Op, leading: set[Tensor]) -> None:
    for index, source in enumerate(op.inputs):
        if source is None or source.producer is None or not source.producer.is_onnx("Transpose"):
            continue
        transpose = source.producer
        perm = _perm(transpose)
        if perm is None:
            continue
        if op.is_onnx("Transpose"):
            _compose(graph, transpose, op)
            return
        if op.is_onnx("Reshape"):
            if index == 0:
                _pass_reshape(graph, transpose, op, perm)
            return
        if not _is_handled(op) or index not in _movable(op):
            continue
        if _pays(op, perm, leading) and _push(graph, transpose, op, perm):
            return


def _perm(transpose: Op) -> Perm | None:
    source = transpose.inputs[0]
    if source is None or source.shape is None or transpose.outputs[0].shape is None:
        return None
    rank = len(source.shape)
    return tuple(transpose.attribute("perm") or reversed(range(rank)))


def _inverse(perm: Perm) -> Perm:
    return tuple(perm.index(i) for i in range(len(perm)))


def _leading_to_transposes(graph: RuntimeGraph) -> set[Tensor]:
    """Tensors from which a Transpose is reached through operators that let one pass."""
    leading: set[Tensor] = set()
    for op in reversed(list(graph)):
        if op.is_onnx("Transpose"):
            if op.inputs[0] is not None:
                leading.add(op.inputs[0])
        elif _is_handled(op) and any(t in leading for t in op.outputs):
            for index in _movable(op):
                found = op.inputs[index]
                if found is not None:
                    leading.add(found)
    return leading


def _is_handled(op: Op) -> bool:
    if op.type in _NOT_MOVED or not op.outputs or any(t.shape is None for t in op.outputs):
        return False
    if op.type in _INTEGER_DATA or op.type in _POOLS:
        return True
    if op.is_onnx("MaxPool"):
        return len(op.outputs) == 1 and op.outputs[0].dtype in _EIGHT_BITS
    if op.domain:
        return False
    if op.type in _AXIS_OPS or op.type in _AXES_OPS or op.type in _MORE:
        return True
    row = TABLE.get(("", op.type))
    return row is not None and row.elementwise


def _movable(op: Op) -> Sequence[int]:
    """The inputs that are tensors of data, not axes or indices."""
    if op.type in _INTEGER_DATA:
        return range(len(op.inputs))[_INTEGER_DATA[op.type]]
    if op.type == "MaxPool":
        return [0]
    if op.type == "Concat" or (op.type not in _AXIS_OPS | _AXES_OPS | _MORE and op.type != "Clip"):
        return [i for i, t in enumerate(op.inputs) if t is not None]
    return [0]


def _longer(shape: tuple[int, ...] | None) -> int:
    """Dimensions longer than one."""
    return 5 if shape is None else sum(1 for d in shape if d != 1)


def _pays(op: Op, perm: Perm, leading: set[Tensor]) -> bool:
    if op.type == "MaxPool":  # faster with channels last
        return True
    cost = 0
    for index in _movable(op):
        found = op.inputs[index]
        if found is None or found.constant:
            continue
        maker = _behind_pair(found)
        if maker is None or not maker.is_onnx("Transpose") or _perm(maker) != perm:
            cost += _longer(found.shape)
        elif _goes_away(maker):
            cost -= _longer(found.shape)
    if not any(t in leading for t in op.outputs):
        cost += _longer(op.outputs[0].shape)
    return cost < 0


def _behind_pair(tensor: Tensor) -> Op | None:
    """What makes a tensor, seen through a DequantizeLinear that nobody else reads."""
    maker = tensor.producer
    if maker is None or maker.type != "DequantizeLinear" or len(tensor.users) != 1:
        return maker
    stored = maker.inputs[0]
    return maker if stored is None or stored.producer is None else stored.producer


def _dequantized(graph: RuntimeGraph, tensor: Tensor, stored: Tensor) -> Tensor:
    """The floats of `stored`, by the numbers of the DequantizeLinear that makes `tensor`."""
    pair = tensor.producer
    assert pair is not None
    result = Tensor(f"{tensor.name}_t", stored.shape, tensor.dtype)
    graph.add(Op(pair.type, pair.domain, [stored, *pair.inputs[1:]], [result], pair.attributes))
    return result


def _goes_away(transpose: Op) -> bool:
    """Whether every reader of a Transpose could let it pass."""
    result = transpose.outputs[0]
    return not result.is_output and all(
        user.is_onnx("Transpose", "Reshape") or _is_handled(user) for user in result.users
    )


# --- the moves -------------------------------------------------------------------------------


def _push(graph: RuntimeGraph, transpose: Op, op: Op, perm: Perm) -> bool:
    """Let an operator read what a Transpose reads, and transpose its results."""
    planned = _after(op, perm)
    if planned is None:
        return False
    after, attributes = planned
    passed = {transpose: None}
    for index in _movable(op):
        found = op.inputs[index]
        if found is None:
            continue
        behind = _behind_pair(found)
        for maker in (found.producer, behind):
            if maker is not None and (maker is behind or maker.type == "DequantizeLinear"):
                passed[maker] = None
        graph.set_input(op, index, _untransposed(graph, found, perm))
    op.attributes = {**op.attributes, **attributes}
    if op.type == "MaxPool":
        op.type, op.domain = "NhwcMaxPool", CONTRIB
        del op.attributes["channels_last"]
    for index, result in enumerate(list(op.outputs)):
        _transpose_result(graph, op, index, result, after, transpose)
    for maker in passed:
        if maker.type in ("Transpose", "DequantizeLinear"):
            _drop_unused(graph, maker)
    return True


def _after(op: Op, perm: Perm) -> tuple[Perm, dict[str, int]] | None:
    """The permutation of the results, and the attributes that change; None if it can't be said."""
    rank = len(perm)
    if op.type in _POOLS or op.type == "MaxPool":
        last = perm == (0, rank - 1, *range(1, rank - 1)) and not op.attribute("channels_last", 0)
        return (perm, {"channels_last": 1}) if last else None
    if op.type in _AXIS_OPS or op.type in ("QLinearConcat", "QLinearSoftmax"):
        axis = int(op.attribute("axis", -1 if "max" in op.type.lower() else 0)) % rank
        changed = {"axis": perm[axis]}
        if op.type in ("ArgMax", "ArgMin") and not op.attribute("keepdims", 1):
            return _without(perm, [axis]), changed
        return perm, changed
    if op.type == "Gather":
        index = op.inputs[1]
        axis = int(op.attribute("axis", 0)) % rank
        if index is None or index.shape is None or len(index.shape) > 1:
            return None
        changed = {"axis": perm[axis]}
        return (perm if index.shape else _without(perm, [axis])), changed
    if op.type in _AXES_OPS:
        axes = _axes(op)
        if op.type == "Unsqueeze":
            return None if axes is None else (_with(perm, axes), {})
        if axes is None:
            return None
        if op.type.startswith("Reduce") and op.attribute("keepdims", 1):
            return perm, {}
        return _without(perm, [a % rank for a in axes]), {}
    if op.type in ("Slice", "Pad", "Resize", "Tile"):
        return (perm, {}) if all(t is None or t.constant for t in op.inputs[1:]) else None
    result = op.outputs[0].shape
    return (perm, {}) if result is not None and len(result) == rank else None


def _axes(op: Op) -> list[int] | None:
    axes = op.attribute("axes")
    if axes is not None:
        return [int(a) for a in axes]
    found = op.inputs[1] if len(op.inputs) > 1 else None
    if found is None or found.source is None:
        return None
    array = constant_array(found.source, 16)
    return None if array is None else [int(a) for a in array.reshape(-1)]


def _without(perm: Perm, axes: Sequence[int]) -> Perm:
    kept = [p for i, p in enumerate(perm) if i not in axes]
    order = sorted(kept)
    return tuple(order.index(p) for p in kept)


def _with(perm: Perm, axes: Sequence[int]) -> Perm:
    """The permutation behind an Unsqueeze: new axes stay where they are."""
    rank = len(perm) + len(axes)
    new = sorted(a % rank for a in axes)
    old = [i for i in range(rank) if i not in new]
    found = list(range(rank))
    for place, p in zip(old, perm, strict=True):
        found[place] = old[p]
    return tuple(found)


def _untransposed(graph: RuntimeGraph, tensor: Tensor, perm: Perm) -> Tensor:
    """What gives the tensor when transposed; a new Transpose makes it where nothing has it."""
    assert tensor.shape is not None
    maker = _behind_pair(tensor)
    if maker is not None and maker.is_onnx("Transpose") and _perm(maker) == perm:
        source = maker.inputs[0]
        assert source is not None
        if maker is tensor.producer:
            return source
        return _dequantized(graph, tensor, source)
    shape = (1,) * (len(perm) - len(tensor.shape)) + tensor.shape
    if math.prod(shape) == 1 and tensor.constant:
        return tensor
    inverse = _inverse(perm)
    for user in tensor.users:
        if user.is_onnx("Transpose") and _perm(user) == inverse and user.inputs[0] is tensor:
            return user.outputs[0]
    made = Tensor(f"{tensor.name}_t", tuple(shape[p] for p in inverse), tensor.dtype)
    made.constant = tensor.constant
    if tensor.constant:
        return made
    if len(shape) != len(tensor.shape):
        wide = Tensor(f"{tensor.name}_u", shape, tensor.dtype)
        graph.add(Op("Unsqueeze", "", [tensor], [wide]))
        tensor = wide
    graph.add(Op("Transpose", "", [tensor], [made], {"perm": list(inverse)}))
    return made


def _transpose_result(
    graph: RuntimeGraph, op: Op, index: int, result: Tensor, perm: Perm, transpose: Op
) -> None:
    assert result.shape is not None
    if perm == tuple(range(len(perm))):
        return
    inverse = _inverse(perm)
    made = Tensor(f"{result.name}_t", tuple(result.shape[p] for p in inverse), result.dtype)
    graph.set_output(op, index, made)
    graph.add(Op("Transpose", "", [made], [result], {"perm": list(perm)}, transpose.origin))


def _compose(graph: RuntimeGraph, first: Op, second: Op) -> None:
    """Two Transposes in a row: one, or none."""
    one, two = _perm(first), _perm(second)
    source = first.inputs[0]
    if one is None or two is None or source is None or len(one) != len(two):
        return
    perm = tuple(one[p] for p in two)
    result = second.outputs[0]
    if perm != tuple(range(len(perm))):
        graph.set_input(second, 0, source)
        second.attributes = {**second.attributes, "perm": list(perm)}
        if not first.outputs[0].users:
            second.origin = first.origin + second.origin
    elif result.is_output:
        graph.set_input(second, 0, source)
        second.type, second.attributes = "Identity", {}
    else:
        graph.remove(second)
        graph.replace_uses(result, source)
    _drop_unused(graph, first)


def _pass_reshape(graph: RuntimeGraph, transpose: Op, op: Op, perm: Perm) -> None:
    """Transpose, then a Reshape that only splits dimensions: the other way round."""
    source, result = transpose.inputs[0], op.outputs[0]
    before = transpose.outputs[0].shape
    if source is None or before is None or result.shape is None:
        return
    if not _goes_away(transpose):
        return
    groups = _split_groups(before, result.shape)
    if groups is None:
        return
    inverse = _inverse(perm)
    made_shape = [result.shape[i] for axis in inverse for i in groups[axis]]
    order = [i for axis in inverse for i in groups[axis]]
    made = Tensor(f"{result.name}_r", tuple(made_shape), result.dtype)
    graph.set_input(op, 0, source)
    graph.set_output(op, 0, made)
    after = [order.index(i) for i in range(len(order))]
    graph.add(Op("Transpose", "", [made], [result], {"perm": after}, transpose.origin))
    _drop_unused(graph, transpose)


def _split_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[list[int]] | None:
    """Which dimensions each dimension becomes, or None where any are merged."""
    groups: list[list[int]] = []
    place = 0
    for size in before:
        taken: list[int] = []
        product = 1
        while place < len(after) and (product < size or not taken):
            product *= after[place]
            taken.append(place)
            place += 1
        if product != size or not taken:
            return None
        groups.append(taken)
    return groups if place == len(after) else None


def _drop_unused(graph: RuntimeGraph, op: Op) -> None:
    if op in graph and not any(t.users or t.is_output for t in op.outputs):
        graph.remove(op)
