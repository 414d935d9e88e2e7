"""A model in double precision: what rounding alone does to the results of the one in float32.

Two things count: how far the float32 results are from those in double precision, and how far the
latter move when each input moves by a rounding step of float32. A norm of equal numbers is an
example of the second: its result is noise.

Here: `Wide`. Not here: what is made of it (`judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import EdgepassError
from ...ir.graph import attribute, graph_tree, is_onnx_op

_NUDGES = 3
_FACTOR = 4.0
"""Another order of the same arithmetic has errors of the same size, not the same errors."""


class Wide:
    """The double-precision twin of a model, made when it is first asked for.

    Where there are no kernels in double precision, `runner`, which runs the model itself, stands in
    for it: then only the second kind of error is seen.
    """

    def __init__(self, model: ir.Model, runner: Any) -> None:
        self._model = model
        self._narrow = runner
        self._runner: Any = None

    def own_errors(
        self, feed: Mapping[str, np.ndarray], results: Sequence[Any], *, nudge: bool = True
    ) -> list[float]:
        """Four times the largest absolute error of each of the model's own float results.

        Zeros where the model computes in no float32. Without `nudge` only the first kind of error
        counts, for inputs where functions jump.
        """
        seeds = range(_NUDGES if nudge else 0)
        nudged = [{k: _nudged(v, seed) for k, v in feed.items()} for seed in seeds]
        narrow = [list(self._narrow.run(item).values()) for item in nudged]
        try:
            exact = self._in_double(feed)
            moved = [self._in_double(item) for item in nudged]
        except EdgepassError:
            exact, moved = list(results), narrow
        pairs = [(list(results), exact), *((wide, exact) for wide in moved)]
        pairs += zip(narrow, moved, strict=True)  # the first kind again: one sample may be lucky
        return [
            _FACTOR * max(_gap(a[index], b[index]) for a, b in pairs)
            if np.asarray(results[index]).dtype == np.float32
            else 0.0
            for index in range(len(exact))
        ]

    def _in_double(self, feed: Mapping[str, np.ndarray]) -> list[Any]:
        return list(self._twin().run({k: _widen(v) for k, v in feed.items()}).values())

    def _twin(self) -> Any:
        from ...targets.onnxruntime import OrtRunner

        if self._runner is None:
            self._runner = OrtRunner(in_double(self._model), optimize=False)
        return self._runner


def in_double(model: ir.Model) -> ir.Model:
    """A copy of the model with every float32 a float64. Shapes stay; functions are left alone."""
    twin = model.clone()
    for graph in graph_tree(twin.graph):
        for value in graph.initializers.values():
            if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
                value.const_value = _tensor(value.const_value, value.name)
                value.type = ir.TensorType(ir.DataType.DOUBLE)
        for value in (*graph.inputs, *graph.outputs, *(v for n in graph for v in n.outputs)):
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.DOUBLE)
        for node in list(graph):
            _widen_attributes(node)
            if is_onnx_op(node, "InstanceNormalization") and node.inputs[0] is not None:
                _spell_out(node, node.inputs[0], graph)
    return twin


def _spell_out(node: ir.Node, x: ir.Value, graph: ir.Graph) -> None:
    """InstanceNormalization has no kernel in double precision; its parts have.

    ONNX operator InstanceNormalization: scale * (x - mean) / sqrt(variance + epsilon) + bias.
    """
    if x.shape is None or len(x.shape) < 3:
        return
    rank, epsilon = len(x.shape), attribute(node, "epsilon", 1e-5)
    made: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value | None, **attributes: int | list[int]) -> ir.Value:
        options = ir.convenience.convert_attributes(attributes)
        made.append(ir.Node("", op_type, inputs, options, num_outputs=1))
        made[-1].outputs[0].name = f"{node.outputs[0].name}/wide{len(made)}"
        return made[-1].outputs[0]

    def constant(array: np.ndarray) -> ir.Value:
        value = add("Constant")
        made[-1].attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
        return value

    spatial = list(range(2, rank))
    late = int(graph.opset_imports.get("", 18)) >= 18

    def mean(value: ir.Value) -> ir.Value:
        if late:
            return add("ReduceMean", value, constant(np.array(spatial, np.int64)))
        return add("ReduceMean", value, axes=spatial)

    per_channel = constant(np.array([-1, *[1] * (rank - 2)], np.int64))
    centred = add("Sub", x, mean(x))
    variance = add("Add", mean(add("Mul", centred, centred)), constant(np.array(epsilon)))
    normal = add("Div", centred, add("Sqrt", variance))
    scaled = add("Mul", normal, add("Reshape", node.inputs[1], per_channel))
    result = add("Add", scaled, add("Reshape", node.inputs[2], per_channel))
    graph.insert_before(node, made)
    old = node.outputs[0]
    result.name, old.name = old.name, f"{old.name}/narrow"
    result.type = old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _widen_attributes(node: ir.Node) -> None:
    for name, item in list(node.attributes.items()):
        if item.is_ref():
            continue
        if item.type == ir.AttributeType.TENSOR and item.as_tensor().dtype == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrTensor(name, _tensor(item.as_tensor(), None))
        elif node.op_type == "Cast" and name == "to" and item.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.DOUBLE))
        elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
            del node.attributes[name]
            array = np.array(item.value, np.float32).astype(np.float64)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _tensor(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float64), name=name)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _nudged(array: np.ndarray, seed: int) -> np.ndarray:
    """Some numbers a rounding step up, the others one down, in no pattern."""
    if array.dtype != np.float32:
        return array
    up = np.random.default_rng(seed).random(array.shape) < 0.5
    with np.errstate(all="ignore"):
        moved = np.nextafter(array, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
    return np.where(np.isfinite(array), moved, array)


def _gap(a: Any, b: Any) -> float:
    """The largest absolute difference where both are finite; 0 where shapes differ."""
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape:
        return 0.0
    with np.errstate(all="ignore"):
        gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
    return float(gap[np.isfinite(gap)].max(initial=0.0))
