"""How the runtime holds each value of a graph: as floats, in 8 bits, fused away, or folded.

Here: one view over both ways in which a graph may be quantized, by Q/DQ pairs that are in it and by
a `QuantPlan` that is not applied yet. Kernels and memory ask it for bytes. Not here: bytes in the
saved file (`size`), liveness (`memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ..ir.graph import constant_tensor, has_subgraphs, is_onnx_op, node_name, static_shape
from ..ir.ops import is_pure, value_bytes
from ..ir.quant import (
    INTEGER_OPS,
    QuantPlan,
    QuantSpec,
    data_inputs,
    integer_islands,
    is_dequantize,
    is_qdq,
    is_quantize,
)
from ..targets.target import Runtime, Target

_COMPUTE = frozenset(op for op, row in INTEGER_OPS.items() if row.weighted)
"""Not folded: a Conv of constants is a mistake in a graph and stays visible."""
UNPACKING = ("MatMul", "Gemm")
"""Float operators whose kernels read packed integer weights (ONNX Runtime's MatMulNBits)."""


class Storage:
    """The main graph's values as the runtime holds them; `dims` binds symbolic dimensions.

    `integers` False: Q/DQ pairs are there but everything is computed in floats (TVM).
    `integer_nodes` run in integers; `folded` are values that the runtime computes once, when it
    loads the model.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan | None = None,
        dims: Mapping[str, int] | None = None,
        *,
        integers: bool = True,
    ) -> None:
        self.dims = dims
        self.integers = integers
        self._entries: Mapping[str, QuantSpec] = plan.entries if plan is not None else {}
        self.integer_nodes: set[ir.Node] = set(integer_islands(model)) if integers else set()
        if plan is not None and integers:
            names = set(plan.nodes)
            self.integer_nodes.update(n for n in model.graph if node_name(n) in names)
        self.folded = folded_values(model.graph)
        self._kept = plan.kept if plan is not None else frozenset()
        self.is_plain = not self._entries and not any(is_dequantize(node) for node in model.graph)
        if plan is not None and self.integer_nodes:
            self._join_neighbours(model.graph)

    def _join_neighbours(self, graph: ir.Graph) -> None:
        """Nodes that a plan does not name but whose values all pass through its pairs.

        A runtime sees the pairs only, and runs such a node (Sigmoid) in integers too.
        """
        for node in graph:
            if node in self.integer_nodes or not is_onnx_op(node, *INTEGER_OPS):
                continue
            values = [node.inputs[i] for i in data_inputs(node)]
            if all(v is not None and self._comes_in_integers(v) for v in values) and all(
                self._goes_to_integers(v) for v in node.outputs
            ):
                self.integer_nodes.add(node)

    def _comes_in_integers(self, value: ir.Value) -> bool:
        spec = self._entries.get(value.name or "")
        return (
            spec is not None
            and spec.is_integer
            and constant_tensor(value) is None
            and self.is_made_in_integers(value)
        )

    def _goes_to_integers(self, value: ir.Value) -> bool:
        spec = self._entries.get(value.name or "")
        return spec is not None and spec.is_integer and not self.has_float_readers(value)

    # --- what becomes of a value -----------------------------------------------------------------

    def is_constant(self, value: ir.Value) -> bool:
        """Whether the value is there before the first run: weights, folded computations."""
        return value in self.folded or constant_tensor(value) is not None

    def spec(self, value: ir.Value) -> QuantSpec | None:
        """What the plan says of a value, as far as the runtime makes use of it."""
        spec = self._entries.get(value.name or "")
        if spec is None or spec.folded:  # floats from the start
            return None
        if spec.is_integer and not self.integers and not self.is_constant(value):
            return None
        return spec

    def absorbed(self, node: ir.Node) -> ir.Node | None:
        """The integer node whose saturation does the work of this Relu or Clip, or None."""
        if self.is_plain or not is_onnx_op(node, "Relu", "Clip") or node in self.integer_nodes:
            return None
        before = node.inputs[0]
        if before is None or self.spec(node.outputs[0]) is None or self.spec(before) is not None:
            return None
        maker = before.producer()
        if maker in self.integer_nodes and len(before.uses()) == 1:
            return maker
        return None

    def is_made_in_integers(self, value: ir.Value) -> bool:
        """Whether a planned value leaves its producer in 8 bits."""
        node = value.producer()
        if node is None:
            return False
        return node in self.integer_nodes or self.absorbed(node) is not None

    def is_fused_away(self, value: ir.Value) -> bool:
        """Whether the value exists in the graph but never in memory.

        So are floats inside an island (integer node to QuantizeLinear, DequantizeLinear to integer
        nodes) and what an absorbed activation reads.
        """
        if self.is_plain:
            return False
        node = value.producer()
        if node is None or value.is_graph_output():
            return False
        users = [use.node for use in value.uses()]
        if is_dequantize(node):
            if not users:
                return False
            if self.integers and constant_tensor(node.inputs[0]) is not None:
                return all(u in self.integer_nodes or is_onnx_op(u, *UNPACKING) for u in users)
            return all(user in self.integer_nodes for user in users)
        if node in self.integer_nodes and len(users) == 1:
            return is_quantize(users[0]) or self.absorbed(users[0]) is node
        return False

    def has_float_readers(self, value: ir.Value) -> bool:
        """Whether something outside the integer nodes reads the value."""
        return value.is_graph_output() or any(
            use.node not in self.integer_nodes for use in value.uses()
        )

    def has_integer_readers(self, value: ir.Value) -> bool:
        """Whether an integer node reads the value."""
        return any(use.node in self.integer_nodes for use in value.uses())

    def unpacked(self, node: ir.Node) -> Iterator[ir.Value]:
        """Weights that a plan stores in integers and that are made floats each time a node runs.

        MatMul and Gemm unpack as they multiply, tables are looked up packed; Conv has no such
        kernel.
        """
        if self.is_plain or node in self.integer_nodes:
            return
        if is_onnx_op(node, "Conv", "ConvTranspose"):
            for value in dict.fromkeys(v for v in node.inputs if v is not None):
                if constant_tensor(value) is None:
                    continue
                spec = self._entries.get(value.name or "")
                if spec is None or spec.folded or not spec.is_integer:
                    continue
                if value.name not in self._kept:
                    yield value

    def conversions(self, node: ir.Node) -> Iterator[tuple[str, ir.Value]]:
        """Pairs that a plan puts behind a node and no integer kernel swallows, as (op, value)."""
        for value in node.outputs:
            spec = self.spec(value)
            if spec is None or not spec.is_integer or self.is_constant(value):
                continue
            if self.is_made_in_integers(value):
                if self.has_float_readers(value):
                    yield "DequantizeLinear", value
            elif self.has_integer_readers(value):
                yield "QuantizeLinear", value

    # --- bytes -----------------------------------------------------------------------------------

    def full_bytes(self, value: ir.Value) -> int | None:
        """Bytes in the value's own dtype; None when not known."""
        return value_bytes(value, self.dims)

    def planned_bytes(self, value: ir.Value) -> int | None:
        """Bytes as the plan stores the value, scales and zero points left out."""
        size, spec = self.full_bytes(value), self.spec(value)
        if size is None or spec is None or value.dtype is None:
            return size
        return (size * spec.dtype.bitwidth) // value.dtype.bitwidth

    def read_bytes(self, node: ir.Node, value: ir.Value) -> int | None:
        """Bytes that a node reads of an input, should it read all of it."""
        producer = value.producer()
        direct = node in self.integer_nodes or self.is_fused_away(value)
        if is_dequantize(producer) and direct:
            stored = producer.inputs[0]  # type: ignore[union-attr]
            return None if stored is None else self.full_bytes(stored)
        if self.is_fused_away(value):
            return 0
        spec = self.spec(value)
        if spec is None:
            return self.full_bytes(value)
        if not spec.is_integer or node in self.integer_nodes:
            return self.planned_bytes(value)
        if self.is_constant(value) and value.name not in self._kept:
            unpacked = is_onnx_op(node, "Conv", "ConvTranspose")
            return self.full_bytes(value) if unpacked else self.planned_bytes(value)
        return self.full_bytes(value)

    def written_bytes(self, value: ir.Value) -> int | None:
        """Bytes that the producer of a value writes."""
        if self.is_fused_away(value):
            return 0
        spec = self.spec(value)
        if spec is None or (spec.is_integer and not self.is_made_in_integers(value)):
            return self.full_bytes(value)
        return self.planned_bytes(value)

    def held_bytes(self, value: ir.Value) -> int | None:
        """Bytes that the value occupies while it is alive; `float_copy_bytes` may come on top."""
        if self.is_constant(value) or self.is_fused_away(value):
            return 0
        spec = self.spec(value)
        if spec is None or (spec.is_integer and not self._is_stored_small(value)):
            return self.full_bytes(value)
        return self.planned_bytes(value)

    def float_copy_bytes(self, value: ir.Value) -> int:
        """Bytes of the floats that are there besides a planned value's 8 bits."""
        spec = self.spec(value)
        if spec is None or not spec.is_integer or self.is_constant(value):
            return 0
        if not self._is_stored_small(value) or not self.has_float_readers(value):
            return 0
        return self.full_bytes(value) or 0

    def input_copy_bytes(self, value: ir.Value) -> int:
        """Bytes of the 8-bit copy that a plan makes of a graph input."""
        spec = self.spec(value)
        if spec is None or not spec.is_integer or not self.has_integer_readers(value):
            return 0
        return self.planned_bytes(value) or 0

    def transient_bytes(self, value: ir.Value) -> int:
        """Bytes held only while the producer runs: the float that is quantized at once.

        For plans; where Q/DQ pairs are in the graph their values say it.
        """
        if self.is_plain or self.spec(value) is None or self.is_made_in_integers(value):
            return 0
        held, full = self.held_bytes(value), self.full_bytes(value)
        if not held or not full or held >= full or self.has_float_readers(value):
            return 0
        return full

    def _is_stored_small(self, value: ir.Value) -> bool:
        if value.producer() is None:  # the caller's array stays as it is
            return False
        return self.is_made_in_integers(value) or self.has_integer_readers(value)


def storage_for(
    model: ir.Model,
    target: Target | None,
    plan: QuantPlan | None = None,
    dims: Mapping[str, int] | None = None,
) -> Storage:
    """The storage on a target: integers where its runtime executes them."""
    return Storage(model, plan, dims, integers=target is None or runs_integers(target))


def runs_integers(target: Target) -> bool:
    """Whether Q/DQ pairs make a target compute in integers. TVM computes them in floats."""
    return target.runtime is not Runtime.TVM and bool(target.quantization)


def folded_values(graph: ir.Graph, *, products: bool = False) -> frozenset[ir.Value]:
    """Results of pure nodes with constant inputs only, and of Shape of a static shape.

    Runtimes compute them once. DequantizeLinear is not folded: that would undo the compression.
    `products`: of weights by constants too.
    """
    folded: set[ir.Value] = set()
    for node in graph:
        if is_onnx_op(node, "Constant") or is_qdq(node) or has_subgraphs(node):
            continue
        if node.op_type == "MatMulNBits":  # runs each time, as seen
            continue
        if is_onnx_op(node, "Shape", "Size"):
            if static_shape(node.inputs[0]) is not None:
                folded.update(node.outputs)
            continue
        inputs = [value for value in node.inputs if value is not None]
        if (
            inputs
            and all(v in folded or constant_tensor(v) is not None for v in inputs)
            and is_pure(node)
            and (products or node.op_type not in _COMPUTE)
        ):
            folded.update(node.outputs)
    return frozenset(folded)
