"""What passes and cost models ask about a node: its facts, its cost, whether it is pure.

Facts come from `op_table`, arithmetic from `op_costs`; here are the questions, bytes moved,
control flow and function calls. Nothing here reads a weight: shapes and dtypes only, so an
architecture without weights gets the same answers. Not here: latency (`cost`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from .graph import (
    ONNX_DOMAINS,
    constant_array,
    constant_scalar,
    constant_tensor,
    is_onnx_op,
    node_subgraphs,
)
from .op_costs import Operands, UnknownCostError, Work, resolve_shape
from .op_table import TABLE, Category, OpFacts, Reads

__all__ = [
    "Category",
    "NodeCost",
    "OpFacts",
    "described_ops",
    "facts",
    "graph_cost",
    "is_deterministic",
    "is_elementwise",
    "is_pure",
    "is_view",
    "node_cost",
    "value_bytes",
    "weight_channel_axis",
    "weights",
]

Functions = Mapping[ir.OperatorIdentifier, ir.Function]
Bindings = Mapping[str, int]

# --- facts -----------------------------------------------------------------------------------


def facts(node: ir.Node) -> OpFacts:
    """The table's row for a node. Never raises: an operator not in it has category UNKNOWN."""
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    row = TABLE.get((domain, node.op_type))
    if row is None:
        return OpFacts(name=node.op_type, domain=domain, category=Category.UNKNOWN, pure=False)
    return row


def described_ops() -> frozenset[tuple[str, str]]:
    """(domain, name) of each operator in the table."""
    return frozenset(TABLE)


def is_elementwise(node: ir.Node) -> bool:
    """Whether each output element depends only on the elements at its (broadcast) position."""
    return facts(node).elementwise and not (node.op_type == "Dropout" and _is_training(node))


def is_view(node: ir.Node) -> bool:
    """Whether a runtime can alias input 0 as the output: no element is moved or changed."""
    return facts(node).view and not (node.op_type == "Dropout" and _is_training(node))


def is_pure(node: ir.Node, functions: Functions | None = None) -> bool:
    """Whether equal inputs give equal outputs and nothing else happens.

    False for random operators, for unknown ones, and for control flow or calls around such.
    """
    body = functions.get(node.op_identifier()) if functions else None
    if body is not None:
        return all(is_pure(inner, functions) for inner in body)
    if not facts(node).pure or _is_training(node):
        return False
    return all(is_pure(n, functions) for graph in node_subgraphs(node) for n in graph)


def is_deterministic(node: ir.Node, functions: Functions | None = None) -> bool:
    """Whether equal inputs give equal outputs, as far as is known: false for random operators only.

    Unlike `is_pure` it gives an unknown operator the benefit of the doubt.
    """
    body = functions.get(node.op_identifier()) if functions else None
    if body is not None:
        return all(is_deterministic(inner, functions) for inner in body)
    row = facts(node)
    if row.category is Category.RANDOM or _is_training(node):
        return False
    if row.category is not Category.UNKNOWN and not row.pure:
        return False
    return all(is_deterministic(n, functions) for graph in node_subgraphs(node) for n in graph)


def _is_training(node: ir.Node) -> bool:
    """Dropout and BatchNormalization in training mode (Dropout: since opset 12, an input)."""
    if is_onnx_op(node, "BatchNormalization"):
        found = node.attributes.get("training_mode")
        return found is not None and (found.is_ref() or bool(found.value))
    if is_onnx_op(node, "Dropout") and len(node.inputs) > 2 and node.inputs[2] is not None:
        return constant_scalar(node.inputs[2]) is not False  # an input that may be true counts
    return False


def weights(node: ir.Node) -> tuple[int, ...]:
    """The inputs that hold weights here: those the table names that are constant or initializers.

    MatMul may have its weight on either side. A weight seen through DequantizeLinear counts.
    """
    found = []
    for index in facts(node).weight_inputs:
        value = node.inputs[index] if index < len(node.inputs) else None
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            value = producer.inputs[0]
        if value is not None and constant_tensor(value) is not None:
            found.append(index)
    return tuple(found)


def weight_channel_axis(node: ir.Node, index: int | None = None) -> int | None:
    """The axis of the weight that per-channel quantization scales: one scale an output channel.

    Conv 0, ConvTranspose 1, Gemm 1 (0 when transB), MatMul the last of B or the one before last
    of A. Negative axes count from the end. None when the operator has none. `index` is the input
    the weight sits on; by default the first the table names (for MatMul, B).
    """
    row = facts(node)
    axis = row.weight_channel_axis
    if axis is None:
        return None
    transposed = node.attributes.get("transB")
    if transposed is not None and not transposed.is_ref() and transposed.value:
        axis = 0 if row.domain == "" or node.op_type in ("QGemm", "FusedGemm") else -2
    if row.category is Category.MATMUL and index == 0:
        return -2
    return axis


# --- cost ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node (or, by addition, many) does and moves. Additive: `a + b`.

    `macs`: multiply-accumulates; None when not known, and `unknown_reason` then says why.
    `flops`: all arithmetic: 2 per MAC, plus one for each other scalar operation (the conventions
    are in `op_costs`); 0 when `macs` is None.
    `bytes_read`, `bytes_written`: tensors as they cross the node's edge, each input once, None
    when a shape or an element size is not known. `weight_bytes`: constant inputs in full,
    each as often as nodes read it. Views read and write nothing.
    """

    macs: int | None = 0
    flops: int = 0
    bytes_read: int | None = 0
    bytes_written: int | None = 0
    weight_bytes: int = 0
    unknown_reason: str = ""

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(
            _sum(self.macs, other.macs),
            self.flops + other.flops,
            _sum(self.bytes_read, other.bytes_read),
            _sum(self.bytes_written, other.bytes_written),
            self.weight_bytes + other.weight_bytes,
            self.unknown_reason or other.unknown_reason,
        )

    def __radd__(self, other: int) -> NodeCost:
        """For `sum(costs)`, whose start is 0."""
        return self if other == 0 else NotImplemented

    def times(self, count: int) -> NodeCost:
        """The cost of doing it `count` times; weights stay where they are."""
        return NodeCost(
            None if self.macs is None else self.macs * count,
            self.flops * count,
            None if self.bytes_read is None else self.bytes_read * count,
            None if self.bytes_written is None else self.bytes_written * count,
            self.weight_bytes,
            self.unknown_reason,
        )

    @property
    def is_known(self) -> bool:
        """Whether arithmetic and bytes are both known."""
        return None not in (self.macs, self.bytes_read, self.bytes_written)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def value_bytes(value: ir.Value, bindings: Bindings | None = None) -> int | None:
    """Bytes of one tensor, sub-byte elements packed and rounded up; None when not known."""
    try:
        return _value_bytes(value, bindings)
    except UnknownCostError:
        return None


def _value_bytes(value: ir.Value, bindings: Bindings | None) -> int:
    dtype = value.dtype
    if dtype is None:
        raise UnknownCostError(f"the element type of {value.name!r} is unknown")
    if dtype == ir.DataType.STRING:
        raise UnknownCostError(f"the strings in {value.name!r} have no fixed size")
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        raise UnknownCostError(f"{value.name!r} is a {type(value.type).__name__}, not a tensor")
    bits = _BITS.get(dtype)
    if bits is None:
        raise UnknownCostError(f"the element size of {value.name!r} is unknown")
    return (math.prod(resolve_shape(value, bindings)) * bits + 7) // 8


def _element_bits() -> dict[ir.DataType, int]:
    bits = {}
    for dtype in ir.DataType:
        try:
            bits[dtype] = dtype.bitwidth
        except TypeError:  # UNDEFINED and STRING have none
            continue
    return bits


_BITS = _element_bits()


def node_cost(
    node: ir.Node, bindings: Bindings | None = None, functions: Functions | None = None
) -> NodeCost:
    """The static cost of one node at its present shapes; `bindings` gives symbols their sizes.

    Never raises and never reads weights: what cannot be known is None with the reason.
    `If` costs its costlier branch; `Loop` and `Scan` their body times the trip count where that
    is static; a call of a function in `functions` (`model.functions`) costs its body, whose
    values must have shapes.
    """
    body = functions.get(node.op_identifier()) if functions else None
    if body is not None:
        return graph_cost(body, bindings, functions)
    row = facts(node)
    if row.category is Category.CONTROL_FLOW and row.domain == "":
        return _control_flow_cost(node, bindings, functions)
    read, written, held, missing = _traffic(node, row, bindings)
    reason = ""
    work: Work | None = None
    if row.formula is None:
        reason = f"operator {row.domain + '.' if row.domain else ''}{row.name} is not described"
    else:
        try:
            work = row.formula(Operands(node, bindings))
        except UnknownCostError as error:
            reason = str(error)
        except (ValueError, IndexError, TypeError, ZeroDivisionError):
            reason = "the shapes do not fit the operator"
    if work is None:
        return NodeCost(None, 0, read, written, held, f"{_label(node)}: {reason}")
    if missing:
        missing = f"{_label(node)}: {missing}"
    return NodeCost(work.macs, 2 * work.macs + work.extra_flops, read, written, held, missing)


def graph_cost(
    nodes: Iterable[ir.Node], bindings: Bindings | None = None, functions: Functions | None = None
) -> NodeCost:
    """The sum over nodes (a graph, a function, any selection); None where any of them is None."""
    total = [0, 0, 0, 0, 0]
    macs_known = read_known = written_known = True
    reason = ""
    for node in nodes:
        cost = node_cost(node, bindings, functions)
        macs_known = macs_known and cost.macs is not None
        read_known = read_known and cost.bytes_read is not None
        written_known = written_known and cost.bytes_written is not None
        reason = reason or cost.unknown_reason
        total[0] += cost.macs or 0
        total[1] += cost.flops
        total[2] += cost.bytes_read or 0
        total[3] += cost.bytes_written or 0
        total[4] += cost.weight_bytes
    return NodeCost(
        total[0] if macs_known else None,
        total[1],
        total[2] if read_known else None,
        total[3] if written_known else None,
        total[4],
        reason,
    )


def graph_macs(
    nodes: Iterable[ir.Node], bindings: Bindings | None = None, functions: Functions | None = None
) -> int | None:
    """`graph_cost(...).macs`, without counting the bytes that are moved."""
    total = 0
    for node in nodes:
        row = facts(node)
        if row.formula is None or node.op_identifier() in (functions or {}):
            macs = node_cost(node, bindings, functions).macs
        else:
            try:
                macs = row.formula(Operands(node, bindings)).macs
            except (UnknownCostError, ValueError, IndexError, TypeError, ZeroDivisionError):
                macs = None
        if macs is None:
            return None
        total += macs
    return total


def _traffic(
    node: ir.Node, row: OpFacts, bindings: Bindings | None
) -> tuple[int | None, int | None, int, str]:
    """(bytes read, bytes written, constant bytes, why one of them is None)."""
    reason = ""
    written: int | None = 0
    nothing = row.reads is Reads.NOTHING
    if not (nothing and (row.view or node.op_type == "Constant")) or _is_training(node):
        try:
            written = sum(_value_bytes(v, bindings) for v in node.outputs if v.name)
        except UnknownCostError as error:
            written, reason = None, str(error)
    read: int | None = 0
    held = 0
    seen: set[ir.Value] = set()
    for index, value in enumerate(node.inputs):
        if value is None or value in seen:
            continue
        seen.add(value)
        try:
            size = _value_bytes(value, bindings)
        except UnknownCostError as error:
            if not nothing:
                read, reason = None, reason or str(error)
            continue
        if constant_tensor(value) is not None:
            held += size
        if nothing or read is None:
            continue
        if index == 0 and row.reads is Reads.PICKED and written is not None:
            size = min(size, written)
        read += size
    return read, written, held, reason


def _label(node: ir.Node) -> str:
    return f"{node.name or '(unnamed)'} ({node.op_type})"


_UNPACKING = frozenset({"Cast", "Sub", "Mul", "Add", "Div", "Mod", "BitShift"}) | {
    *("Reshape", "Slice", "Gather", "ReduceSum"),
}
"""What stands between a weight that is stored small and its reader (`passes.quantize.stored`)."""

# --- control flow ----------------------------------------------------------------------------


def _control_flow_cost(
    node: ir.Node, bindings: Bindings | None, functions: Functions | None
) -> NodeCost:
    bodies = [graph_cost(_run(graph), bindings, functions) for graph in node_subgraphs(node)]
    if not bodies:
        return NodeCost(None, 0, None, None, 0, f"{_label(node)}: it has no body")
    if node.op_type == "If":
        return _costlier(bodies)
    try:
        trips = _trip_count(node, bindings)
    except UnknownCostError as error:
        reason = f"{_label(node)}: {error}"
        return NodeCost(None, 0, None, None, bodies[0].weight_bytes, reason)
    return bodies[0].times(trips)


def _run(body: ir.Graph) -> list[ir.Node]:
    """The nodes of a body without those that unpack weights, which a runtime does once."""
    made: set[ir.Value] = set()
    for node in body:
        if node.op_type in _UNPACKING and all(
            v is None or v in made or constant_tensor(v) is not None for v in node.inputs
        ):
            made.update(node.outputs)
    return [node for node in body if not all(v in made for v in node.outputs)]


def _costlier(branches: list[NodeCost]) -> NodeCost:
    """The branch with more arithmetic; an unknown one makes the whole unknown."""
    for branch in branches:
        if branch.macs is None:
            return branch
    held = sum(branch.weight_bytes for branch in branches)
    best = max(branches, key=lambda c: (c.flops, (c.bytes_read or 0) + (c.bytes_written or 0)))
    return dataclasses.replace(best, weight_bytes=held)


def _trip_count(node: ir.Node, bindings: Bindings | None) -> int:
    if node.op_type == "Scan":
        return _scan_length(node, bindings)
    if node.op_type != "Loop":
        raise UnknownCostError("the length of the sequence is data")
    limit, condition = node.inputs[0], node.inputs[1]
    if condition is not None and constant_scalar(condition) is not True:
        raise UnknownCostError("whether the loop runs is data")
    body = node.attributes["body"].as_graph()
    again = body.outputs[0]
    while (producer := again.producer()) is not None and is_onnx_op(producer, "Identity"):
        again = producer.inputs[0]  # type: ignore[assignment]
    passed_through = len(body.inputs) > 1 and again is body.inputs[1]
    if not passed_through and constant_scalar(again) is not True:
        raise UnknownCostError("the trip count depends on a condition computed in the loop")
    count = None if limit is None else constant_array(limit, 1)
    if count is None:
        raise UnknownCostError("the trip count is not a constant")
    return int(count.reshape(-1)[0])


def _scan_length(node: ir.Node, bindings: Bindings | None) -> int:
    scanned = node.attributes["num_scan_inputs"].as_int()
    axes = node.attributes.get("scan_input_axes")
    axis = axes.as_ints()[0] if axes is not None else 0
    value = node.inputs[len(node.inputs) - scanned]
    return resolve_shape(value, bindings)[axis]
