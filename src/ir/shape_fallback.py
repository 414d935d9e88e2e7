"""Shapes of the standard operators that have no rule here, from the onnx package's own inference.

One node at a time: types and small constants go in as protobufs, types come out. What it returns
without a name gets a fresh symbol.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from . import dims as dim_math
from .graph import constant_tensor, has_subgraphs, is_absent
from .shape_rules import Call, Contradiction, Dims, Fact, Signature, Undecided

_MAX_ELEMENTS = 1024


def infer_with_onnx(call: Call, sig: Signature, ir_version: int) -> None:
    """Put what `onnx.shape_inference` says of each output.

    Raises `Contradiction` when it finds one, `Undecided` when an input's type is not known.
    """
    node = call.node
    if has_subgraphs(node) or any(a.is_ref() for a in node.attributes.values()):
        raise Undecided
    proto = ir.to_proto(node)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    names = []
    for index, value in enumerate(node.inputs):
        if value is None:
            names.append("")
            continue
        name = f"i{index}"
        names.append(name)
        types[name] = _type_proto(call.fact(index))
        tensor = constant_tensor(value)
        if tensor is not None and not is_absent(tensor) and tensor.size <= _MAX_ELEMENTS:
            data[name] = _tensor_proto(tensor)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(f"o{i}" if v.name else "" for i, v in enumerate(node.outputs))
    try:
        found = onnx.shape_inference.infer_node_outputs(
            sig.schema,
            proto,
            types,
            data,
            opset_imports=_opsets(tuple(call.engine.opsets.items())),
            ir_version=ir_version,
        )
    except onnx.shape_inference.InferenceError as error:
        raise Contradiction(_first_line(str(error))) from error
    for index in range(len(node.outputs)):
        out = found.get(f"o{index}")
        if out is not None:
            _put(call, index, out)


@functools.lru_cache(maxsize=64)
def _opsets(items: tuple[tuple[str, int], ...]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(domain, version) for domain, version in items]


def _type_proto(fact: Fact) -> onnx.TypeProto:
    kind = fact.kind
    if kind is None:
        if fact.dtype is None:
            raise Undecided
        kind = ir.TensorType(fact.dtype)
    shape = None if fact.dims is None else ir.Shape(fact.dims)
    value = ir.Value(name="value", type=kind, shape=shape)
    return ir.to_proto(value).type


def _tensor_proto(tensor: ir.TensorProtocol) -> onnx.TensorProto:
    try:
        return ir.to_proto(tensor)
    except OSError as error:  # external data that is not there
        raise Undecided from error


def _put(call: Call, index: int, out: onnx.TypeProto) -> None:
    if not out.WhichOneof("value") or out.HasField("map_type"):
        return
    try:
        kind = ir.from_proto(onnx.ValueInfoProto(name="value", type=out))
    except (NotImplementedError, ValueError, RuntimeError):  # maps have no type in onnx_ir
        return
    dims: Dims | None = None
    if kind.shape is not None:
        dims = tuple(
            call.fresh(index, axis) if dim_math.is_unknown(d) else d
            for axis, d in enumerate(kind.shape.dims)
        )
    plain = kind.type is None or isinstance(kind.type, ir.TensorType)
    dtype = kind.dtype if kind.dtype != ir.DataType.UNDEFINED else None
    call.put(index, dims, dtype=dtype, kind=None if plain else kind.type)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "the operator's own shape inference fails"
