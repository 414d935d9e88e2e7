"""The ONNX backend suite as plain data, and ONNX Runtime's own answer to each case.

Here: loading the cases that the onnx wheel carries, running one unoptimized in ONNX Runtime without
any of edgepass's code, and the suite's comparison. Not here: what edgepass makes of them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with its data sets: pairs of inputs and expected outputs, in graph order.

    A value is an array, a list (a sequence) or None (an optional that is empty).
    """

    name: str
    load: Any
    rtol: float
    atol: float

    def model(self) -> onnx.ModelProto:
        return self.load()[0]

    def data_sets(self) -> list[tuple[list[Any], list[Any]]]:
        return self.load()[1]


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the installed wheel, by name; the node cases are computed by it, in ~10 s."""
    return tuple(sorted((c for kind in KINDS for c in _cases(kind)), key=lambda c: c.name))


def _cases(kind: str) -> list[Case]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        tests = load_model_tests(kind="real" if kind == "light" else kind)
    loaders = {"node": _in_memory, "light": _light}
    load = loaders.get(kind, _on_disk)
    return [
        Case(f"{kind}/{t.name}", functools.partial(load, t), t.rtol, t.atol)
        for t in tests
        if kind != "light" or t.url.startswith("onnx/backend/test/data/light/")
    ]


def _in_memory(test: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    sets = [([_value(v) for v in i], [_value(v) for v in o]) for i, o in test.data_sets]
    return test.model, sets


def _on_disk(test: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        inputs = _stored(data, "input", model.graph.input)
        sets.append((inputs, _stored(data, "output", model.graph.output)))
    return model, sets


def _light(test: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    """A classic network with constant weights, on the suite's ramp input; its output is stored."""
    path = Path(onnx.__file__).parent.parent / test.url
    model = onnx.load(path)
    initializers = {i.name for i in model.graph.initializer}
    inputs = []
    for info in model.graph.input:
        if info.name not in initializers:
            shape = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
            total = int(np.prod(shape))
            inputs.append((np.arange(total).reshape(shape) / total).astype(np.float32))
    stored = path.with_name(f"{path.stem}_output_0.pb")
    return model, [(inputs, [numpy_helper.to_array(onnx.load_tensor(stored))])]


def _stored(folder: Path, kind: str, infos: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    files = sorted(folder.glob(f"{kind}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
    values = []
    for file, info in zip(files, infos, strict=False):
        content = file.read_bytes()
        which = info.type.WhichOneof("value")
        if which == "sequence_type":
            values.append(_value(onnx.SequenceProto.FromString(content)))
        elif which == "optional_type":
            values.append(_value(onnx.OptionalProto.FromString(content)))
        else:
            values.append(_value(TensorProto.FromString(content)))
    return values


def _value(item: Any) -> Any:
    if isinstance(item, TensorProto):
        return numpy_helper.to_array(item)
    if isinstance(item, onnx.SequenceProto):
        return numpy_helper.to_list(item)
    if isinstance(item, onnx.OptionalProto):
        return numpy_helper.to_optional(item)
    if isinstance(item, list | tuple):
        return [_value(x) for x in item]
    return item if item is None else np.asarray(item)


# --- the reference ---------------------------------------------------------------------------


def reference_outputs(model: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any]:
    """ONNX Runtime's outputs with its graph optimizations off; raises what it raises."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = feed_of(model, inputs)
    exotic = {i.name: _exotic(i.type.tensor_type.elem_type) for i in model.graph.input}
    if not any(exotic.values()) and not any(
        _exotic(o.type.tensor_type.elem_type) for o in model.graph.output
    ):
        return list(session.run(None, feed))
    values = {
        name: _packed(np.asarray(v), exotic[name])
        if exotic[name]
        else ort.OrtValue.ortvalue_from_numpy(v)
        for name, v in feed.items()
    }
    names = [o.name for o in session.get_outputs()]
    return [_unpacked(v) for v in session.run_with_ort_values(names, values)]


def feed_of(model: onnx.ModelProto, inputs: Sequence[Any]) -> dict[str, Any]:
    """The inputs by name; those that are initializers too are not among them."""
    initializers = {i.name for i in model.graph.initializer}
    names = [i.name for i in model.graph.input]
    if len(names) != len(inputs):
        names = [name for name in names if name not in initializers]
    return dict(zip(names, inputs, strict=True))


_EXOTIC = {
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
    TensorProto.INT2: ml_dtypes.int2,
    TensorProto.UINT2: ml_dtypes.uint2,
    TensorProto.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
}


def _exotic(elem_type: int) -> int:
    return elem_type if elem_type in _EXOTIC else 0


def _packed(array: np.ndarray, elem_type: int) -> Any:
    """An OrtValue of a type that numpy lacks, its memory filled as ONNX's `raw_data` has it."""
    import onnxruntime as ort

    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), elem_type)
    raw = numpy_helper.from_array(array).raw_data
    ctypes.memmove(value.data_ptr(), raw, len(raw))
    return value


def _unpacked(value: Any) -> Any:
    if not value.is_tensor() or not _exotic(value.element_type()):
        return value.numpy()
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    tensor = TensorProto(data_type=value.element_type(), dims=value.shape(), raw_data=raw)
    return numpy_helper.to_array(tensor)


# --- the suite's comparison ------------------------------------------------------------------


def difference(expected: Any, actual: Any, rtol: float, atol: float) -> str:
    """How an output differs from the expected one by the suite's rules, or ''."""
    if expected is None or actual is None:
        return "" if expected is actual else f"expected {expected!r}, got {actual!r}"
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return f"expected a sequence of {len(expected)}, got {actual!r}"
        found = (difference(e, a, rtol, atol) for e, a in zip(expected, actual, strict=True))
        return next((text for text in found if text), "")
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape:
        return f"expected shape {expected.shape}, got {actual.shape}"
    if expected.dtype.kind in "OSU":
        return "" if np.array_equal(expected, actual.astype(object)) else "the strings differ"
    if expected.dtype != actual.dtype:
        return f"expected dtype {expected.dtype}, got {actual.dtype}"
    if expected.dtype == ml_dtypes.bfloat16:
        rtol = max(rtol, 2**-6)  # as the suite itself does: two units in the last place
    if expected.dtype.kind not in "biufc":
        expected, actual = expected.astype(np.float32), actual.astype(np.float32)
    close = np.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if np.all(close):
        return ""
    worst = np.unravel_index(int(np.argmin(close)), close.shape) if close.ndim else ()
    return f"{int(np.sum(~close))} of {close.size} differ: {actual[worst]} for {expected[worst]}"


def differences(case: Case, expected: Sequence[Any], actual: Sequence[Any]) -> str:
    """The first difference over all outputs, or ''."""
    if len(expected) != len(actual):
        return f"expected {len(expected)} outputs, got {len(actual)}"
    pairs = zip(expected, actual, strict=True)
    found = (difference(e, a, case.rtol, case.atol) for e, a in pairs)
    return next((text for text in found if text), "")
