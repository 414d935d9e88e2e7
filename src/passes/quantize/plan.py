"""Which nodes of a graph static int8 runs in integers, and which values get Q/DQ pairs.

Here: `plan_int8`, a pure function of graph, scheme and options that reads no weight. A node with
weights (Conv, Gemm, MatMul) starts an island; nodes between islands (Add, Concat, pooling, moves)
join where that saves a round trip through float. Not here: scales (`calibrate`, `numbers`),
changing the graph (`qdq`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from ...ir.graph import (
    attribute,
    constant_tensor,
    describe_node,
    graph_tree,
    is_onnx_op,
    node_name,
    opset_of,
    static_shape,
)
from ...ir.ops import weight_channel_axis
from ...ir.quant import (
    INTEGER_OPS,
    PerChannel,
    PerTensor,
    QuantPlan,
    QuantSpec,
    data_inputs,
)
from ...targets.target import QuantScheme
from .lowered import slope
from .plan_nodes import (
    count_of,
    is_convex_resize,
    is_float,
    is_gate,
    is_gate_result,
    is_spatial_mean,
    products_a_compare,
    saturates,
    why_not,
)

DEFAULT_OPS: tuple[str, ...] = tuple(op for op in INTEGER_OPS if op != "Softmax")
"""What may run in integers unless the options say otherwise. Softmax stays float: its steep part
loses most to 8 bits, and it costs little. Sigmoid and HardSigmoid do only as gates, whose readers
multiply by them."""

_WORTH = 240.0
"""Products in integers that win what one comparison of a MaxPool of integers loses: 0.015 ns of
50 billion float products a second saved on each, 3.6 ns lost."""
_SLIDES_OVER = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""What ONNX Runtime moves a QuantizeLinear over, towards where the value is made."""

_BIAS = QuantSpec(ir.DataType.INT32, True, PerTensor(), zero_points=False)


_MANY_OUTPUTS, _MANY_PRODUCTS, _COLOURS = 32, 100, 3
"""Output channels, products a result, and input channels from which it does not matter that the
latter are few: measured at 3 channels, 7x7 to 64 outputs 0.8x the time of float, 3x3 1.5 to 2.4x;
at one channel, 512x1 to 128 outputs 1.0x, where the rest of the network takes half."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a caller may choose. `exclude` holds node names and operator types.

    `attention`: MatMuls of two activations too. `unseen`: graphs that calibration never ran.
    """

    ops: tuple[str, ...] = DEFAULT_OPS
    exclude: tuple[str, ...] = ()
    attention: bool = False
    unseen: frozenset[ir.Graph] = frozenset()
    sensitive: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Activation:
    """A value that gets a Q/DQ pair in `graph`.

    `source` is the value whose range sets the scale: the value itself, or the one it was moved
    from. `everywhere`: every user reads the pair (an integer node made the value), else only the
    integer nodes of the graph do: those of a branch or loop body have a pair of their own for a
    value from outside. `absorbed`: the Relu or Clip making the value, which saturation replaces.
    """

    graph: ir.Graph
    value: ir.Value
    source: ir.Value
    everywhere: bool
    absorbed: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A node with constant weights: the input its activation is on, the weight's spec, its bias."""

    node: ir.Node
    spec: QuantSpec
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class Int8Layout:
    """The plan bound to the nodes and values of one graph, for the writer."""

    plan: QuantPlan
    scheme: QuantScheme
    nodes: tuple[ir.Node, ...]
    activations: tuple[Activation, ...]
    weighted: tuple[Weighted, ...]
    constants: tuple[tuple[ir.Node, int], ...]

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """The values to observe, each once, in graph order."""
        found = dict.fromkeys(a.source for a in self.activations)
        return tuple(value for value in found if not is_gate_result(value))


def plan_int8(
    model: ir.Model, scheme: QuantScheme, options: PlanOptions | None = None
) -> QuantPlan:
    """What static int8 makes of each value. Weights may be absent; values must have dtypes."""
    return lay_out(model, scheme, options or PlanOptions()).plan


def lay_out(model: ir.Model, scheme: QuantScheme, options: PlanOptions) -> Int8Layout:
    """The plan with the nodes and values it is about, those inside If, Loop and Scan too."""
    parts: list[_Part] = []
    sources: dict[ir.Value, ir.Value] = {}
    for graph in graph_tree(model.graph):
        part = _Planner(model, graph, scheme, options, sources).part()
        for activation in part.activations:
            sources.setdefault(activation.value, activation.source)
        parts.append(part)
    whole = _Part(
        tuple(node for part in parts for node in part.nodes),
        tuple(item for part in parts for item in part.activations),
        tuple(item for part in parts for item in part.weighted),
        tuple(item for part in parts for item in part.constants),
        tuple(note for part in parts for note in part.notes),
    )
    plan = _plan(whole, scheme)
    return Int8Layout(plan, scheme, whole.nodes, whole.activations, whole.weighted, whole.constants)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one graph adds to a layout."""

    nodes: tuple[ir.Node, ...]
    activations: tuple[Activation, ...]
    weighted: tuple[Weighted, ...]
    constants: tuple[tuple[ir.Node, int], ...]
    notes: tuple[tuple[str, str], ...]


class _Planner:
    """Plans one graph. `sources`: whose range an outer value is quantized by, where it is."""

    def __init__(
        self,
        model: ir.Model,
        graph: ir.Graph,
        scheme: QuantScheme,
        options: PlanOptions,
        sources: Mapping[ir.Value, ir.Value],
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.scheme = scheme
        self.options = options
        self.opset = opset_of(model)
        self.refused: dict[ir.Node, str] = {}
        self.order = list(graph)
        self.seeds = {node for node in self.order if self._is_seed(node)}
        # Values that a seed reads are quantized anyway: a follower gets them for nothing.
        self.read_by_seeds = {v for node in self.seeds for _, v in self._activations(node)}
        self.members = self.seeds | {n for n in self.order if self._may_follow(n)}
        self._drop_what_does_not_pay()

    # --- which nodes ---------------------------------------------------------------------------

    def _allowed(self, node: ir.Node) -> bool:
        return (
            is_onnx_op(node, *INTEGER_OPS)
            and node.op_type in self.options.ops
            and node.op_type not in self.options.exclude
            and node_name(node) not in self.options.exclude
        )

    def _is_seed(self, node: ir.Node) -> bool:
        if not is_onnx_op(node, *INTEGER_OPS) or not INTEGER_OPS[node.op_type].weighted:
            return False
        if not self._allowed(node):
            if node.op_type in self.options.ops:
                self.refused[node] = "excluded by option"
            return False
        reason = why_not(node, self.options.attention) or self._too_thin(node)
        if not reason and self._reads_float_pool(node):
            reason = "behind a MaxPool of floats, which its integers would slow down"
        if not reason and self.graph in self.options.unseen:
            reason = "calibration never ran its branch"
        if not reason and self._is_sensitive(node):
            reason = "sensitive: in 8 bits it does most of the harm on the calibration data"
        if reason:
            self.refused[node] = reason
        return not reason

    def _is_sensitive(self, node: ir.Node) -> bool:
        return node_name(node) in self.options.sensitive

    def _too_thin(self, node: ir.Node) -> str:
        """Why a convolution of few channels stays float, where the target says so; else ''."""
        least = self.scheme.min_conv_channels
        shape = static_shape(node.inputs[1]) if is_onnx_op(node, "Conv") else None
        if not least or shape is None or len(shape) < 4 or attribute(node, "group", 1) != 1:
            return ""
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        reads_integers = len(shape) == 4 and self._leads_to_seed(source)
        deep = shape[0] >= _MANY_OUTPUTS and math.prod(shape[1:]) >= _MANY_PRODUCTS
        deep = deep and shape[1] >= _COLOURS  # patches are gathered place by place
        if shape[1] >= least or reads_integers or deep:
            return ""
        # A MaxPool of integers is quick only beside an integer convolution (channels last).
        results = [
            node.outputs[0],
            *(r for use in node.outputs[0].uses() for r in use.node.outputs),
        ]
        if any(is_onnx_op(use.node, "MaxPool") for value in results for use in value.uses()):
            return ""
        return f"of {shape[1]} input channels: faster in float on this target"

    def _reads_float_pool(self, node: ir.Node) -> bool:
        """Whether a QuantizeLinear before the node would slide over a MaxPool of floats.

        ONNX Runtime 1.32 moves it there, and pools integers that do not lie channels last, as an
        integer convolution would leave them, 13 times as slowly as floats. Where the node has many
        products for each that the pool compares, it pays even so.
        """
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        while maker is not None and is_onnx_op(maker, *_SLIDES_OVER):
            value = maker.inputs[0]
            if is_onnx_op(maker, "MaxPool"):
                made = value.producer() if value is not None else None
                return not self._leads_to_seed(made) and products_a_compare(node, maker) < _WORTH
            maker = value.producer() if value is not None else None
        return False

    def _leads_to_seed(self, node: ir.Node | None) -> bool:
        """Whether a value comes from a convolution or product, through what follows one."""
        for _ in range(8):
            if node is None:
                return False
            if not saturates(node):
                if not self._allowed(node) or self._is_sensitive(node):
                    return False
                if INTEGER_OPS[node.op_type].weighted:
                    return True
            value = node.inputs[0]
            node = value.producer() if value is not None else None
        return False

    def _may_follow(self, node: ir.Node) -> bool:
        if not self._allowed(node) or INTEGER_OPS[node.op_type].weighted:
            return False
        if self._is_sensitive(node) or not all(is_float(v) for v in node.outputs):
            return False
        values = [node.inputs[i] for i in data_inputs(node)]
        if not all(is_float(v) for v in values) or not any(
            constant_tensor(v) is None for v in values
        ):
            return False
        match node.op_type:
            case "MaxPool":  # 8-bit MaxPool came with opset 12; indices need the floats' order
                return self.opset >= 12 and len(node.outputs) == 1
            case "Resize":
                return is_convex_resize(node)
            case "HardSwish":  # clipped by saturation, which symmetric integers do not do at 0
                return not self.scheme.symmetric_activation
            case "HardSigmoid" if self.scheme.symmetric_activation or slope(node)[0] <= 0:
                return False
            case "Sigmoid" | "HardSigmoid":
                users = [use.node for use in node.outputs[0].uses()]
                return bool(users) and all(is_onnx_op(user, "Mul") for user in users)
            case "ReduceMean":
                return is_spatial_mean(node)
            case "Add" | "Mul":
                # A one-element constant is part of an activation function (x + 3, x / 6).
                return not any(constant_tensor(v) is not None and count_of(v) == 1 for v in values)
        return True

    def _activations(self, node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
        """The data inputs that are not constant, with their indices."""
        for index in data_inputs(node):
            value = node.inputs[index]
            if value is not None and constant_tensor(value) is None:
                yield index, value

    def _absorbed(self, node: ir.Node) -> ir.Node | None:
        """The Relu or Clip after a node that saturating to the 8-bit range replaces."""
        if self.scheme.symmetric_activation or len(node.outputs) != 1:
            return None
        value = node.outputs[0]
        if value.is_graph_output() or len(value.uses()) != 1:
            return None
        user = next(iter(value.uses())).node
        return user if user.graph is node.graph and saturates(user) else None

    def _result(self, node: ir.Node, index: int = 0) -> ir.Value:
        activation = self._absorbed(node)
        return node.outputs[index] if activation is None else activation.outputs[0]

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """The node that makes a value, seen through an absorbed activation."""
        node = value.producer()
        if node is not None and saturates(node) and node.inputs[0] is not None:
            before = node.inputs[0].producer()
            if before is not None and before in self.members and self._absorbed(before) is node:
                return before
        return node

    def _is_made_in_integers(self, value: ir.Value) -> bool:
        node = self._maker(value)
        return node in self.members and not INTEGER_OPS[node.op_type].float_output

    def _readers(self, node: ir.Node) -> Iterator[ir.Node]:
        """Members that read a result of a member as data."""
        for i in range(len(node.outputs)):
            for user, index in self._result(node, i).uses():
                if user in self.members and index in data_inputs(user):
                    yield user

    def _drop_what_does_not_pay(self) -> None:
        """The largest set in which every follower has integers before and behind it."""
        todo = [node for node in self.order if node in self.members and node not in self.seeds]
        while todo:
            node = todo.pop()
            if node not in self.members or node in self.seeds or self._pays(node):
                continue
            around = [m for _, v in self._activations(node) if (m := self._maker(v)) is not None]
            around += list(self._readers(node))
            self.members.discard(node)
            todo += [n for n in around if n in self.members]

    def _pays(self, node: ir.Node) -> bool:
        if not any(True for _ in self._readers(node)):
            return False
        values = [v for _, v in self._activations(node)]
        made = [self._is_made_in_integers(v) for v in values]
        if not any(made) or (node.op_type == "MaxPool" and not all(made)):
            return False
        result = count_of(node.outputs[0])
        return all(
            ok or v in self.read_by_seeds or is_gate(v, result)
            for ok, v in zip(made, values, strict=True)
        )

    # --- which values --------------------------------------------------------------------------

    def part(self) -> _Part:
        nodes = tuple(node for node in self.order if node in self.members)
        read = {v for node in nodes for _, v in self._activations(node)}
        activations = self._pairs(read)
        weighted = tuple(self._weighted(node) for node in nodes if self._has_weights(node))
        constants = tuple(
            (node, i)
            for node in nodes
            if not self._has_weights(node)
            for i in data_inputs(node)
            if constant_tensor(node.inputs[i]) is not None
        )
        return _Part(nodes, activations, weighted, constants, tuple(self._notes()))

    def _pairs(self, read: set[ir.Value]) -> tuple[Activation, ...]:
        graph = self.graph
        pairs: dict[ir.Value, Activation] = {}
        for value in self._from_outside(read):
            source = self.sources.get(value, value)
            pairs[value] = Activation(graph, value, source, everywhere=False)
        for node in self.order:
            if node not in self.members:
                for value in node.outputs:
                    if value in read and value not in pairs:
                        pairs[value] = Activation(graph, value, value, everywhere=False)
                continue
            row = INTEGER_OPS[node.op_type]
            results = [self._result(node, i) for i in range(len(node.outputs))]
            if row.float_output and results[0] not in read:
                continue
            for value in results:
                source = pairs[node.inputs[0]].source if row.same_scale else value  # type: ignore[index]
                pairs[value] = Activation(graph, value, source, True, self._absorbed(node))
        return tuple(pairs.values())

    def _from_outside(self, read: set[ir.Value]) -> Iterator[ir.Value]:
        """The values read that no node of the graph makes: its inputs, then captured ones."""
        made = {value for node in self.order for value in node.outputs}
        inputs = [value for value in self.graph.inputs if value in read]
        yield from inputs
        made.update(inputs)
        for node in self.order:
            if node in self.members:
                for _, value in self._activations(node):
                    if value not in made:
                        made.add(value)
                        yield value

    @staticmethod
    def _has_weights(node: ir.Node) -> bool:
        return INTEGER_OPS[node.op_type].weighted and constant_tensor(node.inputs[1]) is not None

    def _weighted(self, node: ir.Node) -> Weighted:
        weight = node.inputs[1]
        rank = len(weight.shape) if weight is not None and weight.shape is not None else 0
        axis = weight_channel_axis(node, 1)
        per_channel = self.scheme.per_channel and axis is not None
        if node.op_type == "MatMul" and rank != 2:
            per_channel = False  # a stack of matrices has no one axis of output channels
        spec = QuantSpec(
            self.scheme.weight,
            True,
            PerChannel(axis % rank) if per_channel and axis is not None else PerTensor(),
        )
        return Weighted(node, spec, len(node.inputs) > 2 and node.inputs[2] is not None)

    def _notes(self) -> Iterator[tuple[str, str]]:
        for node in self.order:
            if node in self.refused:
                yield describe_node(node), self.refused[node]


# --- the plan as data --------------------------------------------------------------------------


def _plan(part: _Part, scheme: QuantScheme) -> QuantPlan:
    symmetric = scheme.symmetric_activation
    activation = QuantSpec(scheme.activation, symmetric)
    entries = {a.value.name or "": activation for a in part.activations}
    stored: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    seen: set[tuple[str, QuantSpec]] = set()
    for item in part.weighted:
        weight = item.node.inputs[1].name or ""  # type: ignore[union-attr]
        entries.setdefault(weight, item.spec)
        covered[weight] += 1
        stored[weight] += (weight, item.spec) not in seen
        seen.add((weight, item.spec))
        if item.has_bias:
            bias = item.node.inputs[2].name or ""  # type: ignore[union-attr]
            channels = not isinstance(item.spec.granularity, PerTensor)
            granularity = PerChannel(0) if channels else PerTensor()
            entries[bias] = dataclasses.replace(_BIAS, granularity=granularity)
            covered[bias] += 1
            stored[bias] += 1
    for node, index in part.constants:
        name = node.inputs[index].name or ""  # type: ignore[union-attr]
        entries.setdefault(name, dataclasses.replace(activation, symmetric=False))
        covered[name] += 1
        stored[name] = 1
    values = _by_name(part.weighted, part.constants)
    return QuantPlan(
        label=f"int8 {scheme}",
        entries=entries,
        nodes=tuple(node_name(node) for node in part.nodes),
        copies={name: count for name, count in stored.items() if count > 1}
        | dict.fromkeys(_orphans(part.activations), 0),
        kept=frozenset(
            name
            for name, value in values.items()
            if len(value.uses()) > covered[name] or value.is_graph_output()
        ),
        notes=part.notes,
    )


def _by_name(
    weighted: Iterable[Weighted], constants: Iterable[tuple[ir.Node, int]]
) -> dict[str, ir.Value]:
    values = [v for item in weighted for v in item.node.inputs[1:3] if v is not None]
    values += [v for node, i in constants if (v := node.inputs[i]) is not None]
    return {value.name or "": value for value in values}


def _orphans(activations: Iterable[Activation]) -> Iterator[str]:
    """The bounds that go when their Clips do."""
    gone = {a.absorbed for a in activations if a.absorbed is not None}
    for node in sorted(gone, key=lambda n: n.outputs[0].name or ""):
        for value in node.inputs[1:]:
            if value is None or value.is_graph_output():
                continue
            if all(use.node in gone for use in value.uses()):
                yield value.name or ""
