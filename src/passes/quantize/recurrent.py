"""LSTMs in 8-bit integers: ONNX Runtime's DynamicQuantizeLSTM.

Here: which LSTMs become one, how their weights are stored, and the rewrite, in branches and loop
bodies too. Activations and the hidden state are quantized while the model runs, so that no range
is calibrated and no error of a fixed scale adds up over time; the cell state stays float. Not here:
GRU, RNN and the LSTMs that stay as they are, whose weights are stored in 8 bits (`leftovers`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    CONTRIB_DOMAIN,
    add_initializer,
    attribute,
    constant_tensor,
    fresh_name,
    graph_tree,
    is_absent,
    is_onnx_op,
    node_name,
)
from ...ir.quant import PerBlock, PerChannel, QuantSpec
from ...targets.target import Runtime
from ..base import Context
from ..operators import missing_operator
from .numbers import quantize, weight_affine
from .qdq import absent, drop_unused_constant, home_of

OPERATOR = "DynamicQuantizeLSTM"
WEIGHTS = (1, 2)
"""The inputs W and R of LSTM, GRU and RNN."""

MIN_ELEMENTS = 192 * 1024
"""Weights of one direction below which the kernel does not pay. Measured with ONNX Runtime 1.32 on
x86-64 with VNNI, batch 1, against the float LSTM: 64 units 1.1 to 1.5 times its time, 128 units
0.84 to 1.13 times, 256 units 0.30 to 0.68 times, 512 units 0.16 to 0.35 times (1 to 100 steps)."""

_DEFAULT = ("sigmoid", "tanh", "tanh")


class Recurrent(enum.StrEnum):
    """Which LSTMs run in integers."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def integer_lstms(
    model: ir.Model,
    context: Context,
    mode: Recurrent = Recurrent.AUTO,
    exclude: tuple[str, ...] = (),
) -> list[ir.Node]:
    """The LSTMs that become integer ones, in graph order. Reads no weight."""
    if mode is Recurrent.NEVER:
        return []
    least = MIN_ELEMENTS if mode is Recurrent.AUTO else 0
    return [
        node
        for graph in graph_tree(model.graph)
        for node in graph
        if is_onnx_op(node, "LSTM")
        and "LSTM" not in exclude
        and node_name(node) not in exclude
        and not why_not(node, context, least)
    ]


def why_not(node: ir.Node, context: Context, least: int = MIN_ELEMENTS) -> str:
    """Why an LSTM stays a float one; '' where it can become an integer one that is worth it."""
    if attribute(node, "layout", 0) or attribute(node, "clip") is not None:
        return f"{OPERATOR} has another layout, or no clipping"
    if attribute(node, "input_forget", 0):
        return f"{OPERATOR} couples no gates"
    if len(node.inputs) > 7 and node.inputs[7] is not None:
        return "it has peepholes"
    names = [str(name).lower() for name in attribute(node, "activations", ())]
    if names != list(_DEFAULT) * (len(names) // 3):
        return "its activations are not the default"
    for index in WEIGHTS:
        tensor = constant_tensor(node.inputs[index])
        if tensor is None:
            return "its weights are not constant"
        if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 3:
            return "its weights are not float32"
    shapes = [_shape(node, index) for index in WEIGHTS]
    elements = sum(gates * size for _, gates, size in shapes)
    if elements < least:
        return f"a direction has {elements} weights: below {least} the float kernel is as fast"
    if context.target is None:
        return "" if not context.portable else f"{OPERATOR} is no standard operator"
    if context.target.runtime is not Runtime.ONNXRUNTIME:
        return f"{context.target.name} does not run on ONNX Runtime"
    return missing_operator(context, OPERATOR, node.inputs[:1], domain=CONTRIB_DOMAIN) or ""


def lstm_spec(node: ir.Node, index: int, per_channel: bool = True) -> QuantSpec:
    """How W (1) or R (2) is stored: a scale for each row of each direction, or one a direction."""
    size = _shape(node, index)[2]
    return QuantSpec(ir.DataType.INT8, True, PerBlock(size, 2) if per_channel else PerChannel(0))


def write_lstms(
    model: ir.Model, nodes: Iterable[ir.Node], *, per_channel: bool = True, reduce_range: bool
) -> None:
    """Make integer LSTMs of the nodes, in place; absent weights stay absent.

    before: LSTM(x, W [d, 4h, i], R [d, 4h, h], b, lengths, h0, c0)
    after:  DynamicQuantizeLSTM(x, W8 [d, i, 4h], R8 [d, h, 4h], b, lengths, h0, c0, , scales and
            zero points of W8, of R8)
    """
    editor = Editor()
    stored: dict[tuple[ir.Value, QuantSpec], list[ir.Value]] = {}
    for node in nodes:
        parts = []
        weights = []
        for index in WEIGHTS:
            weight, spec = node.inputs[index], lstm_spec(node, index, per_channel)
            assert weight is not None
            if (weight, spec) not in stored:
                stored[weight, spec] = _store(node, weight, spec, reduce_range)
            weights.append(weight)
            parts.append(stored[weight, spec])
        _replace(editor, node, parts)
        for weight in weights:
            drop_unused_constant(weight)
        model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)


def _replace(editor: Editor, node: ir.Node, parts: list[list[ir.Value]]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    (w, *w_numbers), (r, *r_numbers) = parts
    rest = [*node.inputs[3:7], *([None] * 4)][:4]  # bias, lengths, initial states
    options = {a.name: a.value for a in node.attributes.values() if a.name != "layout"}
    options["hidden_size"] = _shape(node, 2)[2]
    inputs = [node.inputs[0], w, r, *rest, None, *w_numbers, *r_numbers]
    new = ir.Node(
        CONTRIB_DOMAIN,
        OPERATOR,
        inputs,
        ir.convenience.convert_attributes(options),
        num_outputs=len(node.outputs),
        name=node.name,
    )
    for old, result in zip(node.outputs, new.outputs, strict=True):
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = None if old.shape is None else ir.Shape(list(old.shape.dims))
        # An empty name is an output that is not wanted.
        result.name = fresh_name(graph, f"{old.name}/{OPERATOR}") if old.name else ""
    editor.insert_before(node, new)
    editor.replace_node(node, *new.outputs)


def _store(node: ir.Node, weight: ir.Value, spec: QuantSpec, reduce_range: bool) -> list[ir.Value]:
    """Integers, scales and zero points as the operator reads them."""
    tensor = constant_tensor(weight)
    assert tensor is not None
    directions, gates, size = (int(d) for d in tensor.shape.numpy())
    per_channel = isinstance(spec.granularity, PerBlock)
    shape = (directions, gates) if per_channel else (directions,)
    integers: ir.TensorProtocol | np.ndarray
    scale: ir.TensorProtocol | np.ndarray
    if is_absent(tensor):
        integers = absent(spec.dtype, (directions, size, gates))
        scale = absent(ir.DataType.FLOAT, shape)
    else:
        array = tensor.numpy()
        affine = weight_affine(array, spec, reduce_range=reduce_range)
        integers = np.ascontiguousarray(quantize(array, affine, spec).transpose(0, 2, 1))
        scale = np.ascontiguousarray(affine.scale.reshape(shape))
    base, home = weight.name or "weight", home_of(weight, node)
    return [
        add_initializer(home, f"{base}/transposed_int8", integers),
        add_initializer(home, f"{base}/scale", scale),
        add_initializer(home, f"{base}/zero_point", np.zeros(shape, np.int8)),
    ]


def _shape(node: ir.Node, index: int) -> tuple[int, int, int]:
    """Directions, rows of all gates, columns."""
    tensor = constant_tensor(node.inputs[index])
    assert tensor is not None
    directions, gates, size = (int(d) for d in tensor.shape.numpy())
    return directions, gates, size
