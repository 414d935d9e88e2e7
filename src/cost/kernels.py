"""The kernels that a runtime executes for a graph, after its own fusion: what latency is summed of.

Here: `runtime_graph`, which rewrites a mirror of the graph as the runtime's optimizer would, and
`kernels`, its operators. Both are pure functions of graph, target, plan and sizes and read no
weight. Views, constants and what is computed from constants alone are no kernels; a Q or DQ that
no integer kernel swallows is one. Not here: the rewrites (`ort_float`, `ort_integer`), time
(`latency`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from ..ir.graph import is_onnx_op
from ..ir.ops import NodeCost, node_cost
from ..ir.quant import QuantPlan, is_dequantize
from ..targets.target import Runtime, Target
from . import ort_float, ort_integer
from .grouping import grouped_kernels
from .kernel import DEPTHWISE, Kernel, kernel_of, op_facts
from .ort_channels_last import channels_last
from .ort_dynamic import fuse_products
from .ort_nbits import fuse_stored_weights
from .ort_plan import write_plan
from .runtime_graph import Op, RuntimeGraph
from .storage import Storage, storage_for

__all__ = ["DEPTHWISE", "Kernel", "kernels", "runtime_graph"]

Costs = Mapping[ir.Node, NodeCost]


def runtime_graph(
    model: ir.Model,
    target: Target,
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
) -> RuntimeGraph:
    """What the target's runtime makes of a model: its operators after its own optimizations.

    The order is the runtime's: what holds for any operator, then quantized operators, then the
    fusions and layouts of floats. For TVM the graph is as it was given.
    """
    graph = RuntimeGraph(model, dims)
    if target.runtime is Runtime.TVM:
        return graph
    if plan is not None:
        write_plan(graph, plan)
    ort_integer.spread_pairs(graph)
    ort_float.simplify(graph, target)
    ort_integer.simulate(graph, target)
    fuse_products(graph)
    fuse_stored_weights(graph)
    ort_float.fuse(graph, target)
    channels_last(graph)
    return graph


def is_quantized(model: ir.Model, plan: QuantPlan | None) -> bool:
    """Whether there are pairs in the graph, or a plan to put some there."""
    return plan is not None or any(is_dequantize(node) for node in model.graph)


def kernels(
    model: ir.Model,
    target: Target,
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
    *,
    storage: Storage | None = None,
    costs: Costs | None = None,
    graph: RuntimeGraph | None = None,
) -> list[Kernel]:
    """The kernels of the main graph, in the order in which they run.

    A node with subgraphs or a called function is one kernel with the cost of its body. `costs`
    and `graph` (the runtime's) spare computing them again.
    """
    if target.runtime is Runtime.TVM:
        storage = storage or storage_for(model, target, plan, dims)
        return grouped_kernels(model, target, plan, dims, storage=storage, costs=costs)

    def cost_of(node: ir.Node) -> NodeCost:
        return costs[node] if costs is not None else node_cost(node, dims, model.functions)

    def cost_inside(node: ir.Node) -> NodeCost:
        saturates = is_onnx_op(node, "Relu", "Clip")  # as rescaling to 8 bits does by itself
        return dataclasses.replace(cost_of(node), flops=0) if saturates else cost_of(node)

    return [
        kernel_of(op, cost_inside if _rescales(op) else cost_of)
        for op in (runtime_graph(model, target, plan, dims) if graph is None else graph)
        if _runs(op)
    ]


def _runs(op: Op) -> bool:
    return not op_facts(op).view


def _rescales(op: Op) -> bool:
    """Whether an operator ends in rescaling its result to 8 bits."""
    return op.type.startswith("QLinear") or op.type == "QGemm"
