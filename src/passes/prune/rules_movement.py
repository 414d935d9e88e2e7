"""How labels pass operators that move elements: layout, joining, cutting, repeating.

Not here: what such nodes become when channels go (`resize`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_array, dims_of, static_shape
from .flow import Flow, rule, where_is
from .labels import Dim, Labels, Track, reshape

IntList = list[int]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(flow: Flow, node: ir.Node) -> None:
    data, output = node.inputs[0], node.outputs[0]
    before, after = dims_of(data), dims_of(output)
    if data is None or before is None or after is None:
        flow.block_node(node, "its shape is not known")
        return
    flow.put(output, reshape(flow.labels, flow.of(data), before, after, where_is(node)))


@rule("Transpose")
def _transpose(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    rank = len(dims_of(data) or ())
    order = [int(a) for a in attribute(node, "perm", None) or reversed(range(rank))]
    to = {source: place for place, source in enumerate(order)}
    flow.put(node.outputs[0], [t.moved(to) for t in flow.of(data)])


@rule("Shape")
def _shape(flow: Flow, node: ir.Node) -> None:
    """Sizes of channels may be read: what is computed with them goes on with the old ones
    (`resize`), so that it stays as it was. Reshapes are told the new ones."""
    flow.put(node.outputs[0], ())
    if node.outputs[0].is_graph_output():
        flow.block(node.inputs[0], f"{where_is(node)}: the number of channels is an output")


@rule("Size")
def _size(flow: Flow, node: ir.Node) -> None:
    flow.put(node.outputs[0], ())
    flow.block(node.inputs[0], f"{where_is(node)}: the number of channels is computed with")


# --- joining -----------------------------------------------------------------------------------


@rule("Concat")
def _concat(flow: Flow, node: ir.Node) -> None:
    output = node.outputs[0]
    dims = dims_of(output)
    if dims is None:
        flow.block_node(node, "its shape is not known")
        return
    axis = int(attribute(node, "axis", 0))
    axis += len(dims) if axis < 0 else 0
    values = [v for v in node.inputs if v is not None]
    flow.put(output, join(flow, node, values, axis, len(dims)))


def join(
    flow: Flow, node: ir.Node, values: Sequence[ir.Value], axis: int, rank: int
) -> list[Track]:
    """The tracks of tensors put one after the other along an axis."""
    along = [flow.at(v, axis) for v in values]
    others = []
    for value in values:
        operand = flow.operand(value, rank)
        tracks = tuple(t for t in operand.tracks if axis not in t.axes)
        dims = tuple(1 if a == axis else d for a, d in enumerate(operand.dims))
        # an axis that another operand holds in one track with the joined one is settled below
        others.append(type(operand)(operand.what, dims, tracks, None))
    joint = {a for t in along if t is not None for a in t.axes}
    separate = [
        type(o)(
            o.what,
            tuple(1 if a in joint else d for a, d in enumerate(o.dims)),
            tuple(t for t in o.tracks if not set(t.axes) & joint),
            None,
        )
        for o in others
    ]
    found = list(flow.merge(separate, node))
    if any(t is not None for t in along):
        joined = _joined(flow, node, values, axis, along, others)
        if joined is not None:
            found.append(joined)
    return found


def _joined(
    flow: Flow,
    node: ir.Node,
    values: Sequence[ir.Value],
    axis: int,
    along: Sequence[Track | None],
    others: Sequence[object],
) -> Track | None:
    reference = max((t for t in along if t is not None), key=lambda t: len(t.axes))
    place = reference.axes.index(axis)
    parts = []
    for value, track in zip(values, along, strict=True):
        dims: tuple[Dim, ...] = dims_of(value) or ()
        size = dims[axis]
        if not isinstance(size, int):
            _block_all(flow, node, along, "the sizes that are joined are not known")
            return None
        shape = list(reference.ids.shape)
        shape[place] = size
        if track is None:
            ids = flow.labels.new(size)
            flow.labels.block(ids, f"{where_is(node)}: {value.name!r} is not followed")
            track = Track((axis,), ids)
        if not set(track.axes) <= set(reference.axes) or _out_of_order(track, reference):
            _block_all(flow, node, along, "axes are combined in two ways")
            return None
        missing = [i for i, a in enumerate(reference.axes) if a not in track.axes]
        loose = [a for a in reference.axes if a not in track.axes and dims[a] != 1]
        if axis in track.axes and loose:
            reason = f"{where_is(node)}: {value.name!r} is not followed"
            flow.labels.hold(reference, loose, reason)
        parts.append(np.broadcast_to(np.expand_dims(track.ids, tuple(missing)), shape))
    return Track(reference.axes, np.concatenate(parts, axis=place))


def _out_of_order(track: Track, reference: Track) -> bool:
    places = [reference.axes.index(a) for a in track.axes if a in reference.axes]
    return places != sorted(places)


def _block_all(flow: Flow, node: ir.Node, tracks: Sequence[Track | None], why: str) -> None:
    flow.labels.block_tracks([t for t in tracks if t is not None], f"{where_is(node)}: {why}")


# --- cutting -----------------------------------------------------------------------------------


@rule("Split")
def _split(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    dims = dims_of(data)
    sizes = [(dims_of(o) or (None,)) for o in node.outputs]
    if data is None or dims is None:
        flow.block_node(node, "its shape is not known")
        return
    axis = int(attribute(node, "axis", 0))
    axis += len(dims) if axis < 0 else 0
    start = 0
    for output, own in zip(node.outputs, sizes, strict=True):
        size = own[axis] if len(own) == len(dims) else None
        tracks = []
        for track in flow.of(data):
            if axis not in track.axes:
                tracks.append(track)
            elif isinstance(size, int):
                tracks.append(_cut(track, axis, slice(start, start + size)))
            else:
                flow.labels.block(track.ids, f"{where_is(node)}: the sizes are not known")
        flow.put(output, tracks)
        start += size if isinstance(size, int) else 0


def _cut(track: Track, axis: int, part: slice | np.ndarray) -> Track:
    index: list[slice | np.ndarray] = [slice(None)] * track.ids.ndim
    index[track.axes.index(axis)] = part
    return Track(track.axes, track.ids[tuple(index)])


def slice_parts(node: ir.Node, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """(start, end, step) by axis of a Slice; None when they are computed."""
    if len(node.inputs) == 1:
        starts, ends = attribute(node, "starts", ()), attribute(node, "ends", ())
        axes = attribute(node, "axes", None) or range(len(starts))
        steps: Sequence[int] = [1] * len(starts)
    else:
        arrays = [constant_array(v) if v is not None else None for v in node.inputs[1:]]
        given = [v is not None for v in node.inputs[1:]]
        if any(a is None and g for a, g in zip(arrays, given, strict=True)) or len(arrays) < 2:
            return None
        flat = [None if a is None else [int(x) for x in a.reshape(-1)] for a in arrays]
        starts, ends = flat[0] or (), flat[1] or ()
        axes = (flat[2] if len(flat) > 2 else None) or range(len(starts))
        steps = (flat[3] if len(flat) > 3 else None) or [1] * len(starts)
    return {
        (int(a) + rank if a < 0 else int(a)): (int(s), int(e), int(k))
        for s, e, a, k in zip(starts, ends, axes, steps, strict=True)
    }


@rule("Slice")
def _slice(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    dims = dims_of(data)
    parts = slice_parts(node, len(dims)) if dims is not None else None
    if data is None or dims is None or parts is None:
        axes = _slice_axes(node, len(dims or ()))
        _pass_other_axes(flow, node, axes, "where it cuts is computed")
        return
    tracks = []
    for track in flow.of(data):
        for axis, (start, end, step) in parts.items():
            if axis not in track.axes:
                continue
            size = track.ids.shape[track.axes.index(axis)]
            if abs(step) > 1:
                _tie_strides(flow, track, axis, abs(step))
            track = _cut(track, axis, slice(*_bounds(start, end, step, size), step))
        tracks.append(track)
    flow.put(node.outputs[0], [t for t in tracks if t.ids.size])


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None]:
    """The bounds of a Slice as Python's: an end before the first element is None."""
    if step < 0 and end < -size:
        return start, None
    return start, end


def _tie_strides(flow: Flow, track: Track, axis: int, step: int) -> None:
    """Every `step`th stays every `step`th when whole runs of that length go."""
    ids = np.moveaxis(track.ids, track.axes.index(axis), -1)
    if ids.shape[-1] % step:
        flow.labels.block(ids, "cut in strides that do not divide it")
        return
    runs = ids.reshape(*ids.shape[:-1], -1, step)
    flow.labels.unite(runs, runs[..., :1])


def _slice_axes(node: ir.Node, rank: int) -> IntList | None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    array = constant_array(node.inputs[3])
    return None if array is None else [int(a) % max(rank, 1) for a in array.reshape(-1)]


def _pass_other_axes(flow: Flow, node: ir.Node, axes: IntList | None, why: str) -> None:
    """Tracks that do not hold `axes` pass; labels along these stay."""
    kept = []
    for track in flow.of(node.inputs[0]):
        held = track.axes if axes is None else [a for a in axes if a in track.axes]
        left = (
            flow.labels.uniform(track, held, f"{where_is(node)}: {why}")
            if axes is not None
            else None
        )
        if left is None:
            flow.labels.block(track.ids, f"{where_is(node)}: {why}")
        else:
            kept.append(left)
    for output in node.outputs:
        flow.put(output, kept)


@rule("Gather")
def _gather(flow: Flow, node: ir.Node) -> None:
    data, indices = node.inputs[:2]
    dims, picked = dims_of(data), dims_of(indices)
    if data is None or indices is None or dims is None or picked is None:
        flow.block_node(node, "its shape is not known")
        return
    axis = int(attribute(node, "axis", 0))
    axis += len(dims) if axis < 0 else 0
    to = {a: a if a < axis else a + len(picked) - 1 for a in range(len(dims)) if a != axis}
    array = constant_array(indices)
    tracks = []
    for track in flow.of(data):
        if axis not in track.axes:
            tracks.append(track.moved(to))
        elif array is None:
            left = flow.labels.uniform(
                track, [axis], f"{where_is(node)}: what it picks is computed"
            )
            if left is not None:
                tracks.append(left.moved(to))
        else:
            chosen = _chosen(flow.labels, track, axis, array.astype(np.int64), to)
            if chosen is not None:
                tracks.append(chosen)
    table = flow.at(data, len(dims) - 1)
    if data.is_initializer() and axis == 0 and table is not None and table.axes == (len(dims) - 1,):
        flow.use(node, data, "table", table.ids)
    flow.put(node.outputs[0], tracks)


def _chosen(
    labels: Labels, track: Track, axis: int, indices: np.ndarray, to: dict[int, int]
) -> Track | None:
    place = track.axes.index(axis)
    if indices.ndim > 0 and place == track.ids.ndim - 1 and place > 0:
        labels.unite_along(track.ids, range(place))  # one index for all rows
    ids = track.ids.take(indices % track.ids.shape[place], axis=place)
    axes: list[int] = []
    for a in track.axes:
        axes += [axis + i for i in range(indices.ndim)] if a == axis else [to[a]]
    if not axes:
        labels.block(ids, "one channel is picked out")
        return None
    return Track(tuple(axes), ids)


@rule("GatherND")
def _gather_nd(flow: Flow, node: ir.Node) -> None:
    data, indices = node.inputs[:2]
    dims, shape = dims_of(data), static_shape(indices)
    if dims is None or shape is None or attribute(node, "batch_dims", 0):
        flow.block_node(node)
        return
    depth = shape[-1]
    kept = []
    for track in flow.of(data):
        left = flow.labels.uniform(track, range(depth), f"{where_is(node)}: picks from this axis")
        if left is not None:
            kept.append(
                left.moved({a: a - depth + len(shape) - 1 for a in range(depth, len(dims))})
            )
    flow.put(node.outputs[0], kept)


# --- repeating and filling ---------------------------------------------------------------------


@rule("Expand")
def _expand(flow: Flow, node: ir.Node) -> None:
    data, output = node.inputs[0], node.outputs[0]
    before, after = dims_of(data), dims_of(output)
    if data is None or before is None or after is None:
        flow.block_node(node, "its shape is not known")
        return
    shift = len(after) - len(before)
    tracks = [t.moved({a: a + shift for a in t.axes}) for t in flow.of(data)]
    if not tracks:  # of what is the same everywhere (a mask for all heads) any part may go
        for axis, size in enumerate(after):
            one = axis < shift or before[axis - shift] == 1
            if one and isinstance(size, int) and size > 1:
                tracks.append(Track((axis,), flow.labels.new(size)))
    flow.put(output, tracks)


@rule("Tile")
def _tile(flow: Flow, node: ir.Node) -> None:
    repeats = constant_array(node.inputs[1])
    before, after = dims_of(node.inputs[0]) or (), dims_of(node.outputs[0]) or ()
    tracks = []
    for track in flow.of(node.inputs[0]):
        times = [
            int(repeats[a]) if repeats is not None else _times(before, after, a) for a in track.axes
        ]
        if not all(times):
            flow.labels.block(track.ids, f"{where_is(node)}: how often it repeats is not known")
            continue
        tracks.append(Track(track.axes, np.tile(track.ids, times)))
    flow.put(node.outputs[0], tracks)


def _times(before: Sequence[Dim], after: Sequence[Dim], axis: int) -> int:
    """How often an axis is repeated, by its sizes; 0 when they are not known."""
    if axis >= len(after):
        return 0
    old, new = before[axis], after[axis]
    return new // old if isinstance(old, int) and isinstance(new, int) else 0


def pads_of(node: ir.Node, rank: int) -> list[tuple[int, int]] | None:
    """(before, after) for each axis of a Pad, or None when they are computed."""
    pads = attribute(node, "pads", None)
    if pads is None:
        array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if array is None:
            return None
        pads = [int(x) for x in array.reshape(-1)]
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        array = constant_array(node.inputs[3])
        if array is None:
            return None
        axes = [int(a) % rank for a in array.reshape(-1)]
    found = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        found[axis] = (int(pads[i]), int(pads[i + len(axes)]))
    return found


@rule("Pad")
def _pad(flow: Flow, node: ir.Node) -> None:
    data = node.inputs[0]
    rank = len(dims_of(data) or ())
    pads = pads_of(node, rank)
    constant = attribute(node, "mode", "constant") == "constant"
    tracks = []
    for track in flow.of(data):
        padded = [] if pads is None else [a for a in track.axes if pads[a] != (0, 0)]
        if pads is None or (padded and (not constant or min(min(pads[a]) for a in padded) < 0)):
            flow.labels.block(track.ids, f"{where_is(node)}: how it pads channels is not followed")
            continue
        for axis in padded:
            place = track.axes.index(axis)
            sides = []
            for count in pads[axis]:
                shape = list(track.ids.shape)
                shape[place] = count
                sides.append(flow.labels.new(*shape))
            track = Track(track.axes, np.concatenate([sides[0], track.ids, sides[1]], axis=place))
        tracks.append(track)
    flow.put(node.outputs[0], tracks)


@rule("Resize", "Upsample")
def _resize(flow: Flow, node: ir.Node) -> None:
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    tracks = []
    for track in flow.of(node.inputs[0]):
        changed = [
            a
            for a in track.axes
            if before is None or after is None or str(before[a]) != str(after[a])
        ]
        left = (
            flow.labels.uniform(track, changed, f"{where_is(node)}: changes the size of this axis")
            if changed
            else track
        )
        if left is not None:
            tracks.append(left)
    flow.put(node.outputs[0], tracks)


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(flow: Flow, node: ir.Node) -> None:
    block = int(attribute(node, "blocksize", 1)) ** 2
    for track in flow.of(node.inputs[0]):
        if track.axes != (1,):
            flow.labels.block(track.ids, f"{where_is(node)}: {track.axes} are not channels alone")
            continue
        ids = track.ids
        if node.op_type == "SpaceToDepth":
            flow.put(node.outputs[0], [Track((1,), np.tile(ids, block))])
        elif attribute(node, "mode", "DCR") == "DCR":
            rows = ids.reshape(block, -1)
            flow.labels.unite(rows, rows[:1])
            flow.put(node.outputs[0], [Track((1,), rows[0])])
        else:
            rows = ids.reshape(-1, block)
            flow.labels.unite(rows, rows[:, :1])
            flow.put(node.outputs[0], [Track((1,), rows[:, 0])])


@rule("ConstantOfShape", "Constant", "Range", "RandomNormal", "RandomUniform")
def _source(flow: Flow, node: ir.Node) -> None:
    """Made from nothing that has channels."""
    for output in node.outputs:
        flow.put(output, ())
