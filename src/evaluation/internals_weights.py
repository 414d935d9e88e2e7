"""Weights of a candidate against the original's: range, rounding error, dead and piled-up channels.

Here: `compare_weights` on arrays, `WeightDrift`, and finding the arrays of a layer. Folding (batch
norms) and equalization scale weights by channel: gains are taken out before errors are measured,
and whether a gain is right shows in the layer's results (`internals_causes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.graph import constant_array, is_onnx_op
from ..ir.ops import facts, weight_channel_axis
from ..ir.quant import is_dequantize
from ..targets.onnxruntime import OrtRunner
from .drift import by_channel, decibels
from .internals_graph import Side, weight_inputs

_NBITS = "MatMulNBits"
_PILED = 3
"""Elements at a channel's greatest integer from which it may be saturated."""


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight tensor as it is used: floats, the axis of its output channels, and behind a
    DequantizeLinear its integers (zero point taken off) and their bits. `scaled` is False for
    integers whose scale is elsewhere in the graph."""

    name: str
    array: np.ndarray
    axis: int | None
    bits: int = 32
    integers: np.ndarray | None = None
    granularity: str = ""
    scaled: bool = True


@dataclasses.dataclass(frozen=True)
class WeightDrift:
    """One weight of a layer against the original's.

    `low`, `high` and `candidate_low`, `candidate_high`: ranges. `sqnr` and `ideal_sqnr` in dB, of
    the weight up to a gain by channel, and of rounding to the same bits and granularity with scales
    that just span it. `end_share`: of elements at their channel's greatest integer; `usage`: the
    greatest integer over the greatest there is, median of channels. `clipping`: how many times the
    original's peak exceeds what is left of it, median of channels. `channel_spread`: the greatest
    channel's peak over the median's. `gain`: median over channels, None where the scale is not
    known. `dead`, `saturated`: channels. `rescaled`: input channels are scaled too.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    granularity: str
    low: float
    high: float
    candidate_low: float
    candidate_high: float
    sqnr: float
    ideal_sqnr: float
    channel_ideal_sqnr: float
    end_share: float
    usage: float
    clipping: float
    channels: int
    channel_spread: float
    gain: float | None
    dead: tuple[int, ...]
    saturated: tuple[int, ...]
    rescaled: bool
    histogram: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def loss(self) -> float:
        """dB below the ideal."""
        if math.isinf(self.ideal_sqnr) or math.isnan(self.sqnr):
            return 0.0
        return self.ideal_sqnr - min(self.sqnr, 200.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = dataclasses.asdict(self)
        edges, ours, theirs = data.pop("histogram")
        data["histogram"] = {"edges": edges, "original": ours, "candidate": theirs}
        return data


def compare_weights(original: Weight, candidate: Weight) -> WeightDrift:
    """The measures of one pair of equal shape."""
    axis = original.axis if original.axis is not None else candidate.axis
    ours, theirs = by_channel(original.array, axis), by_channel(candidate.array, axis)
    ints = None if candidate.integers is None else by_channel(candidate.integers, axis)
    gains = _gains(ours, theirs, ints)
    scaled = ours * gains[:, None]
    rescaled = False
    error = theirs - scaled
    if _ratio(scaled, error) < 15 and original.array.ndim >= 2 and axis is not None:
        again = _rank_one(original.array, candidate.array, axis)
        if _ratio(again, theirs - again) > _ratio(scaled, error) + 6:
            scaled, error, rescaled = again, theirs - again, True
    half = max(2 ** (candidate.bits - 1) - 1, 1)
    peaks = np.abs(scaled).max(axis=1, initial=0.0)
    per_channel = peaks[:, None] / half
    steps = per_channel if candidate.granularity != "tensor" else np.full_like(per_channel, 0)
    if candidate.granularity == "tensor":
        steps += peaks.max(initial=0.0) / half
    signal = float(np.sum(scaled * scaled))
    noise, least = (float(np.sum(s * s / 12)) * scaled.shape[1] for s in (steps, per_channel))
    floats = candidate.integers is None
    row_loss = np.array(
        [
            decibels(float(a @ a), float(s * s / 12 * a.size))
            - decibels(float(a @ a), float(e @ e))
            for a, e, s in zip(scaled, error, steps[:, 0], strict=True)
        ]
    )
    norms, own = np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1)
    dead = (norms <= 1e-3 * np.median(norms)) & (own > 0.05 * np.median(own)) & (own > 0)
    piled, share, usage = _piles(ints, half)
    saturated = piled & (row_loss > 8) & ~dead
    median_peak = float(np.median(peaks)) or 1.0
    return WeightDrift(
        name=original.name,
        shape=tuple(original.array.shape),
        bits=candidate.bits,
        granularity=candidate.granularity,
        low=float(ours.min(initial=0.0)),
        high=float(ours.max(initial=0.0)),
        candidate_low=float(theirs.min(initial=0.0)),
        candidate_high=float(theirs.max(initial=0.0)),
        sqnr=decibels(signal, float(np.sum(error * error))),
        ideal_sqnr=math.inf if floats else decibels(signal, noise),
        channel_ideal_sqnr=math.inf if floats else decibels(signal, least),
        end_share=share,
        usage=usage,
        clipping=_clipping(peaks, theirs),
        channels=len(ours),
        channel_spread=float(peaks.max(initial=0.0)) / median_peak,
        gain=float(np.median(gains)) if candidate.scaled else None,
        dead=tuple(int(i) for i in np.flatnonzero(dead)),
        saturated=tuple(int(i) for i in np.flatnonzero(saturated)),
        rescaled=rescaled,
        histogram=_histogram(ours, theirs),
    )


def _clipping(peaks: np.ndarray, theirs: np.ndarray) -> float:
    left = np.abs(theirs).max(axis=1, initial=0.0)
    alive = left > 0
    return float(np.median(peaks[alive] / left[alive])) if alive.any() else 1.0


def _ratio(signal: np.ndarray, error: np.ndarray) -> float:
    return decibels(float(np.sum(signal * signal)), float(np.sum(error * error)))


def _gains(ours: np.ndarray, theirs: np.ndarray, ints: np.ndarray | None) -> np.ndarray:
    """The gain of each channel: the median ratio of its larger elements, so that clipping does not
    draw it."""
    gains = np.ones(len(ours))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        large = np.abs(a) > 0.2 * np.abs(a).max(initial=0.0)
        if ints is not None:
            free = large & (np.abs(ints[i]) < np.abs(ints[i]).max(initial=0.0))
            large = free if free.sum() >= 3 else large
        if large.any():
            gains[i] = float(np.median(b[large] / a[large]))
    return gains


def _rank_one(ours: np.ndarray, theirs: np.ndarray, axis: int) -> np.ndarray:
    """`ours` with a gain by output and one by input channel, fitted to `theirs`; by output channel.

    Equalization (Nagel et al. 2019, arXiv:1906.04721) and SmoothQuant (Xiao et al. 2022,
    arXiv:2211.10438) scale weights so.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    other = next(i for i in range(a.ndim) if i != axis % a.ndim)
    for _ in range(3):
        for side in (other, axis):
            rows, wanted = by_channel(a, side), by_channel(b, side)
            power = np.sum(rows * rows, axis=1)
            fit = np.where(power > 0, np.sum(rows * wanted, axis=1) / np.maximum(power, 1e-300), 1)
            a = a * fit.reshape([-1 if i == side % a.ndim else 1 for i in range(a.ndim)])
    return by_channel(a, axis)


def _piles(ints: np.ndarray | None, half: int) -> tuple[np.ndarray, float, float]:
    """Which channels have many elements at their greatest integer, the share of all such elements,
    and how much of the integers' range the median channel uses."""
    if ints is None or not ints.size:
        return np.zeros(1 if ints is None else len(ints), bool), 0.0, 1.0
    size = np.abs(ints)
    top = size.max(axis=1, keepdims=True)
    at_top = (size == top) & (top > 0)
    counts = at_top.sum(axis=1)
    piled = (counts >= _PILED) & (counts > 0.08 * ints.shape[1])
    used = top[top > 0]
    usage = float(np.median(used)) / half if used.size else 1.0
    return piled, float(at_top.mean()), min(usage, 1.0)


def _histogram(
    ours: np.ndarray, theirs: np.ndarray
) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    both = (float(min(ours.min(), theirs.min())), float(max(ours.max(), theirs.max())))
    if not np.isfinite(both).all():
        both = (float(ours.min()), float(ours.max()))
    edges = np.linspace(both[0], both[1] if both[1] > both[0] else both[0] + 1, 65)
    counts = [np.histogram(a[np.isfinite(a)], edges)[0] for a in (ours, theirs)]
    return (
        tuple(float(e) for e in edges),
        tuple(int(c) for c in counts[0]),
        tuple(int(c) for c in counts[1]),
    )


# --- finding them ----------------------------------------------------------------------------


def collect(
    side: Side, nodes: Iterable[ir.Node], feed: Mapping[str, np.ndarray]
) -> dict[ir.Node, list[Weight]]:
    """The weights of two or more axes that each node reads, as they are used."""
    wanted = {node: weight_inputs(node, side.computed) for node in nodes}
    names = {v.name or "" for values in wanted.values() for v in values if _rank(v) >= 2}
    arrays = side.constants(sorted(names), feed)
    found: dict[ir.Node, list[Weight]] = {}
    for node, values in wanted.items():
        if node.op_type == _NBITS:
            weight = _nbits_weight(node)
            found[node] = [weight] if weight is not None else []
            continue
        found[node] = [
            _weight(node, index, value, arrays[value.name])
            for index, value in enumerate(node.inputs)
            if value in values and value is not None and value.name in arrays
        ]
    return found


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _weight(node: ir.Node, index: int, value: ir.Value, array: np.ndarray) -> Weight:
    axis = _channel_axis(node, index, array.ndim)
    if array.dtype.kind in "iu":
        zero = _zero_point(node)
        integers = array.astype(np.int64) - (0 if zero is None else zero)
        return Weight(
            value.name or "", integers.astype(np.float64), axis, 8, integers, "channel", False
        )
    source: ir.Value | None = value
    while source is not None and (maker := source.producer()) is not None:
        if is_dequantize(maker):
            return _dequantized(value.name or "", array, axis, maker)
        if not (facts(maker).movement_only or is_onnx_op(maker, "Cast", "Identity")):
            break
        source = maker.inputs[0]
    bits = array.dtype.itemsize * 8
    return Weight(value.name or "", np.asarray(array, np.float64), axis, bits)


def _dequantized(name: str, array: np.ndarray, axis: int | None, maker: ir.Node) -> Weight:
    stored, scale = maker.inputs[0], constant_array(maker.inputs[1])
    bits = stored.dtype.bitwidth if stored is not None and stored.dtype is not None else 8
    wide = np.asarray(array, np.float64)
    if scale is None:
        return Weight(name, wide, axis, bits)
    granularity = "block" if "block_size" in maker.attributes else "channel"
    if np.size(scale) == 1:
        granularity = "tensor"
    integers = None
    if granularity == "tensor":
        integers = np.rint(wide / float(np.reshape(scale, ())))
    elif granularity == "channel" and axis is not None and np.size(scale) == wide.shape[axis]:
        shape = [-1 if i == axis % wide.ndim else 1 for i in range(wide.ndim)]
        integers = np.rint(wide / np.reshape(np.asarray(scale, np.float64), shape))
    return Weight(name, wide, axis, bits, integers, granularity)


def _channel_axis(node: ir.Node, index: int, rank: int) -> int | None:
    if node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return rank - 1
    if node.op_type in ("ConvInteger", "QLinearConv"):
        return 0
    if is_onnx_op(node, "LSTM", "GRU", "RNN"):
        return 1
    if is_onnx_op(node, "Gather"):
        return 0
    axis = weight_channel_axis(node, index)
    return axis % rank if axis is not None and -rank <= axis < rank else None


def _zero_point(node: ir.Node) -> np.ndarray | None:
    place = {"MatMulInteger": 3, "ConvInteger": 3, "QLinearConv": 5}.get(node.op_type)
    if place is None or len(node.inputs) <= place:
        return None
    found = constant_array(node.inputs[place])
    return None if found is None or found.size != 1 else found.astype(np.int64)


def _nbits_weight(node: ir.Node) -> Weight | None:
    """What a MatMulNBits multiplies with: its product with the identity."""
    rows = node.attributes["K"].as_int()
    copies = [None if v is None else constant_array(v) for v in node.inputs[1:]]
    if copies[0] is None:
        return None
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, rows]))
    inputs: list[ir.Value | None] = [x]
    initializers = []
    for value in node.inputs[1:4]:
        inputs.append(None)
        if value is not None:
            copy = ir.Value(
                name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
            )
            initializers.append(copy)
            inputs[-1] = copy
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    attributes = list(node.attributes.values())
    alone = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[y])
    graph = ir.Graph(
        [x], [y], nodes=[alone], initializers=initializers, opset_imports={"": 18, node.domain: 1}
    )
    with OrtRunner(ir.Model(graph, ir_version=10), optimize=False) as runner:
        array = runner.run({"x": np.eye(rows, dtype=np.float32)})["y"]
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    return Weight(node.inputs[1].name or "", array.astype(np.float64), 1, bits, None, "block")  # type: ignore[union-attr]


def paired_weights(ours: Iterable[Weight], theirs: Iterable[Weight]) -> list[tuple[Weight, Weight]]:
    """Weights of a layer that belong together: of equal shape (or turned), most alike first."""
    found, free = [], list(theirs)
    for mine in ours:
        ranked = []
        for other in free:
            for turned in (other, _turned(other)):
                if turned.array.shape == mine.array.shape:
                    ranked.append((_alike(mine.array, turned.array), other, turned))
        if ranked:
            _, other, turned = max(ranked, key=lambda item: item[0])
            free.remove(other)
            found.append((mine, turned))
    return found


def _turned(weight: Weight) -> Weight:
    """The transposed matrix."""
    if weight.array.ndim != 2:
        return weight
    return dataclasses.replace(
        weight,
        array=weight.array.T,
        integers=None if weight.integers is None else weight.integers.T,
        axis=None if weight.axis is None else 1 - weight.axis % 2,
    )


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.reshape(-1)[:65536].astype(np.float64), b.reshape(-1)[:65536].astype(np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return abs(float(x @ y)) / norm if norm > 0 else 0.0
