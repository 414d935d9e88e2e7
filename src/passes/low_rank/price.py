"""What a layer costs on a target, alone: as it is, and as several smaller ones.

Here: `Prices`, which prices chains of layers as a graph of nothing else, and remembers. Not here:
the chains (`low_rank_forms`), what is chosen by the price (`low_rank_choice`).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...cost.kernel import Kernel
from ...cost.kernels import kernels
from ...cost.latency import latency
from ...cost.profiles import profile_for
from ...ir.graph import AbsentTensor, add_initializer
from ...ir.ops import graph_cost
from ...ir.shapes import infer_shapes
from ...targets.target import Target
from .forms import Step

Dims = tuple[int, ...]
_BYTES_A_MAC = 2.0
"""Bytes moved that count as one MAC where no target says: between a laptop's and a phone's."""
_REORDERS = ("ReorderInput", "ReorderOutput")


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one inference: MACs, and `time`, in milliseconds or, without a target, in MACs."""

    macs: int
    time: float


class Prices:
    """Prices of chains of layers on one target, by its profile where it has one."""

    def __init__(self, target: Target | None, opset: int) -> None:
        self.target = target
        self._opset = opset
        self._profile = None if target is None else profile_for(target)
        self._known: dict[tuple[object, ...], Price | None] = {}
        self.label = "counted in MACs and bytes"

    def of(self, data: Dims, steps: tuple[Step, ...], dtype: ir.DataType) -> Price | None:
        """The price of a chain on data of that shape; None where it can't be known."""
        key = (data, steps, dtype)
        if key not in self._known:
            self._known[key] = self._price(_chain(data, steps, dtype, self._opset))
        return self._known[key]

    def _price(self, model: ir.Model) -> Price | None:
        infer_shapes(model)
        cost = graph_cost(model.graph)
        if cost.macs is None or cost.bytes_read is None or cost.bytes_written is None:
            return None
        time = cost.macs + (cost.bytes_read + cost.bytes_written) / _BYTES_A_MAC
        if self.target is not None:
            # layouts are changed where a chain begins and ends, in a whole model elsewhere
            found: list[Kernel] = [
                k for k in kernels(model, self.target) if k.type not in _REORDERS
            ]
            told = latency(found, self.target, 1, self._profile)
            if told.ms is not None and not told.unknown:
                self.label = told.label
                return Price(cost.macs, told.ms)
            if told.ms is not None:
                return None
        return Price(cost.macs, time)


def _chain(data: Dims, steps: tuple[Step, ...], dtype: ir.DataType, opset: int) -> ir.Model:
    """A model of those layers one behind the other; its weights are absent."""
    x = ir.Value(name="x", shape=ir.Shape(list(data)), type=ir.TensorType(dtype))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": opset}, name="chain")
    for i, step in enumerate(steps):
        inputs = [x, add_initializer(graph, f"w{i}", AbsentTensor(f"w{i}", dtype, step.shape))]
        if step.bias:
            width = step.shape[0] if step.op_type == "Conv" else step.shape[1]
            bias = AbsentTensor(f"b{i}", dtype, (width,))
            inputs.append(add_initializer(graph, f"b{i}", bias))
        attributes = ir.convenience.convert_attributes(dict(step.attributes))
        node = ir.Node("", step.op_type, inputs, attributes, num_outputs=1, name=f"n{i}")
        x = node.outputs[0]
        x.name = f"y{i}"
        x.type = ir.TensorType(dtype)
        graph.append(node)
    graph.outputs.append(x)
    return ir.Model(graph, ir_version=10)
