"""Which nodes may compute in a 16-bit float, and which constants survive becoming one.

Here: `half_ports`, from the type constraints of ONNX's own schemas; the operators kept in float32
for their numerics; ranges. Not here: changing the graph (`half`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...ir.graph import ONNX_DOMAINS, has_subgraphs

_KEPT = (
    # positions, counts and sizes: 11 bits of mantissa end at 2048
    "Range CumSum CumProd NonMaxSuppression TopK Unique Cast CastLike ConstantOfShape EyeLike "
    # squares, exponentials and long sums leave the range or lose their small terms
    "Pow Exp Log Sqrt Reciprocal Det ReduceSum ReduceMean ReduceProd ReduceL1 ReduceL2 "
    "ReduceSumSquare ReduceLogSum ReduceLogSumExp LpNormalization MeanVarianceNormalization "
    # scales and signals
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear DFT STFT MelWeightMatrix "
    "HannWindow HammingWindow BlackmanWindow GridSample AffineGrid RoiAlign MaxRoiPool "
    # a dtype of their own
    "Constant RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial "
    "SequenceEmpty"
)
KEPT_OPS = frozenset(_KEPT.split())
"""Operators of the standard domain that stay in float32."""

_CONTRIB = frozenset({"Gelu", "FastGelu", "QuickGelu", "BiasGelu", "FusedMatMul"})
"""ONNX Runtime's own operators whose tensors all share one float type."""

_TYPES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclasses.dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a node that become 16-bit; the others stay as they are."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def half_ports(node: ir.Node, dtype: ir.DataType, opset: int) -> Ports | str:
    """What of a node may become `dtype`, or why nothing may.

    A port may when its type in the operator's schema is a variable that allows the dtype; one with
    a fixed type (Resize's scales) stays.
    """
    if node.domain in ONNX_DOMAINS and node.op_type in KEPT_OPS:
        return "kept in float32 for its numerics"
    if has_subgraphs(node):
        return "has a subgraph"
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if any(v.type is not None and not isinstance(v.type, ir.TensorType) for v in values):
        return "has values that are not tensors"
    if any(v.dtype is None for v in values):
        return "has values of unknown type"
    floats = {v for v in values if v.dtype == ir.DataType.FLOAT}
    if not floats:
        return ""
    if node.domain == "com.microsoft" and node.op_type in _CONTRIB:
        takes: tuple[bool, ...] = (True,)
        gives = takes
    elif node.domain in ONNX_DOMAINS:
        types = _schema_types(node.op_type, opset, _TYPES[dtype])
        if types is None:
            return f"not in opset {opset}"
        takes, gives = types
    else:
        return "a custom operator"
    ports = Ports(
        tuple(i for i, v in enumerate(node.inputs) if v in floats and _at(takes, i)),
        tuple(i for i, v in enumerate(node.outputs) if v in floats and _at(gives, i)),
    )
    if not ports.inputs and not ports.outputs:
        return f"not defined for {dtype.name.lower()} in opset {opset}"
    return ports


def _at(allowed: tuple[bool, ...], index: int) -> bool:
    """A variadic last parameter stands for all that follow."""
    return bool(allowed) and allowed[min(index, len(allowed) - 1)]


@functools.cache
def _schema_types(
    op_type: str, opset: int, wanted: str
) -> tuple[tuple[bool, ...], tuple[bool, ...]] | None:
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    variables: Mapping[str, list[str]] = {
        c.type_param_str: c.allowed_type_strs for c in schema.type_constraints
    }

    def allows(type_text: str) -> bool:
        return wanted in variables.get(type_text, ())

    return (
        tuple(allows(p.type_str) for p in schema.inputs),
        tuple(allows(p.type_str) for p in schema.outputs),
    )


def limit(dtype: ir.DataType) -> float:
    """The greatest finite value of a 16-bit float."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).max)


def misfit(array: np.ndarray, dtype: ir.DataType) -> str:
    """Why a float32 constant can't become `dtype`: '' when it can.

    Finite values may not become infinite, and a constant that is not zero may not vanish (an
    epsilon of 1e-12 guards a division).
    """
    if array.size == 0:
        return ""
    with np.errstate(over="ignore"):
        small = array.astype(dtype.numpy()).astype(np.float32)
    if (np.isfinite(array) & ~np.isfinite(small)).any():
        peak = float(np.abs(array[np.isfinite(array)]).max())
        return f"holds {peak:.4g}, beyond {limit(dtype):.4g}"
    if array.any() and not small.any():
        return f"holds {float(np.abs(array).max()):.4g}, which would become zero"
    return ""


def convert(array: np.ndarray, dtype: ir.DataType, *, saturate: bool = False) -> ir.TensorProtocol:
    """A float32 array in a 16-bit float, rounded to nearest even."""
    if saturate:
        bound = limit(dtype)
        array = np.clip(array, -bound, bound)
    return ir.Tensor(np.asarray(array.astype(dtype.numpy())), dtype=dtype)
