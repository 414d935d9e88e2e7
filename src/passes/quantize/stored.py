"""Weights stored small that a runtime unpacks once, when it loads the model: a run is as in float.

Here: `store_folded`, the form for what no integer kernel reads (Conv, LSTM, layers left out of a
quantization), also inside the bodies of If and Loop; weights may be absent. Every operator of the
chain has constant inputs only, so ONNX Runtime and TVM compute it at load; a DequantizeLinear they
would keep, and unpack at every run. Not here: which weights (`weight_only`), scales (`numbers`).
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import constant_tensor
from ...ir.quant import PerChannel, PerTensor, QuantSpec
from .folded_chain import FoldedChain
from .numbers import Affine, quantize
from .qdq import absent, drop_unused_constant, pack

Shared = dict[tuple[ir.Value, QuantSpec], ir.Value]
"""What `store_folded` has stored, so that readers of one weight share it."""


def store_folded(
    editor: Editor,
    node: ir.Node,
    index: int,
    spec: QuantSpec,
    affine: Affine | None,
    shared: Shared | None = None,
) -> ir.Value:
    """Store input `index` of a node in integers, with nodes that a runtime folds at load.

    before: Conv(x, W)      after: Conv(x, Mul(Cast(W8), scale))

    `spec` is of 8 bits, per tensor or per channel; without `affine` the tensors stay absent. The
    nodes go to the front of the graph that holds the weight, which may be an outer one. Give the
    same dict as `shared` for readers of one weight to share what is stored. The float constant
    goes when nothing reads it any more.

    Returns the value that the node now reads.
    """
    value = node.inputs[index]
    assert value is not None
    key = value, spec
    result = None if shared is None else shared.get(key)
    if result is None:
        result = _unpacked(editor, node, value, spec, affine)
        if shared is not None:
            shared[key] = result
    editor.modified = True
    node.replace_input_with(index, result)
    drop_unused_constant(value)
    return result


def _unpacked(
    editor: Editor, node: ir.Node, value: ir.Value, spec: QuantSpec, affine: Affine | None
) -> ir.Value:
    tensor = constant_tensor(value)
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    chain = FoldedChain(editor, node, value)
    suffix = spec.dtype.name.lower()
    if affine is None:
        integers = chain.constant(suffix, absent(spec.dtype, shape))
    else:
        integers = chain.constant(suffix, pack(quantize(tensor.numpy(), affine, spec), spec.dtype))
    floats = chain.cast(integers)
    spread = _spread_shape(spec, shape)
    if spec.zero_points:
        points = chain.parameter(
            "zero_point", None if affine is None else affine.zero_point, spec.dtype, spread
        )
        floats = chain.add("Sub", [floats, chain.cast(points)], shape)
    scale = chain.parameter(
        "scale", None if affine is None else affine.scale, ir.DataType.FLOAT, spread
    )
    return chain.add("Mul", [floats, scale], shape)


def _spread_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales that broadcast against the tensor."""
    match spec.granularity:
        case PerTensor():
            return ()
        case PerChannel(axis):
            last = len(shape) - axis - 1
            return (shape[axis], *([1] * last))
    raise NotImplementedError(f"{spec.granularity} is not stored this way")
