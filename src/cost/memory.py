"""Peak activation memory: which tensors are alive at the same time, and what a runtime makes of it.

Here: `activation_memory` and `peak_activation_bytes`. Weights are not activations; neither is the
runtime's own code, its arena's slack, and scratch space inside kernels. Not here: laying buffers
out (`buffers`), bytes on disk (`size`), quantized graphs before they are run (`node_memory`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..ir.graph import describe_value, is_onnx_op, node_subgraphs
from ..ir.quant import QuantPlan
from ..targets.target import Runtime, Target
from .buffers import ActivationMemory, Buffer, alive_bytes, planned_bytes
from .kernel import op_facts
from .kernels import is_quantized, runtime_graph
from .node_memory import node_activation_memory
from .runtime_graph import Op, RuntimeGraph, Tensor
from .storage import Storage, storage_for

__all__ = ["ActivationMemory", "activation_memory", "peak_activation_bytes"]

# Found by the blocks of small nets: arithmetic (Add, Mul, Erf, Gelu, ...) takes a new buffer.
_IN_PLACE = (
    *("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Clip"),
    *("Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Softsign", "Softmax", "Cast"),
)
Functions = Mapping[ir.OperatorIdentifier, ir.Function]


def peak_activation_bytes(
    model: ir.Model,
    dims: Mapping[str, int] | None = None,
    plan: QuantPlan | None = None,
    target: Target | None = None,
) -> int | None:
    """The bytes a runtime holds for activations; None when a shape is not known.

    See `activation_memory`, which gives the reason too.
    """
    return activation_memory(model, dims, plan, target).peak_bytes


def activation_memory(
    model: ir.Model,
    dims: Mapping[str, int] | None = None,
    plan: QuantPlan | None = None,
    target: Target | None = None,
    storage: Storage | None = None,
    graph: RuntimeGraph | None = None,
) -> ActivationMemory:
    """Liveness with shared buffers, and ONNX Runtime's plan of them (for TVM, none: the minimum).

    The tensors are those between the runtime's kernels (without a target: between the graph's own
    nodes). `graph`: the runtime's graph, where it is at hand. The rules:

    - graph inputs belong to the caller and stay for the whole run, outputs from their node on;
    - a view (Reshape, Squeeze, ...) shares its input's buffer;
    - an elementwise node writes over an input of the same size that nobody needs afterwards
      (not over the caller's, and not when it makes a graph output), and a convolution over the
      residual that it adds;
    - constants, and what is computed from constants alone, are weights and not counted;
    - a node with a subgraph or a called function adds the peak of its body.
    """
    tvm = target is not None and target.runtime is Runtime.TVM
    if tvm or (target is None and is_quantized(model, plan)):
        storage = storage or storage_for(model, target, plan, dims)
        return node_activation_memory(model, storage, planned=not tvm)
    if dims is None and storage is not None:
        dims = storage.dims
    if graph is None:
        if target is None:
            graph = RuntimeGraph(model, dims)
        else:
            graph = runtime_graph(model, target, plan, dims)
    return _Liveness(graph, dims, model.functions).run(list(model.graph))


class _Liveness:
    """Gives each tensor of a graph its buffer. Operator i runs at tick i."""

    def __init__(
        self,
        graph: RuntimeGraph,
        dims: Mapping[str, int] | None,
        functions: Functions,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.graph = graph
        self.ops = list(graph)
        self.dims = dims
        self.functions = functions
        self.count_inputs = inputs
        self.skipped = set() if outputs else set(graph.outputs)
        self.buffers: list[Buffer] = []
        self.root: dict[Tensor, Buffer] = {}
        self.last = self._last_uses()
        self.reason = ""

    def run(self, nodes: list[ir.Node]) -> ActivationMemory:
        for tensor in self.graph.inputs:
            size = self._size(tensor) if self.count_inputs else 0
            self.root[tensor] = self._new(size, tensor, 0, len(self.ops), own=False)
        for i, op in enumerate(self.ops):
            body = self._body_bytes(op)
            if body:
                self.buffers.append(Buffer(body, op, i, i))
            for index, tensor in enumerate(op.outputs):
                if (tensor.name or tensor.users) and not tensor.constant:
                    self._open(i, op, index, tensor)
        return self._result(nodes)

    def _result(self, nodes: list[ir.Node]) -> ActivationMemory:
        ticks = alive_bytes(self.buffers, len(self.ops) + 1)
        live = max(ticks)
        at: dict[ir.Node, int] = {}
        for op, bytes_alive in zip(self.ops, ticks, strict=False):
            for node in op.origin:
                at[node] = max(at.get(node, 0), bytes_alive)
        alive = tuple(at.get(node, 0) for node in nodes)
        peak = max(range(len(alive)), key=alive.__getitem__) if alive else -1
        if self.reason:
            return ActivationMemory(None, None, alive, peak, self.reason)
        block = planned_bytes(sorted(self.buffers, key=lambda b: b.start))
        outside = sum(buffer.size for buffer in self.buffers if not buffer.own)
        return ActivationMemory(block + outside, live, alive, peak)

    # --- buffers ---------------------------------------------------------------------------------

    def _last_uses(self) -> dict[Tensor, int]:
        last: dict[Tensor, int] = {}
        for i, op in enumerate(self.ops):
            for tensor in op.inputs:
                if tensor is not None:
                    last[tensor] = i
        for tensor in self.graph.outputs:
            last[tensor] = len(self.ops)
        return last

    def _new(self, size: int, like: Tensor, start: int, until: int, own: bool = True) -> Buffer:
        buffer = Buffer(size, (like.shape, like.dtype), start, until, own)
        self.buffers.append(buffer)
        return buffer

    def _size(self, tensor: Tensor) -> int:
        size = 0 if tensor.constant else tensor.nbytes
        if size is None:
            what = describe_value(tensor.source) if tensor.source is not None else tensor.name
            self.reason = self.reason or f"the size of {what} is not known"
            return 0
        return size

    def _open(self, i: int, op: Op, index: int, tensor: Tensor) -> None:
        until = self.last.get(tensor, i)
        size = 0 if tensor in self.skipped else self._size(tensor)
        own = not tensor.is_output
        shared = self._shared_buffer(i, op, tensor, size) if index == 0 else None
        if shared is None:
            self.root[tensor] = self._new(size, tensor, i, until, own)
            return
        self.root[tensor] = shared
        shared.until = max(shared.until, until)
        shared.own = shared.own and own

    # --- sharing ---------------------------------------------------------------------------------

    def _shared_buffer(self, i: int, op: Op, tensor: Tensor, size: int) -> Buffer | None:
        """The buffer of an input that the result is written to."""
        row = op_facts(op)
        if row.view:
            source = op.inputs[0]
            return None if source is None else self.root.get(source)
        if tensor.is_output or not size:
            return None
        if op.is_onnx(*_IN_PLACE):
            overwritten = op.inputs
        elif op.type in ("Conv", "FusedConv") and len(op.inputs) > 3:
            overwritten = op.inputs[3:4]
        else:
            return None
        for source in overwritten:
            buffer = None if source is None else self.root.get(source)
            if buffer is not None and buffer.until == i and buffer.size == size and buffer.own:
                return buffer
        return None

    def _body_bytes(self, op: Op) -> int:
        """The peak inside a node; of an If, its hungrier branch."""
        if len(op.origin) != 1:
            return 0
        node = op.origin[0]
        function = self.functions.get(node.op_identifier())
        bodies = [function.graph] if function is not None else list(node_subgraphs(node))
        # An If and a call write straight to the node's outputs, which are counted outside.
        handed_out = function is not None or is_onnx_op(node, "If")
        peaks = [0]
        for body in bodies:
            inner = _Liveness(
                RuntimeGraph(body, self.dims),
                self.dims,
                self.functions,
                inputs=False,
                outputs=not handed_out,
            ).run([])
            self.reason = self.reason or inner.reason
            peaks.append(inner.peak_bytes or 0)
        return max(peaks)
