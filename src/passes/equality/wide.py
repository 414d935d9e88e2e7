"""A model in double precision: what rounding alone does to the results of the one in float32.

Here: `Wide`. Not here: what is made of it (`judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import EdgepassError
from ...ir.graph import graph_tree

_FACTOR = 4.0
"""Another order of the same arithmetic has errors of the same size, not the same errors."""


class Wide:
    """The double-precision twin of a model, made when it is first asked for."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._runner: Any = None

    def own_errors(
        self, feed: Mapping[str, np.ndarray], results: Sequence[Any], factor: float = _FACTOR
    ) -> list[float]:
        """`factor` times the largest absolute error of each of the model's own float results.

        Zeros where the model computes in no float32, or has no kernels in double precision.
        """
        none = [0.0] * len(results)
        try:
            runner = self._twin()
            exact = list(runner.run({k: _widen(v) for k, v in feed.items()}).values())
        except EdgepassError:
            return none
        found = []
        for narrow, wide in zip(results, exact, strict=True):
            a = np.asarray(narrow)
            if a.dtype != np.float32 or a.shape != np.shape(wide) or a.size == 0:
                found.append(0.0)
                continue
            with np.errstate(all="ignore"):
                gap = np.abs(a.astype(np.float64) - np.asarray(wide, np.float64))
            found.append(factor * float(gap[np.isfinite(gap)].max(initial=0.0)))
        return found

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
        for node in graph:
            _widen_attributes(node)
    return twin


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
