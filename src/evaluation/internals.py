"""Inside a candidate, layer by layer, against the original: weights, activations, whose error.

Here: `inspect` and its result, `Internals`. A layer's **injected** error is what it makes of the
original's own values; its **accumulated** error is that of the candidate as it runs, everything
before it included. Not here: matching (`internals_match`), sums (`drift`), judging
(`internals_causes`), plots (`internals_plots`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..passes.probe import run_on_sample
from ..samples import as_feeds
from ..targets.feed import input_specs
from ..targets.onnxruntime import OrtRunner
from .drift import Drift, Extent, Histogram, Rounding
from .internals_causes import Culprit, find_culprits
from .internals_graph import Side, as_graph, is_layer, is_matrix, weight_inputs
from .internals_match import match, rename_feed
from .internals_sites import Site, find_gains, forced_feed, make_sites, open_forced, shaped
from .internals_weights import WeightDrift

SCHEMA = "edgepass.internals"
SCHEMA_VERSION = 1

_FIRST = 3
"""Samples that units are found on."""

Feed = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Error:
    """A layer's values against the original's: SQNR in dB, cosine, the greatest difference, how
    many values are not finite that were, and the gain (1 when nothing is scaled)."""

    sqnr: float
    cosine: float
    largest: float
    not_finite: int
    gain: float

    @staticmethod
    def of(drift: Drift) -> Error:
        """Of the sums."""
        overall = drift.line().overall if drift.count else math.nan
        return Error(drift.sqnr, drift.cosine, drift.worst, drift.broken, overall)


@dataclasses.dataclass(frozen=True)
class ActivationDrift:
    """The values of a layer's result.

    `low`, `high`: the original's range on the data; `candidate_low`, `candidate_high`: what the
    candidate's readers see as it runs. For a value behind a Q/DQ pair: `bits`, the range
    `quant_low`..`quant_high`, the share of the original's values outside it and at the ends of the
    integers, and the SQNR in dB of this rounding alone, and of one with a scale that just spans the
    data. `histogram`: edges, counts of the original, counts of the candidate.
    """

    low: float
    high: float
    candidate_low: float
    candidate_high: float
    bits: int | None
    quant_low: float | None
    quant_high: float | None
    clipped_share: float | None
    end_share: float | None
    sqnr: float | None
    ideal_sqnr: float | None
    histogram: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One value of the original and the nodes of the candidate that make it.

    `name` is the original's node, `value` its result, `candidate` the candidate's name of it, `how`
    they were matched. `computed` is the error of the layer alone before its own Q/DQ pair,
    `injected` with it, `accumulated` that of the whole candidate up to here. `rescaled`: the
    candidate holds the value in other units by channel (equalization); errors are in those.
    """

    name: str
    op: str
    value: str
    candidate: str
    how: str
    dtype: str
    activation: ActivationDrift
    weights: tuple[WeightDrift, ...]
    computed: Error
    injected: Error
    accumulated: Error
    rescaled: bool
    causes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = dataclasses.asdict(self)
        edges, ours, theirs = data["activation"].pop("histogram")
        data["activation"]["histogram"] = {"edges": edges, "original": ours, "candidate": theirs}
        data["weights"] = [weight.as_dict() for weight in self.weights]
        return data


@dataclasses.dataclass(frozen=True)
class Internals:
    """What `inspect` found: layers in the candidate's order, and culprits, worst first.

    `matched` of the `weighted` nodes of the original that have weights are told apart: each is in a
    layer of its own. `how` counts the ways in which values were matched.
    """

    layers: tuple[Layer, ...]
    culprits: tuple[Culprit, ...]
    samples: int
    matched: int
    weighted: int
    how: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the original's nodes with weights that could be looked at alone."""
        return self.matched / self.weighted if self.weighted else 1.0

    def __getitem__(self, name: str) -> Layer:
        """A layer by its node's name, its value's, or the candidate's."""
        for layer in self.layers:
            if name in (layer.name, layer.value, layer.candidate):
                return layer
        raise UsageError(
            f"There is no layer {name!r}", fix=f"one of {', '.join(x.name for x in self.layers)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON form: `schema`, `version`, then the fields. Infinite dB become null in JSON."""
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "samples": self.samples,
            "matched": self.matched,
            "weighted": self.weighted,
            "how": dict(self.how),
            "notes": list(self.notes),
            "culprits": [c.as_dict() for c in self.culprits],
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def table(self, limit: int | None = 40) -> Any:
        """A `rich.table.Table`, a line a layer; the worst `limit` of them alone, in order."""
        from .internals_report import layer_table

        return layer_table(self, limit)

    def culprit_table(self) -> Any:
        """A `rich.table.Table`, a line a culprit: cause, measurement, remedy."""
        from .internals_report import culprit_table

        return culprit_table(self)

    def save_plots(self, folder: str | Path, *, layers: Sequence[str] | None = None) -> list[Path]:
        """Write `error-by-depth.png`, and a picture of distributions for each of `layers` (by
        default the culprits', or the worst three); returns the files.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from .internals_plots import save_plots

        return save_plots(self, Path(folder), layers)

    def __str__(self) -> str:
        from .internals_report import summary

        return summary(self)


def inspect(
    original: Any,
    candidate: Any,
    data: Any,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Internals:
    """Look inside a compressed model: which layer errs, by how much, why, and what to do.

    `original` and `candidate` are models in any form (`Compiled`, an artifact's folder, a path,
    ONNX); the candidate may come of edgepass or of another tool. `data` is as for calibration
    (`samples.as_feeds`): some ten samples are enough. Each is run three times and let go.

    Layers are computed as ONNX Runtime does without its optimizations: Q/DQ pairs one by one, so
    that what a kernel adds (saturating sums of u8 x s8 without VNNI) is not in the figures.

    Raises:
        UsageError: the models have different interfaces, or nothing matches.
        CalibrationError: the data do not fit.
        EdgepassError: a model can't be read or run.
    """
    ours, theirs = Side(as_graph(original)), Side(as_graph(candidate))
    feeds = as_feeds(data, input_specs(ours.model), finite=False)
    report = progress or (lambda done, total, what: None)
    pairs = match(ours, theirs, feeds[0])
    sites = make_sites(ours, theirs, pairs, feeds[0])
    if not any(site.has_layer for site in sites):
        raise UsageError(
            "No value of the candidate is one of the original",
            why=f"{len(theirs.values)} values against {len(ours.values)}, by name, place, "
            "structure and on data",
            fix="give the model that the candidate was made from",
        )
    _Inspection(ours, theirs, sites, feeds, report).run()
    culprits = find_culprits(sites)
    causes: dict[str, list[str]] = {}
    for item in culprits:
        causes.setdefault(item.candidate, []).append(item.cause)
    shown = [s for s in sites if s.has_layer or s.quantizer is not None]
    matched, weighted = _coverage(ours, sites)
    return Internals(
        layers=tuple(_layer(site, causes.get(site.pair.candidate, ())) for site in shown),
        culprits=tuple(culprits),
        samples=len(feeds),
        matched=matched,
        weighted=weighted,
        how=dict(Counter(site.pair.how for site in shown)),
        notes=tuple(_notes(ours, theirs, sites)),
    )


class _Inspection:
    """The runs over the data: once for ranges, once for everything else."""

    def __init__(
        self,
        original: Side,
        candidate: Side,
        sites: list[Site],
        feeds: Sequence[Feed],
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.original = original
        self.candidate = candidate
        self.sites = sites
        self.feeds = feeds
        self.progress = progress
        names = [n for s in sites for n in (s.pair.original, s.before or s.raw_of, *s.mixed)]
        self.names = list(dict.fromkeys(names))

    def run(self) -> None:
        """Fill the sites' sums."""
        total = 2 * len(self.feeds)
        with self.original.watch(self.names) as runner:
            first = []
            with self.candidate.watch(s.seen for s in self.sites) as free:
                for i, sample in enumerate(self.feeds[:_FIRST]):
                    own = rename_feed(sample, self.original, self.candidate)
                    first.append((_run(runner, sample, i), _run(free, own, i), own))
            for site in self.sites:
                site.rank = first[0][1][site.seen].ndim
            find_gains(self.candidate, self.sites, first)
            del first
            for i, sample in enumerate(self.feeds):
                self.progress(i, total, "ranges of the original")
                self._extend(_run(runner, sample, i))
            self._prepare()
            session, inputs = open_forced(self.candidate, self.sites)
            seen = [s.seen for s in self.sites]
            with session as forced, self.candidate.watch(seen) as free:
                for i, sample in enumerate(self.feeds):
                    self.progress(len(self.feeds) + i, total, "errors of layers")
                    reference = _run(runner, sample, i)
                    own = rename_feed(sample, self.original, self.candidate)
                    results = _run(free, own, i)
                    given = forced_feed(self.sites, inputs, reference, results, own)
                    self._add(reference, _run(forced, given, i), results)
        self.progress(total, total, "errors of layers")

    def _extend(self, reference: Mapping[str, np.ndarray]) -> None:
        for site in self.sites:
            site.extent.add(site.in_units(reference[site.pair.original]))
            if site.quantizer is not None:
                for name in site.mixed:
                    site.mixed_extents.setdefault(name, Extent(None)).add(reference[name])

    def _prepare(self) -> None:
        for site in self.sites:
            low, high = site.extent.span
            site.histograms = Histogram(low, high), Histogram(low, high)
            if site.quantizer is not None:
                site.rounding = Rounding(site.quantizer, site.extent)
                site.mixtures = {
                    name: Rounding(site.quantizer, extent)
                    for name, extent in site.mixed_extents.items()
                }

    def _add(
        self,
        reference: Mapping[str, np.ndarray],
        injected: Mapping[str, np.ndarray],
        accumulated: Mapping[str, np.ndarray],
    ) -> None:
        for site in self.sites:
            array = site.in_units(reference[site.pair.original])
            before = site.in_units(reference[site.raw_of])
            if not site.is_input:
                site.computed.add(before, shaped(injected[site.pair.candidate], before))
            site.injected.add(array, shaped(injected[site.seen], array))
            site.accumulated.add(array, shaped(accumulated[site.seen], array))
            if site.rounding is not None:
                site.rounding.add(array)
                for name, rounding in site.mixtures.items():
                    rounding.add(reference[name])
            assert site.histograms is not None
            site.histograms[0].add(array)
            site.histograms[1].add(accumulated[site.seen])


def _run(runner: OrtRunner, feed: Feed, index: int) -> dict[str, np.ndarray]:
    return run_on_sample(runner, feed, None, f"sample {index}")


def _layer(site: Site, causes: Sequence[str]) -> Layer:
    rounding, quantizer = site.rounding, site.quantizer
    low, high = site.extent.span
    assert site.histograms is not None
    edges = tuple(float(e) for e in site.histograms[0].edges)
    counts = [tuple(int(c) for c in h.counts) for h in site.histograms]
    seen = site.accumulated.ends
    activation = ActivationDrift(
        low=low,
        high=high,
        candidate_low=seen[0],
        candidate_high=seen[1],
        bits=None if quantizer is None else quantizer.dtype.bitwidth,
        quant_low=None if quantizer is None else quantizer.low,
        quant_high=None if quantizer is None else quantizer.high,
        clipped_share=None if rounding is None else rounding.clipped_share,
        end_share=None if rounding is None else rounding.end_share,
        sqnr=None if rounding is None else rounding.sqnr,
        ideal_sqnr=None if rounding is None else rounding.ideal_sqnr,
        histogram=(edges, counts[0], counts[1]),
    )
    dtype = site.dtype if quantizer is None else quantizer.dtype
    return Layer(
        name=site.node,
        op=site.op,
        value=site.pair.original,
        candidate=site.pair.candidate,
        how=site.pair.how,
        dtype=dtype.name.lower(),
        activation=activation,
        weights=site.weights,
        computed=Error.of(site.computed),
        injected=Error.of(site.injected),
        accumulated=Error.of(site.accumulated),
        rescaled=site.gains is not None,
        causes=tuple(causes),
    )


def _coverage(original: Side, sites: Sequence[Site]) -> tuple[int, int]:
    """How many nodes with weights are alone in their layer, and how many there are."""
    weighted = sum(
        1
        for node in original.graph
        if is_layer(node)
        and any(v in original.computed for v in node.outputs)
        and any(is_matrix(v) for v in weight_inputs(node, original.computed))
    )
    alone = sum(1 for site in sites if len(site.matrices) == 1)
    return min(alone, weighted), weighted


def _notes(original: Side, candidate: Side, sites: Sequence[Site]) -> list[str]:
    notes = []
    for side, which in ((original, "original"), (candidate, "candidate")):
        if side.hidden:
            notes.append(
                f"{side.hidden} nodes of the {which} are inside If, Loop or Scan: only what these "
                "give is compared"
            )
    crowded = [s for s in sites if len(s.matrices) > 1]
    if crowded:
        notes.append(
            f"{len(crowded)} layers hold several weighted nodes of the original, with no value in "
            f"common between them (first: {crowded[0].node})"
        )
    rescaled = sum(s.gains is not None for s in sites)
    if rescaled:
        notes.append(f"{rescaled} values are held in other units by channel (equalization)")
    return notes
