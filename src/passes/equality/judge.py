"""When two results count as equal: tolerances by dtype, and the policy for NaN and infinity.

Here: `compare`, over the outputs of one run. Not here: what they were run on (`feeds`), running.

The policy. Integers, bools and text are equal or not. A float result may differ by `tolerance`
of its output's range, the range taken over the finite results of the original, or by 4 rounding
steps of its largest magnitude (sigmoid of tiny numbers has next to no range). Where the original
is finite the other must be finite too. Where it is not, the other should be so in kind (NaN,
+infinity, -infinity); where it is of another kind, that is recorded and is no difference: an
overflow or a NaN that moves is what reordered arithmetic does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

TOLERANCE = {"float64": 2e-7, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Allowed error by dtype, of the output's range: some 80 rounding steps in float32, 4 in the 16-bit
dtypes, whose kernels compute in float32 and round once more or less. That of float64 is float32's
rounding: attributes such as alpha and epsilon have no more digits."""

_STEPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

_COARSE = 0.13  # float8: one step of three bits of mantissa


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two lists of results differ.

    `error` is the worst over the outputs, of their range; infinite where shape, kind or an exact
    value differ. `allowed` is what was allowed at that output. `other_kind` counts elements that
    are not finite in the original and of another kind in the other; `lost` those that were finite
    and no longer are. `output` is the index of the worst one.
    """

    error: float = 0.0
    allowed: float = 0.0
    other_kind: int = 0
    lost: int = 0
    output: int = 0
    why: str = ""

    @property
    def acceptable(self) -> bool:
        """Whether the results are equal by the policy."""
        return self.error <= self.allowed and not self.why


def tolerance_of(dtype: np.dtype) -> float:
    """The allowed error of a dtype relative to the range; 0 for what must be exact."""
    if dtype.name in TOLERANCE:
        return TOLERANCE[dtype.name]
    return _COARSE if dtype.name.startswith("float") else 0.0


def compare(
    expected: Sequence[object],
    actual: Sequence[object],
    *,
    slack: Sequence[float] = (),
    tolerance: float | None = None,
) -> Difference:
    """The worst difference over the outputs.

    `slack` is added, as an absolute difference, to what each output may differ by; `tolerance`
    stands in for that of float32.
    """
    worst = Difference()
    kinds = lost = 0
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        extra = slack[index] if index < len(slack) else 0.0
        found = _compare_one(np.asarray(a), np.asarray(b), extra, tolerance)
        kinds, lost = kinds + found.other_kind, lost + found.lost
        if (found.acceptable, -found.error) < (worst.acceptable, -worst.error):
            worst = dataclasses.replace(found, output=index)
    return dataclasses.replace(worst, other_kind=kinds, lost=lost)


def _compare_one(a: np.ndarray, b: np.ndarray, slack: float, tolerance: float | None) -> Difference:
    if a.shape != b.shape:
        return _wrong(f"its shape is {list(b.shape)}, not {list(a.shape)}")
    if a.dtype != b.dtype:
        return _wrong(f"its dtype is {b.dtype}, not {a.dtype}")
    if a.size == 0:
        return Difference()
    allowed = tolerance_of(a.dtype)
    if allowed == 0.0:
        return _compare_exact(a, b, slack)
    if tolerance is not None:
        allowed = tolerance if a.dtype.name == "float32" else max(allowed, tolerance)
    tiny = float(_smallest(a.dtype))
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
        finite = np.isfinite(x)
        if finite.all():
            kinds = 0
        else:
            kinds = int(np.sum(~_same_kind(x[~finite], y[~finite])))
            x, y = x[finite], y[finite]
        if x.size == 0:
            return Difference(0.0, allowed, kinds)
        lost = int(np.sum(~np.isfinite(y)))
        if lost:
            why = f"{lost} finite elements are NaN or infinite"
            return Difference(float("inf"), allowed, kinds, lost, why=why)
        scale = float(x.max() - x.min()) or float(np.abs(x).max()) or 1.0
        error = float(np.abs(x - y).max())
    step = _STEPS.get(a.dtype.name, 0.0) * float(np.abs(x).max())
    if error <= max(slack, 4 * step) + 16 * tiny:
        return Difference(0.0, allowed, kinds)
    return Difference(error / scale, allowed, kinds)


def _compare_exact(a: np.ndarray, b: np.ndarray, slack: float) -> Difference:
    different = a != b
    if not np.any(different):
        return Difference()
    if slack and a.dtype.kind in "iu":
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        if gap <= slack:
            return Difference()
    count = int(np.sum(different))
    return _wrong(f"{count} of {a.size} elements differ, where {a.dtype} must be exact")


def _same_kind(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    same: np.ndarray = (np.isnan(a) & np.isnan(b)) | (a == b)
    return same


def _smallest(dtype: np.dtype) -> float:
    """The distance between neighbours at zero."""
    if dtype.name in ("float16", "float32", "float64"):
        return float(np.finfo(dtype).smallest_subnormal)
    return 1e-40 if dtype.name == "bfloat16" else 0.0


def _wrong(why: str) -> Difference:
    return Difference(float("inf"), 0.0, why=why)
