"""A float model in which the quantization of each layer can be turned on and off, run by run.

Here: `Switched`, one session for every subset of the layers that an int8 layout holds, so that
asking for the effect of one layer costs a run and no new session; `divergence_over`. Not here:
which subsets to try (`sensitivity`), the layout (`plan`), the real thing (`qdq`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import LoweringError
from ...ir.graph import (
    add_initializer,
    constant_array,
    describe_node,
    fresh_name,
    index_names,
    node_name,
)
from ...ir.quant import INTEGER_OPS, QuantSpec, data_inputs
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from .numbers import Affine, Range, activation_affine, round_trip, weight_affine
from .plan import Activation, Int8Layout
from .qdq import input_affines

QUIETEST = 0.1
"""Of the mean signal power of samples: what a sample's error is held against at least."""
MANY = 16
"""Elements from which an output of one sample has a signal of its own."""
_GATES, _WEIGHTS = "switched/values", "switched/weights"


@dataclasses.dataclass(frozen=True)
class Unit:
    """A node that runs in integers by itself: its name, operator and where it comes from."""

    name: str
    op_type: str
    described: str
    weighted: bool


class Switched:
    """One session of a model with a switch for each unit; a context manager.

    `plan` lays out a copy of the model as it will be written, `ranges` are those of the layout's
    sources. A unit that is on has its weights, the values it reads and its result rounded to what
    their integers hold; the arithmetic is float, as the integer kernels' is up to rounding.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: Callable[[ir.Model], Int8Layout],
        ranges: Mapping[str, Range],
    ) -> None:
        copy = model.clone()
        index_names(copy)
        layout = plan(copy)
        writer = _Writer(copy, layout, ranges)
        self.units = writer.units
        self._outputs = writer.write()
        self._runner = _opened(copy)

    def run(
        self, feed: Feed, on: np.ndarray, weights: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The outputs, in order, with the units of a mask in 8 bits.

        `on` [units] bool switches values, `weights` (the same where not given) the weights.
        """
        gates = {_GATES: on, _WEIGHTS: on if weights is None else weights}
        found = self._runner.run({**feed, **gates})
        return [found[name] for name in self._outputs]

    def none(self) -> np.ndarray:
        """The mask of the float model."""
        return np.zeros(len(self.units), bool)

    def every(self) -> np.ndarray:
        """The mask with all units in 8 bits."""
        return np.ones(len(self.units), bool)

    def __enter__(self) -> Switched:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.close()


def _opened(model: ir.Model) -> OrtRunner:
    """A session; without the runtime's own rewrites where they fail on the graph, as they can where
    it has pairs of QuantizeLinear and DequantizeLinear of another type already.
    """
    try:
        return OrtRunner(model)
    except LoweringError:
        return OrtRunner(model, optimize=False)


def divergence_over(samples: Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]) -> float:
    """Error power over signal power, the mean over outputs; 0 equal, 0.01 is 20 dB.

    `samples` are pairs of the float model's outputs and those held against them. The signal of an
    output is its deviation from its mean, or, for a constant one, its square. Of an output of
    `MANY` elements or more each sample counts alike, and at most 1, so that loud samples do not
    hide what becomes of quiet ones, but for those in which next to nothing happens (`QUIETEST`); a
    smaller one (a single probability has no deviation) is taken
    over all samples. Integers and text count the share of elements that differ. Infinite where a
    result is not finite and the reference is.
    """
    outputs: dict[int, _Power] = {}
    for reference, found in samples:
        for i, (expected, actual) in enumerate(zip(reference, found, strict=True)):
            if expected.size:
                outputs.setdefault(i, _Power()).add(expected, actual)
    parts = [power.ratio() for power in outputs.values() if power.count or power.large]
    return float(np.mean(parts)) if parts else 0.0


@dataclasses.dataclass
class _Power:
    """Sums over the samples of one output. `shift` is near its mean, against cancellation."""

    large: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """Mean squares of error and of signal, of each sample of `MANY` elements."""
    count: int = 0
    error: float = 0.0
    exact: bool = False
    shift: float = 0.0
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    """Of deviations from `shift`, of their squares, and of the squares of values."""

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        if expected.dtype.kind != "f":
            self.exact = True
            self.count += expected.size
            self.error += float(np.sum(expected != actual))
            return
        a, b = expected.astype(np.float64), actual.astype(np.float64)
        finite = np.isfinite(a)
        a, b = a[finite], b[finite]
        if a.size == 0:
            return
        error = float(np.sum((a - b) ** 2)) if np.isfinite(b).all() else np.inf
        if a.size >= MANY:
            self._add_large(a, error)
            return
        if self.count == 0:
            self.shift = float(a.mean())
        self.count += a.size
        self.error += error
        away = a - self.shift
        self.sums += (away.sum(), np.sum(away * away), np.sum(a * a))

    def _add_large(self, reference: np.ndarray, error: float) -> None:
        signal = float(np.sum((reference - reference.mean()) ** 2))
        signal = signal or float(np.sum(reference * reference))
        self.large.append((error / reference.size, signal / reference.size))

    def ratio(self) -> float:
        if self.exact:
            return self.error / self.count
        if self.large:
            errors, signals = np.array(self.large).T
            floor = QUIETEST * signals.mean() or 1.0
            shares = errors / np.maximum(signals, floor)
            return float(np.mean(np.where(np.isfinite(shares), np.minimum(shares, 1.0), np.inf)))
        total, squares, power = self.sums.tolist()
        signal = max(0.0, squares - total * total / self.count)
        return self.error / (signal or power or 1.0)


class _Writer:
    def __init__(self, model: ir.Model, layout: Int8Layout, ranges: Mapping[str, Range]) -> None:
        self.model = model
        self.layout = layout
        self.affines = input_affines(layout, ranges)
        nodes = [n for n in layout.nodes if not INTEGER_OPS[n.op_type].same_scale]
        self.index = {node: i for i, node in enumerate(nodes)}
        self.weighted = {item.node: item for item in layout.weighted}
        self.units = tuple(
            Unit(
                node_name(node),
                node.op_type,
                describe_node(node),
                node in self.weighted,
            )
            for node in nodes
        )
        self.gates: dict[tuple[str, int], ir.Value] = {}
        self.readers: dict[tuple[ir.Graph, ir.Value], list[tuple[ir.Node, int]]] = {}
        for node in nodes:
            assert isinstance(node.graph, ir.Graph)
            for index in data_inputs(node):
                value = node.inputs[index]
                if value is not None:
                    self.readers.setdefault((node.graph, value), []).append((node, index))

    def write(self) -> list[str]:
        """Add the switches, in place; the names of the outputs, in their order."""
        inputs = {}
        for name in (_GATES, _WEIGHTS):
            inputs[name] = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.BOOL),
                shape=ir.Shape([len(self.units)]),
            )
        first = next(iter(self.model.graph))
        for name, value in inputs.items():
            for i in range(len(self.units)):
                which = add_initializer(self.model.graph, f"{name}/{i}", np.array(i, np.int64))
                self.gates[name, i] = self._before(first, "Gather", value, which)
        for item in self.layout.activations:
            self._write_activation(item)
        for node in self.weighted:
            self._write_weight(node)
        for node, index in self.layout.constants:
            self._write_constant(node, index)
        self.model.graph.inputs.extend(inputs.values())
        for value in self.model.graph.outputs:
            value.name = value.name or fresh_name(self.model.graph, "output")
        return [value.name or "" for value in self.model.graph.outputs]

    def _write_activation(self, item: Activation) -> None:
        value, affine = item.value, self.affines[item.value]
        readers = self.readers.get((item.graph, value), [])
        maker = self._unit_behind(item)
        source = value
        if maker is not None and value.producer() is not None:
            source = self._switch_result(item, value, affine, maker)
        for node, index in readers:
            rounded = self._rounded(node, source, affine)
            node.replace_input_with(index, self._switched(node, _GATES, node, rounded, source))

    def _unit_behind(self, item: Activation) -> ir.Node | None:
        """The unit whose result a pair is: the node itself, or the one before an absorbed Relu."""
        node = item.value.producer()
        if not item.everywhere or node is None:
            return None
        if item.absorbed is not None and item.absorbed.inputs[0] is not None:
            node = item.absorbed.inputs[0].producer()
        return node if node in self.index else None

    def _switch_result(
        self, item: Activation, value: ir.Value, affine: Affine, maker: ir.Node
    ) -> ir.Value:
        uses = list(value.uses())
        anchor = value.producer()
        assert anchor is not None
        rounded = self._rounded(anchor, value, affine, after=True)
        made = rounded.producer()
        assert made is not None
        result = self._node("Where", self.gates[_GATES, self.index[maker]], rounded, value)
        self._place(made, result, after=True)
        for user, index in uses:
            user.replace_input_with(index, result.outputs[0])
        for slot, output in enumerate(item.graph.outputs):
            if output is value:
                item.graph.outputs[slot] = result.outputs[0]
                result.outputs[0].type, result.outputs[0].shape = value.type, value.shape
        return result.outputs[0]

    def _write_weight(self, node: ir.Node) -> None:
        item, value = self.weighted[node], node.inputs[1]
        array = constant_array(value)
        assert array is not None
        assert value is not None
        affine = weight_affine(array, item.spec, reduce_range=self.layout.scheme.reduce_range)
        self._swap_constant(node, 1, value, array, affine, item.spec, _WEIGHTS)

    def _write_constant(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        array = constant_array(value)
        if array is None or value is None or node not in self.index:
            return
        spec = QuantSpec(self.layout.scheme.activation, symmetric=False)
        seen = Range(float(array.min(initial=0.0)), float(array.max(initial=0.0)))
        affine = activation_affine(seen, spec.dtype, spec.symmetric)
        self._swap_constant(node, index, value, array, affine, spec, _GATES)

    def _swap_constant(
        self,
        node: ir.Node,
        index: int,
        value: ir.Value,
        array: np.ndarray,
        affine: Affine,
        spec: QuantSpec,
        gates: str,
    ) -> None:
        rounded = round_trip(array, affine, spec)
        graph = self.model.graph
        other = add_initializer(graph, f"{value.name}/rounded", rounded.astype(np.float32))
        node.replace_input_with(index, self._switched(node, gates, node, other, value))

    # --- nodes ---------------------------------------------------------------------------------

    def _switched(
        self, anchor: ir.Node, gates: str, unit: ir.Node, on: ir.Value, off: ir.Value
    ) -> ir.Value:
        return self._before(anchor, "Where", self.gates[gates, self.index[unit]], on, off)

    def _rounded(
        self, anchor: ir.Node, value: ir.Value, affine: Affine, *, after: bool = False
    ) -> ir.Value:
        graph = self.model.graph
        scale = add_initializer(graph, f"{value.name}/scale", affine.scale)
        zero = add_initializer(graph, f"{value.name}/zero_point", affine.zero_point)
        quantized = self._node("QuantizeLinear", value, scale, zero)
        floats = self._node("DequantizeLinear", quantized.outputs[0], scale, zero)
        if after:
            self._place(anchor, quantized, after=True)
            self._place(quantized, floats, after=True)
        else:
            self._place(anchor, quantized)
            self._place(anchor, floats)
        return floats.outputs[0]

    def _before(self, anchor: ir.Node, op_type: str, *inputs: ir.Value) -> ir.Value:
        node = self._node(op_type, *inputs)
        self._place(anchor, node)
        return node.outputs[0]

    def _node(self, op_type: str, *inputs: ir.Value) -> ir.Node:
        return ir.Node("", op_type, inputs, num_outputs=1)

    def _place(self, anchor: ir.Node, node: ir.Node, *, after: bool = False) -> None:
        graph = anchor.graph
        assert isinstance(graph, ir.Graph)
        node.outputs[0].name = node.name = fresh_name(graph, f"switched/{node.op_type}")
        if after:
            graph.insert_after(anchor, node)
        else:
            graph.insert_before(anchor, node)
