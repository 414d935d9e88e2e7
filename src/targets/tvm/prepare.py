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

from ...errors import WeightsAbsentError
from ...ir.graph import (
    ONNX_DOMAINS,
    absent_weights,
    is_onnx_op,
)
from ...ir.sizing import dim_name, fix_dims
from .lstm import lstm_obstacle, unroll_lstm
from .symbolic import name_shape_targets, write_out_padding

EXPANDED_BY_DEFINITION = frozenset(
    {
        "Celu",
        "CenterCropPad",
        "NegativeLogLikelihoodLoss",
        "RotaryEmbedding",
        "SoftmaxCrossEntropyLoss",
        "SwiGLU",
        "Swish",
    }
)
"""Operators TVM has no converter for, which ONNX defines as functions of others that it has.

`Attention` is not among them: TVM's simplifier does not finish on some of its expansions.
"""


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
    copy = _expand_by_definition(copy)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    onnx_passes.RemoveInitializersFromInputsPass()(copy)
    _drop_unused_outputs(copy.graph)
    write_out_padding(copy.graph)
    name_shape_targets(copy.graph)
    _shapes_as_tensors(copy.graph)
    _name_symbolic_dims(copy)
    for node in list(copy.graph):
        if is_onnx_op(node, "LSTM") and lstm_obstacle(node) is None:
            unroll_lstm(copy.graph, node)
    return copy


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


# --- dimensions ------------------------------------------------------------------------------


def _is_dynamic(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) or dim < 0


def _name_symbolic_dims(model: ir.Model) -> None:
    """Give every dynamic input dimension a plain identifier, and its users inside the same one.

    TVM splits a dimension's name at `+ - * /` and evaluates it, so `seq-len` would become a
    difference. Dimensions without a name each get one of their own.
    """
    renamed: dict[str, str] = {}
    taken: set[str] = set()
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            key = dim_name(value, axis)
            if _is_dynamic(dim) and key not in renamed:
                renamed[key] = _identifier(key, taken)
    values = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *values):
        if value.shape is not None and any(map(_is_dynamic, value.shape.dims)):
            keys = (dim_name(value, axis) for axis in range(len(value.shape.dims)))
            value.shape = ir.Shape(
                [
                    ir.SymbolicDim(renamed.get(key, key)) if _is_dynamic(dim) else dim
                    for key, dim in zip(keys, value.shape.dims, strict=True)
                ]
            )


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


# --- smaller repairs -------------------------------------------------------------------------


def _expand_by_definition(model: ir.Model) -> ir.Model:
    """Replace operators that TVM lacks by ONNX's own definition of them, until none is left.

    The definitions that depend on context read input types, so shapes are inferred first. A
    definition may use another such operator, hence the loop; one that gives up is left as it is.
    """
    for _ in range(4):
        found = {node.op_type for node in model.graph if node.domain in ONNX_DOMAINS}
        chosen = [("", name) for name in sorted(found & EXPANDED_BY_DEFINITION)]
        if not chosen:
            break
        # ONNX's inliner leaves references to attributes that a node does not spell out.
        onnx_passes.AddDefaultAttributesPass()(model)
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
        try:
            proto = onnx.inliner.inline_selected_functions(
                proto, chosen, inline_schema_functions=True
            )
        except RuntimeError:  # a definition for types that are not known here
            break
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model


def _drop_unused_outputs(graph: ir.Graph) -> None:
    """Shorten output lists: TVM counts a `MaxPool`'s unused indices as a result it must give."""
    for node in graph:
        keep = len(node.outputs)
        while (
            keep > 1
            and not node.outputs[keep - 1].uses()
            and not (node.outputs[keep - 1].is_graph_output())
        ):
            keep -= 1
        if keep < len(node.outputs) and node.op_type != "Split":
            node.resize_outputs(keep)


_TAKES_SHAPES = (
    *("Reshape", "Resize", "ConstantOfShape", "Slice", "Shape", "Expand", "Concat"),
    *("Equal", "Where", "Cast", "CastLike"),
)
# Operators for which TVM's importer accepts the symbolic result of `Shape` as it is. `Gather` and
# `Squeeze` are left out: they make a number that is no tensor, which few operators take.


def _shapes_as_tensors(graph: ir.Graph) -> None:
    """Put a `Cast` to int64 between `Shape` and users that TVM wants to see a tensor at."""
    symbolic: set[ir.Value] = set()
    for node in list(graph):
        used = [position for position, value in enumerate(node.inputs) if value in symbolic]
        takes = is_onnx_op(node, *_TAKES_SHAPES)
        if is_onnx_op(node, "Concat"):
            takes = all(v in symbolic or (v and v.is_initializer()) for v in node.inputs)
        passes_on = is_onnx_op(node, "Slice", "Where", "Reshape") and 0 in used
        if is_onnx_op(node, "Shape") or passes_on or _joins_integers(node):
            symbolic.add(node.outputs[0])
        for position in used if not takes else ():
            cast = ir.node("Cast", [node.inputs[position]], attributes={"to": ir.DataType.INT64})
            graph.insert_before(node, cast)
            node.replace_input_with(position, cast.outputs[0])


def _joins_integers(node: ir.Node) -> bool:
    """Whether TVM takes a `Concat` for a shape: it does so for constants as well."""
    output = node.outputs[0]
    rank_one = output.shape is not None and len(output.shape.dims) == 1
    return is_onnx_op(node, "Concat") and output.dtype == ir.DataType.INT64 and rank_one
