"""Which values a 16-bit float cannot hold, by what calibration data makes them.

Here: `observe_magnitudes`, one number or two a value in memory that does not grow with the samples,
and `out_of_range`, which turns them into reasons. Not here: rules that need no data (`half_ops`),
changing the graph (`half`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import (
    add_initializer,
    attribute,
    constant_tensor,
    fresh_name,
    index_names,
    is_onnx_op,
    opset_of,
    static_shape,
)
from ...ir.ops import facts
from ...targets.feed import check_feed, input_specs
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample

HEADROOM = 4.0
"""How far other data may exceed the calibration samples before a value overflows."""
_SOFTMAX_ROUNDING = 0.25
"""The rounding step of a Softmax's greatest input from which probabilities are wrong by 1/8."""
_IS_INF_SINCE = 10
_SUMS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")

_FIX = (
    "drop the sample, or repair its shapes; 16-bit floats need no calibration data, but can't tell "
    "then which values overflow"
)


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Over all samples: the greatest finite |x|, and the greatest finite x."""

    peak: float
    greatest: float

    def union(self, other: Magnitude) -> Magnitude:
        """Of both."""
        return Magnitude(max(self.peak, other.peak), max(self.greatest, other.greatest))


def observe_magnitudes(
    model: ir.Model,
    samples: Sequence[Feed],
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Magnitude]:
    """The magnitude of each float32 value of the main graph, by name; infinities (masks) aside.

    The reductions happen inside the graph: memory is that of one inference.

    Raises:
        CalibrationError: a sample does not fit, or the model fails on it.
    """
    specs = input_specs(model)
    optional = list(model.graph.initializers)
    watched, outputs = _watch(model)
    found: dict[str, Magnitude] = {}
    with OrtRunner(watched, optimize=False) as runner:
        for i, sample in enumerate(samples):
            progress(i, len(samples), "calibrating")
            check_feed(specs, sample, where=f"calibration sample {i}", optional=optional)
            where = f"calibration sample {i}"
            for name, array in run_on_sample(runner, sample, list(outputs), where, _FIX).items():
                peak, greatest = (float(x) for x in array)
                seen = Magnitude(peak, greatest)
                key = outputs[name]
                found[key] = found[key].union(seen) if key in found else seen
    progress(len(samples), len(samples), "calibrating")
    return found


def _watch(model: ir.Model) -> tuple[ir.Model, dict[str, str]]:
    """A copy with one more output a value, [peak, greatest], and of which value each is."""
    copy = model.clone()
    index_names(copy)
    graph = copy.graph
    values = [v for v in graph.inputs if v.dtype == ir.DataType.FLOAT]
    values += [
        v
        for node in graph
        for v in node.outputs
        if v.dtype == ir.DataType.FLOAT and v.name and constant_tensor(v) is None
    ]
    knows_infinity = opset_of(model) >= _IS_INF_SINCE
    zero = add_initializer(graph, "observe/zero", np.zeros(1, np.float32))
    flat = add_initializer(graph, "observe/flat", np.array([-1], np.int64))
    outputs = {}
    # The last value first: ONNX Runtime runs depth first from the last node without readers.
    for value in reversed(values):

        def make(
            op: str, *inputs: ir.Value, _base: str = value.name or "", **given: int
        ) -> ir.Value:
            attributes = ir.convenience.convert_attributes(given)
            node = ir.Node("", op, inputs, attributes, num_outputs=1)
            node.outputs[0].name = fresh_name(graph, f"{_base}/observe/{op}")
            graph.append(node)
            return node.outputs[0]

        finite = make("Concat", make("Reshape", value, flat), zero, axis=0)  # none is empty
        if knows_infinity:
            finite = make("Where", make("IsInf", finite), zero, finite)
        parts = [make("ReduceMax", x, keepdims=1) for x in (make("Abs", finite), finite)]
        result = make("Concat", *parts, axis=0)
        result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape([2])
        outputs[result.name or ""] = value.name or ""
        graph.outputs.append(result)
    return copy, outputs


def out_of_range(
    model: ir.Model, magnitudes: Mapping[str, Magnitude], dtype: ir.DataType
) -> dict[ir.Value, str]:
    """The values that must stay float32, and why: each reason has the range that was seen.

    A value does not fit whose peak, times a headroom, is past the greatest finite number; or
    whose peak is below the least normal one, where bits of the mantissa are lost; or which goes
    into a Softmax that turns its rounding into wrong probabilities. So does the result of a pooling
    or normalization whose running sums overflow on the way.
    """
    import ml_dtypes

    info = ml_dtypes.finfo(dtype.numpy())
    name, most, least = dtype.name.lower(), float(info.max), float(info.smallest_normal)
    found: dict[ir.Value, str] = {}
    for value in _float_values(model):
        seen = magnitudes.get(value.name or "")
        if seen is None:
            continue
        peak = seen.peak
        softmax = [u for u, _ in value.uses() if is_onnx_op(u, "Softmax", "LogSoftmax")]
        sums = _greatest_sum(value, magnitudes)
        if peak * HEADROOM > most:
            found[value] = (
                f"reaches {peak:.4g} on calibration data; {name} ends at {most:.6g}, and a margin "
                f"of {HEADROOM:g} is kept"
            )
        elif 0 < peak < least:
            found[value] = (
                f"reaches only {peak:.4g} on calibration data; below {least:.3g} {name} loses bits"
            )
        elif softmax and seen.greatest * float(info.eps) > _SOFTMAX_ROUNDING:
            found[value] = (
                f"reaches {seen.greatest:.4g} on calibration data, rounded to steps of "
                f"{seen.greatest * float(info.eps):.2g} in {name} before a Softmax"
            )
        elif sums > most:
            found[value] = (
                f"comes of sums up to {sums:.4g} on calibration data; {name} ends at {most:.6g}"
            )
    return found


def _float_values(model: ir.Model) -> list[ir.Value]:
    values = list(model.graph.inputs)
    values += [v for node in model.graph for v in node.outputs]
    return [v for v in values if v.dtype == ir.DataType.FLOAT]


def _greatest_sum(value: ir.Value, magnitudes: Mapping[str, Magnitude]) -> float:
    """What a kernel that accumulates in the 16-bit type adds up to on the way to a value."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return 0.0
    source = node.inputs[0]
    seen, before = magnitudes.get(value.name or ""), magnitudes.get(source.name or "")
    if seen is None or before is None:
        return 0.0
    if is_onnx_op(node, "AveragePool"):
        kernel: tuple[int, ...] = attribute(node, "kernel_shape", ())
        return seen.peak * math.prod(kernel)
    shape = static_shape(source)
    if is_onnx_op(node, "GlobalAveragePool") and shape is not None:
        return seen.peak * math.prod(shape[2:])
    if is_onnx_op(node, "LRN"):  # a sum of squares over channels
        return before.peak * before.peak * int(attribute(node, "size", 1))
    if is_onnx_op(node, "InstanceNormalization", "GroupNormalization"):
        return before.peak * before.peak
    if is_onnx_op(node, "LayerNormalization", "RMSNormalization"):
        wide = attribute(node, "stash_type", 1) == int(ir.DataType.FLOAT)
        return 0.0 if wide else before.peak * before.peak
    return 0.0


# --- without data ----------------------------------------------------------------------------


def statistics(model: ir.Model) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes that compute a norm's statistics, and their results.

    From what is squared for a reduction (a square overflows where its root is 256), through the
    elementwise nodes after it (an epsilon, a root), to where a full tensor is scaled with it.
    """
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    for node in model.graph:
        reduces = is_onnx_op(node, *_SUMS)
        if reduces:
            source = node.inputs[0] if node.inputs else None
            maker = None if source is None else source.producer()
            if maker is not None and _is_square(maker):
                nodes.add(maker)
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        computed = [v for v in floats if constant_tensor(v) is None]
        follows = bool(computed) and all(v in values for v in computed)
        if reduces or (follows and (facts(node).elementwise or facts(node).movement_only)):
            nodes.add(node)
            values.update(v for v in node.outputs if v.dtype == ir.DataType.FLOAT)
    return nodes, values


def _is_square(node: ir.Node) -> bool:
    return is_onnx_op(node, "Mul") and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
