"""One launch of the runtime, described: what latency is summed of.

Here: `Kernel`, and how it is made of an operator of a `RuntimeGraph`. Not here: which operators a
runtime makes of a graph (`kernels`), time (`latency`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..ir.graph import ONNX_DOMAINS, has_subgraphs, source_line
from ..ir.op_table import TABLE, Category, OpFacts, Reads
from ..ir.ops import NodeCost
from .runtime_graph import NCHWC, Op, Tensor

DEPTHWISE = "depthwise convolution"


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: the runtime's operator on its tensors, and the model's nodes whose work it does.

    `kind`: the operator's category, `depthwise convolution` apart. `op`: the merged operators,
    `Conv+Add+Relu`. `type`, `domain`, `attributes`: the operator as the runtime runs it ("Conv" of
    "com.microsoft.nchwc"); `fused`: what it merged behind its own work. `inputs` may hold None.
    `nodes` of what the runtime puts in by itself (a change of layout) are those that it serves.
    `macs` None: not known, `unknown_reason` says why; bytes likewise. `weight_bytes` are part of
    `bytes_read`. `dtype` is what the arithmetic is done in.
    """

    kind: str
    op: str
    nodes: tuple[ir.Node, ...]
    macs: int | None
    flops: int
    bytes_read: int | None
    bytes_written: int | None
    weight_bytes: int
    dtype: str
    unknown_reason: str = ""
    type: str = ""
    domain: str = ""
    inputs: tuple[Tensor | None, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether arithmetic and bytes are both known."""
        return None not in (self.macs, self.bytes_read, self.bytes_written)

    @property
    def source_line(self) -> str:
        """The user's source line of the first node that has one, or ''."""
        return next((line for node in self.nodes if (line := source_line(node))), "")


def kernel_of(op: Op, cost_of: Callable[[ir.Node], NodeCost]) -> Kernel:
    """The kernel that an operator is; arithmetic is that of the nodes it came from."""
    costs = [cost_of(node) for node in op.origin]
    macs: int | None = 0
    flops = 0
    reason = ""
    for cost in costs:
        macs = None if macs is None or cost.macs is None else macs + cost.macs
        flops += cost.flops
        reason = reason or cost.unknown_reason
    read, written, weights, missing = _traffic(op, costs)
    if not op.origin:  # a copy or a conversion that the runtime put in
        flops = _added_flops(op)
        macs, reason = (0, "") if written is not None else (None, missing)
    return Kernel(
        kind=_kind(op),
        op="+".join([_plain_type(op), *op.fused]),
        nodes=op.origin or _neighbours(op),
        macs=macs,
        flops=flops,
        bytes_read=read,
        bytes_written=written,
        weight_bytes=weights,
        dtype=_dtype(op),
        unknown_reason=reason or missing,
        type=op.type,
        domain=op.domain,
        inputs=tuple(op.inputs),
        outputs=tuple(op.outputs),
        attributes=op.attributes,
        fused=op.fused,
    )


def op_facts(op: Op) -> OpFacts:
    """The operator table's row; category UNKNOWN where it has none."""
    row = TABLE.get((op.domain, op.type))
    if row is None and op.domain == NCHWC:
        row = TABLE.get(("", op.type)) or _REORDER
    if row is None:
        return OpFacts(name=op.type, domain=op.domain, category=Category.UNKNOWN, pure=False)
    return row


_REORDER = OpFacts(
    name="Reorder", domain=NCHWC, category=Category.DATA_MOVEMENT, movement_only=True
)
_PLAIN = {"FusedConv": "Conv", "FusedGemm": "Gemm", "NhwcFusedConv": "Conv", "QGemm": "Gemm"}


def _plain_type(op: Op) -> str:
    return _PLAIN.get(op.type, op.type) if op.fused else op.type


def _kind(op: Op) -> str:
    category = op_facts(op).category
    if category is Category.CONVOLUTION and op.inputs and op.inputs[0] is not None:
        group = int(op.attribute("group", 1))
        weight = _weight_shape(op)
        if group > 1 and (weight is None or (len(weight) > 1 and weight[1] == 1)):
            return DEPTHWISE
    return category.value


def _weight_shape(op: Op) -> tuple[int, ...] | None:
    index = 3 if op.type == "QLinearConv" else 1
    weight = op.inputs[index] if index < len(op.inputs) else None
    return None if weight is None else weight.shape


_NAMES = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def _dtype(op: Op) -> str:
    if op.type.startswith("QLinear") or op.type in _INTEGER_TYPES:
        return "int8"
    dtype = op.outputs[0].dtype if op.outputs else None
    return "float32" if dtype is None else _NAMES.get(dtype, "float32")


_INTEGER_TYPES = ("QGemm", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "QAttention")


def _traffic(op: Op, costs: Sequence[NodeCost]) -> tuple[int | None, int | None, int, str]:
    """(bytes read, bytes written, constant bytes, why one of them is None)."""
    if len(costs) == 1 and _has_body(op):
        cost = costs[0]
        return cost.bytes_read, cost.bytes_written, cost.weight_bytes, cost.unknown_reason
    row = op_facts(op)
    reason = ""
    written: int | None = 0
    for tensor in op.outputs:
        size = tensor.nbytes if tensor.name or tensor.users else 0
        if size is None:
            written, reason = None, _unsized(tensor)
        elif written is not None:
            written += size
    read: int | None = 0
    weights = 0
    for index, found in enumerate(op.inputs):
        if found is None or found in op.inputs[:index]:
            continue
        size = found.nbytes
        if size is None:
            if row.reads is not Reads.NOTHING:
                read, reason = None, reason or _unsized(found)
            continue
        if found.constant:
            weights += size
        if row.reads is Reads.NOTHING or read is None:
            continue
        if index == 0 and row.reads is Reads.PICKED and written is not None:
            size = min(size, written)
        read += size
    return read, written, weights, reason


def _has_body(op: Op) -> bool:
    node = op.origin[0]
    return (op.domain not in ("", NCHWC) and op_facts(op).category is Category.UNKNOWN) or (
        node.domain in ONNX_DOMAINS and has_subgraphs(node)
    )


def _unsized(tensor: Tensor) -> str:
    return f"the size of {tensor.name!r} is unknown"


def _added_flops(op: Op) -> int:
    per_element = {"QuantizeLinear": 4, "DequantizeLinear": 2}.get(op.type, 0)
    return per_element * (op.outputs[0].elements or 0) if op.outputs else 0


def _neighbours(op: Op) -> tuple[ir.Node, ...]:
    """A node of the model beside an operator that stands for none: a reader's, or the maker's."""
    for tensor in op.outputs:
        for user in tensor.users:
            if user.origin:
                return user.origin[:1]
    for source in op.inputs:
        if source is not None and source.producer is not None and source.producer.origin:
            return source.producer.origin[:1]
    return ()
