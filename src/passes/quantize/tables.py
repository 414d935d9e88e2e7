"""Lookup tables (embeddings) stored in 8 bits: rows are gathered as integers, then scaled.

Here: which Gathers qualify and the rewrite, shared by the 8-bit passes. Scales are per column: a
multiplication behind the Gather can apply those, and only the rows picked become float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from ...ir.edit import Editor, insert_like
from ...ir.graph import (
    attribute,
    constant_tensor,
    graph_tree,
    is_absent,
    is_onnx_op,
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
    """The tables that qualify, in graph order, in branches too. Reads no weight."""
    seen: set[ir.Value] = set()
    for node in (n for graph in graph_tree(model.graph) for n in graph):
        value = node.inputs[0] if is_onnx_op(node, "Gather") else None
        if value is None or value in seen:
            continue
        seen.add(value)
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS:
            continue
        users = list(value.uses())
        gathers = tuple(dict.fromkeys(use.node for use in users))
        if value.is_graph_output() or not all(_picks_rows(use.node, use.idx) for use in users):
            continue
        if any(g.op_type in exclude or (g.name or "") in exclude for g in gathers):
            continue
        granularity = PerChannel(1) if len(tensor.shape) == 2 else PerTensor()
        spec = QuantSpec(ir.DataType.INT8, True, granularity, zero_points=False)
        yield Table(value, spec, gathers)


def write_tables(model: ir.Model, tables: list[Table]) -> None:
    """Rewrite the Gathers of each table, in place; absent tables stay absent.

    before: Gather(W, ids) -> y
    after:  Gather(W8, ids) -> Cast -> Mul(scales) -> y

    Not a DequantizeLinear: beside a MatMul or Add a runtime would take its scales, one a column,
    for those of an activation, which has one.
    """
    editor = Editor()
    for table in tables:
        tensor = constant_tensor(table.value)
        assert tensor is not None
        affine = None if is_absent(tensor) else weight_affine(tensor.numpy(), table.spec)
        integers, scale, _ = store(editor, table.gathers[0], table.value, table.spec, affine)
        for gather in table.gathers:
            rows = gather.inputs[1]
            assert rows is not None
            value = insert_like(
                editor, gather, "Gather", [integers, rows], table.spec.dtype, axis=0
            )
            value = insert_like(editor, gather, "Cast", [value], to=int(ir.DataType.FLOAT))
            value = insert_like(editor, gather, "Mul", [value, scale])
            editor.replace_node(gather, value)
        drop_unused_constant(table.value)


def _picks_rows(node: ir.Node, index: int) -> bool:
    return is_onnx_op(node, "Gather") and index == 0 and attribute(node, "axis", 0) == 0
