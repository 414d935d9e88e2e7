"""The weights that can be sparsified, and which of their axes hold inputs and outputs.

Here: `find_weights`; shapes only. Not here: masks (`sparsify_patterns`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from ...ir.graph import attribute, constant_tensor, graphs, is_onnx_op, node_name
from .patterns import Pattern

_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A float initializer that is summed over: `in_axis` holds what, `out_axis` what comes out.

    `nodes` read it.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    out_axis: int
    in_axis: int

    @property
    def size(self) -> int:
        """Elements."""
        assert self.value.const_value is not None
        return self.value.const_value.size


def find_weights(
    model: ir.Model, pattern: Pattern, min_elements: int, exclude: tuple[str, ...] = ()
) -> list[Weight]:
    """Weights of Conv, ConvTranspose, Gemm, MatMul and recurrent layers, each once, in graph order.

    Left out: what has fewer elements, what is named in `exclude` (a node, a weight or an operator),
    and weights whose inputs are too few for the pattern (a depthwise convolution has one).
    """
    found: dict[ir.Value, Weight] = {}
    refused: set[ir.Value] = set()
    for graph in graphs(model):
        for node in graph:
            for value, out_axis, in_axis in _weights_of(node):
                names = {node.op_type, node_name(node), node.name, value.name}
                if names & set(exclude):
                    refused.add(value)
                elif value in found:
                    old = found[value]
                    found[value] = dataclasses.replace(old, nodes=(*old.nodes, node))
                else:
                    found[value] = Weight(value, (node,), out_axis, in_axis)
    return [
        weight
        for value, weight in found.items()
        if value not in refused and weight.size >= min_elements and _fits(weight, pattern)
    ]


def _fits(weight: Weight, pattern: Pattern) -> bool:
    tensor = weight.value.const_value
    assert tensor is not None
    dims = tensor.shape.numpy()
    outputs, inputs = dims[weight.out_axis], dims[weight.in_axis]
    if pattern.is_fixed:
        return bool(inputs >= pattern.run)
    return bool(outputs >= pattern.block[0] and inputs >= pattern.block[1])


def _weights_of(node: ir.Node) -> Iterator[tuple[ir.Value, int, int]]:
    """Each constant matrix of a node, its axis of outputs and its axis of inputs."""
    for index, out_axis, in_axis in _axes(node):
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = constant_tensor(value)
        if value is None or tensor is None or not value.is_initializer():
            continue
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 1:
            rank = len(tensor.shape)
            yield value, out_axis % rank, in_axis % rank


def _axes(node: ir.Node) -> tuple[tuple[int, int, int], ...]:
    """Input index, axis of outputs, axis of inputs."""
    if is_onnx_op(node, "Conv"):
        return ((1, 0, 1),)
    if is_onnx_op(node, "ConvTranspose"):
        return ((1, 1, 0),)
    if is_onnx_op(node, "Gemm"):
        return ((1, 0, 1),) if attribute(node, "transB", 0) else ((1, 1, 0),)
    if is_onnx_op(node, "MatMul"):
        return ((0, -2, -1), (1, -1, -2))
    if is_onnx_op(node, *_RECURRENT):
        return ((1, 1, 2), (2, 1, 2))
    return ()
