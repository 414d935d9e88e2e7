"""Operators that compute on integers, written as pairs around float ones, so as to look inside.

Here: `expand_integer_operators`, for the QLinear operators of ONNX and ONNX Runtime. Not here:
MatMulInteger and its like, whose results are compared where they are float again.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ..ir.graph import CONTRIB_DOMAIN, constant_array, fresh_name

_SUFFIX = "_quantized"
"""What ONNX Runtime's quantizer appends to the name of a value it quantizes."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """The float operator, where its inputs are as (value, scale, zero point), where the result's
    scale and zero point are, and where an int32 bias is."""

    op_type: str
    inputs: tuple[tuple[int, int, int], ...]
    result: tuple[int, int]
    bias: int | None = None


_TWO = ((0, 1, 2), (3, 4, 5))
_ONE = ((0, 1, 2),)
_FORMS = {
    ("", "QLinearConv"): _Form("Conv", _TWO, (6, 7), 8),
    ("", "QLinearMatMul"): _Form("MatMul", _TWO, (6, 7)),
    (CONTRIB_DOMAIN, "QLinearAdd"): _Form("Add", _TWO, (6, 7)),
    (CONTRIB_DOMAIN, "QLinearMul"): _Form("Mul", _TWO, (6, 7)),
    (CONTRIB_DOMAIN, "QGemm"): _Form("Gemm", _TWO, (7, 8), 6),
    (CONTRIB_DOMAIN, "QLinearSigmoid"): _Form("Sigmoid", _ONE, (3, 4)),
    (CONTRIB_DOMAIN, "QLinearLeakyRelu"): _Form("LeakyRelu", _ONE, (3, 4)),
    (CONTRIB_DOMAIN, "QLinearAveragePool"): _Form("AveragePool", _ONE, (3, 4)),
    (CONTRIB_DOMAIN, "QLinearGlobalAveragePool"): _Form("GlobalAveragePool", _ONE, (3, 4)),
}


def expand_integer_operators(model: ir.Model) -> None:
    """x8 -> QLinearConv -> y8   becomes   x8 -> DQ -> Conv -> Q -> y8, in place."""
    graph = model.graph
    for node in list(graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        form = _FORMS.get((domain, node.op_type))
        channels_last = node.attributes.get("channels_last")
        if form is None or (channels_last is not None and channels_last.as_int()):
            continue
        _expand(graph, node, form)


def _expand(graph: ir.Graph, node: ir.Node, form: _Form) -> None:
    made: list[ir.Node] = []
    inputs = [_float(graph, made, node, places) for places in form.inputs]
    bias = _at(node, form.bias) if form.bias is not None else None
    if bias is not None:
        scales = [constant_array(node.inputs[place]) for _, place, _ in form.inputs]
        if scales[0] is None or scales[1] is None:
            return
        scale = ir.Value(name=fresh_name(graph, f"{bias.name}/scale"))
        product = (scales[0].reshape(-1)[0] * scales[1].reshape(-1)).astype(scales[0].dtype)
        tensor = ir.Tensor(product if product.size > 1 else product.reshape(()), name=scale.name)
        scale.const_value, scale.type = tensor, ir.TensorType(tensor.dtype)
        scale.shape = ir.Shape(list(tensor.shape.numpy()))
        graph.register_initializer(scale)
        undone = ir.Node("", "DequantizeLinear", [bias, scale], {"axis": _axis(0)}, num_outputs=1)
        undone.outputs[0].name = fresh_name(graph, f"{bias.name}/float")
        made.append(undone)
        inputs.append(undone.outputs[0])
    drop = ("channels_last",)
    attributes = [a for a in node.attributes.values() if a.name not in drop]
    name = node.outputs[0].name or "value"
    core = ir.Node("", form.op_type, inputs, attributes, num_outputs=1, name=node.name)
    stem = name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else f"{name}/float"
    core.outputs[0].name = fresh_name(graph, stem)
    core.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    scale_in, zero_in = (_at(node, place) for place in form.result)
    again = ir.Node("", "QuantizeLinear", [core.outputs[0], scale_in, zero_in], num_outputs=1)
    again.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, [*made, core, again])
    old, new = node.outputs[0], again.outputs[0]
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    for slot, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[slot] = new
    graph.remove(node, safe=True)
    new.name = name


def _float(
    graph: ir.Graph, made: list[ir.Node], node: ir.Node, places: tuple[int, int, int]
) -> ir.Value:
    """An input behind a DequantizeLinear."""
    value, scale, zero = (_at(node, place) for place in places)
    turned = node.attributes.get("transB")
    first = node.op_type == "QLinearConv" or (turned is not None and turned.as_int())
    axis = 0 if first else 1
    undone = ir.Node(
        "", "DequantizeLinear", [value, scale, zero], {"axis": _axis(axis)}, num_outputs=1
    )
    base = value.name if value is not None else "value"
    undone.outputs[0].name = fresh_name(graph, f"{base}/float")
    undone.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    made.append(undone)
    return undone.outputs[0]


def _axis(axis: int) -> ir.Attr:
    return ir.AttrInt64("axis", axis)


def _at(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None
