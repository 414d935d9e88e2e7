"""Products by weights that are stored in 8 or 4 bits, as ONNX Runtime fuses them: MatMulNBits.

Here: `fuse_stored_weights`. Not here: products of integers (`ort_integer`, `ort_dynamic`).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_BLOCK = 32
"""Elements of a block where the scales are those of whole columns."""
_SMALL = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)
_ACTIVATIONS = ("Gelu", "FastGelu")


def fuse_stored_weights(graph: RuntimeGraph) -> None:
    """DequantizeLinear of a matrix, then a product of floats by it: one MatMulNBits.

    Comes after static pairs have become integer operators.
    """
    for op in graph:
        if op in graph and op.is_onnx("MatMul", "Gemm"):
            _unpack_inside(graph, op)
        elif op in graph and op.type == "MatMulNBits" and len(op.inputs) < 6:
            _add_bias(graph, op)
    graph.sort()


def _unpack_inside(graph: RuntimeGraph, op: Op) -> None:
    data, weight = op.inputs[0], op.inputs[1]
    pair = weight.producer if weight is not None else None
    if data is None or weight is None or pair is None or pair.type != "DequantizeLinear":
        return
    stored = pair.inputs[0]
    if stored is None or not stored.constant or stored.dtype not in _SMALL or not stored.shape:
        return
    if data.producer is not None and data.producer.type == "DequantizeLinear":
        return
    if len(stored.shape) != 2 or graph.only_user(weight) is not op:
        return
    if op.attribute("transA", 0) or op.attribute("transB", 0):
        return
    saturating = graph.only_user(op.outputs[0])
    if (
        saturating is not None
        and saturating.is_onnx("Relu", "Clip")  # as if a QuantizeLinear were to do its work
        and graph.only_user(saturating.outputs[0]) is not None
    ):
        return
    if not _has_kernel(pair) or graph.only_user(stored) is not pair:
        return  # a weight that two products share stays unpacked, as is seen in saved graphs
    depth, columns = stored.shape
    size = int(pair.attribute("block_size", 0)) or _BLOCK
    bits = stored.dtype.bitwidth
    blocks = math.ceil(depth / size)
    inputs: list[Tensor | None] = [
        data,
        _made(f"{stored.name}_blocks", (columns, blocks, size * bits // 8), ir.DataType.UINT8),
        _made(f"{stored.name}_scales", (columns * blocks,), ir.DataType.FLOAT),
    ]
    if len(pair.inputs) > 2 and pair.inputs[2] is not None:
        packed = math.ceil(blocks * bits / 8)
        inputs.append(_made(f"{stored.name}_points", (columns * packed,), ir.DataType.UINT8))
    if len(op.inputs) > 2 and op.inputs[2] is not None:
        inputs += [None] * (5 - len(inputs)) + [op.inputs[2]]
    _set_inputs(graph, op, inputs)
    if not weight.users:
        graph.remove(pair)
    op.type, op.domain = "MatMulNBits", CONTRIB
    op.attributes = {"K": depth, "N": columns, "bits": bits, "block_size": size}
    graph.renew(op)


def _has_kernel(pair: Op) -> bool:
    """Blocks along the depth, or one scale for each column."""
    scale = pair.inputs[1]
    if scale is None or scale.shape is None or pair.inputs[0] is None:
        return False
    axis = int(pair.attribute("axis", 1)) % 2
    if pair.attribute("block_size", 0):
        return axis == 0
    return len(scale.shape) == 0 or axis == 1


def _made(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Tensor:
    return Tensor(name, shape, dtype, constant=True)


def _add_bias(graph: RuntimeGraph, op: Op) -> None:
    """A row of constants added to a product, unless the activation behind it takes the row."""
    result = op.outputs[0]
    user = graph.only_user(result)
    if user is None or not user.is_onnx("Add") or result.shape is None:
        return
    bias = user.inputs[1] if user.inputs[0] is result else user.inputs[0]
    if bias is None or not bias.constant or bias.shape != result.shape[-1:]:
        return
    after = graph.only_user(user.outputs[0])
    if after is not None and after.type in _ACTIVATIONS:
        return
    graph.remove(user)
    graph.set_output(op, 0, user.outputs[0])
    graph.set_input(op, 5, bias)
    op.origin += user.origin
    op.fused += (user.type,)
    graph.renew(op)


def _set_inputs(graph: RuntimeGraph, op: Op, inputs: list[Tensor | None]) -> None:
    for index in range(len(op.inputs)):
        graph.set_input(op, index, None)
    op.inputs.clear()
    for index, tensor in enumerate(inputs):
        graph.set_input(op, index, tensor)
