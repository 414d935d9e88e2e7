"""Scales, zero points and rounding: arrays in, arrays out.

Here: the affine mapping of ONNX QuantizeLinear, q = saturate(round_half_even(x / scale) + zero
point), for activations from a range and for weights from their values. Not here: where ranges come
from (`calibrate`), graphs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...ir.quant import PerBlock, PerChannel, QuantSpec

MIN_SCALE = np.float32(1e-20)
"""Below it, a range counts as zero: products of two scales must stay normal float32 numbers."""

_PAIR_LIMIT = 126.0
"""255 times 128 is the most that 16 bits hold; each of two weights may be rounded up by one."""

_BIAS_LIMIT = float(2**30)
"""Half of int32: the other half is room for the sum of products the bias is added to."""


class Range(NamedTuple):
    """The least and greatest value seen; both finite."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """The smallest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclasses.dataclass(frozen=True)
class Affine:
    """float32 scales and integer zero points of equal shape; () per tensor."""

    scale: np.ndarray
    zero_point: np.ndarray

    def __post_init__(self) -> None:
        # numpy turns 0-d arrays into scalars at the first arithmetic; tensors are made of arrays
        object.__setattr__(self, "scale", np.asarray(self.scale))
        object.__setattr__(self, "zero_point", np.asarray(self.zero_point))


def integer_range(dtype: ir.DataType) -> tuple[int, int]:
    """The least and greatest value of an integer dtype."""
    bits = dtype.bitwidth
    if dtype.is_signed():
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def activation_affine(observed: Range, dtype: ir.DataType, symmetric: bool) -> Affine:
    """Per-tensor scale and zero point for a range.

    The range is widened to hold zero, which must be exact: padding and Relu make zeros. An
    all-zero range gets scale 1 and the zero point at the lower end, as after a Relu.
    """
    low, high = min(observed.low, 0.0), max(observed.high, 0.0)
    least, greatest = integer_range(dtype)
    if symmetric:
        half = (greatest - least) // 2
        scale = np.float32(max(-low, high) / half)
        middle = 0 if dtype.is_signed() else half + 1
        scale = scale if scale >= MIN_SCALE else np.float32(1.0)
        return Affine(np.asarray(scale), np.asarray(middle, dtype.numpy()))
    scale = np.float32((high - low) / (greatest - least))
    if scale < MIN_SCALE:
        return Affine(np.asarray(np.float32(1.0)), np.asarray(least, dtype.numpy()))
    zero_point = np.clip(np.rint(least - low / float(scale)), least, greatest)
    return Affine(np.asarray(scale), np.asarray(zero_point).astype(dtype.numpy()))


def weight_affine(array: np.ndarray, spec: QuantSpec, *, reduce_range: bool = False) -> Affine:
    """Symmetric scales of a weight, one per channel or block as the spec says.

    `reduce_range` widens them as far as it takes that x86 without VNNI can't saturate: it adds two
    neighbouring products of 8 bits in 16 (VPMADDUBSW), so two neighbours of one sign may not
    exceed 128 together, however they are rounded. All-zero channels get scale 1.
    """
    least, greatest = integer_range(spec.dtype)
    half = (greatest - least) // 2
    peak = _peak(array, spec) / half
    if reduce_range and spec.dtype.bitwidth == 8:
        peak = np.maximum(peak, _pair_peak(array, spec) / _PAIR_LIMIT)
    scale = peak.astype(np.float32)
    scale = np.where(scale >= MIN_SCALE, scale, np.float32(1.0)).astype(np.float32)
    middle = 0 if spec.dtype.is_signed() else (greatest + 1) // 2
    return Affine(scale, np.full(scale.shape, middle, spec.dtype.numpy()))


def raise_for_bias(affine: Affine, bias: np.ndarray, input_scale: float) -> Affine:
    """Widen weight scales where the bias, in units of input scale times weight scale, leaves int32.

    That happens to channels whose weights are almost zero. The bias must keep its value there; the
    weights lose precision they do not need.
    """
    need = np.abs(np.asarray(bias, np.float64)).reshape(-1) / (float(input_scale) * _BIAS_LIMIT)
    if affine.scale.shape == ():
        need = need.max(initial=0.0)
    scale = np.maximum(affine.scale.astype(np.float64), need).astype(np.float32)
    return Affine(scale, affine.zero_point)


def quantize(array: np.ndarray, affine: Affine, spec: QuantSpec) -> np.ndarray:
    """The integers of an array, in the spec's dtype (4-bit ones in an int8 or uint8 array)."""
    least, greatest = integer_range(spec.dtype)
    scale = spread(affine.scale, array.shape, spec)
    zero_point = spread(affine.zero_point.astype(np.int32), array.shape, spec)
    integers = np.rint(array.astype(np.float32) / scale)
    integers += zero_point
    np.clip(integers, least, greatest, out=integers)
    wide = spec.dtype.bitwidth >= 8
    dtype = spec.dtype.numpy() if wide else np.int8 if least < 0 else np.uint8
    stored: np.ndarray = integers.astype(dtype)
    return stored


def round_trip(array: np.ndarray, affine: Affine, spec: QuantSpec) -> np.ndarray:
    """What is left of an array after it has been stored: float32."""
    integers = quantize(array, affine, spec).astype(np.float32)
    integers -= spread(affine.zero_point.astype(np.float32), array.shape, spec)
    integers *= spread(affine.scale, array.shape, spec)
    return integers


def quantize_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int32 of a flattened bias for scales of shape () or (channels,)."""
    integers = np.rint(bias.reshape(-1).astype(np.float64) / scale.astype(np.float64))
    return np.clip(integers, -(2**31), 2**31 - 1).astype(np.int32)


def _peak(array: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Greatest magnitude per tensor, channel or block, float64."""
    match spec.granularity:
        case PerChannel(axis):
            others = tuple(i for i in range(array.ndim) if i != axis)
            low = array.min(axis=others, initial=0.0)
            high = array.max(axis=others, initial=0.0)
        case PerBlock(size, axis):
            starts = np.arange(0, array.shape[axis], size)
            low = np.minimum.reduceat(array, starts, axis=axis)
            high = np.maximum.reduceat(array, starts, axis=axis)
        case _:
            low, high = array.min(initial=0.0), array.max(initial=0.0)
    peak: np.ndarray = np.maximum(-np.asarray(low, np.float64), np.asarray(high, np.float64))
    return peak


def _pair_peak(array: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Greatest sum of two neighbours of one sign in the order in which kernels multiply them.

    Kernels go over a channel's elements as they lie in memory, or, where a runtime keeps the
    channels of convolutions last, over input channels first.
    """
    match spec.granularity:
        case PerBlock(_, axis):
            sums = [_pair_sums(side, axis) for side in (array, -array)]
            return _peak(np.maximum(*sums), spec)
        case PerChannel(axis):
            return _pair_peaks(array, axis)
        case _:  # which axis holds channels is not said
            axes = range(2) if array.ndim == 2 else range(1)
            return np.asarray(max(_pair_peaks(array, axis).max(initial=0.0) for axis in axes))


def _pair_peaks(array: np.ndarray, axis: int) -> np.ndarray:
    rows = np.moveaxis(array, axis, 0)
    orders = [rows] if rows.ndim < 3 else [rows, np.moveaxis(rows, 1, -1)]
    flat = [order.reshape(len(rows), -1) for order in orders]
    tops = [_pair_sums(side, 1).max(axis=1, initial=0.0) for f in flat for side in (f, -f)]
    peak: np.ndarray = np.max(tops, axis=0).astype(np.float64)
    return peak


def _pair_sums(array: np.ndarray, axis: int) -> np.ndarray:
    """Each positive element and the positive one behind it, added; the array's own shape."""
    sums = np.moveaxis(np.maximum(array, 0.0), axis, 0).copy()
    sums[:-1] += sums[1:].copy()
    return np.moveaxis(sums, 0, axis)


def spread(parameters: np.ndarray, shape: tuple[int, ...], spec: QuantSpec) -> np.ndarray:
    """Scales or zero points in a shape that broadcasts against the tensor."""
    match spec.granularity:
        case PerChannel(axis):
            return parameters.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        case PerBlock(size, axis):
            repeated: np.ndarray = np.repeat(parameters, size, axis=axis)
            cut = [slice(length) for length in shape]
            trimmed: np.ndarray = repeated[tuple(cut)]
            return trimmed
        case _:
            return parameters
