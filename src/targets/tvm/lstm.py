"""Short LSTMs as matrix products, because TVM has no recurrent operator.

Here: whether an LSTM node can be unrolled, and unrolling it in place. Not here: other
preparation of a graph for TVM (`prepare`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import add_initializer, attribute, static_shape

MAX_UNROLLED_STEPS = 64
"""Longest LSTM that is unrolled: each step adds 14 nodes, and compile time grows with them."""

_DEFAULT_ACTIVATIONS = ("sigmoid", "tanh", "tanh")


def lstm_obstacle(node: ir.Node) -> str | None:
    """Why an LSTM cannot be unrolled into matrix products, or None when it can be."""
    x, w, r, _, lengths, _, _, peepholes = _padded_inputs(node)
    activations = tuple(a.lower() for a in attribute(node, "activations", _DEFAULT_ACTIVATIONS))
    steps = _steps(x)
    if attribute(node, "layout", 0) != 0:
        return "TVM has no LSTM, and batch-first layout is not unrolled"
    if attribute(node, "clip") is not None or attribute(node, "input_forget", 0) != 0:
        return "TVM has no LSTM, and one with clipping or coupled gates is not unrolled"
    if activations not in (_DEFAULT_ACTIVATIONS, _DEFAULT_ACTIVATIONS * 2):
        return "TVM has no LSTM, and activations other than the default are not unrolled"
    if lengths is not None or peepholes is not None:
        return "TVM has no LSTM, and one with sequence lengths or peepholes is not unrolled"
    if static_shape(w) is None or static_shape(r) is None:
        return "TVM has no LSTM, and the shape of its weights is not known"
    if steps is None:
        return "TVM has no LSTM, and it is unrolled only when its sequence length is static"
    if not 1 <= steps <= MAX_UNROLLED_STEPS:
        return (
            f"TVM has no LSTM, and one of {steps} steps is too long to unroll "
            f"(at most {MAX_UNROLLED_STEPS})"
        )
    return None


def unroll_lstm(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an LSTM by its equations, one copy a step (ONNX operator LSTM, gates i, o, f, g).

    Before: LSTM(X [T,B,I], W [D,4H,I], R [D,4H,H], b [D,8H], h0 [D,B,H], c0 [D,B,H])
    After:  P = X W^T + Wb + Rb for all steps at once, then for each step and direction
            i, o, f, g = split(P_t + h R^T);  c = s(f) c + s(i) tanh(g);  h = s(o) tanh(c)

    The graph must import opset 13 or newer, and `lstm_obstacle(node)` must be None.
    """
    x, w, r, b, _, h0, c0, _ = _padded_inputs(node)
    w_shape = static_shape(w)
    assert x is not None
    assert w is not None
    assert r is not None
    assert w_shape is not None
    steps, hidden = _steps(x), w_shape[1] // 4
    assert steps is not None
    build = _Build(graph, node)
    outputs: list[list[ir.Value]] = [[] for _ in range(steps)]
    last: list[tuple[ir.Value, ir.Value]] = []
    for direction in range(w_shape[0]):
        projected = build.op("MatMul", x, build.transposed(build.pick(w, direction)))
        if b is not None:
            halves = build.split(build.pick(b, direction), 0, [4 * hidden, 4 * hidden])
            projected = build.op("Add", projected, build.op("Add", *halves))
        recurrent = build.transposed(build.pick(r, direction))
        h = build.pick(h0, direction) if h0 is not None else build.zero_state(x, hidden)
        c = build.pick(c0, direction) if c0 is not None else build.zero_state(x, hidden)
        backward = direction == 1 or attribute(node, "direction", "forward") == "reverse"
        for step in range(steps - 1, -1, -1) if backward else range(steps):
            gates = build.op("Add", build.pick(projected, step), build.op("MatMul", h, recurrent))
            i, o, f, g = build.split(gates, 1, [hidden] * 4)
            kept = build.op("Mul", build.op("Sigmoid", f), c)
            c = build.op("Add", kept, build.op("Mul", build.op("Sigmoid", i), build.op("Tanh", g)))
            h = build.op("Mul", build.op("Sigmoid", o), build.op("Tanh", c))
            outputs[step].append(h)
        last.append((h, c))
    y = build.stack([build.stack(directions) for directions in outputs])
    new = (y, build.stack([h for h, _ in last]), build.stack([c for _, c in last]))
    build.replace(new[: len(node.outputs)])


def _steps(x: ir.Value | None) -> int | None:
    if x is None or x.shape is None:
        return None
    steps = x.shape.dims[0]
    return steps if isinstance(steps, int) else None


def _padded_inputs(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (8 - len(node.inputs))]


class _Build:
    """Makes the nodes that replace one node, each with that node's name and metadata."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        return self._add(op_type, inputs, 1, attributes)[0]

    def split(self, value: ir.Value, axis: int, sizes: list[int]) -> Sequence[ir.Value]:
        inputs = (value, self.ints(sizes))
        return self._add("Split", inputs, len(sizes), {"axis": axis})

    def pick(self, value: ir.Value, index: int) -> ir.Value:
        """`value[index]` along the first axis."""
        return self.op("Gather", value, self.ints(index), axis=0)

    def stack(self, values: list[ir.Value]) -> ir.Value:
        raised = [self.op("Unsqueeze", value, self.ints([0])) for value in values]
        return self.op("Concat", *raised, axis=0)

    def transposed(self, matrix: ir.Value) -> ir.Value:
        return self.op("Transpose", matrix, perm=[1, 0])

    def zero_state(self, x: ir.Value, hidden: int) -> ir.Value:
        """Zeros [B,H] for X [T,B,I], of X's dtype, also when the batch B is symbolic."""
        dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
        assert x.shape is not None
        batch = x.shape.dims[1]
        if isinstance(batch, int):
            return add_initializer(self.graph, "lstm_state", np.zeros((batch, hidden), dtype))
        size = self.op("Gather", self.op("Shape", x), self.ints([1]), axis=0)
        shape = self.op("Concat", size, self.ints([hidden]), axis=0)
        zero = add_initializer(self.graph, "lstm_zero", np.zeros((1, hidden), dtype))
        return self.op("Expand", zero, shape)

    def ints(self, values: int | list[int]) -> ir.Value:
        return add_initializer(self.graph, "lstm_const", np.array(values, np.int64))

    def replace(self, new: Sequence[ir.Value]) -> None:
        """Put the nodes where the old node was, and the values where its outputs were."""
        kept = [pair for pair in zip(self.node.outputs, new, strict=True) if pair[0].name]
        ir.convenience.replace_nodes_and_values(
            self.graph,
            self.node,
            [self.node],
            self.nodes,
            [old for old, _ in kept],
            [value for _, value in kept],
        )

    def _add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: int,
        attributes: dict[str, int | Sequence[int]],
    ) -> Sequence[ir.Value]:
        made = ir.node(
            op_type,
            inputs,
            attributes=attributes,
            num_outputs=outputs,
            name=self.node.name,
            metadata_props=dict(self.node.metadata_props),
        )
        self.nodes.append(made)
        return made.outputs
