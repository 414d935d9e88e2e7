"""What a graph costs on a target, apart from time: what no device, thread or profile changes.

Here: `Counts` and `count`, made once and then priced in time as often as one asks. Not here: time
(`latency`), what is shown of it (`report`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import onnx_ir as ir

from ..ir.graph import is_onnx_op
from ..ir.ops import NodeCost, node_cost
from ..ir.quant import QuantPlan
from ..targets.target import Runtime, Target
from .features import Features
from .kernels import Kernel, kernels, runtime_graph
from .latency import describe
from .memory import ActivationMemory, activation_memory
from .size import file_bytes, parameter_count
from .storage import storage_for


@dataclasses.dataclass(frozen=True)
class Counts:
    """Kernels, memory, size and work of one graph.

    `costs`: of each node of the main graph. `unbound`: named dimensions without a size; `unknown`:
    nodes whose cost is not known.
    """

    costs: Mapping[ir.Node, NodeCost]
    kernels: tuple[Kernel, ...]
    memory: ActivationMemory
    file_bytes: int
    parameters: int
    unbound: tuple[str, ...]
    unknown: tuple[tuple[ir.Node, NodeCost], ...]
    plan: QuantPlan | None

    @functools.cached_property
    def described(self) -> tuple[Features | None, ...]:
        """What a profile asks about each kernel."""
        return tuple(describe(kernel) for kernel in self.kernels)


def count(
    model: ir.Model,
    target: Target,
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
    saved: ir.Model | None = None,
) -> Counts:
    """Count; see `cost.report.cost_report`. Weights may be absent and are never read."""
    costs = {node: node_cost(node, dims, model.functions) for node in model.graph}
    if target.runtime is Runtime.TVM:
        storage = storage_for(model, target, plan, dims)
        launched = kernels(model, target, plan, dims, storage=storage, costs=costs)
        memory = activation_memory(model, target=target, storage=storage)
    else:
        graph = runtime_graph(model, target, plan, dims)
        launched = kernels(model, target, plan, dims, costs=costs, graph=graph)
        memory = activation_memory(model, dims, target=target, graph=graph)
    return Counts(
        costs=costs,
        kernels=tuple(launched),
        memory=memory,
        file_bytes=file_bytes(saved or model, plan),
        parameters=parameter_count(model),
        unbound=unbound_dims(model, dims),
        unknown=tuple(
            (n, c) for n, c in costs.items() if not c.is_known and not is_onnx_op(n, "Constant")
        ),
        plan=plan,
    )


def unbound_dims(model: ir.Model, dims: Mapping[str, int] | None) -> tuple[str, ...]:
    """The named dimensions of the model's inputs that `dims` gives no size, in order."""
    found: dict[str, None] = {}
    for value in model.graph.inputs:
        for dim in value.shape.dims if value.shape is not None else ():
            if not isinstance(dim, int) and dim.value is not None and dim.value not in (dims or {}):
                found[dim.value] = None
    return tuple(found)
