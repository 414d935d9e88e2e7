"""Second moments of the channels that go into layers and come out of them, on calibration data.

Here: `ChannelMoments` and `channel_moments`. A factorization of least error on the data needs no
more than these. Not here: what is made of them (`low_rank_factors`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..base import Feed
from ..quantize.capture import ROWS_A_SAMPLE, iterate

_BUDGET_BYTES = 1 << 29


@dataclasses.dataclass
class ChannelMoments:
    """Sums over positions of a value's channels: of their products and of themselves."""

    products: np.ndarray
    total: np.ndarray
    rows: int = 0

    def add(self, array: np.ndarray, axis: int) -> None:
        """Fold in one sample, at most `ROWS_A_SAMPLE` of its positions: which, its data says."""
        last = np.moveaxis(array, axis, -1)
        rows = last.reshape(-1, last.shape[-1])
        if len(rows) > ROWS_A_SAMPLE:
            generator = np.random.default_rng(zlib.crc32(np.ascontiguousarray(array).data))
            rows = rows[np.sort(generator.choice(len(rows), ROWS_A_SAMPLE, replace=False))]
        rows = rows.astype(np.float32)
        self.products += rows.T @ rows
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.rows += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """The mean of each channel."""
        mean: np.ndarray = self.total / max(1, self.rows)
        return mean

    def matrix(self, *, centred: bool, shrunk: bool = False) -> np.ndarray:
        """Second moments, about the mean where `centred`.

        `shrunk`: drawn towards their diagonal, the more the fewer rows there are for each channel:
        what a few samples never do together other data may (after Ledoit and Wolf 2004, "A
        well-conditioned estimator for large-dimensional covariance matrices").
        """
        moments: np.ndarray = self.products / max(1, self.rows)
        if centred:
            moments = moments - np.outer(self.mean, self.mean)
        if shrunk:
            share = len(moments) / (len(moments) + max(1, self.rows))
            moments = (1.0 - share) * moments + share * np.diag(np.diag(moments))
        return moments


def channel_moments(
    model: ir.Model,
    axes: Mapping[ir.Value, int],
    sizes: Mapping[ir.Value, int],
    samples: Sequence[Feed],
    progress: Callable[[int, int, str], None],
) -> dict[ir.Value, ChannelMoments]:
    """Moments of each value along its channel axis, of which `sizes` gives the length.

    Raises:
        CalibrationError: a sample does not fit the inputs, or the model fails on it.
    """
    found: dict[ir.Value, ChannelMoments] = {}
    batch: list[ir.Value] = []
    held = 0
    for value in [*axes, None]:
        need = 0 if value is None else 8 * sizes[value] ** 2
        if batch and (value is None or held + need > _BUDGET_BYTES):
            for part in batch:
                size = sizes[part]
                found[part] = ChannelMoments(np.zeros((size, size)), np.zeros(size))
            for arrays in iterate(model, batch, samples, progress):
                for part in batch:
                    found[part].add(arrays[part.name or ""], axes[part])
            batch, held = [], 0
        if value is not None:
            batch.append(value)
            held += need
    return found
