"""How labels pass operators that pick elements by computed places.

What is picked along the axis keeps its size there; other axes pass. Not here: Gather by constants
(`rules_movement`).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...ir.graph import attribute, dims_of
from .flow import Flow, rule, where_is
from .labels import Operand


@rule("GatherElements", "ScatterElements")
def _by_element(flow: Flow, node: ir.Node) -> None:
    """Data and indices have the same positions along all axes but one."""
    values = [v for v in node.inputs if v is not None]
    dims = [dims_of(v) or () for v in values]
    rank = len(dims[0])
    if not all(len(d) == rank for d in dims):
        flow.block_node(node, "its shape is not known")
        return
    axis = int(attribute(node, "axis", 0))
    axis += rank if axis < 0 else 0
    uneven = [a for a in range(rank) if a != axis and len({str(d[a]) for d in dims}) > 1]
    operands = []
    for value in values:
        for track in flow.of(value):
            if set(track.axes) & set(uneven):
                flow.labels.block(track.ids, f"{where_is(node)}: picks some of this axis")
        operands.append(_beside(flow, node, value, axis, rank))
    flow.put(node.outputs[0], flow.merge(operands, node))


def _beside(flow: Flow, node: ir.Node, value: ir.Value, axis: int, rank: int) -> Operand:
    """An operand without its tracks along an axis."""
    whole = flow.operand(value, rank)
    reason = f"{where_is(node)}: picks from this axis"
    left = [flow.labels.uniform(t, [axis], reason) for t in whole.tracks]
    dims = tuple(1 if a == axis else d for a, d in enumerate(whole.dims))
    tracks = tuple(t for t in left if t is not None)
    return dataclasses.replace(whole, dims=dims, tracks=tracks, adopt=None)
