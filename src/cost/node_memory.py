"""Peak activation memory of graphs with Q/DQ pairs or a plan, and of TVM, by the graph's nodes.

Here: `node_activation_memory`. Not here: graphs that ONNX Runtime computes in floats (`memory`),
what a value occupies (`storage`), laying buffers out (`buffers`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..ir.analysis import last_uses
from ..ir.graph import describe_value, is_onnx_op, node_subgraphs
from ..ir.ops import is_elementwise, is_view
from ..ir.quant import is_dequantize, is_quantize
from .buffers import ActivationMemory, Buffer, alive_bytes, planned_bytes
from .storage import Storage


def node_activation_memory(
    model: ir.Model, storage: Storage, *, planned: bool = True
) -> ActivationMemory:
    """Liveness with shared buffers, and ONNX Runtime's plan of them (`planned`) or the minimum.

    Values inside a quantized island do not exist; what a plan stores in 8 bits counts so.
    """
    return _Liveness(model.graph, storage, model.functions, planned=planned).run()


Functions = Mapping[ir.OperatorIdentifier, ir.Function]


class _Liveness:
    """Gives each value of a graph its buffers. Node i runs at tick 2i.

    At tick 2i+1 the pairs run that a plan puts behind it; where pairs are in the graph they are
    nodes themselves.
    """

    def __init__(
        self,
        graph: ir.Graph,
        storage: Storage,
        functions: Functions,
        *,
        planned: bool,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.graph = graph
        self.storage = storage
        self.functions = functions
        self.planned = planned
        self.count_inputs = inputs
        self.skipped = set() if outputs else set(graph.outputs)
        self.last = last_uses(graph)
        self.outputs = set(graph.outputs)
        self.buffers: list[Buffer] = []
        self.root: dict[ir.Value, Buffer] = {}
        self.floats: dict[ir.Value, Buffer] = {}
        self.mixed = not storage.is_plain
        self.position: dict[ir.Node, int] = {}
        self.reason = ""

    def run(self) -> ActivationMemory:
        nodes = list(self.graph)
        self.position = {node: i for i, node in enumerate(nodes)} if self.mixed else {}
        for value in self.graph.inputs:
            if not value.is_initializer():
                size = self._size(value) if self.count_inputs else 0
                self.root[value] = self._new(size, value, 0, 2 * len(nodes), own=False)
        copies = self._input_copies() if self.count_inputs and self.mixed else {}
        for i, node in enumerate(nodes):
            for size, value, until in copies.get(i, ()):
                self.floats[value] = self.root[value]
                self.root[value] = self._new(size, value, max(0, 2 * i - 1), until)
            if self.mixed:
                self._hold_for_kernel(i, node)
                for value in self.storage.unpacked(node):
                    self._new(self.storage.full_bytes(value) or 0, value, 2 * i, 2 * i)
            body = self._body_bytes(node)
            if body:
                self.buffers.append(Buffer(body, node, 2 * i, 2 * i))
            self._open(i, node)
        return self._result(len(nodes))

    def _result(self, nodes: int) -> ActivationMemory:
        ticks = alive_bytes(self.buffers, 2 * nodes + 1)
        alive = tuple(max(ticks[2 * i : 2 * i + 2]) for i in range(nodes))
        live = max(ticks)
        peak = alive.index(live) if alive else -1
        if self.reason:
            return ActivationMemory(None, None, alive, peak, self.reason)
        if not self.planned:
            return ActivationMemory(live, live, alive, peak)
        block = planned_bytes(sorted(self.buffers, key=lambda b: b.start))
        outside = sum(buffer.size for buffer in self.buffers if not buffer.own)
        return ActivationMemory(block + outside, live, alive, peak)

    # --- buffers ---------------------------------------------------------------------------------

    def _new(self, size: int, like: ir.Value, start: int, until: int, own: bool = True) -> Buffer:
        dims = None if like.shape is None else tuple(str(d) for d in like.shape.dims)
        buffer = Buffer(size, dims, start, until, own)
        self.buffers.append(buffer)
        return buffer

    def _size(self, value: ir.Value) -> int:
        size = self.storage.held_bytes(value)
        if size is None:
            self.reason = self.reason or f"the size of {describe_value(value)} is not known"
            return 0
        return size

    def _input_copies(self) -> dict[int, list[tuple[int, ir.Value, int]]]:
        """The 8-bit copies of graph inputs (size, value, until), by the node that needs each."""
        copies: dict[int, list[tuple[int, ir.Value, int]]] = {}
        for value in self.root:
            size = self.storage.input_copy_bytes(value)
            if size:
                readers = self._readers(value, integer=True)
                copies.setdefault(min(readers), []).append((size, value, 2 * max(readers)))
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

    def _open(self, i: int, node: ir.Node) -> None:
        """Give each output of a node its buffers."""
        if is_onnx_op(node, "Constant"):
            return
        for index, value in enumerate(node.outputs):
            if not value.name or self.storage.is_constant(value):
                continue
            until = 2 * self.last.get(value, i)
            if self.mixed:
                if self._open_both_forms(i, node, value):
                    continue
                until = self._held_by_pair(i, node, value, until)
            shared = self._shared_buffer(i, node, value) if index == 0 else None
            if shared is not None:
                self.root[value] = shared
                shared.until = max(shared.until, until)
                shared.own = shared.own and value not in self.outputs
                continue
            size = 0 if value in self.skipped else self._size(value)
            own = value not in self.outputs
            self.root[value] = self._new(size, value, 2 * i, until, own)

    def _open_both_forms(self, i: int, node: ir.Node, value: ir.Value) -> bool:
        """Buffers of a planned value that is there as floats and in 8 bits, if it is.

        Each lives as long as it has readers; one is made of the other at tick 2i+1.
        """
        copy = self.storage.float_copy_bytes(value) or self.storage.transient_bytes(value)
        if not copy:
            return False
        before = self.storage.is_made_in_integers(value)
        readers = [2 * reader for reader in self._readers(value, integer=False)]
        until = max([2 * i + 1, *readers])
        buffer = None
        if not before and is_elementwise(node):
            buffer = self._dying_buffer(i, node, copy)
        if buffer is None:
            own = value not in self.outputs
            buffer = self._new(copy, value, 2 * i + before, until, own)
        buffer.until = max(buffer.until, until)
        self.floats[value] = buffer
        start = 2 * i + (not before)
        until = max([2 * i + 1, *(2 * r for r in self._readers(value, integer=True))])
        self.root[value] = self._new(self._size(value), value, start, until)
        return True

    def _held_by_pair(self, i: int, node: ir.Node, value: ir.Value, until: int) -> int:
        """Until when the floats of a DequantizeLinear live.

        Integer nodes read the 8 bits before it instead, which stay as long.
        """
        if not is_dequantize(node) or self.storage.is_fused_away(value):
            return until
        stored = None if node.inputs[0] is None else self.root.get(node.inputs[0])
        integer = self._readers(value, integer=True)
        if stored is None or not integer:
            return until
        stored.until = max(stored.until, 2 * max(integer))
        return 2 * max([i, *self._readers(value, integer=False)])

    # --- sharing ---------------------------------------------------------------------------------

    def _buffer(self, node: ir.Node, value: ir.Value | None) -> Buffer | None:
        """The buffer a node reads a value from."""
        if value is None:
            return None
        if value in self.floats and node not in self.storage.integer_nodes:
            return self.floats[value]
        return self.root.get(value)

    def _shared_buffer(self, i: int, node: ir.Node, value: ir.Value) -> Buffer | None:
        if not node.inputs:
            return None
        # An integer node reads the 8 bits before a DequantizeLinear: they stay until it has run.
        if is_view(node) or (is_dequantize(node) and self.storage.is_fused_away(value)):
            return self._buffer(node, node.inputs[0])
        if value in self.outputs or not is_elementwise(node) or node in self.storage.integer_nodes:
            return None
        size = self.storage.held_bytes(value)
        return self._dying_buffer(i, node, size) if size else None

    def _dying_buffer(self, i: int, node: ir.Node, size: int) -> Buffer | None:
        """An input's buffer of that size that nobody needs after the node."""
        for source in node.inputs:
            buffer = self._buffer(node, source)
            if buffer is not None and buffer.until == 2 * i and buffer.size == size and buffer.own:
                return buffer
        return None

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
                buffer.until = max(buffer.until, 2 * i)

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
                planned=self.planned,
                inputs=False,
                outputs=not handed_out,
            ).run()
            self.reason = self.reason or found.reason
            peaks.append(found.peak_bytes or 0)
        return max(peaks)
