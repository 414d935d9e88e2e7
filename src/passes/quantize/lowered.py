"""Integer forms of operators that a runtime has no integer kernel for, made of those it has.

Here: `lower_members`, for HardSigmoid, HardSwish and the mean over all positions of a channel, once
their pairs are written. Not here: which nodes (`plan`), the pairs (`qdq`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...ir.edit import Editor, insert_like
from ...ir.graph import attribute, constant_tensor, is_absent
from .numbers import Affine, Range, activation_affine

HARDSWISH = (1 / 6, 0.5)
"""Slope and offset of the HardSigmoid in a HardSwish (ONNX HardSwish-14)."""


def slope(node: ir.Node) -> tuple[float, float]:
    """`alpha` and `beta` of the HardSigmoid that a node is or has in it."""
    if node.op_type == "HardSwish":
        return HARDSWISH
    return float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))


def lower_members(editor: Editor, nodes: Iterable[ir.Node], dtype: ir.DataType) -> None:
    """Replace the nodes that INTEGER_OPS calls `lowered`; they stand between pairs of `dtype`.

    ReduceMean(x, axes=[2, 3])  ->  GlobalAveragePool(x)
    HardSigmoid(x) -> Q(s)      ->  Add(x, beta / alpha) -> Q(s / alpha)
    HardSwish(x)                ->  Mul(x, DQ(1/255, Q(6/255, Add(x, 3))))

    Saturation of a result from 0 to 1 in all the integers there are is the clipping of the
    function, and the factor alpha is a matter of the scale: neither costs anything.
    """
    for node in nodes:
        match node.op_type:
            case "ReduceMean":
                _replace(editor, node, "GlobalAveragePool", node.inputs[0])
            case "HardSigmoid":
                _lower_gate(editor, node, dtype)
            case "HardSwish":
                _lower_swish(editor, node, dtype)


def _lower_gate(editor: Editor, node: ir.Node, dtype: ir.DataType) -> None:
    alpha, _ = slope(node)
    (quantize,) = (use.node for use in node.outputs[0].uses())
    scale = constant_tensor(quantize.inputs[1])
    assert scale is not None
    wide = scale if is_absent(scale) else np.asarray(scale.numpy() / np.float32(alpha))
    wider = editor.initializer(node, f"{node.outputs[0].name}/wide_scale", wide)
    quantize.replace_input_with(1, wider)
    _replace(editor, node, "Add", node.inputs[0], _offset(editor, node, dtype))


def _lower_swish(editor: Editor, node: ir.Node, dtype: ir.DataType) -> None:
    alpha, _ = slope(node)
    value = node.inputs[0]
    moved = insert_like(editor, node, "Add", [value, _offset(editor, node, dtype)])
    wide = activation_affine(Range(0.0, 1 / alpha), dtype, False)
    narrow = Affine(wide.scale * np.float32(alpha), wide.zero_point)
    numbers = _numbers(editor, node, wide)
    quantized = insert_like(editor, node, "QuantizeLinear", [moved, *numbers], dtype)
    gate = insert_like(
        editor, node, "DequantizeLinear", [quantized, *_numbers(editor, node, narrow)]
    )
    _replace(editor, node, "Mul", value, gate)


def _offset(editor: Editor, node: ir.Node, dtype: ir.DataType) -> ir.Value:
    """beta / alpha behind a DequantizeLinear, exact up to float rounding."""
    alpha, beta = slope(node)
    number = beta / alpha
    affine = activation_affine(Range(min(number, 0.0), max(number, 0.0)), dtype, False)
    least, greatest = int(dtype.min), int(dtype.max)
    stored = round(number / float(affine.scale)) + int(affine.zero_point)
    integer = np.asarray(min(max(stored, least), greatest), dtype.numpy())
    integers = editor.initializer(node, f"{node.outputs[0].name}/offset", integer)
    result = insert_like(
        editor, node, "DequantizeLinear", [integers, *_numbers(editor, node, affine)]
    )
    result.shape = ir.Shape([])
    return result


def _numbers(editor: Editor, node: ir.Node, affine: Affine) -> list[ir.Value]:
    base = node.outputs[0].name
    return [
        editor.initializer(node, f"{base}/gate_scale", affine.scale),
        editor.initializer(node, f"{base}/gate_zero_point", affine.zero_point),
    ]


def _replace(editor: Editor, node: ir.Node, op_type: str, *inputs: ir.Value | None) -> None:
    """Another operator in the node's place."""
    editor.replace_node(node, insert_like(editor, node, op_type, inputs))
