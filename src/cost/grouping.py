"""Kernels of graphs with Q/DQ pairs or a plan, and of TVM: nodes grouped by simple rules.

Here: `grouped_kernels`. Not here: graphs that ONNX Runtime computes in floats (`kernels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from ..ir.graph import attribute, constant_tensor, dims_of, is_onnx_op, static_shape
from ..ir.op_table import Reads
from ..ir.ops import Category, NodeCost, facts, is_elementwise, is_view, node_cost
from ..ir.quant import QuantPlan, is_dequantize, is_quantize
from ..targets.target import Runtime, Target
from .kernel import DEPTHWISE, Kernel
from .storage import Storage, storage_for

_WITH_ACTIVATION = ("Conv", "Gemm", "FusedConv", "FusedGemm")

Costs = Mapping[ir.Node, NodeCost]


def grouped_kernels(
    model: ir.Model,
    target: Target,
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
    *,
    storage: Storage | None = None,
    costs: Costs | None = None,
) -> list[Kernel]:
    """The kernels of the main graph, in the order of their first nodes; a plan's own Q and DQ last.

    Merged are: an activation in `target.fused_activations` behind a Conv or Gemm (TVM: any
    elementwise node), a residual Add behind a Conv, and the DequantizeLinear, QuantizeLinear and
    saturating activations of an integer node. A value is merged over only when nothing else
    reads it. A node with subgraphs or a called function is one kernel with the cost of its body.
    `storage` and `costs` spare computing them again.
    """
    storage = storage or storage_for(model, target, plan, dims)
    found: list[Kernel] = []
    for group in _groups(model.graph, target, storage):
        known = [
            costs[node] if costs is not None else node_cost(node, dims, model.functions)
            for node in group
        ]
        found.append(_kernel(group, known, storage))
    if not storage.is_plain:
        found += _input_conversions(model.graph, storage)
        for node in model.graph:
            found += _conversions(node, storage)
    return found


# --- grouping --------------------------------------------------------------------------------


def _groups(graph: ir.Graph, target: Target, storage: Storage) -> Iterable[list[ir.Node]]:
    groups: dict[ir.Node, list[ir.Node]] = {}  # by each group's first node, in graph order
    leader: dict[ir.Node, ir.Node] = {}
    for node in graph:
        if _costs_nothing(node, storage):
            continue
        host = _host(node, target, storage, leader)
        while host is not None and host not in leader:  # a view: whoever made its input
            before = host.inputs[0] if host.inputs else None
            host = before.producer() if before is not None else None
        first = node if host is None else leader[host]
        leader[node] = first
        groups.setdefault(first, []).append(node)
    return groups.values()


def _costs_nothing(node: ir.Node, storage: Storage) -> bool:
    if is_onnx_op(node, "Constant") or is_view(node):
        return True
    if node.outputs and all(value in storage.folded for value in node.outputs):
        return True
    return is_dequantize(node) and storage.is_fused_away(node.outputs[0])


def _host(
    node: ir.Node, target: Target, storage: Storage, leader: Mapping[ir.Node, ir.Node]
) -> ir.Node | None:
    """The earlier node whose kernel does this node's work, or None."""
    if node in storage.integer_nodes:
        return None
    before = node.inputs[0] if node.inputs else None
    if before is None:
        return None
    if is_quantize(node) and storage.is_fused_away(before):
        return before.producer()
    absorbing = storage.absorbed(node)
    if absorbing is not None:
        return absorbing
    for value in reversed(node.inputs):
        maker = value.producer() if value is not None else None
        if maker is None or maker not in leader or maker in storage.integer_nodes:
            continue
        if value is None or len(value.uses()) != 1 or value.is_graph_output():
            continue
        if _merges(node, value, leader[maker], maker, target):
            return maker
    return None


def _merges(node: ir.Node, value: ir.Value, first: ir.Node, maker: ir.Node, target: Target) -> bool:
    if target.runtime is Runtime.TVM:
        anchored = facts(first).category in (Category.CONVOLUTION, Category.MATMUL)
        return (anchored or is_elementwise(first)) and is_elementwise(node)
    if is_onnx_op(node, *target.fused_activations) and value is node.inputs[0]:
        if maker is first:
            return maker.op_type in _WITH_ACTIVATION
        return is_onnx_op(maker, "Add") and is_onnx_op(first, "Conv")
    if is_onnx_op(node, "Add") and maker is first and is_onnx_op(maker, "Conv"):
        other = node.inputs[1] if value is node.inputs[0] else node.inputs[0]
        return (
            other is not None
            and constant_tensor(other) is None
            and dims_of(other) is not None
            and dims_of(other) == dims_of(value)
        )
    return False


# --- one kernel ------------------------------------------------------------------------------


def _kernel(group: Sequence[ir.Node], costs: Sequence[NodeCost], storage: Storage) -> Kernel:
    total = costs[0]
    for cost in costs[1:]:
        total = total + cost
    read, written, weights = total.bytes_read, total.bytes_written, total.weight_bytes
    if len(group) > 1 or not storage.is_plain:
        read, written, weights = _traffic(group, total, storage)
    return Kernel(
        kind=_kind(group[0]),
        op="+".join(node.op_type for node in group),
        nodes=tuple(group),
        macs=total.macs,
        # Saturating and rescaling the result are part of an integer kernel, a few operations each.
        flops=costs[0].flops if group[0] in storage.integer_nodes else total.flops,
        bytes_read=read,
        bytes_written=written,
        weight_bytes=weights,
        dtype=_dtype(group, storage),
        unknown_reason=total.unknown_reason,
    )


def _kind(node: ir.Node) -> str:
    category = facts(node).category
    if category is Category.CONVOLUTION and len(node.inputs) > 1:
        shape = static_shape(node.inputs[0])
        group = int(attribute(node, "group", 1))
        if group > 1 and (shape is None or (len(shape) > 1 and shape[1] == group)):
            return DEPTHWISE
    return category.value


_NAMES = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}


def _dtype(group: Sequence[ir.Node], storage: Storage) -> str:
    if group[0] in storage.integer_nodes:
        return "int8"
    dtype = group[0].outputs[0].dtype if group[0].outputs else None
    spec = storage.spec(group[0].outputs[0]) if group[0].outputs else None
    if spec is not None and not spec.is_integer:
        dtype = spec.dtype
    if dtype is None:
        return "float32"
    if group[0].op_type in ("MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"):
        return "int8"
    return _NAMES.get(dtype, "float32")


def _traffic(
    group: Sequence[ir.Node], total: NodeCost, storage: Storage
) -> tuple[int | None, int | None, int]:
    """Bytes over the kernel's edge, values as they are held: node costs corrected by value."""
    read, written, weights = total.bytes_read, total.bytes_written, total.weight_bytes
    members = set(group)
    for node in group:
        reads = facts(node).reads
        for index, value in enumerate(node.inputs):
            if value is None or value in node.inputs[:index] or reads is Reads.NOTHING:
                continue
            full, held = storage.full_bytes(value), storage.read_bytes(node, value)
            if full is None or held is None or not full:
                continue
            if value.producer() in members:
                held = 0
            if _is_weight(value):
                weights += held - (full if constant_tensor(value) is not None else 0)
            if read is not None:
                if index == 0 and reads is Reads.PICKED:
                    full = min(full, storage.full_bytes(node.outputs[0]) or full)
                    held = held * full // max(1, storage.full_bytes(value) or 1)
                read += held - full
        for value in node.outputs:
            held, full = storage.written_bytes(value), storage.full_bytes(value)
            if written is None or held is None or full is None:
                continue
            if len(group) > 1 and not value.is_graph_output() and value.uses():
                held = 0 if all(use.node in members for use in value.uses()) else held
            written += held - full
    return read, written, weights


def _is_weight(value: ir.Value) -> bool:
    if constant_tensor(value) is not None:
        return True
    producer = value.producer()
    return is_dequantize(producer) and constant_tensor(producer.inputs[0]) is not None  # type: ignore[union-attr]


def _conversions(node: ir.Node, storage: Storage) -> Iterable[Kernel]:
    for value in storage.unpacked(node):
        yield _conversion("DequantizeLinear", value, (node,), storage)
    for op, value in storage.conversions(node):
        yield _conversion(op, value, (node,), storage)


def _input_conversions(graph: ir.Graph, storage: Storage) -> Iterable[Kernel]:
    for value in graph.inputs:
        spec = storage.spec(value)
        if spec is not None and spec.is_integer and storage.has_integer_readers(value):
            users = tuple(use.node for use in value.uses())[:1]
            yield _conversion("QuantizeLinear", value, users, storage)


def _conversion(op: str, value: ir.Value, nodes: tuple[ir.Node, ...], storage: Storage) -> Kernel:
    full, small = storage.full_bytes(value), storage.planned_bytes(value)
    bits = value.dtype.bitwidth if value.dtype is not None else 32
    count = None if full is None else full * 8 // bits
    quantize = op == "QuantizeLinear"
    return Kernel(
        kind=Category.QUANTIZATION.value,
        op=op,
        nodes=nodes,
        macs=None if count is None else 0,
        flops=(4 if quantize else 2) * (count or 0),  # as in the operator table
        bytes_read=full if quantize else small,
        bytes_written=small if quantize else full,
        weight_bytes=0,
        dtype="float32",
        unknown_reason="" if count is not None else f"the size of {value.name!r} is unknown",
    )
