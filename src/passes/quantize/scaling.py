"""Moving per-channel scales between what makes an activation and what reads it.

Here: `find_groups`, the activations whose channels can be scaled without changing what the model
computes: every reader is a product that can undo the scale in its weight, and the way back from the
activation leads to constants that can take it up (a product's weight, a norm's, a constant factor).
Also carrying a scale out. Not here: which scales to choose (`equalize`, `smooth_quant`).

Positions, not numbers, travel back through the graph: an integer array of the activation's rank
says which entry of the scale vector applies where (-1: none), and moves (Reshape, Concat)
move it as they move the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    add_initializer,
    attribute,
    constant_array,
    constant_tensor,
    describe_node,
    is_absent,
    is_onnx_op,
    static_shape,
)
from .scaling_trace import Blocked, Fold, trace

_RECURRENT = ("LSTM", "GRU", "RNN")
SMALL = 1 << 16
"""A constant up to this size that other nodes read too is copied; a larger one is left alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A node that multiplies the activation by a constant, and where that constant's inputs lie."""

    node: ir.Node
    fold: Fold


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """An activation, the products that read it, and what takes up a scale of its channels.

    `makers` are the constants on the way back (empty where `refusal` says why there are none).
    `classes` maps each channel to the one whose scale it must share; -1 can't be scaled.
    `insertable`: a Mul in front of the readers could carry the scale instead.
    """

    value: ir.Value
    axis: int
    readers: tuple[Reader, ...]
    makers: tuple[Fold, ...]
    classes: np.ndarray
    refusal: str = ""
    insertable: bool = False

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.classes)

    def shared(self, scale: np.ndarray) -> np.ndarray:
        """The scale as the classes allow it: of each class its geometric mean, 1 where fixed."""
        logs = np.log(np.asarray(scale, np.float64))
        members = np.bincount(self.classes + 1, minlength=self.channels + 1)
        sums = np.bincount(self.classes + 1, weights=logs, minlength=self.channels + 1)
        means = np.exp(sums / np.maximum(members, 1))
        means[0] = 1.0
        chosen: np.ndarray = means[self.classes + 1]
        return chosen


def find_groups(model: ir.Model) -> Iterator[Group]:
    """Every float activation of the main graph that products read, in graph order."""
    done: set[ir.Value] = set()
    for node in model.graph:
        found = reader(node)
        if found is None or node.inputs[0] is None or node.inputs[0] in done:
            continue
        value = node.inputs[0]
        done.add(value)
        group = _group(value)
        if group is not None:
            yield group


def _group(value: ir.Value) -> Group | None:
    users = list(dict.fromkeys(use.node for use in value.uses()))
    readers = [r for user in users if (r := reader(user)) is not None and r.node.inputs[0] is value]
    axes = {_channel_axis(r.node) for r in readers}
    sizes = {int(r.fold.index.max()) + 1 for r in readers}
    rank = None if value.shape is None else len(value.shape)
    if len(axes) != 1 or len(sizes) != 1 or rank is None or value.dtype != ir.DataType.FLOAT:
        return None
    (axis,), (size,) = axes, sizes
    axis %= rank
    classes = np.arange(size)
    products = {r.node for r in readers}
    others = [user for user in users if user not in products]
    others += [r.node for r in readers if list(r.node.inputs).count(value) > 1]
    fixed = any(not _is_writable(r.fold) for r in readers)
    if fixed:
        reason = "a weight is shared or absent"
    elif value.is_graph_output():
        reason = "a graph output"
    elif others:
        reason = f"{others[0].op_type} reads the activation too"
    else:
        index = np.arange(size).reshape([-1 if i == axis else 1 for i in range(rank)])
        try:
            makers, classes = trace(value, index, size)
        except Blocked as blocked:
            reason, classes = str(blocked), np.arange(size)
        else:
            if all(_is_writable(fold) for fold in makers):
                return Group(value, axis, tuple(readers), tuple(makers), classes)
            reason = "a weight is shared or absent"
    return Group(value, axis, tuple(readers), (), classes, reason, insertable=not fixed)


def reader(node: ir.Node) -> Reader | None:
    """The node's constant that is multiplied by its first input, with its input channels."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if constant_tensor(weight) is None or constant_tensor(node.inputs[0]) is not None:
        return None
    shape = static_shape(weight)
    if shape is None or weight is None or weight.dtype != ir.DataType.FLOAT:
        return None
    index: np.ndarray
    if is_onnx_op(node, "Conv") and len(shape) > 2:
        groups = int(attribute(node, "group", 1))
        inputs = np.arange(groups * shape[1]).reshape(groups, 1, shape[1])
        index = np.broadcast_to(inputs, (groups, shape[0] // groups, shape[1]))
        index = index.reshape(*shape[:2], *[1] * (len(shape) - 2))
    elif is_onnx_op(node, "ConvTranspose") and len(shape) > 2:
        index = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    elif is_onnx_op(node, "MatMul") and len(shape) >= 2:
        index = np.arange(shape[-2]).reshape(-1, 1)
    elif is_onnx_op(node, "Gemm") and not attribute(node, "transA", 0):
        transposed = attribute(node, "transB", 0)
        index = np.arange(shape[1 if transposed else 0])
        index = index[None] if transposed else index[:, None]
    elif is_onnx_op(node, *_RECURRENT) and attribute(node, "layout", 0) == 0:
        index = np.arange(shape[2]).reshape(1, 1, -1)
    else:
        return None
    return Reader(node, Fold(node, 1, index))


def _channel_axis(node: ir.Node) -> int:
    return 1 if is_onnx_op(node, "Conv", "ConvTranspose") else -1


def _is_writable(fold: Fold) -> bool:
    value = fold.value
    tensor = constant_tensor(value)
    if tensor is None or is_absent(tensor) or tensor.dtype != ir.DataType.FLOAT:
        return False
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return alone or tensor.size <= SMALL


class Constants:
    """Working copies of the constants that folds name, written back in one go."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[ir.Node, int], np.ndarray] = {}

    def array(self, fold: Fold) -> np.ndarray:
        """The constant as it is now."""
        key = fold.node, fold.input
        if key not in self._arrays:
            array = constant_array(fold.value)
            assert array is not None
            self._arrays[key] = array
        return self._arrays[key]

    def peaks(self, folds: Iterable[Fold], channels: int) -> np.ndarray:
        """The greatest magnitude of any of the constants' elements that a channel's scale meets."""
        found = np.zeros(channels + 1)
        for fold in folds:
            array = np.abs(self.array(fold))
            index = _aligned(fold.index, array.ndim)
            whole = np.broadcast_shapes(array.shape, index.shape)
            along = tuple(i for i in range(len(whole)) if index.shape[i] == 1)
            tops = np.broadcast_to(array, whole).max(axis=along, keepdims=True, initial=0.0)
            np.maximum.at(found, np.broadcast_to(index, tops.shape).ravel(), tops.ravel())
        return found[:channels]  # the last one is what index -1 met

    def multiply(self, folds: Iterable[Fold], scale: np.ndarray) -> None:
        """Multiply every constant by the scale at its positions (divide where the fold says so)."""
        factors = np.append(np.asarray(scale, np.float64), 1.0)
        for fold in folds:
            array = self.array(fold)
            factor = factors[_aligned(fold.index, array.ndim)]
            factor = 1.0 / factor if fold.inverse else factor
            self._arrays[fold.node, fold.input] = (array * factor).astype(array.dtype)

    def write(self) -> None:
        """Store what has changed in the graph: in place, or a copy where others read it too."""
        editor = Editor()
        for (node, index), array in self._arrays.items():
            value = node.inputs[index]
            graph = node.graph
            assert value is not None
            assert isinstance(graph, ir.Graph)
            if constant_array(value) is array:
                continue
            if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
                value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
                value.shape = ir.Shape(array.shape)
            else:
                base = f"{value.name}/scaled"
                editor.replace_input(node, index, add_initializer(graph, base, array))


def scale_group(constants: Constants, group: Group, factor: np.ndarray) -> None:
    """Multiply the activation's channels by `factor`, and undo it in its readers."""
    constants.multiply(group.makers, factor)
    constants.multiply((r.fold for r in group.readers), 1.0 / factor)


def insert_factor(group: Group, factor: np.ndarray) -> None:
    """Put a Mul by `factor` between the activation and the group's products."""
    rank = len(group.value.shape or ())
    shape = [-1 if i == group.axis else 1 for i in range(rank)]
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    first = group.readers[0].node
    editor = Editor()
    constant = editor.initializer(
        first, f"{group.value.name}/smooth", factor.astype(np.float32).reshape(shape)
    )
    node = ir.Node("", "Mul", [group.value, constant], num_outputs=1)
    node.outputs[0].type = group.value.type
    node.outputs[0].shape = group.value.shape
    editor.insert_before(first, node)
    for item in group.readers:
        editor.replace_input(item.node, 0, node.outputs[0])


def refusals(groups: Iterable[Group]) -> tuple[str, ...]:
    """One line a reason: how many activations it keeps, and the first of them."""
    by_reason: dict[str, list[Group]] = {}
    for group in groups:
        by_reason.setdefault(group.refusal, []).append(group)
    return tuple(
        f"{len(found)} activation{'s' if len(found) > 1 else ''} kept: {reason} "
        f"(first: before {describe_node(found[0].readers[0].node)})"
        for reason, found in by_reason.items()
    )


def _aligned(index: np.ndarray, rank: int) -> np.ndarray:
    """The index with leading axes of one added, or taken away, towards a rank."""
    if index.ndim < rank:
        return index.reshape([1] * (rank - index.ndim) + list(index.shape))
    extra = index.ndim - rank
    while extra and index.shape[0] == 1:
        index, extra = index[0], extra - 1
    return index
