"""The two graphs that `inspect` compares, and ways to look into them while they run.

Here: `Side`, a model with the values that can be watched or replaced; `Quantizer`, what a
QuantizeLinear does to a value. Not here: which values belong together (`internals_match`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import UsageError
from ..ir.graph import (
    constant_array,
    constant_tensor,
    fresh_name,
    has_subgraphs,
    index_names,
    is_onnx_op,
)
from ..ir.ops import Category, facts
from ..ir.quant import is_dequantize, is_qdq, is_quantize
from ..ir.shapes import infer_shapes
from ..passes.base import Context
from ..passes.cleanup.inline import InlineFunctions
from ..passes.quantize.numbers import integer_range
from ..targets.onnxruntime import OrtRunner
from .internals_qlinear import expand_integer_operators

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_NO_COMPUTE = (Category.DATA_MOVEMENT, Category.SHAPE_COMPUTATION, Category.QUANTIZATION)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Scale and zero point of a QuantizeLinear, and the integers it saturates at.

    `axis` is that of the channels where `scale` has more than one element. `shared`: other values
    are quantized with the very same scale.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    dtype: ir.DataType
    axis: int
    shared: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The least and greatest integer."""
        return integer_range(self.dtype)

    @property
    def low(self) -> float:
        """The least float it can give."""
        return float(np.min((self.limits[0] - self.zero_point) * self.scale))

    @property
    def high(self) -> float:
        """The greatest float it can give."""
        return float(np.max((self.limits[1] - self.zero_point) * self.scale))

    def integers(self, array: np.ndarray) -> np.ndarray:
        """Before saturation: what is out of `limits` is clipped."""
        scale, zero_point = self._spread(array.ndim)
        rounded: np.ndarray = np.rint(array / scale) + zero_point
        return rounded

    def floats(self, integers: np.ndarray) -> np.ndarray:
        """Of integers, saturated."""
        scale, zero_point = self._spread(integers.ndim)
        result: np.ndarray = (np.clip(integers, *self.limits) - zero_point) * scale
        return result

    def _spread(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        if self.scale.size == 1:
            return self.scale.reshape(()), self.zero_point.reshape(())
        shape = [-1 if i == self.axis % rank else 1 for i in range(rank)]
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


class Side:
    """A copy of a model, functions inlined, with what of it can be watched.

    `values` are the float tensors of the main graph that depend on its inputs, by name, in graph
    order, without what DequantizeLinear makes; `hidden` counts nodes in subgraphs.
    """

    def __init__(self, model: ir.Model) -> None:
        copy = model.clone()
        InlineFunctions().run(copy, Context())
        expand_integer_operators(copy)
        infer_shapes(copy, strict=False)
        index_names(copy)
        self.model = copy
        self.graph = copy.graph
        self.inputs = [v for v in self.graph.inputs if not v.is_initializer()]
        self.outputs = list(self.graph.outputs)
        self.computed = self._computed()
        values = [*self.inputs, *(v for node in self.graph for v in node.outputs)]
        self.by_name = {v.name: v for v in values if v.name}
        self.values = {
            v.name: v
            for v in values
            if v.name and v in self.computed and v.dtype in FLOATS and not _dequantized(v)
        }
        self.hidden = sum(
            1
            for node in self.graph
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
            for _ in attribute.as_graph()
        )

    def _computed(self) -> set[ir.Value]:
        found = set(self.inputs)
        for node in self.graph:
            if has_subgraphs(node) or any(v in found for v in node.inputs):
                found.update(node.outputs)
        return found

    # --- running ---------------------------------------------------------------------------

    def watch(self, names: Iterable[str]) -> OrtRunner:
        """A session of the model as it is, without the runtime's optimizations, giving `names`."""
        return _session(self.model.clone(), list(dict.fromkeys(names)))

    def constants(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The arrays of values that depend on no input, by name: weights as they are used."""
        found = {}
        rest = []
        for name in names:
            value = self.by_name.get(name) or self.graph.initializers[name]
            array = constant_array(value)
            if array is not None:
                found[name] = array
            else:
                rest.append(name)
        if rest:
            with self.watch(rest) as runner:
                found |= runner.run(feed, rest)
        return found


def _session(model: ir.Model, names: list[str]) -> OrtRunner:
    by_name = {v.name: v for v in model.graph.inputs}
    by_name.update((v.name, v) for node in model.graph for v in node.outputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend(by_name[name] for name in names)
    return OrtRunner(model, optimize=False)


def forced_session(
    side: Side, forced: Mapping[str, int], watched: Iterable[str]
) -> tuple[OrtRunner, dict[str, tuple[str, np.dtype[Any]]]]:
    """A session in which every reader of a value gets what the caller feeds instead.

    before: ... -> Conv -> v -> Q -> DQ -> Conv -> ...
    after:  ... -> Conv -> v -> Q -> DQ    given -> Conv -> ...

    `forced` maps names of values to their rank. What a value's Q/DQ pair makes of it is computed
    still, so that it can be watched, and read by no one. Returns the session, and the name and
    dtype of the input to feed for each value.
    """
    model = side.model.clone()
    graph = model.graph
    by_name = {v.name: v for v in graph.inputs}
    by_name.update((v.name, v) for node in graph for v in node.outputs)
    outputs = [by_name[name] for name in dict.fromkeys(watched)]
    feeds = {}
    for name, rank in forced.items():
        value = by_name[name]
        if value.is_graph_input():  # fed as it is; only what its pair makes of it is replaced
            given = value
        else:
            assert value.dtype is not None
            given = ir.Value(
                name=fresh_name(graph, f"{name}/given"),
                type=ir.TensorType(value.dtype),
                shape=ir.Shape([None] * rank),
            )
            graph.inputs.append(given)
            feeds[name] = (given.name or "", value.dtype.numpy())
        pairs = quantizers_of(value)
        for use in list(value.uses()):
            if use.node not in pairs:
                use.node.replace_input_with(use.idx, given)
        for pair in pairs:
            _force_pair(graph, pair, given)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    return OrtRunner(model, optimize=False), feeds


def _force_pair(graph: ir.Graph, pair: ir.Node, given: ir.Value) -> None:
    """Readers of a Q/DQ pair read `given`; readers of its integers read those of `given`."""
    again = None
    for use in list(pair.outputs[0].uses()):
        if is_dequantize(use.node) and use.idx == 0:
            for reader in list(use.node.outputs[0].uses()):
                reader.node.replace_input_with(reader.idx, given)
            continue
        if again is None:
            again = ir.Node(
                pair.domain,
                pair.op_type,
                [given, *pair.inputs[1:]],
                list(pair.attributes.values()),
                num_outputs=1,
            )
            again.outputs[0].type = pair.outputs[0].type
            again.outputs[0].name = fresh_name(graph, f"{pair.outputs[0].name}/given")
            graph.insert_after(pair, again)
        use.node.replace_input_with(use.idx, again.outputs[0])


# --- questions about values ------------------------------------------------------------------


def is_pair(quantize: ir.Node, dequantize: ir.Node) -> bool:
    """Whether a Q and a DQ after it undo each other: of one scale and one zero point.

    A DQ with another scale than its Q multiplies (a HardSigmoid is made so).
    """
    for index in (1, 2):
        a, b = (n.inputs[index] if index < len(n.inputs) else None for n in (quantize, dequantize))
        if a is b:
            continue
        x, y = constant_array(a), constant_array(b)
        if x is None or y is None or not np.array_equal(x, y):
            return False
    return True


def source_of(value: ir.Value) -> ir.Value:
    """The float before the Q/DQ pair that a value is behind, or the value itself."""
    node = value.producer()
    if node is None or not is_dequantize(node) or node.inputs[0] is None:
        return value
    maker = node.inputs[0].producer()
    if maker is None or not is_quantize(maker) or not is_pair(maker, node):
        return value
    source = maker.inputs[0]
    return value if source is None else source


def _dequantized(value: ir.Value) -> bool:
    """Whether a value is the second half of a Q/DQ pair: its float is named before the pair."""
    return source_of(value) is not value


def quantizers_of(value: ir.Value) -> list[ir.Node]:
    """The QuantizeLinears of the Q/DQ pairs behind a value."""
    found = [use.node for use in value.uses() if use.idx == 0 and is_quantize(use.node)]
    return [node for node in found if all(is_pair(node, dq) for dq in dequantizers_of(node))]


def dequantizers_of(quantize: ir.Node) -> list[ir.Node]:
    """The DequantizeLinears that read the integers of a QuantizeLinear."""
    uses = quantize.outputs[0].uses()
    return [use.node for use in uses if use.idx == 0 and is_dequantize(use.node)]


def odd_pairs(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The QuantizeLinears whose DequantizeLinear, among the nodes, has another scale."""
    found = []
    for node in nodes:
        source = node.inputs[0] if is_dequantize(node) else None
        maker = source.producer() if source is not None else None
        if maker is not None and is_quantize(maker) and not is_pair(maker, node):
            found.append(maker)
    return found


def seen_of(value: ir.Value) -> ir.Value:
    """What most readers of a value see: the result of its Q/DQ pair, or the value itself."""
    for pair in quantizers_of(value):
        for use in pair.outputs[0].uses():
            if is_dequantize(use.node) and use.idx == 0:
                return use.node.outputs[0]
    return value


def quantizer_of(value: ir.Value) -> Quantizer | None:
    """What the pair behind a value does; None without one, or where its scale is not constant."""
    for pair in quantizers_of(value):
        scale = constant_array(pair.inputs[1])
        if scale is None:
            continue
        zero = pair.inputs[2] if len(pair.inputs) > 2 else None
        zero_point = constant_array(zero) if zero is not None else np.zeros(1, np.uint8)
        dtype = zero.dtype if zero is not None else pair.outputs[0].dtype
        if zero_point is None or dtype is None or not dtype.is_integer():
            continue
        axis = pair.attributes.get("axis")
        shared = _is_shared(pair)
        return Quantizer(
            np.asarray(scale, np.float64),
            np.broadcast_to(np.asarray(zero_point, np.int64), scale.shape),
            dtype,
            1 if axis is None else axis.as_int(),
            shared,
        )
    return None


def _is_shared(pair: ir.Node) -> bool:
    """Whether a neighbour through moving nodes or a Concat has the same scale."""
    scale = constant_array(pair.inputs[1])
    value = pair.inputs[0]
    node = value.producer() if value is not None else None
    near = [*(node.inputs if node is not None else ())]
    result = seen_of(value) if value is not None else None
    near += [v for use in (result.uses() if result is not None else ()) for v in use.node.outputs]
    movers = [n for n in (node, *(v.producer() for v in near if v is not None)) if n is not None]
    if not any(facts(n).movement_only or is_onnx_op(n, "Concat", "MaxPool") for n in movers):
        return False
    for other in near:
        if other is None:
            continue
        producer = other.producer()
        pairs = [producer] if is_dequantize(producer) else quantizers_of(other)
        for item in pairs:
            theirs = constant_array(item.inputs[1]) if item is not None else None
            if theirs is not None and scale is not None and np.array_equal(theirs, scale):
                return True
    return False


def is_layer(node: ir.Node | None) -> bool:
    """Whether a node computes: not a pair, a cast, a move or a shape."""
    if node is None or is_qdq(node) or is_onnx_op(node, "Cast", "Identity", "Constant", "Dropout"):
        return False
    row = facts(node)
    return not row.movement_only and row.category not in _NO_COMPUTE


def region(target: ir.Value, stops: set[ir.Value], computed: set[ir.Value]) -> list[ir.Node]:
    """The nodes that make a value out of `stops`, in no order; constants' makers left out."""
    found: dict[ir.Node, None] = {}
    todo = [target]
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or node in found or value not in computed:
            continue
        found[node] = None
        todo += [v for v in node.inputs if v is not None and v not in stops]
    return list(found)


def as_graph(model: Any) -> ir.Model:
    """The graph of a model in any form: `Compiled`, an artifact or its folder, ONNX, torch.

    Raises:
        UsageError: an artifact that holds no ONNX file.
        EdgepassError: see `frontends.load_model`.
    """
    from ..artifact import Artifact, load
    from ..compiled import Compiled
    from ..frontends import load_model
    from ..manifest import is_artifact

    if isinstance(model, Compiled):
        return model.model
    if isinstance(model, str | Path) and Path(model).is_dir() and is_artifact(Path(model)):
        model = load(model)
    if isinstance(model, Artifact):
        if model.model_file.suffix != ".onnx":
            raise UsageError(
                f"{model.model_file.name} can't be looked into",
                where=str(model.path),
                why="only ONNX files say what is computed on the way",
                fix="inspect what `compile` returned, or save the onnx format",
            )
        return load_model(model.model_file)
    return load_model(model)


def weight_inputs(node: ir.Node, computed: set[ir.Value]) -> list[ir.Value]:
    """The float or integer tensors a computing node reads that depend on no input."""
    if not is_layer(node):
        return []
    values = [v for v in node.inputs if v is not None and v not in computed]
    return [v for v in values if v.dtype is not None and (v.dtype in FLOATS or _is_weight_int(v))]


def is_matrix(value: ir.Value) -> bool:
    """Whether a constant has two axes or more: a weight, no bias or gain spread over axes of 1."""
    shape = value.shape
    return shape is not None and sum(d != 1 for d in shape.dims) >= 2


def _is_weight_int(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) >= 2 and tensor.dtype.bitwidth <= 8
