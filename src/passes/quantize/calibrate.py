"""Ranges of values over calibration samples, in memory that does not grow with the samples.

Here: `observe`, which runs a copy of the graph that gives least and greatest of each value, and
folds the samples one at a time. Not here: what to observe (`plan`), scales from ranges (`numbers`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import CalibrationError, EdgepassError, UsageError
from ...ir.graph import add_initializer, describe_node, fresh_name, index_names
from ...targets.feed import check_feed, input_specs
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from .numbers import Range


class Observer(enum.StrEnum):
    """How a range is made of the values seen."""

    MINMAX = "minmax"


def observe(
    model: ir.Model,
    values: Sequence[ir.Value],
    samples: Sequence[Feed] | None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Range]:
    """The range of each value (float32, of the main graph) over all samples, by name.

    The reductions happen inside the graph, so memory is that of one inference, as long as `values`
    are in graph order. Least and greatest
    are associative: the order of samples does not matter.

    Raises:
        UsageError: there is no calibration data.
        CalibrationError: it is empty, does not fit the inputs, or makes a value NaN or infinite.
    """
    if samples is None:
        raise UsageError(
            "Static int8 needs calibration data, and there is none",
            where="pass 'int8'",
            why="the scales of activations come from what the model does on real inputs",
            fix="give `calibration=`, some tens of samples, each a dict from input name to array; "
            "or use int8_dynamic or weight_only, which need none",
        )
    if len(samples) == 0:
        raise CalibrationError(
            "The calibration data is empty",
            where="pass 'int8'",
            fix="give at least one sample; some tens of them cover the usual range",
        )
    specs = input_specs(model)
    optional = list(model.graph.initializers)
    watched, outputs = _watch(model, [v.name or "" for v in values])
    ranges: dict[str, Range] = {}
    with OrtRunner(watched, optimize=False) as runner:
        for i, sample in enumerate(samples):
            progress(i, len(samples), "calibrating")
            where = f"calibration sample {i}"
            check_feed(specs, sample, where=where, optional=optional, finite=True)
            found = _run(runner, sample, list(outputs.values()), where)
            for value in values:
                name = value.name or ""
                low, high, finite = (float(x) for x in found[outputs[name]])
                if not np.isfinite((low, high, finite)).all():
                    raise _not_finite(value, i, low, high)
                seen = Range(low, high)
                ranges[name] = ranges[name].union(seen) if name in ranges else seen
    progress(len(samples), len(samples), "calibrating")
    return ranges


def _run(
    runner: OrtRunner, sample: Mapping[str, np.ndarray], outputs: list[str], where: str
) -> dict[str, np.ndarray]:
    try:
        return runner.run(sample, outputs)
    except EdgepassError as error:
        diagnostic = error.diagnostic
        raise CalibrationError(
            f"The model fails on a calibration sample: {diagnostic.what}",
            where=f"{where}; {diagnostic.where}".rstrip("; "),
            why=diagnostic.why,
            fix="drop the sample, or repair its shapes",
        ) from error


def _not_finite(value: ir.Value, sample: int, low: float, high: float) -> CalibrationError:
    maker = value.producer()
    infinite = np.isinf(low) or np.isinf(high)
    return CalibrationError(
        f"The tensor {value.name!r} is {'infinite' if infinite else 'NaN'} on a calibration sample",
        where=f"calibration sample {sample}"
        + (f", made by {describe_node(maker)}" if maker is not None else ""),
        why="no 8-bit range holds it",
        fix="drop the sample if its input is bad; else the float model overflows there already, or "
        "leave the node out with int8{exclude=[...]}",
    )


def _watch(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, dict[str, str]]:
    """A copy of the model with one more output a value: [least, greatest, 0 if all finite].

    Least and greatest alone would miss a NaN: how a kernel compares it is not defined. The sum of
    x * 0 is NaN as soon as one element is NaN or infinite.
    """
    copy = model.clone()
    index_names(copy)
    graph = copy.graph
    by_name = {v.name: v for v in graph.inputs}
    by_name.update((v.name, v) for node in graph for v in node.outputs)
    zero = add_initializer(graph, "observe/zero", np.zeros((), np.float32))
    flat = add_initializer(graph, "observe/flat", np.array([-1], np.int64))
    outputs = {}
    # ONNX Runtime 1.32 runs depth first from the last node without readers: the first value must
    # come last, or every value is computed before the first is reduced and let go. Measured on a
    # text detector, 163 values: 352 MB so, 1,190 MB in graph order, 338 MB without reductions.
    for name in reversed(names):
        value = by_name[name]

        def make(op: str, *inputs: ir.Value, _base: str = name, **attributes: int) -> ir.Value:
            node = ir.Node(
                "", op, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
            )
            node.outputs[0].name = fresh_name(graph, f"{_base}/observe/{op}")
            graph.append(node)
            return node.outputs[0]

        parts = [
            make("ReduceMin", value, keepdims=0),
            make("ReduceMax", value, keepdims=0),
            make("ReduceSum", make("Mul", value, zero), keepdims=0),
        ]
        result = make("Concat", *(make("Reshape", part, flat) for part in parts), axis=0)
        result.dtype = ir.DataType.FLOAT
        result.shape = ir.Shape([3])
        outputs[name] = result.name or ""
        graph.outputs.append(result)
    return copy, outputs
