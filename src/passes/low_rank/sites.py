"""Layers that a product of smaller ones may stand for, and why others are left.

Here: `Site` and `find_sites`. Not here: the smaller layers (`low_rank_forms`), which are worth it
(`low_rank_choice`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from ...ir.graph import (
    constant_array,
    constant_tensor,
    graph_tree,
    is_absent,
    is_onnx_op,
    node_name,
    static_shape,
)
from ..quantize.layers import LinearLayer, linear_layer

_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QUANTIZED = ("DequantizeLinear", "DequantizeBFP")


@dataclasses.dataclass(frozen=True)
class Site:
    """A Conv, Gemm or MatMul with a matrix of its own.

    `inputs` and `outputs` are channels, `kernel` the sizes of a convolution's (empty for the
    others). `bias` is the node and input where a number for each output channel is added or can
    be: the layer's own bias, or that of an Add behind it; None: nowhere.
    """

    node: ir.Node
    layer: LinearLayer
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    bias: tuple[ir.Node, int] | None

    @property
    def name(self) -> str:
        """What the node is called."""
        return node_name(self.node)

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.node.op_type == "Conv"

    @property
    def is_absent(self) -> bool:
        """Whether the weight has no data."""
        return is_absent(constant_tensor(self.layer.weight))

    @property
    def weights(self) -> int:
        """How many weights it has, bias left out."""
        return self.inputs * self.outputs * math.prod(self.kernel)


Refusal = tuple[str, str]
"""The name of a node, and why it was left."""


def find_sites(model: ir.Model, exclude: Sequence[str] = ()) -> tuple[list[Site], list[Refusal]]:
    """The layers of the main graph that can be factorized, in its order, and the others.

    `exclude`: names of nodes or weights, or operators. Products of two activations are no layers,
    and in neither list.
    """
    found: list[Site] = []
    left: list[Refusal] = []
    for graph in graph_tree(model.graph):
        for node in graph:
            if not is_onnx_op(node, *_OPERATORS) or not _reads_a_weight(node):
                continue
            outcome = "it is in a branch or a loop"
            if graph is model.graph:
                outcome = _refusal(node, exclude)
            if outcome:
                left.append((node_name(node), outcome))
            else:
                found.append(_site(node))
    return found, left


def _site(node: ir.Node) -> Site:
    layer = linear_layer(node)
    assert layer is not None
    _, size, outputs = layer.shape
    kernel: tuple[int, ...] = ()
    if node.op_type == "Conv":
        shape = static_shape(layer.weight)
        assert shape is not None
        kernel = shape[2:]
    return Site(node, layer, size // math.prod(kernel), outputs, kernel, _bias_place(node))


def _reads_a_weight(node: ir.Node) -> bool:
    """Whether an input is a constant, or made of constants alone within a few steps."""
    sides = (0, 1) if node.op_type == "MatMul" else (1,)
    return any(_is_weight(node.inputs[side]) for side in sides if side < len(node.inputs))


def _is_weight(value: ir.Value | None, depth: int = 4) -> bool:
    if value is None:
        return False
    if value.is_initializer() or constant_tensor(value) is not None:
        return True
    maker = value.producer()
    if maker is None or not depth:
        return False
    inputs = [v for v in maker.inputs if v is not None]
    return bool(inputs) and all(_is_weight(v, depth - 1) for v in inputs)


def _refusal(node: ir.Node, exclude: Sequence[str]) -> str:
    """Why a node is left alone, or ''."""
    if node.op_type == "ConvTranspose":
        return "it is a transposed convolution"
    weight = node.inputs[1]
    if {node.op_type, node_name(node), weight.name if weight is not None else ""} & set(exclude):
        return "excluded by option"
    tensor = constant_tensor(weight)
    if weight is None or tensor is None:
        return _computed(node, weight)
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return "its weight is not of floats"
    readers = len(weight.uses())
    if readers > 1 or weight.is_graph_output():
        return "its weight is used elsewhere too"
    layer = linear_layer(node)
    if layer is None:
        rank = len(tensor.shape)
        return "its weight is no matrix" if rank != 2 else "it scales, or transposes its input"
    if layer.groups > 1:
        return "its channels are in groups"
    return ""


def _computed(node: ir.Node, weight: ir.Value | None) -> str:
    if node.op_type == "MatMul" and _is_weight(node.inputs[0]):
        return "its weight is on the left"
    if weight is not None and weight.is_initializer():
        return "its weight is an input that callers may replace"
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type in _QUANTIZED:
        return "its weight is quantized already"
    return f"its weight is computed by {maker.op_type if maker is not None else 'nothing'}"


def _bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where a constant is added to each output channel, or can be."""
    if node.op_type in ("Conv", "Gemm"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        known = bias is None or constant_tensor(bias) is not None
        shape = None if bias is None else static_shape(bias)
        wide = shape is not None and len(shape) > 1 and shape[0] != 1
        return (node, 2) if known and not wide else None
    result = node.outputs[0]
    users = list(result.uses())
    if len(users) != 1 or result.is_graph_output() or not is_onnx_op(users[0].node, "Add"):
        return None
    index = 1 - users[0].idx
    value = users[0].node.inputs[index]
    shape, weight = static_shape(value), static_shape(node.inputs[1])
    if constant_tensor(value) is None or not shape or weight is None:
        return None
    return (users[0].node, index) if math.prod(shape) == shape[-1] == weight[-1] else None


def bias_array(site: Site) -> ir.Value | None:
    """The constant that is added to each output channel, if there is one with data."""
    if site.bias is None:
        return None
    node, index = site.bias
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if constant_array(value) is not None else None
