"""How labels pass LSTM, GRU, RNN and Attention, operators with channels inside."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, dims_of, static_shape
from .flow import Flow, is_parameter, rule, where_is
from .labels import Track

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM", "GRU", "RNN")
def _recurrent(flow: Flow, node: ir.Node) -> None:
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    data, weight, state, bias, lengths, hidden, cell, peephole = inputs[:8]
    shape = static_shape(state)
    parameters = [v for v in (weight, state, bias, peephole) if v is not None]
    known = all(is_parameter(v) for v in parameters)
    if shape is None or not known or attribute(node, "layout", 0) or lengths is not None:
        flow.block_node(node, "its weights, layout or lengths are not followed")
        return
    assert weight is not None
    assert state is not None
    gates = _GATES[node.op_type]
    directions, size = shape[0], shape[2]
    ids = flow.labels.new(directions, size)
    flow.labels.must_balance(ids)
    taken = _input_labels(flow, node, data, weight)
    parts: list[tuple[ir.Value | None, int, bool]] = [(weight, gates, False), (state, gates, True)]
    parts += [(bias, 2 * gates, False), (peephole, 3, False)]
    for value, rows, squared in parts:
        if value is None:
            continue
        dims = static_shape(value) or ()
        finer = (directions, rows, size, *dims[2:])
        tracks = [_joint(ids, 0, 2)]
        if squared:
            tracks.append(_joint(ids, 0, 3))
        elif value is weight:
            tracks.append(Track((3,), taken))
        flow.view(value, finer, tracks)
        flow.use(node, value, "state", ids)
    for value in (hidden, cell):
        if value is not None:
            result = flow.operand(value, 3)
            own = type(result)("the state", (directions, 1, size), (_joint(ids, 0, 2),))
            flow.merge([own, result], node)
    for output, axes in zip(node.outputs, ((1, 3), (0, 2), (0, 2)), strict=False):
        flow.put(output, [_joint(ids, *axes)])


def _joint(ids: np.ndarray, outer: int, inner: int) -> Track:
    """Directions and units in them, or units alone where there is one direction."""
    return Track((inner,), ids[0]) if ids.shape[0] == 1 else Track((outer, inner), ids)


def _input_labels(flow: Flow, node: ir.Node, data: ir.Value | None, weight: ir.Value) -> np.ndarray:
    shape = static_shape(weight) or (0, 0, 0)
    taken = flow.labels.new(shape[2])
    reason = f"{where_is(node)}: this axis is time or the batch"
    kept = [flow.labels.uniform(t, (0, 1), reason) for t in flow.of(data)]
    own = next((t.ids for t in kept if t is not None and t.axes == (2,)), None)
    if own is None:
        flow.labels.block(taken, f"{where_is(node)}: its input's channels are not followed")
    else:
        flow.labels.unite(taken, own)
        flow.use(node, weight, "in", taken)
    return taken


@rule("Attention")
def _attention(flow: Flow, node: ir.Node) -> None:
    """Scores sum over what queries and keys have; values pass. Past keys are not followed."""
    query, key, value, *rest = node.inputs
    rank = len(dims_of(query) or ())
    if len(rest) > 1 and any(v is not None for v in rest[1:]):
        flow.block_node(node, "its past keys and values are not followed")
        return
    heads = [attribute(node, n, 0) for n in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    found = [_heads(flow, v, rank, h) for v, h in zip((query, key, value), heads, strict=True)]
    q, k, v = found
    if q is None or k is None or v is None or q.shape[0] % k.shape[0]:
        flow.block_node(node, "the channels of queries, keys or values are not followed")
        return
    for ids in (q, k, v):
        flow.labels.must_balance(ids)
    stems = flow.labels.new(q.shape[0])
    repeats = q.shape[0] // k.shape[0]
    wide = np.repeat(v, repeats, axis=0)
    flow.labels.unite(q, np.repeat(k, repeats, axis=0))
    flow.labels.stem(stems, q)
    flow.labels.stem(stems, wide)
    mask = rest[0] if rest else None
    dims = dims_of(mask) if mask is not None else None
    if mask is not None and (dims is None or (len(dims) > 2 and dims[-3] != 1)):
        flow.labels.block(stems, f"{where_is(node)}: its mask is for each head")
    out = Track((1, 3), wide) if rank == 4 else Track((2,), wide.reshape(-1))
    for i, output in enumerate(node.outputs):
        flow.put(output, [out] if i == 0 else [])


def _heads(flow: Flow, value: ir.Value | None, rank: int, heads: int) -> np.ndarray | None:
    """Labels [heads, dimensions]."""
    for track in flow.of(value):
        if rank == 4 and track.axes == (1, 3):
            return track.ids
        if rank == 4 and track.axes == (3,):
            dims = dims_of(value) or ()
            if isinstance(dims[1], int):
                return np.broadcast_to(track.ids, (dims[1], track.ids.size))
        if rank == 3 and heads and track.axes == (2,):
            return track.ids.reshape(heads, -1)
    return None
