"""Channels last: which quantized operators ONNX Runtime runs so, and the Transposes around them.

Here: `move_channels_last`, its last rewrite. Not here: blocked channels of floats (`ort_nchwc`).
"""

from __future__ import annotations

from .ort_transpose import push_transposes
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_POOLS = ("QLinearAveragePool", "QLinearGlobalAveragePool")
_PLAIN = {
    "QLinearAdd": "Add",
    "QLinearMul": "Mul",
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearConcat": "Concat",
    **dict.fromkeys(_POOLS, "Abs"),
}
"""Transposes pass these as they pass operators on floats, of which these stand in for them."""


def move_channels_last(graph: RuntimeGraph) -> None:
    """Let integer convolutions and pools work on channels last, and move the Transposes."""
    chosen = [
        op
        for op in graph
        if (op.type == "QLinearConv" and not op.domain) or op.type == "NhwcMaxPool"
    ]
    for op in chosen:
        _to_channels_last(graph, op)
    if not chosen:
        return
    dressed = _undress(graph)
    push_transposes(graph)
    _dress(graph, dressed)
    for op in reversed(list(graph)):
        if op.is_onnx("Transpose") and not any(t.users or t.is_output for t in op.outputs):
            graph.remove(op)
    graph.sort()


def _to_channels_last(graph: RuntimeGraph, op: Op) -> None:
    source, result = op.inputs[0], op.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(source.shape) < 3:
        return
    rank = len(source.shape)
    to_last = [0, *range(2, rank), 1]
    to_first = [0, rank - 1, *range(1, rank - 1)]
    before = Tensor(f"{source.name}_nhwc", tuple(source.shape[p] for p in to_last), source.dtype)
    after = Tensor(f"{result.name}_nhwc", tuple(result.shape[p] for p in to_last), result.dtype)
    graph.add(Op("Transpose", "", [source], [before], {"perm": to_last}))
    graph.set_input(op, 0, before)
    graph.set_output(op, 0, after)
    op.domain = CONTRIB
    op.attributes = {**op.attributes, "channels_last": 1}
    graph.renew(op)
    graph.add(Op("Transpose", "", [after], [result], {"perm": to_first}))


# --- operators that Transposes pass ----------------------------------------------------------

_Kept = tuple[str, list[Tensor | None], tuple[int, ...] | None]


def _undress(graph: RuntimeGraph) -> dict[Op, _Kept]:
    """Quantized operators on their data alone, as plain operators; and what was taken off."""
    kept: dict[Op, _Kept] = {}
    for op in graph:
        if op.domain == CONTRIB and op.type in _PLAIN:
            kept[op] = op.type, list(op.inputs), op.outputs[0].shape
            _set_inputs(graph, op, op.inputs[_places(op.type)])
            op.type, op.domain = _PLAIN[op.type], ""
    return kept


def _places(kind: str) -> slice:
    """Where the data are among a quantized operator's inputs."""
    if kind == "QLinearConcat":
        return slice(2, None, 3)
    return slice(0, 6, 3) if kind in ("QLinearAdd", "QLinearMul") else slice(0, 1)


def _dress(graph: RuntimeGraph, kept: dict[Op, _Kept]) -> None:
    for op, (kind, inputs, shape) in kept.items():
        inputs[_places(kind)] = list(op.inputs)
        _set_inputs(graph, op, inputs)
        op.type, op.domain = kind, CONTRIB
        if kind in _POOLS and op.outputs[0].shape != shape:
            op.attributes = {**op.attributes, "channels_last": 1}


def _set_inputs(graph: RuntimeGraph, op: Op, inputs: list[Tensor | None]) -> None:
    inputs = list(inputs)
    for index in range(len(op.inputs)):
        graph.set_input(op, index, None)
    op.inputs.clear()
    for index, tensor in enumerate(inputs):
        graph.set_input(op, index, tensor)
