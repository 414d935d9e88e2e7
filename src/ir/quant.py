"""Quantization as data: what a plan says, what it stores, and the view of a graph through Q/DQ.

Here: `QuantSpec` and `QuantPlan`, the bytes a plan makes of a value, the logical inputs of a node
behind QuantizeLinear/DequantizeLinear pairs, and which nodes such pairs let a runtime execute in
integers. Nothing here reads a weight. Not here: choosing a plan, calibration and writing the pairs
(`passes.quantize`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from .graph import (
    CONTRIB_DOMAIN,
    ONNX_DOMAINS,
    attribute,
    constant_scalar,
    constant_tensor,
    graph_tree,
    is_onnx_op,
    static_shape,
)

# --- specifications --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale and one zero point for the whole tensor."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """A scale and a zero point for each index along `axis` (not negative)."""

    axis: int

    def __str__(self) -> str:
        return f"per-channel({self.axis})"


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """A scale and a zero point for each run of `size` elements along `axis` (not negative)."""

    size: int
    axis: int

    def __str__(self) -> str:
        return f"block({self.size},{self.axis})"


Granularity = PerTensor | PerChannel | PerBlock

_FLOATING = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a value is stored: a dtype, and for integers a zero point and a granularity.

    A floating `dtype` (a half-precision plan) has no scale and no zero point. `symmetric` fixes
    the zero point at the middle of the range. `zero_points`: whether they are written; 32-bit
    biases and 4-bit weights have none. `padded`: the last block is stored in full. `folded`: behind
    operators that a runtime computes once, when it loads, in place of a DequantizeLinear. `bits`:
    of an element as stored, where that is not what the dtype says (packed into bytes).
    """

    dtype: ir.DataType
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    zero_points: bool = True
    padded: bool = False
    folded: bool = False
    bits: int = 0

    @property
    def width(self) -> int:
        """Bits of an element as stored."""
        return self.bits or self.dtype.bitwidth

    @property
    def is_integer(self) -> bool:
        """Whether values are integers behind a scale."""
        return self.dtype not in _FLOATING

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales (and zero points) of a tensor of `shape`; () per tensor."""
        match self.granularity:
            case PerChannel(axis):
                return (shape[axis],)
            case PerBlock(size, axis):
                blocks = -(-shape[axis] // size)
                return (*shape[:axis], blocks, *shape[axis + 1 :])
            case _:
                return ()

    def __str__(self) -> str:
        name = self.dtype.name.lower()
        if not self.is_integer:
            return name
        return f"{name} {self.granularity}{' symmetric' if self.symmetric else ''}"


@dataclasses.dataclass(frozen=True)
class QuantPlan:
    """What a recipe makes of each value, before anything is changed.

    `label` names it (`int8 uint8/int8 per-channel`). `entries` maps value names to specs:
    initializers are stored that way, other values pass through a pair with a scale of their own.
    `nodes` are the names of the nodes expected to run in integers. `copies`: how often a value is
    stored where that is not once (a bias shared by nodes with different scales, the bounds of a
    Clip that vanishes); `kept`: initializers that are stored
    in their own dtype as well, since a node that is not quantized reads them too. `notes` are
    (node, reason) for what stays as it is though its operator could be quantized.
    """

    label: str
    entries: Mapping[str, QuantSpec]
    nodes: tuple[str, ...] = ()
    copies: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    notes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for field in ("entries", "copies"):
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))


# --- bytes -----------------------------------------------------------------------------------


def spec_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` stored by `spec`: data, float32 scales and zero points.

    Sub-byte elements are packed, each tensor rounded up to a byte.
    """
    shape = stored_shape(spec, shape)
    data = _packed(math.prod(shape), spec.width)
    return data + parameter_bytes(spec, shape)


def stored_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the integers: the tensor's, with the last block in full where it is padded."""
    if not spec.padded or not isinstance(spec.granularity, PerBlock):
        return shape
    size, axis = spec.granularity.size, spec.granularity.axis
    return (*shape[:axis], -(-shape[axis] // size) * size, *shape[axis + 1 :])


def parameter_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Bytes of the scales and zero points alone; 0 for a floating spec."""
    if not spec.is_integer:
        return 0
    count = math.prod(spec.parameter_shape(shape))
    return 4 * count + (_packed(count, spec.width) if spec.zero_points else 0)


def planned_bytes(plan: QuantPlan, value: ir.Value) -> int:
    """Bytes that a value takes in the saved model under a plan; weights may be absent.

    An initializer: its data with scales and zero points, and its own data where the plan keeps
    that. Any other value: its scale and zero point if it has an entry, else 0.
    """
    tensor = constant_tensor(value)
    if tensor is None and value.is_initializer():
        tensor = value.const_value  # an initializer that the caller may override
    spec = plan.entries.get(value.name or "")
    if tensor is None:
        return parameter_bytes(spec, ()) if spec is not None else 0
    copies = plan.copies.get(value.name or "", 1)
    if spec is None:
        return tensor.nbytes * copies
    size = spec_bytes(spec, tuple(int(d) for d in tensor.shape.numpy()))
    return size * copies + (tensor.nbytes if value.name in plan.kept else 0)


def planned_model_bytes(plan: QuantPlan, model: ir.Model) -> int:
    """Bytes of all initializers and scales of the main graph and its subgraphs under a plan."""
    total = 0
    for graph in graph_tree(model.graph):
        values = [*graph.initializers.values()]
        values += [v for v in graph.inputs if not v.is_initializer()]
        values += [v for node in graph for v in node.outputs]
        total += sum(planned_bytes(plan, value) for value in values)
    return total


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


# --- the view through Q/DQ -------------------------------------------------------------------

_PAIR_DOMAINS = ONNX_DOMAINS | {CONTRIB_DOMAIN}


def is_quantize(node: ir.Node | None) -> bool:
    """Whether a node is a QuantizeLinear."""
    return node is not None and node.op_type == "QuantizeLinear" and node.domain in _PAIR_DOMAINS


def is_dequantize(node: ir.Node | None) -> bool:
    """Whether a node is a DequantizeLinear."""
    return node is not None and node.op_type == "DequantizeLinear" and node.domain in _PAIR_DOMAINS


def is_qdq(node: ir.Node) -> bool:
    """Whether a node is half of a Q/DQ pair."""
    return is_quantize(node) or is_dequantize(node)


def logical_value(value: ir.Value | None) -> ir.Value | None:
    """The value that a Q/DQ pair carries: the float before it, or the stored initializer.

    A value not behind a DequantizeLinear is returned as it is; so is one whose integers come from
    elsewhere (an integer graph input), which has no float before it.
    """
    if value is None or not is_dequantize(value.producer()):
        return value
    stored = value.producer().inputs[0]  # type: ignore[union-attr]
    if stored is None:
        return value
    if is_quantize(stored.producer()):
        return stored.producer().inputs[0]  # type: ignore[union-attr]
    return stored if constant_tensor(stored) is not None else value


def logical_input(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of a node seen through Q/DQ (see `logical_value`); None when omitted."""
    return logical_value(node.inputs[index]) if index < len(node.inputs) else None


def quantized_spec(value: ir.Value | None) -> QuantSpec | None:
    """The spec of the pair a value stands behind (a DequantizeLinear made it) or before.

    Before: its only use is a QuantizeLinear. None where there is no pair, or where the dtype of
    the integers is not known.
    """
    if value is None:
        return None
    producer = value.producer()
    if is_dequantize(producer):
        stored = producer.inputs[0]  # type: ignore[union-attr]
        return _spec_of(producer, stored, stored.dtype if stored is not None else None)
    users = [user for user, index in value.uses() if index == 0 and is_quantize(user)]
    if len(users) == 1 and len(value.uses()) == 1:
        return _spec_of(users[0], value, _quantize_dtype(users[0]))
    return None


def _quantize_dtype(node: ir.Node) -> ir.DataType | None:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if node.outputs[0].dtype is not None:
        return node.outputs[0].dtype
    return ir.DataType(attribute(node, "output_dtype", 0) or ir.DataType.UINT8)


def _spec_of(
    node: ir.Node | None, value: ir.Value | None, dtype: ir.DataType | None
) -> QuantSpec | None:
    if node is None or dtype is None:
        return None
    scale = static_shape(node.inputs[1])
    rank = None if value is None or value.shape is None else len(value.shape)
    axis = int(attribute(node, "axis", 1))
    if axis < 0 and rank is not None:
        axis += rank
    block = int(attribute(node, "block_size", 0))
    granularity: Granularity = PerTensor()
    if block:
        granularity = PerBlock(block, axis)
    elif scale is not None and len(scale) == 1 and (scale[0] > 1 or rank == 1):
        granularity = PerChannel(0 if rank == 1 else axis)
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    return QuantSpec(dtype, _is_symmetric(zero_point, dtype), granularity, zero_point is not None)


def _is_symmetric(zero_point: ir.Value | None, dtype: ir.DataType) -> bool:
    if zero_point is None:
        return dtype.is_signed()
    middle = 0 if dtype.is_signed() else 1 << (dtype.bitwidth - 1)
    scalar = constant_scalar(zero_point)
    if scalar is not None:
        return scalar == middle
    tensor = constant_tensor(zero_point)
    return tensor is not None and tensor.size > 1  # per channel: ours always are


# --- what runs in integers -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerOp:
    """How a runtime executes an operator in integers once its data inputs are behind a DQ.

    `inputs`: the data inputs that must be (None: all of them). `float_output`: the result may stay
    float (otherwise it must go into a single Q). `same_scale`: elements are moved, so that input
    and output share one scale; `weighted`: it has weights, and a bias as input 2. `lowered`: the
    writer of pairs puts other operators in its place, which run in integers.
    The rows are those ONNX Runtime 1.32 fuses on its CPU provider, found from its optimized graphs.
    """

    inputs: tuple[int, ...] | None = (0,)
    float_output: bool = False
    same_scale: bool = False
    weighted: bool = False
    lowered: bool = False


_MOVE = IntegerOp(same_scale=True)
INTEGER_OPS: Mapping[str, IntegerOp] = MappingProxyType(
    {
        "Conv": IntegerOp(inputs=(0, 1, 2), weighted=True),
        "Gemm": IntegerOp(inputs=(0, 1, 2), weighted=True, float_output=True),
        "MatMul": IntegerOp(inputs=(0, 1), weighted=True, float_output=True),
        "Add": IntegerOp(inputs=(0, 1)),
        "Mul": IntegerOp(inputs=(0, 1)),
        "Concat": IntegerOp(inputs=None),
        "AveragePool": IntegerOp(),
        "GlobalAveragePool": IntegerOp(),
        "LeakyRelu": IntegerOp(),
        "Sigmoid": IntegerOp(),
        "Softmax": IntegerOp(),
        "HardSigmoid": IntegerOp(lowered=True),
        "HardSwish": IntegerOp(lowered=True),
        "ReduceMean": IntegerOp(lowered=True),
        **dict.fromkeys(
            (
                "MaxPool",
                "Resize",
                "Reshape",
                "Flatten",
                "Transpose",
                "Squeeze",
                "Unsqueeze",
                "Slice",
                "Gather",
                "Expand",
                "Tile",
                "Split",
            ),
            _MOVE,
        ),
    }
)


def data_inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs that must be behind a DequantizeLinear for the node to run in integers."""
    row = INTEGER_OPS[node.op_type]
    indices = range(len(node.inputs)) if row.inputs is None else row.inputs
    return tuple(i for i in indices if i < len(node.inputs) and node.inputs[i] is not None)


def is_integer_island(node: ir.Node) -> bool:
    """Whether Q/DQ pairs wrap a node so that a runtime can execute it in integers.

    All data inputs come from a DequantizeLinear, and each result goes into one QuantizeLinear and
    nowhere else (Gemm and MatMul may also give floats).
    """
    if not is_onnx_op(node, *INTEGER_OPS):
        return False
    row = INTEGER_OPS[node.op_type]
    inputs = data_inputs(node)
    if (
        row.lowered
        or not inputs
        or not all(
            is_dequantize(value.producer()) for i in inputs if (value := node.inputs[i]) is not None
        )
    ):
        return False
    results = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    quantized = all(
        not value.is_graph_output()
        and len(users := [use.node for use in value.uses()]) == 1
        and is_quantize(users[0])
        for value in results
    )
    if quantized:
        return True
    return row.float_output and not any(is_quantize(u.node) for v in results for u in v.uses())


def integer_islands(model: ir.Model) -> tuple[ir.Node, ...]:
    """The nodes of the main graph that can run in integers, in graph order."""
    return tuple(node for node in model.graph if is_integer_island(node))
