"""The places where `inspect` measures: a value of the original, the candidate's, and the sums.

Here: `Site`, made from pairs, with the channels, quantizer, weights and inputs of Concats that
belong to it; and the gains of values that a candidate holds in other units. Not here: the runs over
the data (`internals`), judging (`internals_causes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.graph import constant_array, is_onnx_op, node_name
from ..ir.ops import Category, facts, is_elementwise
from ..targets.onnxruntime import OrtRunner
from .drift import Drift, Extent, Histogram, Rounding
from .internals_graph import (
    FLOATS,
    Quantizer,
    Side,
    forced_session,
    is_layer,
    is_matrix,
    odd_pairs,
    quantizer_of,
    region,
    seen_of,
    weight_inputs,
)
from .internals_match import Pair, Print, as_dtype, pre_activation, rename_feed
from .internals_weights import WeightDrift, collect, compare_weights, paired_weights

Arrays = Mapping[str, np.ndarray]

_SPATIAL = (Category.CONVOLUTION, Category.POOLING)
_HANDED_ON = 4
_NOTHING = 1e-4
"""The part of a variance that counts as none."""
_RESCALED = 0.2
"""log2 of a channel's gain from which a value may be in other units."""


@dataclasses.dataclass(eq=False)
class Site:
    """One matched value, and what is measured there.

    `raw_of` is what of the original the value before its Q is compared with (`before` the other
    choice); `seen` what the candidate's readers get; `gains` by channel where the candidate's units
    are others; `matrices` the original's nodes with weights that make it; `reads` the sites that it
    is made of; `biases` the vectors that the original's nodes read. `half_inside`: 16-bit floats on
    the way to it. `odd`: values whose DequantizeLinear, on the way, has another scale than its
    QuantizeLinear. `mixed`: inputs of a Concat that share this value's scale.
    """

    pair: Pair
    node: str
    op: str
    axis: int | None
    rank: int
    raw_of: str
    seen: str
    dtype: ir.DataType
    quantizer: Quantizer | None
    is_input: bool
    has_layer: bool
    matrices: tuple[str, ...] = ()
    before: str | None = None
    reads: tuple[Site, ...] = ()
    biases: tuple[np.ndarray, ...] = ()
    half_inside: bool = False
    odd: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    gains: np.ndarray | None = None
    weights: tuple[WeightDrift, ...] = ()
    extent: Extent = dataclasses.field(default_factory=lambda: Extent(None))
    rounding: Rounding | None = None
    histograms: tuple[Histogram, Histogram] | None = None
    mixtures: dict[str, Rounding] = dataclasses.field(default_factory=dict)
    mixed_extents: dict[str, Extent] = dataclasses.field(default_factory=dict)
    computed: Drift = dataclasses.field(default_factory=lambda: Drift(None))
    injected: Drift = dataclasses.field(default_factory=lambda: Drift(None))
    accumulated: Drift = dataclasses.field(default_factory=lambda: Drift(None))

    def __post_init__(self) -> None:
        self.extent = Extent(self.axis)
        self.computed, self.injected, self.accumulated = (Drift(self.axis) for _ in range(3))

    def in_units(self, array: np.ndarray) -> np.ndarray:
        """An array of the original in the candidate's units."""
        if self.gains is None or self.axis is None or array.shape[self.axis] != len(self.gains):
            return array
        shape = [1] * array.ndim
        shape[self.axis] = -1
        scaled: np.ndarray = array * self.gains.astype(array.dtype).reshape(shape)
        return scaled


def make_sites(
    original: Side, candidate: Side, pairs: Sequence[Pair], feed: Mapping[str, np.ndarray]
) -> list[Site]:
    """A site for each pair, in the candidate's order, weights compared."""
    sites = []
    for pair in pairs:
        value, theirs = original.values[pair.original], candidate.values[pair.candidate]
        maker = value.producer()
        assert theirs.dtype is not None
        rank = len(value.shape) if value.shape is not None else 4
        sites.append(
            Site(
                pair=pair,
                node=(maker.name if maker is not None else "") or pair.original,
                op=maker.op_type if maker is not None else "input",
                axis=channel_axis(value),
                rank=rank,
                raw_of=pair.original,
                before=pre_activation(original, pair, theirs),
                seen=seen_of(theirs).name or "",
                dtype=theirs.dtype,
                quantizer=quantizer_of(theirs),
                is_input=maker is None,
                has_layer=is_layer(maker) or is_layer(theirs.producer()),
                mixed=_mixed(original, value),
            )
        )
    _attach_weights(original, candidate, sites, feed)
    return sites


def channel_axis(value: ir.Value) -> int | None:
    """Where a value's channels are: axis 1 around convolutions, else the last; None in vectors."""
    if value.shape is not None and len(value.shape) < 2:
        return None
    near: ir.Value | None = value
    for _ in range(8):
        if near is None:
            break
        maker = near.producer()
        if maker is not None and _is_spatial(maker):
            return 1
        if any(_is_spatial(use.node) and use.idx == 0 for use in near.uses()):
            return 1
        if maker is None or not is_elementwise(maker):
            break
        near = next((v for v in maker.inputs if v is not None and v.dtype in FLOATS), None)
    return -1


def _is_spatial(node: ir.Node) -> bool:
    return facts(node).category in _SPATIAL or is_onnx_op(
        node, "BatchNormalization", "InstanceNormalization", "GroupNormalization"
    )


def _mixed(original: Side, value: ir.Value) -> tuple[str, ...]:
    """The inputs of the Concat that a value comes from, through moves."""
    maker = value.producer()
    while maker is not None and facts(maker).movement_only and not is_onnx_op(maker, "Concat"):
        source = maker.inputs[0]
        maker = None if source is None else source.producer()
    if maker is None or not is_onnx_op(maker, "Concat"):
        return ()
    return tuple(v.name or "" for v in maker.inputs if v is not None and v.name in original.values)


def _attach_weights(
    original: Side, candidate: Side, sites: Sequence[Site], feed: Mapping[str, np.ndarray]
) -> None:
    stops_o = {original.values[s.pair.original] for s in sites}
    stops_c = {v for s in sites for v in _names(candidate, s)}
    ours = {s: region(original.values[s.pair.original], stops_o, original.computed) for s in sites}
    theirs = {
        s: region(candidate.values[s.pair.candidate], stops_c, candidate.computed) for s in sites
    }
    weights_o = collect(original, [n for nodes in ours.values() for n in nodes], feed)
    own = rename_feed(feed, original, candidate)
    weights_c = collect(candidate, [n for nodes in theirs.values() for n in nodes], own)
    owner = {v: s for s in sites for v in _names(candidate, s)}
    for site in sites:
        values = dict.fromkeys(v for n in theirs[site] for v in n.inputs if v in owner)
        site.reads = tuple(dict.fromkeys(owner[v] for v in values if owner[v] is not site))
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for site in sites:
        site.half_inside = any(v.dtype in halves for n in theirs[site] for v in n.outputs)
        site.odd = tuple(q.inputs[0].name or "" for q in odd_pairs(theirs[site]) if q.inputs[0])
        site.matrices = tuple(
            node_name(n)
            for n in ours[site]
            if any(is_matrix(v) for v in weight_inputs(n, original.computed))
        )
        pairs = paired_weights(
            [w for n in ours[site] for w in weights_o.get(n, ())],
            [w for n in theirs[site] for w in weights_c.get(n, ())],
        )
        site.biases = tuple(_vectors(ours[site], original))
        site.weights = tuple(compare_weights(a, b) for a, b in pairs if a.array.size)


def _vectors(nodes: Sequence[ir.Node], side: Side) -> Iterator[np.ndarray]:
    """Constants of one axis that nodes read: biases, and what a batch norm adds."""
    for node in nodes:
        for value in weight_inputs(node, side.computed):
            array = constant_array(value)
            if array is not None and array.size == max(array.shape, default=0) > 1:
                yield array.reshape(-1).astype(np.float64)


def _names(candidate: Side, site: Site) -> list[ir.Value]:
    return [candidate.values[site.pair.candidate], candidate.by_name[site.seen]]


# --- values in other units -------------------------------------------------------------------


def find_gains(
    candidate: Side,
    sites: Sequence[Site],
    samples: Sequence[tuple[Arrays, Arrays, Arrays]],
) -> None:
    """Set what each value before its Q is compared with, and the gains of values that a candidate
    holds scaled by channel.

    Cross-layer equalization and SmoothQuant divide a value's channels and multiply what reads them.
    A value counts as such when its channels follow the original's with gains, and what reads it
    comes nearer to the original once it is fed so: after a wrong weight scale it does not.
    """
    plain = _lines(candidate, sites, samples)
    scaled, suspects = plain, []
    for _ in range(_HANDED_ON):  # what only passes channels on (a Relu) shows once it is fed so
        new = [s for s in sites if s.gains is None and not s.is_input and _is_scaled(s, scaled[s])]
        if not new:
            break
        for site in new:
            line = scaled[site].line()
            given = [r.gains for r in site.reads if r.gains is not None]
            silent = given[0] if given and len(given[0]) == len(line.gain) else 1.0
            gain = np.where(line.spread > 0, line.gain, silent)  # a channel that never fires here
            site.gains = np.where(gain > 1e-6, gain, 1.0)
        suspects += new
        scaled = _lines(candidate, sites, samples)
    order = {site: i for i, site in enumerate(sites)}
    suspects.sort(key=order.__getitem__)
    readers: dict[Site, list[Site]] = {s: [] for s in sites}
    for reader in sites:
        for source in reader.reads:
            readers[source].append(reader)
    for site in reversed(suspects):  # readers come later in the model, and are settled first
        before, after = (
            sum(_left(lines[reader]) for reader in readers[site]) for lines in (plain, scaled)
        )
        same = 0.5 * before <= after <= 2 * before or max(before, after) < _NOTHING
        passes_on = same and any(reader.gains is not None for reader in readers[site])  # a Relu
        if not passes_on and (not readers[site] or same or after > before):
            site.gains = None


def _lines(
    candidate: Side, sites: Sequence[Site], samples: Sequence[tuple[Arrays, Arrays, Arrays]]
) -> dict[Site, Drift]:
    """The drift of each value, before its Q, when fed the original's in the candidate's units."""
    session, inputs = open_forced(candidate, sites)
    found = {site: Drift(site.axis) for site in sites}
    with session as runner:
        for i, (reference, own, feed) in enumerate(samples):
            results = runner.run(forced_feed(sites, inputs, reference, own, feed))
            for site in sites:
                result = results[site.pair.candidate]
                if site.before is not None and i == 0:
                    mine = Print.of(result)
                    likeness = {
                        name: mine.correlation(Print.of(reference[name]))
                        for name in (site.pair.original, site.before)
                    }
                    site.raw_of = max(likeness, key=likeness.__getitem__)
                before = reference[site.raw_of]
                found[site].add(before, shaped(result, before))
    return found


def _is_scaled(site: Site, drift: Drift) -> bool:
    line = drift.line()
    if len(line.gain) < 2 or drift.broken:
        return False
    usable = (line.spread > 0) & (line.gain > 0)
    if usable.sum() < 2:
        return False
    clean = line.residue[usable] < 0.05 * line.gain[usable] ** 2 * line.spread[usable]
    logs = np.log2(line.gain[usable])
    apart = np.abs(logs) > _RESCALED
    return bool(clean.mean() > 0.8 and apart.mean() > 0.2 and np.ptp(logs) > _RESCALED)


def _left(drift: Drift) -> float:
    """The part of a result's variance that no gain and offset by channel explains."""
    line = drift.line()
    signal = float(np.sum(line.gain**2 * line.spread))
    return min(float(np.sum(line.residue)) / signal, 10.0) if signal > 0 else 10.0


# --- feeding -----------------------------------------------------------------------------------


def open_forced(
    candidate: Side, sites: Sequence[Site]
) -> tuple[OrtRunner, dict[str, tuple[str, np.dtype[Any]]]]:
    """A session whose layers read the original's values, giving each value before and after Q."""
    names = [n for s in sites for n in (s.pair.candidate, s.seen)]
    return forced_session(candidate, {s.pair.candidate: s.rank for s in sites}, names)


def forced_feed(
    sites: Sequence[Site],
    inputs: Mapping[str, tuple[str, np.dtype]],
    reference: Mapping[str, np.ndarray],
    own: Mapping[str, np.ndarray],
    feed: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The candidate's feed, with the original's arrays for what is forced, in the shapes that the
    candidate's `own` have."""
    given = dict(feed)
    for site in sites:
        if site.pair.candidate in inputs:
            key, dtype = inputs[site.pair.candidate]
            array = site.in_units(reference[site.pair.original])
            given[key] = as_dtype(shaped(array, own[site.seen]), dtype)
    return given


def shaped(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """An array reshaped to another's shape, where the size is the same."""
    return array.reshape(like.shape) if array.size == like.size else array
