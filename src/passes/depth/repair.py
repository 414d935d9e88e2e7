"""What a removed block did on average, put in its place: a scale and a shift of each channel.

Here: `repair_cuts`. Not here: removing (`depth_removal`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder, Editor
from ..base import Feed
from ..quantize.capture import Capture, Progress

_SCALES = (0.25, 4.0)
"""A scale outside these does more than a block's mean effect."""


def repair_cuts(
    model: ir.Model,
    reference: ir.Model,
    places: Sequence[tuple[ir.Node, int]],
    samples: Sequence[Feed],
    progress: Progress = lambda done, total, what: None,
) -> int:
    """Give each place the scale and shift that bring it nearest to what the sum gave; how many
    were worth it.

    `places` are what `remove_blocks` left, in graph order, with their channel axes; `reference` is
    the model before. Each is fitted by least squares, given what those before it pass on, to one
    half of the samples, and kept where that takes a twentieth of the error or more off the other
    half; then it is fitted to both.
    """
    kept = 0
    values = {v.name: v for node in reference.graph for v in node.outputs}
    for done, (place, axis) in enumerate(places):
        progress(done, len(places), "fitting what blocks did on average")
        source = place.inputs[0]
        assert source is not None
        target = values[place.outputs[0].name]
        found = _fit(_moments(model, reference, source, target, axis, samples))
        if found is not None:
            _insert(place, source, axis, *found)
            kept += 1
    return kept


def _moments(
    model: ir.Model,
    reference: ir.Model,
    source: ir.Value,
    target: ir.Value,
    axis: int,
    samples: Sequence[Feed],
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of x, y, xx, xy, yy and of 1 over positions, for each half of the samples,
    [6, channels]."""
    sums: dict[int, np.ndarray] = {}
    with Capture(reference, [target]) as before, Capture(model, [source]) as now:
        for i, sample in enumerate(samples):
            y = before.run(sample, i)[target.name or ""]
            x = now.run(sample, i)[source.name or ""]
            # by content: no order of the samples changes who teaches and who judges
            half = zlib.crc32(np.ascontiguousarray(x).data) % 2
            rows, wanted = (
                np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]).astype(np.float64)
                for a in (x, y)
            )
            products = (rows, wanted, rows * rows, rows * wanted, wanted * wanted)
            found = np.stack([*(p.sum(0) for p in products), np.full(rows.shape[1], len(rows))])
            sums[half] = sums[half] + found if half in sums else found
    none = np.zeros_like(next(iter(sums.values())))
    return sums.get(0, none), sums.get(1, none)


def _fit(halves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift, None where they do not help samples that they were not fitted to."""
    if min(half[5].max() for half in halves) < 2:
        return None
    channels = halves[0].shape[1]
    nothing = np.ones(channels), np.zeros(channels)
    without = sum(_error(half, *nothing) for half in halves)
    crossed = sum(_error(b, *_solve(a)) for a, b in (halves, halves[::-1]))
    return _solve(halves[0] + halves[1]) if crossed < 0.95 * without else None


def _solve(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y, xx, xy, _, count = sums
    variance = xx - x * x / count
    covariance = xy - x * y / count
    safe = np.where(variance > 1e-9 * np.maximum(xx, 1e-30), variance, np.inf)
    scale = np.where(np.isinf(safe), 1.0, covariance / safe).clip(*_SCALES)
    return scale, (y - scale * x) / count


def _error(sums: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> float:
    x, y, xx, xy, yy, count = sums
    squares = scale * scale * xx + 2 * scale * shift * x + count * shift * shift
    return float(np.sum(squares - 2 * (scale * xy + shift * y) + yy))


def _insert(
    place: ir.Node, source: ir.Value, axis: int, scale: np.ndarray, shift: np.ndarray
) -> None:
    dtype = source.dtype
    assert dtype is not None
    trailing = 0 if axis == -1 or source.shape is None else len(source.shape) - axis - 1
    shape = (-1, *(1,) * trailing)
    editor = Editor()
    build = Builder(editor, place)
    scaled = build.Mul(source, scale.astype(dtype.numpy()).reshape(shape))
    moved = build.Add(scaled, shift.astype(dtype.numpy()).reshape(shape))
    editor.replace_input(place, 0, moved)
