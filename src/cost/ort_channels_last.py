"""Channels last: how ONNX Runtime lays out its integer convolutions and poolings.

Here: `channels_last`, the last of its rewrites. Each such operator gets a Transpose before and
behind it, which then move until they meet and cancel. Not here: forming integer operators
(`ort_integer`), blocked channels of floats (`ort_nchwc`).
"""

from __future__ import annotations

from .ort_transpose import push_transposes
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor


def channels_last(graph: RuntimeGraph) -> None:
    """Let QLinearConv read and write channels last; comes after `ort_float.fuse`."""
    chosen = [op for op in graph if _prefers_last(op)]
    moved: dict[Tensor, Tensor] = {}
    for op in chosen:
        _wrap(graph, op, moved)
    if chosen:
        push_transposes(graph)
        for op in graph:
            if op.is_onnx("Transpose"):
                _pair_up(graph, op)
        graph.sort()


def _pair_up(graph: RuntimeGraph, op: Op) -> None:
    """A Transpose that stopped between a pair and floats gets the other half on its far side."""
    source, result = op.inputs[0], op.outputs[0]
    pair = source.producer if source is not None else None
    if pair is None or source is None or pair.type != "DequantizeLinear":
        return
    if any(user.type == "QuantizeLinear" for user in result.users):
        return
    floats = source.like(f"{source.name}_moved")
    floats.shape = result.shape
    stored = result.like(f"{result.name}_q", pair.inputs[0].dtype if pair.inputs[0] else None)
    graph.set_output(op, 0, floats)
    numbers = pair.inputs[1:]
    graph.add(Op("QuantizeLinear", "", [floats, *numbers], [stored], dict(pair.attributes)))
    graph.add(Op("DequantizeLinear", "", [stored, *numbers], [result], dict(pair.attributes)))


def _prefers_last(op: Op) -> bool:
    source = op.inputs[0] if op.inputs else None
    if source is None or source.shape is None or len(source.shape) < 3 or op.domain:
        return False
    return op.type == "QLinearConv"


def _wrap(graph: RuntimeGraph, op: Op, moved: dict[Tensor, Tensor]) -> None:
    source, result = op.inputs[0], op.outputs[0]
    assert source is not None
    assert source.shape is not None
    rank = len(source.shape)
    last = [0, *range(2, rank), 1]
    first = [0, rank - 1, *range(1, rank - 1)]
    if result.shape is None:
        return
    before = moved.get(source)
    if before is None:
        before = Tensor(f"{source.name}_nhwc", tuple(source.shape[i] for i in last), source.dtype)
        graph.add(Op("Transpose", "", [source], [before], {"perm": last}))
        moved[source] = before
    behind = Tensor(f"{result.name}_nhwc", tuple(result.shape[i] for i in last), result.dtype)
    graph.set_input(op, 0, before)
    graph.set_output(op, 0, behind)
    op.domain = CONTRIB
    op.attributes = {**op.attributes, "channels_last": 1}
    graph.renew(op)
    graph.add(Op("Transpose", "", [behind], [result], {"perm": first}))
