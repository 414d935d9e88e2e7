"""Nodes that state sizes, once channels have gone: reshapes, cuts, paddings, groups, heads.

Here: `resize`, for one node. Not here: parameters (`remove`), statistics over channels
(`resize_norms`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder, Editor
from ...ir.graph import attribute, constant_array, dims_of
from .cut import take
from .kept import Kept
from .labels import Track
from .resize_attention import ATTENTION
from .resize_norms import NORMS
from .rules_movement import pads_of, slice_parts
from .rules_recurrent import is_the_same_everywhere

_LAST = -(1 << 62)
"""The end of a Slice that runs backwards past the first element."""


def resize(node: ir.Node, kept: Kept) -> None:
    """Make a node fit what stays of its operands."""
    handler = _HANDLERS.get(node.op_type)
    if handler is None or node.domain not in ("", "ai.onnx"):
        return
    values = [*node.inputs, *node.outputs]
    if any(kept.changed(v) for v in values) or _has_view(node, kept):
        handler(node, kept)


def _has_view(node: ir.Node, kept: Kept) -> bool:
    return any(v in kept.flow.views for v in node.inputs if v is not None)


def _set_input(node: ir.Node, index: int, array: np.ndarray, name: str) -> None:
    editor = Editor()
    editor.replace_input(node, index, Builder(editor, node).initializer(name, array))


def _set(node: ir.Node, name: str, value: object) -> None:
    Editor().set_attribute(node, name, value)


# --- shapes ------------------------------------------------------------------------------------


def _reshape(node: ir.Node, kept: Kept) -> None:
    _patch_sizes(node, 1, kept)


def _shape(node: ir.Node, kept: Kept) -> None:
    """What is computed with the number of channels goes on with the old one."""
    data = node.inputs[0]
    dims = dims_of(data) or ()
    read = range(len(dims))[attribute(node, "start", 0) : attribute(node, "end", None)]
    changed = [a in kept.sizes(data) for a in read]
    if not any(changed):
        return
    editor = Editor()
    build = Builder(editor, node)
    old = [
        d if isinstance(d, int) and c else 0
        for d, c in zip((dims[a] for a in read), changed, strict=True)
    ]
    value = build.initializer("sizes", np.array(old, np.int64))
    if not all(changed):
        options = {a.name: a.value for a in node.attributes.values()}
        value = build.Where(np.array(changed), value, build.Shape(data, **options))
    build.replace(node.outputs[0], value)


def _expand(node: ir.Node, kept: Kept) -> None:
    _patch_sizes(node, 1, kept)


def _resize(node: ir.Node, kept: Kept) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None and not attribute(node, "axes", None):
        _patch_sizes(node, 3, kept)


def _patch_sizes(node: ir.Node, index: int, kept: Kept) -> None:
    """New numbers in a vector of sizes: those that it computes itself, 0 and -1 stay."""
    new = kept.sizes(node.outputs[0])
    sizes = node.inputs[index]
    assert sizes is not None
    if not new:
        return
    rank = len(dims_of(node.outputs[0]) or ())
    array = constant_array(sizes)
    if array is None:
        _patch_computed(node, index, new, rank)
        return
    shift = rank - array.size  # an Expand may name the last axes only
    patched = array.astype(np.int64).copy()
    for axis, size in new.items():
        place = axis - shift
        if place < 0 or (node.op_type == "Reshape" and patched[place] in (-1, 0)):
            continue
        if node.op_type == "Expand" and patched[place] == 1:
            continue
        patched[place] = size
    if not np.array_equal(patched, array):
        _set_input(node, index, patched, "sizes")


def _patch_computed(node: ir.Node, index: int, new: dict[int, int], rank: int) -> None:
    editor = Editor()
    sizes = node.inputs[index]
    fixed, mask = np.zeros(rank, np.int64), np.zeros(rank, bool)
    for axis, size in new.items():
        fixed[axis], mask[axis] = size, True
    editor.replace_input(node, index, Builder(editor, node).Where(mask, fixed, sizes))


# --- cuts --------------------------------------------------------------------------------------


def _slice(node: ir.Node, kept: Kept) -> None:
    data = node.inputs[0]
    dims = dims_of(data) or ()
    parts = slice_parts(node, len(dims))
    if parts is None:
        return
    new = {}
    for axis, (start, end, step) in parts.items():
        mask = kept.positions(data, axis)
        new[axis] = (start, end, step)
        if mask is None:
            continue
        stop = None if step < 0 and end < -mask.size else end
        chosen = np.arange(mask.size)[slice(start, stop, step)]
        rank = np.cumsum(mask) - 1
        places = rank[chosen[mask[chosen]]]
        if not places.size:
            continue
        last = int(places[-1]) + (1 if step > 0 else -1)
        new[axis] = (int(places[0]), last if last >= 0 else _LAST, step)
    columns = np.array([(a, *part) for a, part in new.items()], np.int64).T
    axes, starts, ends, steps = columns
    if len(node.inputs) == 1:
        _set(node, "starts", starts.tolist())
        _set(node, "ends", ends.tolist())
        _set(node, "axes", axes.tolist())
        return
    node.resize_inputs(5)
    for index, (array, name) in enumerate(
        ((starts, "starts"), (ends, "ends"), (axes, "axes"), (steps, "steps")), 1
    ):
        _set_input(node, index, array, name)


def _split(node: ir.Node, kept: Kept) -> None:
    axis = int(attribute(node, "axis", 0))
    rank = len(dims_of(node.inputs[0]) or ())
    axis += rank if axis < 0 else 0
    sizes = []
    for output in node.outputs:
        dims = dims_of(output) or ()
        size = kept.sizes(output).get(axis, dims[axis])
        assert isinstance(size, int)
        sizes.append(size)
    if "split" in node.attributes:
        _set(node, "split", sizes)
        return
    node.attributes.pop("num_outputs", None)
    node.resize_inputs(2)
    _set_input(node, 1, np.array(sizes, np.int64), "split")


def _gather(node: ir.Node, kept: Kept) -> None:
    data, indices = node.inputs[:2]
    rank = len(dims_of(data) or ())
    axis = int(attribute(node, "axis", 0)) % max(rank, 1)
    mask = kept.positions(data, axis)
    array = constant_array(indices)
    if mask is None or array is None:
        return
    place = np.cumsum(mask) - 1
    new = place[array % mask.size].astype(np.int64)
    if array.ndim:
        depth = array.ndim
        axes = range(axis, axis + depth)
        masks = {
            tuple(a - axis for a in t.axes if a in axes): _over(~kept.gone[t.ids], t, axes)
            for t in kept.changed(node.outputs[0])
            if set(t.axes) & set(axes)
        }
        new = take(new, masks)
    _set_input(node, 1, np.asarray(new), "indices")


def _over(stays: np.ndarray, track: Track, axes: Sequence[int]) -> np.ndarray:
    """What stays along some axes of a track."""
    others = tuple(i for i, a in enumerate(track.axes) if a not in axes)
    mask: np.ndarray = np.asarray(stays.any(axis=others))
    return mask


def _pad(node: ir.Node, kept: Kept) -> None:
    data, output = node.inputs[0], node.outputs[0]
    rank = len(dims_of(data) or ())
    pads = pads_of(node, rank)
    if pads is None:
        return
    changed = False
    for axis, (before, after) in enumerate(pads):
        mask = kept.positions(output, axis)
        if mask is not None and (before or after):
            pads[axis] = (int(mask[:before].sum()), int(mask[mask.size - after :].sum()))
            changed = True
    if not changed:
        return
    flat = [p[0] for p in pads] + [p[1] for p in pads]
    if "pads" in node.attributes:
        _set(node, "pads", flat)
        return
    _set_input(node, 1, np.array(flat, np.int64), "pads")
    if len(node.inputs) > 3:
        Editor().replace_input(node, 3, None)


# --- attributes --------------------------------------------------------------------------------


def _convolution(node: ir.Node, kept: Kept) -> None:
    groups = int(attribute(node, "group", 1))
    if groups == 1:
        return
    weight = node.inputs[1]
    view = kept.flow.views.get(weight) if weight is not None else None
    if view is not None:
        stays = ~kept.gone[view.tracks[0].ids]
        _set(node, "group", int(stays.any(axis=1).sum()))
        return
    mask = kept.positions(node.inputs[0], 1)
    if mask is not None:
        _set(node, "group", int(mask.sum()))


def _recurrent(node: ir.Node, kept: Kept) -> None:
    view = kept.flow.views.get(node.inputs[2]) if node.inputs[2] is not None else None
    if view is None:
        return
    stays = ~kept.gone[view.tracks[0].ids]
    size = int(stays.reshape(-1, stays.shape[-1]).sum(axis=1).max())
    if "hidden_size" in node.attributes:
        _set(node, "hidden_size", size)
    for index in (5, 6):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and size < stays.shape[-1] and is_the_same_everywhere(value):
            editor = Editor()
            bounds = [np.array([n], np.int64) for n in (0, size, 2)]
            editor.replace_input(node, index, Builder(editor, node).Slice(value, *bounds))


_HANDLERS: dict[str, Callable[[ir.Node, Kept], None]] = {
    "Reshape": _reshape,
    "Shape": _shape,
    "Expand": _expand,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Pad": _pad,
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _convolution,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    **ATTENTION,
    **NORMS,
}
