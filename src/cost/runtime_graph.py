"""A light copy of a graph that stands for what a runtime makes of it: operators on tensors.

Here: `Tensor`, `Op` and `RuntimeGraph`, built from a model with sizes bound, cheap to copy and to
rewrite. The rewrites that a runtime would do live beside it (`ort_float`, `ort_integer`); none of
them reads a weight. Not here: the model that users see and passes change (`ir`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

from ..ir.graph import ONNX_DOMAINS, constant_tensor, is_onnx_op
from ..ir.op_costs import UnknownCostError, resolve_shape
from .storage import folded_values

CONTRIB = "com.microsoft"
NCHWC = "com.microsoft.nchwc"


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
    """A value at run time. `shape` and `dtype` are None where not known.

    `constant`: there before the first run (weights, and what is computed from constants alone).
    `source`: the value of the model that it is, or stands for; None for what a rewrite adds.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: ir.DataType | None
    constant: bool = False
    is_input: bool = False
    is_output: bool = False
    source: ir.Value | None = None
    producer: Op | None = None
    users: list[Op] = dataclasses.field(default_factory=list)

    @property
    def elements(self) -> int | None:
        """Number of elements; None where the shape is not known."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def nbytes(self) -> int | None:
        """Bytes, sub-byte elements packed; None where shape or element size is not known."""
        if self.shape is None or self.dtype is None:
            return None
        try:
            return (math.prod(self.shape) * self.dtype.bitwidth + 7) // 8
        except TypeError:  # strings
            return None

    def like(self, name: str, dtype: ir.DataType | None = None) -> Tensor:
        """A new tensor of the same shape, made by nobody yet."""
        return Tensor(name, self.shape, dtype or self.dtype)


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    """One launch. `origin`: the model's nodes whose work it does, in graph order.

    `inputs` may hold None (an optional input left out). `fused`: operators merged into it behind
    its own work, in order ("Add", "Relu").
    """

    type: str
    domain: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: tuple[ir.Node, ...] = ()
    fused: tuple[str, ...] = ()
    index: int = 0  # counts up as operators are made

    def is_onnx(self, *types: str) -> bool:
        """Whether it is one of these operators of the ONNX standard."""
        return not self.domain and self.type in types

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's plain value, or the default."""
        return self.attributes.get(name, default)


class RuntimeGraph:
    """Operators in an order in which they can run, and the graph's inputs and outputs.

    Change it through its methods: they keep `producer` and `users` right. `ops` may be iterated
    while operators other than the present one are removed or inserted (iterate over a copy).
    """

    def __init__(self, model: ir.Model | ir.Graph, dims: Mapping[str, int] | None = None) -> None:
        graph = model.graph if isinstance(model, ir.Model) else model
        self.ops: dict[Op, None] = {}
        self._count = 0
        self._is_sorted = False
        self.tensors: dict[ir.Value, Tensor] = {}
        folded = folded_values(graph, products=True)
        self.inputs = [
            self._tensor(v, dims, folded) for v in graph.inputs if not v.is_initializer()
        ]
        for tensor in self.inputs:
            tensor.is_input = True
        for node in graph:
            if is_onnx_op(node, "Constant") or (
                node.outputs and all(v in folded for v in node.outputs)
            ):
                continue
            self._add(
                Op(
                    type=node.op_type,
                    domain="" if node.domain in ONNX_DOMAINS else node.domain,
                    inputs=[
                        None if v is None else self._tensor(v, dims, folded) for v in node.inputs
                    ],
                    outputs=[self._tensor(v, dims, folded) for v in node.outputs],
                    attributes={
                        name: found.value
                        for name, found in node.attributes.items()
                        if not found.is_ref() and found.type not in _GRAPHS
                    },
                    origin=(node,),
                )
            )
        self.outputs = [self._tensor(v, dims, folded) for v in graph.outputs]
        for tensor in self.outputs:
            tensor.is_output = True

    def _tensor(
        self, value: ir.Value, dims: Mapping[str, int] | None, folded: frozenset[ir.Value]
    ) -> Tensor:
        found = self.tensors.get(value)
        if found is None:
            try:
                shape: tuple[int, ...] | None = tuple(resolve_shape(value, dims))
            except UnknownCostError:
                shape = None
            constant = value in folded or constant_tensor(value) is not None
            found = Tensor(value.name or "", shape, value.dtype, constant, source=value)
            self.tensors[value] = found
        return found

    # --- reading ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Op]:
        """The operators as they are now, each after those that it reads from."""
        return iter(list(self.ops))

    def __contains__(self, op: Op) -> bool:
        return op in self.ops

    def only_user(self, tensor: Tensor) -> Op | None:
        """The one operator that reads a tensor, once, and nothing else does; else None."""
        if tensor.is_output or len(tensor.users) != 1:
            return None
        return tensor.users[0]

    # --- changing --------------------------------------------------------------------------------

    def _add(self, op: Op) -> None:
        self._is_sorted = False
        self.ops[op] = None
        self.renew(op)
        for tensor in op.inputs:
            if tensor is not None:
                tensor.users.append(op)
        for tensor in op.outputs:
            tensor.producer = op

    def add(self, op: Op) -> Op:
        """Put an operator at the end; call `sort` before reading the order again."""
        self._add(op)
        return op

    def remove(self, op: Op) -> None:
        """Take an operator out; whoever reads its outputs must have been told to read others."""
        self._is_sorted = False
        del self.ops[op]
        for tensor in op.inputs:
            if tensor is not None:
                tensor.users.remove(op)
        for tensor in op.outputs:
            if tensor.producer is op:
                tensor.producer = None

    def set_input(self, op: Op, index: int, tensor: Tensor | None) -> None:
        """Let an operator read another tensor (index may be one past its last input)."""
        self._is_sorted = False
        while len(op.inputs) <= index:
            op.inputs.append(None)
        before = op.inputs[index]
        if before is not None:
            before.users.remove(op)
        op.inputs[index] = tensor
        if tensor is not None:
            tensor.users.append(op)

    def set_output(self, op: Op, index: int, tensor: Tensor) -> None:
        """Let an operator write another tensor, whose former producer no longer does."""
        self._is_sorted = False
        op.outputs[index].producer = None
        op.outputs[index] = tensor
        tensor.producer = op

    def replace_uses(self, old: Tensor, new: Tensor, but: Iterable[Op] = ()) -> None:
        """Let every reader of `old`, save those in `but`, read `new`."""
        kept = set(but)
        for op in list(old.users):
            if op in kept:
                continue
            for index, tensor in enumerate(op.inputs):
                if tensor is old:
                    self.set_input(op, index, new)

    def renew(self, op: Op) -> None:
        """Let an operator count as new, as it is where a runtime puts a new one in its place."""
        self._is_sorted = False
        self._count += 1
        op.index = self._count

    def sort(self) -> None:
        """Bring the operators into the order in which ONNX Runtime runs them.

        Depth first from the last results, inputs before their readers; of several inputs, the one
        whose maker was created last comes first. Found by holding profiles against saved graphs.
        """
        if self._is_sorted:
            return
        stack = [
            (op, False)
            for op in sorted(self.ops, key=_index)
            if not any(t.users for t in op.outputs)
        ]
        done: dict[Op, None] = {}
        seen: set[Op] = set()
        while stack:
            op, left = stack.pop()
            if left:
                done[op] = None
                continue
            if op in seen:
                continue
            seen.add(op)
            stack.append((op, True))
            makers = {
                t.producer
                for t in op.inputs
                if t is not None and t.producer is not None and t.producer not in seen
            }
            stack.extend((maker, False) for maker in sorted(makers, key=_index))
        self.ops = done
        self._is_sorted = True


def _index(op: Op) -> int:
    return op.index


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
