"""Running a model on sample inputs to see what a pass did to its numbers.

Here: making inputs for any model, running it unoptimized, and the error between two results. Used
by the driver, `bisect` and the golden sample. Not here: accuracy on real data (`evaluate`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import CalibrationError, EdgepassError
from ..ir.graph import constant_scalar, is_onnx_op, static_shape
from ..ir.sizing import dim_name
from .base import Feed

_BATCH_NAMES = ("batch", "n", "b", "bs")


def sample_inputs(
    model: ir.Model, *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Random inputs that fit the model's signature; the same for the same seed.

    Floats are standard normal. Integers lie within the table they index, where one is found; a
    scalar that the model compares with a constant is that constant; others are 0 or 1. Strings
    are 'a'. A symbolic dimension takes its value from `dims`, else 1 for a batch (by name
    or position) and 32 otherwise; the same name gets the same value everywhere. A dimension
    without a name is called `<input>_d<axis>`.
    """
    return _inputs_of_size(model, seed, dict(dims or {}), _SIZES[0])


@dataclasses.dataclass(frozen=True)
class Sample:
    """Inputs by name, the sizes of symbolic dimensions in them, and whether they can be run.

    `runs` is False for random inputs that the model itself refuses.
    """

    feed: Mapping[str, np.ndarray]
    dims: Mapping[str, int]
    runs: bool = True


def working_sample(model: ir.Model, dims: Mapping[str, int] | None = None) -> Sample:
    """Inputs that the model really runs on, if any of a few sizes does.

    Many models refuse a size (a padding wider than the signal, a stride that does not divide):
    those of `trial_dims` are tried.
    """
    from ..targets.onnxruntime import OrtRunner

    first = None
    try:
        runner = OrtRunner(model, optimize=False, threads=1)
    except EdgepassError:
        return Sample(sample_inputs(model, dims=dims), default_dims(model, dims), runs=False)
    with runner:
        for bindings in trial_dims(model, dims):
            feed = sample_inputs(model, dims=bindings)
            first = first or Sample(feed, bindings, runs=False)
            try:
                runner.run(feed)
            except EdgepassError:
                continue
            return Sample(feed, bindings)
    assert first is not None
    return first


def trial_dims(model: ir.Model, dims: Mapping[str, int] | None = None) -> Iterator[dict[str, int]]:
    """Sizes for the symbolic dimensions of the inputs, to be tried until the model runs.

    32, 64, 224 and 512 for those that `dims` does not give; then the same with 1 for every
    dimension that is not its input's last (a batch in the middle of a recurrent state).
    """
    given = dict(dims or {})
    free = [name for name in default_dims(model, given) if name not in given]
    last = {
        dim_name(value, len(value.shape) - 1)
        for value in model.graph.inputs
        if value.shape is not None and len(value.shape)
    }
    thin = {name: 1 for name in free if name not in last}
    seen = []
    for bound in (given, {**given, **thin}):
        for size in _SIZES:
            bindings = dict(bound)
            for _ in _bound_inputs(model, bindings, size):
                pass
            if bindings not in seen:
                seen.append(bindings)
                yield bindings


def default_dims(model: ir.Model, dims: Mapping[str, int] | None = None) -> dict[str, int]:
    """A size for every symbolic dimension of the inputs, by the rules of `sample_inputs`."""
    bindings = dict(dims or {})
    for _ in _bound_inputs(model, bindings, _SIZES[0]):
        pass
    return bindings


_SIZES = (32, 64, 224, 512)


def _inputs_of_size(
    model: ir.Model, seed: int, bindings: dict[str, int], size: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    feed = {}
    for value, shape in _bound_inputs(model, bindings, size):
        assert value.name is not None
        feed[value.name] = _random(value, shape, generator)
    return feed


def _bound_inputs(
    model: ir.Model, bindings: dict[str, int], size: int
) -> Iterator[tuple[ir.Value, list[int]]]:
    for value in model.graph.inputs:
        if value.is_initializer() or value.name is None:
            continue
        shape = []
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if isinstance(dim, int):
                shape.append(dim)
            else:
                name = dim_name(value, axis)
                # torch's exporter calls every dimension s<number>; position tells then
                batch = axis == 0 or name.lower().split("_")[0] in _BATCH_NAMES
                shape.append(bindings.setdefault(name, 1 if batch else size))
        yield value, shape


def _random(value: ir.Value, shape: list[int], generator: np.random.Generator) -> np.ndarray:
    dtype = value.dtype or ir.DataType.FLOAT
    if dtype == ir.DataType.STRING:
        return np.full(shape, "a", dtype=object)
    if dtype == ir.DataType.BOOL:
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.is_integer():
        compared = _compared_with(value) if not shape else None
        if compared is not None:
            return np.array(compared, dtype.numpy())
        high = min(_index_limit(value), 127)
        return generator.integers(0, high, shape).astype(dtype.numpy())
    return generator.standard_normal(shape).astype(dtype.numpy())


def _index_limit(value: ir.Value) -> int:
    """How large an integer input may be: the least of the tables it is an index into."""
    limits = []
    for user, index in value.uses():
        if is_onnx_op(user, "Gather") and index == 1:
            shape = static_shape(user.inputs[0])
            axis = user.attributes["axis"].as_int() if "axis" in user.attributes else 0
            if shape:
                limits.append(shape[axis])
        elif is_onnx_op(user, "Cast", "Identity") and user.outputs:
            limits.append(_index_limit(user.outputs[0]))
    return max(1, min(limits, default=2))


def _compared_with(value: ir.Value) -> int | None:
    """A constant that the model compares a scalar input with (a sample rate, a mode)."""
    for user, index in value.uses():
        if is_onnx_op(user, "Equal"):
            constant = constant_scalar(user.inputs[1 - index])
            if constant is not None:
                return int(constant)
        elif is_onnx_op(user, "Cast", "Identity", "Reshape", "Unsqueeze") and user.outputs:
            found = _compared_with(user.outputs[0])
            if found is not None:
                return found
    return None


@dataclasses.dataclass(frozen=True)
class NumericError:
    """How far results are from a reference.

    `relative` is the largest absolute difference divided by the reference output's range (its
    largest magnitude where the range is 0), over the worst output; `output` names it.
    `sqnr_db` is 10 log10 of signal power over error power over all outputs, infinite when equal.
    """

    relative: float
    sqnr_db: float
    output: str = ""

    def __str__(self) -> str:
        if self.relative == 0:
            return "0"
        return f"{self.relative:.1e} ({self.sqnr_db:.0f} dB)"


def numeric_error(
    reference: Mapping[str, np.ndarray], result: Mapping[str, np.ndarray]
) -> NumericError:
    """Compare two results by output name. NaN or infinity in other places than the reference's,
    another shape, or other text, is an infinite error."""
    worst, where, signal, noise = 0.0, "", 0.0, 0.0
    for name, expected in reference.items():
        actual = result[name]
        error, s, n = _array_error(np.asarray(expected), np.asarray(actual))
        signal, noise = signal + s, noise + n
        if error > worst:
            worst, where = error, name
    ratio = float("inf") if noise == 0 else -float("inf") if signal == 0 else signal / noise
    sqnr = float(10 * np.log10(ratio)) if 0 < ratio < float("inf") else ratio
    return NumericError(worst, sqnr, where)


def _array_error(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float, float]:
    if expected.dtype.kind in "OSU" or expected.shape != actual.shape:
        equal = expected.shape == actual.shape and bool(np.all(expected == actual))
        return (0.0 if equal else float("inf")), 0.0, (0.0 if equal else float("inf"))
    if expected.size == 0:
        return 0.0, 0.0, 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not np.array_equal(
        a[~np.isfinite(a)], b[~np.isfinite(a)], equal_nan=True
    ):
        return float("inf"), 0.0, float("inf")
    finite = np.isfinite(a)
    a, b = a[finite], b[finite]
    if a.size == 0:
        return 0.0, 0.0, 0.0
    difference = np.abs(a - b)
    span = float(a.max() - a.min()) or float(np.abs(a).max()) or 1.0
    return float(difference.max()) / span, float(np.sum(a * a)), float(np.sum(difference**2))


class Probe:
    """Runs models on one fixed feed, without the runtime's own optimizations."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def run(self, model: ir.Model) -> dict[str, np.ndarray]:
        """All outputs of the model by name.

        Raises:
            LoweringError: the runtime refuses the model or fails on the feed.
        """
        from ..targets.onnxruntime import OrtRunner

        return OrtRunner(model, optimize=False, threads=1).run(self.feed)


def run_on_sample(
    runner: Any,
    sample: Feed,
    outputs: Sequence[str] | None,
    where: str,
    fix: str = "drop the sample, or repair its shapes",
) -> dict[str, np.ndarray]:
    """Run an `OrtRunner` on one sample of the user's data, of which `where` says which.

    Raises:
        CalibrationError: the model fails on it.
    """
    try:
        found: dict[str, np.ndarray] = runner.run(sample, outputs)
        return found
    except EdgepassError as error:
        diagnostic = error.diagnostic
        raise CalibrationError(
            f"The model fails on a {where.rstrip(' 0123456789')}: {diagnostic.what}",
            where=f"{where}; {diagnostic.where}".rstrip("; "),
            why=diagnostic.why,
            fix=fix,
        ) from error
