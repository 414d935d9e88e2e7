"""Reading what ONNX Runtime's profiler wrote: kernels, their shapes and milliseconds.

Here: `KernelTime` and `read_trace`. The trace has the times and the shapes of results, the graph
that the runtime saved has operators, attributes and weights. Not here: running (`microbench`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..ir.graph import ONNX_DOMAINS
from ..ir.ops import node_cost
from .features import Features, features
from .operand import Operand


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """A kernel that ran: the runtime's operator, what it read and wrote, and milliseconds."""

    type: str
    domain: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]
    attributes: Mapping[str, Any]
    ms: float
    macs: float = 0.0

    @property
    def features(self) -> Features:
        """As the cost model sees it."""
        return features(
            self.type, self.domain, self.inputs, self.outputs, self.attributes, self.macs
        )


def typical(times: Sequence[float]) -> float:
    """The mean of the fastest third: noise only ever adds, and a clock has steps."""
    if not len(times):
        return math.nan
    fastest = sorted(times)[: max(1, len(times) // 3)]
    return math.fsum(fastest) / len(fastest)


_DTYPES = {"float": "float32", "double": "float64"}
"""The trace's names of dtypes, where they are not numpy's."""
_IR_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "float64": ir.DataType.DOUBLE,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


def read_trace(trace: Path, optimized: Path) -> tuple[KernelTime, ...]:
    """The kernels of a trace in the order in which they ran."""
    # several nodes may have one name: they run in the order of the graph
    durations: dict[tuple[str, str], list[float]] = {}
    shapes: dict[tuple[str, str], dict[str, Any]] = {}
    for event in json.loads(trace.read_text(encoding="utf-8")):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time"), str(event["args"].get("node_index", ""))
            durations.setdefault(key, []).append(event["dur"] / 1e3)
            shapes[key] = event["args"]
    graph = ir.load(optimized).graph
    operands: dict[str, Operand] = {}
    for value in graph.initializers.values():
        if value.shape is not None and value.dtype is not None:
            shape = tuple(value.shape.numpy())
            operands[value.name or ""] = Operand(shape, _dtype_name(value.dtype), True)
    for value in graph.inputs:
        if value.shape is not None and value.dtype is not None and not value.is_initializer():
            operands[value.name or ""] = Operand(
                tuple(d if isinstance(d, int) else 1 for d in value.shape.dims),
                _dtype_name(value.dtype),
            )
    by_name: dict[tuple[str, str], list[ir.Node]] = {}
    for each in graph:
        by_name.setdefault((each.name or "", each.op_type), []).append(each)
    # the saved graph has no shapes between its nodes: those that were seen are put in
    found = []
    for key, times in durations.items():
        op = str(shapes[key].get("op_name", ""))
        read = _operands(shapes[key].get("input_type_shape", ()))
        waiting = by_name.get((key[0], op), [])
        if not waiting and key[0] == f"{op}_{key[1]}":  # as nodes without a name are reported
            waiting = by_name.get(("", op), [])
        node = _matching(waiting, read, operands)
        if node is None:  # of a subgraph: part of the node that holds it
            continue
        waiting.remove(node)
        outputs = _operands(shapes[key].get("output_type_shape", ()))
        for value, operand in zip((v for v in node.outputs if v.name), outputs, strict=False):
            operands[value.name or ""] = operand
            value.shape = ir.Shape(operand.shape)
            value.type = ir.TensorType(_IR_DTYPES.get(operand.dtype, ir.DataType.FLOAT))
        inputs = tuple(
            None if value is None or not value.name else operands.get(value.name)
            for value in node.inputs
        )
        # the first runs warm up
        ms = typical(times[1:] or times)
        plain = {k: a.value for k, a in node.attributes.items() if _is_plain(a.value)}
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        macs = float(node_cost(node).macs or 0)
        found.append(KernelTime(node.op_type, domain, inputs, outputs, plain, ms, macs))
    return tuple(found)


def _matching(
    waiting: Sequence[ir.Node], read: Sequence[Operand], operands: Mapping[str, Operand]
) -> ir.Node | None:
    """The first node whose inputs have the shapes that were reported, else the first."""
    shapes = [operand.shape for operand in read]
    for node in waiting:
        given = [value.name for value in node.inputs if value is not None and value.name]
        if [operands[name].shape for name in given if name in operands] == shapes:
            return node
    return waiting[0] if waiting else None


def _operands(reported: Sequence[Mapping[str, Any]]) -> tuple[Operand, ...]:
    found = []
    for item in reported:
        for dtype, shape in item.items():
            found.append(Operand(tuple(int(d) for d in shape), _DTYPES.get(dtype, dtype)))
    return tuple(found)


def _dtype_name(dtype: ir.DataType) -> str:
    try:
        return str(dtype.numpy().name)
    except TypeError:
        return dtype.name.lower()


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) or (
        isinstance(value, list | tuple) and all(isinstance(v, int | float | str) for v in value)
    )
