"""How a range is made of the values seen, in memory that does not grow with the samples.

Here: `Observer` and its options, and one accumulator for each way. Not here: running the model
(`calibrate`), histograms (`histogram`), where they are cut (`clipping`).
"""

from __future__ import annotations

import dataclasses
import enum
from fractions import Fraction
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...errors import PassOptionError
from .clipping import entropy_range, mse_range, percentile_range
from .histogram import Histogram
from .numbers import Range


class Observer(enum.StrEnum):
    """How a range is made of the values seen.

    `minmax`: least and greatest. `average`: the mean over samples of each sample's least and
    greatest. `percentile`: holds a share of the values. `entropy`: the least divergence (KL) of the
    quantized distribution. `mse`: the least squared error of the quantized values.
    """

    MINMAX = "minmax"
    AVERAGE = "average"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"

    @property
    def needs_values(self) -> bool:
        """Whether least and greatest of each sample are not enough."""
        return self not in (Observer.MINMAX, Observer.AVERAGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObserverOptions:
    """An observer with its options, and the integers that a range is for.

    `percentile`: the share of the values that are not zero, in per cent, that such a range holds.
    `dtype` and `symmetric` are of the activations' scheme: entropy and mse depend on them.

    Raises:
        PassOptionError: an unknown observer, or a percentile outside of 50 to 100.
    """

    observer: str = Observer.MINMAX.value
    percentile: float = 99.99
    dtype: ir.DataType = ir.DataType.UINT8
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_observer(self.observer, self.percentile)

    def accumulator(self) -> Accumulator:
        """A new one, for one tensor."""
        match Observer(self.observer):
            case Observer.MINMAX:
                return MinMax()
            case Observer.AVERAGE:
                return Average()
        return Counted(self)


AUTO = "auto"
"""Not an observer: `minmax`, or `mse` where that brings the outputs nearer to float's."""


def check_observer(observer: str, percentile: float, pass_name: str = "int8") -> None:
    """Raise PassOptionError unless both are what they may be."""
    if observer not in (AUTO, *Observer):
        raise PassOptionError(
            f"There is no observer {observer!r}",
            where=f"pass {pass_name!r}, option 'observer'",
            fix=f"one of {AUTO}, {', '.join(Observer)}",
        )
    if not 50.0 <= percentile <= 100.0:
        raise PassOptionError(
            f"A percentile of {percentile} can't be a range",
            where=f"pass {pass_name!r}, option 'percentile'",
            why="it is the share of the values, in per cent, that the range holds",
            fix="50 to 100, such as 99.99",
        )


class Accumulator(Protocol):
    """Takes one sample after the other. `values` is None where the observer needs none."""

    def add(self, seen: Range, values: np.ndarray | None) -> None:
        """Fold in one sample: its least and greatest value, and all of them."""

    def range(self) -> Range:
        """The range of what was added; only after at least one sample."""


class MinMax:
    """Least and greatest over all samples."""

    def __init__(self) -> None:
        self._range: Range | None = None

    def add(self, seen: Range, values: np.ndarray | None) -> None:
        self._range = seen if self._range is None else self._range.union(seen)

    def range(self) -> Range:
        assert self._range is not None
        return self._range


class Average:
    """The mean of the samples' ranges.

    What frameworks call a moving average weighs late samples more, and so depends on their order.
    The plain mean does not, and the sums are exact (rational numbers), so that neither does its
    rounding.
    """

    def __init__(self) -> None:
        self._low, self._high, self._count = Fraction(0), Fraction(0), 0

    def add(self, seen: Range, values: np.ndarray | None) -> None:
        self._low += Fraction(seen.low)
        self._high += Fraction(seen.high)
        self._count += 1

    def range(self) -> Range:
        return Range(float(self._low / self._count), float(self._high / self._count))


class Counted:
    """A histogram of all values, cut by the observer."""

    def __init__(self, options: ObserverOptions) -> None:
        self.histogram = Histogram()
        self._options = options

    def add(self, seen: Range, values: np.ndarray | None) -> None:
        assert values is not None
        self.histogram.add(values)

    def range(self) -> Range:
        options = self._options
        match Observer(options.observer):
            case Observer.PERCENTILE:
                return percentile_range(self.histogram, options.percentile, options.symmetric)
            case Observer.MSE:
                return mse_range(self.histogram, options.dtype, options.symmetric)
        return entropy_range(self.histogram, options.dtype, options.symmetric)
