"""Lookup tables (embeddings) stored in 8 bits: rows are gathered as integers, then scaled.

Here: which Gathers qualify and the rewrite, shared by the 8-bit passes. Scales are per column: the
DequantizeLinear behind the Gather can apply those, and only the rows picked become float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from ...ir.edit import Editor
from ...ir.graph import (
    attribute,
    constant_tensor,
    fresh_name,
    is_absent,
    is_onnx_op,
    opset_of,
)
from ...ir.quant import PerChannel, PerTensor, QuantSpec
from .numbers import weight_affine
from .qdq import drop_unused_constant, store

MIN_ELEMENTS = 4096
"""Smaller tables save less than the nodes cost."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A constant that Gathers read by row, and nothing else reads."""

    value: ir.Value
    spec: QuantSpec
    gathers: tuple[ir.Node, ...]


def lookup_tables(model: ir.Model, exclude: tuple[str, ...] = ()) -> Iterator[Table]:
    """The tables of the main graph that qualify, in graph order. Reads no weight."""
    if opset_of(model) < 10:
        return
    seen: set[ir.Value] = set()
    for node in model.graph:
        value = node.inputs[0] if is_onnx_op(node, "Gather") else None
        if value is None or value in seen:
            continue
        seen.add(value)
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS:
            continue
        users = list(value.uses())
        gathers = tuple(dict.fromkeys(use.node for use in users))
        if value.is_graph_output() or not all(
            _picks_rows(use.node, use.idx, model.graph) for use in users
        ):
            continue
        if any(g.op_type in exclude or (g.name or "") in exclude for g in gathers):
            continue
        rank = len(tensor.shape)
        known = all(g.outputs[0].shape is not None for g in gathers)
        per_column = rank == 2 and opset_of(model) >= 13 and known
        granularity = PerChannel(1) if per_column else PerTensor()
        yield Table(value, QuantSpec(ir.DataType.INT8, True, granularity), gathers)


def write_tables(model: ir.Model, tables: list[Table]) -> None:
    """Rewrite the Gathers of each table, in place; absent tables stay absent.

    before: Gather(W, ids) -> y
    after:  Gather(W8, ids) -> DequantizeLinear(axis=-1) -> y
    """
    editor = Editor()
    for table in tables:
        tensor = constant_tensor(table.value)
        assert tensor is not None
        affine = None if is_absent(tensor) else weight_affine(tensor.numpy(), table.spec)
        integers, scale, zero_point = store(
            editor, table.gathers[0], table.value, table.spec, affine
        )
        for gather in table.gathers:
            result = gather.outputs[0]
            gathered = ir.Node(
                "",
                "Gather",
                [integers, gather.inputs[1]],
                ir.convenience.convert_attributes({"axis": 0}),
                num_outputs=1,
                name=gather.name,
            )
            gathered.outputs[0].type = ir.TensorType(table.spec.dtype)
            gathered.outputs[0].shape = result.shape
            axis = {} if result.shape is None else {"axis": max(len(result.shape) - 1, 0)}
            if isinstance(table.spec.granularity, PerTensor):
                axis = {}
            scaled = ir.Node(
                "",
                "DequantizeLinear",
                [gathered.outputs[0], scale, zero_point],
                ir.convenience.convert_attributes(axis),
                num_outputs=1,
            )
            scaled.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            scaled.outputs[0].shape = result.shape
            editor.insert_before(gather, gathered)
            editor.insert_before(gather, scaled)
            scaled.name = fresh_name(model.graph, f"{result.name}/dequantize")
            editor.replace_node(gather, scaled.outputs[0])
        drop_unused_constant(table.value)


def _picks_rows(node: ir.Node, index: int, graph: ir.Graph) -> bool:
    return (
        is_onnx_op(node, "Gather")
        and index == 0
        and node.graph is graph
        and attribute(node, "axis", 0) == 0
    )
