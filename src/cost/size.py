"""Bytes of a model as edgepass saves it, before it is saved, and its number of parameters.

Here: `file_bytes` (of the graph as it is, or as a quantization plan would leave it) and
`parameter_count`. Neither reads a weight. Not here: the arithmetic of messages (`wire`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from ..ir.graph import attribute, constant_tensor, graphs, is_onnx_op, node_name
from ..ir.quant import (
    PerBlock,
    PerChannel,
    QuantPlan,
    QuantSpec,
    is_qdq,
    planned_bytes,
    stored_shape,
)
from ..targets.onnx_file import INLINE_LIMIT, leaves_message
from .wire import (
    Placed,
    framed,
    model_bytes,
    node_bytes,
    plain_node_bytes,
    plain_tensor_bytes,
    tensor_bytes,
    tensor_type_bytes,
    text_bytes,
    value_info_bytes,
)

_ALIGNMENT = 4096  # of each tensor in the data file (targets.onnx_file)


def file_bytes(
    model: ir.Model,
    plan: QuantPlan | None = None,
    *,
    external_data: bool | None = None,
    inline_limit: int = INLINE_LIMIT,
    file_name: str = "model.onnx",
) -> int:
    """Bytes on disk of `model.onnx` and, where weights leave it, `model.onnx.data`.

    For the graph as it is the number is exact, weights absent or not. With a plan that is not
    applied yet, the plan's tensors, scales, zero points, Q/DQ nodes and value descriptions take the
    place of what they replace. A value or tensor shared by many nodes counts once. The arguments
    besides are those of `targets.onnx_file.write_onnx`.
    """
    stored = sum(_nbytes(v) for graph in graphs(model) for v in graph.initializers.values())
    change = _plan_change(model, plan) if plan is not None else 0
    if external_data is None:
        external_data = stored + change > inline_limit
    if not external_data:
        return model_bytes(model) + change
    placed, data = _place(model, f"{file_name}.data")
    return model_bytes(model, placed) + data + change


def _nbytes(value: ir.Value) -> int:
    if value.const_value is not None:
        return value.const_value.nbytes
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return 0
    return (math.prod(value.shape.numpy()) * value.dtype.bitwidth + 7) // 8


def _place(model: ir.Model, location: str) -> tuple[Placed, int]:
    """Where `write_onnx` puts each big tensor of the main graph, and the data file's size."""
    placed: dict[str, tuple[str, int, int]] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        if not leaves_message(value):
            continue
        length = _nbytes(value)
        offset = end + (-end % _ALIGNMENT)
        placed[name] = (location, offset, length)
        end = offset + length
    return placed, end


# --- plans -----------------------------------------------------------------------------------


def _plan_change(model: ir.Model, plan: QuantPlan) -> int:
    """Bytes that applying a plan adds (or takes away: negative) in the saved file.

    Names follow the writer of Q/DQ pairs (`base/scale`, `base/dequantize`, ...), since in a small
    model they are a visible share of the file.
    """
    integers = set(plan.nodes)
    change = 0
    for value in (v for graph in graphs(model) for v in _values(graph)):
        spec = plan.entries.get(value.name or "")
        if spec is None:
            continue
        if constant_tensor(value) is not None:
            change += _stored_change(value, spec, plan, integers)
        elif spec.is_integer:
            change += _pair_bytes(value, spec) - _absorbed_bytes(value, integers)
    return change


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from (v for v in graph.inputs if not v.is_initializer())
    for node in graph:
        yield from node.outputs


def _stored_change(value: ir.Value, spec: QuantSpec, plan: QuantPlan, integers: set[str]) -> int:
    """A constant's new tensors and DequantizeLinear nodes, less the float it replaces."""
    tensor = constant_tensor(value)
    assert tensor is not None
    name = value.name or "weight"
    dims = tuple(int(d) for d in tensor.shape.numpy())
    old = framed(tensor_bytes(tensor, name)) if value.is_initializer() else 0
    if not spec.is_integer:
        kept = tensor.nbytes if value.name in plan.kept else 0
        return planned_bytes(plan, value) - tensor.nbytes - kept
    if not old and (producer := value.producer()) is not None:
        old = framed(node_bytes(producer))
    copies = plan.copies.get(name, 1)
    suffix = spec.dtype.name.lower()
    new = framed(plain_tensor_bytes(f"{name}/{suffix}", spec.dtype, stored_shape(spec, dims)))
    scale_dims = spec.parameter_shape(dims)
    new += framed(plain_tensor_bytes(f"{name}/scale", ir.DataType.FLOAT, scale_dims))
    inputs = [f"{name}/{suffix}", f"{name}/scale"]
    if spec.zero_points:
        new += framed(plain_tensor_bytes(f"{name}/zero_point", spec.dtype, scale_dims))
        inputs.append(f"{name}/zero_point")
    if spec.folded:
        result = f"{name}/mul"
        nodes = _folded_nodes(name, inputs, dims)
        renamed = sum(text_bytes(result) - text_bytes(name) for _ in value.uses())
        return copies * (new + nodes) + renamed - (0 if value.name in plan.kept else old)
    attributes: dict[str, int] = {}
    match spec.granularity:
        case PerChannel(axis):
            attributes["axis"] = axis
        case PerBlock(size, axis):
            attributes.update(axis=axis, block_size=size)
    result = f"{name}/dequantized"
    dequantize = plain_node_bytes(
        "DequantizeLinear", f"{name}/dequantize", inputs, result, **attributes
    )
    dequantize += _told(result, ir.DataType.FLOAT, dims)
    readers = [use.node for use in value.uses()]
    if value.name in plan.kept:  # the others go on reading the floats
        readers = [node for node in readers if node_name(node) in integers]
    renamed = sum(text_bytes(result) - text_bytes(name) for _ in readers)
    change = copies * new + max(len(readers), copies) * dequantize + renamed
    return change - (0 if value.name in plan.kept else old)


def _folded_nodes(name: str, stored: list[str], dims: tuple[int, ...]) -> int:
    """The Cast and Mul that a runtime computes at load, and their descriptions."""
    cast, result = f"{name}/cast", f"{name}/mul"
    size = plain_node_bytes("Cast", cast, stored[:1], cast, to=int(ir.DataType.FLOAT))
    size += plain_node_bytes("Mul", result, [cast, stored[1]], result)
    return size + sum(_told(made, ir.DataType.FLOAT, dims) for made in (cast, result))


def _pair_bytes(value: ir.Value, spec: QuantSpec) -> int:
    """QuantizeLinear and DequantizeLinear behind a value, their parameters and descriptions."""
    name = value.name or "value"
    scale, zero_point = f"{name}/scale", f"{name}/zero_point"
    stored, result = f"{name}/quantized", f"{name}/dequantized"
    size = framed(plain_tensor_bytes(scale, ir.DataType.FLOAT, ()))
    size += framed(plain_tensor_bytes(zero_point, spec.dtype, ()))
    size += plain_node_bytes(
        "QuantizeLinear", f"{name}/quantize", [name, scale, zero_point], stored
    )
    size += plain_node_bytes(
        "DequantizeLinear", f"{name}/dequantize", [stored, scale, zero_point], result
    )
    shape = value.shape
    dims = (
        None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape.dims)
    )
    size += _told(stored, spec.dtype, dims) + _told(result, ir.DataType.FLOAT, dims)
    return size + len(value.uses()) * (text_bytes(result) - text_bytes(name))


def _absorbed_bytes(value: ir.Value, integers: set[str]) -> int:
    """A Relu or Clip between an integer node and its pair, which saturation replaces."""
    node = value.producer()
    if node is None or not is_onnx_op(node, "Relu", "Clip") or node_name(node) in integers:
        return 0
    before = node.inputs[0]
    maker = before.producer() if before is not None else None
    if (
        before is None
        or maker is None
        or node_name(maker) not in integers
        or len(before.uses()) != 1
    ):
        return 0
    return framed(node_bytes(node)) + framed(value_info_bytes(before))


def _told(name: str, dtype: ir.DataType, dims: tuple[int | str | None, ...] | None) -> int:
    return framed(text_bytes(name) + framed(tensor_type_bytes(dtype, dims)))


# --- parameters ------------------------------------------------------------------------------


def parameter_count(model: ir.Model) -> int:
    """Elements of the weights: constants of rank 1 and above that hold numbers a net learned.

    Floats and 8-bit or smaller integers count, and whatever a DequantizeLinear reads as data.
    Scales, zero points, shapes, indices and scalars do not. A shared weight counts once.
    Unlike torch's `parameters()` the running statistics of a BatchNormalization count too.
    """
    return sum(_weight_elements(v) for graph in graphs(model) for v in _constants(graph))


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from (node.outputs[0] for node in graph if is_onnx_op(node, "Constant"))


def _weight_elements(value: ir.Value) -> int:
    """Elements of one constant; 0 when it is no weight."""
    tensor = constant_tensor(value) or value.const_value
    dtype = tensor.dtype if tensor is not None else value.dtype
    shape = tensor.shape if tensor is not None else value.shape
    if dtype is None or shape is None or not all(isinstance(d, int) for d in shape):
        return 0
    dims = shape.numpy()
    if not dims:
        return 0
    elements = math.prod(dims)
    uses = value.uses()
    packed = [use for use in uses if use.node.op_type == "MatMulNBits"]
    if packed:  # two 4-bit weights to a byte; the other inputs are scales and zero points
        node = packed[0].node
        return int(attribute(node, "K", 0)) * int(attribute(node, "N", 0)) * (packed[0].idx == 1)
    if uses and all(is_onnx_op(use.node, "BitShift") for use in uses):
        # places of eight codes to a byte; a bit for each element says which of them are there
        return dims[0] * 8 if len(dims) == 3 else 0
    if uses and all(is_qdq(use.node) for use in uses):
        return elements if any(use.idx == 0 for use in uses) else 0
    if dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return 0
    return elements if dtype.is_floating_point() or dtype.bitwidth <= 8 else 0
