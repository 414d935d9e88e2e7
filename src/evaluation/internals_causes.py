"""What is wrong with a layer, and what to do about it, from what was measured there.

Here: `find_culprits`: rules over sites, each a cause with a remedy. Thresholds are against theory
(what the bits allow) or the other layers. Not here: measuring.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .drift import Line, Rounding
from .internals_sites import Site
from .internals_weights import WeightDrift

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BOUNDED = ("Softmax", "Sigmoid", "HardSigmoid", "Tanh", "LogSoftmax")
"""Operators whose range is known: tools quantize their results to all of it."""

LOSS = 8.0
"""dB below the ideal scale from which a scale is wrong: one four times too big loses 12."""
CUT_LOSS = 3.0
"""dB from which a range far narrower than the data's is too narrow: clipping ought to win some."""
WIDE = 2.8
"""Times the data's range from which a quantizer's is too wide."""
GAIN = 0.5
"""log2 of a gain from which it is no rounding."""
GOOD = 25.0
"""dB from which clipping does no harm worth a word: observers trade some of it for finer steps."""
WEAK = 15.0
"""dB below which a layer alone does harm, whatever the others do."""
LOW_BITS = 12.0
"""dB below which the result of a layer of 4 or fewer bits is too coarse."""
CHANNEL = 10.0
"""dB below which a channel is lost."""


@dataclasses.dataclass(frozen=True)
class Culprit:
    """A layer out of its expected range: what is wrong, the measurement that says so, the remedy.

    `cause` is one of `CAUSES`. `value` is the original's value, `candidate` the candidate's,
    `factor` by how much a scale is off (above 1: too big), `channels` the ones concerned, `sqnr`
    that of the layer alone, in dB.
    """

    layer: str
    op: str
    value: str
    candidate: str
    cause: str
    what: str
    remedy: str
    sqnr: float
    factor: float | None = None
    channels: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.layer} ({self.op}): {self.what} -> {self.remedy}"


CAUSES = {
    "overflow": "leave it in float32: {name}{{keep=['{node}']}}, or compile with calibration data, "
    "which finds such values",
    "not_finite": "leave the layer in float: exclude=['{node}']",
    "activation_scale_too_small": "calibrate on data like this, or with an observer that clips "
    "less (minmax, a higher percentile)",
    "activation_scale_too_large": "calibrate on data like this, or with an observer that ignores "
    "outliers (percentile, mse)",
    "saturating_channel": "an observer that clips less, equalization of channels, or "
    "exclude=['{node}']",
    "weight_scale": "write the weight's scale anew; quantize the layer again from the original",
    "channel_scale": "write those channels' scales anew; quantize the layer again",
    "saturated_weights": "scales that span the weight (minmax) in those channels",
    "dead_channel": "restore those channels: quantize the layer again, per channel",
    "bias_lost": "write the bias anew; quantize the layer again",
    "pair_scales_differ": "one scale for the QuantizeLinear and its DequantizeLinear",
    "range_mixing": "leave the Concat in float (exclude=['{node}']), so that its inputs have "
    "scales of their own",
    "outlier_channels": "SmoothQuant or equalization, which move the range into the weights; or "
    "exclude=['{node}']",
    "per_tensor_weights": "a scale for each channel: per_channel=True",
    "low_bits": "more bits for this layer, smaller blocks, or exclude=['{node}']",
    "stands_out": "exclude=['{node}'], or more bits for it",
}
"""Every cause and its remedy."""


def find_culprits(sites: Sequence[Site]) -> list[Culprit]:
    """The culprits, worst first; at most one of a cause at each layer."""
    typical, spread = _typical(sites)
    majority = _usage(sites)
    found: list[tuple[float, Culprit]] = []
    for site in sites:
        own: dict[str, Culprit] = {}
        for rule in (
            _not_finite,
            _rounding,
            _weights(majority),
            _results(typical),
            _mixture,
            _bits,
        ):
            for item in rule(site):
                own.setdefault(item.cause, item)
        if any(_overflows(source) for source in site.reads):  # its feed was cut to what fits
            own = {k: v for k, v in own.items() if k == "overflow"}
        elif not own:
            for item in _stands_out(site, typical, spread):
                own[item.cause] = item
        found += [(_harm(site), item) for item in own.values()]
    found.sort(key=lambda pair: -pair[0])
    return [item for _, item in found]


def _harm(site: Site) -> float:
    """Noise over signal of the layer alone; what is not finite comes first."""
    sqnr = min(site.injected.sqnr, site.computed.sqnr if site.computed.count else math.inf)
    return -sqnr


def _culprit(
    site: Site,
    cause: str,
    what: str,
    factor: float | None = None,
    channels: Iterable[Any] = (),
    name: str = "fp16",
) -> Culprit:
    return Culprit(
        layer=site.node,
        op=site.op,
        value=site.pair.original,
        candidate=site.pair.candidate,
        cause=cause,
        what=what,
        remedy=CAUSES[cause].format(node=site.node, name=name),
        sqnr=site.injected.sqnr,
        factor=factor,
        channels=tuple(int(c) for c in channels),
    )


def _typical(sites: Sequence[Site]) -> tuple[float, float]:
    """The median SQNR of layers that are not exact, and a robust spread."""
    values = [s.injected.sqnr for s in sites if math.isfinite(s.injected.sqnr)]
    values = [v for v in values if v < 90]
    if len(values) < 4:
        return 30.0, 5.0
    middle = float(np.median(values))
    return middle, max(1.4826 * float(np.median(np.abs(np.array(values) - middle))), 1.0)


def _usage(sites: Sequence[Site]) -> float:
    """How much of the integers' range weights of this model use: half of it with reduced range."""
    found = [w.usage for s in sites for w in s.weights if w.bits == 8 and w.usage < 1.01]
    return float(np.median(found)) if found else 1.0


# --- rules -----------------------------------------------------------------------------------


def _not_finite(site: Site) -> Iterator[Culprit]:
    broken = site.injected.broken + site.computed.broken
    low, high = site.extent.span
    peak = max(abs(low), abs(high))
    if site.dtype in _HALVES:
        name = "fp16" if site.dtype == ir.DataType.FLOAT16 else "bf16"
        most = 65504.0 if name == "fp16" else 3.39e38
        if broken or peak > most:
            what = f"{name} ends at {most:.6g}; the original's values reach {peak:.4g}"
            if peak <= most:
                what = f"not finite in {name}: it overflows on the way to values of {peak:.4g}"
            yield _culprit(site, "overflow", what, name=name)
    elif broken:
        cause = "overflow" if site.half_inside else "not_finite"
        yield _culprit(
            site, cause, f"{broken} values are not finite where the original's reach {peak:.4g}"
        )


def _overflows(site: Site) -> bool:
    return any(item.cause == "overflow" for item in _not_finite(site))


def _rounding(site: Site) -> Iterator[Culprit]:
    """Is the activation's scale right for what the original has there?"""
    rounding = site.rounding
    if rounding is None or not rounding.signal or site.injected.broken:
        return
    ratio = _ratio(rounding)
    loss = rounding.ideal_sqnr - rounding.sqnr
    clipped = rounding.channel_clipped()
    channels = _clipping_channels(rounding, clipped)
    low, high = site.extent.span
    quantizer = rounding.quantizer
    ranges = f"{quantizer.low:.4g}..{quantizer.high:.4g} for values of {low:.4g}..{high:.4g}"
    if channels.size:
        shown = ", ".join(str(c) for c in channels[:5])
        yield _culprit(
            site,
            "saturating_channel",
            f"channel {shown} is clipped ({100 * clipped[channels].max():.0f} % of it): the range "
            f"is {ranges}",
            1 / _overshoot(rounding, site),
            channels,
        )
    elif (
        rounding.clipped_share > 0
        and ratio < 1
        and _cuts(rounding.sqnr, loss, _overshoot(rounding, site))
    ):
        yield _culprit(
            site,
            "activation_scale_too_small",
            f"the range is {ranges}: {100 * rounding.clipped_share:.2g} % are clipped, "
            f"{loss:.0f} dB lost; the scale is some {1 / _overshoot(rounding, site):.2g} of what "
            "it should be",
            1 / _overshoot(rounding, site),
        )
    elif loss > LOSS and ratio > WIDE and site.op not in _BOUNDED and not quantizer.shared:
        yield _culprit(
            site,
            "activation_scale_too_large",
            f"the range is {ranges}: {loss:.0f} dB lost; the scale is {ratio:.2g} times what "
            "it should be",
            ratio,
        )
    peaks = site.extent.peaks
    alive = peaks[peaks > 0]
    if alive.size >= 8 and not channels.size and loss < LOSS:
        outlying = float(alive.max() / np.median(alive))
        typical = float(np.median(rounding.channel_sqnr()[peaks > 0]))
        if outlying > 15 and typical < CHANNEL:
            worst = np.argsort(-peaks)[:3]
            yield _culprit(
                site,
                "outlier_channels",
                f"channel {', '.join(map(str, worst[:1]))} reaches {outlying:.0f} times the median "
                f"channel, which is left with {typical:.0f} dB",
                None,
                worst[:1],
            )


def _cuts(sqnr: float, loss: float, overshoot: float) -> bool:
    """Whether clipping does harm: by what it loses, or where much is cut off and nothing won."""
    return sqnr < GOOD and (loss > LOSS or (loss > CUT_LOSS and overshoot > WIDE))


def _ratio(rounding: Rounding) -> float:
    q, ideal = rounding.quantizer, rounding.ideal
    return (q.high - q.low) / max(ideal.high - ideal.low, 1e-30)


def _overshoot(rounding: Rounding, site: Site) -> float:
    """How many times the data exceed the quantizer's range."""
    low, high = site.extent.span
    q = rounding.quantizer
    over = [high / q.high if q.high > 0 else 1.0, low / q.low if q.low < 0 else 1.0]
    return max(*over, 1e-9)


def _clipping_channels(rounding: Rounding, clipped: np.ndarray) -> np.ndarray:
    """The few channels that nearly all the clipping is in, where it ruins them."""
    if len(clipped) < 4:
        return np.zeros(0, np.int64)
    ruined = (clipped > 0.05) & (rounding.channel_sqnr() < 2 * CHANNEL)
    few = 0 < ruined.sum() <= max(1, len(clipped) // 8)
    counts = rounding.rows[1]
    if not few or counts[ruined].sum() < 0.8 * counts.sum():
        return np.zeros(0, np.int64)
    return np.flatnonzero(ruined)


def _weights(majority: float) -> Callable[[Site], Iterator[Culprit]]:
    def rule(site: Site) -> Iterator[Culprit]:
        for weight in site.weights:
            yield from _one_weight(site, weight, majority)

    return rule


def _one_weight(site: Site, weight: WeightDrift, majority: float) -> Iterator[Culprit]:
    name = weight.name
    if weight.bits > 16:
        return
    if weight.saturated and len(weight.saturated) > 0.5 * _channels(weight):
        yield _culprit(
            site,
            "weight_scale",
            f"the scale of {name!r} is too small: {100 * weight.end_share:.0f} % of it at the ends "
            f"of int{weight.bits}, {weight.clipping:.2g} times its range is cut off",
            1 / weight.clipping,
        )
    elif weight.saturated and _channel_sqnr(site, weight.saturated) < 2 * CHANNEL:
        shown = ", ".join(str(c) for c in weight.saturated[:5])
        yield _culprit(
            site,
            "saturated_weights",
            f"channel {shown} of {name!r} is clipped at the ends of int{weight.bits}",
            None,
            weight.saturated,
        )
    if weight.bits == 8 and weight.usage * WIDE < min(2 * majority, 1.0) and weight.loss > LOSS:
        yield _culprit(
            site,
            "weight_scale",
            f"the scale of {name!r} is too big: integers reach only {weight.usage:.2g} of int8's "
            f"range",
            majority / weight.usage,
        )
    tensor = weight.granularity == "tensor" and weight.channel_spread > 6
    gain = weight.channel_ideal_sqnr - weight.ideal_sqnr
    if tensor and gain > 3:
        lost = float(np.mean(site.computed.channel_sqnr() < CHANNEL))
        if lost > 0.1 or site.computed.sqnr < 20:
            yield _culprit(
                site,
                "per_tensor_weights",
                f"one scale for {name!r}, whose widest channel is {weight.channel_spread:.0f} "
                f"times the median; {100 * lost:.0f} % of channels have under {CHANNEL:.0f} dB",
            )


def _channels(weight: WeightDrift) -> int:
    return max(weight.channels, 1)


def _channel_sqnr(site: Site, channels: Sequence[int]) -> float:
    """Of the worst of some channels of the layer's result; low where that can't be told."""
    found = site.computed.channel_sqnr()
    inside = [found[c] for c in channels if c < len(found)]
    return float(min(inside, default=-math.inf))


def _results(typical: float) -> Callable[[Site], Iterator[Culprit]]:
    """Gains and offsets of what a layer makes of the original's values."""

    def rule(site: Site) -> Iterator[Culprit]:
        drift = site.computed
        if site.is_input or not drift.count or drift.broken:
            return
        line = drift.line()
        usable = line.spread > 0
        if not usable.any() or line.overall <= 0:
            yield from _dead(site, line.gain, line.spread)
            return
        off = math.log2(line.overall)
        if site.odd and drift.sqnr < WEAK:
            yield _culprit(
                site,
                "pair_scales_differ",
                f"the pair of {site.odd[0]!r}, which it reads, quantizes with another scale than "
                f"it dequantizes with: results are {line.overall:.2g} times the original's",
                line.overall,
            )
            return
        middle = float(np.median(line.gain[usable]))
        whole = usable.sum() < 4 or (middle > 0 and abs(math.log2(middle)) > GAIN)
        if abs(off) > GAIN and whole and drift.sqnr < WEAK:
            cause = "weight_scale" if site.weights else "stands_out"
            size = "big" if off > 0 else "small"
            weight = (
                f"; the scale of {site.weights[0].name!r} is too {size}" if site.weights else ""
            )
            yield _culprit(
                site,
                cause,
                f"results are {line.overall:.2g} times the original's{weight}",
                line.overall,
            )
        else:
            yield from _dead(site, line.gain, line.spread)
            yield from _channel_scales(site, line)
            offsets = drift.offset_share > 0.7 and drift.sqnr < min(25.0, typical)
            if offsets and _lost(site, line.offset):
                yield _culprit(
                    site,
                    "bias_lost",
                    f"{100 * drift.offset_share:.0f} % of the error is a constant of each channel: "
                    "the bias is lost or wrong",
                )

    return rule


def _dead(site: Site, gain: np.ndarray, spread: np.ndarray) -> Iterator[Culprit]:
    if not site.weights or len(gain) < 2:
        return
    lively = spread > 0.01 * np.median(spread[spread > 0]) if (spread > 0).any() else spread > 0
    dead = np.flatnonzero(lively & (np.abs(gain) < 0.1))
    known = {c for w in site.weights for c in w.dead}
    if dead.size and (known or dead.size <= max(1, len(gain) // 4)):
        shown = ", ".join(str(c) for c in dead[:5])
        yield _culprit(
            site,
            "dead_channel",
            f"channel {shown} no longer follows the original's"
            + (": its weights are zero" if known & set(dead.tolist()) else ""),
            None,
            dead,
        )


def _lost(site: Site, offset: np.ndarray) -> bool:
    """Whether the offsets are what a bias of the original adds, or too much for rounding.

    Coarse weights move results too where what they multiply hardly varies (after a pooling).
    """
    for bias in site.biases:
        if bias.size == offset.size and (power := float(bias @ bias)) > 0:
            share = -float(bias @ offset) / power
            left = float(np.sum((offset + share * bias) ** 2))
            if abs(share - 1) < 0.3 and left < 0.2 * power:
                return True
    exact = all(w.bits >= 8 for w in site.weights) and site.gains is None
    return exact and not site.biases and site.computed.offset_share > 0.9


def _channel_scales(site: Site, line: Line) -> Iterator[Culprit]:
    gain, spread = line.gain, line.spread
    if not site.weights or len(gain) < 4:
        return
    lively = (spread > 0.01 * np.median(spread)) & (gain > 0.1)
    lively &= line.residue < 0.1 * gain**2 * spread  # else it is noise, no scale
    with np.errstate(divide="ignore", invalid="ignore"):
        off = lively & (np.abs(np.log2(np.where(gain > 0, gain, 1.0))) > 1.5 * GAIN)
    off &= site.computed.channel_sqnr() < CHANNEL
    saturated = {c for w in site.weights for c in w.saturated}
    channels = [c for c in np.flatnonzero(off) if c not in saturated]
    if 0 < len(channels) <= len(gain) // 4:
        shown = ", ".join(f"{c} ({gain[c]:.2g} times)" for c in channels[:5])
        yield _culprit(
            site,
            "channel_scale",
            f"channels are out of scale: {shown}",
            float(gain[channels[0]]),
            channels,
        )


def _mixture(site: Site) -> Iterator[Culprit]:
    """A Concat whose inputs share a scale that is right for one of them only."""
    if site.rounding is None:
        return
    spans = {n: e.span[1] - e.span[0] for n, e in site.mixed_extents.items()}
    widest = max(spans.values(), default=0.0)
    for name, rounding in site.mixtures.items():
        if not rounding.signal or rounding.ideal_sqnr - rounding.sqnr < 1.5 * LOSS:
            continue
        if rounding.sqnr < 20 and spans[name] * 8 < widest:
            yield _culprit(
                site,
                "range_mixing",
                f"{name!r} spans {spans[name]:.3g} and shares a scale with values that span "
                f"{widest:.3g}: {rounding.sqnr:.0f} dB are left of it",
                widest / spans[name] if spans[name] else None,
            )


def _bits(site: Site) -> Iterator[Culprit]:
    bits = [w.bits for w in site.weights if w.bits <= 4]
    if bits and site.computed.count and site.computed.sqnr < LOW_BITS:
        yield _culprit(
            site,
            "low_bits",
            f"{min(bits)}-bit weights leave {site.computed.sqnr:.0f} dB of its results",
        )


def _stands_out(site: Site, typical: float, spread: float) -> Iterator[Culprit]:
    sqnr = site.injected.sqnr
    limit = min(WEAK, typical - max(10.0, 4 * spread))
    if sqnr < limit and site.injected.signal > 0:
        yield _culprit(
            site,
            "stands_out",
            f"alone it leaves {sqnr:.0f} dB, where layers of this model have {typical:.0f}",
        )
