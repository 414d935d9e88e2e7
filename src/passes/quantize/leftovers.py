"""Weights that an integer plan leaves: stored in 8 bits and unpacked at load, computed in float.

Here: which weights those are (of ConvTranspose, GRU, small LSTMs, layers that the plan keeps out of
integers), and storing them, in branches and loop bodies too. Not here: the form (`stored`), what
runs in integers (`plan`, `dynamic_int8`, `recurrent`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import constant_tensor, graph_tree, is_absent, node_name
from ...ir.ops import Category, facts, weight_channel_axis
from ...ir.quant import PerChannel, QuantSpec
from .numbers import weight_affine
from .recurrent import WEIGHTS as RECURRENT_WEIGHTS
from .stored import Shared, store_folded

MIN_ELEMENTS = 256
"""Smaller weights save less than their scales and nodes cost."""


@dataclasses.dataclass(frozen=True)
class Leftover:
    """Input `index` of a node, and how it is stored."""

    node: ir.Node
    index: int
    spec: QuantSpec

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


def leftovers(
    model: ir.Model, taken: Collection[ir.Node], exclude: tuple[str, ...] = ()
) -> Iterator[Leftover]:
    """The float32 weights of nodes not `taken`, in graph order. Reads no weight.

    What the user excludes, by name or operator type, stays float.
    """
    for node in (n for graph in graph_tree(model.graph) for n in graph):
        name = node_name(node)
        if node in taken or node.op_type in exclude or name in exclude:
            continue
        for index in _weight_inputs(node):
            tensor = constant_tensor(node.inputs[index]) if index < len(node.inputs) else None
            if tensor is None or tensor.dtype != ir.DataType.FLOAT:
                continue
            rank, axis = len(tensor.shape), weight_channel_axis(node, index)
            if rank < 2 or tensor.size < MIN_ELEMENTS or axis is None:
                continue
            granularity = PerChannel(axis % rank)
            spec = QuantSpec(ir.DataType.INT8, True, granularity, zero_points=False, folded=True)
            yield Leftover(node, index, spec)


def _weight_inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs with weights, biases not among them."""
    row = facts(node)
    match row.category:
        case Category.RECURRENT:
            return RECURRENT_WEIGHTS
        case Category.MATMUL:
            return tuple(i for i in row.weight_inputs if i < 2)
        case Category.CONVOLUTION | Category.ATTENTION:
            return row.weight_inputs[:1]
    return ()


def write_leftovers(items: Collection[Leftover]) -> None:
    """before: Conv(x, W) -> y      after: Conv(x, Mul(Cast(W8), scale)) -> y"""
    editor = Editor()
    shared: Shared = {}
    affines = {}
    for item in items:
        tensor = constant_tensor(item.value)
        assert tensor is not None
        key = item.value, item.spec
        if key not in affines:
            affines[key] = None if is_absent(tensor) else weight_affine(tensor.numpy(), item.spec)
    keys = [(item.value, item.spec) for item in items]
    for item, key in zip(items, keys, strict=True):
        store_folded(editor, item.node, item.index, item.spec, affines[key], shared)
