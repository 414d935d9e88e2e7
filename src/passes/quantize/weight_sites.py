"""The weights that a run reads as floats wherever they are: what storage forms may replace.

Here: `weight_sites`, for passes that change only how a weight lies in the file (`palettize`,
`fp8`). Not here: forms that kernels read (`weight_choice`).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...ir.graph import constant_tensor, describe_node, graph_tree, is_onnx_op
from ...ir.ops import weight_channel_axis

_RECURRENT = ("LSTM", "GRU", "RNN")
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", *_RECURRENT)


@dataclasses.dataclass(frozen=True)
class WeightSite:
    """A float32 constant, its readers as (node, input), and the axis of its output channels."""

    value: ir.Value
    reads: tuple[tuple[ir.Node, int], ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The constant's."""
        tensor = constant_tensor(self.value)
        assert tensor is not None
        return tuple(int(d) for d in tensor.shape.numpy())


def weight_sites(
    model: ir.Model, exclude: tuple[str, ...], min_elements: int
) -> tuple[list[WeightSite], list[tuple[str, str]]]:
    """The weights of a model and its subgraphs, in graph order; (node, reason) for the rest."""
    reads: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    axes: dict[ir.Value, int] = {}
    refused: list[tuple[str, str]] = []
    for node in (n for graph in graph_tree(model.graph) for n in graph):
        if not is_onnx_op(node, *_OPERATORS):
            continue
        for index in _inputs(node):
            value, source = _source(node, index)
            tensor = constant_tensor(value)
            if value is None or tensor is None or len(tensor.shape) < 2:
                continue
            reason = ""
            if {node.op_type, node.name or "", value.name or ""} & set(exclude):
                reason = "excluded by option"
            elif tensor.dtype != ir.DataType.FLOAT:
                reason = "its weight is not float32"
            elif tensor.size < min_elements:
                reason = f"its weight has fewer than {min_elements} elements"
            if reason:
                if node.op_type != "Gather":
                    refused.append((describe_node(node), reason))
                continue
            found = reads.setdefault(value, [])
            if source not in found:
                found.append(source)
            axis = 0 if node.op_type == "Gather" else weight_channel_axis(node, index)
            if source[0] is not node:
                axis = 0
            axes.setdefault(value, (axis or 0) % len(tensor.shape))
    return [WeightSite(value, tuple(r), axes[value]) for value, r in reads.items()], refused


def _inputs(node: ir.Node) -> tuple[int, ...]:
    match node.op_type:
        case "MatMul":
            return (0, 1)
        case "LSTM" | "GRU" | "RNN":
            return (1, 2)
        case "Gather":
            return (0,)
    return (1,)


def _source(node: ir.Node, index: int) -> tuple[ir.Value | None, tuple[ir.Node, int]]:
    """The constant, and where it is read: at the node, or at a Transpose before it."""
    value = node.inputs[index] if index < len(node.inputs) else None
    maker = value.producer() if value is not None else None
    if maker is not None and is_onnx_op(maker, "Transpose"):
        return maker.inputs[0], (maker, 0)
    return value, (node, index)
