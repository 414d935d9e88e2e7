"""What flows through a model on calibration samples, for methods that need more than ranges.

Here: `iterate`, the arrays of chosen values one sample at a time; `gram`, second moments of the
inputs of linear layers; `channel_stats`, extremes and means of channels. The last two fold the
samples in memory that does not grow with their number. Not here: ranges of activations
(`calibrate`), what is made of it (`adaround`, `smooth_quant`, GPTQ and others).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import CalibrationError, UsageError
from ...targets.feed import check_feed, input_specs
from ...targets.onnxruntime import OrtRunner
from ..base import Feed
from ..probe import run_on_sample
from .layers import LinearLayer, linear_layer

Progress = Callable[[int, int, str], None]
ROWS_A_SAMPLE = 4096
"""Rows of one layer taken from one sample: neighbouring patches of one image say little new."""


def _silent(done: int, total: int, what: str) -> None:
    """The progress that nobody watches."""


def require_samples(samples: Sequence[Feed] | None, pass_name: str, why: str) -> Sequence[Feed]:
    """The samples, if there are any.

    Raises:
        UsageError: there is no calibration data.
        CalibrationError: it is empty.
    """
    if samples is None:
        raise UsageError(
            f"The pass {pass_name!r} needs calibration data, and there is none",
            where=f"pass {pass_name!r}",
            why=why,
            fix="give `calibration=`, some tens of samples, each a dict from input name to array",
        )
    if len(samples) == 0:
        raise CalibrationError(
            "The calibration data is empty",
            where=f"pass {pass_name!r}",
            fix="give at least one sample; some tens of them cover the usual range",
        )
    return samples


class Capture:
    """A model ready to be run for chosen values: a context manager around one session.

    `values` are float results of nodes of the main graph, or its inputs. The session runs without
    the runtime's own rewrites, so that every value exists as the graph says.
    """

    def __init__(self, model: ir.Model, values: Iterable[ir.Value]) -> None:
        self._names = list(dict.fromkeys(value.name or "" for value in values))
        self._specs = input_specs(model)
        self._optional = list(model.graph.initializers)
        inputs = {spec.name for spec in self._specs}
        self._given = [name for name in self._names if name in inputs]
        self._computed = [name for name in self._names if name not in inputs]
        self._runner = (
            OrtRunner(_exposed(model, self._computed), optimize=False) if self._computed else None
        )

    def run(self, sample: Feed, index: int = 0) -> dict[str, np.ndarray]:
        """The arrays of the chosen values on one sample, by name.

        Raises:
            CalibrationError: the sample does not fit the model, or the model fails on it.
        """
        where = f"calibration sample {index}"
        check_feed(self._specs, sample, where=where, optional=self._optional, finite=True)
        found = {name: np.asarray(sample[name]) for name in self._given}
        if self._runner is not None:
            found |= run_on_sample(self._runner, sample, self._computed, where)
        return found

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._runner is not None:
            self._runner.close()


def iterate(
    model: ir.Model,
    values: Iterable[ir.Value],
    samples: Sequence[Feed],
    progress: Progress = _silent,
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of the chosen values (of the main graph), by name, one sample after the other.

    Only one sample's arrays are held. The model is not changed.

    Raises:
        CalibrationError: a sample does not fit the inputs, or the model fails on it.
    """
    with Capture(model, values) as capture:
        for i, sample in enumerate(samples):
            progress(i, len(samples), "capturing")
            yield capture.run(sample, i)
    progress(len(samples), len(samples), "capturing")


def _exposed(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the model that gives the named values only, less what nothing needs then."""
    copy = model.clone()
    graph = copy.graph
    by_name = {v.name: v for node in graph for v in node.outputs}
    graph.outputs[:] = [by_name[name] for name in names]
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    return copy


# --- second moments ----------------------------------------------------------------------------


@dataclasses.dataclass
class Gram:
    """Sums over the rows of a layer's inputs: X'X as float64 [groups, in, in], and of X itself.

    `layer` is the view of the node. `rows` counts them; divide by it for moments.
    """

    layer: LinearLayer
    matrix: np.ndarray
    total: np.ndarray
    rows: int = 0

    @property
    def mean(self) -> np.ndarray:
        """The mean input, [groups, in]."""
        mean: np.ndarray = self.total / max(1, self.rows)
        return mean

    def add(self, x: np.ndarray, limit: int = ROWS_A_SAMPLE) -> None:
        """Fold in one sample's data."""
        positions = self.layer.positions(x, limit)
        for chunk in self.layer.chunks(positions):
            rows = self.layer.inputs(x, chunk)
            # float32 products of a few thousand rows, summed in float64
            self.matrix += rows.swapaxes(1, 2) @ rows
            self.total += rows.sum(axis=1, dtype=np.float64)
        self.rows += len(positions)


def empty_gram(layer: LinearLayer) -> Gram:
    """Sums over no rows yet."""
    groups, size, _ = layer.shape
    return Gram(layer, np.zeros((groups, size, size)), np.zeros((groups, size)))


def gram_bytes(layer: LinearLayer) -> int:
    """The memory of one layer's sums."""
    groups, size, _ = layer.shape
    return 8 * groups * size * size


def gram(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    samples: Sequence[Feed],
    *,
    limit: int = ROWS_A_SAMPLE,
    progress: Progress = _silent,
) -> dict[ir.Node, Gram]:
    """Second moments of the inputs of each linear layer among `nodes` (of the main graph).

    `limit` is how many rows of one layer one sample gives at most (0: all). Nodes that are no
    linear layer are left out. For models whose sums do not fit in memory together, see
    `grams_in_turn`.
    """
    layers = [layer for node in nodes if (layer := linear_layer(node)) is not None]
    found = {layer.node: empty_gram(layer) for layer in layers}
    # nodes that read the same value the same way (q, k, v) share one set of sums
    shared: dict[tuple[object, ...], list[LinearLayer]] = {}
    for layer in layers:
        shared.setdefault(layer.rows_key, []).append(layer)
    for arrays in iterate(model, [layer.data for layer in layers], samples, progress):
        for first, *_ in shared.values():
            found[first.node].add(arrays[first.data.name or ""], limit)
    for first, *others in shared.values():
        for other in others:
            source = found[first.node]
            found[other.node] = Gram(other, source.matrix, source.total, source.rows)
    return found


def grams_in_turn(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    samples: Sequence[Feed],
    *,
    limit: int = ROWS_A_SAMPLE,
    budget_bytes: int = 1 << 29,
    progress: Progress = _silent,
) -> Iterator[tuple[ir.Node, Gram]]:
    """As `gram`, in node order, with at most about `budget_bytes` of sums alive at a time.

    The samples are run once for each batch of layers that fits.
    """
    batch: list[ir.Node] = []
    size = 0
    for node in [*nodes, None]:
        layer = linear_layer(node) if node is not None else None
        if node is not None and layer is None:
            continue
        need = gram_bytes(layer) if layer is not None else 0
        if batch and (node is None or size + need > budget_bytes):
            yield from gram(model, batch, samples, limit=limit, progress=progress).items()
            batch, size = [], 0
        if node is not None:
            batch.append(node)
            size += need


# --- channels ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """Per channel over all samples, float64: extremes, mean, and mean of magnitudes."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    mean_abs: np.ndarray
    count: int

    @property
    def peak(self) -> np.ndarray:
        """The greatest magnitude of each channel."""
        peak: np.ndarray = np.maximum(-self.low, self.high)
        return peak

    def union(self, other: ChannelStats) -> ChannelStats:
        """Both sets of samples together."""
        count = self.count + other.count
        share = other.count / max(1, count)
        return ChannelStats(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.mean + (other.mean - self.mean) * share,
            self.mean_abs + (other.mean_abs - self.mean_abs) * share,
            count,
        )


def channel_stats(
    model: ir.Model,
    axes: Mapping[ir.Value, int],
    samples: Sequence[Feed],
    progress: Progress = _silent,
) -> dict[ir.Value, ChannelStats]:
    """Statistics of each value along its channel axis (given by `axes`; may be negative)."""
    found: dict[ir.Value, ChannelStats] = {}
    for arrays in iterate(model, axes, samples, progress):
        for value, axis in axes.items():
            seen = stats_of(arrays[value.name or ""], axis)
            found[value] = found[value].union(seen) if value in found else seen
    return found


def stats_of(array: np.ndarray, axis: int) -> ChannelStats:
    """Statistics of one array along its channel axis."""
    rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return ChannelStats(
        rows.min(axis=0, initial=0.0).astype(np.float64),
        rows.max(axis=0, initial=0.0).astype(np.float64),
        rows.mean(axis=0, dtype=np.float64),
        np.abs(rows).mean(axis=0, dtype=np.float64),
        len(rows),
    )
