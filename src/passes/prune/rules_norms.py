"""How labels pass normalizations.

Statistics of each channel (BatchNormalization, InstanceNormalization) leave channels apart. Those
over channels (LayerNormalization, RMSNormalization, GroupNormalization) change with the channels
that are there: such widths are removed only on request, and `remove` makes up for the count.
"""

from __future__ import annotations

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
    channels = _channels(flow, data, range(2, rank))
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
        if over and 1 not in track.axes:
            flow.labels.block(track.ids, f"{where_is(node)}: {_WIDTH}")
    channels = _channels(flow, data, range(2, len(dims)))
    if channels is None:
        for value in node.inputs[1:]:
            flow.block(value, f"{where_is(node)}: its input's channels are not followed")
    else:
        for value in node.inputs[1:]:
            unite_vector(flow, node, value, channels.ids, "norm")
    # channels in groups go by whole groups: the statistics of others stay
    flow.put(node.outputs[0], flow.of(data))


def _channels(flow: Flow, data: ir.Value | None, spatial: range) -> Track | None:
    for track in flow.of(data):
        if 1 in track.axes:
            return flow.labels.uniform(track, spatial)
    return None


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer(flow: Flow, node: ir.Node) -> None:
    data, *parameters = node.inputs
    dims = dims_of(data)
    if data is None or dims is None:
        flow.block_node(node, "its shape is not known")
        return
    axis = attribute(node, "axis", -1)
    axis += len(dims) if axis < 0 else 0
    for track in flow.of(data):
        over = [a for a in track.axes if a >= axis]
        if not over:
            continue
        if not flow.widths or len(track.axes) > 1 or axis != len(dims) - 1:
            wish = "widths" if len(track.axes) == 1 and axis == len(dims) - 1 else ""
            flow.labels.block(track.ids, f"{where_is(node)}: {_WIDTH}", wish)
    operands = [flow.operand(data, len(dims))]
    operands += [flow.operand(p, len(dims)) for p in parameters if p is not None]
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
    channels = _channels(flow, data, range(2, rank))
    groups = int(attribute(node, "num_groups", 1))
    if channels is None or channels.ids.ndim != 1 or channels.ids.size % groups:
        flow.block_node(node, "its input's channels are not followed")
        return
    if groups == 1:
        flow.labels.block(channels.ids, f"{where_is(node)}: {_WIDTH}")
    rows = channels.ids.reshape(groups, -1)
    flow.labels.unite(rows, rows[:, :1])  # whole groups go: others keep their statistics
    for value in node.inputs[1:]:
        per_group = value is not None and dims_of(value) == (groups,)
        ids = rows[:, 0] if per_group and rows.shape[1] > 1 else channels.ids
        unite_vector(flow, node, value, ids, "norm")
    flow.put(node.outputs[0], [channels])
