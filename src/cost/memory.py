"""Peak activation memory: which values are alive at the same time, by liveness over the graph.

Here: `activation_memory` and `peak_activation_bytes`. Weights are not activations; neither is the
runtime's own code, its arena's slack, and scratch space inside kernels. Not here: what a
value occupies (`storage`), bytes on disk (`size`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from ..ir.analysis import last_uses
from ..ir.graph import describe_value, is_onnx_op, node_subgraphs
from ..ir.ops import is_elementwise, is_view
from ..ir.quant import QuantPlan, is_dequantize, is_quantize
from ..targets.target import Target
from .storage import Storage, storage_for


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """Bytes alive while each node of the main graph runs, in graph order, and the most of them.

    `peak_bytes` is None when a size is not known, and `reason` then names the value; `alive` counts
    what is known all the same. `peak_node` is the position of the node at which the peak is
    reached (-1: there are no nodes).
    """

    peak_bytes: int | None
    alive: tuple[int, ...]
    peak_node: int = -1
    reason: str = ""


def peak_activation_bytes(
    model: ir.Model,
    dims: Mapping[str, int] | None = None,
    plan: QuantPlan | None = None,
    target: Target | None = None,
) -> int | None:
    """The most bytes of activations alive at once; None when a shape is not known.

    See `activation_memory`, which gives the reason too.
    """
    return activation_memory(model, dims, plan, target).peak_bytes


def activation_memory(
    model: ir.Model,
    dims: Mapping[str, int] | None = None,
    plan: QuantPlan | None = None,
    target: Target | None = None,
    storage: Storage | None = None,
) -> ActivationMemory:
    """Liveness with shared buffers.

    The rules, which are those of ONNX Runtime's planner with nothing lost to fragmentation:

    - graph inputs belong to the caller and stay for the whole run, outputs from their node on;
    - a view (Reshape, Squeeze, ...) shares its input's buffer;
    - an elementwise node writes over an input of the same size that nobody needs afterwards
      (not over the caller's, and not when it makes a graph output);
    - values inside a quantized island do not exist; what a plan stores in 8 bits counts so;
    - constants, and what is computed from constants alone, are weights and not counted;
    - a node with a subgraph or a called function adds the peak of its body.
    """
    storage = storage or storage_for(model, target, plan, dims)
    return _Liveness(model.graph, storage, model.functions).run()


Functions = Mapping[ir.OperatorIdentifier, ir.Function]


class _Liveness:
    def __init__(
        self,
        graph: ir.Graph,
        storage: Storage,
        functions: Functions,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.graph = graph
        self.storage = storage
        self.functions = functions
        self.count_inputs = inputs
        self.skipped = set() if outputs else set(graph.outputs)
        self.last = dict(last_uses(graph))
        self.outputs = set(graph.outputs)
        self.root: dict[ir.Value, ir.Value] = {}
        self.size: dict[ir.Value, int] = {}
        self.until: dict[ir.Value, int] = {}
        self.callers: set[ir.Value] = set()
        self.mixed = not storage.is_plain
        self.floats: dict[ir.Value, ir.Value] = {}
        self.position: dict[ir.Node, int] = {}
        self.reason = ""

    def run(self) -> ActivationMemory:
        nodes = list(self.graph)
        for value in self.graph.inputs:
            if not value.is_initializer():
                self.callers.add(value)
                self._new_buffer(value, len(nodes), self.count_inputs)
        self.position = {node: i for i, node in enumerate(nodes)} if self.mixed else {}
        copies = self._input_copies() if self.count_inputs and self.mixed else {}
        opened: list[list[ir.Value]] = []
        extra: list[int] = []
        for i, node in enumerate(nodes):
            transient = self._transient_bytes(i, node) if self.mixed else 0
            if self.mixed:
                self._hold_for_kernel(i, node)
            opened.append(self._open(i, node) + copies.get(i, []))
            extra.append(transient + self.storage.unpacked_bytes(node) + self._body_bytes(node))
        alive = self._sweep(opened, extra)
        if not alive:
            total = sum(self.size.values())
            return ActivationMemory(None if self.reason else total, (), -1, self.reason)
        peak = max(range(len(alive)), key=alive.__getitem__)
        return ActivationMemory(
            None if self.reason else alive[peak], tuple(alive), peak, self.reason
        )

    def _sweep(self, opened: list[list[ir.Value]], extra: list[int]) -> list[int]:
        freed: dict[int, int] = {}
        for buffer, until in self.until.items():
            freed[until] = freed.get(until, 0) + self.size[buffer]
        now = sum(self.size[v] for v in self.callers)
        alive = []
        for i, buffers in enumerate(opened):
            now += sum(self.size[v] for v in buffers)
            alive.append(now + extra[i])
            now -= freed.get(i, 0)
        return alive

    def _input_copies(self) -> dict[int, list[ir.Value]]:
        """Buffers for the 8-bit copies of graph inputs, by the node that needs each first."""
        copies: dict[int, list[ir.Value]] = {}
        for value in self.callers:
            size = self.storage.input_copy_bytes(value)
            if size:
                readers = self._readers(value, integer=True)
                copies.setdefault(min(readers), []).append(self._extra_buffer(size, max(readers)))
        return copies

    def _readers(self, value: ir.Value, *, integer: bool) -> list[int]:
        """Positions of the nodes that read a value in 8 bits, or as floats."""
        found = [
            self.position[use.node]
            for use in value.uses()
            if use.node in self.position and (use.node in self.storage.integer_nodes) == integer
        ]
        if not integer and value.is_graph_output():
            found.append(len(self.position) - 1)
        return found

    def _extra_buffer(self, size: int, until: int) -> ir.Value:
        """A buffer that no value of the graph stands for."""
        buffer = ir.Value()
        self.size[buffer], self.until[buffer] = size, until
        return buffer

    def _new_buffer(self, value: ir.Value, until: int, counted: bool = True) -> None:
        size = self.storage.held_bytes(value) if counted else 0
        if size is None:
            self.reason = self.reason or f"the size of {describe_value(value)} is not known"
            size = 0
        self.root[value] = value
        self.size[value] = size
        self.until[value] = until

    def _open(self, i: int, node: ir.Node) -> list[ir.Value]:
        """Give each output of a node its buffers; the new ones are returned."""
        if is_onnx_op(node, "Constant"):
            return []
        opened: list[ir.Value] = []
        for index, value in enumerate(node.outputs):
            if not value.name or self.storage.is_constant(value):
                continue
            until = self.last.get(value, i)
            if self.mixed:
                until = self._part_forms(i, node, value, until, opened)
            shared = self._shared_buffer(i, node, value) if index == 0 else None
            if shared is not None:
                self.root[value] = shared
                self.until[shared] = max(self.until[shared], until)
                if value in self.outputs:
                    self.outputs.add(shared)
                continue
            self._new_buffer(value, until, value not in self.skipped)
            opened.append(value)
        return opened

    def _part_forms(
        self, i: int, node: ir.Node, value: ir.Value, until: int, opened: list[ir.Value]
    ) -> int:
        """Let floats and 8 bits of one value live each as long as they have readers.

        Returns until when the value's main form lives.
        """
        copy = self.storage.float_copy_bytes(value)
        if copy:
            floats_until = max([i, *self._readers(value, integer=False)])
            buffer = self._dying_buffer(i, node, copy) if is_elementwise(node) else None
            if buffer is None:
                buffer = self._extra_buffer(copy, floats_until)
                opened.append(buffer)
            self.until[buffer] = max(self.until[buffer], floats_until)
            self.floats[value] = buffer
            return max([i, *self._readers(value, integer=True)])
        if is_dequantize(node) and not self.storage.is_fused_away(value):
            stored = None if node.inputs[0] is None else self.root.get(node.inputs[0])
            integer = self._readers(value, integer=True)
            if stored is not None and integer:
                self.until[stored] = max(self.until[stored], *integer)
                return max([i, *self._readers(value, integer=False)])
        return until

    def _buffer(self, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
        """The buffer a node reads a value from."""
        if value is None:
            return None
        if value in self.floats and node not in self.storage.integer_nodes:
            return self.floats[value]
        return self.root.get(value)

    def _shared_buffer(self, i: int, node: ir.Node, value: ir.Value) -> ir.Value | None:
        if not node.inputs:
            return None
        # An integer node reads the 8 bits before a DequantizeLinear: they stay until it has run.
        if is_view(node) or (is_dequantize(node) and self.storage.is_fused_away(value)):
            return self._buffer(node, node.inputs[0])
        if value in self.outputs or not is_elementwise(node):
            return None
        size = self.storage.held_bytes(value)
        return self._dying_buffer(i, node, size) if size else None

    def _dying_buffer(self, i: int, node: ir.Node, size: int) -> ir.Value | None:
        """An input's buffer of that size that nobody needs after the node."""
        for source in node.inputs:
            buffer = self._buffer(node, source)
            if (
                buffer is not None
                and self.until[buffer] == i
                and self.size[buffer] == size
                and buffer not in self.callers
                and buffer not in self.outputs
            ):
                return buffer
        return None

    def _transient_bytes(self, i: int, node: ir.Node) -> int:
        """What floats that are quantized at once add to the 8 bits that are counted anyway.

        While the node runs there are its floats and its inputs; while the first of the floats is
        quantized, the inputs that nobody else needs are gone and 8 bits have come.
        """
        floats = smalls = largest = 0
        for value in node.outputs:
            full = self.storage.transient_bytes(value)
            if full and (not is_elementwise(node) or self._dying_buffer(i, node, full) is None):
                small = self.storage.held_bytes(value) or 0
                floats, smalls, largest = floats + full, smalls + small, max(largest, small)
        if not floats:
            return 0
        buffers = {b for v in node.inputs if (b := self._buffer(node, v)) is not None}
        dying = sum(self.size[b] for b in buffers if self.until[b] == i)
        return floats - smalls + max(0, largest - dying)

    def _hold_for_kernel(self, i: int, node: ir.Node) -> None:
        """An integer kernel writes at its last node, a QuantizeLinear or an activation that
        saturation replaces: its inputs stay until there."""
        value = node.inputs[0] if node.inputs else None
        if value is None or not self.storage.is_fused_away(value):
            return
        maker = value.producer()
        if not is_quantize(node) and self.storage.absorbed(node) is not maker:
            return
        for source in maker.inputs if maker is not None else ():
            origin = None if source is None else source.producer()
            if source is not None and is_dequantize(origin):
                source = origin.inputs[0]  # type: ignore[union-attr]
            buffer = None if source is None else self.root.get(source)
            if buffer is not None:
                self.until[buffer] = max(self.until[buffer], i)

    def _body_bytes(self, node: ir.Node) -> int:
        """The peak inside a node; of an If, its hungrier branch."""
        function = self.functions.get(node.op_identifier())
        bodies = [function.graph] if function is not None else list(node_subgraphs(node))
        if not bodies:
            return 0
        # An If and a call write straight to the node's outputs, which are counted outside.
        handed_out = function is not None or is_onnx_op(node, "If")
        peaks = []
        for body in bodies:
            found = _Liveness(
                body,
                self.storage,
                self.functions,
                inputs=False,
                outputs=not handed_out,
            ).run()
            self.reason = self.reason or found.reason
            peaks.append(found.peak_bytes or 0)
        return max(peaks)
