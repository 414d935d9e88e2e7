"""Nodes that take statistics over channels, once some have gone: these count on, as zeros.

A width that is removed because it is next to nothing leaves mean and variance as they were when
these are still taken over as many channels as before. RMSNormalization and means have that in their
constants. LayerNormalization, InstanceNormalization and GroupNormalization get the zeros back, and
lose them behind: the runtime has fast kernels for these, so that is cheaper than any arithmetic
that corrects mean and variance. Not here: which widths may go (`rules_norms`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder, Editor
from ...ir.graph import (
    AbsentTensor,
    add_initializer,
    attribute,
    constant_tensor,
    dims_of,
    fresh_name,
    is_absent,
)
from .kept import Kept
from .rules import reduced_axes


def _layer(node: ir.Node, kept: Kept) -> None:
    axis = int(attribute(node, "axis", -1))
    rank = len(dims_of(node.inputs[0]) or ())
    _among_zeros(node, kept, range(axis % max(rank, 1), rank), last=True)


def _instance(node: ir.Node, kept: Kept) -> None:
    _among_zeros(node, kept, range(2, len(dims_of(node.inputs[0]) or ())), last=False)


def _group(node: ir.Node, kept: Kept) -> None:
    groups = int(attribute(node, "num_groups", 1))
    if groups == 1:
        _among_zeros(node, kept, range(1, 2), last=False)
        return
    mask = kept.positions(node.inputs[0], 1)
    if mask is not None:
        left = int(mask.reshape(groups, -1).any(axis=1).sum())
        Editor().set_attribute(node, "num_groups", left)


def _rms(node: ir.Node, kept: Kept) -> None:
    """x / sqrt(sum / n + e) = sqrt(n / m) x / sqrt(sum / m + e n / m), of n channels and of m."""
    axis = int(attribute(node, "axis", -1))
    rank = len(dims_of(node.inputs[0]) or ())
    ratio = _times_fewer(node, kept, range(axis % max(rank, 1), rank))
    if ratio == 1:
        return
    editor = Editor()
    epsilon = float(attribute(node, "epsilon", 1e-5)) * ratio
    data = node.inputs[0]
    lost = kept.lost(data, rank - 1) if data is not None else None
    if lost is not None:
        epsilon += float((lost**2).sum()) / kept.sizes(data)[rank - 1]
    editor.set_attribute(node, "epsilon", epsilon)
    scale = node.inputs[1]
    assert scale is not None
    assert scale.dtype is not None
    tensor = constant_tensor(scale)
    if is_absent(tensor):
        return
    factor = np.array(math.sqrt(ratio), scale.dtype.numpy())
    if tensor is None:
        editor.replace_input(node, 1, Builder(editor, node).Mul(scale, factor))
        return
    build = Builder(editor, node)
    editor.replace_input(node, 1, build.initializer("scale", tensor.numpy() * factor))


def _mean(node: ir.Node, kept: Kept) -> None:
    """The sum of what is left over as many as there were."""
    data = node.inputs[0]
    axes = reduced_axes(node, len(dims_of(data) or ()))
    ratio = _times_fewer(node, kept, axes or ())
    if ratio == 1 or node.outputs[0].dtype is None:
        return
    dtype = node.outputs[0].dtype.numpy()
    factor = np.array(1 / ratio, dtype)
    _behind(node, kept, lambda build, mean: build.node("Mul", mean, factor))
    for axis in axes or ():
        lost = kept.lost(data, axis) if data is not None else None
        size = (dims_of(data) or ())[axis]
        if lost is not None and isinstance(size, int):
            more = np.array(lost.sum() / size, dtype)
            behind = next(iter(node.outputs[0].uses())).node
            _behind(behind, kept, lambda build, mean, more=more: build.node("Add", mean, more))  # type: ignore[misc]


NORMS: dict[str, Callable[[ir.Node, Kept], None]] = {
    "LayerNormalization": _layer,
    "InstanceNormalization": _instance,
    "GroupNormalization": _group,
    "RMSNormalization": _rms,
    "SimplifiedLayerNormalization": _rms,
    "ReduceMean": _mean,
}


def _times_fewer(node: ir.Node, kept: Kept, axes: range | list[int] | tuple[int, ...]) -> float:
    dims = dims_of(node.inputs[0]) or ()
    ratio = 1.0
    for axis, size in kept.sizes(node.inputs[0]).items():
        before = dims[axis]
        if axis in axes and isinstance(before, int):
            ratio *= before / size
    return ratio


def _among_zeros(node: ir.Node, kept: Kept, axes: range, *, last: bool) -> None:
    """Pad the data with zeros to the sizes there were, and cut them off behind the node.

    `last`: scale and shift are on the last axes of the data, and are padded as it is; else on the
    channels.
    """
    data = node.inputs[0]
    dims = dims_of(data) or ()
    sizes = {a: s for a, s in kept.sizes(data).items() if a in axes}
    if data is None or not sizes:
        return
    missing = [int(dims[a]) - sizes[a] if a in sizes else 0 for a in range(len(dims))]  # type: ignore[arg-type]
    editor = Editor()
    pads = np.array([0] * len(dims) + missing, np.int64)
    padded = Builder(editor, node).Pad(data, pads)
    for axis in sizes:
        lost = kept.lost(data, axis)
        if lost is not None and data.dtype is not None:
            there = np.zeros([1] * axis + [int(dims[axis])] + [1] * (len(dims) - axis - 1))  # type: ignore[arg-type]
            there.reshape(-1)[sizes[axis] :] = lost
            padded = Builder(editor, node).Add(padded, there.astype(data.dtype.numpy()))
    editor.replace_input(node, 0, padded)
    for index, value in enumerate(node.inputs[1:3], 1):
        own = len(dims_of(value) or ())
        fewer = missing[len(dims) - own :] if last else [missing[1] if axes.start == 1 else 0]
        if value is not None and any(fewer) and own == len(fewer) and _fits(value, kept):
            editor.replace_input(node, index, _widened(node, value, fewer))
    starts = np.zeros(len(sizes), np.int64)
    ends, places = np.array(list(sizes.values())), np.array(list(sizes))
    _behind(node, kept, lambda build, wide: build.node("Slice", wide, starts, ends, places))


def _fits(value: ir.Value, kept: Kept) -> bool:
    """Whether the parameter lost the same channels (a scale for each group did not)."""
    return bool(kept.changed(value))


def _widened(node: ir.Node, value: ir.Value, more: list[int]) -> ir.Value:
    """A parameter with zeros behind."""
    tensor = constant_tensor(value)
    graph = node.graph
    if tensor is None or not isinstance(graph, ir.Graph):
        editor = Editor()
        return Builder(editor, node).Pad(value, np.array([0] * len(more) + more, np.int64))  # type: ignore[no-any-return]
    if is_absent(tensor):
        shape = [int(d) + m for d, m in zip(tensor.shape.numpy(), more, strict=True)]
        return add_initializer(graph, f"{value.name}/wide", AbsentTensor("", tensor.dtype, shape))
    array = np.pad(tensor.numpy(), [(0, m) for m in more])
    return add_initializer(graph, f"{value.name}/wide", ir.Tensor(array, dtype=tensor.dtype))


def _behind(node: ir.Node, kept: Kept, make: Callable[[Builder, ir.Value], ir.Node]) -> None:
    """Put a node behind another; it takes over name, tracks and readers of the first's result."""
    old = node.outputs[0]
    users = [(user, index) for user, index in old.uses()]
    made = make(Builder(Editor(), node, after=True), old)
    new = made.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name, old.name, old.shape = old.name, fresh_name(graph, f"{old.name}/wide"), None
    new.name = name
    for user, index in users:
        user.replace_input_with(index, new)
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = new
    kept.flow.put(new, kept.flow.of(old))
    kept.flow.put(old, ())
