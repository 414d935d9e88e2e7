"""How labels pass normalizations.

Statistics of each channel (BatchNormalization, InstanceNormalization) leave channels apart. Those
over channels (LayerNormalization, RMSNormalization, GroupNormalization) change with the channels
that are there: such widths are removed only on request, and `remove` makes up for the count.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...ir.graph import attribute, dims_of
from .flow import Flow, rule, where_is
from .labels import Track
from .rules import unite_vector

_WIDTH = "takes statistics over these channels"


@rule("BatchNormalization")
def _batch(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    rank = len(dims_of(data) or ())
    channels = _channels(flow, node, data, range(2, rank))
    if channels is None:
        flow.block_node(node, "its input's channels are not followed")
        return
    for value in node.inputs[1:]:
        unite_vector(flow, node, value, channels.ids, "norm")
    for i, output in enumerate(node.outputs):
        flow.put(output, [channels] if i == 0 else [])


@rule("InstanceNormalization")
def _instance(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    dims = dims_of(data) or ()
    for track in flow.of(data):
        over = [a for a in track.axes if a > 1]
        if over and 1 not in track.axes and not flow.widths:
            flow.labels.block(track.ids, f"{where_is(node)}: {_WIDTH}", "widths")
    channels = _channels(flow, node, data, range(2, len(dims)))
    if channels is None:
        for value in node.inputs[1:]:
            flow.block(value, f"{where_is(node)}: its input's channels are not followed")
    else:
        for value in node.inputs[1:]:
            unite_vector(flow, node, value, channels.ids, "norm")
    # channels in groups go by whole groups: the statistics of others stay
    flow.put(node.outputs[0], flow.of(data))


def _channels(flow: Flow, node: ir.Node, data: ir.Value | None, spatial: range) -> Track | None:
    for track in flow.of(data):
        if 1 in track.axes:
            axes = () if flow.widths and node.op_type == "InstanceNormalization" else spatial
            left = flow.labels.uniform(track, axes, f"{where_is(node)}: {_WIDTH}")
            return None if left is None else flow.labels.contract(left, spatial)
    return None


def _over(flow: Flow, node: ir.Node, track: Track, axes: range) -> Track:
    """A track under statistics over `axes`: inside of heads these keep their size."""
    over = [a for a in track.axes if a in axes]
    if not over or flow.widths:
        return track
    reason = f"{where_is(node)}: {_WIDTH}"
    if len(over) < len(track.axes):
        return flow.labels.uniform(track, over, reason) or track
    flow.labels.block(track.ids, reason, "widths")
    return track


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer(flow: Flow, node: ir.Node) -> None:
    data, *parameters = node.inputs
    dims = dims_of(data)
    if data is None or dims is None:
        flow.block_node(node, "its shape is not known")
        return
    axis = attribute(node, "axis", -1)
    axis += len(dims) if axis < 0 else 0
    tracks = [_over(flow, node, t, range(axis, len(dims))) for t in flow.of(data)]
    held = {a for t in tracks for a in t.axes}
    operands = [dataclasses.replace(flow.operand(data, len(dims)), tracks=tuple(tracks))]
    for value in parameters:
        own = len(dims_of(value) or ())
        if value is not None and held & set(range(len(dims) - own, len(dims))):
            operands.append(flow.operand(value, len(dims)))
    merged = flow.merge(operands, node)
    for value in parameters:
        scale = flow.at(value, 0)
        if scale is not None and scale.axes == (0,):
            flow.use(node, value, "norm", scale.ids)
    for i, output in enumerate(node.outputs):
        flow.put(output, merged if i == 0 else [])


@rule("GroupNormalization")
def _group(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    rank = len(dims_of(data) or ())
    channels = _channels(flow, node, data, range(2, rank))
    groups = int(attribute(node, "num_groups", 1))
    if channels is None or channels.ids.ndim != 1 or channels.ids.size % groups:
        flow.block_node(node, "its input's channels are not followed")
        return
    rows = channels.ids.reshape(groups, -1)
    if groups > 1:
        flow.labels.unite(rows, rows[:, :1])  # whole groups go: others keep their statistics
    elif not flow.widths:
        flow.labels.block(channels.ids, f"{where_is(node)}: {_WIDTH}", "widths")
    for value in node.inputs[1:]:
        per_group = value is not None and dims_of(value) == (groups,)
        ids = rows[:, 0] if per_group and rows.shape[1] > 1 else channels.ids
        unite_vector(flow, node, value, ids, "norm")
    flow.put(node.outputs[0], [channels])
