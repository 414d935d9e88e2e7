"""How labels pass Attention and RotaryEmbedding, operators with heads inside.

Not here: attention written in products and Softmax, which needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, dims_of
from .flow import Flow, rule, where_is
from .labels import Track


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
    if q is None or k is None or v is None or q.shape[0] % k.shape[0] or _grows(flow, node):
        flow.block_node(node, "the channels of queries, keys or values are not followed")
        return
    for part, ids in zip((query, key, value), (q, k, v), strict=True):
        flow.labels.must_balance(ids)
        _hold_others(flow, node, part, {1, 3} if rank == 4 else {2})
    repeats = q.shape[0] // k.shape[0]
    wide = np.repeat(v, repeats, axis=0)
    flow.labels.unite(q, np.repeat(k, repeats, axis=0))
    _tie_heads(flow, node, (q, wide), rest[0] if rest else None)
    out = Track((1, 3), wide) if rank == 4 else Track((2,), wide.reshape(-1))
    for i, output in enumerate(node.outputs):
        flow.put(output, [out] if i == 0 else [])


def _grows(flow: Flow, node: ir.Node) -> bool:
    """Whether it gives out keys, values or scores, whose sizes are then somebody else's."""
    return any(o.uses() or o.is_graph_output() for o in node.outputs[1:])


def _tie_heads(
    flow: Flow, node: ir.Node, parts: Sequence[np.ndarray], mask: ir.Value | None
) -> None:
    """Heads go with those of the mask, where it has them."""
    stems = flow.labels.new(parts[0].shape[0])
    for ids in parts:
        flow.labels.stem(stems, ids)
    dims = dims_of(mask) if mask is not None else ()
    axis = len(dims or ()) - 3
    if mask is None or dims is None:
        if mask is not None:
            flow.labels.block(stems, f"{where_is(node)}: its mask's shape is not known")
        return
    reason = f"{where_is(node)}: a mask for each head, which is not followed"
    own = flow.at(mask, axis) if axis >= 0 else None
    if own is not None and own.axes == (axis,) and own.ids.shape == stems.shape:
        flow.labels.unite(stems, own.ids)
    elif axis >= 0 and dims[axis] != 1:
        flow.labels.block(stems, reason)
    for track in flow.of(mask):
        if track.axes != (axis,) or track.ids.shape != stems.shape:
            flow.labels.block(track.ids, reason)


def _heads(flow: Flow, value: ir.Value | None, rank: int, heads: int) -> np.ndarray | None:
    """Labels [heads, dimensions]."""
    dims = dims_of(value) or ()
    if rank == 3 and heads:
        track = next((t for t in flow.of(value) if t.axes == (2,)), None)
        return None if track is None else track.ids.reshape(heads, -1)
    if rank != 4 or not isinstance(dims[1], int) or not isinstance(dims[3], int):
        return None
    track = flow.at(value, 3) or flow.at(value, 1)
    if track is None or not set(track.axes) <= {1, 3}:
        return None
    order = np.argsort(track.axes)
    missing = [i for i, a in enumerate((1, 3)) if a not in track.axes]
    ids = np.expand_dims(track.ids.transpose(order), tuple(missing))
    return np.broadcast_to(ids, (dims[1], dims[3]))


def _hold_others(flow: Flow, node: ir.Node, value: ir.Value | None, axes: set[int]) -> None:
    """What is along axes other than these stays."""
    for track in flow.of(value):
        if not set(track.axes) <= axes:
            flow.labels.block(track.ids, f"{where_is(node)}: works along this axis")


@rule("RotaryEmbedding")
def _rotary(flow: Flow, node: ir.Node) -> None:
    """Pairs of dimensions turn together, by an angle that is the same in all heads (Su et al. 2021,
    "RoFormer", arXiv:2104.09864).
    """
    data, *tables = node.inputs
    rank = len(dims_of(data) or ())
    count = int(attribute(node, "num_heads", 0))
    ids = _heads(flow, data, rank, count)
    angles = [flow.at(v, len(dims_of(v) or ()) - 1) for v in tables[:2]]
    if ids is None:
        flow.block_node(node, "the channels it turns are not followed")
        return
    _hold_others(flow, node, data, {1, 3} if rank == 4 else {2})
    for table in tables:
        _hold_others(flow, node, table, {len(dims_of(table) or ()) - 1})
    turned = int(attribute(node, "rotary_embedding_dim", 0)) or ids.shape[1]
    pairs = _pairs(ids[:, :turned], interleaved=bool(attribute(node, "interleaved", 0)))
    flow.labels.unite(pairs[..., 0], pairs[..., 1])
    if any(a is None or a.ids.shape != (turned // 2,) for a in angles):
        reason = f"{where_is(node)}: its angles are not followed"
        for table in tables[:2]:
            flow.block(table, reason)
        # dimensions stay, heads may go
        flow.labels.hold(Track((1, 0), ids.T), [1], reason)
    else:
        flow.labels.must_balance(ids)
        for angle in angles:
            assert angle is not None
            flow.labels.column(angle.ids, pairs[..., 0])
    out = Track((1, 3), ids) if rank == 4 else Track((2,), ids.reshape(-1))
    flow.put(node.outputs[0], [out])


def _pairs(ids: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """[heads, pairs, 2]: neighbours, or each of the first half with its like in the second."""
    if interleaved:
        return ids.reshape(ids.shape[0], -1, 2)
    return ids.reshape(ids.shape[0], 2, -1).transpose(0, 2, 1)
