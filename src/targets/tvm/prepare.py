"""A private copy of a graph, reshaped so that more of it survives TVM's ONNX importer.

Here: cloning, inlining, fixing dimensions to numbers, renaming symbolic dimensions that TVM would
parse as arithmetic, expanding operators by ONNX's own definition, and unrolling short LSTMs.
Not here: the import itself (`importer`). Nothing here changes the caller's model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes
from onnx_ir import external_data

from ...errors import UsageError, WeightsAbsentError
from ...ir.graph import (
    absent_weights,
    graphs,
    is_onnx_op,
    static_shape,
)
from .lstm import lstm_obstacle, unroll_lstm


def private_copy(model: ir.Model, dims: Mapping[str, int] | None = None) -> ir.Model:
    """A copy of `model` with weights in memory, functions inlined, and `dims` fixed.

    Args:
        model: any graph with weights; it is not changed.
        dims: symbolic dimension name -> size, for example `{"batch": 1}`.

    Raises:
        WeightsAbsentError: a weight has no data.
        UsageError: `dims` names a dimension that no input has, or a size below 1.
    """
    missing = absent_weights(model)
    if missing:
        raise WeightsAbsentError(
            "TVM compiles weights into the library, and this model has none",
            where=f"initializer {missing[0]!r}" + _and_more(len(missing) - 1),
            why="the model is an architecture without weights",
            fix="use `edgepass.estimate`, which needs shapes only, or provide the weights",
        )
    copy = fix_dims(model, dims) if dims else model.clone()
    external_data.load_to_model(copy)
    if copy.functions:
        onnx_passes.InlinePass()(copy)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(copy)
    onnx_passes.RemoveInitializersFromInputsPass()(copy)
    _name_symbolic_dims(copy)
    for node in list(copy.graph):
        if is_onnx_op(node, "LSTM") and lstm_obstacle(node) is None:
            unroll_lstm(copy.graph, node)
    return copy


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


# --- dimensions ------------------------------------------------------------------------------


def symbolic_dims(model: ir.Model) -> dict[str, list[str]]:
    """The key of each dynamic input dimension -> the input axes (`name[axis]`) that have it.

    The key is the symbol's name, or `name[axis]` for a dimension without a name. `fix_dims`
    takes these keys.
    """
    found: dict[str, list[str]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if _is_dynamic(dim):
                found.setdefault(dim_key(value, axis), []).append(f"{value.name}[{axis}]")
    return found


def fix_dims(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """A copy of `model` with dynamic input dimensions fixed, and shapes inferred anew.

    Args:
        model: any graph; it is not changed.
        dims: a key of `symbolic_dims` -> size. Dimensions not named stay dynamic.

    Raises:
        UsageError: no input has such a dimension, or a size is below 1.
    """
    known = symbolic_dims(model)
    for name, size in dims.items():
        if name not in known or size < 1:
            raise UsageError(
                f"The dimension {name!r} cannot be fixed to {size}",
                where=f"dims={dict(dims)!r}",
                why=f"dynamic dimensions of the inputs: {', '.join(known) or 'none'}"
                if name not in known
                else "a dimension is at least 1",
                fix="name a dynamic dimension of an input, and a size of 1 or more",
            )
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None:
            sizes = (dims.get(dim_key(value, axis), d) for axis, d in enumerate(value.shape.dims))
            value.shape = ir.Shape(list(sizes))
    # Names inside the graph were inferred while the dimension was dynamic; sizes replace them.
    for graph in graphs(copy):
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and static_shape(value) is None:
                    value.shape = None
    onnx_passes.ShapeInferencePass()(copy)
    return copy


def _is_dynamic(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) or dim < 0


def dim_key(value: ir.Value, axis: int) -> str:
    """How messages, `dims` and the side file call one dynamic dimension."""
    dim = value.shape.dims[axis] if value.shape is not None else None
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return name or f"{value.name}[{axis}]"


def _name_symbolic_dims(model: ir.Model) -> None:
    """Give every symbolic input dimension a plain identifier.

    TVM splits a dimension's name at `+ - * /` and evaluates it, so `seq-len` would become a
    difference. Dimensions without a name each get one of their own.
    """
    renamed: dict[str, str] = {}
    taken: set[str] = set()
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        dims: list[int | ir.SymbolicDim] = []
        for axis, dim in enumerate(value.shape.dims):
            if not _is_dynamic(dim):
                dims.append(dim)
                continue
            key = dim_key(value, axis)
            if key not in renamed:
                renamed[key] = _identifier(key, taken)
            dims.append(ir.SymbolicDim(renamed[key]))
        value.shape = ir.Shape(dims)


def _identifier(text: str, taken: set[str]) -> str:
    name = re.sub(r"\W", "_", text)
    if not name or name[0].isdigit():
        name = f"d_{name}"
    unique, n = name, 0
    while unique in taken:
        n += 1
        unique = f"{name}_{n}"
    taken.add(unique)
    return unique


# --- expansion by ONNX's own definitions -----------------------------------------------------


def expand_by_definition(proto: onnx.ModelProto, op_types: set[str]) -> onnx.ModelProto:
    """Replace the standard operators named by ONNX's definition of them, recursively."""
    if not op_types:
        return proto
    # The definitions that depend on context read input types, so they must be in the file.
    typed = onnx.shape_inference.infer_shapes(proto)
    chosen = [("", name) for name in sorted(op_types)]
    return onnx.inliner.inline_selected_functions(typed, chosen, inline_schema_functions=True)
