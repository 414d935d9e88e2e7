"""Small fusions of floats that ONNX Runtime makes of what exporters leave behind.

Here: `tidy`, the first of its rewrites: operators spelled out, dead ones dropped, normalizations
folded into convolutions; and `fuse_pairs`, which comes after quantized operators are formed.
Not here: Gemms, Transposes, layouts (`ort_float`, `ort_transpose`, `ort_nchwc`).
"""

from __future__ import annotations

from ..ir.graph import constant_scalar, has_subgraphs
from ..ir.op_table import TABLE
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_UNREAD = -1
_HARDSWISH = {"alpha": 1 / 6, "beta": 0.5}


def tidy(graph: RuntimeGraph) -> None:
    """Spell out what has no kernel, drop what nobody reads, fold what follows a convolution."""
    for op in reversed(list(graph)):
        if not any(t.users or t.is_output for t in op.outputs):
            graph.remove(op)
    _share(graph)
    for op in graph:
        if op not in graph:
            continue
        if op.is_onnx("CastLike"):
            op.type = "Cast"
            graph.set_input(op, 1, None)
            del op.inputs[1:]
        elif op.is_onnx("HardSwish"):
            _spell_hardswish(graph, op)
        elif op.is_onnx("Mish"):
            _spell_mish(graph, op)
        elif op.is_onnx("Conv"):
            _fold_behind(graph, op)


def _share(graph: RuntimeGraph) -> None:
    """One operator for those that do the same with the same inputs.

    A CastLike is spelled out later than that, and stays.
    """
    first: dict[object, Op] = {}
    for op in graph:
        row = TABLE.get((op.domain, op.type))
        if row is None or not row.pure or op.type == "CastLike" or not op.inputs:
            continue
        if any(t.is_output for t in op.outputs) or any(has_subgraphs(n) for n in op.origin):
            continue
        key = (op.type, op.domain, tuple(op.inputs), len(op.outputs), repr(op.attributes))
        same = first.setdefault(key, op)
        if same is not op:
            for old, new in zip(op.outputs, same.outputs, strict=True):
                graph.replace_uses(old, new)
            graph.remove(op)


def join_slices(graph: RuntimeGraph) -> None:
    """Slices and Gathers that cut all of an axis into pieces, read by nothing else: one Split."""
    for op in graph:
        if op in graph and op.is_onnx("Slice", "Gather") and op.inputs[0] is not None:
            _join(graph, op.inputs[0])


def _join(graph: RuntimeGraph, data: Tensor) -> None:
    pieces = list(data.users)
    if len(pieces) < 2 or data.shape is None or data.is_output or data.constant:
        return
    found = [_cut(piece, data) for piece in pieces]
    cuts = sorted(cut for cut in found if cut is not None)
    if len(cuts) != len(pieces) or len({axis for axis, _, _ in cuts}) != 1:
        return
    if all(start == _UNREAD for _, start, _ in cuts):  # computed when the model is loaded
        place = 0
        for i, cut in enumerate(found):
            assert cut is not None
            found[i] = (cut[0], place, cut[2])
            place += cut[2]
        cuts = sorted(cut for cut in found if cut is not None)
    axis, place = cuts[0][0], 0
    for _, start, length in cuts:
        if start != place:
            return
        place += length
    if place != data.shape[axis]:
        return
    order = sorted(zip(found, pieces, strict=True), key=lambda pair: pair[0] or (0, 0, 0))
    origin = tuple(node for _, piece in order for node in piece.origin)
    outputs, squeezed = [], []
    for cut, piece in order:
        result = piece.outputs[0]
        if piece.type == "Gather" and cut is not None:
            shape = (*data.shape[:axis], cut[2], *data.shape[axis + 1 :])
            if result.shape != shape:  # by a number: the axis goes
                squeezed.append((Tensor(f"{result.name}_split", shape, data.dtype), result))
                result = squeezed[-1][0]
        outputs.append(result)
    for piece in pieces:
        graph.remove(piece)
    graph.add(Op("Split", "", [data], outputs, {"axis": axis}, origin))
    for part, result in squeezed:
        graph.add(Op("Squeeze", "", [part], [result]))


def _cut(op: Op, data: Tensor) -> tuple[int, int, int] | None:
    """The axis, start and length of a Slice or Gather that leaves all other axes whole."""
    result = op.outputs[0].shape
    if op.inputs[0] is not data or result is None or data.shape is None:
        return None
    if op.is_onnx("Gather"):
        return _picked(op, data.shape)
    if not op.is_onnx("Slice") or len(op.inputs) < 3 or op.inputs[1] is None:
        return None
    cut = [i for i, (a, b) in enumerate(zip(data.shape, result, strict=True)) if a != b]
    starts = op.inputs[1]
    start = None if starts.source is None else constant_scalar(starts.source)
    step = op.inputs[4] if len(op.inputs) > 4 else None
    if step is not None and (step.source is None or constant_scalar(step.source) != 1):
        return None
    if len(cut) != 1:
        return None
    if start is None:
        return cut[0], _UNREAD, result[cut[0]]
    size = data.shape[cut[0]]
    first = int(start) if start >= 0 else int(start) + size
    return cut[0], first, result[cut[0]]


def _picked(op: Op, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The axis, place and 1 where a Gather takes one place of an axis."""
    indices = op.inputs[1]
    index = None if indices is None or indices.source is None else constant_scalar(indices.source)
    if index is None:
        return None
    axis = int(op.attribute("axis", 0)) % len(shape)
    return axis, int(index) % shape[axis], 1


def fuse_pairs(graph: RuntimeGraph) -> None:
    """Two operators of which ONNX Runtime has one: x * Sigmoid(x), a sum and its normalization."""
    for op in graph:
        if op not in graph:
            continue
        if op.is_onnx("Sigmoid"):
            _to_quick_gelu(graph, op)
        elif op.is_onnx("LayerNormalization"):
            _to_skip_normalization(graph, op)


def _spell_hardswish(graph: RuntimeGraph, op: Op) -> None:
    source, result = op.inputs[0], op.outputs[0]
    if source is None:
        return
    gate = result.like(f"{result.name}_gate")
    graph.remove(op)
    graph.add(Op("HardSigmoid", "", [source], [gate], dict(_HARDSWISH)))
    graph.add(Op("Mul", "", [source, gate], [result], {}, op.origin))


def _spell_mish(graph: RuntimeGraph, op: Op) -> None:
    source, result = op.inputs[0], op.outputs[0]
    soft, gate = result.like(f"{result.name}_soft"), result.like(f"{result.name}_gate")
    graph.remove(op)
    graph.add(Op("Softplus", "", [source], [soft]))
    graph.add(Op("Tanh", "", [soft], [gate]))
    graph.add(Op("Mul", "", [source, gate], [result], {}, op.origin))


def _fold_behind(graph: RuntimeGraph, op: Op) -> None:
    """A normalization, or a product or sum with a constant a channel, goes into the weights."""
    while True:
        result = op.outputs[0]
        user = graph.only_user(result)
        if user is None or not all(t is None or t.constant for t in op.inputs[1:]):
            return
        others = [t for t in user.inputs if t is not result]
        if not all(t is not None and t.constant for t in others) or len(user.outputs) > 1:
            return
        if not user.is_onnx("BatchNormalization"):
            if not user.is_onnx("Mul", "Add") or len(others) != 1 or result.shape is None:
                return
            channels = result.shape[1]
            ones = (1,) * (len(result.shape) - 2)
            shape = others[0].shape if others[0] is not None else None
            if shape not in ((channels, *ones), (1, channels, *ones)):
                return
        bias = op.inputs[2] if len(op.inputs) > 2 else None
        if bias is None and not user.is_onnx("Mul") and result.shape is not None:
            made = Tensor(f"{result.name}_bias", (result.shape[1],), result.dtype, True)
            graph.set_input(op, 2, made)
        graph.remove(user)
        graph.set_output(op, 0, user.outputs[0])
        graph.renew(op)
        op.origin += user.origin


def _to_quick_gelu(graph: RuntimeGraph, op: Op) -> None:
    """x * Sigmoid(x), or x * Sigmoid(number * x)."""
    source, gate = op.inputs[0], op.outputs[0]
    user = graph.only_user(gate)
    if user is None or not user.is_onnx("Mul") or source is None:
        return
    scaled = source.producer
    if not any(t is source for t in user.inputs) and scaled is not None:
        if not scaled.is_onnx("Mul") or graph.only_user(source) is not op:
            return
        a, b = scaled.inputs
        for data, number in ((a, b), (b, a)):
            if number is None or data is None or not number.constant or number.elements != 1:
                continue
            if any(t is data for t in user.inputs):
                graph.set_input(op, 0, data)
                graph.remove(scaled)
                op.origin = scaled.origin + op.origin
                source = data
                break
    if not any(t is source for t in user.inputs):
        return
    graph.remove(user)
    graph.remove(op)
    origin = op.origin + user.origin
    graph.add(Op("QuickGelu", CONTRIB, [source], user.outputs, {"alpha": 1.0}, origin))


def _to_skip_normalization(graph: RuntimeGraph, op: Op) -> None:
    """Add of two equal shapes, then LayerNormalization over the last axis."""
    total = op.inputs[0]
    add = total.producer if total is not None else None
    if add is None or total is None or not add.is_onnx("Add") or len(op.outputs) > 1:
        return
    if graph.only_user(total) is not op or total.shape is None or len(total.shape) != 3:
        return
    if int(op.attribute("axis", -1)) not in (-1, len(total.shape) - 1):
        return
    if any(t is None or t.shape != total.shape for t in add.inputs):
        return
    graph.remove(add)
    graph.remove(op)
    inputs = [*add.inputs, *op.inputs[1:]]
    origin = add.origin + op.origin
    graph.add(Op("SkipLayerNormalization", CONTRIB, inputs, op.outputs, {}, origin))
